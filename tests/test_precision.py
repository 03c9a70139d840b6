"""bf16 and fp16: what they compute in, what trains in which precision, and rounding by chance."""

import copy
import functools
import types

import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file
from training_runs import ADAPTER_FLAGS, FAST, make_run, need, steps, trained, weights

import dreambooth_implementation as db


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_trains_float32_weights_and_draws(family, tiny_model, photos, run, tmp_path):
    status, out, err = run("--train", "--model_name", tiny_model(family), "--instance_data_dir", photos, "--steps", 2, *FAST,
                           "--mixed_precision", "bf16", "--train_text_encoder")
    assert status == 0 and "arithmetic bf16" in out, err
    after = weights(tmp_path / "output")
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in after.values())
    unet = after["unet/conv_in.weight"]
    assert not torch.equal(unet, unet.bfloat16().float())
    assert run("--infer", "--num_images", 1, "--num_inference_steps", 2, "--mixed_precision", "bf16")[0] == 0


def test_adapters_train_in_bf16_beside_a_bf16_base(train_adapter, run, tmp_path):
    for method in ADAPTER_FLAGS:
        train_adapter("sdxl", method, "--mixed_precision", "bf16")
        tensors = [t for file in (tmp_path / "output").glob("*.safetensors") for t in load_file(file).values()]
        assert tensors and all(t.dtype == torch.float32 for t in tensors)
        assert any(not torch.equal(t, t.bfloat16().float()) for t in tensors)
        assert run("--infer", "--num_images", 1, "--num_inference_steps", 1, "--mixed_precision", "bf16")[0] == 0


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


def test_rounding_by_chance_is_right_on_average_and_leaves_what_fits():
    torch.manual_seed(0)
    fits = torch.randn(1000).bfloat16()
    assert torch.equal(db.rounded_by_chance(fits.float()), fits)
    for value in (1 + 2**-9, -3 - 2**-10, 1e-20, 0.0):
        drawn = db.rounded_by_chance(torch.full((20000,), value))
        assert drawn.unique().numel() == (1 if value == 0 else 2)
        assert drawn.double().mean().item() == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("expected, levers, precision, dora", [
    (True, db.Levers(), "bf16", False), (True, db.Levers(split_batch=True), "bf16", False),
    (True, db.Levers("adafactor", "bf16", gradient_checkpointing=True, fused_backward=True), "bf16", False),
    (False, db.Levers(), "no", False), (False, db.Levers(), "bf16", True),
    (False, db.Levers(gradient_checkpointing=True), "bf16", False), (False, db.Levers(fused_backward=True), "bf16", False)])
def test_autocast_stays_where_float32_weights_are_recomputed(expected, levers, precision, dora, tiny_model):
    run = make_run(tiny_model, "lora" if dora else "full", "sdxl", precision, levers, use_dora=dora)
    found = []
    run.models.denoiser.conv_in.register_forward_hook(lambda module, args, out: found.append(torch.is_autocast_enabled("cpu")))
    steps(run, 0, 1)
    assert found[0] == (precision != "no" and not expected)
    assert not db.is_bf16_throughout(run.s, run.models.family, levers, "fp16")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_the_unet_computes_in_bf16_on_copies_of_its_weights(master, layout, tiny_model):
    """As a UNet in bf16 with its last two layers in float32 does, to the bit; gradients come in the weights' precision."""
    unet = db.load_models(str(tiny_model("sd1")), torch.float32).denoiser.to(master, memory_format=layout).requires_grad_(True)
    twin = copy.deepcopy(unet).bfloat16()
    for name in ("conv_norm_out", "conv_out"):
        setattr(twin, name, copy.deepcopy(getattr(unet, name)).float())
    twin.conv_norm_out.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    noisy, timesteps, hidden = torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), torch.randn(2, 8, 32)
    expected = twin(noisy.bfloat16(), timesteps, encoder_hidden_states=hidden.bfloat16()).sample
    own = list(unet.parameters())
    db.compute_in_bf16(unet, db.StableDiffusion().last_layers(unet))
    predicted = unet(noisy, timesteps, encoder_hidden_states=hidden).sample
    assert predicted.dtype == torch.float32 and torch.equal(predicted, expected)
    for out in (predicted, expected):
        out.square().mean().backward()
    assert all(a is b and a.dtype == master for a, b in zip(own, unet.parameters(), strict=True))
    for mine, other in zip(own, twin.parameters(), strict=True):
        assert mine.grad.dtype == master and torch.equal(mine.grad, other.grad.to(master))
    with pytest.raises(RuntimeError):  # whatever happens, the weights are back
        unet(noisy[:, :3], timesteps, encoder_hidden_states=hidden)
    assert all(a is b for a, b in zip(own, unet.parameters(), strict=True)) and not unet.conv_norm_out._forward_pre_hooks


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_only_the_last_layers_of_a_bf16_unet_compute_in_float32(family, tiny_model):
    """A good prediction differs from its target by little more than bf16's grain. Weights and gradients stay in float32."""
    run = make_run(tiny_model, family=family, precision="bf16")
    unet, parameters, found, gradients = run.models.pipeline.unet, run.groups[0].parameters, {}, []
    own, step = list(unet.parameters()), run.optimizer.step

    def look(name, module, args, output):
        tensors = [*args, output, *module._parameters.values()]
        found[name] = {tensor.dtype for tensor in tensors if torch.is_tensor(tensor) and tensor.is_floating_point()}

    for name, module in unet.named_modules():
        if module._parameters:
            module.register_forward_hook(functools.partial(look, name))
    run.optimizer.step = lambda: (gradients.extend(p.grad.dtype for p in parameters), step())
    steps(run, 0, 1)
    assert len(found) > 40 and {name for name in found if found[name] == {torch.float32}} == {"conv_norm_out", "conv_out"}
    assert all(dtypes == {torch.bfloat16} for name, dtypes in found.items() if name not in ("conv_norm_out", "conv_out"))
    assert set(gradients) == {torch.float32} and len(gradients) == len(own)
    assert all(a is b and a.dtype == torch.float32 for a, b in zip(own, unet.parameters(), strict=True))


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
@pytest.mark.parametrize("levers", [
    db.Levers(), db.Levers("adafactor", split_batch=True, gradient_checkpointing=True)], ids=str)
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
