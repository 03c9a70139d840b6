"""DreamBooth itself: what a full training changes and what it must not, for each model family."""

import pytest
import torch
from conftest import FAMILIES
from training_runs import FAST, weights


def unused_by_the_loss(family, name):
    """SDXL reads its first text encoder before the last of its three layers."""
    return family == "sdxl" and name.startswith("text_encoder/") and ("layers.2." in name or "final_layer_norm" in name)


@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet+text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_what_should_train_changes(family, text, tiny_model, photos, run, tmp_path):
    model = tiny_model(family)
    status, out, err = run("--train", "--model_name", model, "--instance_data_dir", photos, "--steps", 3, *FAST,
                           *(["--train_text_encoder", "--text_encoder_lr", "1e-3"] if text else []))
    assert status == 0, err
    before, after = weights(model), weights(tmp_path / "output")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if name.startswith("unet/") or text and name.startswith("text_encoder")
                and not unused_by_the_loss(family, name)}
    # Rows of the token table move by weight decay alone where a token is in no prompt; a zero stays a zero.
    assert changed <= expected
    assert all(name in changed for name in expected if before[name].abs().max() > 0), expected - changed
    assert "instance" in out and "prior" in out
