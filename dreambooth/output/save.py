"""Filling the output folder of a finished training."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path

from dreambooth.base import Interrupted, UserError, say
from dreambooth.drawing.draw import draw_pictures, in_precision, placed
from dreambooth.drawing.trained import read_record
from dreambooth.files import flush, share, whole_file
from dreambooth.methods.table import saves_of
from dreambooth.models.families.known import guidance_scale
from dreambooth.models.notes import notes_of
from dreambooth.output.card import save_card
from dreambooth.output.needed import name_when_done
from dreambooth.output.pictures import LOSS_PLOT, loss_plot
from dreambooth.training.course import decisions
from dreambooth.training.loss import loss_means
from dreambooth.training.run import best_of
from dreambooth.training.signals import deferred_stop


def save_output(folder, run, models, subjects, seconds, given):
    """Write what the method saves, which plain diffusers loads, and, when that is complete, dreambooth.json beside it.

    Raises Interrupted, once all is written, on Ctrl-C or a signal that ends programs.
    """
    with deferred_stop("the model is saved") as signals:
        write_output(folder, run, models, subjects, seconds, given)
    if signals:
        raise Interrupted(f"interrupted; the model is complete in {run.s.output_dir}", signals[0])


def write_output(folder, run, models, subjects, seconds, given):
    s, history = run.s, run.history
    models = dataclasses.replace(models, name=name_when_done(s, models.name))
    models.pipeline.to("cpu")
    notes = notes_of(models.family, models.denoiser.config, models.pipeline.scheduler.config, models.name, subjects, run.course.resolution)
    for save in saves_of(s):
        save(folder, models, subjects, notes)
    loss_plot(history).save(folder / LOSS_PLOT)
    save_card(folder, s, models, subjects)
    record = {
        "method": s.method,
        "base_model": models.name,
        "base_sample": run.models.sample,  # tells whether the model of that name is still the same
        "subjects": [dataclasses.asdict(subject) for subject in subjects],
        "used": decisions(run.course, run.groups) | {
            "guidance_scale": guidance_scale(s, models.pipeline),
            "selected_step": best_of(run.scores)["step"] if run.scores else None},
        "loss": {"first_100_steps": loss_means(history[:100]), "last_100_steps": loss_means(history[-100:])},
        "seconds": seconds,
        "settings": dataclasses.asdict(s),
        "given": given,
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers", "accelerate", "peft")},
    }
    share(folder)
    with whole_file(folder / "dreambooth.json") as part:
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for path in folder.rglob("*"):
            flush(path)


def draw_samples(s, models, subjects, viewer, plan):
    """The sample grid of a finished training. The model is safe by then: whatever goes wrong here is only said."""
    try:
        placed(in_precision(models.pipeline, plan.dtype), plan.device)
        grid = draw_pictures(Path(s.output_dir) / "samples", models.pipeline, s, viewer.prompts,
                             range(s.seed, s.seed + viewer.pictures), {"Model": s.output_dir}, (viewer.side, viewer.side), models)
        base = read_record(s.output_dir)["base_model"]
        save_card(Path(s.output_dir), s, dataclasses.replace(models, name=base), subjects, grid)
        say(f"A look at it is in {grid}.")
    except (UserError, RuntimeError, OSError) as problem:
        say(f"Note: the samples could not be drawn ({problem}); the model is complete.")
