"""A LoRA under the names that ComfyUI, A1111, Forge and Kohya's tools have for a model's layers."""

import re


def lora_elsewhere(family, models, part, tensors, alpha):
    """{name: tensor} of the LoRA of a model's part, PEFT's `tensors`: for each layer a .lora_down.weight, a .lora_up.weight and its
    .alpha, of DoRA a .dora_scale. Layers whose weights other programs have in one are joined."""
    is_denoiser, pairs = part == family.denoiser, {}
    for name, tensor in tensors.items():
        layer, kind = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", name).groups()
        pairs.setdefault(layer, {})[kind] = family.rows_elsewhere(models.denoiser, layer, tensor) if kind == "lora_B" else tensor
    prefix, renamed = family.lora_prefixes[part], {}
    for theirs, ours in layers_elsewhere(family.lora_layers if is_denoiser else {}, pairs).items():
        pair = pairs[ours[0]] if len(ours) == 1 else joined(
            [pairs.get(layer) or models.denoiser.get_submodule(layer).out_features for layer in ours])
        scale = alpha * sum(layer in pairs for layer in ours)
        renamed |= lora_pair(prefix + (theirs if prefix.endswith(".") else theirs.replace(".", "_")), pair, scale)
    return renamed


def layers_elsewhere(table, layers):
    """{name of a layer there: names here of those that it is made of}, of those with a LoRA; by a table as Family.lora_layers."""
    places = {here + end: (there + name, [here + end for end in ends])
              for (here, there), names in table.items() for name, ends in names.items() for end in ends}
    found = {}
    for layer in layers:
        number = re.search(r"\.(\d+)\.", layer)
        sign = re.sub(r"\.\d+\.", ".*.", layer, count=1)
        theirs, ours = places.get(sign, (sign, [sign]))
        theirs, *ours = [name.replace("*", number[1] if number else "") for name in (theirs, *ours)]
        found[theirs] = ours
    return found


def joined(members):
    """The one pair of matrices that changes layers of one input, their outputs after each other, as their own pairs would:
    the downs on top of each other, the ups along a diagonal. A member is a pair or, without LoRA, the number of its outputs."""
    import torch

    pairs = [member for member in members if not isinstance(member, int)]
    like = pairs[0]["lora_B"]
    ups = [like.new_zeros(member, 0) if isinstance(member, int) else member["lora_B"] for member in members]
    return {"lora_A": torch.cat([pair["lora_A"] for pair in pairs]), "lora_B": torch.block_diag(*ups)}


def lora_pair(layer, pair, alpha):
    """{name: tensor} of one layer's pair of matrices, and its magnitudes if it has some."""
    import torch

    tensors = {f"{layer}.lora_down.weight": pair["lora_A"], f"{layer}.lora_up.weight": pair["lora_B"],
               f"{layer}.alpha": torch.tensor(float(alpha))}
    if (magnitudes := pair.get("lora_magnitude_vector")) is not None:
        tensors[f"{layer}.dora_scale"] = magnitudes.reshape(-1, *[1] * max(1, magnitudes.dim() - 1))  # [out, 1(, 1, 1)]
    return tensors
