"""Samples of a training under way."""

import contextlib
import math
import re
import time
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from dreambooth.base import UserError, default, say, say_once, slug
from dreambooth.data.views import photo_square
from dreambooth.drawing.draw import draw, placed
from dreambooth.evaluation.networks import Metrics, load_metrics
from dreambooth.evaluation.prompts import fill_template, read_prompts, usual_prompts
from dreambooth.images import image_grid
from dreambooth.methods.table import METHODS
from dreambooth.models.families.family import text_encoders_of
from dreambooth.models.families.known import guidance_scale
from dreambooth.subjects.syntax import tell_prompts
from dreambooth.subjects.words import fill_identifier, usual_prompts_of, with_places
from dreambooth.training.course import sample_interval
from dreambooth.training.levers import Levers
from dreambooth.training.run import averaged
from dreambooth.training.selection import SEEDS_SEEN, save_best, score_samples
from dreambooth.training.shards import on_device

SCORED_PROMPTS = slice(0, None, 7)  # of the 25: four, from all parts of the list


@dataclass(frozen=True)
class Viewer:
    """What is drawn during and after a training, and with what it is scored."""

    prompts: tuple
    side: int  # pixels
    every: int | None  # steps; None: only at the end
    metrics: Metrics | None = None  # from here on for --select_best alone
    real: tuple = ()  # for each subject the DINO embeddings [M, d] of its photos
    scored: tuple = ()  # (number of the subject, prompt, caption for CLIP)
    pictures: int = SEEDS_SEEN  # of each prompt


def make_viewer(run, concepts, subjects, metric_names):
    """The Viewer of a run. `metric_names` as metric_models() gives them, or None. UserError for an unusable prompt."""
    import torch

    s, side, count = run.s, run.course.resolution, default(run.s.num_validation_images, SEEDS_SEEN)
    every = sample_interval(s, concepts)
    if not s.select_best:
        own = [fill_identifier(prompt, subjects, "--validation_prompt") for prompt in s.validation_prompt or []]
        tell_prompts(own, subjects)
        return Viewer(tuple(dict.fromkeys(own or usual_prompts_of(subjects)[:-1])), side, every, pictures=count)
    templates = s.validation_prompt and [with_places(prompt) for prompt in s.validation_prompt]
    tell_prompts(templates or [], subjects)
    if templates is None and s.prompts_file:
        templates = read_prompts(s.prompts_file, "--prompts_file")[SCORED_PROMPTS]
    scored, names_class = [], METHODS[s.method].names_class
    for number, subject in enumerate(subjects):
        for template in templates or usual_prompts(s, run.models.name, subject)[SCORED_PROMPTS]:
            if re.search(rf"\[identifier(:{re.escape(subject.name)})?\]", template):
                template = template.replace(f"[identifier:{subject.name}]", "[identifier]")
                scored.append((number, *fill_template(template, subject, names_class)))
    if not scored:
        raise UserError("--validation_prompt: --select_best scores prompts with [identifier], and none has it")
    metrics = load_metrics(*metric_names, torch.device("cpu"))  # a few pictures, and the GPU may be full
    real = tuple(metrics.images([photo_square(path, concept.masks.get(path)) for path, _ in concept.photos])[0] for concept in concepts)
    prompts = dict.fromkeys([*(prompt for _, prompt, _ in scored), *(subject.class_prompt for subject in subjects)])
    every = every or math.ceil(run.course.steps / 10)
    times = -(-run.course.steps // every)
    say(f"Choosing the best of {times} checkpoints, one every {every} steps, by {len(scored) * count} pictures each.")
    return Viewer(tuple(prompt for prompt in prompts if prompt), side, every, metrics, real, tuple(scored), count)


@contextlib.contextmanager
def ready_to_draw(run):
    """The pipeline of a training under way, ready to draw on the device; afterwards everything is as it was.

    All its parts are there, or take turns where training has to save memory: gradients and activations, whose place text
    encoders and VAE could take, are small then.
    """
    import torch

    pipeline, device = run.models.pipeline, run.accelerator.device
    parts = [pipeline.vae, run.models.family.denoiser_of(pipeline), *text_encoders_of(pipeline).values()]
    before = [(part, part.device, part.training) for part in parts]
    for part in parts:
        part.eval()
    if run.course.levers.shard:
        for part in parts:
            on_device(part, device)
    elif run.course.levers == Levers():
        placed(pipeline, device)
    else:
        say_once("Samples: the parts of the model take turns, as memory is to be saved.")
        pipeline.enable_model_cpu_offload(device=device)
    try:
        with torch.compiler.set_stance("force_eager"):  # other shapes would be compiled again, for a few pictures
            yield pipeline
    finally:
        pipeline.remove_all_hooks()
        for part, place, training in before:
            on_device(part, place).train(training)


def view(run, folder, viewer, writer):
    """Have the first process draw samples of the weights, or of their running average; the others wait, or draw the same if each
    has but a share of the weights."""
    if run.accelerator.is_main_process or run.course.levers.shard:
        with averaged(run):
            draw_view(run, folder, viewer, writer)
    run.accelerator.wait_for_everyone()


def draw_view(run, folder, viewer, writer):
    """Draw the viewer's prompts into folder/samples/step-N and the timeline beside it, and score them for --select_best."""
    s, done, started = run.s, len(run.history), time.monotonic()
    jobs = [(prompt, seed) for prompt in viewer.prompts for seed in range(s.seed, s.seed + viewer.pictures)]
    with ready_to_draw(run) as pipeline:
        pictures = list(draw(pipeline, jobs, steps=s.num_inference_steps, height=viewer.side, width=viewer.side,
                             guidance_scale=guidance_scale(s, pipeline), batch_size=s.sample_batch_size,
                             title=f"samples of step {done}", models=run.models))
    if not run.accelerator.is_main_process:
        return
    place = folder / "samples" / f"step-{done:06d}"
    place.mkdir(parents=True, exist_ok=True)
    for (prompt, seed), picture in zip(jobs, pictures):
        picture.save(place / f"{viewer.prompts.index(prompt):02d}-{slug(prompt)[:80]}-{seed}.png")
    timeline(folder / "samples").save(folder / "samples" / "timeline.png")
    if writer:
        import numpy as np

        writer.add_image("samples", np.asarray(image_grid(pictures, columns=viewer.pictures)), done, dataformats="HWC")
    if viewer.scored:
        run.scores.append({"step": done, **score_samples(viewer, dict(zip(jobs, pictures)), s.seed)})
        save_best(run, folder)
    if done == viewer.every:
        say(f"Drawing{' and scoring' * bool(viewer.scored)} {len(pictures)} samples took {time.monotonic() - started:.0f} s.")


def timeline(folder):
    """One image of all the samples in `folder`: a row for each step, its number before it."""
    steps = sorted(folder.glob("step-*"))
    rows = [[Image.open(path) for path in sorted(step.glob("*.png"))] for step in steps]
    side, label = min(128, rows[0][0].width), 60
    sheet = Image.new("RGB", (label + max(map(len, rows)) * (side + 2), len(rows) * (side + 2)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for y, (step, pictures) in enumerate(zip(steps, rows)):
        pen.text((6, y * (side + 2) + side // 2 - 8), step.name.removeprefix("step-").lstrip("0"), "black", font)
        for x, picture in enumerate(pictures):
            picture = picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(picture, (label + x * (side + 2), y * (side + 2)))
    return sheet
