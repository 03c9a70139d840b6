"""A denoiser split over processes block by block: each has a share of every tensor, of its gradient and of what the optimizer keeps.

It is torch's fully_shard, which accelerate calls FSDP2 (Rajbhandari et al., arXiv 1910.02054; Zhao et al., arXiv 2304.11277). A
block is whole while it computes, and no longer. What trains is float32 in the shares, and its gradients are sent in float32.
"""

import contextlib
import copy
import warnings

from dreambooth.methods.table import METHODS


def blocks_of(family, denoiser):
    """The modules that are split by themselves, innermost first, and then the denoiser, which has what is left."""
    names = family.blocks or denoiser._no_split_modules
    return [module for module in reversed(list(denoiser.modules())) if type(module).__name__ in names] + [denoiser]


def parameters_together(family, denoiser):
    """Lists of parameters that are gathered together, the last for as long as the denoiser computes."""
    taken, together = set(), []
    for module in blocks_of(family, denoiser):
        together.append([parameter for parameter in module.parameters() if parameter not in taken])
        taken.update(together[-1])
    return together


def gathered_bytes(family, denoiser, trained):
    """Bytes of what a process has at most beside its shares: what is gathered all along, two blocks, since the next one is fetched
    early, and the gradients of one as they are computed and as they are sent, in float32."""
    together = parameters_together(family, denoiser)
    sizes = [sum(parameter.nbytes for parameter in some) for some in together]
    gradients = [sum(p.nbytes + 4 * p.numel() for p in some if p in trained) for some in together]
    return sizes[-1] + 2 * max(sizes[:-1], default=0) + max(gradients)


def split(s, family, denoiser, groups, precision, device):
    """Split `denoiser` over all processes where it is, and bring its shares to the device one block after the other.

    In bf16 it computes on copies that are gathered in bf16, its last layers in float32 if its family has that; beside an adapter
    the frozen weights are in bf16 and all else in float32, as they are. The `groups` have the shares as their parameters from here.
    Returns a hollow copy of the denoiser, to gather() the result in.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    hollow, names = hollow_copy(denoiser), {id(parameter): name for name, parameter in denoiser.named_parameters()}
    copies = torch.bfloat16 if precision == "bf16" and not METHODS[s.method].is_adapter else None
    inner = MixedPrecisionPolicy(copies, torch.float32 if copies else None, cast_forward_inputs=False)
    options = {"mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)), "reshard_after_forward": True}
    if precision == "bf16" and family.bf16_throughout:
        fully_shard(family.last_layers(denoiser), mp_policy=MixedPrecisionPolicy(torch.float32), **options)
    for module in blocks_of(family, denoiser):
        fully_shard(module, mp_policy=inner, **options)
    shares = dict(denoiser.named_parameters())
    for group in groups:
        group.parameters[:] = [shares[names[id(parameter)]] for parameter in group.parameters]
    return hollow


def hollow_copy(module):
    """A copy of a module whose weights have no memory yet."""
    import torch

    def hollow(weight):
        return torch.nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    return copy.deepcopy(module, {id(weight): hollow(weight) for weight in module.parameters()})


def is_share(tensor):
    """Whether a tensor is one of which each process has a share."""
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """A tensor with the shares of all processes, which all have to ask for it."""
    return tensor.full_tensor() if is_share(tensor) else tensor


def share_like(tensor, parameter):
    """This process's share `tensor` as one that belongs to all, laid out as `parameter` is; as it is if that is not split."""
    from torch.distributed.tensor import DTensor

    if not is_share(parameter):
        return tensor
    return DTensor.from_local(tensor, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
                              stride=parameter.stride())


def on_device(module, device):
    """A module on the device. A split one is there already, and must not be moved."""
    return module if any(map(is_share, module.parameters())) else module.to(device)


def gather(denoiser, hollow, keeps):
    """Give a hollow_copy() the weights of a split denoiser, tensor by tensor, in the CPU's memory of the process that `keeps` them."""
    import torch

    for name, parameter in denoiser.named_parameters():
        tensor = whole(parameter.detach())
        if keeps:
            owner, _, own_name = name.rpartition(".")
            hollow.get_submodule(owner)._parameters[own_name] = torch.nn.Parameter(tensor.cpu(), requires_grad=False)


# ---- checkpoints, by torch.distributed.checkpoint: a .safetensors file of each process


def save_shares(tensors, folder):
    """Write {name: tensor}, the same names in all processes, each its shares."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    with own_failures():
        checkpoint.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


@contextlib.contextmanager
def own_failures():
    """What fails in any process within the block, such as for a full disk, is raised as it was there."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as problem:
        raise next(iter(problem.failures.values()))[0] from None


def load_shares(folder, parameter_of):
    """{name: tensor} of the .safetensors files in a folder, whoever wrote them: as shares if they are of the size of a split
    parameter_of(name), else whole."""
    import torch
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    def room_for(name, entry):
        parameter = parameter_of(name)
        if is_share(parameter) and parameter.shape == entry.size:
            return torch.empty_like(parameter.data, dtype=entry.properties.dtype)
        return torch.empty(entry.size, dtype=entry.properties.dtype)
    reader = HuggingFaceStorageReader(str(folder))
    tensors = {name: room_for(name, entry) for name, entry in reader.read_metadata().state_dict_metadata.items()}
    with own_failures(), warnings.catch_warnings(action="ignore"):  # of one process, that it is alone
        checkpoint.load(tensors, storage_reader=reader, no_dist=not any(map(is_share, tensors.values())))
    return tensors
