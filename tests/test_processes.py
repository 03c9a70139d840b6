"""Two processes on the CPU train as one with the double batch, share the work, and end together."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from test_cli import QUICK

import dreambooth_implementation as db

PREPARED = """
import sys
sys.path[:0] = [{tests!r}, {repository!r}]
import torch
import dreambooth_implementation as db
from safetensors.torch import save_file

def made(cache, s, micro_step, steps, process, processes):
    # one process draws the pictures of both
    parts = [batch(cache, s, micro_step, steps, p, 2) for p in ([process] if processes == 2 else [0, 1])]
    whole = {{key: torch.cat([part[key] for part in parts]) for key in parts[0]}}
    return whole | {{"weight": whole["weight"] / len(parts)}}
batch, db.make_batch = db.make_batch, made
s = db.Settings("train", train_text_encoder=True, max_grad_norm=0)
models = db.load_models({model!r}, torch.float32)
groups = db.parameter_groups(s, models, [], db.RECIPES["small"]["full"])
latents = torch.randn(9, 4, 16, 16, generator=torch.Generator().manual_seed(1))
cache = db.LatentCache(latents, torch.full_like(latents, 0.1), torch.full((9, 6), 32.0), (torch.arange(9) > 3).long(),
                       ["a sks dog", "a dog"], [[0, 1, 2, 3]], [[4, 5, 6, 7, 8]])
accelerator = db.make_accelerator(s, db.Plan(torch.device("cpu"), {precision!r}))
run = db.prepare_training(s, db.Course(1, 64, {precision!r}, db.Levers({levers})), models, groups, cache, accelerator, {{}})
object.__setattr__(run, "at_once", {at_once} or 2 * (3 - run.accelerator.num_processes))
name = f"{{run.accelerator.num_processes}}-{{run.accelerator.process_index}}.safetensors"
"""
GRADIENT = PREPARED + """
step = run.optimizer.step
run.optimizer.step = lambda: (save_file({{f"{{g.name}}.{{i}}": p.grad for g in groups for i, p in enumerate(g.parameters)}},
                                        f"gradient-{{name}}"), step())
db.train_step(run, 0)
"""
WEIGHTS = PREPARED + """
for step in range(3):
    db.train_step(run, step)
save_file(db.trained_tensors(groups), f"weights-{{name}}")
"""


def launch(*command, processes=2):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
            *map(str, command)]


@pytest.fixture
def train(tiny_model, photos, tmp_path):
    """train(*flags) -> the finished command of a training in two processes."""
    def call(*flags):
        command = launch(REPOSITORY / "dreambooth_implementation.py", "--train", "--model_name", tiny_model("sd1"),
                         "--instance_data_dir", photos, *QUICK, *flags)
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)

    return call


def test_the_gradient_is_that_of_the_double_batch(tmp_path, tiny_model):
    """Of UNet and text encoders, in both processes; also with photos and class images one after the other."""
    found = {}
    places = dict(tests=str(REPOSITORY / "tests"), repository=str(REPOSITORY), model=str(tiny_model("sdxl")))
    for name, processes, levers, at_once in (("one", 1, "", None), ("two", 2, "", None),
                                             ("split", 2, "split_batch=True", 1)):
        (tmp_path / "step.py").write_text(GRADIENT.format(**places, levers=levers, at_once=at_once, precision="no"))
        command = launch("step.py") if processes == 2 else [sys.executable, "step.py"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr[-3000:]
        found[name] = [load_file(tmp_path / f"gradient-{processes}-{rank}.safetensors") for rank in range(processes)]
    one, = found["one"]
    assert len(one) > 50
    for first, second in (found["two"], found["split"]):
        assert one.keys() == first.keys() and all(torch.equal(first[name], second[name]) for name in one)
        for name in one:
            torch.testing.assert_close(first[name], one[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision, levers", [
    ("no", 'fused_backward=True'), ("bf16", ""), ("bf16", '"adafactor", "bf16", fused_backward=True, offload_optimizer=True')])
def test_steps_average_what_processes_find(precision, levers, tmp_path, tiny_model):
    """Weights after three steps are the same in both processes, to the bit, and those of one with the double batch."""
    places = dict(tests=str(REPOSITORY / "tests"), repository=str(REPOSITORY), model=str(tiny_model("sd1")))
    (tmp_path / "step.py").write_text(WEIGHTS.format(**places, levers=levers, at_once=None, precision=precision))
    for command in ([sys.executable, "step.py"], launch("step.py")):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr[-3000:]
    one, first, second = (load_file(tmp_path / f"weights-{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    start = {f"unet.{i}": p for i, p in enumerate(db.load_models(places["model"], torch.float32).unet.parameters())}
    assert len(start) > 50 and one.keys() == first.keys() and all(torch.equal(first[name], second[name]) for name in one)
    moved, apart = (torch.cat([(one[n].float() - other[n].float()).flatten() for n in start]).norm() for other in (start, first))
    assert 0 < moved and apart < (0.1 if precision == "no" else 0.6) * moved, (moved, apart)


def test_work_is_shared_and_resumed_exactly(train, tmp_path):
    """Every class image is made once, by either process; and two processes go on as if nothing had been."""
    flags = ["--num_class_images", 5, "--sample_batch_size", 1, "--steps", 4, "--checkpointing_steps", 2]
    result = train(*flags, "--output_dir", "whole")
    assert result.returncode == 0, result.stderr[-3000:]
    pictures = sorted((tmp_path / "class_images").rglob("*.png"))
    assert len(pictures) == 5 and len({path.read_bytes() for path in pictures}) == 5
    made = {path: path.stat().st_mtime_ns for path in pictures}
    result = train(*flags, "--resume", tmp_path / "whole" / "checkpoints" / "step-000002")
    assert result.returncode == 0 and "after step 2 of 4" in result.stdout, result.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "class_images").rglob("*.png")} == made
    whole, resumed = (load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")
                      for name in ("whole", "output"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    # one process would draw other noise: it is refused, not continued
    status = subprocess.run([sys.executable, REPOSITORY / "dreambooth_implementation.py", "--train", *result.args[
        result.args.index("--train") + 1:]], cwd=tmp_path, capture_output=True, text=True)
    assert status.returncode == 2 and "the number of processes (2, now 1)" in status.stderr, status.stderr[-2000:]


def test_a_configuration_that_splits_the_model_trains_it_whole(tiny_model, photos, tmp_path, run, monkeypatch):
    """In as many steps as the flags say."""
    flags = ["--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, *QUICK]
    assert run(*flags, "--output_dir", "plain")[0] == 0
    for name, value in {"USE_FSDP": "true", "USE_DEEPSPEED": "true", "GRADIENT_ACCUMULATION_STEPS": "2"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    status, out, err = run(*flags)
    assert status == 0 and out.count("which splits the model") == 2, err
    one, other = (load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("plain", "output"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_killed_process_ends_the_run(tiny_model, photos, tmp_path):
    """With an error and no output; the checkpoint before it stays."""
    command = launch(REPOSITORY / "dreambooth_implementation.py", "--train", "--model_name", tiny_model("sd1"),
                     "--instance_data_dir", photos, *QUICK, "--steps", 100000, "--checkpointing_steps", 2)
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not db.checkpoints_in(tmp_path / "output.partial") and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            ranks = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and parent_of(pid) == process.pid]
            second = next(pid for pid in ranks if b"RANK=1" in open(f"/proc/{pid}/environ", "rb").read().split(b"\0"))
            os.kill(second, signal.SIGKILL)
            assert process.wait(timeout=90) != 0
        finally:
            process.kill()
    words = (tmp_path / "log").read_text()
    assert re.search(r"exitcode\s*: -9", words) and "SIGKILL" in words.upper(), words[-2000:]
    assert not (tmp_path / "output").exists()
    kept = db.checkpoints_in(tmp_path / "output.partial")
    assert kept and json.loads((kept[-1] / db.STATE_FILE).read_text())["history"] and db.read_state(kept[-1])


def parent_of(pid):
    try:
        return int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None
