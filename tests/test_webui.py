"""The page: its commands without a browser, and the page itself in one, where gradio, playwright and Chromium are there."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time

import psutil
import pytest
from conftest import REPOSITORY
from PIL import Image

import dreambooth_implementation as db
import webui

PATIENCE = 600_000  # milliseconds, for a machine that has much else to do


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A fresh Job, in an empty working folder; wait() returns its last state."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(webui, "JOB", webui.Job())
    yield webui.JOB
    webui.JOB.stop()


def wait(job, until=lambda: False):
    """The state of a job once it has ended, or once until() is true."""
    while job.state == "Running." and not until():
        time.sleep(0.1)
    return job.state


def test_a_page_without_photos_shows_the_programs_own_line(job):
    webui.train(None, "a dog", "full", False, None, "", None)
    assert wait(job).startswith("error: --instance_data_dir webui/photos: no images in this folder")
    assert [line for line in job.lines if "Traceback" in line] == []


def test_no_text_passes_for_a_flag(job, photos):
    webui.train([str(path) for path in photos.iterdir()], "--help", "full", False, None, "nowhere", None)
    assert "--model_name nowhere" in wait(job)  # "--help" was the class prompt, not a flag
    webui.draw("--train", "", 1, 0)
    assert "--model_path webui/output" in wait(job)


def test_one_job_at_a_time_and_stop(job, photos, tiny_model, tmp_path):
    webui.train([str(path) for path in photos.iterdir()], "a dog", "full", False, 10**6, str(tiny_model("sd1")), 2)
    with pytest.raises(db.UserError, match="at work already"):
        webui.train(None, "a cat", "full", False, None, "", None)
    assert len(list((tmp_path / "webui" / "photos").iterdir())) == 3  # the second click did not touch the first's photos
    assert wait(job, lambda: any(line.startswith("training:") for line in job.lines)) == "Running."
    assert [path.name for path in job.pictures()] == ["photos.png"]
    assert sum(line.startswith("training:") for line in job.lines) == 1
    job.stop()
    assert wait(job).startswith("Stopped")
    assert not (tmp_path / "webui" / "output").exists() and db.checkpoints_in(tmp_path / "webui" / "output.partial")


def test_gradio_missing_is_one_line(tmp_path):
    script = (f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); sys.modules['gradio'] = None\n"
              f"import webui; sys.exit(webui.main([]))")
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: the page needs gradio: pip install -r requirements-webui.txt\n"


# ---- in a browser


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def served(tmp_path):
    """(address, process) of webui.py, started as a person would, in an empty working folder."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-webui.txt")
    address = None
    while not address:  # again if another program takes the port meanwhile
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        process = subprocess.Popen([sys.executable, REPOSITORY / "webui.py", "--port", str(port)], cwd=tmp_path, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   env={**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"})
        for line in process.stdout:
            address = re.search(r"http://127.0.0.1:\d+|$", line)[0]
            if address:
                break
        assert address or "in use already" in line
    yield address, process
    process.terminate()
    process.wait()


def test_train_and_draw_on_the_page(served, browser, photos, tiny_model, tmp_path):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(served[0])

    def fill(field, value):
        page.fill(f"#{field} input, #{field} textarea", str(value))

    def state(text):
        page.wait_for_function("text => document.querySelector('#state textarea')?.value.includes(text)", arg=text)

    page.click("#train button, button#train")  # nothing filled in: the program's one line
    state("error: --instance_data_dir webui/photos: no images")
    page.set_input_files("#photos input[type=file]", [str(path) for path in sorted(photos.iterdir())])
    page.wait_for_function("document.querySelector('#photos').innerText.includes('2.png')")
    fill("class_prompt", "a dog")
    page.get_by_text("Settings; empty means").click()
    for field, value in (("steps", 2), ("model", tiny_model("sd1")), ("class_images", 2)):
        fill(field, value)
    page.click("#train button, button#train")
    state("Running.")
    page.click("#train button, button#train")  # one at a time
    page.get_by_text("at work already").first.wait_for()
    state("Done.")
    assert 'Try next:' in page.input_value("#log textarea")
    page.wait_for_function("document.querySelectorAll('#pictures img').length >= 3")  # photos, samples, losses
    assert (tmp_path / "webui" / "output" / "dreambooth.json").exists()

    fill("prompt", "a [identifier] dog in the snow")
    fill("count", 2)
    page.click("#draw button, button#draw")
    state("Running.")
    page.reload()  # a reload does not lose the job
    state("Done.")
    page.wait_for_function("document.querySelectorAll('#pictures img').length >= 3")  # two and their grid
    drawn = sorted((tmp_path / "webui" / "images").glob("a-*-dog-in-the-snow-*.png"))
    assert len(drawn) == 2 and all(Image.open(path).size == (32, 32) for path in drawn)

    fill("count", 10**6)  # ending the page ends its job
    page.click("#draw button, button#draw")
    state("Running.")
    page.wait_for_function("document.querySelector('#log textarea').value.includes('drawing:')")
    jobs = psutil.Process(served[1].pid).children(recursive=True)
    assert jobs
    served[1].terminate()
    served[1].wait()
    _, at_work = psutil.wait_procs(jobs, timeout=PATIENCE / 1000)
    assert not at_work


def test_the_page_answers_this_machine_alone(served):
    port = int(served[0].rsplit(":", 1)[1])
    socket.create_connection(("127.0.0.1", port), timeout=60).close()
    own = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in own | {"127.0.0.2"}:  # on Linux this one is always there
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=2)
