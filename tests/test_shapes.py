"""Shapes of photos: which there are, which a photo gets, and trainings in several."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from training_runs import ALONE, assert_same_weights, interrupt, settings, usual_noise

import dreambooth_implementation as db


@pytest.mark.parametrize("side, multiple", [(32, 8), (64, 8), (512, 8), (768, 16), (1024, 64), (520, 8), (96, 16)])
def test_shapes_have_no_more_pixels_than_the_square_and_sides_the_model_takes(side, multiple):
    shapes = db.shapes_for(side, multiple)
    assert shapes[0] == (side, side) and len(set(shapes)) == len(shapes)
    for width, height in shapes[1:]:
        assert width % multiple == height % multiple == 0 and max(width, height) <= 2.5 * min(width, height)
        assert 0.7 * side**2 <= width * height <= side**2 and (height, width) in shapes
    assert side != 1024 or {(1152, 896), (832, 1216), (1344, 768)} <= set(shapes)  # SDXL's own


def test_a_photo_gets_the_shape_that_cuts_off_least():
    shapes = db.shapes_for(512, 8)
    for size, shape in (((4000, 3000), (576, 448)), ((3000, 4000), (448, 576)), ((1000, 990), (512, 512)),
                        ((1920, 1080), (640, 384)), ((100, 1000), (320, 768))):
        assert db.nearest_shape(size, shapes) == shape


@pytest.mark.parametrize("flag, side, sizes, own, is_shaped", [
    (None, 512, [(400, 300)], None, True), (None, 64, [(400, 300)] * 3, None, False),
    (None, 64, [(400, 300), (300, 300)], None, True),
    (False, 512, [(400, 300)], None, False), (True, 64, [(400, 300)], None, True), (True, 512, [(400, 300), (300, 300)], 1, False)])
def test_when_photos_keep_their_shapes(flag, side, sizes, own, is_shaped, capsys):
    found = db.shapes_of(settings(aspect_ratio_buckets=flag), sizes, side, 8, own)
    assert (len(found) > 1) == is_shaped and found[0] == (side, side)
    out = capsys.readouterr().out
    assert ("Shapes: " in out) == is_shaped and ("only 1 class images of your own" in out) == (own == 1)


def test_class_images_have_the_photos_proportions():
    a, b, c = (8, 8), (16, 8), (8, 16)
    assert db.apportioned(200, {a: 3, b: 2}) == {a: 120, b: 80}
    assert sorted(db.apportioned(10, {a: 1, b: 1, c: 1}).values()) == [3, 3, 4]
    assert db.apportioned(1, {a: 5, b: 1}) == {a: 1, b: 1}
    assert db.apportioned(7, {a: 1}) == {a: 7}
    assert db.apportioned(3, {a: 8, b: 1, c: 1}) == {a: 1, b: 1, c: 1} and db.apportioned(2, {a: 8, b: 1, c: 1}) == {a: 1, b: 1, c: 1}
    for counts in ({a: 1, b: 7, c: 3}, {a: 2, b: 2, c: 5}):
        shares = db.apportioned(100, counts)
        assert sum(shares.values()) == 100 and all(abs(shares[k] - 100 * counts[k] / sum(counts.values())) < 1 for k in counts)
    given = db.dealt([(10, 20), (20, 10), (10, 10), (30, 10)], {b: 1, c: 1})
    assert given == [c, b, c, b]


def shaped_cache(photos=(3, 2), class_images=(6, 4)):
    """A ShapedCache of one subject, with made-up latents; the mean of a row is its number, of class images more than 99."""
    shelves, number = [], [0, 100]
    for shape, counts in zip(((4, 4), (3, 5)), zip(photos, class_images)):
        values = [float(number[kind] + i) for kind, count in enumerate(counts) for i in range(count)]
        number = [number[kind] + count for kind, count in enumerate(counts)]
        rows = len(values)
        mean = torch.tensor(values).view(-1, 1, 1, 1).expand(rows, 4, *shape).clone()
        shelves.append(db.LatentCache(mean, torch.zeros_like(mean), torch.zeros(rows, 6), (torch.arange(rows) >= counts[0]).long(),
                                      ["a sks dog", "a dog"], [list(range(counts[0]))], [list(range(counts[0], rows))]))
    return db.ShapedCache(shelves)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_have_one_shape_and_show_all_equally_often(size):
    cache, s = shaped_cache(), settings(train_batch_size=size)
    seen, led = Counter(), Counter()
    for step in range(600):
        batch = db.make_batch(cache, s, step, usual_noise())
        rows = [row for row in batch["latents"].mean((1, 2, 3)).round().int().tolist()]
        assert len(rows) == 2 * size and [row >= 100 for row in rows] == batch["is_class"].tolist()
        small = batch["latents"].shape[2:] == (3, 5)
        assert all((row >= 3) == small for row in rows[:size]) and all((row >= 106) == small for row in rows[size:])
        assert batch["noise"].shape == batch["latents"].shape and len(set(rows[:size])) == min(size, 2 if small else 3)
        seen.update(rows)
        led[rows[0]] += 1
    assert led == {row: 120 for row in range(5)}  # each once before any twice
    assert all(abs(seen[row] / (120 * size) - 1) < 0.25 for row in range(5))
    assert all(abs(seen[row] / (60 * size) - 1) < 0.4 for row in range(100, 110))
    again = [db.make_batch(cache, s, 17, usual_noise(), 1, 2) for _ in range(2)]
    assert all(torch.equal(again[0][key], again[1][key]) for key in again[0])


def test_processes_draw_different_pictures_of_several_shapes():
    leaders = [db.make_batch(shaped_cache(), settings(), step, usual_noise(), process, 2)["latents"][0].mean().round().item()
               for step in range(5) for process in range(2)]
    assert sorted(leaders[:5]) == sorted(leaders[5:]) == [0, 1, 2, 3, 4]


@pytest.fixture
def shaped(photos):
    """The photos and two wide ones."""
    for i in (3, 4):
        picture(i, (80, 40)).save(photos / f"{i}.png")
    return photos


def test_every_picture_is_encoded_in_its_shape(shaped, tiny_model, tmp_path):
    models = db.load_models(str(tiny_model("sdxl")), torch.float32)
    concept = db.Concept(str(shaped), "", 0, photos=tuple((path, None) for path in sorted(shaped.glob("*.png"))))
    views = db.views_of(settings(), [concept], 32, 8)
    pictures = [(path, "a sks dog") for path, _ in concept.photos]
    cache = db.cache_latents(models, [pictures], [], 32, "cpu", True, views)
    assert [tuple(shelf.mean.shape) for shelf in cache.shelves] == [(6, 4, 16, 16), (4, 4, 12, 20)]
    assert len(pictures) == 5 and [len(pool) for shelf in cache.shelves for pool in shelf.photos] == [6, 4]
    for shelf, path in zip(cache.shelves, (shaped / "0.png", shaped / "3.png")):
        image, record = views[path].seen(db.load_image(path))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            expected, _ = models.family.moments(models.vae, pixels)
        torch.testing.assert_close(shelf.mean[:1], expected)
        assert shelf.mean.shape[1:] == models.family.latents_of(models.pipeline, image.size) and shelf.sizes[0].tolist() == record


def test_size_conditioning_is_the_pipelines_own(tiny_model, monkeypatch):
    """What SDXL's pipeline sends for a picture of this shape, cut from a larger one."""
    models, sent = db.load_models(str(tiny_model("sdxl")), torch.float32), []
    forward = models.denoiser.forward
    monkeypatch.setattr(models.denoiser, "forward", lambda sample, *args, **options: sent.append((
        sample.shape[1:], options["added_cond_kwargs"]["time_ids"])) or forward(sample, *args, **options))
    view = db.View((40, 24), (0.25, 0.5))
    _, record = view.seen(picture(0, (90, 40)))
    models.pipeline("a dog", width=40, height=24, num_inference_steps=1, guidance_scale=1.0, original_size=tuple(record[:2]),
                    crops_coords_top_left=tuple(record[2:4]), target_size=tuple(record[4:]))
    shape, time_ids = sent[0]
    assert shape == models.family.latents_of(models.pipeline, view.size) and time_ids[0].tolist() == record


def test_a_training_in_several_shapes(shaped, train, tmp_path):
    """Photos, their sheet and class images in the photos' proportions; the square ones are those of other trainings."""
    status, _, err = train("sd1", "--no-aspect_ratio_buckets", "--num_class_images", 3, "--output_dir", "square")
    assert status == 0, err
    folders = {path for path in (tmp_path / "class_images").iterdir()}
    status, out, err = train("sd1", "--num_class_images", 5, "--train_batch_size", 2)
    assert status == 0 and "Shapes: 3 of 32 x 32, 2 of 40 x 24 pixels" in out, err
    assert "Class images: 3 of 3 are in" in out  # not drawn again
    (wide,) = {path for path in (tmp_path / "class_images").iterdir()} - folders
    assert [Image.open(path).size for path in sorted(wide.glob("*.png"))] == [(40, 24)] * 2
    assert json.loads((wide / "settings.json").read_text())["resolution"] == [40, 24]
    assert Image.open(tmp_path / "output" / "photos.png").size == (5 * 40 + 4, 32)


def test_own_class_images_are_cut_to_the_photos_shapes(shaped, train, tmp_path):
    (tmp_path / "dogs").mkdir()
    for i, size in enumerate([(32, 32), (90, 40), (40, 40), (80, 40), (40, 48)]):
        picture(20 + i, size).save(tmp_path / "dogs" / f"{i}.png")
    status, out, err = train("sd1", "--class_data_dir", "dogs", "--num_class_images", 5)
    assert status == 0 and "Shapes: 3 of 32 x 32" in out, err
    for i in (1, 2, 3, 4):
        (tmp_path / "dogs" / f"{i}.png").unlink()
    status, out, err = train("sd1", "--class_data_dir", "dogs", "--output_dir", "few")
    assert status == 0 and "the photos have 2 shapes, but there are only 1 class images of your own: all become squares" in out, err


@pytest.mark.parametrize("more", [[], ["--train_batch_size", 2, "--random_flip"]])
def test_resumed_equals_uninterrupted_in_several_shapes(more, shaped, flags, run, tmp_path, monkeypatch):
    mask = Image.new("L", (80, 40))
    mask.paste(255, (0, 0, 30, 40))
    mask.save(shaped / "3.mask.png")
    for name in ("whole", "parts"):
        undo = interrupt(monkeypatch, 4) if name == "parts" else lambda: None
        status, _, err = run(*flags("lora"), *more, "--output_dir", name)
        assert status == (130 if name == "parts" else 0), err
        undo()
    status, _, err = run(*flags("lora"), *more, "--output_dir", "parts", "--resume", "--no-aspect_ratio_buckets")
    assert status == 2 and "the photos or class images" in err
    assert run(*flags("lora"), *more, "--output_dir", "parts", "--resume")[0] == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_square_photos_are_trained_on_as_without_shapes(train, photos, tmp_path):
    for i in range(3):
        picture(i, (40, 40)).save(photos / f"{i}.png")
    for name, flag in (("on", "--aspect_ratio_buckets"), ("off", "--no-aspect_ratio_buckets")):
        assert train("sd1", *ALONE, flag, "--output_dir", name)[0] == 0
    assert_same_weights(tmp_path / "on", tmp_path / "off")
