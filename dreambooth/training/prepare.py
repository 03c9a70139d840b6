"""Making a Run of what is to train, and ordinary modules of it again."""

import dataclasses
import functools

from dreambooth.base import default, say
from dreambooth.device import Plan
from dreambooth.methods.groups import trained_tensors
from dreambooth.methods.table import METHODS, has_class_images
from dreambooth.models.encoding import rows_of
from dreambooth.models.families.family import text_encoders_of
from dreambooth.training.fused import fuse_backward
from dreambooth.training.optimizers import OPTIMIZERS, moment_options
from dreambooth.training.precision import compute_as_precision_says
from dreambooth.training.run import Run
from dreambooth.training.shards import gather, on_device, split
from dreambooth.training.untouched import make_untouched, untouched_copy


def prepare_training(s, course, models, groups, cache, accelerator, origin):
    """The Run of what is to train: brought to the device, wrapped for precision and processes, with optimizer and schedule."""
    device, training, levers = accelerator.device, [module for group in groups for module in group.modules], course.levers
    if levers.gradient_checkpointing:
        set_checkpointing(models, groups)
    trains_text = any(t in training for t in models.text_encoders)
    from_the_model = bool(cache.class_images) and not has_class_images(s)  # what the class is to be
    encoded = None if trains_text and not from_the_model else encode_for_good(models, cache.prompts, device)  # while the GPU is empty
    hollow = bring(s, models, groups, course, device)
    copied = from_the_model and not METHODS[s.method].is_adapter
    frozen_copy = untouched_copy(models.denoiser, Plan(device, course.precision).dtype, device) if copied else None
    compute_as_precision_says(s, models.family, levers, course.precision, models.denoiser)
    if s.compile:
        say("Compiling the denoiser's transformer blocks; the first steps take a minute longer.")
        models.denoiser.compile_repeated_blocks()
    optimizer = make_optimizer(s, levers.optimizer, groups, device)
    lr_scheduler = schedule_of(s, course, groups, optimizer)
    models, modules = wrapped(models, training, levers, accelerator)
    conditioning = prompt_conditioning(models, cache.prompts, None if trains_text else encoded, device)
    untouched = from_the_model and make_untouched(models, prompt_conditioning(models, cache.prompts, encoded, device), frozen_copy)
    at_once, grad_norms = s.train_batch_size * (1 if levers.split_batch else 2), []
    if levers.fused_backward:
        fuse_backward(optimizer, s.max_grad_norm, grad_norms, levers, accelerator)
    optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)  # it follows its parameters by itself
    noise = models.family.noise(s, models.pipeline, course.resolution, course.snr_gamma)
    averages = [tensor.clone() for tensor in trained_tensors(groups).values()] if course.use_ema else []
    return Run(s, course, models, groups, modules, conditioning, noise, cache, optimizer, lr_scheduler, accelerator, at_once, grad_norms,
               origin, averages, untouched or None, hollow)


def bring(s, models, groups, course, device):
    """Have what trains in its precision, on the device: no larger than it will be, and before there is an optimizer, which looks at
    where the parameters are. Returns what split() does if the denoiser is to be split, else None."""
    import torch

    levers = course.levers
    for parameter in (parameter for group in groups for parameter in group.parameters):
        parameter.requires_grad_(True)
        parameter.data = parameter.data.to({"fp32": torch.float32, "bf16": torch.bfloat16}[levers.weights])
    hollow = split(s, models.family, models.denoiser, groups, course.precision, device) if levers.shard else None
    for module in (module for group in groups for module in group.modules):
        on_device(module, device).train()
    if s.channels_last:
        models.denoiser.to(memory_format=torch.channels_last)
    return hollow


def wrapped(models, training, levers, accelerator):
    """(Models whose parts are ready for precision and processes, those of them that train). Text encoders at rest stay as they are."""
    def prepared(module):  # what does not train only passes gradients on; a fused step, or a split model, averages them by itself
        return accelerator.prepare_model(module, evaluation_mode=levers.fused_backward or levers.shard or module not in training)
    trains_text = any(part in training for part in models.text_encoders)
    parts = [models.denoiser, *models.text_encoders]
    ready = [prepared(part) if trains_text or part is models.denoiser else part for part in parts]
    modules = [module for module, part in zip(ready, parts) if part in training]
    return dataclasses.replace(models, denoiser=ready[0], text_encoders=ready[1:]), modules


def schedule_of(s, course, groups, optimizer):
    """The learning rate schedule of a course, in which a group rests once its time is over. It stays ours: accelerate would advance
    it once per process."""
    schedule = make_schedule(course.lr_scheduler, optimizer, s.lr_warmup_steps, course.steps, default(s.lr_num_cycles, 1),
                             default(s.lr_power, 1.0))

    def until(last, factor):
        return lambda step: factor(step) if step < last else 0
    schedule.lr_lambdas = [until(group.until * course.steps, factor) for group, factor in zip(groups, schedule.lr_lambdas)]
    return schedule


def make_optimizer(s, name, groups, device):
    """The optimizer of this name, for these ParameterGroups, with what the flags say of it."""
    def torch_group(group):
        decay = s.adam_weight_decay_text_encoder if group.name.startswith("text_encoder") else None
        return {"params": group.parameters, "lr": group.lr, "weight_decay": default(decay, s.adam_weight_decay)}
    kind = OPTIMIZERS[name]
    return kind.make([torch_group(group) for group in groups], s.adam_weight_decay, device, **moment_options(s) if kind.flags else {})


def make_schedule(name, optimizer, warmup, steps, cycles=1, power=1.0):
    """A learning rate schedule of diffusers or transformers. "warmup_stable_decay" falls linearly to 0 in its last quarter."""
    import torch
    from diffusers.optimization import get_scheduler
    from transformers import get_wsd_schedule

    if name == "warmup_stable_decay":
        return get_wsd_schedule(optimizer, warmup, steps // 4, steps, decay_type="linear")
    name = "constant_with_warmup" if name == "constant" else name  # diffusers' "constant" has no warmup
    ask = functools.partial(get_scheduler, name, num_warmup_steps=warmup, num_training_steps=steps, num_cycles=cycles,
                            power=power)
    if name != "polynomial":
        return ask(optimizer)
    # Each group's apart: a polynomial's factors depend on the rate that it begins with.
    alone = [torch.optim.SGD([torch.zeros(1)], lr=float(group["lr"])) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [ask(each).lr_lambdas[0] for each in alone])


def encode_for_good(models, prompts, device):
    """Conditioning by text encoders that do not train: they leave the GPU again."""
    import torch

    if models.book:
        return models.book.rows(models, prompts, device)
    for text_encoder in models.text_encoders:
        text_encoder.to(device)
    with torch.no_grad():
        encoded = models.family.encode(models, prompts)
    for text_encoder in models.text_encoders:
        text_encoder.to("cpu")
    return encoded


def prompt_conditioning(models, prompts, encoded, device):
    """A function from prompt numbers [B] to their conditioning.

    `encoded` is what encode_for_good() made of the prompts; if it is None, each call encodes every distinct prompt once. The
    numbers stay on the CPU, where counting them does not wait for the GPU.
    """
    def conditioning(numbers):
        distinct, numbers = (None, numbers) if encoded else numbers.unique(return_inverse=True)
        return rows_of(encoded or models.family.encode(models, [prompts[i] for i in distinct]), numbers, device)

    return conditioning


def set_checkpointing(models, groups):
    """Have activations recomputed in whatever gradients pass."""
    say("Gradient checkpointing: on (less memory, but slower).")
    for module in {models.denoiser, *(module for group in groups for module in group.modules)}:
        enable = (getattr(module, "enable_gradient_checkpointing", None) or getattr(module, "activation_checkpointing_enable", None)
                  or module.gradient_checkpointing_enable)  # diffusers', transformers' of today, and of before
        enable()


def unwrap(run):
    """Make ordinary modules of what trained, and forget what training alone needs. What was split the first process has whole.

    accelerate's own unwrap_model would strip transformers' wrappers of forward together with its autocast.
    """
    import torch

    pipeline = run.models.pipeline
    if run.hollow:
        gather(run.models.denoiser, run.hollow, run.accelerator.is_main_process)
        pipeline.register_modules(**{run.models.family.denoiser: run.hollow})
    for module in (run.models.family.denoiser_of(pipeline), *text_encoders_of(pipeline).values()):
        module.eval()
        for name in ("forward", "_original_forward"):
            vars(module).pop(name, None)
        for part in module.modules():
            part._compiled_call_impl = None
        module.to(memory_format=torch.contiguous_format)  # safetensors takes no other
    for group in run.groups:
        group.finish()
    run.optimizer.state.clear()
    run.averages.clear()
    if run.untouched:
        run.untouched.forget()
