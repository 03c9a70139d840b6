"""The latent cache, whose rows cannot come apart."""

import numpy as np
import torch
from PIL import Image
from training_runs import made_cache

import dreambooth_implementation as db


def test_all_latents_lie_in_one_piece_of_memory(tmp_path, tiny_model):
    """A piece for each picture, among the VAE's large tensors, once took 1.6 GB for 2000 class images instead of 33 MB."""
    _, _, cache = made_cache(tmp_path, tiny_model)
    assert cache.mean.untyped_storage().data_ptr() == cache.std.untyped_storage().data_ptr()
    assert cache.mean.untyped_storage().nbytes() == cache.mean.nbytes + cache.std.nbytes


def test_mirrored_pictures_are_encoded_themselves(tmp_path, tiny_model):
    models, _, plain = made_cache(tmp_path, tiny_model)
    _, _, both = made_cache(tmp_path, tiny_model, random_flip=True)
    assert len(both.mean) == 14 and torch.equal(both.mean[::2], plain.mean)
    mirrored, _ = db.square(Image.open(tmp_path / "0.png"), 32)
    pixels = torch.from_numpy(np.array(mirrored)).permute(2, 0, 1)[None].flip(-1) / 127.5 - 1
    with torch.no_grad():
        expected = models.vae.encode(pixels).latent_dist.mean * models.vae.config.scaling_factor
    torch.testing.assert_close(both.mean[1:2], expected)
    assert not torch.allclose(both.mean[1], plain.mean[0].flip(-1))
