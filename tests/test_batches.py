"""What a step trains on."""

import numpy as np
import torch
from PIL import Image
from training_runs import made_cache, settings, usual_noise

import dreambooth_implementation as db


def test_batches_keep_latents_prompt_and_size_together(tmp_path, tiny_model):
    models, pictures, cache = made_cache(tmp_path, tiny_model)
    s, scale = settings(train_batch_size=2, prior_loss_weight=0.5), models.vae.config.scaling_factor
    own = {}  # size record -> (mean, deviation, prompt) as encoded here, one by one; widths tell pictures apart
    for path, prompt in pictures:
        image, sizes = db.fitted(Image.open(path), (32, 32))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            moments = models.vae.encode(pixels).latent_dist
        own[tuple(sizes)] = moments.mean[0] * scale, moments.std[0] * scale, prompt
    assert len(own) == 7
    seen = set()
    for step in range(12):
        batch = db.make_batch(cache, s, step, usual_noise())
        assert batch["is_class"].tolist() == [False, False, True, True]
        assert batch["weight"].tolist() == [0.5, 0.5, 0.25, 0.25]
        drawn = torch.randn(batch["latents"].shape, generator=db.random_source("noise", s.seed, step, 0))
        for row in range(4):
            mean, std, prompt = own[tuple(batch["sizes"][row].int().tolist())]
            torch.testing.assert_close(batch["latents"][row], mean + std * drawn[row], atol=1e-5, rtol=1e-4)
            assert (cache.prompts[batch["prompt"][row]], bool(batch["is_class"][row])) == (prompt, prompt == "a dog")
            seen.add(tuple(batch["sizes"][row].int().tolist()))
    assert len(seen) == 7


def test_latents_are_sampled_afresh(tmp_path, tiny_model):
    _, _, cache = made_cache(tmp_path, tiny_model)
    s = settings()
    a = db.make_batch(cache, s, 0, usual_noise())
    b = next(batch for step in range(3, 6) if torch.equal((batch := db.make_batch(cache, s, step, usual_noise()))["sizes"][0],
                                                          a["sizes"][0]))  # three photos: the same one comes again
    assert not torch.equal(a["latents"][0], b["latents"][0])
    assert not torch.equal(a["noise"], b["noise"]) and not torch.equal(a["levels"], b["levels"])
    again = db.make_batch(cache, s, 0, usual_noise())
    assert all(torch.equal(a[key], again[key]) for key in a)


def test_processes_draw_different_pictures_and_noise(tmp_path, tiny_model):
    _, _, cache = made_cache(tmp_path, tiny_model)
    a, b = (db.make_batch(cache, settings(), 0, usual_noise(), process, 2) for process in (0, 1))
    assert not torch.equal(a["noise"], b["noise"]) and not torch.equal(a["sizes"], b["sizes"])


def test_every_picture_is_drawn_once_before_any_twice():
    draws = db.shuffled(5, 0, 500, 3)
    assert all(sorted(draws[i:i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 500, 5))
    assert db.shuffled(5, 123, 9, 3) == draws[123:132] and len({tuple(draws[i:i + 5]) for i in range(0, 500, 5)}) > 20
