"""Each family against its own pipeline in diffusers: what is told, sent and predicted; that pictures come back; that it learns."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from conftest import picture
from diffusers import FluxPipeline
from tiny_families import TINY

import dreambooth_implementation as db

SIDE = 32


@pytest.fixture(params=list(TINY))
def models(request, tiny_model):
    return db.load_models(str(tiny_model(request.param)), torch.float32)


def tensors_in(value):
    """All tensors in nested lists and dictionaries, in order."""
    if torch.is_tensor(value):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


class Recorder:
    """What a denoiser is called with and answers, and what the scheduler is given."""

    def __init__(self, pipeline, monkeypatch):
        self.calls, self.steps, self.answer = [], [], None
        denoiser = db.family_of(pipeline).denoiser_of(pipeline)
        forward, step = denoiser.forward, pipeline.scheduler.step

        def recorded(*args, **options):
            out = forward(*args, **options) if self.answer is None else self.answer(*args, **options)
            self.calls.append(([tensor.clone() for tensor in tensors_in([args, options])], [t.clone() for t in tensors_in(out)]))
            return out

        def stepped(output, timestep, sample, **options):
            self.steps.append((output.clone(), timestep / pipeline.scheduler.config.num_train_timesteps, sample.clone()))
            return step(output, timestep, sample, **options)
        monkeypatch.setattr(denoiser, "forward", recorded)
        monkeypatch.setattr(pipeline.scheduler, "step", stepped)


def draw(pipeline, prompts, side=SIDE, steps=3, **options):
    family = db.family_of(pipeline)
    return pipeline(prompt=list(prompts), height=side, width=side, num_inference_steps=steps,
                    generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
                    **family.call_options(UNGUIDED.get(family.pipelines[0], 1.0), None), **options)


UNGUIDED = {"ZImagePipeline": 0.0}  # the scale that means no guidance, where it is not 1
PROMPTS = ["a zwx dog on the moon", "a cat"]


def spatial(models, latents, size=(SIDE, SIDE)):
    """A pipeline's latents [B, ...] of a picture of this size (width, height) as the program has them, [B, C, h, w]."""
    return SPATIAL.get(models.family.pipelines[0], lambda models, latents, size: latents)(models, latents, size)


# How a pipeline's latents become [B, C, h, w], where they are not.
SPATIAL = dict.fromkeys(["Flux2KleinPipeline", "Flux2Pipeline"], lambda models, latents, size: latents.transpose(1, 2).unflatten(
    2, models.family.latents_of(models.pipeline, size)[1:]))
SPATIAL["FluxPipeline"] = lambda models, latents, size: models.pipeline._unpack_latents(
    latents, size[1], size[0], models.pipeline.vae_scale_factor)
SPATIAL["QwenImagePipeline"] = lambda models, latents, size: SPATIAL["FluxPipeline"](models, latents, size).squeeze(2)


def by_the_vae_alone(vae, pixels):
    """What a VAE makes of pixels [1, 3, H, W]."""
    film = pixels.unsqueeze(2) if type(vae).__name__ == "AutoencoderKLQwenImage" else pixels
    return vae.decode(vae.encode(film).latent_dist.mode()).sample.view_as(pixels)


def test_encoding_and_prediction_are_the_pipelines_own(models, monkeypatch):
    pipeline, family = models.pipeline, models.family
    recorder = Recorder(pipeline, monkeypatch)
    draw(pipeline, PROMPTS)
    assert len(recorder.calls) == len(recorder.steps) == 3
    with torch.no_grad():
        told = family.encode(models, PROMPTS)
    assert db.rows_of(told, torch.tensor([1, 0]), torch.device("cpu")).keys() == told.keys()
    for (output, level, sample), (sent, answered) in zip(recorder.steps, recorder.calls[:3]):
        with torch.no_grad():
            mine = family.predict(models, spatial(models, sample), level.expand(2), told, torch.zeros(2, 6))
        my_sent, my_answer = recorder.calls.pop()
        assert len(sent) == len(my_sent) and all(torch.allclose(a.float(), b.float()) for a, b in zip(sent, my_sent))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(answered, my_answer))
        torch.testing.assert_close(mine, spatial(models, output))


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def test_a_picture_comes_back(models, monkeypatch):
    """With the model replaced by one that answers with the true target: the loss is 0, and the pipeline draws the picture as the
    VAE alone gives it."""
    pipeline, family = models.pipeline, models.family
    pixels = pixels_of(picture(5, (SIDE, SIDE)))
    with torch.no_grad():
        mean, deviation = family.moments(models.vae, pixels)
        alone = by_the_vae_alone(models.vae, pixels)
        told = family.encode(models, PROMPTS[:1])
    assert mean.shape[1:] == family.latent_shape(pipeline, SIDE) and deviation.shape == mean.shape
    kind, levels, noise = family.noise(db.Settings("train"), pipeline, SIDE), torch.tensor([0.3]), torch.randn(mean.shape)
    batch = {"latents": mean, "noise": noise, "levels": levels, "weight": torch.ones(1)}
    monkeypatch.setattr(models.denoiser, "forward", ANSWERS[family.pipelines[0]](noise - mean))
    loss, _ = db.denoising_loss(kind, batch, lambda noisy, batch: family.predict(models, noisy, levels, told, torch.zeros(1, 6)))
    assert loss.item() == pytest.approx(0, abs=1e-10)

    recorder = Recorder(pipeline, monkeypatch)

    def exact(*args, **options):
        sample, level = recorder.sample
        return ANSWERS[family.pipelines[0]]((spatial(models, sample) - mean) / level)(*args, **options)
    recorder.answer = exact
    scale = pipeline.scheduler.scale_noise if hasattr(pipeline.scheduler, "scale_noise") else None
    assert scale
    drawn = drawn_exactly(pipeline, recorder, mean)
    seen = torch.from_numpy(drawn).permute(2, 0, 1)[None] * 2 - 1
    assert (seen - alone.clamp(-1, 1)).abs().max() < 0.01


def drawn_exactly(pipeline, recorder, mean):
    """The picture [H, W, 3] that a pipeline draws while its denoiser points at `mean`."""
    prepare = pipeline.prepare_latents

    def prepared(*args, **options):
        out = prepare(*args, **options)
        recorder.sample = (out[0] if isinstance(out, tuple) else out), torch.tensor(1.0)
        return out
    step = pipeline.scheduler.step

    def stepped(output, timestep, sample, **options):
        out = step(output, timestep, sample, **options)
        index = pipeline.scheduler.step_index
        recorder.sample = out[0], pipeline.scheduler.sigmas[index]
        return out
    pipeline.prepare_latents, pipeline.scheduler.step = prepared, stepped
    return draw(pipeline, PROMPTS[:1], output_type="np").images[0]


# What a denoiser's forward returns for a true target [B, C, h, w].
ANSWERS = {"ZImagePipeline": lambda target: lambda *args, **options: (list((-target).unsqueeze(2).unbind()),)}
ANSWERS |= dict.fromkeys(["Flux2KleinPipeline", "Flux2Pipeline"], lambda target: lambda *args, **options: (target.flatten(2).transpose(1, 2),))
ANSWERS["FluxPipeline"] = lambda target: lambda *args, **options: (FluxPipeline._pack_latents(target, *target.shape),)
ANSWERS["QwenImagePipeline"] = ANSWERS["FluxPipeline"]
ANSWERS["StableDiffusion3Pipeline"] = lambda target: lambda *args, **options: (target,)


class Wrapped(torch.nn.Module):
    """A module as several processes have it: what averages its gradients is called in its place, and has none of its attributes."""

    def __init__(self, module):
        super().__init__()
        self.module, self.called = module, 0

    def forward(self, *args, **options):
        self.called += 1
        return self.module(*args, **options)


def batch_of(models):
    """(noisy latents, levels, sizes) of a picture of noise."""
    return torch.randn(1, *models.family.latent_shape(models.pipeline, SIDE)), torch.tensor([0.3]), torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]])


def test_what_trains_is_called_by_its_wrapper(models):
    """Else each of several processes would train on by itself."""
    family, trains = models.family, models.family.trains_text
    wrapped = dataclasses.replace(models, denoiser=Wrapped(models.denoiser),
                                  text_encoders=[Wrapped(part) if trains else part for part in models.text_encoders])
    noisy, levels, sizes = batch_of(models)
    told = family.encode(wrapped, PROMPTS[:1])
    family.predict(wrapped, noisy, levels, told, sizes)
    assert wrapped.denoiser.called == 1 and all(part.called == 1 for part in wrapped.text_encoders if trains)
    plain = family.encode(models, PROMPTS[:1])
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(told), tensors_in(plain), strict=True))


@pytest.mark.parametrize("flags", [{}, {"method": "lora", "lora_target": "all", "rank": 2}], ids=["full", "lora"])
def test_all_that_trains_reaches_the_loss(flags, models):
    """Else a file would hold what never learnt, and several processes would wait for its gradients."""
    s = db.Settings("train", **flags)
    group = {"full": db.full_denoiser, "lora": db.denoiser_lora}[s.method](s, models, [], db.recipe_for(models.family, s))
    models.denoiser.requires_grad_(False)
    for parameter in group.parameters:
        parameter.requires_grad_(True)
    noisy, levels, sizes = batch_of(models)
    with torch.no_grad():
        told = models.family.encode(models, PROMPTS[:1])
    models.family.predict(models, noisy, levels, told, sizes).square().sum().backward()
    names = {parameter: name for name, parameter in models.denoiser.named_parameters()}
    assert not [names[parameter] for parameter in group.parameters if parameter.grad is None]
    assert len(group.parameters) >= 0.8 * len(names) or s.method == "lora"


def test_levels_follow_the_models_own_shift(models):
    kind = models.family.noise(db.Settings("train"), models.pipeline, SIDE)
    source = torch.Generator().manual_seed(0)
    levels, plain = kind.levels(20_000, source), db.Flow().levels(20_000, torch.Generator().manual_seed(0))
    models.pipeline.scheduler.set_timesteps(**schedule_of(models))
    drawn_with = models.pipeline.scheduler.sigmas[:-1]
    assert kind.shift != 1 and 0 < levels.min() and levels.max() <= 1
    own = plain.new_tensor([1 - i / len(drawn_with) for i in range(len(drawn_with))])
    torch.testing.assert_close(kind.shift * own / (1 + (kind.shift - 1) * own), drawn_with, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(levels, kind.shift * plain / (1 + (kind.shift - 1) * plain))


def schedule_of(models, steps=30):
    """What a scheduler is given for so many steps: an even path, and mu where the pipeline tells it one. How far the path ends from
    0 is the sampler's own."""
    scheduler, told = models.pipeline.scheduler, {}
    scheduler.register_to_config(shift_terminal=None)
    set_timesteps = scheduler.set_timesteps
    scheduler.set_timesteps = functools.wraps(set_timesteps)(lambda *args, **options: told.update(options) or set_timesteps(*args, **options))
    draw(models.pipeline, PROMPTS[:1], steps=steps)
    scheduler.set_timesteps = set_timesteps
    return {"sigmas": np.linspace(1.0, 1 / steps, steps)} | ({"mu": told["mu"]} if scheduler.config.use_dynamic_shifting else {})


@pytest.mark.long
def test_it_learns_a_picture(models, monkeypatch):
    """A tiny random model that is trained in full on one picture draws it with its own pipeline."""
    family, pipeline, few = models.family, models.pipeline, dict(steps=12, output_type="np", max_sequence_length=64)
    monkeypatch.setattr(type(family), "prompt_tokens", 64)
    image = picture(5, (SIDE, SIDE)).resize((4, 4)).resize((SIDE, SIDE), 0)
    pixels, source = pixels_of(image), torch.Generator().manual_seed(0)
    with torch.no_grad():
        mean, _ = family.moments(models.vae, pixels)
        alone = by_the_vae_alone(models.vae, pixels)
        told = db.rows_of(family.encode(models, ["a zwx dog"]), torch.zeros(8, dtype=torch.long), torch.device("cpu"))
    before = psnr(draw(pipeline, ["a zwx dog"], **few).images[0], alone)
    kind = family.noise(db.Settings("train"), pipeline, SIDE)
    models.denoiser.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(models.denoiser.parameters(), 5e-3)
    latents = mean.expand(8, -1, -1, -1)
    for _ in range(400):
        batch = {"latents": latents, "noise": torch.randn(latents.shape, generator=source), "levels": kind.levels(8, source),
                 "weight": torch.full((8,), 1 / 8)}
        loss, _ = db.denoising_loss(kind, batch, lambda noisy, batch: family.predict(models, noisy, batch["levels"], told, torch.zeros(8, 6)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    models.denoiser.eval()
    after = psnr(draw(pipeline, ["a zwx dog"], **few).images[0], alone)
    assert before < 15 and after > 19, (before, after)  # with a wrong sign: 4


def psnr(drawn, alone):
    """In decibels, of a picture [H, W, 3] in 0 to 1 against the VAE's own [1, 3, H, W] in -1 to 1."""
    error = torch.from_numpy(drawn).permute(2, 0, 1)[None] - (alone.clamp(-1, 1) + 1) / 2
    return -10 * error.square().mean().log10().item()


def test_weights_stay_as_they_are_while_a_picture_is_drawn(models):
    before = copy.deepcopy(models.denoiser.state_dict())
    draw(models.pipeline, PROMPTS)
    assert all(torch.equal(before[name], tensor) for name, tensor in models.denoiser.state_dict().items())


def test_other_shapes_are_the_pipelines_own(models, monkeypatch):
    """Latents and whatever tells their places, of a picture that is no square."""
    pipeline, family, recorder = models.pipeline, models.family, Recorder(models.pipeline, monkeypatch)
    width, height = 3 * family.multiple(pipeline), 2 * family.multiple(pipeline)
    pipeline(prompt=PROMPTS[:1], width=width, height=height, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
             **family.call_options(UNGUIDED.get(family.pipelines[0], 1.0), None))
    (_, level, sample), (sent, answered) = recorder.steps[0], recorder.calls[0]
    shape = family.latents_of(pipeline, (width, height))
    with torch.no_grad():
        mean, _ = family.moments(models.vae, pixels_of(picture(0, (width, height))))
        family.predict(models, spatial(models, sample, (width, height)), level.expand(1), family.encode(models, PROMPTS[:1]), torch.zeros(1, 6))
    assert mean.shape[1:] == shape
    my_sent, my_answer = recorder.calls[-1]
    assert len(sent) == len(my_sent) and all(torch.allclose(a.float(), b.float()) for a, b in zip(sent, my_sent))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(answered, my_answer))
