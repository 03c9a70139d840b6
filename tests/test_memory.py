"""What saves memory changes nothing else: optimizers, fused backward pass, split batches, and the plan that chooses them."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from test_resume import assert_same_weights, flags, interrupt, weights  # noqa: F401  (`flags` is a fixture)

import dreambooth_implementation as db

QUICK = ["--no-with_prior_preservation", "--validation_prompt", "a dog"]  # for what does not depend on class images
OPTIONAL = {"adamw8bit": "torchao", "prodigy": "prodigyopt"}


def need(optimizer):
    if optimizer in OPTIONAL:
        pytest.importorskip(OPTIONAL[optimizer])


def assert_close_weights(one, other, moved_from, tolerance):
    """The weights differ by at most `tolerance` of how far training moved the one that moved farthest."""
    one, other, start = weights(one), weights(other), weights(moved_from)
    assert one.keys() == other.keys()
    moved = max((one[name] - start[name]).abs().max() for name in one if name in start)
    assert moved > 0
    apart = max((one[name].float() - other[name].float()).abs().max() for name in one)
    assert apart <= tolerance * moved, (apart, moved)


@pytest.mark.parametrize("optimizer, more", [
    ("adamw8bit", []), ("adafactor", []), ("prodigy", []), ("adamw", ["--fused_backward"]),
    ("adamw8bit", ["--weights", "bf16", "--mixed_precision", "bf16", "--fused_backward"])])
def test_every_optimizer_resumes_exactly(optimizer, more, flags, run, tmp_path, monkeypatch):  # noqa: F811
    need(optimizer)
    options = flags("full", "sd1", "--optimizer", optimizer, "--steps", 4, "--lr_scheduler", "cosine", *QUICK, *more)
    assert run(*options, "--output_dir", "whole")[0] == 0
    undo = interrupt(monkeypatch, 2)
    assert run(*options)[0] == 130
    undo()
    status, out, err = run(*options, "--resume")
    assert status == 0 and "after step 2" in out, err
    assert_same_weights(tmp_path / "output", tmp_path / "whole")
    checkpoint = next((tmp_path / "output" / "checkpoints").iterdir())
    assert {p.suffix for p in checkpoint.iterdir()} == {".safetensors", ".json"}
    codes = [t for name, t in load_file(checkpoint / db.TENSORS_FILE).items() if name.endswith(".codes")]
    assert (optimizer == "adamw8bit") == bool(codes) and all(t.dtype == torch.uint8 and t.any() for t in codes)


def test_optimizers_differ_and_are_recorded(flags, run, tmp_path, tiny_model):  # noqa: F811
    outputs = {}
    for optimizer in db.OPTIMIZERS:
        need(optimizer)
        assert run(*flags("lora"), "--optimizer", optimizer, "--steps", 2, *QUICK, "--output_dir", optimizer)[0] == 0
        record = json.loads((tmp_path / optimizer / "dreambooth.json").read_text())["used"]
        assert record["optimizer"] == optimizer
        assert (set(record["learning_rates"].values()) == {1.0}) == (optimizer == "prodigy")
        outputs[optimizer] = torch.cat([t.flatten() for t in weights(tmp_path / optimizer).values()])
    assert len({tuple(output.tolist()) for output in outputs.values()}) == len(outputs)


@pytest.mark.parametrize("lever", ["--fused_backward", "--split_batch", "--gradient_checkpointing"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_levers_change_nothing_but_memory(lever, method, flags, run, tmp_path, tiny_model):  # noqa: F811
    """Same weights after several steps of two photos and two class images; fused backward does even the same sums."""
    options = [*flags(method, "sdxl"), "--max_grad_norm", 0, "--train_batch_size", 2, "--steps", 4, "--validation_prompt", "a dog"]
    assert run(*options, "--output_dir", "plain")[0] == 0
    status, _, err = run(*options, lever, "--output_dir", "saving")
    assert status == 0, err
    if lever == "--fused_backward":
        assert_same_weights(tmp_path / "plain", tmp_path / "saving")
    else:
        start = tiny_model("sdxl") if method == "full" else None
        if start is None:  # a LoRA starts from the seed
            assert run(*options, "--learning_rate", 1e-30, "--text_encoder_lr", 1e-30, "--output_dir", "start")[0] == 0
        # AdamW's first steps follow signs: where a gradient is rounding error, a weight may go the other way
        assert_close_weights(tmp_path / "plain", tmp_path / "saving", start or tmp_path / "start", 0.05)
    plain, saving = (json.loads((tmp_path / name / "dreambooth.json").read_text())["loss"] for name in ("plain", "saving"))
    assert plain["last_100_steps"] == pytest.approx(saving["last_100_steps"], rel=1e-4)


def gradients(tiny_model, photos, monkeypatch, tmp_path, run, flags, *more):  # noqa: F811
    """The gradients of a first step and the norm that it reports."""
    seen = {}

    def stop(state, *args):
        step = state.optimizer.step
        state.optimizer.step = lambda: (seen.update({name: p.grad.clone() for g in state.groups for name, p in zip(
            range(10**6), g.parameters)}), step())
        seen["norm"] = db_train_step(state, 0)[0][2]
        raise db.UserError("enough")
    db_train_step = db.train_step
    monkeypatch.setattr(db, "train_step", stop)
    assert run(*flags("full"), "--no-train_text_encoder", "--max_grad_norm", 0, *more)[0] == 2
    monkeypatch.setattr(db, "train_step", db_train_step)
    return seen


def test_a_split_batch_has_the_same_gradient(tiny_model, photos, monkeypatch, tmp_path, run, flags):  # noqa: F811
    common = (tiny_model, photos, monkeypatch, tmp_path, run, flags, "--train_batch_size", 2, "--prior_loss_weight", 0.7)
    whole, split = gradients(*common), gradients(*common, "--split_batch")
    photos_only = gradients(*common, "--prior_loss_weight", 0)
    assert len(whole) > 50 and whole.keys() == split.keys()
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-3, atol=1e-6)
    assert not torch.allclose(photos_only["norm"], whole["norm"], rtol=1e-2)


def test_the_fused_step_frees_gradients_and_reports_their_norm(flags, run, tmp_path, monkeypatch):  # noqa: F811
    """No gradient outlives its step, and the norm in the logs is that of the plain run."""
    norms = {}
    report = db.report_losses
    for name, more in {"plain": [], "fused": ["--fused_backward"]}.items():
        def look(state, folder, unread, *rest, name=name):
            norms[name] = [float(measured[2]) for measured in unread]
            assert all(p.grad is None for group in state.groups for p in group.parameters)
            report(state, folder, unread, *rest)
        monkeypatch.setattr(db, "report_losses", look)
        assert run(*flags("full"), "--steps", 3, "--max_grad_norm", 0, *more, "--output_dir", name)[0] == 0
    assert norms["fused"] == pytest.approx(norms["plain"], rel=1e-4) and min(norms["plain"]) > 0


def test_at_most_one_gradient_is_alive_in_a_fused_backward_pass():
    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(5)))
    optimizer, alive, spent = torch.optim.AdamW(layers.parameters(), lr=0.1), [], []
    step = optimizer.step
    optimizer.step = lambda: (alive.append(sum(p.grad is not None for p in layers.parameters())), step())
    before = [p.detach().clone() for p in layers.parameters()]
    db.fuse_backward(optimizer, 0, spent)
    layers(torch.randn(2, 4)).square().mean().backward()
    assert alive == [1] * 10 == [len(optimizer.param_groups)] * 10 and len(spent) == 10
    assert not any(torch.equal(p, b) for p, b in zip(layers.parameters(), before))


def test_bf16_weights_are_rounded_by_chance_alone():
    """Steps far below bf16's grain move the mean as fp32 would: 300 steps of 1e-4 from 1, where bf16 has steps of 2^-8."""
    need("adamw8bit")
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = db.OPTIMIZERS["adamw8bit"].make([{"params": [weight], "lr": 1e-4}], 0.0, torch.device("cpu"))
    for _ in range(300):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(1 - 300 * 1e-4, abs=2e-3)
    assert len(weight.unique()) > 3


def test_bf16_weights_train_and_draw(flags, run, tmp_path):  # noqa: F811
    need("adamw8bit")
    options = flags("full", "sd2", "--optimizer", "adamw8bit", "--weights", "bf16", "--mixed_precision", "bf16", "--steps", 2)
    status, out, err = run(*options)
    assert status == 0 and "could not be drawn" not in out, err or out
    saved = load_file(tmp_path / "output" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    status, _, err = run("--infer", "--num_images", 1, "--num_inference_steps", 1)
    assert status == 0, err


@pytest.mark.parametrize("given, said", [
    (["--fused_backward", "--gradient_accumulation_steps", 2], "--gradient_accumulation_steps"),
    (["--fused_backward", "--split_batch"], "--split_batch"),
    (["--fused_backward", "--optimizer", "prodigy"], "--optimizer prodigy"),
    (["--weights", "bf16"], "--optimizer adamw8bit"),
    (["--weights", "bf16", "--optimizer", "adamw8bit"], "--mixed_precision bf16"),
    (["--weights", "bf16", "--method", "lora"], "--weights has no meaning with --method lora"),
    (["--optimizer", "prodigy", "--method", "pivotal"], "--method pivotal"),
    (["--optimizer", "sgd"], "--optimizer"),
])
def test_levers_that_do_not_go_together_are_one_line(given, said, run, photos, tiny_model, monkeypatch):
    need("adamw8bit"), need("prodigy")
    monkeypatch.setattr(db, "load_models", lambda *args: pytest.fail("a model was loaded"))
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--class_prompt", "a dog", *given)
    assert status == 2 and said in err and err.count("\n") == 1, err


def test_a_missing_package_is_named(run, photos, tiny_model, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in OPTIONAL.values() else find(name, *rest))
    monkeypatch.setattr(db, "load_models", lambda *args: pytest.fail("a model was loaded"))
    for optimizer, package in OPTIONAL.items():
        status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--class_prompt",
                             "a dog", "--optimizer", optimizer)
        assert status == 2 and f"pip install {package}" in err and err.count("\n") == 1, err


def test_fused_backward_needs_one_process(monkeypatch):
    s = db.Settings("train", fused_backward=True)
    assert db.objection(s, db.Levers(fused_backward=True), "no") is None
    assert "fp16" in db.objection(s, db.Levers(fused_backward=True), "fp16")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "several processes" in db.objection(s, db.Levers(fused_backward=True), "no")


def test_prodigy_has_one_rate(flags, run):  # noqa: F811
    need("prodigy")
    status, _, err = run(*flags("lora"), "--optimizer", "prodigy", "--learning_rate", 0.5)
    assert status == 2 and err.splitlines()[-1].endswith("unet_lora 0.5, text_encoder_lora 1"), err


def test_another_optimizer_is_not_gone_on_with(flags, run, monkeypatch):  # noqa: F811
    undo = interrupt(monkeypatch, 2)
    assert run(*flags("lora"), "--optimizer", "adafactor")[0] == 130
    undo()
    status, _, err = run(*flags("lora"), "--resume")
    assert status == 2 and "the optimizer (adafactor, now adamw)" in err, err


# The memory plan


def tiny_training(tiny_model, method="full", family="sd1", precision="no", resolution=64, **flags):
    """(settings, models, subjects, recipe, plan) of a training on the CPU, ready to be surveyed."""
    s = db.Settings("train", method=method, mixed_precision=precision, rank=2, **flags)
    models = db.load_models(str(tiny_model(family)), torch.float32)
    recipe = db.RECIPES["small"][method]
    return s, models, [db.Subject("<dog>", "a dog", "a <dog> dog", "dog")], recipe, db.Plan(torch.device("cpu"), precision)


def survey(training, levers=db.Levers(), resolution=64):
    s, models, subjects, recipe, plan = training
    return db.survey(s, models, subjects, recipe, resolution, plan, levers)


@pytest.mark.parametrize("method, family, optimizer, more", [
    ("full", "sdxl", "adamw", ["--train_text_encoder"]), ("full", "sd1", "adamw8bit", []),
    ("full", "sd2", "adafactor", []), ("full", "sd1", "prodigy", []), ("lora", "sd1", "adamw", ["--train_text_encoder"]),
    ("textual_inversion", "sdxl", "adamw", []),
    ("full", "sd1", "adamw8bit", ["--weights", "bf16", "--mixed_precision", "bf16"])])
def test_weights_gradients_and_states_take_what_was_estimated(method, family, optimizer, more, flags, run, monkeypatch,  # noqa: F811
                                                              tiny_model):
    """To the byte, against the tensors that a step really leaves."""
    need(optimizer)
    surveyed, found = [], {}
    ask, step = db.survey, db.train_step
    monkeypatch.setattr(db, "survey", lambda *args: surveyed.append((ask(*args), args[-1])) or surveyed[-1][0])

    def look(state, number):
        real = state.optimizer.step
        for parameter in (p for g in state.groups for p in g.parameters):
            parameter.data += 1e-6  # of tensors that are 0 Prodigy remembers less
        state.optimizer.step = lambda: (found.update(gradients=sum(p.grad.nbytes for g in state.groups for p in g.parameters)), real())
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
    status, _, err = run(*options, "--optimizer", optimizer, *more, *QUICK, "--max_vram", 8)
    assert status == 2 and err.splitlines()[-1] == "error: enough", err
    (demand, levers), = surveyed
    parts = db.estimate(demand, levers)
    assert sum(size for what, size, _ in demand.events if what == "gradient") == found["gradients"]
    assert {name: parts[name] for name in ("weights", "optimizer", "frozen")} == {n: found[n] for n in ("weights", "optimizer", "frozen")}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method, family", [("full", "sdxl"), ("full", "sd1")])
def test_activations_take_what_was_estimated(method, family, checkpointing, precision, tiny_model):
    """Against torch's own count of the tensors of a real forward and backward pass, at its peak."""
    from torch.distributed._tools.mem_tracker import MemTracker

    training = s, models, subjects, recipe, plan = tiny_training(tiny_model, method, family, precision, train_batch_size=3)
    levers = db.Levers(gradient_checkpointing=checkpointing)
    demand = survey(training, levers, resolution=128)
    groups = db.parameter_groups(s, models, subjects, recipe)
    for parameter in groups[0].parameters:
        parameter.requires_grad_(True)
    if checkpointing:
        db.set_checkpointing(models, groups)
    with torch.no_grad():
        hidden, pooled = db.encode_prompts(models, ["a dog"] * 6)
    batch = torch.randn(6, 4, 64, 64), torch.zeros(6, dtype=torch.long)
    tracker = MemTracker()
    tracker.track_external(models.unet)
    with tracker:
        with torch.autocast("cpu", plan.dtype, precision != "no"):
            out = db.predict(models.unet, *batch, hidden, pooled, torch.zeros(6, 6))
        out.float().square().mean().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    real = peak - sum(t.nbytes for t in (*models.unet.parameters(), *models.unet.buffers()))
    assert sum(db.peak_of(demand, checkpointing, False)) == pytest.approx(real, rel=0.1)
