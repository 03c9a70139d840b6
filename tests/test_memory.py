"""What saves memory changes nothing else: optimizers, fused backward pass, split batches, and the plan that chooses them."""

import contextlib
import copy
import dataclasses
import json
import types

import pytest
import torch
from safetensors.torch import load_file
from test_resume import flags as short_flags
from test_resume import interrupt

import dreambooth_implementation as db

QUICK = ["--no-with_prior_preservation", "--validation_prompt", "a dog"]  # for what does not depend on class images
flags = short_flags  # a fixture
OPTIONAL = {"adamw8bit": "torchao", "prodigy": "prodigyopt"}


def need(optimizer):
    if optimizer in OPTIONAL:
        pytest.importorskip(OPTIONAL[optimizer])


def make_run(tiny_model, method="full", family="sd1", precision="no", levers=db.Levers(), **flags):
    """A Run of 4 steps on the latents of made-up pictures."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    s, models, subjects, recipe, plan = tiny_training(tiny_model, method, family, precision, **flags)
    torch.manual_seed(0)
    if db.METHODS[method].is_adapter:
        models.unet.to(plan.dtype)
    groups = db.parameter_groups(s, models, subjects, db.with_own_rate(recipe, s))
    latents = torch.randn(9, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    cache = db.LatentCache(latents, torch.full_like(latents, 0.1), torch.full((9, 6), 32.0), (torch.arange(9) > 3).long(),
                           ["a sks dog", "a dog"], [[0, 1, 2, 3]], [[4, 5, 6, 7, 8]])
    accelerator = db.make_accelerator(s, plan)
    course = db.Course(4, 64, precision, levers, "cosine")
    return db.prepare_training(s, course, models, groups, cache, accelerator, {})


def test_small_tensors_go_to_a_gpu_from_pinned_memory_without_waiting():
    class Tensor:
        pinned = False

        def pin_memory(self):
            self.pinned = True
            return self

        def to(self, device, non_blocking=False):
            return device.type, self.pinned, non_blocking
    assert db.moved(Tensor(), torch.device("cuda")) == ("cuda", True, True)
    assert db.moved(Tensor(), torch.device("cpu")) == ("cpu", False, False)


def steps(run, first, last):
    """Take the steps first .. last - 1; returns what train_step() measured of them."""
    measured = [db.train_step(run, step)[-1] for step in range(first, last)]
    run.history.extend([row.tolist() for row in measured])
    return torch.stack(measured)


def trained(run):
    return {name: tensor.clone() for name, tensor in db.trained_tensors(run.groups).items()}


@pytest.mark.parametrize("precision, levers", [
    ("no", db.Levers("adamw8bit")), ("no", db.Levers("adafactor")), ("no", db.Levers("prodigy")),
    ("no", db.Levers(fused_backward=True)), ("no", db.Levers(fused_backward=True, offload_optimizer=True)),
    ("bf16", db.Levers("adamw8bit", "bf16", fused_backward=True)), ("bf16", db.Levers("adamw", "bf16", fused_backward=True)),
    ("bf16", db.Levers("adafactor", "bf16", fused_backward=True)),
    ("bf16", db.Levers("adamw8bit", "bf16", fused_backward=True, offload_optimizer=True))], ids=str)
def test_every_optimizer_resumes_exactly(precision, levers, tiny_model, tmp_path):
    need(levers.optimizer)
    options = dict(precision=precision, levers=levers, optimizer=levers.optimizer, train_text_encoder=True)
    whole = make_run(tiny_model, **options)
    steps(whole, 0, 4)
    first = make_run(tiny_model, **options)
    steps(first, 0, 2)
    db.write_checkpoint(first, tmp_path)
    checkpoint, = (tmp_path / "checkpoints").iterdir()
    assert {p.suffix for p in checkpoint.iterdir()} == {".safetensors", ".json"}
    second = make_run(tiny_model, **options)
    db.load_checkpoint(second, checkpoint)
    half = trained(second)
    steps(second, 2, 4)
    expected = trained(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained(second).items())
    assert not any(torch.equal(tensor, half[name]) for name, tensor in expected.items() if tensor.ndim > 1)
    codes = [t for name, t in load_file(checkpoint / db.TENSORS_FILE).items() if name.endswith(".codes")]
    assert (levers.optimizer == "adamw8bit") == bool(codes) and all(t.dtype == torch.uint8 and t.any() for t in codes)


@pytest.mark.parametrize("offloads", [False, True])
def test_offloaded_states_are_brought_for_the_step_of_their_tensor_alone(offloads, tiny_model, monkeypatch):
    brought, brings, inside = [], db.brought, []

    @contextlib.contextmanager
    def watched(state, device):
        brought.append((id(state), device.type))
        inside.append(state)
        with brings(state, device):
            assert len(inside) == 1  # never two tensors' states at once
            yield
        inside.pop()
    monkeypatch.setattr(db, "brought", watched)
    run = make_run(tiny_model, levers=db.Levers(fused_backward=True, offload_optimizer=offloads))
    steps(run, 0, 2)
    tensors = len(run.groups[0].parameters)
    assert len(brought) == 2 * tensors * offloads and len(set(brought)) == tensors * offloads


def test_the_count_of_steps_stays_where_the_optimizer_keeps_it(monkeypatch):
    state, moved = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "RMS": 0.5}, []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, place: moved.append((tensor.numel(), str(place))) or tensor)
    with db.brought(state, torch.device("meta")):
        assert moved == [(2, "meta")]
    assert moved == [(2, "meta"), (2, "cpu")]


def test_nothing_comes_to_the_device_larger_than_it_trains(tiny_model, monkeypatch):
    """SDXL's UNet in float32 would fill a GPU of 10 GiB before its plan, bf16 weights, came into effect."""
    arrivals, move = [], torch.nn.Module.to

    def watched(module, *args, **options):
        if args and isinstance(args[0], (str, torch.device)):
            arrivals.append((type(module).__name__, {p.dtype for p in module.parameters()}, type(args[0])))
        return move(module, *args, **options)
    monkeypatch.setattr(torch.nn.Module, "to", watched)
    make_run(tiny_model, family="sdxl", precision="bf16", levers=db.Levers("adafactor", "bf16", fused_backward=True))
    names = [name for name, _, _ in arrivals]
    unet = names.index("UNet2DConditionModel")
    assert arrivals[unet][1] == {torch.bfloat16}
    assert names[:unet] == ["CLIPTextModel", "CLIPTextModelWithProjection"] * 2  # there and back
    assert [place for _, _, place in arrivals[:unet]] == [torch.device] * 2 + [str] * 2


def test_what_the_optimizer_remembers_is_freed_before_samples_are_drawn(flags, run, monkeypatch):
    seen, save = [], db.save_output
    monkeypatch.setattr(db, "save_output", lambda folder, run, *rest: seen.append(run) or save(folder, run, *rest))
    status, _, err = run(*flags("full"), "--use_ema", *QUICK)
    assert status == 0, err
    assert not seen[0].optimizer.state and not seen[0].averages


def test_optimizers_differ(tiny_model):
    results = []
    for optimizer in db.OPTIMIZERS:
        need(optimizer)
        run = make_run(tiny_model, "lora", levers=db.Levers(optimizer), optimizer=optimizer)
        assert (run.groups[0].lr == 1.0) == (optimizer == "prodigy")
        steps(run, 0, 2)
        results.append(torch.cat([tensor.flatten() for tensor in trained(run).values()]))
    assert len({tuple(result.tolist()) for result in results}) == 4


@pytest.mark.parametrize("levers", [db.Levers(fused_backward=True), db.Levers(split_batch=True),
                                    db.Levers(fused_backward=True, offload_optimizer=True),
                                    db.Levers(gradient_checkpointing=True)], ids=db.flags_of)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_levers_change_nothing_but_memory(levers, method, tiny_model):
    """Same weights after 4 steps of two photos and two class images; with a fused backward pass to the last bit."""
    options = dict(train_batch_size=2, max_grad_norm=0, train_text_encoder=True, prior_loss_weight=0.7)
    plain, saving = (make_run(tiny_model, method, "sdxl", levers=row, **options) for row in (db.Levers(), levers))
    start = trained(plain)
    measured, saved = steps(plain, 0, 4), steps(saving, 0, 4)
    torch.testing.assert_close(saved, measured, rtol=1e-4, atol=1e-6)
    plain, saving = trained(plain), trained(saving)
    if levers.fused_backward:
        assert all(torch.equal(plain[name], saving[name]) for name in plain)
    # AdamW's first steps follow signs: where a gradient is but a rounding error, a weight may go the other way
    moved, apart = (torch.cat([(plain[n] - other[n]).flatten() for n in plain]).norm() for other in (start, saving))
    assert 0 < moved and apart < 0.02 * moved


def gradients(run):
    """{tensor: gradient} of the first step, and the norm that the program measures."""
    seen, step = {}, run.optimizer.step
    run.optimizer.step = lambda: (seen.update((f"{g.name}.{i}", p.grad.clone()) for g in run.groups
                                              for i, p in enumerate(g.parameters)), step())
    return seen, db.train_step(run, 0)[0][2]


def test_a_split_batch_has_the_same_gradient(tiny_model):
    options = dict(train_batch_size=2, max_grad_norm=0)
    whole, norm = gradients(make_run(tiny_model, prior_loss_weight=0.7, **options))
    split, _ = gradients(make_run(tiny_model, prior_loss_weight=0.7, levers=db.Levers(split_batch=True), **options))
    assert len(whole) > 50 and whole.keys() == split.keys()
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-3, atol=1e-6)
    assert norm == pytest.approx(torch.cat([g.flatten() for g in whole.values()]).norm().item(), rel=1e-4)
    without, _ = gradients(make_run(tiny_model, prior_loss_weight=0.0, **options))  # the class images matter
    convolutions = [name for name in whole if whole[name].ndim == 4]
    assert not any(torch.allclose(without[name], whole[name], rtol=1e-2, atol=1e-6) for name in convolutions)


def test_the_fused_step_scales_each_tensor_down(tiny_model):
    """By AdamW one cannot see it, which forgets the scale; the norms are those before."""
    run = make_run(tiny_model, levers=db.Levers(fused_backward=True), max_grad_norm=1e-3)
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def look(parameters, limit):
        norm = clip(parameters, limit)
        norms.append((norm.item(), parameters[0].grad.norm().item(), limit))
        return norm
    torch.nn.utils.clip_grad_norm_ = look
    try:
        total = db.train_step(run, 0)[0][2]
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
    assert len(norms) == len(run.groups[0].parameters) and any(before > 1e-3 for before, *_ in norms)
    assert all(after <= limit * 1.001 == 1e-3 * 1.001 for _, after, limit in norms)
    assert total.item() == pytest.approx(sum(before ** 2 for before, *_ in norms) ** 0.5, rel=1e-4)
    assert all(p.grad is None for p in run.groups[0].parameters) and not run.spent


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


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
def test_bf16_weights_are_rounded_by_chance_alone(optimizer):
    """Steps below bf16's grain move the mean as fp32 would: 300 of 1e-4 from 1, where bf16 knows multiples of 2^-8."""
    need(optimizer)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    made = db.OPTIMIZERS[optimizer].make([{"params": [weight], "lr": 1e-4}], 0.0, torch.device("cpu"))
    db.fuse_backward(made, 0, [], db.Levers(optimizer, "bf16", fused_backward=True))
    place = weight.data_ptr()
    for _ in range(300):
        weight.sum().backward()
    assert weight.dtype == torch.bfloat16 and weight.grad is None and weight.data_ptr() == place
    assert {t.dtype for t in made.state[weight].values() if type(t) is torch.Tensor and t.ndim == 2} <= {torch.float32}
    assert weight.float().mean().item() == pytest.approx(1 - 300 * 1e-4, abs=2e-3)
    assert len(weight.unique()) > 3


def test_rounding_by_chance_is_right_on_average_and_leaves_what_fits():
    torch.manual_seed(0)
    fits = torch.randn(1000).bfloat16()
    assert torch.equal(db.rounded_by_chance(fits.float()), fits)
    for value in (1 + 2**-9, -3 - 2**-10, 1e-20, 0.0):
        drawn = db.rounded_by_chance(torch.full((20000,), value))
        assert drawn.unique().numel() == (1 if value == 0 else 2)
        assert drawn.double().mean().item() == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("options", [dict(channels_last=True), dict(compile=True)], ids=str)
def test_what_is_fast_changes_nothing_else(options, tiny_model, tmp_path):
    """Same weights after 4 steps, and files of the usual layout."""
    plain, fast = make_run(tiny_model), make_run(tiny_model, **options)
    weight = fast.models.pipeline.unet.down_blocks[0].resnets[0].conv1.weight
    blocks = [m for m in fast.models.pipeline.unet.modules() if m._compiled_call_impl is not None]
    assert weight.is_contiguous() == (not options.get("channels_last")) and bool(blocks) == options.get("compile", False)
    steps(plain, 0, 4), steps(fast, 0, 4)
    for name, tensor in trained(plain).items():
        torch.testing.assert_close(trained(fast)[name], tensor, rtol=0.05, atol=2e-4)
    db.write_checkpoint(fast, tmp_path)
    again = make_run(tiny_model, **options)
    db.load_checkpoint(again, tmp_path / "checkpoints" / "step-000004")
    states, restored = (run.optimizer.state_dict()["state"] for run in (fast, again))
    assert len(states) > 50 and all(
        torch.equal(value, restored[number][key]) and value.stride() == restored[number][key].stride()
        for number, values in states.items() for key, value in values.items())
    db.unwrap(fast)
    fast.models.pipeline.unet.save_pretrained(tmp_path / "unet")
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in fast.models.pipeline.unet.state_dict().items())
    assert not any(m._compiled_call_impl for m in fast.models.pipeline.unet.modules())


def test_without_a_compiler_it_says_so(run, photos, tiny_model, monkeypatch):
    monkeypatch.setattr(db.shutil, "which", lambda name: None)
    monkeypatch.setattr(db, "load_models", lambda *args: pytest.fail("a model was loaded"))
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--class_prompt",
                         "a dog", "--compile")
    assert status == 2 and "C++ compiler" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("device, lacking, compiles, said", [
    ("cuda", None, True, "first step takes longer"), ("cuda", "triton", False, "needs triton"), ("cpu", None, False, "")])
def test_8_bit_adamw_is_compiled_where_it_can_be(device, lacking, compiles, said, monkeypatch, capsys):
    pytest.importorskip("torchao")
    monkeypatch.setattr(db, "missing_compiler", lambda device: lacking)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 1e-4}]
    optimizer = db.make_adamw8bit(groups, 0.0, torch.device(device))
    assert ("step" not in vars(optimizer)) == compiles
    assert said in capsys.readouterr().out


def test_bf16_weights_train_and_draw(flags, run, tmp_path):
    need("adamw8bit")
    options = [*flags("full", "sd2"), "--optimizer", "adamw8bit", "--weights", "bf16", "--mixed_precision", "bf16",
               "--steps", 2]
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
    (["--weights", "bf16", "--use_ema", "--fused_backward"], "--use_ema"), (["--weights", "bf16"], "--optimizer adamw8bit"), (["--offload_optimizer"], "--fused_backward"),
    (["--weights", "bf16", "--optimizer", "adamw8bit"], "--mixed_precision bf16"),
    (["--weights", "bf16", "--method", "lora"], "--weights has no meaning with --method lora"),
    (["--optimizer", "prodigy", "--method", "pivotal"], "--method pivotal"),
    (["--optimizer", "sgd"], "--optimizer"),
])
def test_levers_that_do_not_go_together_are_one_line(given, said, run, photos, tiny_model, monkeypatch):
    need("adamw8bit"), need("prodigy")
    monkeypatch.setattr(db, "load_models", lambda *args: pytest.fail("a model was loaded"))
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--class_prompt",
                         "a dog", *given)
    assert status == 2 and said in err and err.count("\n") == 1, err


def test_a_missing_package_is_named(run, photos, tiny_model, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name in OPTIONAL.values() else find(name, *rest))
    monkeypatch.setattr(db, "load_models", lambda *args: pytest.fail("a model was loaded"))
    for optimizer, package in OPTIONAL.items():
        status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--class_prompt",
                             "a dog", "--optimizer", optimizer)
        assert status == 2 and f"pip install {package}" in err and err.count("\n") == 1, err


@pytest.fixture
def fp16_on_a_cpu(monkeypatch):
    """fp16_on_a_cpu(scale): accelerate scales losses in fp16 as it does on a CUDA GPU."""
    def install(scale):
        def scaling(s, plan):
            accelerator = make(s, plan)
            if plan.precision == "fp16":
                accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
            return accelerator
        make = db.make_accelerator
        monkeypatch.setattr(db, "make_accelerator", scaling)
    return install


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("levers", [db.Levers(), db.Levers("adafactor", split_batch=True, gradient_checkpointing=True)], ids=str)
def test_fp16_learns_what_float32_does(method, levers, tiny_model, fp16_on_a_cpu):
    fp16_on_a_cpu(2.0**16)
    run = make_run(tiny_model, method, precision="fp16", levers=levers)
    before, coarse = trained(run), steps(run, 0, 4)
    assert all(tensor.dtype == torch.float32 for tensor in before.values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trained(run).items())
    fine = steps(make_run(tiny_model, method, precision="no", levers=levers), 0, 4)
    assert torch.allclose(coarse, fine, rtol=1e-2)


def test_a_step_that_overflows_in_fp16_is_skipped_and_its_scale_resumed(tiny_model, fp16_on_a_cpu, tmp_path):
    fp16_on_a_cpu(2.0**40)
    run = make_run(tiny_model, precision="fp16")
    before, bar = trained(run), types.SimpleNamespace(set_postfix=lambda values: None)
    db.report_losses(run, tmp_path, db.train_step(run, 0), bar, None)  # a norm that is not finite stops nothing
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained(run).items())
    assert run.accelerator.scaler.get_scale() == 2.0**39
    db.write_checkpoint(run, tmp_path)
    run = make_run(tiny_model, precision="fp16")
    db.load_checkpoint(run, tmp_path / "checkpoints" / "step-000001")
    assert run.accelerator.scaler.get_scale() == 2.0**39
    for step in range(1, 40):
        db.train_step(run, step)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trained(run).items())


def test_fused_backward_does_not_go_with_fp16():
    s = db.Settings("train", fused_backward=True)
    assert db.objection(s, db.Levers(fused_backward=True), "no") is None
    assert "fp16" in db.objection(s, db.Levers(fused_backward=True), "fp16")


def test_prodigy_has_one_rate(flags, run):
    need("prodigy")
    status, _, err = run(*flags("lora"), "--optimizer", "prodigy", "--learning_rate", 0.5)
    assert status == 2 and err.splitlines()[-1].endswith("unet_lora 0.5, text_encoder_lora 1"), err


def test_another_optimizer_is_not_gone_on_with(flags, run, monkeypatch):
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
def test_weights_gradients_and_states_take_what_was_estimated(method, family, optimizer, more, flags, run, monkeypatch):
    """To the byte, against the tensors that a step really leaves."""
    need(optimizer)
    surveyed, found = [], {}
    ask, step = db.survey, db.train_step
    monkeypatch.setattr(db, "survey", lambda *args: surveyed.append((ask(*args), args[-1])) or surveyed[-1][0])

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
    status, _, err = run(*options, "--optimizer", optimizer, *more, *QUICK, "--max_vram", 8)
    assert status == 2 and err.splitlines()[-1] == "error: enough", err
    (demand, levers), = surveyed
    parts = db.estimate(demand, levers)
    assert sum(size for what, size, _ in demand.events if what != "kept") == found["gradients"]
    assert {name: parts[name] for name in found} == {**found, "gradients": parts["gradients"]}


@pytest.mark.parametrize("method, family, precision, checkpointing", [
    ("full", "sdxl", "no", False), ("full", "sdxl", "bf16", True), ("full", "sd1", "fp16", False),
    ("full", "sd1", "no", True)])
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
        with torch.autocast("cpu", plan.dtype, precision != "no", cache_enabled=False):
            out = db.predict(models.unet, *batch, hidden, pooled, torch.zeros(6, 6))
        out.float().square().mean().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    real = peak - sum(t.nbytes for t in (*models.unet.parameters(), *models.unet.buffers()))
    assert sum(db.peak_of(demand, levers).values()) == pytest.approx(real, rel=0.1)


def demand(*events, passes=1, trained=((4, 25),)):
    return db.Demand(trained, 0, passes, events)


def test_autocast_keeps_no_copies_of_weights(tiny_model):
    """With gradient checkpointing they would be there, all of them, at the end of a pass."""
    run, kept = make_run(tiny_model, precision="bf16", levers=db.Levers(gradient_checkpointing=True)), []
    run.models.unet.conv_out.register_forward_hook(lambda *args: kept.append(torch.is_autocast_cache_enabled()))
    steps(run, 0, 1)
    assert kept == [False]


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
    assert parts == {"weights": 400, "gradients": 400, "optimizer": 804, "exchange": 0, "step": 0, "activations": 4000,
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
    monkeypatch.setenv("WORLD_SIZE", "2")
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


@pytest.mark.parametrize("by_hand", [{}, {"optimizer": "adafactor", "split_batch": False}])
def test_the_first_plan_that_fits_is_taken(by_hand, tiny_model, capsys, monkeypatch):
    need("adamw8bit")
    monkeypatch.setattr(db, "RESERVE", 0)
    surveyed, ask = {}, db.survey
    monkeypatch.setattr(db, "survey", lambda *args: surveyed.get(args[-1]) or surveyed.setdefault(args[-1], ask(*args)))
    training = s, models, subjects, recipe, plan = tiny_training(tiny_model, precision="bf16", train_batch_size=2, **by_hand)
    rows = db.plans(s, "bf16")
    assert all(getattr(row, name) == value for row in rows for name, value in by_hand.items())
    assert by_hand or rows == list(db.PLANS)
    needs = [sum(db.estimate(survey(training, row), row).values()) for row in rows]
    assert needs[0] > min(needs) and max(needs) < db.GIB
    for bytes_needed in needs:
        limit = dataclasses.replace(s, max_vram=repr(bytes_needed / db.GIB))
        taken = db.choose_levers(limit, models, subjects, recipe, 64, plan)
        first = next(other for other, n in zip(rows, needs) if n <= bytes_needed * (1 + 1e-12))
        assert taken == first
        line = capsys.readouterr().out
        assert line.startswith("Memory plan: ") and line.count("\n") == 1
        assert db.flags_of(first) in line and "weights 0.0" in line
    with pytest.raises(db.UserError, match="the most frugal plan takes .* more than there are"):
        db.choose_levers(dataclasses.replace(s, max_vram=repr(min(needs) / 2 / db.GIB)), models, subjects, recipe, 64, plan)


def test_plans_that_need_what_is_not_installed_come_last(tiny_model, capsys, monkeypatch):
    s, models, subjects, recipe, plan = tiny_training(tiny_model, precision="bf16")
    monkeypatch.setattr(db, "missing_package", lambda levers: "torchao" if levers.optimizer == "adamw8bit" else None)

    def sizes(demand, levers):
        return {"all": fits.get(levers.optimizer, 2) * db.GIB}
    monkeypatch.setattr(db, "estimate", sizes)
    s = dataclasses.replace(s, max_vram="1")
    fits = {"adamw8bit": 0.9, "adafactor": 0.8}
    assert db.choose_levers(s, models, subjects, recipe, 64, plan) == db.Levers(
        "adafactor", gradient_checkpointing=True, fused_backward=True)
    assert "--split_batch would do, too, but needs torchao: pip install torchao." in capsys.readouterr().out
    fits = {"adamw8bit": 0.9}
    with pytest.raises(db.UserError, match="adamw8bit needs torchao: pip install torchao"):
        db.choose_levers(s, models, subjects, recipe, 64, plan)


def test_every_further_lever_saves(tiny_model):
    """On pictures so small that weights matter more than activations."""
    training = tiny_training(tiny_model, "full", "sdxl", "bf16")
    needs = {row: sum(db.estimate(survey(training, row, 64), row).values()) for row in db.PLANS if not row.split_batch}
    for adafactor in [row for row in db.PLANS if row.optimizer == "adafactor"]:
        del needs[adafactor]  # what it saves depends on the layers' shapes
    assert list(needs.values()) == sorted(needs.values(), reverse=True) and len(set(needs.values())) == len(needs) == 6
    matrices, kernels = demand(trained=((1280, 1280),) * 9), demand(trained=((64, 64, 3, 3),) * 99)
    without = dataclasses.replace(adafactor, optimizer="adamw8bit")
    saved = [db.estimate(shapes, without)["optimizer"] / db.estimate(shapes, adafactor)["optimizer"] for shapes in (matrices, kernels)]
    assert saved[0] > 100 and saved[1] < 1


def test_a_little_of_what_a_gpu_has_free_is_left(monkeypatch):
    share = [1.0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share[0])
    s = db.Settings("train")
    assert db.memory_limit(s, db.Plan(torch.device("cuda"), "bf16")) == 970
    share[0] = 0.25  # torch.cuda.set_per_process_memory_fraction()
    assert db.memory_limit(s, db.Plan(torch.device("cuda"), "bf16")) == 485
    assert db.memory_limit(dataclasses.replace(s, max_vram="2"), db.Plan(torch.device("cuda"), "bf16")) == 2 * db.GIB
    assert db.memory_limit(s, db.Plan(torch.device("cpu"), "no")) is None


@pytest.mark.parametrize("limit", ["lots", "0", "-3", "nan", "inf"])
def test_a_limit_must_be_a_number(limit, run, photos, tiny_model):
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--class_prompt",
                         "a dog", f"--max_vram={limit}")
    assert status == 2 and f"--max_vram {limit}" in err and err.count("\n") == 1, err


def test_what_cannot_fit_ends_before_anything_is_drawn(flags, run, tmp_path):
    status, _, err = run(*flags("full"), "--max_vram", 0.05)
    assert status == 2 and "--max_vram 0.05: the most frugal plan takes 0.3" in err and err.count("\n") == 1, err
    assert not (tmp_path / "class_images").exists() and not list(tmp_path.glob("output*"))


def test_a_plan_is_followed_and_recorded(flags, run, tmp_path, tiny_model):
    """0.33 GiB: beside the reserve of 0.3 too little for a plain step on pictures of 160 pixels."""
    status, out, err = run(*flags("full"), "--max_vram", 0.33, "--resolution", 160, "--steps", 1, *QUICK)
    assert status == 0, err
    line = next(line for line in out.splitlines() if line.startswith("Memory plan: "))
    used = json.loads((tmp_path / "output" / "dreambooth.json").read_text())["used"]
    assert used["gradient_checkpointing"] and "--gradient_checkpointing" in line and "of 0.33 GiB (weights" in line
    assert "Peak memory of training: " in out


def test_the_peak_on_a_gpu_is_said_with_and_without_gaps(monkeypatch):
    for what, size in {"allocated": 3, "reserved": 4}.items():
        monkeypatch.setattr(torch.cuda, f"max_memory_{what}", lambda device, size=size: size * db.GIB)
    assert db.peak_memory(torch.device("cuda")) == "3.00 GiB of tensors on the GPU, 4.00 GiB with what lies unused between them"


def test_without_a_gpu_and_a_limit_nothing_is_planned(flags, run, monkeypatch):
    monkeypatch.setattr(db, "survey", lambda *args: pytest.fail("surveyed"))
    status, out, err = run(*flags("lora"), "--steps", 1, *QUICK)
    assert status == 0 and "Memory plan" not in out, err


def test_full_memory_names_the_next_plan(flags, run, monkeypatch, tmp_path):
    step = db.train_step

    def fail(state, number):
        if number == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(state, number)
    monkeypatch.setattr(db, "train_step", fail)
    status, _, err = run(*flags("full"), "--checkpointing_steps", 2, *QUICK, "--gradient_checkpointing")
    assert status == 2 and "try --gradient_checkpointing --split_batch" in err.splitlines()[-1], err
    assert "step-000002 is intact" in err and (tmp_path / "output.partial" / "checkpoints" / "step-000002").is_dir()


class Decoder(torch.nn.Linear):
    dtype = property(lambda self: self.weight.dtype)


class SmallMemory:
    """A pipeline that holds three pictures at most."""

    device, dtype, asked = torch.device("cpu"), torch.float32, ()

    def __init__(self):
        self.vae = Decoder(1, 1).half()

    def __call__(self, prompts, generator, **look):
        self.asked = (*self.asked, len(prompts))
        assert self.vae.dtype == torch.float16
        if len(prompts) > 3:
            self.vae.float()  # as SDXL's pipeline does to decode
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return types.SimpleNamespace(images=[f"{prompt} {g.initial_seed()}" for prompt, g in zip(prompts, generator)])

    def maybe_free_model_hooks(self):
        pass


def test_pictures_are_drawn_as_many_at_once_as_fit(monkeypatch, capsys):
    monkeypatch.setattr(db, "is_flat", lambda picture: False)
    jobs, look = [(f"p{i}", i) for i in range(7)], dict(steps=1, guidance_scale=1, height=512, width=512)
    pipeline = SmallMemory()
    assert list(db.draw(pipeline, jobs, batch_size=None, **look)) == [f"p{i} {i}" for i in range(7)]
    assert pipeline.asked == (4, 2, 2, 2, 1) and capsys.readouterr().out.count("2 at a time") == 1
    with pytest.raises(torch.OutOfMemoryError):  # what was asked for by hand is not changed
        list(db.draw(SmallMemory(), jobs, batch_size=4, **look))


GPU = torch.device("cuda", 0)


class TinyMemory(SmallMemory):
    """A pipeline that holds no picture beside all of its parts, and `room` of them beside one part."""

    device, takes_turns = GPU, False

    def __init__(self, room=3):
        super().__init__()
        self.room = room

    def enable_model_cpu_offload(self, device):
        assert device == GPU
        self.device, self.takes_turns = torch.device("cpu"), True

    def maybe_free_model_hooks(self):
        self.device = torch.device("cpu") if self.takes_turns else GPU

    def __call__(self, prompts, generator, **look):
        if not self.takes_turns or len(prompts) > self.room:
            self.device = GPU  # of the part that found no room
            self.vae.float()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().__call__(prompts, generator, **look)


@pytest.mark.parametrize("batch_size, at_once", [(None, (1, 1, 1)), (2, (2, 1))])
def test_where_no_picture_fits_the_parts_of_the_model_take_turns(batch_size, at_once, monkeypatch, capsys):
    monkeypatch.setattr(db, "is_flat", lambda picture: False)
    jobs = [(f"p{i}", i) for i in range(3)]
    look = dict(steps=1, guidance_scale=1, height=512, width=512, batch_size=batch_size)
    pipeline = TinyMemory()
    assert list(db.draw(pipeline, jobs, **look)) == [f"p{i} {i}" for i in range(3)]
    assert pipeline.asked == at_once and capsys.readouterr().out.count("take turns") == 1
    with pytest.raises(torch.OutOfMemoryError):
        list(db.draw(TinyMemory(room=0), jobs, **look))


def test_a_model_larger_than_memory_is_drawn_with_by_parts_in_turn(monkeypatch, capsys):
    class Large(TinyMemory):
        device = torch.device("cpu")

        def to(self, device):
            raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(db, "is_flat", lambda picture: False)
    pipeline, look = Large(room=2), dict(steps=1, guidance_scale=1, height=512, width=512)
    assert db.placed(pipeline, GPU) is pipeline and pipeline.takes_turns
    assert list(db.draw(pipeline, [("p", 0), ("q", 1), ("r", 2)], batch_size=None, **look)) == ["p 0", "q 1", "r 2"]
    assert pipeline.asked == (2, 1) and "2 at a time" in capsys.readouterr().out


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


def test_class_images_leave_no_hooks_on_a_model_that_is_to_train(flags, run, monkeypatch):
    """Without half precision its own pipeline draws them."""
    offloaded, draw, train_step = [], db.draw, db.train_step

    def short_of_memory(pipeline, *args, title="drawing", **look):
        if title == "class images":
            pipeline.enable_model_cpu_offload(device="cpu")
            offloaded.append(pipeline)
        return draw(pipeline, *args, title=title, **look)

    def watched(run, step):
        assert offloaded == [run.models.pipeline] and not hasattr(offloaded[0].unet, "_hf_hook")
        return train_step(run, step)
    monkeypatch.setattr(db, "draw", short_of_memory)
    monkeypatch.setattr(db, "train_step", watched)
    status, _, err = run(*flags("full"), "--steps", 1, "--validation_prompt", "a dog")
    assert status == 0, err


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_frozen_unet_is_loaded_in_half_precision_and_shared(family, tiny_model, monkeypatch, tmp_path):
    whole, half = (db.load_models(str(tiny_model(family)), torch.bfloat16, freezes_unet=freezes) for freezes in (False, True))
    assert (whole.unet.dtype, half.unet.dtype) == (torch.float32, torch.bfloat16)
    assert {part.dtype for part in (half.vae, *half.text_encoders)} == {torch.float32}
    assert half.fingerprint == whole.fingerprint  # one cache of class images serves both
    drawn_with, draw = [], db.draw
    monkeypatch.setattr(db, "draw", lambda pipeline, *args, **look: drawn_with.append(pipeline) or draw(pipeline, *args, **look))
    s, plan = db.parse_settings(["--train"]), db.Plan(torch.device("cpu"), "bf16")
    for models in (whole, half):
        settings = db.class_image_settings(s, models, "a dog", 32, plan)
        folder = tmp_path / str(len(drawn_with))
        folder.mkdir()
        db.draw_class_images(s, models, settings, plan, folder, [0])
    assert [pipeline.unet is models.unet for pipeline, models in zip(drawn_with, (whole, half))] == [False, True]
    assert all(pipeline.vae is not models.vae for pipeline, models in zip(drawn_with, (whole, half)))
    first, second = (next((tmp_path / number).glob("*.png")).read_bytes() for number in "01")
    assert first == second


def test_on_cuda_autocast_normalizes_in_float32(tiny_model):
    for precision, levers in (("no", db.Levers()), ("fp16", db.Levers()), ("bf16", db.Levers(gradient_checkpointing=True))):
        training = tiny_training(tiny_model, "full", "sdxl", precision)
        cuda = *training[:-1], db.Plan(torch.device("cuda", 0), precision)
        cpu, cuda = survey(training, levers), survey(cuda, levers)
        kept = [sum(size for what, size, _ in d.events if what == "kept") for d in (cpu, cuda)]
        assert (cuda.trained, cuda.frozen) == (cpu.trained, cpu.frozen)
        assert kept[0] == kept[1] if precision == "no" else 1.1 * kept[0] < kept[1] < 2 * kept[0]


@pytest.mark.parametrize("expected, levers, precision, dora", [
    (True, db.Levers(), "bf16", False), (True, db.Levers(split_batch=True), "bf16", False),
    (True, db.Levers("adafactor", "bf16", gradient_checkpointing=True, fused_backward=True), "bf16", False),
    (False, db.Levers(), "no", False), (False, db.Levers(), "bf16", True),
    (False, db.Levers(gradient_checkpointing=True), "bf16", False), (False, db.Levers(fused_backward=True), "bf16", False)])
def test_autocast_stays_where_float32_weights_are_recomputed(expected, levers, precision, dora, tiny_model):
    run = make_run(tiny_model, "lora" if dora else "full", "sdxl", precision, levers, use_dora=dora)
    found = []
    run.models.unet.conv_in.register_forward_hook(lambda module, args, out: found.append(torch.is_autocast_enabled("cpu")))
    steps(run, 0, 1)
    assert found[0] == (precision != "no" and not expected)
    assert not db.is_bf16_throughout(run.s, levers, "fp16")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_the_unet_computes_in_bf16_on_copies_of_its_weights(master, layout, tiny_model):
    """As a UNet in bf16 with its last two layers in float32 does, to the bit; gradients come in the precision of the weights."""
    unet = db.load_models(str(tiny_model("sd1")), torch.float32).unet.to(master, memory_format=layout).requires_grad_(True)
    twin = copy.deepcopy(unet).bfloat16()
    for name in ("conv_norm_out", "conv_out"):
        setattr(twin, name, copy.deepcopy(getattr(unet, name)).float())
    twin.conv_norm_out.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    noisy, timesteps, hidden = torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), torch.randn(2, 8, 32)
    expected = db.predict(twin, noisy.bfloat16(), timesteps, hidden.bfloat16(), None, None)
    own = list(unet.parameters())
    db.compute_in_bf16(unet)
    predicted = db.predict(unet, noisy, timesteps, hidden, None, None)
    assert predicted.dtype == torch.float32 and torch.equal(predicted, expected)
    for out in (predicted, expected):
        out.square().mean().backward()
    assert all(a is b and a.dtype == master for a, b in zip(own, unet.parameters(), strict=True))
    for mine, other in zip(own, twin.parameters(), strict=True):
        assert mine.grad.dtype == master and torch.equal(mine.grad, other.grad.to(master))
    with pytest.raises(RuntimeError):  # whatever happens, the weights are back
        db.predict(unet, noisy[:, :3], timesteps, hidden, None, None)
    assert all(a is b for a, b in zip(own, unet.parameters(), strict=True)) and not unet.conv_norm_out._forward_pre_hooks


def test_weights_and_gradients_are_cast_many_at_once(tiny_model):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function in (torch.ops.aten._to_copy.default, torch.ops.aten._foreach_copy_.default)
            return function(*args, **(kwargs or {}))
    counts = []
    for levers in (db.Levers(), db.Levers(fused_backward=True)):  # the latter under autocast
        run = make_run(tiny_model, precision="bf16", levers=levers)
        steps(run, 0, 1)
        with Casts() as casts:
            steps(run, 1, 2)
        counts.append(casts.count)
    assert counts[0] < 30 < 200 < counts[1], counts
    groups = db.grouped([({}, "a", torch.empty(size)) for size in (3, 4, 9, 1, 1)], size=5)
    assert [[len(tensor) for _, _, tensor in group] for group in groups] == [[3, 4], [9], [1, 1]]


def test_bf16_comes_nearer_to_float32_than_autocast_does(tiny_model):
    """Gradients of eight batches, added up: the last layers, where autocast rounds the prediction, are in float32."""
    found = {}
    for name, precision, levers in (("exact", "no", db.Levers()), ("ours", "bf16", db.Levers()),
                                    ("autocast", "bf16", db.Levers(gradient_checkpointing=True))):
        run = make_run(tiny_model, precision=precision, levers=levers, max_grad_norm=0)
        run.optimizer.step = run.optimizer.zero_grad = lambda **_: None
        steps(run, 0, 8)
        found[name] = torch.cat([p.grad.flatten() for p in run.groups[0].parameters])
    ours, autocast = ((found[name] - found["exact"]).norm() / found["exact"].norm() for name in ("ours", "autocast"))
    assert ours < autocast < 0.2, (ours, autocast)
