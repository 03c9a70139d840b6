"""Losses in logs, and a training whose numbers are no longer finite."""

from safetensors.torch import load_file
from training_runs import FAST, steps_saved

import dreambooth_implementation as db


def test_tensorboard_shows_both_losses(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train()[0] == 0
    log = EventAccumulator(str(tmp_path / "output" / "logs")).Reload()
    assert [e.step for e in log.Scalars("loss/instance")] == [e.step for e in log.Scalars("loss/prior")] == [1, 2]


def test_a_diverging_run_stops_and_leaves_nothing(tiny_model, photos, run, tmp_path):
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--steps", 40, *FAST,
                         "--learning_rate", "1e30", "--max_grad_norm", "1e30")
    assert status == 2 and "training stopped" in err and err.count("\n") >= 1
    assert not list(tmp_path.glob("output*"))


def test_what_is_not_finite_is_never_saved(flags, run, tmp_path, monkeypatch):
    """NaN from some step on, first in the loss, then in the gradient alone, then in the weights alone."""
    train_step = db.train_step

    def poisoned(what):
        def step(state, index):
            measured = train_step(state, index)
            if index == 5 and what == "weights":
                state.groups[0].parameters[0].data.view(-1)[0] = float("inf")
            elif index == 5:
                measured[0][{"loss": 0, "gradient": 2}[what]] = float("nan")
            return measured
        return step

    for what, message in (("loss", "instance loss is nan at step 6"), ("gradient", "gradient norm is nan at step 6"),
                          ("weights", "no longer finite")):
        monkeypatch.setattr(db, "train_step", poisoned(what))
        status, _, err = run(*flags("full"), "--checkpointing_steps", 3, "--output_dir", what,
                             "--steps", 6 + (what != "weights"))
        assert status == 2 and message in err and "--learning_rate" in err, err
        assert (what == "weights") or f"{what}.partial/checkpoints/step-000003" in err
        assert not (tmp_path / what).exists() and steps_saved(tmp_path / f"{what}.partial") == [3]
        saved = load_file(tmp_path / f"{what}.partial" / "checkpoints" / "step-000003" / db.TENSORS_FILE)
        assert all(tensor.isfinite().all() for tensor in saved.values())
