"""The methods: what trains with each of them, and nothing else."""

import pytest
import torch
from conftest import FAMILIES

import dreambooth_implementation as db


@pytest.fixture
def changed(monkeypatch):
    """What training changed: {"before", "after"}: all weights, {"part/name": tensor}, and the groups that trained."""
    seen, optimize = {}, db.optimize

    def weights(models):
        return {f"{part}/{name}": tensor.detach().clone() for part, module in models.pipeline.components.items()
                if isinstance(module, torch.nn.Module) for name, tensor in module.named_parameters()}

    def watched(run, *rest):
        models, groups = run.models, run.groups
        names = {id(parameter): f"{part}/{name}" for part, module in models.pipeline.components.items()
                 if isinstance(module, torch.nn.Module) for name, parameter in module.named_parameters()}
        seen["groups"] = {group.name: {names[id(parameter)] for parameter in group.parameters} for group in groups}
        seen["before"] = weights(models)
        optimize(run, *rest)
        seen["after"] = weights(models)

    monkeypatch.setattr(db, "optimize", watched)
    return seen


@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet+text"])
@pytest.mark.parametrize("method", ["lora", "textual_inversion", "pivotal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_named_weights_change(family, method, text, train_adapter, changed):
    if text and method == "textual_inversion":
        pytest.skip("refused, see test_flags_of_other_methods_are_refused")
    train_adapter(family, method, *["--train_text_encoder", "--text_encoder_lr", "1e-2"] if text else [])
    before, after, groups = changed["before"], changed["after"], changed["groups"]
    encoders = ["text_encoder", "text_encoder_2"] if family == "sdxl" else ["text_encoder"]
    words, loras = groups.pop("new_words", set()), set().union(*groups.values())
    assert bool(words) == (method != "lora") and bool(loras) == (method != "textual_inversion")
    if loras:
        assert {name.split("/")[0] for name in loras} == {"unet", *(encoders if text else [])}
        assert all("lora_" in name and (".attn" in name or ".self_attn." in name) for name in loras)
        assert all(not torch.equal(before[name], after[name]) for name in loras)
    assert {name.split("/")[0] for name in words} == (set(encoders) if words else set())

    tables = {name for name in before if words and "token_embedding" in name and "new_rows" not in name}
    for name in before.keys() - loras - words - tables:
        assert torch.equal(before[name], after[name]), name
    for name in tables:
        old, new = before[name], after[name]
        vectors = 8 if method == "textual_inversion" and family in ("sd1", "sd2") else 1  # as is recommended for small models
        assert torch.equal(old[:397], new[:397]) and len(new) == 397 + vectors and not torch.equal(old[397:], new[397:])
    if text and family == "sdxl":  # its first encoder is read before the last of three layers
        assert not any("text_encoder/" in name and "layers.2." in name for name in loras)
