"""An optimizer's state as plain tensors and numbers, and back, whatever the optimizer."""

from dreambooth.training.shards import is_share


def flatten_state(state):
    """({name: tensor}, {name: number}) of the states {parameter: {key: tensor or number}} of any optimizer.

    A quantized tensor becomes the plain ones it is made of; a split one stays as it is.
    """
    tensors, numbers = {}, {}
    named = {f"optimizer.{i}.{key}": value for i, values in state.items() for key, value in values.items()}
    for name, value in named.items():
        if not hasattr(value, "shape"):
            numbers[name] = value
        elif hasattr(value, "__tensor_flatten__") and not is_share(value):
            tensors |= {f"{name}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
        else:
            tensors[name] = value
    return tensors, numbers


def restore_state(tensors, numbers):
    """What flatten_state() was given."""
    state = {}
    for name, value in {**tensors, **numbers}.items():
        _, i, key, *part = name.split(".")
        values = state.setdefault(int(i), {})
        if part:
            values.setdefault(key, {})[part[0]] = value
        else:
            values[key] = value
    for values in state.values():
        for key, value in values.items():
            if isinstance(value, dict):
                from torchao.optim.subclass_8bit import OptimState8bit

                values[key] = OptimState8bit(**value, signed=bool(value["qmap"].min() < 0), dtype=value["scale"].dtype)
    return state


def give_state(optimizer, state, stays_on_cpu):
    """Give an optimizer the states {number of the parameter: {key: value}}, each tensor laid out as its parameter.

    Its own load_state_dict() would bring them into the parameters' precision and onto their device.
    """
    import torch

    parameters = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state.items():
        parameter, group = parameters[number]
        for key, value in values.items():
            if type(value) is torch.Tensor and value.shape == parameter.shape:
                value = torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)
            if torch.is_tensor(value) and (group.get("fused") if key == "step" else not stays_on_cpu):
                value = value.to(parameter.device)  # torch counts steps on the CPU unless its kernel is fused
            optimizer.state[parameter][key] = value
