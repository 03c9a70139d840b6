"""Prompts as the UNet is told them."""

import json

import pytest
import torch

import dreambooth_implementation as db


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_conditioning_equals_the_pipelines_own(family, tiny_model):
    models = db.load_models(str(tiny_model(family)), torch.float32)
    prompts = ["a dog on the moon", "a cat"]
    hidden, pooled = db.encode_prompts(models, prompts)
    own = models.pipeline.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    torch.testing.assert_close(hidden, own[0])
    if family == "sdxl":
        torch.testing.assert_close(pooled, own[2])
    else:
        assert pooled is None


def test_long_prompts_are_said(tiny_model, capsys):
    pipeline = db.load_pipeline(str(tiny_model("sd1")), torch.float32)
    db.check_length(pipeline, ["a dog"])
    assert capsys.readouterr().out == ""
    db.check_length(pipeline, ["a dog " * 60])
    assert "reads only the first" in capsys.readouterr().out


def test_the_end_of_text_is_found_behind_a_new_word(tiny_model):
    """Configs of SD 1.5 and SDXL name token 2; then the highest token of a prompt passes for its end."""
    model = tiny_model("sdxl")
    pooled = {}
    for eos in (2, None):
        config = model / "text_encoder_2" / "config.json"
        original = config.read_text()
        if eos:
            config.write_text(json.dumps(json.loads(original) | {"eos_token_id": eos}))
        try:
            models = db.load_models(str(model), torch.float32)
        finally:
            config.write_text(original)
        for tokenizer, text_encoder in zip(models.tokenizers, models.text_encoders):
            db.add_word(tokenizer, text_encoder, "<rex>", torch.ones(1, 32))
        with torch.no_grad():
            pooled[eos] = db.encode_prompts(models, ["a <rex> dog", "a <rex> dog on the moon"])[1]
    assert torch.equal(pooled[2], pooled[None])
    assert not torch.allclose(pooled[2][0], pooled[2][1], atol=1e-3)  # what follows the new word counts
