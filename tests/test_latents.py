"""The latent cache, whose rows cannot come apart."""

import numpy as np
import torch
from PIL import Image
from training_runs import made_cache, settings, usual_noise

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
    mirrored, _ = db.fitted(Image.open(tmp_path / "0.png"), (32, 32))
    pixels = torch.from_numpy(np.array(mirrored)).permute(2, 0, 1)[None].flip(-1) / 127.5 - 1
    with torch.no_grad():
        expected = models.vae.encode(pixels).latent_dist.mean * models.vae.config.scaling_factor
    torch.testing.assert_close(both.mean[1:2], expected)
    assert not torch.allclose(both.mean[1], plain.mean[0].flip(-1))


def test_masks_go_with_their_rows(tmp_path, tiny_model):
    models, pictures, plain = made_cache(tmp_path, tiny_model)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    views = {pictures[1][0]: db.View((32, 32), mask=mask)}
    cache = db.cache_latents(models, [pictures[:3]], [pictures[3:]], 32, "cpu", True, views, 0.0)
    assert plain.mask is None and cache.mask.shape == (14, 1, *cache.mean.shape[2:])
    row, mirrored = cache.mask[2, 0], cache.mask[3, 0]
    assert (row[:, :8] == 2).all() and (row[:, 8:] == 0).all() and torch.equal(mirrored, row.flip(-1))
    others = torch.cat([cache.mask[:2], cache.mask[4:]])
    assert torch.equal(others, torch.ones_like(others))
    for step in range(6):
        batch = db.make_batch(cache, settings(), step, usual_noise())
        is_masked = batch["sizes"][:, 1] == 40  # the width of the second photo
        assert torch.equal(batch["mask"].flatten(1).ne(1).any(1), is_masked)


def test_a_mask_is_of_the_subject_and_not_of_its_class(tiny_model, photos):
    """Where the photos themselves are the class's pictures, too, as with --prior frozen."""
    models = db.load_models(str(tiny_model("sd1")), torch.float32)
    mask = Image.new("L", (48, 40))
    mask.paste(255, (0, 0, 24, 40))
    photo, view = photos / "0.png", db.View((32, 32), mask=mask)
    cache = db.cache_latents(models, [[(photo, "a sks dog")]], [[(photo, "a dog")]], 32, torch.device("cpu"), views={photo: view})
    ((own,),), ((of_class,),) = cache.photos, cache.class_images
    assert cache.mask[own].unique().numel() > 1 and (cache.mask[of_class] == 1).all()
