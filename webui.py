#!/usr/bin/env python3
"""A page in the browser for dreambooth_implementation.py: drop photos, train, watch, draw.

    pip install -r requirements-webui.txt
    python webui.py

The page types the program's commands, one at a time, and shows what they print and draw. It keeps its files in ./webui and
answers this machine alone (127.0.0.1). Whoever can open it can start trainings: do not pass the port on.
"""

import argparse
import atexit
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from PIL import Image

import dreambooth_implementation as db

FOLDER = Path("webui")
PHOTOS, OUTPUT, IMAGES, CLASS_IMAGES = (FOLDER / name for name in ("photos", "output", "images", "class_images"))
PROGRESS_BAR = re.compile(r"^\w[\w ]*: +\d+%\|")  # as tqdm writes it
LINES = 200  # of the log that the page shows
PORTS = range(7860, 7960)  # that are tried where none is given
ENVIRONMENT = dict(os.environ)  # as it was given, proxies and all: what the program gets
GRADIO_KEPT = ("GRADIO_ANALYTICS_ENABLED", "GRADIO_ROOT_PATH", "GRADIO_TEMP_DIR")  # others could open the page to other machines


class Job:
    """The program at work, or after it: one process at a time, whose lines are read as they come."""

    def __init__(self):
        self.lock, self.process, self.lines, self.state, self.pictures_of = threading.Lock(), None, [], "Nothing yet.", None
        self.earlier = {}

    def start(self, flags, pictures_of):
        """Run the program with these flags; `pictures_of` lists the pictures that show how it goes. UserError if it runs."""
        with self.lock:
            if self.process and self.process.poll() is None:
                raise db.UserError("the program is at work already; wait for it, or stop it")
            self.lines, self.state, self.pictures_of, self.earlier = [], "Running.", pictures_of, {}
            self.earlier = self.pictures()
            self.process = subprocess.Popen(
                [sys.executable, db.__file__, *flags], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=job_environment(),
                stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", bufsize=1)
        threading.Thread(target=self.read, args=(self.process,), daemon=True).start()

    def read(self, process):
        """Keep the lines of `process` until it ends; a progress bar takes the place of its last state."""
        for line in process.stdout:  # text mode ends a line at "\r", too, as tqdm does
            line = line.rstrip()
            if self.lines and PROGRESS_BAR.match(line) and PROGRESS_BAR.match(self.lines[-1]):
                self.lines.pop()
            if line:
                self.lines.append(line)
        status = process.wait()
        errors = [line for line in self.lines if line.startswith("error: ")]
        self.state = "Done." if status == 0 else errors[-1] if errors else f"Stopped (exit status {status})."

    def stop(self):
        """Ask the program to end, which tidies up as after Ctrl-C; end it at once if it has not ended in a minute."""
        if self.process and self.process.poll() is None:
            self.process.terminate()  # a shell may have had it ignore Ctrl-C's signal
            timer = threading.Timer(60, self.process.terminate)
            timer.daemon = True
            timer.start()

    def pictures(self):
        """{path: when it was written} of the pictures to show, without those that were there before."""
        times = {}
        for path in self.pictures_of() if self.pictures_of else ():
            try:
                times[path] = path.stat().st_mtime_ns
            except OSError:  # the output was renamed just now
                pass
        return {path: time for path, time in times.items() if self.earlier.get(path) != time}


def job_environment():
    """The environment of the program: what it prints comes in UTF-8 on every system, with a bar that the page shows."""
    return ENVIRONMENT | {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace", "DREAMBOOTH_PROGRESS": "bar"}


JOB = Job()
atexit.register(JOB.stop)


def training_pictures():
    """The samples, the losses and the photos as the model sees them, of the output in the making or the finished one."""
    folders = [*FOLDER.glob(f"{OUTPUT.name}.partial"), OUTPUT]
    return [path for name in ("samples/grid*.png", "samples/timeline.png", db.LOSS_PLOT, db.PHOTO_SHEET) for folder in folders
            for path in sorted(folder.glob(name))]


def drawn_pictures():
    """The pictures drawn, after the grid of them all."""
    return sorted(IMAGES.glob("*.png"), key=lambda path: (not path.name.startswith("grid-"), path.name))


def train(photos, class_prompt, method, text_encoder, steps, model, class_images):
    """Start a training with what the page's fields hold; empty ones are left to the program."""
    if JOB.process is None or JOB.process.poll() is not None:
        shutil.rmtree(PHOTOS, ignore_errors=True)
        PHOTOS.mkdir(parents=True)
        for number, photo in enumerate(photos or []):
            shutil.copy(photo, PHOTOS / f"{number:02d}-{Path(photo).name}")
    values = {"class_prompt": class_prompt, "method": method, "steps": steps, "model_name": model,
              "num_class_images": class_images}
    # In one piece, so that no text can pass for a flag of its own.
    flags = [f"--{name}={value}" for name, value in values.items() if value not in (None, "")]
    flags += ["--train_text_encoder"] if text_encoder else []
    JOB.start(["--train", f"--instance_data_dir={PHOTOS}", f"--output_dir={OUTPUT}", f"--class_data_dir={CLASS_IMAGES}",
               *flags], training_pictures)


def draw(prompt, negative_prompt, count, seed):
    """Draw with the last training."""
    flags = [f"--model_path={OUTPUT}", f"--image_dir={IMAGES}", f"--num_images={count}", f"--seed={seed}",
             f"--negative_prompt={negative_prompt}", *([f"--prompt={prompt}"] if prompt else [])]
    JOB.start(["--infer", *flags], drawn_pictures)


def build_page():
    """The gradio page. Its clock shows the job to everybody who looks, after a reload as well."""
    import gradio as gr

    def answered(action):
        def act(*values):
            try:
                action(*values)
            except (db.UserError, OSError) as problem:
                raise gr.Error(str(problem)) from None
        return act

    def look(shown):
        found = JOB.pictures()
        key = [str(item) for item in found.items()]
        status = (JOB.state, "\n".join(JOB.lines[-LINES:]))
        if key == shown:
            return *status, gr.skip(), shown
        try:
            pictures = [(Image.open(path).copy(), path.stem) for path in found]
        except OSError:  # half written, or renamed just now: the next look sees it
            return *status, gr.skip(), shown
        return *status, pictures, key

    with gr.Blocks(title="DreamBooth", analytics_enabled=False) as page:
        gr.Markdown("# DreamBooth\nTeach a model your subject from 3-5 photos, then draw it anywhere.")
        with gr.Row():
            with gr.Column():
                photos = gr.File(label="Photos", file_count="multiple", file_types=["image"], elem_id="photos")
                class_prompt = gr.Textbox(label="What kind of thing is it?", placeholder="a dog", elem_id="class_prompt")
                with gr.Accordion("Settings; empty means the program's own choice", open=False):
                    method = gr.Dropdown(list(db.METHODS), value="full", label="Method")
                    text_encoder = gr.Checkbox(label="Train the text encoder as well", value=False)
                    steps = gr.Number(label="Steps", value=None, precision=0, elem_id="steps")
                    model = gr.Textbox(label="Model", placeholder=", ".join(db.SHORT_NAMES) + ", a folder, a hub id",
                                       elem_id="model")
                    class_images = gr.Number(label="Class images", value=None, precision=0, elem_id="class_images")
                gr.Button("Train", variant="primary", elem_id="train").click(
                    answered(train), [photos, class_prompt, method, text_encoder, steps, model, class_images])
                prompt = gr.Textbox(label="Prompt", placeholder="a [identifier] dog on the moon", elem_id="prompt")
                negative_prompt = gr.Textbox(label="Not in the picture")
                with gr.Row():
                    count = gr.Number(label="Pictures", value=4, precision=0, elem_id="count")
                    seed = gr.Number(label="Seed", value=0, precision=0)
                gr.Button("Draw", variant="primary", elem_id="draw").click(
                    answered(draw), [prompt, negative_prompt, count, seed])
            with gr.Column():
                state = gr.Textbox(label="State", elem_id="state", interactive=False)
                gr.Button("Stop", elem_id="stop").click(JOB.stop)
                gallery = gr.Gallery(label="Pictures", elem_id="pictures", columns=2, height=480, object_fit="contain")
                log = gr.Textbox(label="What the program says", lines=14, max_lines=14, elem_id="log", interactive=False)
        shown = gr.State([])
        gr.Timer(1).tick(look, [shown], [state, log, gallery, shown], show_progress="hidden")
    return page


def keep_to_this_machine():
    """Have gradio talk to itself without a proxy, and let no variable of its own open the page or the disk to others."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") and name.lower() != "no_proxy"]:
        del os.environ[name]  # the page asks nobody but itself; a SOCKS proxy alone would want one more package
    exempt = ENVIRONMENT.get("no_proxy") or ENVIRONMENT.get("NO_PROXY")
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (exempt, "127.0.0.1,localhost")))
    for name in [name for name in os.environ if name.startswith("GRADIO_") and name not in GRADIO_KEPT]:
        print(f"Note: {name} in the environment is ignored: the page answers this machine alone.", flush=True)
        del os.environ[name]
    # Its own place in the system's folder for such things would be shared with, or belong to, another user.
    os.environ.setdefault("GRADIO_TEMP_DIR", str((FOLDER / "uploads").resolve()))


def is_free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(os.name != "nt"))
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def port_number(text):
    if not 1 <= int(text) <= 65535:
        raise ValueError
    return int(text)


def ready_page(port):
    """(the page, being served; its port). UserError if that cannot be."""
    keep_to_this_machine()
    db.check_writable(FOLDER, "the page's folder")
    try:
        page = build_page()
    except ModuleNotFoundError as problem:
        if problem.name == "gradio":
            raise db.UserError("the page needs gradio: pip install -r requirements-webui.txt") from None
        raise db.UserError(f"gradio needs {problem.name}, which is missing: pip install -r requirements-webui.txt") from None
    except Exception as problem:  # whatever its own code raises, or that of what it needs
        reason = " ".join(str(problem).split())[:300]
        raise db.UserError(f"gradio cannot make the page ({type(problem).__name__}: {reason}); pip install --upgrade "
                           f"-r requirements-webui.txt") from None
    if port and not is_free(port):
        raise db.UserError(f"--port {port}: in use already, or not for this user; give another")
    if not (port := port or next(filter(is_free, PORTS), None)):
        raise db.UserError(f"ports {PORTS[0]} to {PORTS[-1]} are in use; give another with --port")
    try:
        page.launch(server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True)
    except Exception as problem:  # of the server, or of the client with which gradio looks for it
        reason = " ".join(str(problem).split())[:300]
        raise db.UserError(f"the page cannot be served on port {port} ({type(problem).__name__}: {reason})") from None
    return page, port


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--port", type=port_number, help=f"port of the page on 127.0.0.1 (default: the first that is free from "
                                                         f"{PORTS[0]})")
    port = parser.parse_args(argv).port
    for number in db.ending_signals():
        signal.signal(number, lambda number, frame: sys.exit(128 + number))  # an exit like any other, which stops the job
    with db.lasting_console():
        try:
            page, port = ready_page(port)
        except db.UserError as problem:
            print(f"error: {problem}", file=sys.stderr)
            return 2
        print(f"The page is http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
