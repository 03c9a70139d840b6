"""bf16 from end to end, on copies of float32 weights, and weights in bf16 that are rounded by chance."""

import functools

from dreambooth.methods.table import METHODS


def is_bf16_throughout(s, family, levers, precision):
    """Whether the denoiser computes as compute_in_bf16() has it, rather than under autocast.

    Not where copies of float32 weights would have to outlast the forward pass, as it is recomputed, or would hold gradients
    together that are to be freed one by one, nor where a split denoiser's are gathered as bf16 (see shards.py). DoRA's magnitudes
    need float32.
    """
    is_frugal = levers.gradient_checkpointing or levers.fused_backward or levers.shard
    return family.bf16_throughout and precision == "bf16" and not s.use_dora and (levers.weights == "bf16" or not is_frugal)


def compute_as_precision_says(s, family, levers, precision, denoiser):
    """Have a denoiser compute in bf16 from end to end where it may; elsewhere autocast sees to each operation."""
    if is_bf16_throughout(s, family, levers, precision):
        compute_in_bf16(denoiser, family.last_layers(denoiser))
    elif is_as_weights_are(s, family, levers, precision):
        compute_as_weights_are(denoiser)


def is_as_weights_are(s, family, levers, precision):
    """Whether the denoiser computes as compute_as_weights_are() has it."""
    return precision == "bf16" and (levers.shard or family.comes_late and METHODS[s.method].is_adapter)


def compute_as_weights_are(denoiser, dtype=None):
    """Have a denoiser with weights in bf16 (or `dtype`), or in fewer bits, compute as its pipeline does when it draws, without autocast.

    What is in float32, as a LoRA is, casts what comes and goes by itself. Times stay in float32, all else is cast on its way in.
    """
    import torch

    forward, dtype = denoiser.forward, dtype or torch.bfloat16

    def cast(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(cast, value))
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() and value.dim() > 1 else value

    def in_its_own(*args, **options):
        with torch.autocast(next(denoiser.parameters()).device.type, enabled=False):
            return forward(*map(cast, args), **{name: cast(value) for name, value in options.items()})
    denoiser.forward = in_its_own


def compute_in_bf16(denoiser, last):
    """Have a denoiser compute in bf16 from end to end, on copies of its float32 weights that are made anew for each pass.

    Autocast casts each weight and each gradient by itself, and goes to float32 and back for each normalization: these are nearly
    half of the kernels that a step launches. Here many are cast at once, but not all: the gradients of those would be there in
    both precisions. (Micikevicius et al., arXiv 1710.03740, section 3.1.)
    What comes `last`, a list of its layers, is in float32, since a good prediction differs from its target by little more than bf16's grain.
    """
    import torch

    forward, places = denoiser.forward, {}
    for module in denoiser.modules():
        dtype = torch.float32 if module in last else torch.bfloat16
        for name, weight in module.named_parameters(recurse=False):
            if weight.dtype != dtype:
                places.setdefault((dtype, weight.requires_grad), []).append((module._parameters, name, weight))
    groups = [(dtype, group) for (dtype, _), alike in places.items() for group in grouped(alike)]

    def in_bf16(sample, timestep, encoder_hidden_states, **rest):
        widening = last[0].register_forward_pre_hook(lambda module, args: (args[0].float(),))
        try:
            for dtype, group in groups:
                copies = cast_together()(dtype, *(weight for _, _, weight in group))
                for (parameters, name, _), copy in zip(group, copies):
                    parameters[name] = copy
            with torch.autocast(sample.device.type, enabled=False):
                return forward(sample.bfloat16(), timestep, encoder_hidden_states.bfloat16(), **rest)
        finally:
            widening.remove()
            for parameters, name, weight in (place for _, group in groups for place in group):
                parameters[name] = weight
    denoiser.forward = in_bf16


def grouped(places, size=2**25):
    """`places` (dictionary, key, tensor) in lists one after the other, each of little more than `size` numbers."""
    groups, held = [], size
    for place in places:
        if held >= size:
            groups, held = [*groups, []], 0
        groups[-1].append(place)
        held += place[2].numel()
    return groups


@functools.cache
def cast_together():
    """A function of a dtype and tensors: these in that dtype, and in the backward pass their gradients in the tensors' own."""
    import torch

    def cast(tensors, dtype):
        results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(results, list(tensors))
        return tuple(results)

    class Cast(torch.autograd.Function):
        @staticmethod
        def forward(context, dtype, *tensors):
            context.dtype = tensors[0].dtype
            return cast(tensors, dtype)

        @staticmethod
        def backward(context, *gradients):
            return None, *cast(gradients, context.dtype)
    return Cast.apply


def rounded_by_chance(values):
    """float32 `values` as one of the two neighbours in bf16, the nearer the likelier: right on average, so that steps
    smaller than bf16's grain are not lost (Gupta et al., arXiv 1502.02551)."""
    import torch

    bits = values.view(torch.int32)  # bf16 is the upper half of float32
    return (bits + torch.randint_like(bits, 1 << 16)).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()
