"""Frozen blocks of a transformer that wait in the CPU's memory, and come to where it computes, as copies, when it is their turn.

diffusers' own group offloading does not go with training: it takes a block's weights away when its forward pass is over, and the
backward pass, for which autograd has kept the very same tensors, would find them on the CPU. Here a block computes with copies, so that
autograd keeps what it needs of them. With gradient checkpointing the first pass keeps none, and the second one those of a single block
until its backward pass is over. What was put beside the weights later, such as a LoRA, goes where the denoiser goes.
"""

import contextlib
import functools

from dreambooth.base import GIB, say

NO_COPIES_OF_NF4 = "--offload_blocks: weights of --base_precision nf4 cannot be copied block by block; give int8 or bf16"
PIECE = 2**30  # bytes of memory that are locked at once; torch rounds each piece up to a power of two


def recomputed_blocks(denoiser):
    """The blocks of a transformer that gradient checkpointing recomputes, in the order in which they compute."""
    return [module for module in denoiser.modules() if type(module).__name__ in denoiser._no_split_modules]


def stream_blocks(denoiser, device):
    """Have the weights of a denoiser's blocks wait where they are, in the CPU's memory, whatever moves the denoiser, until the `device`
    computes with them. Returns the denoiser."""
    blocks = recomputed_blocks(denoiser)
    waiting = [leaf for block in blocks for weight in block.parameters() for leaf in leaves(weight)]
    say(f"Memory: {sum(leaf.nbytes for leaf in waiting) / GIB:.2f} GiB of the transformer wait in the CPU's memory, and come block by "
        f"block when they are needed.")
    if device.type == "cuda":
        lock(waiting)
    turns = Turns(blocks, device, ahead=device.type == "cuda")
    for number, block in enumerate(blocks):
        block.forward = functools.partial(turns.compute, number, block.forward)
        block._apply = functools.partial(turns.move, number)
    return denoiser


class Turns:
    """Blocks whose weights wait, and what has come of them: of one block, and of the next one if it is fetched `ahead`."""

    def __init__(self, blocks, device, ahead):
        self.blocks, self.device, self.ahead = blocks, device, ahead
        self.places = [[(part._parameters, name) for part in block.modules() for name, weight in part._parameters.items()
                        if weight is not None] for block in blocks]
        self.stream, self.last, self.coming = side_stream(device) if ahead else None, -1, {}

    def compute(self, number, forward, *args, **options):
        """What a block's own `forward` returns, with copies in place of its weights."""
        own = [parameters[name] for parameters, name in self.places[number]]
        copies = self.take(number)
        self.expect(number)
        try:
            for (parameters, name), copy in zip(self.places[number], copies):
                parameters[name] = copy
            copies = copy = None  # autograd alone keeps them beyond the block
            return forward(*args, **options)
        finally:
            for (parameters, name), weight in zip(self.places[number], own):
                parameters[name] = weight

    def take(self, number):
        """Copies of a block's weights, ready to be computed with; others that were on their way are dropped."""
        copies, arrival = self.coming.pop(number, None) or self.fetch(number)
        arrive(arrival, self.device)
        self.forget()
        return copies

    def expect(self, number):
        """Fetch what follows a block: the next one in a forward pass, the one before in a backward pass."""
        rises = number == self.last + 1 or number == 0 and self.last != 1
        following, self.last = number + (1 if rises else -1), number
        if self.ahead and 0 <= following < len(self.blocks):
            self.coming[following] = self.fetch(following)

    def fetch(self, number):
        """(copies of a block's weights on the device, what tells when they have arrived)."""
        import torch

        pairs = []
        with torch.no_grad():
            copies = [room_for(parameters[name], self.device, pairs) for parameters, name in self.places[number]]
            return copies, send(pairs, self.device, self.stream)

    def forget(self):
        """Drop what is on its way."""
        for _, arrival in self.coming.values():
            arrive(arrival, self.device)  # before its memory is used for anything else
        self.coming.clear()

    def move(self, number, convert, recurse=True):
        """Module._apply() of a block: what waits follows in its precision alone, and what is in fewer bits not even there."""
        import torch

        self.forget()
        own = [parameters[name] for parameters, name in self.places[number]]
        for (parameters, name), weight in zip(self.places[number], own):
            parameters[name] = None
        try:
            torch.nn.Module._apply(self.blocks[number], convert, recurse)
        finally:
            for (parameters, name), weight in zip(self.places[number], own):
                parameters[name] = weight
        for weight in own:
            dtype = weight.dtype if is_packed(weight) else convert(torch.empty(0, dtype=weight.dtype)).dtype
            if weight.dtype != dtype:
                weight.data = weight.data.to(dtype)
        return self.blocks[number]


def side_stream(device):
    import torch

    return torch.cuda.Stream(device)


def send(pairs, device, stream):
    """Copy the first of each pair of tensors into the second, beside all else if there is a `stream`; returns its event.

    The room was made by the computing stream and goes back to it: the copies wait for what that was still doing there.
    """
    import torch

    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        for source, target in pairs:
            target.copy_(source, non_blocking=True)
    return stream.record_event() if stream else None


def arrive(arrival, device):
    """Have the device compute nothing more until an event of send() has come."""
    import torch

    if arrival:
        torch.cuda.current_stream(device).wait_event(arrival)


def is_packed(tensor):
    """Whether a tensor is one of torchao's, made of others."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return is_traceable_wrapper_subclass(tensor)


def leaves(tensor):
    """The tensors that hold the numbers of one: itself, or those that torchao made it of."""
    return [leaf for name in tensor.__tensor_flatten__()[0] for leaf in leaves(getattr(tensor, name))] if is_packed(tensor) else [tensor]


def room_for(tensor, device, pairs):
    """An empty tensor like one that does not train, on a device; to `pairs` goes what has to be copied into it."""
    import torch

    if not is_packed(tensor):
        room = torch.empty_like(tensor, device=device, requires_grad=False)
        pairs.append((tensor, room))
        return room
    names, context = tensor.__tensor_flatten__()
    parts = {name: room_for(getattr(tensor, name), device, pairs) for name in names}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())


def lock(tensors):
    """Move tensors into memory whose pages stay where they are, from which a GPU fetches without the CPU; each in its place in a
    larger piece. Where the machine has no more of it, that is said, and the rest stays as it is."""
    spans = [-(-tensor.nbytes // 512) * 512 for tensor in tensors]
    piece, taken, rest = (), 0, sum(spans)
    for tensor, span in zip(tensors, spans):
        if span > len(piece) - taken:
            try:
                piece, taken = page_locked(max(span, min(PIECE, rest))), 0
            except RuntimeError:
                say(f"Note: {rest / GIB:.2f} GiB of that cannot be locked in the CPU's memory, and come more slowly.")
                return
        room = piece[taken:taken + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = room.copy_(tensor.data)
        taken, rest = taken + span, rest - span


def page_locked(size):
    import torch

    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
