"""The page's jobs: commands that run beside it, are stopped and gone on with, and are found again by a page that is new."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from conftest import REPOSITORY

from webui.jobs import Job, identity
from webui.line import Line, next_jobs
from webui.logs import AGAIN, Logs
from webui.places import Library
from webui.runner import start_runner

pytest_plugins = ["webui_pages"]  # library, page, trained
# A runner whose program is Python with the job's flags.
RUNNER = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import webui.runner
webui.runner.command = lambda flags: [sys.executable, *flags]
sys.exit(webui.runner.run(sys.argv[1]))
"""
LASTING = """
import signal, sys, time
def stop(number, frame):
    print("a checkpoint is written", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("begun", flush=True)
time.sleep(600)
"""


@pytest.fixture
def job(tmp_path):
    """job(*flags, kind="draw") -> a Job that waits."""
    def make(*flags, kind="draw", name="one", **more):
        return Job.make(tmp_path / name, kind, list(flags), **more)

    return make


@pytest.fixture
def begin():
    """begin(job) starts a runner, which ends with the test at the latest."""
    runners = []

    def start(job):
        runners.append(subprocess.Popen([sys.executable, "-c", RUNNER, str(job.folder)], start_new_session=True))
        job.write("process.json", [identity(runners[-1].pid)])
        return runners[-1]

    yield start
    for runner in runners:
        for process in [*psutil.Process(runner.pid).children(recursive=True)] if runner.poll() is None else []:
            process.kill()
        runner.kill()
        runner.wait()


def until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    assert true()


def says(job, text):
    return lambda: job.log.exists() and text in job.log.read_text()


# ---- how a job stands


def test_a_job_that_ends(job, begin):
    for flags, status, state in ((["-c", "print('\\u4e00')"], 0, "done"), (["-c", "raise SystemExit(2)"], 2, "failed")):
        one = job(*flags, name=state)
        assert one.state() == "waiting"
        begin(one).wait()
        assert (one.state(), one.status) == (state, status)
    assert job(name="three").state() == "waiting"


def test_a_job_is_stopped_as_by_ctrl_c_and_gone_on_with(job, begin):
    one = job("-c", LASTING)
    runner = begin(one)
    until(says(one, "begun"))
    assert one.state() == "running"
    one.stop()
    runner.wait()
    assert (one.state(), one.status) == ("stopped", 143) and "a checkpoint is written" in one.log.read_text()
    one.again(["-c", "print('goes on')"])
    assert one.state() == "waiting"
    begin(one).wait()
    assert one.state() == "done" and AGAIN in one.log.read_text() and one.log.read_text().endswith("goes on\n")


def test_a_job_that_will_not_stop_is_asked_once_more(job, begin):
    stubborn = LASTING.replace("sys.exit(143)", "signal.signal(signal.SIGTERM, signal.SIG_DFL)")
    one = job("-c", stubborn)
    runner = begin(one)
    until(says(one, "begun"))
    one.stop()
    until(says(one, "a checkpoint is written"))
    assert one.state() == "stopping"
    one.stop()
    runner.wait()
    assert one.state() == "stopped"


def test_a_job_whose_runner_was_killed_runs_and_can_be_stopped(job, begin):
    one = job("-c", LASTING)
    runner = begin(one)
    until(says(one, "begun"))
    until(lambda: len(one.read("process.json", list)) == 2)
    program = psutil.Process(one.read("process.json", list)[1][0])
    runner.kill()
    runner.wait()
    assert one.state() == "running"
    one.stop()
    psutil.wait_procs([program], timeout=120)
    assert one.state() == "lost"  # how it ended nobody noted


def test_a_job_that_waits_is_taken_out(job):
    one = job()
    one.stop()
    assert one.state() == "stopped"


def test_no_runner_begins_a_job_that_another_has(job, begin):
    one = job("-c", LASTING)
    begin(one)
    until(says(one, "begun"))
    one.write("exit", 0)
    before = one.log.read_text()
    with one.lock.acquire(timeout=0) if not one.is_locked() else open(os.devnull):
        pass
    assert one.is_locked() and one.log.read_text() == before


def test_a_number_that_another_process_has_now_is_not_the_job(job):
    one = job()
    one.write("process.json", [[os.getpid(), psutil.Process().create_time() - 3600]])
    assert one.state() == "lost"
    one.write("process.json", [identity(os.getpid())])
    assert one.state() == "running"


def test_a_job_outlives_the_page_and_a_signal_to_its_terminal(tmp_path, job):
    """start_runner() with the program itself, which refuses the model in its own words."""
    photos = REPOSITORY / "instance_images"
    one = job("--train", "--model_name=\u4e0d/\u5728", "--class_prompt=a dog", f"--instance_data_dir={photos}")
    runner = start_runner(one)
    assert os.getsid(runner.pid) == runner.pid
    assert runner.wait(300) == 2 and one.state() == "failed"
    assert Logs().report(one.log).error.startswith("--model_name \u4e0d/\u5728")


# ---- the line


def standing(*entries):
    """{job: state} of stand-ins: (name, kind, state) each, in the order in which they were made; "name!" need not wait."""
    class Standing:
        def __init__(self, number, name, kind):
            self.name, self.command = name.rstrip("!"), {"kind": kind, "made": number}
            self.folder = self
            self.beside = name.endswith("!")

        def __truediv__(self, name):
            return self

        def exists(self):
            return self.beside

    return {Standing(number, name, kind): state for number, (name, kind, state) in enumerate(entries)}


@pytest.mark.parametrize("entries, begins", [
    ([], []), ([("a", "train", "waiting"), ("b", "train", "waiting")], ["a"]),
    ([("a", "train", "running"), ("b", "train", "waiting"), ("c", "draw", "waiting")], []),
    ([("a", "train", "stopping"), ("b!", "train", "waiting")], []),
    ([("a", "train", "done"), ("b", "train", "waiting"), ("c", "draw", "waiting")], ["c"]),
    ([("a", "train", "running"), ("b", "draw", "waiting"), ("c!", "draw", "waiting")], ["c"]),
    ([("a", "train", "running"), ("b", "draw", "running"), ("c!", "draw", "waiting")], []),
    ([("a", "draw", "running"), ("b", "train", "waiting")], []),
    ([("a", "train", "lost"), ("b", "train", "failed"), ("c", "train", "stopped")], [])])
def test_which_job_is_next(entries, begins):
    assert [job.name for job in next_jobs(standing(*entries))] == begins


def test_a_page_that_is_started_again_finds_everything_as_it_was(library, trained, monkeypatch):
    trained("done")
    running = Job.make(library.trained / "running" / "job", "train", ["--train"], title="running")
    running.write("process.json", [identity(os.getpid())])
    Job.make(library.trained / "next" / "job", "train", ["--train"], title="next")
    broken = library.trained / "broken" / "job"
    broken.mkdir(parents=True)
    (broken / "command.json").write_text('["no command"]')
    (library.compared / "broken" / "evaluation").mkdir(parents=True)
    (library.compared / "broken" / "evaluation" / "evaluation.json").write_text('{"models": [3]}')
    again, started = Library("library"), []
    assert {job.command["title"]: job.state() for job in again.jobs().values()} == {
        "done": "done", "next": "waiting", "running": "running"}
    monkeypatch.setattr("webui.line.start_runner", lambda job: started.append(job.command["title"]) or subprocess.Popen(["true"]))
    line = Line(again)
    line.step()
    assert started == []
    running.write("exit", 0)
    line.step()
    assert started == ["next"]


def test_stop_and_go_on_over_http(page, trained, library):
    job = Job.make(library.trained / "dog" / "job", "train", ["--train"], title="dog", uses=["dog"])
    id = "trained/dog/job"
    job.write("process.json", [identity(os.getpid())])
    assert page.act("resume", job=id)[1] == "in_use" and page.act("stop", job="nothing")[1] == "gone"
    assert page.act("delete_item", item="dog", confirmed="dog")[1] == "in_use"
    page.act("stop", job=id)
    assert page.get("/api/state")["jobs"][0]["state"] == "stopping"
    job.log.write_text("error: terminated\n")
    job.write("exit", 143)
    assert page.get("/api/state")["jobs"][0]["can_resume"]
    page.act("resume", job=id)
    assert job.state() == "waiting" and job.command["flags"] == ["--train", "--resume"]
    job.write("exit", 143)
    page.act("resume", job=id)
    assert job.command["flags"] == ["--train", "--resume"]


# ---- what a log says


BAR = "training:  25%|##5       | {done}/40 [00:04<00:12,  2.39step/s, instance={loss}, prior=0.0877, lr=1.0e-03]"


def test_progress_and_losses_are_read_on(tmp_path):
    log, logs = tmp_path / "log.txt", Logs()
    assert logs.report(log).lines == []
    with open(log, "wb") as file:
        def write(text):
            file.write(text.encode())
            file.flush()
        write("Machine: CPU\nmodel.safetensors:  42%|####2     | 1.4G/3.44G [00:10<00:14, 140MB/s]\r")
        assert logs.report(log).bar == {"title": "model.safetensors", "done": 42, "total": 100, "left": None}
        write("\rencoding:  50%|5 | 1/2 [00:00<00:01, 1.0image/s]")
        assert logs.report(log).bar == {"title": "encoding", "done": 1, "total": 2, "left": 1}
        half = BAR.format(done=20, loss="0.05")
        write("\r".join(["", BAR.format(done=10, loss="0.0822"), BAR.format(done=11, loss="0.0822"), half[:70]]))
        report = logs.report(log)
        assert report.training == {"title": "training", "done": 11, "total": 40, "left": 12}
        assert report.losses == [[10, 0.0822, 0.0877]]
        write(half[70:] + "\nsamples of step 20:   8%|7 | 1/12 [00:34<06:16, 34.20s/image]\x1b[A\n\u4e00")
        report = logs.report(log)
        assert report.losses[-1] == [20, 0.05, 0.0877] and report.bar["title"] == "samples of step 20"
        write("\u4e01\nerror: no room\n")
        assert (logs.report(log).error, logs.report(log).lines) == ("no room", ["Machine: CPU", "\u4e00\u4e01", "error: no room"])
        write(f"{AGAIN}\n" + BAR.format(done=15, loss="0.06").replace("00:12", "?") + "\n")
        report = logs.report(log)
        assert report.error == "" and report.losses == [[10, 0.0822, 0.0877], [15, 0.06, 0.0877]]
        assert report.training["left"] is None  # the steps of the run before have no pace
    assert Logs().report(log).losses == report.losses  # a new page reads the same
    log.write_text("anew\n")
    assert logs.report(log).lines == ["anew"]


def test_a_job_is_shown_with_losses_samples_and_log(page, trained, library):
    place = trained("dog")
    (place / "job" / "log.txt").write_text(BAR.format(done=10, loss="0.08") + "\n" + BAR.format(done=20, loss="0.07") + "\nDone.\n")
    (place / "output" / "samples" / "step-000020").mkdir()
    (place / "output" / "samples" / "a-sks-dog-on-the-moon-0.png").rename(place / "output" / "samples" / "step-000020" / "0.png")
    job = page.get("/api/job", id="trained/dog/job")
    assert job["losses"] == [[10, 0.08, 0.0877], [20, 0.07, 0.0877]] and job["lines"] == ["Done."]
    assert [(row["step"], len(row["pictures"])) for row in job["samples"]] == [(20, 1)]
    assert page.request("GET", job["samples"][0]["pictures"][0])[0] == 200
    assert page.get("/api/job", id="trained/../x") == (404, "gone")
    assert json.dumps(page.get("/api/state"))
