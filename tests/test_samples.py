"""Samples on the way change nothing."""

import pytest
import torch
from PIL import Image
from training_runs import assert_same_weights, make_run

import dreambooth_implementation as db

METHODS = ("full", "textual_inversion", "pivotal")


@pytest.mark.parametrize("method, saves", [*((method, []) for method in METHODS), ("full", ["--fused_backward", "--use_ema"]),
                                           ("pivotal", ["--gradient_checkpointing"])])
def test_drawing_on_the_way_changes_nothing(method, saves, train_scored, tmp_path):
    """Not even where memory is saved, and the parts of the model take turns to draw."""
    assert train_scored(method, "--steps", 5, "--output_dir", "blind", *saves, family="sdxl")[0] == 0
    status, _, err = train_scored(method, "--steps", 5, "--validation_steps", 2, "--validation_prompt", "a [identifier] dog",
                                  *saves, family="sdxl")
    assert status == 0, err
    assert_same_weights(tmp_path / "blind", tmp_path / "output")
    samples = tmp_path / "output" / "samples"
    assert sorted(p.name for p in samples.glob("step-*")) == ["step-000002", "step-000004", "step-000005"]
    assert Image.open(samples / "timeline.png").size == (60 + 4 * 34, 3 * 34)
    at = [next((samples / f"step-00000{step}").glob("*.png")).read_bytes() for step in (2, 5)]
    assert at[0] != at[1]  # the weights in between were drawn with
    # the last row of the timeline is what the output itself draws
    final = sorted((samples / "step-000005").glob("*.png"))[0]
    again = next(p for p in samples.glob("a-*-0.png"))
    assert Image.open(final).convert("RGB").tobytes() == Image.open(again).convert("RGB").tobytes()


@pytest.mark.parametrize("flags, said", [
    (["--select_best", "--validation_prompt", "a dog"], "--validation_prompt"),
    (["--validation_prompt", "a [identifier:tom] dog"], "[identifier:tom]"),
    (["--validation_steps", 0], "--validation_steps 0"),
])
def test_prompts_that_cannot_be_used_are_refused_before_training(flags, said, train_scored, monkeypatch):
    monkeypatch.setattr(db, "optimize", lambda *args: pytest.fail("trained"))
    status, _, err = train_scored("full", "--steps", 2, *flags)
    assert status == 2 and said in err.splitlines()[-1], err


@pytest.mark.parametrize("levers", [db.Levers(), db.Levers(gradient_checkpointing=True, fused_backward=True)], ids=str)
def test_where_memory_is_saved_the_parts_of_a_model_in_training_take_turns(levers, tiny_model):
    look = dict(num_inference_steps=2, height=32, width=32, output_type="np")
    pictures = []
    for each in (db.Levers(), levers):
        run = make_run(tiny_model, family="sdxl", levers=each, train_text_encoder=True)
        pipeline = run.models.pipeline
        parts = [pipeline.vae, pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2]
        before = [(part.device, part.training, part.forward) for part in parts]
        db.train_step(run, 0)
        with db.ready_to_draw(run) as ready:
            assert [hasattr(part, "_hf_hook") for part in parts] == [each != db.Levers()] * 4
            assert not any(part.training for part in parts)
            pictures.append(ready("a dog", generator=torch.Generator().manual_seed(0), **look).images)
        assert not any(hasattr(part, "_hf_hook") for part in parts)
        assert [(part.device, part.training, part.forward) for part in parts] == before
        db.train_step(run, 1)
    assert pictures[0].shape == (1, 32, 32, 3)
    assert abs(pictures[0] - pictures[1]).max() < 1e-2  # a fused step scales gradients down by themselves
