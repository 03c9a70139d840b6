"""How many bytes a training takes."""

import dataclasses

import pytest
from training_runs import ALONE, demand, make_run, need, steps

import dreambooth_implementation as db


@pytest.mark.parametrize("method, family, optimizer, more", [
    ("full", "sdxl", "adamw", ["--train_text_encoder"]), ("full", "sd1", "adamw8bit", []),
    ("full", "sd2", "adafactor", []), ("full", "sd1", "prodigy", []), ("lora", "sd1", "adamw", ["--train_text_encoder"]),
    ("textual_inversion", "sdxl", "adamw", []),
    ("full", "sd1", "adamw8bit", ["--weights", "bf16", "--mixed_precision", "bf16"])])
def test_weights_gradients_and_states_take_what_was_estimated(method, family, optimizer, more, flags, run, monkeypatch):
    """To the byte, against the tensors that a step really leaves."""
    need(optimizer)
    surveyed, found = [], {}
    ask, step = db.survey, db.train_step
    monkeypatch.setattr(db, "survey", lambda *args: surveyed.append((ask(*args), args[-2])) or surveyed[-1][0])

    def look(state, number):
        real = state.optimizer.step
        parameters = [p for g in state.groups for p in g.parameters]
        for parameter in parameters:
            parameter.data += 1e-6  # of tensors that are 0 Prodigy remembers less
        state.optimizer.step = lambda: (found.update(gradients=sum(p.grad.nbytes for p in parameters)), real())
        step(state, number)
        trained = {p for g in state.groups for p in g.parameters}
        found["weights"] = sum(p.nbytes for p in trained)
        tensors, numbers = db.flatten_state(state.optimizer.state_dict()["state"])
        found["optimizer"] = sum(t.nbytes for t in tensors.values())
        pipeline = state.models.pipeline
        beside = [pipeline.unet, *db.text_encoders_of(pipeline).values()][:None if "text" in method or more[:1] == [
            "--train_text_encoder"] else 1]
        found["frozen"] = sum(t.nbytes for part in beside for t in (*part.parameters(), *part.buffers()) if t not in trained)
        raise db.UserError("enough")
    monkeypatch.setattr(db, "train_step", look)
    options = [flag for flag in flags(method, family) if flag not in ("--train_text_encoder", "--use_dora")]
    status, _, err = run(*options, "--optimizer", optimizer, *more, *ALONE, "--max_vram", 8)
    assert status == 2 and err.splitlines()[-1] == "error: enough", err
    (demand, levers), = surveyed
    parts = db.estimate(demand, levers)
    assert sum(size for what, size, _ in demand.events if what != "kept") == found["gradients"]
    assert {name: parts[name] for name in found} == {**found, "gradients": parts["gradients"]}


def test_the_peak_of_a_backward_pass():
    """Two layers by hand; the largest kept tensor, 100 bytes, is in hand three times."""
    def peak(demand, optimizer="adamw", **levers):
        return tuple(db.peak_of(demand, db.Levers(optimizer, **levers)).values())
    frugal = dict(gradient_checkpointing=True)
    plain = demand(("kept", 100, None), ("gradient", 40, None), ("kept", 60, 7), ("gradient", 400, 7), ("kept", 60, 7))
    assert peak(plain) == (400, 0, 160 + 300)  # second layer's last tensor used, first layer's still there
    assert peak(plain, fused_backward=True) == (400, 0, 160 + 300)
    assert peak(plain, "adafactor", fused_backward=True) == (400, 3 * 400, 160 + 300)
    assert peak(plain, **frugal) == (400, 0, 160 + 300)
    fused = demand(("kept", 100, None), ("gradient", 40, None), ("kept", 60, 7), ("kept", 60, 7), ("gradient", 10, 7))
    assert peak(fused) == peak(fused, **frugal) == (10, 0, 220 + 300)
    assert peak(demand(*fused.events, passes=2)) == (50, 0, 220 + 300)  # all gradients from before
    recomputed = demand(("kept", 10, None), *[("kept", 10, n) for n in (1, 1, 2, 2, 3, 3)])
    assert peak(recomputed) == (0, 0, 70 + 30)
    assert peak(recomputed, **frugal) == (0, 0, 30 + 30)
    halves = ("gradient", 200, None), ("kept", 10, None), ("gradient in bf16", 200, None), ("kept", 10, None)
    assert peak(demand(*halves)) == (400, 0, 30)  # all converted
    assert peak(demand(*halves, passes=2)) == (600, 0, 10 + 30)  # those of the pass before, and these before they are added


def test_an_estimate_is_arithmetic():
    some = dataclasses.replace(demand(("kept", 1000, None), ("gradient", 400, None)), frozen=50)
    parts = db.estimate(some, db.Levers())
    assert parts == {"weights": 400, "gradients": 400, "optimizer": 804, "exchange": 0, "gathered": 0, "step": 0, "activations": 4000,
                     "frozen": 50, "reserve": db.RESERVE + db.SLACK * 5654}
    assert db.estimate(some, db.Levers("adamw8bit", "bf16"))["weights"] == 200
    two = demand(("kept", 1000, None), ("gradient", 200, None), trained=((4, 25), (10,)))  # in bf16
    parts = db.estimate(two, db.Levers("adafactor", "bf16", fused_backward=True))
    assert (parts["weights"], parts["optimizer"], parts["step"]) == (220, 4 + 4 * 29 + 4 + 40, 5 * 400)
    parts = db.estimate(two, db.Levers("adamw", fused_backward=True, offload_optimizer=True))
    assert (parts["weights"], parts["optimizer"], parts["step"]) == (440, 804, 0)
    parts = db.estimate(two, db.Levers("adafactor"))
    assert (parts["gradients"], parts["activations"], parts["step"]) == (200, 4000, 0)


def test_several_processes_exchange_gradients_in_buffers(monkeypatch):
    some = demand(("kept", 1000, None), ("gradient", 400, None))
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert db.estimate(some, db.Levers())["exchange"] == 400
    assert db.estimate(some, db.Levers(fused_backward=True))["exchange"] == 0  # they are averaged one by one, in place


@pytest.mark.parametrize("levers", [db.Levers("adafactor", "bf16", fused_backward=True),
                                    db.Levers("adamw", "bf16", fused_backward=True), db.Levers(fused_backward=True)], ids=str)
def test_states_of_a_fused_step_take_what_was_estimated(levers, tiny_model):
    """To the byte, and so do the weights."""
    run = make_run(tiny_model, precision="bf16", levers=levers, optimizer=levers.optimizer)
    steps(run, 0, 1)
    parameters = run.groups[0].parameters
    some = demand(trained=tuple(tuple(p.shape) for p in parameters))
    tensors, _ = db.flatten_state(run.optimizer.state_dict()["state"])
    numbers = 4 * len(parameters) if levers.optimizer == "adafactor" else 0  # a root mean square, on a CPU a number
    parts = db.estimate(some, levers)
    assert parts["weights"] == sum(p.nbytes for p in parameters)
    assert parts["optimizer"] - sum(t.nbytes for t in tensors.values()) in (0, numbers)
