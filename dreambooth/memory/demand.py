"""What a training needs memory for, counted on a copy of the model that has none."""

import contextlib
import copy
import dataclasses
import math
from dataclasses import dataclass

from dreambooth.methods.table import METHODS, has_class_images, parameter_groups, preserves_prior
from dreambooth.models.encoding import rows_of
from dreambooth.models.quantized import BASES, in_fewer_bits
from dreambooth.models.streamed_blocks import recomputed_blocks
from dreambooth.training.course import check_rates
from dreambooth.training.levers import BYTES
from dreambooth.training.precision import compute_as_precision_says, is_as_weights_are, is_bf16_throughout
from dreambooth.training.shards import gathered_bytes


@dataclass(frozen=True)
class Demand:
    """What a training needs memory for, counted on a copy of the model that has none.

    `events` are in the order of the forward pass: (what, bytes, number of the recomputable stretch or None), where "kept" is
    a tensor that the backward pass will need, and "gradient" one that appears there. "copied" are the weights of a block that waits in the
    CPU's memory, and of the one that comes while it computes. A "gradient in bf16" appears instead where
    the denoiser computes in bf16 on copies; all of these are converted in the end.
    """

    trained: tuple  # the shapes of the tensors that train
    frozen: int  # bytes of what lies beside them
    passes: int  # backward passes whose gradients add up to one step
    events: tuple
    gathered: int = 0  # bytes of what a process has at most beside its shares, where the denoiser is split
    waiting: int = 0  # bytes of blocks that wait in the CPU's memory


def survey(s, models, subjects, recipe, resolution, plan, levers, told=None):
    """The Demand of a training: models without memory are given what trains and pass one batch forward.

    `told` is the conditioning of one prompt by text encoders that do not train, or None: then they are surveyed, too.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    if told:
        models = dataclasses.replace(models, tokenizers=[], text_encoders=[])
    halves = 2 if preserves_prior(s) else 1
    pictures = s.train_batch_size * (1 if levers.split_batch else halves)
    passes = s.gradient_accumulation_steps * (halves if levers.split_batch else 1)
    bf16_throughout, shape = is_bf16_throughout(s, models.family, levers, plan.precision), models.family.latent_shape(models.pipeline, resolution)
    with torch.device("meta"):
        hollow = hollow_models(s, models, plan, levers)
        groups = parameter_groups(s, hollow, subjects, recipe)
    parts = [hollow.denoiser, *hollow.text_encoders]
    stop_dice(parts)
    check_rates(s, groups)
    told = told and rows_of(told, torch.zeros(pictures, dtype=torch.long), torch.device("cpu"))
    trains_text = any(part in group.modules for group in groups for part in hollow.text_encoders)
    with FakeTensorMode(allow_non_fake_inputs=True):
        trained = fake_weights(parts, {parameter for group in groups for parameter in group.parameters})
        copied, fewer = set(), in_fewer_bits(hollow.denoiser, levers.base_precision) - set(trained)
        if bf16_throughout:
            copied = {p for p in hollow.denoiser.parameters() if p.dtype == torch.float32}.intersection(trained)
        blocks = recomputed_blocks(hollow.denoiser) if levers.offload_blocks else []
        waiting = {block: bytes_with(set(block.parameters()) - set(trained), fewer, levers) for block in blocks}
        compute_as_precision_says(s, models.family, levers, plan.precision, hollow.denoiser)
        latents, levels, sizes = (torch.empty(pictures, *each) for each in (shape, (), (6,)))
        prompts = [subjects[0].instance_prompt] * pictures
        with (torch.autocast("cpu", plan.dtype, plan.precision != "no", cache_enabled=False),
              listening(parts, trained, copied, fewer, waiting) as events):
            with torch.set_grad_enabled(trains_text):
                conditioning = told or hollow.family.encode(hollow, prompts)
            hollow.family.predict(hollow, latents, levels, conditioning, sizes)
    beside = {tensor for part in (parts if trains_text else parts[:1]) for tensor in (*part.parameters(), *part.buffers())}
    frozen = bytes_with(beside - set(trained), fewer, levers) - sum(waiting.values())
    if recipe.use_ema:
        frozen += sum(p.numel() for p in trained) * BYTES[levers.weights]
    if preserves_prior(s) and not has_class_images(s) and not METHODS[s.method].is_adapter:  # a copy of the denoiser as it was
        frozen += sum(p.numel() for p in hollow.denoiser.parameters()) * plan.dtype.itemsize
    shapes = tuple(tuple(p.shape) for p in trained)
    if not levers.shard:
        return Demand(shapes, frozen, passes, tuple(events), waiting=sum(waiting.values()))
    wider = BYTES["fp32"] / trained[0].itemsize  # shares of gradients are float32, whatever they were computed in
    events = tuple((what, size * wider if what == "gradient" else size, stretch) for what, size, stretch in events)
    return Demand(shapes, frozen, passes, events, gathered_bytes(models.family, hollow.denoiser, set(trained)))


def bytes_with(tensors, fewer, levers):
    """Bytes of tensors of which those in the set `fewer` are in fewer bits."""
    per_weight = BASES[levers.base_precision].bytes_per_weight
    return sum(math.ceil(tensor.numel() * per_weight) if tensor in fewer else tensor.nbytes for tensor in tensors)


def hollow_models(s, models, plan, levers):
    """Models like these with weights of the precision that they will have in training; made on torch's meta device, without memory.

    They are to pretend to be on the CPU, whose autocast leaves normalization in half precision; CUDA's does it in float32.
    """
    import torch

    hollow = dataclasses.replace(
        models, denoiser=type(models.denoiser).from_config(models.denoiser.config), tokenizers=copy.deepcopy(models.tokenizers),
        text_encoders=[type(part)(part.config) for part in models.text_encoders])
    for part in (hollow.denoiser, *hollow.text_encoders):
        part.to(torch.bfloat16 if levers.weights == "bf16" else torch.float32)
    for part in hollow.text_encoders[len(models.family.word_encoders):] if plan.precision != "no" else ():  # that never train
        part.to(torch.bfloat16)
    if METHODS[s.method].is_adapter or levers.shard:  # as it is gathered
        hollow.denoiser.to(plan.dtype)
    if plan.device.type == "cuda" and plan.precision != "no":
        how = s, models.family, levers, plan.precision
        under_autocast = [] if is_bf16_throughout(*how) or is_as_weights_are(*how) else [hollow.denoiser]
        normalize_in_float32([*under_autocast, *hollow.text_encoders])
    return hollow


def stop_dice(parts):
    """Have no LoKr of `parts` throw dice whether it is left out of a step: their result is not there without memory, nor needed."""
    for layer in (layer for part in parts for layer in part.modules() if hasattr(layer, "module_dropout")):
        layer.training = False


def normalize_in_float32(parts):
    import torch

    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.float().register_forward_pre_hook(lambda module, args: (args[0].float(),))


def fake_weights(parts, trained):
    """Give `parts` from the meta device weights that pretend to be on the CPU, as attention's choice of a kernel asks for a
    device; returns those in place of `trained`."""
    import torch

    fakes = []
    for module in (module for part in parts for module in part.modules()):
        for name, meta in list(module.named_parameters(recurse=False)):
            fake = torch.nn.Parameter(torch.empty_like(meta, device="cpu"), requires_grad=meta in trained)
            module.register_parameter(name, fake)
            fakes += [fake] if meta in trained else []
        for name, meta in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty_like(meta, device="cpu"))
    return fakes


@contextlib.contextmanager
def listening(parts, trained, copied, unpacked=frozenset(), streamed={}):
    """A list that receives the events of a Demand while `parts`, the UNet first, pass something forward.

    Those of `trained` that are `copied` get their gradients in bf16 first. Weights that are `unpacked` from fewer bits for each use
    are kept as an activation is. `streamed` is {block whose weights wait elsewhere: their bytes}.
    """
    import torch

    events, seen, stretch, hooks, waiting = [], {}, [None], [], set(trained)
    for part in parts:
        seen |= {tensor.untyped_storage()._cdata: tensor for tensor in (*part.parameters(), *part.buffers())
                 if tensor not in unpacked}
    owned = {module: list(module.parameters(recurse=False)) for part in parts for module in part.modules()}

    def keep(tensor, number):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage  # as long as it lives no other can have its number
            events.append(("kept", storage.nbytes(), number))
        return tensor

    def note_gradients(module, args, output):
        events.extend(("gradient in bf16", p.nbytes // 2, stretch[0]) if p in copied else ("gradient", p.nbytes, stretch[0])
                      for p in owned[module] if p in waiting)
        waiting.difference_update(owned[module])

    def recomputable(function, *args):
        for arg in args:
            if torch.is_tensor(arg):
                keep(arg, None)
        stretch[0] = len(events)
        if function in streamed:
            events.append(("copied", 2 * streamed[function], stretch[0]))  # the next one's are about as many
        output = function(*args)
        stretch[0] = None
        return output
    parts[0].enable_gradient_checkpointing(recomputable)
    hooks = [module.register_forward_hook(note_gradients) for part in parts for module in part.modules()]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: keep(tensor, stretch[0]), lambda tensor: tensor):
        yield events
    for hook in hooks:
        hook.remove()
    events[:0] = [("gradient", p.nbytes, None) for p in waiting] + [("gradient", p.nbytes // 2, None) for p in copied]
