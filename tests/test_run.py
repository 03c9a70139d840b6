"""The running average of the weights."""

import pytest
import torch
from training_runs import FAST

import dreambooth_implementation as db


@pytest.mark.parametrize("flags, kept", [(["--use_ema"], True), (["--select_best", "--validation_steps", 4], True),
                                         (["--select_best", "--validation_steps", 4, "--no-use_ema"], False), ([], False),
                                         (["--method", "lora", "--select_best", "--validation_steps", 4], False)], ids=str)
def test_the_running_average_is_saved_and_does_not_train(flags, kept, tiny_model, photos, run, tmp_path, monkeypatch, networks):
    """With the decay (1 + n) / (10 + n) up to 0.99; the weights that train are those of a run without it."""
    seen, step = [], db.train_step

    def look(state, number):
        if not seen:
            seen.append([t.double() for t in db.trained_tensors(state.groups).values()])
        result = step(state, number)
        seen.append([t.double() for t in db.trained_tensors(state.groups).values()])
        return result
    finished, finish = [], db.unwrap
    monkeypatch.setattr(db, "train_step", look)
    monkeypatch.setattr(db, "unwrap", lambda state: (finished.extend(
        t.double() for t in db.trained_tensors(state.groups).values()), finish(state)))
    status, out, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--steps", 4, *FAST,
                           *flags, "--lr_scheduler", "constant", "--dino_model", networks / "vit",
                           "--clip_model", networks / "clip")
    assert status == 0 and ("running average" in out) == kept, err
    average = [t.clone() for t in seen[0]]
    for n, weights in enumerate(seen[1:]):
        average = [(1 + n) / (10 + n) * a + (1 - (1 + n) / (10 + n)) * w for a, w in zip(average, weights)]
    expected = average if kept else seen[-1]
    assert all(torch.allclose(a, f, atol=1e-6) for a, f in zip(expected, finished)) and len(finished) == len(average)
    assert not all(torch.allclose(a, w, atol=1e-5) for a, w in zip(average, seen[-1]))
