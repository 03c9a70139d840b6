"""Photos as people bring them, class images that are never stale, and a cache whose rows cannot come apart."""

import io
import os

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

import dreambooth_implementation as db


def settings(**options):
    return db.Settings("train", **options)


# ---- reading pictures


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    image.save(tmp_path / "a.png", exif=exif)
    loaded = db.load_image(tmp_path / "a.png")
    assert loaded.size == (20, 40)
    assert loaded.getpixel((10, 5)) == (0, 0, 255) and loaded.getpixel((10, 35)) == (255, 0, 0)


def test_transparency_becomes_white(tmp_path):
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 0))  # red hides under full transparency
    rgba.paste((0, 0, 255, 255), (0, 0, 4, 8))
    rgba.save(tmp_path / "rgba.png")
    rgba.convert("LA").save(tmp_path / "la.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.paste(0, (0, 0, 4, 8))
    palette.save(tmp_path / "p.png", transparency=1)
    for name in ("rgba", "la", "p"):
        assert db.load_image(tmp_path / f"{name}.png").getpixel((6, 4)) == (255, 255, 255), name
    assert db.load_image(tmp_path / "rgba.png").getpixel((1, 4)) == (0, 0, 255)
    assert db.load_image(tmp_path / "p.png").getpixel((1, 4)) == (0, 0, 255)


@pytest.mark.parametrize("mode, suffix", [("CMYK", "jpg"), ("P", "png"), ("L", "png"), ("1", "png"), ("RGB", "webp"),
                                          ("RGB", "avif")])
def test_colour_modes_become_rgb(tmp_path, mode, suffix):
    Image.new("RGB", (16, 16), (200, 200, 200)).convert(mode).save(tmp_path / f"a.{suffix}")
    loaded = db.load_image(tmp_path / f"a.{suffix}")
    assert loaded.mode == "RGB" and np.asarray(loaded).mean() == pytest.approx(200, abs=6 if mode != "1" else 60)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path, suffix):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    loaded = np.asarray(db.load_image(tmp_path / f"a.{suffix}"))[..., 0].ravel()
    assert np.array_equal(loaded, np.arange(256))


def test_float_image_is_scaled(tmp_path):
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(db.load_image(tmp_path / "a.tif"))[..., 0].ravel(), np.arange(256))


def test_first_frame_of_an_animation(tmp_path, capsys):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("green", "red")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert db.load_image(tmp_path / "a.gif").getpixel((0, 0)) == (0, 128, 0)
    assert "2 frames" in capsys.readouterr().out


def test_heic(tmp_path):
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        (tmp_path / "a.heic").write_bytes(b"anything")
        with pytest.raises(db.UserError, match="pip install pillow-heif"):
            db.load_image(tmp_path / "a.heic")
    else:
        register_heif_opener()
        Image.new("RGB", (64, 64), "red").save(tmp_path / "a.heic")
        assert db.load_image(tmp_path / "a.heic").getpixel((32, 32))[0] > 240


def test_square_keeps_the_middle_and_records_its_size():
    image = Image.new("RGB", (100, 50), "red")
    image.paste("blue", (25, 0, 75, 50))
    cropped, sizes = db.square(image, 32)
    assert cropped.size == (32, 32) and sizes == [50, 100, 0, 16, 32, 32]
    assert np.asarray(cropped)[:, 2:-2, 2].min() > 200


# ---- the photo folder


def test_what_is_left_out_and_doubted_is_named(photos, capsys):
    picture(0).save(photos / "copy.webp", lossless=True)
    (photos / "notes.txt").write_text("x")
    (photos / "Thumbs.db").write_bytes(b"x")
    (photos / ".DS_Store").write_bytes(b"x")
    (photos / "more").mkdir()
    picture(7).save(photos / "more" / "nested.png")
    found, _ = db.find_photos(settings(instance_data_dir=str(photos), class_prompt="a dog"))
    assert [p.name for p, _ in found] == ["0.png", "1.png", "2.png", "copy.webp"]
    out = capsys.readouterr().out
    assert "notes.txt" in out and "Thumbs.db" in out and f"more{os.sep}" in out and ".DS_Store" not in out
    assert "copy.webp is the same picture as" in out and "0.png" in out


def test_few_and_small_photos_are_named(photos, tiny_model, capsys):
    (photos / "2.png").unlink()
    found, _ = db.find_photos(settings(instance_data_dir=str(photos), class_prompt="a dog"))
    assert "only 2 photos" in capsys.readouterr().out
    models = db.load_models(str(tiny_model("sd1")), torch.float32)
    db.cache_latents(models, [[(found[0][0], "a")]], [], 64, "cpu")
    assert f"{found[0][0]} is 48 x 40" in capsys.readouterr().out


def test_own_photos_replace_the_samples(tmp_path, capsys):
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "class_prompt.txt").write_text("a dog\n")
    names = ["0.png", "1.png", "class_prompt.txt"]
    (tmp_path / db.SAMPLE_LIST).write_text("".join(f"{db.file_digest(tmp_path / n)}  {n}\n" for n in names))
    s = settings(instance_data_dir=str(tmp_path))
    found, class_prompt = db.find_photos(s)
    assert [p.name for p, _ in found] == ["0.png", "1.png"] and class_prompt == "a dog"

    picture(5).save(tmp_path / "mine.png")
    capsys.readouterr()
    found, class_prompt = db.find_photos(s)
    assert [p.name for p, _ in found] == ["mine.png"] and class_prompt is None
    assert "1 photos of your own beside the 2 sample pictures" in capsys.readouterr().out
    picture(6).save(tmp_path / "1.png")  # a sample's name, not its contents
    (tmp_path / "class_prompt.txt").write_text("a cat")
    found, class_prompt = db.find_photos(s)
    assert [p.name for p, _ in found] == ["1.png", "mine.png"] and class_prompt == "a cat"


@pytest.mark.parametrize("text, expected", [(b"a dog\n", "a dog"), (b" a\n dog \n", "a dog"), (b"\xef\xbb\xbfa dog", "a dog"),
                                            (b"\xff\xfea\x00", None), (b"\n", None)])
def test_class_prompt_file(photos, text, expected):
    (photos / "class_prompt.txt").write_bytes(text)
    s = settings(instance_data_dir=str(photos))
    if expected:
        assert db.find_photos(s)[1] == expected
    else:
        with pytest.raises(db.UserError):
            db.find_photos(s)


# ---- class images


class Process:
    """Stands for accelerate's Accelerator."""

    def __init__(self, index=0, count=1):
        self.process_index, self.num_processes = index, count

    def wait_for_everyone(self):
        pass


def class_images(tmp_path, model, prompt="a dog", resolution=32, count=4, process=Process(), **options):
    s = settings(class_data_dir=str(tmp_path / "class"), **options)
    models = db.load_models(str(model), torch.float32)
    return db.prepare_class_images(s, models, prompt, s.class_data_dir, count, resolution, db.plan_device(s), process)


def contents(paths):
    return [p.read_bytes() for p in paths]


@pytest.fixture
def drawn(monkeypatch):
    """The seeds that were drawn, in order."""
    seeds, draw = [], db.draw
    for steps in ("CLASS_IMAGE_STEPS", "UNGUIDED_CLASS_IMAGE_STEPS"):
        monkeypatch.setattr(db, steps, 2)
    monkeypatch.setattr(db, "draw", lambda pipeline, jobs, **o: seeds.extend(seed for _, seed in jobs) or draw(pipeline, jobs, **o))
    return seeds


def test_only_missing_class_images_are_drawn(tmp_path, tiny_model, drawn):
    paths = class_images(tmp_path, tiny_model("sd1"))
    first = contents(paths)
    assert drawn == [0, 1, 2, 3] and len(set(first)) == 4
    assert all(Image.open(p).size == (32, 32) for p in paths)

    drawn.clear()
    assert contents(class_images(tmp_path, tiny_model("sd1"))) == first and drawn == []

    paths[1].unlink()  # never made
    paths[2].write_bytes(first[2][:100])  # cut off while it was written
    again = class_images(tmp_path, tiny_model("sd1"), sample_batch_size=1)
    assert drawn == [1, 2] and contents(again)[::3] == first[::3]
    for path, bytes_before in zip(again, first):  # another batch size may round a pixel differently
        before, after = (np.asarray(Image.open(f)).astype(int) for f in (io.BytesIO(bytes_before), path))
        assert np.abs(before - after).max() <= 1
    first = contents(again)

    drawn.clear()
    assert contents(class_images(tmp_path, tiny_model("sd1"), count=5))[:4] == first and drawn == [4]


@pytest.mark.parametrize("options, steps, rows", [({}, 10, 1), ({"class_guidance_scale": 4.0}, 15, 2)])
def test_class_images_start_from_the_noisiest_timestep(options, steps, rows, tmp_path, tiny_model, monkeypatch):
    """Small models draw them without guidance: in fewer steps, and without the second row of the empty prompt in each."""
    timesteps, draw = [], db.draw

    def note(unet, inputs):
        assert len(inputs[0]) == rows
        timesteps.append(int(inputs[1]))

    def watched(pipeline, jobs, **options):
        hook = pipeline.unet.register_forward_pre_hook(note)
        yield from draw(pipeline, jobs, **options)
        hook.remove()
    monkeypatch.setattr(db, "draw", watched)
    class_images(tmp_path, tiny_model("sd1"), count=1, guidance_scale=7.5, **options)
    assert len(timesteps) == steps and timesteps[0] == 999 and timesteps == sorted(timesteps, reverse=True)


def test_class_images_of_stable_diffusion_are_guided():
    configs = {"stable-diffusion": (None, 768), "stable-diffusion-xl": ("text_time", 2048), "small": (None, 160)}
    looks = {family: db.class_image_look(settings(), {"addition_embed_type": kind, "cross_attention_dim": channels})
             for family, (kind, channels) in configs.items()}
    assert looks == {"stable-diffusion": (15, 7.5), "stable-diffusion-xl": (15, 5.0), "small": (10, 1.0)}


def test_interrupted_class_images_continue(tmp_path, tiny_model, drawn, monkeypatch):
    draw = db.draw

    def interrupted(pipeline, jobs, **options):
        for number, image in enumerate(draw(pipeline, jobs, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield image

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(db, "draw", interrupted)
        class_images(tmp_path, tiny_model("sd1"))
    drawn.clear()
    resumed = contents(class_images(tmp_path, tiny_model("sd1")))
    assert drawn == [2, 3]
    assert len(set(resumed)) == 4


def test_changed_prompt_model_size_or_guidance_draws_anew(tmp_path, tiny_model, drawn):
    sets = [class_images(tmp_path, tiny_model("sd1"), count=2),
            class_images(tmp_path, tiny_model("sd1"), count=2, prompt="a cat"),
            class_images(tmp_path, tiny_model("sd1"), count=2, resolution=48),
            class_images(tmp_path, tiny_model("sd1"), count=2, class_guidance_scale=2.0),
            class_images(tmp_path, tiny_model("sd1", seed=1), count=2)]
    assert drawn == [0, 1] * 5
    assert len({tuple(paths) for paths in sets}) == 5 and len({c for paths in sets for c in contents(paths)}) == 10


def test_a_changed_scheduler_draws_anew(tmp_path, tiny_model, drawn):
    import json
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_model("sd2"), model)
    before = class_images(tmp_path, model, count=1)
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))
    assert class_images(tmp_path, model, count=1) != before and drawn == [0, 0]


def test_a_model_changed_in_place_draws_anew(tmp_path, tiny_model, drawn):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_model("sd1"), model)
    before = class_images(tmp_path, model, count=1)
    shutil.copytree(tiny_model("sd1", seed=1), model, dirs_exist_ok=True)
    assert class_images(tmp_path, model, count=1) != before and drawn == [0, 0]


def test_processes_share_the_class_images(tmp_path, tiny_model, drawn, monkeypatch):
    alone = contents(class_images(tmp_path / "alone", tiny_model("sd1"), sample_batch_size=2))
    drawn.clear()
    # The second process counts what is missing before the first has drawn anything.
    monkeypatch.setattr(db, "missing_class_images", lambda folder, count: list(range(count)))
    class_images(tmp_path, tiny_model("sd1"), process=Process(0, 2))
    assert drawn == [0, 2]
    assert contents(class_images(tmp_path, tiny_model("sd1"), process=Process(1, 2))) == alone  # two at a time, as above
    assert drawn == [0, 2, 1, 3]


def test_own_class_images_are_used(tmp_path, tiny_model, drawn):
    (tmp_path / "class").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "class" / f"{i}.png")
    paths = class_images(tmp_path, tiny_model("sd1"), count=2)
    assert [p.name for p in paths] == ["0.png", "1.png"] and drawn == []


def test_flat_pictures_are_refused(tiny_model):
    pipeline = db.load_pipeline(str(tiny_model("sd1")), torch.float32)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.zero_()
        pipeline.vae.decoder.conv_out.bias.zero_()
    look = dict(steps=1, guidance_scale=4.0, height=32, width=32, batch_size=1)
    assert db.is_flat(next(db.draw(pipeline, [("a dog", 0)], **look)))  # float32 does not overflow: so be it
    with pytest.raises(db.UserError, match="flat colour"):
        next(db.draw(pipeline.to(torch.bfloat16), [("a dog", 0)], **look))


def test_a_flat_class_image_is_drawn_from_another_seed(tmp_path, tiny_model, drawn, monkeypatch):
    draw = db.draw

    def flat_at_seed_1(pipeline, jobs, **options):
        for (_, seed), image in zip(jobs, draw(pipeline, jobs, **options)):
            yield Image.new("RGB", image.size) if seed == 1 else image

    monkeypatch.setattr(db, "draw", flat_at_seed_1)
    paths = class_images(tmp_path, tiny_model("sd1"))
    assert drawn == [0, 1, 2, 3, 1 + 2**32] and not any(db.is_flat(Image.open(p)) for p in paths)


# ---- the latent cache and its batches


def make_cache(tmp_path, tiny_model, random_flip=False):
    models = db.load_models(str(tiny_model("sd1")), torch.float32)
    pictures = []
    for i in range(7):
        picture(i, size=(32 + 8 * i, 32)).save(tmp_path / f"{i}.png")
        pictures.append((tmp_path / f"{i}.png", "a dog" if i >= 3 else "a sks dog"))
    return models, pictures, db.cache_latents(models, [pictures[:3]], [pictures[3:]], 32, "cpu", random_flip)


def test_batches_keep_latents_prompt_and_size_together(tmp_path, tiny_model):
    models, pictures, cache = make_cache(tmp_path, tiny_model)
    s, scale = settings(train_batch_size=2, prior_loss_weight=0.5), models.vae.config.scaling_factor
    own = {}  # size record -> (mean, deviation, prompt) as encoded here, one by one; widths tell pictures apart
    for path, prompt in pictures:
        image, sizes = db.square(Image.open(path), 32)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            moments = models.vae.encode(pixels).latent_dist
        own[tuple(sizes)] = moments.mean[0] * scale, moments.std[0] * scale, prompt
    assert len(own) == 7
    seen = set()
    for step in range(12):
        batch = db.make_batch(cache, s, step, 1000)
        assert batch["is_class"].tolist() == [False, False, True, True]
        assert batch["weight"].tolist() == [0.5, 0.5, 0.25, 0.25]
        drawn = torch.randn(batch["latents"].shape, generator=db.random_source("noise", s.seed, step, 0))
        for row in range(4):
            mean, std, prompt = own[tuple(batch["time_ids"][row].int().tolist())]
            torch.testing.assert_close(batch["latents"][row], mean + std * drawn[row], atol=1e-5, rtol=1e-4)
            assert (cache.prompts[batch["prompt"][row]], bool(batch["is_class"][row])) == (prompt, prompt == "a dog")
            seen.add(tuple(batch["time_ids"][row].int().tolist()))
    assert len(seen) == 7


def test_all_latents_lie_in_one_piece_of_memory(tmp_path, tiny_model):
    """A piece for each picture, among the VAE's large tensors, once took 1.6 GB for 2000 class images instead of 33 MB."""
    _, _, cache = make_cache(tmp_path, tiny_model)
    assert cache.mean.untyped_storage().data_ptr() == cache.std.untyped_storage().data_ptr()
    assert cache.mean.untyped_storage().nbytes() == cache.mean.nbytes + cache.std.nbytes


def test_latents_are_sampled_afresh(tmp_path, tiny_model):
    _, _, cache = make_cache(tmp_path, tiny_model)
    s = settings()
    a = db.make_batch(cache, s, 0, 1000)
    b = next(batch for step in range(3, 6) if torch.equal((batch := db.make_batch(cache, s, step, 1000))["time_ids"][0],
                                                          a["time_ids"][0]))  # three photos: the same one comes again
    assert not torch.equal(a["latents"][0], b["latents"][0])
    assert not torch.equal(a["noise"], b["noise"]) and not torch.equal(a["timesteps"], b["timesteps"])
    again = db.make_batch(cache, s, 0, 1000)
    assert all(torch.equal(a[key], again[key]) for key in a)


def test_processes_draw_different_pictures_and_noise(tmp_path, tiny_model):
    _, _, cache = make_cache(tmp_path, tiny_model)
    a, b = (db.make_batch(cache, settings(), 0, 1000, process, 2) for process in (0, 1))
    assert not torch.equal(a["noise"], b["noise"]) and not torch.equal(a["time_ids"], b["time_ids"])


def test_every_picture_is_drawn_once_before_any_twice():
    draws = db.shuffled(5, 0, 500, 3)
    assert all(sorted(draws[i:i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 500, 5))
    assert db.shuffled(5, 123, 9, 3) == draws[123:132] and len({tuple(draws[i:i + 5]) for i in range(0, 500, 5)}) > 20


def test_mirrored_pictures_are_encoded_themselves(tmp_path, tiny_model):
    models, _, plain = make_cache(tmp_path, tiny_model)
    _, _, both = make_cache(tmp_path, tiny_model, random_flip=True)
    assert len(both.mean) == 14 and torch.equal(both.mean[::2], plain.mean)
    mirrored, _ = db.square(Image.open(tmp_path / "0.png"), 32)
    pixels = torch.from_numpy(np.array(mirrored)).permute(2, 0, 1)[None].flip(-1) / 127.5 - 1
    with torch.no_grad():
        expected = models.vae.encode(pixels).latent_dist.mean * models.vae.config.scaling_factor
    torch.testing.assert_close(both.mean[1:2], expected)
    assert not torch.allclose(both.mean[1], plain.mean[0].flip(-1))
