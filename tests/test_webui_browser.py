"""The page in a browser, where playwright and Chromium are there: train, draw, stop, go on, start again, in two languages."""

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import REPOSITORY, picture

PATIENCE = 600_000  # milliseconds, for a machine that has much else to do


# (a job, as the server tells of it, what the page says of how far it is)
HALF, FULL = ({"title": "training", "done": done, "total": 6, "left": 3 * (6 - done)} for done in (3, 6))
PROGRESS = [({"state": "running", "bar": {}}, "preparing ..."), ({"state": "running", "bar": HALF}, "step 3/6 \u00b7 0:09 left"),
            ({"state": "running", "bar": FULL}, "step 6/6 \u00b7 still at work ..."),  # samples follow, or a comparison is measured
            ({"state": "stopping", "bar": HALF, "training": HALF},
             "step 3 of 6 \u00b7 finishing its step, writing a checkpoint ..."),
            ({"state": "stopping", "bar": {**HALF, "title": "drawing"}, "training": {}}, "stopping ...")]


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
def serve(tmp_path):
    """serve() -> (address, process) of webui.py, started as a person would, in an empty working folder; always the same port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port, started = probe.getsockname()[1], []

    def start():
        command = [sys.executable, REPOSITORY / "webui.py", "--port", str(port)]
        started.append(subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        env={**os.environ, "HF_HUB_OFFLINE": "1"}))
        line = started[-1].stdout.readline()
        assert re.search(r"http://127.0.0.1:\d+", line), line
        return f"http://127.0.0.1:{port}/", started[-1]

    yield start
    for process in started:
        process.terminate()
        process.wait()


def opened(browser, address, **options):
    context = browser.new_context(bypass_csp=True, **options)  # playwright evaluates what it waits for, which the page forbids
    page, problems = context.new_page(), []
    page.set_default_timeout(PATIENCE)
    page.on("pageerror", lambda problem: problems.append(str(problem)))
    page.goto(address)
    page.wait_for_selector("body[data-ready=yes]")
    return page, problems


@pytest.mark.slow
def test_train_draw_stop_and_start_again(serve, browser, tiny_model, tmp_path):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    address, server = serve()
    page, problems = opened(browser, address)
    page.set_input_files("#photo_files", [tmp_path / f"{number}.png" for number in range(3)])
    page.wait_for_function("document.querySelectorAll('#photos figure').length == 3")
    page.wait_for_function("document.activeElement.name == 'class_prompt'")  # which can be typed at once
    page.click("#train_button")
    page.wait_for_function("document.querySelector('#said').textContent.startsWith('Say what kind of thing it is')")

    def fill(**fields):
        for name, value in fields.items():
            page.fill(f"#train_form [name={name}]", str(value))

    for job, text in PROGRESS:
        assert page.evaluate("job => import('/static/jobs.js').then(jobs => jobs.progressText(job))", job) == text

    page.click("#train_form summary")
    fill(class_prompt="a dog", model_name=tiny_model("sd1"), steps=2, num_class_images=2, title="Rex")
    page.click("#train_button")
    page.wait_for_selector("#job_row .badge.done")
    page.click("[data-action=draw_with_it]")  # the second click after the photos
    page.fill("#draw_form [name=num_images]", "2")
    page.click("#draw_button")
    page.wait_for_function("document.querySelectorAll('#gallery img').length == 2")
    assert "Rex" in page.inner_text("#gallery button >> nth=0")  # which of them drew it
    page.click("#gallery button")
    page.click("#large [data-action=again_with_these]")
    assert page.input_value("#draw_form [name=prompt]").endswith("dog on the moon")

    page.goto(f"{address}#train")  # two more, of which the first would last for ever
    for name, steps in (("Long", 10**6), ("Next", 2)):
        fill(title=name, steps=steps, validation_steps="")
        page.click("#train_button")
        page.wait_for_function("location.hash.startsWith('#job')")
        page.goto(f"{address}#train")
    page.wait_for_function("document.querySelector('#jobs .progress_text')?.textContent.startsWith('step')")
    server.kill()
    server.wait()
    serve()
    page.reload()
    page.wait_for_selector("body[data-ready=yes]")
    assert page.input_value("#train_form [name=title]") == "" and page.input_value("#train_form [name=steps]") == "2"
    page.wait_for_selector("#jobs .job:has-text('Long') .badge.running")
    page.wait_for_selector("#jobs .job:has-text('Next') .badge.waiting")
    page.click("#jobs .job:has-text('Long') [data-action=stop]")
    page.wait_for_selector("#jobs .job:has-text('Long') .badge.stopped")
    page.wait_for_selector("#jobs .job:has-text('Next') .badge.done")
    page.click("#jobs .job:has-text('Long') [data-action=resume]")
    page.wait_for_selector("#jobs .job:has-text('Long') .badge.running")
    page.wait_for_function("document.querySelector('#jobs .progress_text')?.textContent.startsWith('step')")
    log = (tmp_path / "library" / "trained" / "long" / "job" / "log.txt").read_text()
    assert "Going on after step" in log
    page.click("#jobs .job:has-text('Long') [data-action=stop]")
    page.wait_for_selector("#jobs .job:has-text('Long') .badge.stopped")

    page.goto(f"{address}#library")
    page.click(".card:has-text('Next') [data-action=delete]")
    page.click("#ask_no")
    assert page.locator(".card").count() == 3
    page.click(".card:has-text('Next') [data-action=delete]")
    page.click("#ask_yes")
    page.wait_for_function("document.querySelectorAll('.card').length == 2")
    assert problems == []

    chinese, problems = opened(browser, f"{address}#library", locale="zh-CN", viewport={"width": 360, "height": 740})
    assert chinese.inner_text("nav a.here") == "\u4f5c\u54c1\u5e93"
    for tab in ("train", "library", "draw", "compare"):
        chinese.goto(f"{address}#{tab}")
        chinese.wait_for_selector(f"#view_{tab}:not([hidden])")
        assert chinese.evaluate("document.documentElement.scrollWidth") <= 360, tab  # nothing to scroll sideways
    assert problems == []
