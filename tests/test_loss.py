"""The objective against closed forms."""

import pytest
import torch
from diffusers import DDPMScheduler

import dreambooth_implementation as db


def noise_scheduler(prediction_type, **options):
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
                         **options)


def random_batch(photos, class_images, prior_loss_weight=1.0, seed=0):
    source = torch.Generator().manual_seed(seed)
    size = photos + class_images
    return {
        "latents": torch.randn(size, 4, 8, 8, generator=source),
        "noise": torch.randn(size, 4, 8, 8, generator=source),
        "levels": torch.randint(1000, (size,), generator=source),
        "weight": torch.tensor([1 / photos] * photos + [prior_loss_weight / max(1, class_images)] * class_images),
    }


def velocity(scheduler, batch):
    alpha = scheduler.alphas_cumprod[batch["levels"]].view(-1, 1, 1, 1)
    return alpha.sqrt() * batch["noise"] - (1 - alpha).sqrt() * batch["latents"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_perfect_prediction_has_no_loss(prediction_type):
    scheduler, batch = noise_scheduler(prediction_type), random_batch(2, 2)
    target = batch["noise"] if prediction_type == "epsilon" else velocity(scheduler, batch)
    loss, losses = db.denoising_loss(db.Diffusion(scheduler, 5.0), batch, lambda noisy, batch: target)
    assert loss < 1e-10 and losses.max() < 1e-10
    other = batch["noise"] if prediction_type == "v_prediction" else velocity(scheduler, batch)
    assert db.denoising_loss(db.Diffusion(scheduler), batch, lambda noisy, batch: other)[0] > 0.1


def test_denoiser_sees_the_noised_latents():
    scheduler, batch, seen = noise_scheduler("epsilon"), random_batch(1, 1), []
    db.denoising_loss(db.Diffusion(scheduler), batch, lambda noisy, batch: seen.append((noisy, batch)) or noisy)
    alpha = scheduler.alphas_cumprod[batch["levels"]].view(-1, 1, 1, 1)
    torch.testing.assert_close(seen[0][0], alpha.sqrt() * batch["latents"] + (1 - alpha).sqrt() * batch["noise"])
    assert seen[0][1] is batch


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("prior_loss_weight", [0.0, 0.5, 1.0])
def test_loss_is_instance_mean_plus_weighted_prior_mean(prediction_type, size, prior_loss_weight):
    """Equation 2 with min-SNR, written out term by term in float64."""
    scheduler, batch, gamma = noise_scheduler(prediction_type), random_batch(size, size, prior_loss_weight), 5.0
    guess = torch.randn(2 * size, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    loss, losses = db.denoising_loss(db.Diffusion(scheduler, gamma), batch, lambda noisy, batch: guess)

    expected = []
    target = batch["noise"] if prediction_type == "epsilon" else velocity(scheduler, batch)
    for i in range(2 * size):
        alpha = scheduler.alphas_cumprod[batch["levels"][i]].item()
        snr = alpha / (1 - alpha)
        weight = min(snr, gamma) / (snr if prediction_type == "epsilon" else snr + 1)
        expected.append(weight * (guess[i] - target[i]).double().square().mean().item())
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)
    instance, prior = sum(expected[:size]) / size, sum(expected[size:]) / size
    assert loss.item() == pytest.approx(instance + prior_loss_weight * prior, rel=1e-4)


def test_min_snr_is_finite_at_zero_terminal_snr():
    timesteps = torch.tensor([0, 999])
    epsilon = db.min_snr_weights(noise_scheduler("epsilon", rescale_betas_zero_snr=True), timesteps, 5.0)
    v = db.min_snr_weights(noise_scheduler("v_prediction", rescale_betas_zero_snr=True), timesteps, 5.0)
    assert epsilon[1] == 1 and v[1] == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(epsilon).all() and torch.isfinite(v).all()


def test_accumulated_steps_equal_one_large_batch(tiny_model, photos, run, tmp_path):
    """Two micro-batches of one photo and one class image make the gradient of one batch of the four."""
    models = db.load_models(str(tiny_model("sd1")), torch.float32)
    dogs = [[(photos / "0.png", "a dog"), (photos / "2.png", "a dog")]]
    cache = db.cache_latents(models, [[(photos / f"{i}.png", "a sks dog") for i in range(2)]], dogs, 32, "cpu")
    s = db.Settings("train", gradient_accumulation_steps=2)
    encoded, noise = db.encode_for_good(models, cache.prompts, "cpu"), models.family.noise(s, models.pipeline, 32)
    conditioning = db.prompt_conditioning(models, cache.prompts, encoded, torch.device("cpu"))

    def gradient(batch):
        models.denoiser.requires_grad_(True).zero_grad()
        loss, _ = db.denoising_loss(noise, batch, lambda noisy, batch: models.family.predict(
            models, noisy, batch["levels"], conditioning(batch["prompt"]), batch["sizes"]))
        loss.backward()
        return models.denoiser.conv_in.weight.grad.clone()

    micro = [db.make_batch(cache, s, i, noise) for i in range(2)]
    joined = {key: torch.cat([m[key] for m in micro]) for key in micro[0]}
    joined["weight"] = joined["weight"] / 2
    torch.testing.assert_close((gradient(micro[0]) + gradient(micro[1])) / 2, gradient(joined), atol=1e-6, rtol=1e-4)
