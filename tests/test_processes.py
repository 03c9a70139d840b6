"""Two processes on the CPU train as one with the double batch, share the work, and end together."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import forked
import psutil
import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file, save_file
from training_runs import QUICK, assert_same_weights, made_up_latents, make_run, same, steps

import dreambooth_implementation as db


def launched(*flags, **options):
    """The program in two processes, by torch's launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               REPOSITORY / "dreambooth_implementation.py", *flags]
    return subprocess.Popen([str(word) for word in command], text=True, **options)


def together(folder, task, *arguments):
    """What two processes say that do `task` together; both succeed."""
    statuses, said = forked.together(2, folder, task, *arguments)
    assert statuses == [0, 0], said
    return said


def prepared(model, precision, levers, at_once):
    """(the Run of a process that trains on its share of two pictures of each kind, or on all if it is alone; a file's name)."""
    def made(cache, s, micro_step, steps, process, processes):
        parts = [batch(cache, s, micro_step, steps, p, 2) for p in ([process] if processes == 2 else [0, 1])]
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return whole | {"weight": whole["weight"] / len(parts)}

    batch, db.make_batch = db.make_batch, made
    s = db.Settings("train", train_text_encoder=True, max_grad_norm=0)
    models = db.load_models(model, torch.float32)
    groups = db.parameter_groups(s, models, [], db.SmallStableDiffusion.recipes["full"])
    accelerator = db.make_accelerator(s, db.Plan(torch.device("cpu"), precision))
    run = db.prepare_training(s, db.Course(1, 64, precision, levers), models, groups, made_up_latents(), accelerator, {})
    object.__setattr__(run, "at_once", at_once or 2 * (3 - accelerator.num_processes))
    return run, f"{accelerator.num_processes}-{accelerator.process_index}.safetensors"


def save_gradient(*options):
    run, name = prepared(*options)
    step = run.optimizer.step
    run.optimizer.step = lambda: (save_file({f"{g.name}.{i}": p.grad for g in run.groups for i, p in enumerate(g.parameters)},
                                            f"gradient-{name}"), step())
    db.train_step(run, 0)


def save_weights(*options):
    run, name = prepared(*options)
    for step in range(3):
        db.train_step(run, step)
    save_file(db.trained_tensors(run.groups), f"weights-{name}")


@pytest.mark.long
def test_two_processes_train_one_model(tmp_path, tiny_model, photos):
    """Both text encoder and UNet train under DDP, and the class images and the output are made once."""
    process = launched("--train", "--model_name", tiny_model("sdxl"), "--instance_data_dir", photos, *QUICK,
                       "--train_text_encoder", "--learning_rate", "1e-3", "--text_encoder_lr", "1e-3",
                       cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    assert out.count("Trains: text_encoder") == 1
    for part, tensor in (("unet/diffusion_pytorch_model", "conv_in.weight"),
                         ("text_encoder_2/model", "text_projection.weight")):
        before, after = (load_file(root / f"{part}.safetensors")[tensor] for root in (tiny_model("sdxl"), tmp_path / "output"))
        assert not torch.equal(before, after), part
    assert len(list((tmp_path / "class_images").rglob("*.png"))) == 2
    assert sorted(p.name for p in tmp_path.glob("output*")) == ["output"]


def test_the_gradient_is_that_of_the_double_batch(tmp_path, tiny_model):
    """Of UNet and text encoders, in both processes; also with photos and class images one after the other."""
    model, found = str(tiny_model("sdxl")), {}
    for name, levers, at_once in (("two", db.Levers(), None), ("split", db.Levers(split_batch=True), 1)):
        together(tmp_path, save_gradient, model, "no", levers, at_once)
        found[name] = [load_file(tmp_path / f"gradient-2-{rank}.safetensors") for rank in range(2)]
    statuses, said = forked.finish([forked.begin(tmp_path, save_gradient, model, "no", db.Levers(), None)], tmp_path)
    assert statuses == [0], said
    one = load_file(tmp_path / "gradient-1-0.safetensors")
    assert len(one) > 50
    for first, second in found.values():
        assert same(first, second) and one.keys() == first.keys()
        for name in one:
            torch.testing.assert_close(first[name], one[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision, levers", [
    ("no", db.Levers(fused_backward=True)), ("bf16", db.Levers()),
    ("bf16", db.Levers("adafactor", "bf16", fused_backward=True, offload_optimizer=True))], ids=str)
def test_steps_average_what_processes_find(precision, levers, tmp_path, tiny_model):
    """Weights after three steps are the same in both processes, to the bit, and those of one with the double batch."""
    options = str(tiny_model("sd1")), precision, levers, None
    together(tmp_path, save_weights, *options)
    statuses, said = forked.finish([forked.begin(tmp_path, save_weights, *options)], tmp_path)
    assert statuses == [0], said
    one, first, second = (load_file(tmp_path / f"weights-{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    start = {f"unet.{i}": p for i, p in enumerate(db.load_models(options[0], torch.float32).denoiser.parameters())}
    assert len(start) > 50 and same(first, second) and one.keys() == first.keys()
    moved, apart = (torch.cat([(one[n].float() - other[n].float()).flatten() for n in start]).norm()
                    for other in (start, first))
    assert 0 < moved and apart < (0.1 if precision == "no" else 0.6) * moved, (moved, apart)


def test_work_is_shared_and_resumed_exactly(flags, tmp_path):
    """Every class image is made once, by either process; and two processes go on as if nothing had been."""
    options = list(map(str, flags("full", "sd1", "--num_class_images", 5, "--sample_batch_size", 1, "--steps", 4,
                                  "--checkpointing_steps", 2)))
    together(tmp_path, db.main, [*options, "--output_dir", "whole"])
    pictures = sorted((tmp_path / "class_images").rglob("*.png"))
    assert len(pictures) == 5 and len({path.read_bytes() for path in pictures}) == 5
    made = {path: path.stat().st_mtime_ns for path in pictures}
    resumed = [*options, "--resume", str(tmp_path / "whole" / "checkpoints" / "step-000002")]
    assert "after step 2 of 4" in together(tmp_path, db.main, resumed)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "class_images").rglob("*.png")} == made
    assert_same_weights(tmp_path / "whole", tmp_path / "output")
    # one process would draw other noise: it is refused, not continued
    status, said = forked.program(tmp_path, *resumed)
    assert status == 2 and "the number of processes (2, now 1)" in said.splitlines()[-1], said


def until_a_checkpoint(folder, works):
    """Wait for the first checkpoint of a training that is to write one, as long as works() is true."""
    while not db.checkpoints_in(folder / "output.partial"):
        assert works()
        time.sleep(0.05)


def assert_ended_whole(folder):
    """There is no output, and the last checkpoint is whole."""
    assert not (folder / "output").exists()
    kept = db.checkpoints_in(folder / "output.partial")
    assert kept and json.loads((kept[-1] / db.STATE_FILE).read_text())["history"] and db.read_state(kept[-1])


def test_when_one_is_killed_the_other_does_not_wait_for_it(flags, tmp_path):
    """It ends with one line and no output; the checkpoint before it stays."""
    options = flags("full", "sd1", "--steps", 100000, "--checkpointing_steps", 2)
    with forked.as_many(2) as environments:
        first, second = (forked.start(tmp_path, *options, **each) for each in environments)
        until_a_checkpoint(tmp_path, first.is_alive)
        second.kill()
        (status, _), said = forked.finish([first, second], tmp_path)
    assert status == 2 and "another of the 2 processes that train together is gone" in said and "Traceback" not in said, said
    assert_ended_whole(tmp_path)


@pytest.mark.slow
def test_a_killed_process_ends_the_launched_run(flags, tmp_path):
    """The launcher says which it was."""
    with open(tmp_path / "log", "w+") as log:
        options = flags("full", "sd1", "--steps", 100000, "--checkpointing_steps", 2)
        process = launched(*options, cwd=tmp_path, stdout=log, stderr=log)
        try:
            until_a_checkpoint(tmp_path, lambda: process.poll() is None)
            os.kill(second_of(process), signal.SIGKILL)
            assert process.wait() != 0
        finally:
            process.kill()
    words = (tmp_path / "log").read_text()
    assert re.search(r"exitcode\s*: -9", words) and "SIGKILL" in words.upper(), words[-2000:]
    assert_ended_whole(tmp_path)


def second_of(launcher):
    """The number of the second process that torch's launcher has started."""
    return next(child.pid for child in psutil.Process(launcher.pid).children() if child.environ().get("RANK") == "1")


def test_autocast_keeps_no_copies_of_weights(tiny_model):
    """With gradient checkpointing they would be there, all of them, at the end of a pass."""
    run, kept = make_run(tiny_model, precision="bf16", levers=db.Levers(gradient_checkpointing=True)), []
    run.models.denoiser.conv_out.register_forward_hook(lambda *args: kept.append(torch.is_autocast_cache_enabled()))
    steps(run, 0, 1)
    assert kept == [False]


def test_a_configuration_that_splits_the_model_trains_it_whole_where_it_is_alone(tiny_model, photos, tmp_path, run, monkeypatch):
    """In as many steps as the flags say."""
    flags = ["--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, *QUICK]
    assert run(*flags, "--output_dir", "plain")[0] == 0
    for name, value in {"USE_FSDP": "true", "GRADIENT_ACCUMULATION_STEPS": "2"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    status, out, err = run(*flags)
    assert status == 0 and "configuration says FSDP" in out and "this is one process alone" in out, err
    assert_same_weights(tmp_path / "plain", tmp_path / "output")
