"""Machines as people have them: variables left in the environment, consoles, signals, disks, names, packages, the page's surroundings."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import types
from pathlib import Path

import forked  # noqa: F401  (what the forked processes have imported already)
import pytest
import torch
from conftest import REPOSITORY, picture
from safetensors.torch import load_file

import dreambooth_implementation as db

LORA = ["--class_prompt", "a dog", "--num_class_images", "2", "--num_inference_steps", "1", "--steps", "3", "--identifier", "sks",
        "--method", "lora", "--rank", "2"]


@pytest.fixture
def flags(tiny_model, photos):
    """flags(...) -> those of a short training of a LoRA, and more."""
    return lambda *more: ["--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, *LORA, *more]


def one_line(err, *parts):
    """Assert that the program ended in one line, with these parts in it, and in no traceback."""
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and err.count("error: ") == 1 and "Traceback" not in err, err
    assert all(part in last for part in parts), last


def digests(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*"))
            if path.is_file()}


def command(folder, flags, before):
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    exec(before, globals())
    sys.exit(db.main(flags))


def start(folder, flags, before=""):
    """Start the program in a process of its own, after the Python in `before`; what it says goes to log.txt."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked"])
    process = context.Process(target=command, args=(str(folder), [str(flag) for flag in flags], before))
    with pytest.MonkeyPatch.context() as patch:  # by which the server finds what it is to import once for all
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY / "tests"), str(REPOSITORY)]))
        process.start()
    return process


# ---- variables that something else has left in the environment

FULL = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """environment(**variables): those alone of the launchers' are set."""
    def only(**variables):
        for name in (*db.MEETING, *db.ASKING):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    return only


@pytest.mark.parametrize("left, said", [
    ({"RANK": "3"}, "RANK=3"), ({"WORLD_SIZE": "4", "RANK": "0"}, "WORLD_SIZE=4"), ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4"),
    ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2"), ({"RANK": "x"}, "RANK=x"), ({"WORLD_SIZE": "many", "RANK": "1"}, "WORLD_SIZE=many"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4"), ({"PMI_SIZE": "x"}, "PMI_SIZE=x"),
    (FULL | {"RANK": "4"}, "RANK=4"), (FULL | {"RANK": "-1"}, "RANK=-1"), (FULL | {"MASTER_PORT": "http"}, "WORLD_SIZE=4"),
    (FULL | {"MASTER_PORT": "99999"}, "WORLD_SIZE=4"), (FULL | {"MASTER_ADDR": " "}, "WORLD_SIZE=4"),
    ({"WORLD_SIZE": "1"}, None), ({"LOCAL_RANK": "-1"}, None), ({"RANK": "0"}, None), ({"RANK": "", "WORLD_SIZE": ""}, None), ({"SLURM_PROCID": "3"}, None),
    ({"SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}, None), (FULL | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, None)])
def test_what_was_left_in_the_environment_is_not_believed(left, said, environment, capsys):
    environment(**left)
    assert db.place_among_processes() == (0, 0, 1) and db.is_first_process() and db.processes() == 1
    db.clear_environment()
    out = capsys.readouterr().out
    assert (out.count("\n") == 1 and said in out and "trains alone" in out) if said else out == ""
    assert not {*db.MEETING, *db.ASKING} & os.environ.keys()  # accelerate would believe them


def test_several_that_can_meet_are_believed(environment, capsys):
    environment(**FULL)
    assert db.place_among_processes() == (1, 1, 4) and not db.is_first_process() and db.processes() == 4
    db.clear_environment()
    assert os.environ["WORLD_SIZE"] == "4" and capsys.readouterr().out == ""


@pytest.mark.parametrize("left", [{"RANK": "3"}, {"WORLD_SIZE": "4", "RANK": "0"}, {"LOCAL_RANK": "7", "OMPI_COMM_WORLD_SIZE": "2"}])
def test_a_training_beside_leftover_variables_is_whole(left, environment, flags, run, tmp_path):
    environment(**left)
    status, out, err = run(*flags())
    assert status == 0 and "trains alone" in out and "Trained in" in out, err
    assert (tmp_path / "output" / "dreambooth.json").is_file() and not (tmp_path / "output.partial").exists()
    environment(**left)
    status, out, _ = run("--infer", "--num_images", 1, "--num_inference_steps", 1)
    assert status == 0 and out and len(list((tmp_path / "images").glob("*.png"))) == 2


def test_processes_that_cannot_meet_are_one_line(environment, run, flags):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment(**FULL | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(taken.getsockname()[1])})
        status, _, err = run(*flags())
    assert status == 2
    one_line(err, "WORLD_SIZE=2", "cannot meet", "127.0.0.1")


def test_whoever_waits_for_others_says_so(environment, monkeypatch, capsys):
    class AtOnce:
        def __init__(self, seconds, act, args, options):
            self.start, self.cancel = (lambda: act(*args, **options)), lambda: None
    environment(**FULL)
    monkeypatch.setattr(db.threading, "Timer", AtOnce)
    with db.meeting():
        pass
    assert "one of 4 processes, waiting for the others at 127.0.0.1:29500" in capsys.readouterr().err


def test_accelerates_own_settings_do_not_go_before_the_flags(flags, run, monkeypatch, tmp_path):
    for name, value in {"MIXED_PRECISION": "fp8", "DYNAMO_BACKEND": "INDUCTOR", "DEBUG_MODE": "nonsense", "TORCH_DEVICE": "cuda"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setenv("FORK_LAUNCHED", "nonsense")
    status, _, err = run(*flags())
    assert status == 0, err
    assert json.loads((tmp_path / "output" / "dreambooth.json").read_text())["used"]["precision"] == "no"


def test_accelerates_cpu_is_this_programs_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert db.plan_device(db.Settings("train")).device.type == "cpu"


def test_a_gpu_that_is_not_there_is_one_line(environment, monkeypatch):
    environment(**FULL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(db.UserError, match="LOCAL_RANK=1.*1 CUDA GPUs"):
        db.plan_device(db.Settings("train", mixed_precision="no"))


# ---- consoles


class Gone(io.RawIOBase):
    """A stream that nobody reads any longer, or whose disk is full."""

    def __init__(self, number):
        self.number = number

    def writable(self):
        return True

    def write(self, data):
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        return len(data)


@pytest.mark.parametrize("encoding, shown", [("cp1252", "d\u00e9: \\u4e00 \\udcfc"), ("ascii", "d\\xe9: \\u4e00 \\udcfc"),
                                             ("cp936", "d\u00e9: \u4e00 \\udcfc"), ("utf-8", "d\u00e9: \u4e00 \\udcfc")])
def test_letters_that_a_console_lacks_are_escaped(encoding, shown):
    raw = io.BytesIO()
    stream = db.LastingStream(io.TextIOWrapper(raw, encoding=encoding))
    print("d\u00e9: \u4e00 \udcfc", file=stream, flush=True)
    assert raw.getvalue().decode(encoding) == shown + "\n"


@pytest.mark.parametrize("stream", [io.TextIOWrapper(io.BufferedWriter(Gone(errno.EPIPE))), io.TextIOWrapper(io.BufferedWriter(Gone(errno.ENOSPC))),
                                    types.SimpleNamespace(write=lambda text: None), None])
def test_a_lost_console_is_silence(stream):
    if stream is None:
        (stream := io.StringIO()).close()
    lasting = db.LastingStream(stream)
    print("x" * 100000, file=lasting, flush=True)
    assert lasting.isatty() is False
    lasting.settle()
    if isinstance(stream, io.TextIOWrapper):
        stream.buffer.raw.number = 0  # so that the collector does not complain


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
@pytest.mark.parametrize("mode", ["refused", "helped"])
def test_commands_end_as_usual_on_any_console(encoding, mode, photos, monkeypatch):
    """Also those that say what the console lacks, and names of files that are not UTF-8."""
    os.rename(photos / "0.png", os.fsencode(photos) + b"/H\xfcndchen.txt")
    (photos / "class_prompt.txt").write_text("\u4e00\u53ea\u72d7", encoding="utf-8")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    status = db.main(["--train", "--instance_data_dir", str(photos), "--model_name", "\u4e0d/\u5728"] if mode == "refused" else ["--help"])
    assert (sys.stdout, sys.stderr) == (out, err)  # a notebook's own are there again
    said, complained = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))
    if mode == "helped":
        assert status == 0 and "--train" in said and complained == ""
        return
    assert status == 2 and complained.startswith("error: --model_name") and complained.count("\n") == 1
    assert 'Class prompt "' in said and ("\\u4e00" in said or "\u4e00" in said)


@pytest.mark.parametrize("before", [
    "sys.stdout = sys.stderr = None",                                             # pythonw
    "os.close(1); sys.stdout = None", "os.close(2); sys.stderr = None",           # >&-, 2>&-
    "os.close(1); os.close(2); sys.stdout = sys.stderr = None",                   # >&- 2>&-
    "os.close(0); os.close(1); os.close(2); sys.stdout = sys.stderr = None",
    "r, w = os.pipe(); os.close(r); os.dup2(w, 1)",                               # | head -1
    "r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.dup2(w, 2)",
    "sys.stdout = io.TextIOWrapper(open('/dev/full', 'wb'))",
])
def test_a_training_needs_no_console(before, flags, tmp_path):
    process = start(tmp_path, flags("--steps", 1), before)
    process.join(120)
    words = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 0 and "Traceback" not in words and "Exception" not in words, words
    assert load_file(tmp_path / "output" / "pytorch_lora_weights.safetensors")  # nothing was printed into a file


def test_python_itself_has_nothing_to_complain_of_in_the_end(tmp_path):
    """It flushes its streams last; `--help | head -1`."""
    script = f"{sys.executable} {REPOSITORY / 'dreambooth_implementation.py'} --help | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.stderr == "" and result.stdout.splitlines()[-1] == "0", result


def test_a_line_is_one_line(run, capsys):
    status, _, err = run("--train", "--instance_data_dir", "no\nsuch\nfolder")
    assert status == 2 and err == "error: --instance_data_dir no such folder: no such folder\n"


# ---- signals


def steps_saved(folder):
    return [int(path.name.removeprefix("step-")) for path in db.checkpoints_in(folder)]


def sending(monkeypatch, name, number, call=1, times=1):
    """Send this process a signal in that call of a function of the program."""
    function, calls = getattr(db, name), []

    def signalled(*args, **options):
        calls.append(None)
        for _ in range(times if len(calls) == call else 0):
            os.kill(os.getpid(), number)
        return function(*args, **options)
    monkeypatch.setattr(db, name, signalled)


@pytest.fixture
def hangup():
    """SIGHUP as a terminal gives it (not as nohup does), and afterwards as it was."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, earlier)


def test_a_terminal_that_closes_leaves_a_checkpoint(flags, run, tmp_path, monkeypatch, hangup):
    sending(monkeypatch, "train_step", signal.SIGHUP, call=2)
    status, _, err = run(*flags())
    assert status == 129 and "--resume" in err.splitlines()[-1], err
    assert steps_saved(tmp_path / "output.partial") == [2]
    status, out, _ = run(*flags("--resume"))
    assert status == 0 and "after step 2" in out


def test_under_nohup_a_terminal_may_close(flags, run, tmp_path, monkeypatch, hangup):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sending(monkeypatch, "train_step", signal.SIGHUP, call=2)
    assert run(*flags())[0] == 0 and (tmp_path / "output" / "dreambooth.json").is_file()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_before_the_training_a_closed_terminal_is_said(flags, run, tmp_path, monkeypatch, hangup):
    sending(monkeypatch, "cache_latents", signal.SIGHUP)
    status, _, err = run(*flags())
    assert status == 129 and err.splitlines()[-1].startswith("the terminal was closed") and "Traceback" not in err
    assert not list(tmp_path.glob("output*"))


def test_ended_while_class_images_are_drawn(flags, run, tmp_path, monkeypatch):
    """Those that are there stay, and are not drawn again."""
    sending(monkeypatch, "whole_file", signal.SIGTERM, call=2)
    status, _, err = run(*flags("--sample_batch_size", 1))
    assert status == 143 and "Traceback" not in err
    made = [path for path in (tmp_path / "class_images").rglob("*.png")]
    assert [path.name for path in made] == ["00000.png"] and not list(tmp_path.glob("output*"))
    before = made[0].stat().st_mtime_ns
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert "1 of 2 are in" in run(*flags())[1] and made[0].stat().st_mtime_ns == before


def test_ended_while_the_model_is_saved_it_is_saved(flags, run, tmp_path, monkeypatch):
    sending(monkeypatch, "loss_plot", signal.SIGTERM)
    status, out, err = run(*flags())
    assert status == 143 and "the model is saved" in out and err.splitlines()[-1] == "interrupted; the model is complete in ./output"
    assert (tmp_path / "output" / "dreambooth.json").is_file() and not (tmp_path / "output.partial").exists()
    assert run("--infer", "--num_images", 1, "--num_inference_steps", 1)[0] == 0


def test_asked_twice_it_stops_saving(flags, run, tmp_path, monkeypatch):
    sending(monkeypatch, "loss_plot", signal.SIGTERM, times=2)
    status, _, err = run(*flags("--checkpointing_steps", 2))
    assert status == 143 and not (tmp_path / "output").exists() and steps_saved(tmp_path / "output.partial") == [2]


def test_in_another_thread_there_are_no_signals_to_set(flags, run):
    import threading

    results = []
    thread = threading.Thread(target=lambda: results.append(run(*flags())))
    thread.start()
    thread.join()
    assert results[0][0] == 0


# ---- disks


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_disks_that_flush_nothing_will_do(number, flags, run, tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "fsync", refuse)
    status, _, err = run(*flags("--checkpointing_steps", 1))
    assert status == 0 and steps_saved(tmp_path / "output") == [2], err


def failing(function, number, call, only):
    """`function`, which fails from that call on, if one of its arguments ends like `only`."""
    calls = []

    def fail(*args, **options):
        if any(re.search(only, str(arg)) for arg in args):
            calls.append(None)
            if len(calls) >= call:
                raise OSError(number, os.strerror(number), str(args[0]))
        return function(*args, **options)
    return fail


WRITES = {  # what is being written -> (where it is, name, what its path has in it)
    "the place of work": (Path, "mkdir", r"output\.partial$"), "the photos as seen": ("PIL.Image.Image", "save", r"photos\.png"),
    "a class image": (os, "replace", r"00001\.png"), "settings of class images": (Path, "write_text", r"settings\.json"),
    "a checkpoint": ("safetensors.torch", "save_file", r"training\.safetensors"), "its state": (Path, "write_text", r"state\.json"),
    "its name": (Path, "rename", r"\.new"), "flushing": (os, "fsync", ""), "the losses": ("PIL.Image.Image", "save", r"losses\.png"),
    "the card": (Path, "write_text", r"README"), "the record": (Path, "write_text", r"dreambooth\.json"),
    "the name of the record": (os, "replace", r"dreambooth\.json"), "the weights": (db, "save_lora", "")}


@pytest.mark.parametrize("write, number", [(write, (errno.ENOSPC, errno.EDQUOT)[n % 2]) for n, write in enumerate(WRITES)])
def test_a_full_disk_is_one_line_and_nothing_is_lost(write, number, flags, run, tmp_path, monkeypatch):
    place, name, only = WRITES[write]
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "dreambooth.json").write_text('{"subjects": [{"identifier": "x", "class_prompt": "", "instance_prompt": "", '
                                                         '"name": "x"}]}')
    before = digests(tmp_path / "output")
    if isinstance(place, str):
        module, _, attribute = place.rpartition(".")
        place = getattr(__import__(module, fromlist=["x"]), attribute)
    if write == "the weights":
        def fail(*args, **options):
            raise OSError(number, os.strerror(number))
        monkeypatch.setitem(db.METHODS, "lora", db.dataclasses.replace(db.METHODS["lora"], saves=(fail,)))
    else:
        monkeypatch.setattr(place, name, failing(getattr(place, name), number, 1, only))
    status, _, err = run(*flags("--checkpointing_steps", 2))
    assert status == 2, err
    assert "the disk is full" in err if number == errno.ENOSPC else "quota" in err.lower(), err
    one_line(err)
    assert digests(tmp_path / "output") == before and not (tmp_path / "output-1").exists()
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob(".step-*"))
    assert not (tmp_path / "output.partial" / "dreambooth.json").exists()


@pytest.mark.parametrize("text, said", [
    ("Error while serializing: I/O error: Disk quota exceeded (os error 122)", "quota"),
    ("Error while serializing: I/O error: No space left on device (os error 28)", "the disk is full"),
    ("Error while serializing: I/O error: File too large (os error 27)", "FAT32"),
    ("Error while serializing: I/O error: Read-only file system (os error 30)", "write-protected")])
def test_what_libraries_in_rust_say_of_disks(text, said):
    from safetensors import SafetensorError

    assert said in db.mishap(SafetensorError(text))


def test_logs_end_no_training(flags, run, tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def fail(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    status, out, err = run(*flags())
    assert status == 0 and out.count("no more logs for TensorBoard") == 1 and "No space left" in out, err
    assert (tmp_path / "output" / "dreambooth.json").is_file()


def test_a_file_in_use_is_no_reason_to_stop(flags, run, tmp_path, monkeypatch):
    """As on Windows: an earlier checkpoint, and the earlier output that --overwrite would delete."""
    assert run(*flags())[0] == 0
    (tmp_path / "output" / "mark").write_text("first")
    rmtree = shutil.rmtree

    def refuse(path, *args, **options):
        if re.search(r"output-1$|\.step-\d+$", str(path)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return rmtree(path, *args, **options)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    status, out, err = run(*flags("--overwrite", "--checkpointing_steps", 1))
    assert status == 0 and "output-1 cannot be deleted (Permission denied)" in out, err
    assert (tmp_path / "output-1" / "mark").read_text() == "first" and steps_saved(tmp_path / "output") == [2]


def test_a_name_that_cannot_be_given_leaves_the_model(flags, run, tmp_path, monkeypatch):
    """A rename over the borders of disks, as in layers of containers; the next command with --resume tries again."""
    assert run(*flags())[0] == 0
    before = digests(tmp_path / "output")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing(Path.rename, errno.EXDEV, 1, r"/output$"))
        status, _, err = run(*flags("--seed", 1))
    assert status == 2 and digests(tmp_path / "output") == before
    one_line(err, "cannot be replaced", "the new model is complete in")
    assert run(*flags("--seed", 1, "--resume"))[0] == 0
    assert not (tmp_path / "output.partial").exists() and digests(tmp_path / "output-1") == before


def test_an_interruption_tidies_what_it_can(tmp_path, monkeypatch):
    """What cannot be deleted does not hide why it stopped."""
    s = db.Settings("train", output_dir=str(tmp_path / "output"))
    monkeypatch.setattr(Path, "unlink", failing(Path.unlink, errno.EACCES, 1, "weights"))
    with pytest.raises(db.Interrupted), db.new_output(s) as folder:
        (folder / "checkpoints" / "step-000001").mkdir(parents=True)
        (folder / "weights").write_text("")
        raise db.Interrupted("stop", 2)


def test_checkpoints_half_deleted_or_half_written_are_swept(flags, run, tmp_path):
    leftovers = [tmp_path / "output.partial" / "checkpoints" / name for name in (".step-000001", ".step-000009.new")]
    for leftover in leftovers:
        leftover.mkdir(parents=True)
        (leftover / "training.safetensors").write_text("x")
    assert run(*flags("--checkpointing_steps", 2))[0] == 0
    assert [path.name for path in (tmp_path / "output" / "checkpoints").iterdir()] == ["step-000002"]


def test_parts_that_a_killed_export_left_are_deleted_in_time(tmp_path):
    old, young = tmp_path / ".x.safetensors.77.part", tmp_path / ".x.safetensors.78.part"
    for part in (old, young):
        part.write_text("half")
    os.utime(old, (time.time() - 7200,) * 2)
    db.write_file(tmp_path / "x.safetensors", lambda part: part.write_text("whole"))
    assert {path.name for path in tmp_path.iterdir()} == {young.name, "x.safetensors"}


def test_two_trainings_draw_class_images_in_one_folder(flags, tmp_path):
    """Every picture is whole and entered as it is, whichever of them made it."""
    processes = [start(tmp_path, flags("--num_class_images", 6, "--sample_batch_size", 1, "--output_dir", f"out{n}")) for n in (1, 2)]
    for process in processes:
        process.join(180)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "log.txt").read_text()
    folder, = (path for path in (tmp_path / "class_images").iterdir())
    assert db.missing_class_images(folder, 6) == [] and not list(folder.glob("*.part"))
    assert all(len(line.split()) == 2 for line in (folder / db.MANIFEST).read_text().splitlines())


def test_a_manifest_cut_by_a_power_failure_is_read(tmp_path):
    (tmp_path / "MANIFEST.sha256").write_bytes(b"ab12  00000.png\n\0\0\0\xff\xfe\n")
    assert db.read_sums(tmp_path / "MANIFEST.sha256")["00000.png"] == "ab12"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_what_is_written_has_the_permissions_of_the_umask(mask, flags, run, tmp_path):
    earlier = os.umask(mask)
    try:
        status, _, err = run(*flags("--checkpointing_steps", 2, "--export", "exported/lora.safetensors", "--validation_steps", 3))
        assert status == 0, err
        assert run("--infer", "--num_images", 1, "--num_inference_steps", 1)[0] == 0
    finally:
        os.umask(earlier)
    written = [path for name in ("output", "exported", "images", "class_images") for path in (tmp_path / name, *(tmp_path / name).rglob("*"))]
    wrong = {str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in written
             if stat.S_IMODE(path.stat().st_mode) & ~stat.S_ISGID != (0o777 if path.is_dir() else 0o666) & ~mask}
    assert not wrong and sum(path.suffix == ".safetensors" for path in written) == 4


def test_whole_models_and_embeddings_can_be_read_by_others(flags, run, tmp_path):
    earlier = os.umask(0o022)
    try:
        base = flags()[:-4]  # without method and rank
        assert run(*base, "--method", "full", "--output_dir", "full", "--export", "full.safetensors")[0] == 0
        assert run(*base, "--method", "textual_inversion", "--identifier", "<sks>", "--output_dir", "word")[0] == 0
    finally:
        os.umask(earlier)
    weights = list(tmp_path.rglob("*.safetensors"))
    assert len(weights) >= 5 and {stat.S_IMODE(path.stat().st_mode) for path in weights} == {0o644}


def test_a_disk_without_permissions_will_do(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("")
    (tmp_path / "x").chmod(0o600)
    monkeypatch.setattr(Path, "chmod", failing(Path.chmod, errno.EPERM, 1, ""))
    db.share(tmp_path)


def powerless(*words, cwd):
    """Run the program as somebody whom permissions concern, who may be root."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
    if drop and not shutil.which("setpriv"):
        pytest.skip("setpriv is not there, and root may do anything")
    return subprocess.run([*drop, sys.executable, REPOSITORY / "dreambooth_implementation.py", *map(str, words)], cwd=cwd,
                          capture_output=True, text=True)


@pytest.mark.parametrize("closed, mode, flags_of_it", [
    ("closed", 0o000, ["--output_dir", "closed/output"]), ("closed", 0o555, ["--output_dir", "closed/output"]),
    ("closed", 0o000, ["--class_data_dir", "closed/deep/er"]), ("closed", 0o555, ["--export", "closed/x.safetensors"])])
def test_protected_folders_are_one_line(closed, mode, flags_of_it, photos, tmp_path):
    (tmp_path / closed).mkdir()
    (tmp_path / closed).chmod(mode)
    try:
        result = powerless("--train", "--instance_data_dir", photos, "--class_prompt", "a dog", *flags_of_it, cwd=tmp_path)
    finally:
        (tmp_path / closed).chmod(0o755)
    assert result.returncode == 2
    one_line(result.stderr, flags_of_it[0])


def test_an_output_in_a_folder_that_takes_no_other_is_one_line(photos, tmp_path):
    """The output itself may be written, but what it is made in lies beside it."""
    (tmp_path / "shared" / "output").mkdir(parents=True)
    (tmp_path / "shared").chmod(0o555)
    try:
        result = powerless("--train", "--instance_data_dir", photos, "--class_prompt", "a dog", "--output_dir", "shared/output", cwd=tmp_path)
    finally:
        (tmp_path / "shared").chmod(0o755)
    assert result.returncode == 2
    one_line(result.stderr, "--output_dir", "shared is write-protected")


# ---- names and places


def parsed(*words):
    mode = {"export": [], "concepts": ["--train"], **dict.fromkeys(("model_path", "adapter", "image_dir"), ["--infer"]),
            "eval_dir": ["--evaluate"]}.get(words[0].split("=")[0].removeprefix("--"), ["--train"])
    return db.parse_settings([*mode, *words])


@pytest.mark.parametrize("flag", db.PATH_FLAGS)
def test_every_path_is_one_that_can_be(flag, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PHOTOS", str(tmp_path / "my photos"))
    for text, path in (("~/dog", tmp_path / "dog"), ("$HOME/dog", tmp_path / "dog"), ("${PHOTOS}/x", tmp_path / "my photos" / "x"),
                       ("~", tmp_path), ("a~b/$-", "a~b/$-"), ("dog", "dog")):
        value = getattr(parsed(f"--{flag}={text}"), flag)
        assert value == (str(path) if not isinstance(value, list) else [str(path)])
    for text, said in (("y" * 300, "too long"), ("a/" * 2500 + "b", "too long"), ("\u4e00" * 100, "too long"), ("a\0b", "no file"), ("", "empty"),
                       ("  ", "empty"), ("\ud800", "no file"), ("$NOBODY_SETS_THIS/dog", "$NOBODY_SETS_THIS is not known")):
        with pytest.raises(db.UserError, match=re.escape(f"--{flag} ")) as problem:
            parsed(f"--{flag}={text}")
        assert said in str(problem.value) and len(str(problem.value)) < 400


def test_a_folder_that_is_named_like_a_variable_is_that_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$HOME").mkdir()
    (tmp_path / "$NOBODY").mkdir()
    assert [db.given_path(name, "--x") for name in ("$HOME", "$NOBODY")] == ["$HOME", "$NOBODY"]


def test_without_a_home_no_folder_is_named_by_its_sign(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(db.UserError, match="--output_dir '~/dog': ~ is not known here"):
        parsed("--output_dir=~/dog")


def test_signs_in_a_file_of_concepts_mean_what_they_mean_in_flags(tmp_path, monkeypatch, photos):
    monkeypatch.setenv("HOME", str(tmp_path))
    entry = {"name": "rex", "instance_data_dir": "~/photos", "class_prompt": "a dog", "class_data_dir": "$HOME/dogs"}
    (tmp_path / "c.json").write_text(json.dumps([entry]))
    concept, = db.read_concepts(parsed(f"--concepts={tmp_path / 'c.json'}"), True, True)
    assert len(concept.photos) == 3 and (concept.instance_data_dir, concept.class_data_dir) == (str(photos), str(tmp_path / "dogs"))
    for key, value, said in (("instance_data_dir", "y" * 300, "too long"), ("class_data_dir", "a\0b", "no file"), ("name", "y" * 200, "120 at most"),
                             ("class_prompt", "a \ud800 dog", "not UTF-8")):
        (tmp_path / "c.json").write_text(json.dumps([entry | {key: value}]))
        with pytest.raises(db.UserError, match=said):
            db.read_concept_file(tmp_path / "c.json")


def test_a_home_in_quotes_makes_no_folder_of_that_name(flags, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run(*flags("--output_dir", "~/dog", "--class_data_dir", "~/dogs"))[0] == 0
    assert (tmp_path / "home" / "dog" / "dreambooth.json").is_file() and (tmp_path / "home" / "dogs").is_dir()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("typed, meant", [("\u4e00 dog".encode(), "\u4e00 dog"), ("H\u00fcndchen".encode("latin-1"), None)])
def test_texts_in_another_encoding(typed, meant, monkeypatch):
    """UTF-8 where Python expects ASCII is read as it was meant; anything else is one line."""
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    text = typed.decode("ascii", "surrogateescape")
    if meant:
        assert db.given_text(text, "--prompt") == meant
        return
    with pytest.raises(db.UserError, match="--prompt .*not UTF-8"):
        db.given_text(text, "--prompt")


@pytest.mark.parametrize("flag, letters", [("--output_dir", 250), ("--export", 255)])
def test_names_that_leave_no_room_are_one_line(flag, letters, flags, run, tmp_path):
    name = "y" * letters if flag == "--output_dir" else "y" * (letters - 12) + ".safetensors"
    status, _, err = run(*flags(flag, name))
    assert status == 2 and not list(tmp_path.glob("y*"))
    one_line(err, flag, "too long")


def test_the_longest_names_do(flags, run, tmp_path):
    name = "y" * 239
    assert run(*flags("--output_dir", name, "--export", "z" * 229 + ".safetensors"))[0] == 0
    assert run(*flags("--output_dir", name, "--export", "z" * 229 + ".safetensors", "--overwrite"))[0] == 0
    assert (tmp_path / name / "dreambooth.json").is_file() and (tmp_path / ("z" * 229 + ".safetensors")).is_file()


def test_folders_whose_names_are_not_utf8(flags, run, tmp_path, photos):
    """For photos and pictures; weights in one could be written, but not read again."""
    odd = os.fsdecode(b"H\xfcndchen")
    photos.rename(tmp_path / odd)
    words = ["--train", "--model_name", flags()[2], "--instance_data_dir", odd, *LORA, "--class_data_dir", f"class-{odd}"]
    status, _, err = run(*words, "--output_dir", f"out-{odd}")
    assert status == 2
    one_line(err, "--output_dir out-H\\udcfcndchen", "UTF-8")
    status, _, err = run(*words)
    assert status == 0, err
    status, out, err = run("--infer", "--num_images", 1, "--num_inference_steps", 1, "--image_dir", odd)
    assert status == 0 and len(list((tmp_path / odd).glob("a-sks-dog*.png"))) == 1, err


def test_pictures_of_a_model_in_such_a_folder_say_so(tmp_path):
    path = db.save_picture(tmp_path, "x", picture(0), "a dog\nModel: H\udcfcndchen")
    assert db.png_parameters(path) == "a dog\nModel: H\\udcfcndchen" and db.save_picture(tmp_path, "x", picture(0), "a dog\nModel: H\udcfcndchen") == path


@pytest.mark.parametrize("output, photos_at, class_at, said", [
    ("work", "work/photos", "class_images", "instance_data_dir"), ("work", "photos", "work/class", "class_data_dir"),
    ("work", "photos", "work", "class_data_dir"), ("work", "photos", "work.partial/class", "class_data_dir"),
    ("work", "photos", "work/../work/class", "class_data_dir")])
def test_what_is_read_may_not_lie_in_what_is_renamed(output, photos_at, class_at, said, run, tmp_path, photos):
    place = tmp_path / photos_at
    if place != photos:
        place.parent.mkdir()
        photos.rename(place)
        (tmp_path / output / "dreambooth.json").write_text("{}")
    status, _, err = run("--train", "--instance_data_dir", photos_at, "--class_data_dir", class_at, "--class_prompt", "a dog", "--output_dir", output)
    assert status == 2 and len(list(place.iterdir())) == 3
    one_line(err, "--output_dir work", said)


def test_a_file_of_concepts_may_not_lie_there_either(run, tmp_path, photos):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "dreambooth.json").write_text("{}")
    (tmp_path / "output" / "c.json").write_text(json.dumps([{"name": "rex", "instance_data_dir": str(photos), "class_prompt": "a dog"}]))
    status, _, err = run("--train", "--concepts", "output/c.json", "--overwrite")
    assert status == 2 and (tmp_path / "output" / "c.json").exists()
    one_line(err, "concepts output/c.json lies in output")


def test_an_output_may_lie_in_the_photos(flags, run, photos):
    assert run(*flags("--output_dir", photos / "output", "--class_data_dir", photos / "class"))[0] == 0
    status, out, _ = run(*flags("--output_dir", photos / "output", "--class_data_dir", photos / "class"))
    assert status == 0 and (photos / "output-1").is_dir() and len(list(photos.glob("*.png"))) == 3


@pytest.mark.parametrize("output", ["..", "/", ".", "../..", "a-link"])
def test_places_that_cannot_be_renamed_are_one_line(output, photos, tmp_path, monkeypatch, run):
    (tmp_path / "in" / "side").mkdir(parents=True)
    for folder in ("", "in", "in/side"):
        (tmp_path / folder / "dreambooth.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "in" / "side")
    Path("a-link").symlink_to("..")
    status, _, err = run("--train", "--instance_data_dir", photos, "--class_prompt", "a dog", "--output_dir", output)
    assert status == 2
    one_line(err, f"--output_dir {output}")


def test_what_lies_where_a_training_would_be_made_is_not_deleted(flags, run, tmp_path):
    (tmp_path / "output.partial").mkdir()
    (tmp_path / "output.partial" / "thesis.txt").write_text("years of work")
    status, _, err = run(*flags())
    assert status == 2 and (tmp_path / "output.partial" / "thesis.txt").exists()
    one_line(err, "output.partial", "holds something else")


def test_a_working_folder_that_is_gone_is_one_line(run, tmp_path, photos):
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    status, _, err = run("--train", "--instance_data_dir", photos)
    os.chdir(tmp_path)
    assert status == 2
    one_line(err, "the folder that this was started in is gone")


def test_a_clock_that_goes_backwards(flags, run, monkeypatch, tmp_path):
    now = [2e9]

    def earlier():
        now[0] -= 3600
        return now[0]
    monkeypatch.setattr(time, "time", earlier)
    status, out, err = run(*flags("--checkpointing_steps", 1))
    assert status == 0 and "-" not in re.search(r"Trained in (\S+) s", out)[1], err


def test_a_machine_without_a_home_or_a_place_for_temporary_files(flags, tmp_path):
    before = ("import tempfile; tempfile.tempdir = None; os.environ.pop('HOME', None); os.environ.update(TMPDIR='/nonexistent', "
              "HF_HOME='/proc/x', XDG_CACHE_HOME='/proc/x')")
    process = start(tmp_path, flags("--steps", 1), before)
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "log.txt").read_text()


# ---- a second command in one Python, as in a notebook


def test_a_second_training_with_another_precision(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [str(word) for word in flags("--overwrite")]
    for precision in ("no", "bf16", "no"):
        assert db.main([*words, "--mixed_precision", precision]) == 0, capsys.readouterr().err
        assert json.loads((tmp_path / "output" / "dreambooth.json").read_text())["used"]["precision"] == precision
    assert db.main([*words, "--gradient_accumulation_steps", "2"]) == 0


def test_what_is_said_once_is_said_by_each_command(run, photos):
    (photos / "0.png").unlink()
    picture(1).save(photos / "0.gif", save_all=True, append_images=[picture(2)])
    for _ in range(2):
        assert "2 frames" in run("--train", "--instance_data_dir", photos, "--class_prompt", "a dog", "--model_name", "no such model")[1]


def test_help_ends_no_notebook(capsys):
    assert db.main(["--help"]) == 0 and "--train" in capsys.readouterr().out


class Notebook(io.StringIO):
    """A stream as notebooks have it: no file, no terminal, nothing to configure."""

    isatty = fileno = reconfigure = property(lambda self: (_ for _ in ()).throw(AttributeError("not here")))


def test_streams_of_a_notebook(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", out := Notebook())
    monkeypatch.setattr(sys, "stderr", err := Notebook())
    assert db.main([str(word) for word in flags()]) == 0
    assert "Trained in" in out.getvalue() and "training: 3 of 3 steps" in err.getvalue()


# ---- packages


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """broken(name, code) -> what importing a package with that code raises."""
    def make(name, code, importer=None):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path / "packages")
        with pytest.raises(Exception) as problem:
            (importer or __import__)(name)
        return problem.value
    yield make
    for name in [name for name in sys.modules if name.startswith("broken_")]:
        del sys.modules[name]


@pytest.mark.parametrize("code, said", [
    ("raise OSError('libcudart.so.11: cannot open shared object file')", "OSError: libcudart"), ("1 / 0", "ZeroDivisionError"),
    ("import nobody_has_this.sub", "No module named 'nobody_has_this'"), ("raise RuntimeError('compiled for torch 1.13')", "torch 1.13"),
    ("def f():\n raise AttributeError('ops')\nf()", "AttributeError: ops")])
def test_a_broken_package_is_named(code, said, broken):
    line = db.mishap(broken("broken_xformers", code))
    assert "the package broken_xformers is installed and cannot be imported" in line and said in line and "pip uninstall broken_xformers" in line


def test_a_broken_package_behind_another(broken):
    def lazily(name):
        try:
            __import__(name)
        except Exception as problem:
            raise RuntimeError("Failed to import diffusers.models because of the following error") from problem
    assert "the package broken_bits is installed" in db.mishap(broken("broken_bits", "import ctypes; ctypes.CDLL('libnone.so')", lazily))


def test_a_missing_package_is_named():
    with pytest.raises(ModuleNotFoundError) as problem:
        import nobody_has_this  # noqa: F401
    assert db.mishap(problem.value).startswith("the package nobody_has_this is missing: pip install -r")


@pytest.mark.parametrize("problem, said", [
    (MemoryError(), "the memory is full"), (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "memory is full"),
    (RuntimeError("CUDA error: an illegal memory access was encountered\nmore"), "the GPU failed (CUDA error: an illegal memory access"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "the GPU's memory is full"),
    (PermissionError(13, "Permission denied", "x.png"), "x.png: permission denied"),
    (FileNotFoundError(2, "No such file or directory", b"H\xfc"), "No such file or directory"),
    (OSError("cannot write mode F"), "cannot write mode F"), (ImportError("Found an incompatible version of torchao"), "incompatible version of torchao"),
    (KeyError("x"), None), (AssertionError(), None)])
def test_mishaps(problem, said):
    line = db.mishap(problem)
    assert line is None if said is None else said in line and "\n" not in line


def test_an_optimizers_broken_package_is_said_at_once(flags, run, monkeypatch, broken):
    broken("broken_ao", "1 / 0")
    monkeypatch.setitem(db.OPTIMIZERS, "adamw8bit", db.dataclasses.replace(db.OPTIMIZERS["adamw8bit"], package="broken_ao"))
    monkeypatch.setattr(db, "load_models", lambda *args: pytest.fail("loaded"))
    status, _, err = run(*flags("--optimizer", "adamw8bit"))
    assert status == 2
    one_line(err, "--optimizer adamw8bit", "broken_ao", "cannot be imported")


def test_without_tensorboard_a_training_has_no_logs(flags, run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, out, err = run(*flags("--validation_steps", 2))
    assert status == 0 and out.count("no more logs for TensorBoard") == 1, err
    assert not (tmp_path / "output" / "logs").exists() and (tmp_path / "output" / "samples" / "timeline.png").exists()


@pytest.mark.parametrize("package", ["xformers", "bitsandbytes"])
def test_packages_that_diffusers_takes_up_by_itself(package, flags, tmp_path):
    """Installed and broken, as after an update of torch: one line that names it, or none is needed."""
    (tmp_path / "packages" / package).mkdir(parents=True)
    (tmp_path / "packages" / package / "__init__.py").write_text("raise OSError('libcudart.so.11.0: cannot open shared object file')")
    (tmp_path / "packages" / f"{package}-0.0.29.dist-info").mkdir()
    (tmp_path / "packages" / f"{package}-0.0.29.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.29\n")
    result = subprocess.run([sys.executable, REPOSITORY / "dreambooth_implementation.py", *map(str, flags("--steps", 1))], cwd=tmp_path,
                            env=os.environ | {"PYTHONPATH": str(tmp_path / "packages")}, capture_output=True, text=True)
    assert result.returncode in (0, 2) and "Traceback" not in result.stderr, result.stderr[-3000:]
    if result.returncode:
        one_line(result.stderr, package, "libcudart")


def test_a_model_whose_parts_contradict_each_other_is_one_line(run, tiny_model, tmp_path):
    """Such as a number in its scheduler's config that is another program's; only drawing finds it."""
    model = shutil.copytree(tiny_model("sd1"), tmp_path / "model")
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"skip_prk_steps": False, "num_train_timesteps": 3}))
    status, _, err = run("--infer", "--model_path", model, "--prompt", "a dog", "--num_images", 1, "--num_inference_steps", 1)
    assert status == 2
    one_line(err, "model")


def test_what_a_machine_lacks_is_no_fault_of_the_model():
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    full.name_or_path = "model"
    with pytest.raises(OSError):
        db.called(full)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model):
    """(flags of a training, its checkpoint), made once."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "photos").mkdir()
    picture(0).save(folder / "photos" / "0.png")
    words = ["--train", "--model_name", str(tiny_model("sd1")), "--instance_data_dir", str(folder / "photos"), *LORA, "--class_data_dir",
             str(folder / "class"), "--checkpointing_steps", "2"]
    assert db.main([*words, "--output_dir", str(folder / "output")]) == 0
    return words, folder / "output" / "checkpoints" / "step-000002"


@pytest.mark.parametrize("change", [
    lambda state: state["history"][0].pop(), lambda state: state["history"].append("x"), lambda state: state["optimizer"][0].update(lr="x"),
    lambda state: state.update(optimizer_numbers=[]), lambda state: state["scores"].append({"step": 1}), lambda state: state.update(scaler=1),
    lambda state: state["origin"].clear(), lambda state: state.update(history=None)])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_checkpoints_state_is_checked(change, sealed, checkpoint, tmp_path):
    """By its digest, and where it has none, as earlier versions wrote it, by its form."""
    path = shutil.copytree(checkpoint[1], tmp_path / "step-000002")
    state = json.loads((path / db.STATE_FILE).read_text())
    change(state)
    if not sealed:
        del state["state_sha256"]
    (path / db.STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(db.UserError, match="damaged" if sealed or state["origin"] else "other settings"):
        db.check_origin(path, db.read_state(path), {"--seed": 0})


def test_a_checkpoint_of_other_tensors_is_one_line(checkpoint, run, tmp_path):
    from safetensors.torch import save_file

    path = shutil.copytree(checkpoint[1], tmp_path / "step-000002")
    state = json.loads((path / db.STATE_FILE).read_text())
    save_file({"x": torch.zeros(2)}, path / db.TENSORS_FILE)
    state["sha256"] = db.file_digest(path / db.TENSORS_FILE)
    del state["state_sha256"]
    (path / db.STATE_FILE).write_text(json.dumps(state))
    status, _, err = run(*checkpoint[0], "--resume", path)
    assert status == 2 and not list(tmp_path.glob("output*"))
    one_line(err, "step-000002", "another version")


# ---- --snr_gamma 0


def test_a_gamma_of_nought_is_off():
    from diffusers import DDPMScheduler

    generator = torch.Generator().manual_seed(0)
    batch = {"latents": torch.randn(2, 4, 8, 8, generator=generator), "noise": torch.randn(2, 4, 8, 8, generator=generator),
             "levels": torch.tensor([10, 900]), "weight": torch.ones(2)}
    off, nought, five = (db.denoising_loss(db.Diffusion(DDPMScheduler(), gamma), batch, lambda noisy, batch: noisy * 0.5)[1] for gamma in (None, 0.0, 5.0))
    assert torch.equal(off, nought) and (nought > 0).all() and not torch.equal(off, five)


def test_a_training_with_a_gamma_of_nought_learns(flags, run, tmp_path):
    for name, more in {"off": [], "nought": ["--snr_gamma", 0]}.items():
        status, out, _ = run(*flags("--output_dir", name, "--learning_rate", 1e-2, *more))
        assert status == 0 and "instance 0.0000" not in out
    off, nought = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("off", "nought"))
    assert all(torch.equal(off[key], nought[key]) for key in off) and any(nought[key].abs().max() > 0 for key in off if "lora_B" in key)
