"""Short trainings of tiny models: flags, a Run without the program around it, and what was saved."""

import os
import signal

import numpy as np
import pytest
import torch
from conftest import picture
from safetensors.torch import load_file

import dreambooth_implementation as db

SHORT = ["--class_prompt", "a dog", "--num_class_images", "2", "--num_inference_steps", "2"]
QUICK = [*SHORT, "--steps", "2", "--identifier", "sks"]
FAST = [*SHORT, "--learning_rate", "1e-3"]
ALONE = ["--no-with_prior_preservation", "--validation_prompt", "a dog"]  # for what does not depend on class images
LORA = ["--learning_rate", "1e-2", "--lora_target", "attention"]
WORDS = ["--embedding_lr", "1e-1"]
ADAPTER_FLAGS = {"lora": LORA, "textual_inversion": WORDS, "pivotal": LORA + WORDS}
STEPS = 9
METHODS = {"full": ["--train_text_encoder"], "lora": ["--rank", "2", "--train_text_encoder", "--use_dora"],
           "textual_inversion": ["--num_vectors", "2"], "pivotal": ["--embedding_frac", "0.4", "--use_ema"]}
OPTIONAL = {"adamw8bit": "torchao", "prodigy": "prodigyopt"}


def settings(**options):
    return db.Settings("train", **options)


def need(optimizer):
    if optimizer in OPTIONAL:
        pytest.importorskip(OPTIONAL[optimizer])


def original_checkpoint(pipeline):
    """{original name: tensor} of a pipeline, as --export writes it."""
    parts, config, open_part, scheduler = db.loaded_model(pipeline)
    return dict(db.original_tensors(db.layout_of(parts, config), open_part, scheduler))


# ---- a Run


def usual_noise():
    """Diffusion with diffusers' usual 1000 timesteps."""
    from diffusers import DDPMScheduler

    return db.Diffusion(DDPMScheduler())


def tiny_training(tiny_model, method="full", family="sd1", precision="no", resolution=64, **flags):
    """(settings, models, subjects, recipe, plan) of a training on the CPU, ready to be surveyed."""
    s = db.Settings("train", method=method, mixed_precision=precision, rank=2, **flags)
    models = db.load_models(str(tiny_model(family)), torch.float32)
    recipe = db.SmallStableDiffusion.recipes[method]
    return s, models, [db.Subject("<dog>", "a dog", "a <dog> dog", "dog")], recipe, db.Plan(torch.device("cpu"), precision)


def make_run(tiny_model, method="full", family="sd1", precision="no", levers=db.Levers(), **flags):
    """A Run of 4 steps on the latents of made-up pictures."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    s, models, subjects, recipe, plan = tiny_training(tiny_model, method, family, precision, **flags)
    torch.manual_seed(0)
    if db.METHODS[method].is_adapter:
        models.denoiser.to(plan.dtype)
    groups = db.parameter_groups(s, models, subjects, db.with_own_rate(recipe, s))
    course = db.Course(4, 64, precision, levers, "cosine")
    return db.prepare_training(s, course, models, groups, made_up_latents(), db.make_accelerator(s, plan), {})


def made_up_latents():
    """A LatentCache of four photos and five class images."""
    latents = torch.randn(9, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return db.LatentCache(latents, torch.full_like(latents, 0.1), torch.full((9, 6), 32.0), (torch.arange(9) > 3).long(),
                          ["a sks dog", "a dog"], [[0, 1, 2, 3]], [[4, 5, 6, 7, 8]])


def made_cache(tmp_path, tiny_model, random_flip=False):
    """(models, [(path, prompt)], LatentCache) of three photos and four class images."""
    models = db.load_models(str(tiny_model("sd1")), torch.float32)
    pictures = []
    for i in range(7):
        picture(i, size=(32 + 8 * i, 32)).save(tmp_path / f"{i}.png")
        pictures.append((tmp_path / f"{i}.png", "a dog" if i >= 3 else "a sks dog"))
    return models, pictures, db.cache_latents(models, [pictures[:3]], [pictures[3:]], 32, "cpu", random_flip)


def steps(run, first, last):
    """Take the steps first .. last - 1; returns what train_step() measured of them."""
    measured = [db.train_step(run, step)[-1] for step in range(first, last)]
    run.history.extend([row.tolist() for row in measured])
    return torch.stack(measured)


def trained(run):
    return {name: tensor.clone() for name, tensor in db.trained_tensors(run.groups).items()}


def survey(training, levers=db.Levers(), resolution=64):
    s, models, subjects, recipe, plan = training
    return db.survey(s, models, subjects, recipe, resolution, plan, levers)


def demand(*events, passes=1, trained=((4, 25),)):
    return db.Demand(trained, 0, passes, events)


# ---- a training by the program


def interrupt(monkeypatch, step, number=signal.SIGINT):
    """Send this process a signal in the middle of that step, once."""
    train_step = db.train_step

    def interrupted(run, index):
        if index + 1 == step:
            os.kill(os.getpid(), number)
        return train_step(run, index)

    monkeypatch.setattr(db, "train_step", interrupted)
    return lambda: monkeypatch.setattr(db, "train_step", train_step)


def steps_saved(folder):
    try:
        return [int(path.name.removeprefix("step-")) for path in db.checkpoints_in(folder)]
    except FileNotFoundError:  # a training that ended renamed its folder while it was being read
        return []


# ---- what was saved


def weights(folder):
    """{"part or file/tensor": value} of what was saved in `folder`, checkpoints aside."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*.safetensors")) if "checkpoints" not in path.parts]
    assert files
    return {f"{path.parts[0]}/{name}": tensor for path in files for name, tensor in load_file(folder / path).items()}


def same(ours, theirs):
    """Whether two state dicts have the same names and bits."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_weights(one, other):
    """Of two folders, to the bit."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different[:3]


def far_apart(one, other):
    """The largest difference of two pictures, of 255."""
    one, other = (np.asarray(picture).astype(int) for picture in (one, other))
    return np.abs(one - other).max()
