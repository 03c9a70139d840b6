"""Making a Run of what is to train: no more on the device than trains, and rates as the schedule says."""

import pytest
import torch
from safetensors.torch import load_file
from training_runs import ALONE, FAST, make_run, steps, trained

import dreambooth_implementation as db


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
    status, _, err = run(*flags("full"), "--use_ema", *ALONE)
    assert status == 0, err
    assert not seen[0].optimizer.state and not seen[0].averages


@pytest.mark.parametrize("options", [
    dict(channels_last=True), pytest.param(dict(compile=True), marks=pytest.mark.long)], ids=str)
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


def test_warmup_counts_optimizer_steps(tiny_model, photos, run, monkeypatch):
    rates = []
    report = db.report_losses
    monkeypatch.setattr(db, "REPORT_EVERY", 1)
    monkeypatch.setattr(db, "report_losses", lambda state, *rest:
                        rates.append(state.lr_scheduler.get_last_lr()) or report(state, *rest))
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--steps", 6, *FAST,
                         "--gradient_accumulation_steps", 3, "--lr_scheduler", "linear", "--lr_warmup_steps", 2,
                         "--train_text_encoder", "--text_encoder_lr", "1e-4")
    assert status == 0, err
    assert [rate for rate, _ in rates] == pytest.approx([5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4, 0])
    assert [text / unet for unet, text in rates[:-1]] == pytest.approx([0.1] * 5)

    rates.clear()
    assert run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--steps", 3, *FAST,
               "--lr_warmup_steps", 2, "--lr_scheduler", "constant")[0] == 0
    assert [rate for rate, in rates] == pytest.approx([5e-4, 1e-3, 1e-3])  # "constant" warms up as well


@pytest.mark.parametrize("flags, schedule", [
    ([], "warmup_stable_decay"), (["--lr_scheduler", "constant"], "constant"), (["--method", "lora"], "constant"),
    (["--select_best", "--validation_steps", 8], "constant")], ids=str)
def test_the_rate_falls_where_the_recipe_says_so(flags, schedule, tiny_model, photos, run, tmp_path, monkeypatch, networks):
    """In the last quarter of the steps."""
    import json

    rates, report = [], db.report_losses
    monkeypatch.setattr(db, "REPORT_EVERY", 1)
    monkeypatch.setattr(db, "report_losses", lambda state, *rest:
                        rates.append(state.lr_scheduler.get_last_lr()[0]) or report(state, *rest))
    status, out, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--steps", 8, *FAST,
                           *flags, "--dino_model", networks / "vit", "--clip_model", networks / "clip")
    assert status == 0 and f"8 steps, {schedule}" in out, err
    falling = [5e-4, 0] if schedule == "warmup_stable_decay" else [1e-3, 1e-3]
    assert rates == pytest.approx([1e-3] * 6 + falling)
    assert json.loads((tmp_path / "output" / "dreambooth.json").read_text())["used"]["lr_scheduler"] == schedule
