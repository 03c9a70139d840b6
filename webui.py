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
                [sys.executable, db.__file__, *flags], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
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
        """Interrupt the program as Ctrl-C does, with which it tidies up; end it if it has not ended in a minute."""
        if self.process and self.process.poll() is None:
            self.process.terminate() if os.name == "nt" else self.process.send_signal(signal.SIGINT)
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
            except db.UserError as problem:
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--port", type=int, default=7860, help="port of the page on 127.0.0.1")
    port = parser.parse_args(argv).port
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit like any other, which stops the job
    try:
        page = build_page()
    except ImportError:
        print("error: the page needs gradio: pip install -r requirements-webui.txt", file=sys.stderr)
        return 2
    try:
        page.launch(server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True)
    except OSError:
        print(f"error: --port {port}: in use already; give another", file=sys.stderr)
        return 2
    print(f"The page is http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
