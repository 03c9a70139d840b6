"""Losses in logs, and a training whose numbers are no longer finite."""

import pytest
from safetensors.torch import load_file
from training_runs import FAST, make_run, settings, steps_saved

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


def test_progress_shows_the_rate_of_what_trains_to_the_end(tiny_model, tmp_path):
    run, shown = make_run(tiny_model, "pivotal"), {}

    class Bar:
        set_postfix = staticmethod(shown.update)
    for step in range(3):
        db.report_losses(run, tmp_path, db.train_step(run, step), Bar, None)
    words, lora = run.lr_scheduler.get_last_lr()
    assert words == 0 and shown["lr"] == f"{lora:.1e}" and lora > 0


@pytest.mark.parametrize("steps, said", [
    (1, ["Mean loss of the 1 step: instance 0.0000"]), (100, ["Mean loss of the 100 steps: instance 49.5000"]),
    (101, ["Mean loss of the first 100 steps: instance 49.5000", "Mean loss of the last 100 steps: instance 50.5000"])])
def test_mean_losses_are_told_once_each(steps, said, capsys):
    db.report_training(settings(), db.StableDiffusion(), [db.Subject("sks", "a dog", "a sks dog", "dog")], [(float(step), None, 0.0) for step in range(steps)],
                       {"training": 1, "preparing": 1})
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("Mean")] == said
