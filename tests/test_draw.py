"""Drawing: pictures that do not depend on the batch, carry their settings and fit into memory."""

import re
import types

import numpy as np
import pytest
import torch
from PIL import Image

import dreambooth_implementation as db


def test_pictures_do_not_depend_on_the_batch(train, run, tmp_path):
    assert train()[0] == 0
    for size in (1, 3):
        assert run("--infer", "--prompt", "a dog", "--prompt", "a cat", "--num_images", 2, "--sample_batch_size", size,
                   "--num_inference_steps", 4, "--image_dir", f"by{size}")[0] == 0
    names = {f"a-{noun}-{seed}.png" for noun in ("dog", "cat") for seed in (0, 1)} | {"grid-a-dog-0.png"}
    assert {p.name for p in (tmp_path / "by1").iterdir()} == {p.name for p in (tmp_path / "by3").iterdir()} == names
    for name in names:
        one, three = (np.asarray(Image.open(tmp_path / f"by{size}" / name)).astype(int) for size in (1, 3))
        assert np.abs(one - three).max() <= 1
    assert Image.open(tmp_path / "by1" / "grid-a-dog-0.png").size == (65, 65)


def test_pictures_carry_their_settings(train, run, tmp_path):
    assert train()[0] == 0
    flags = ["--infer", "--prompt", "a [identifier] dog", "--negative_prompt", "blur, text", "--num_images", 1, "--seed", 5,
             "--height", 40, "--width", 48]
    assert run(*flags, "--num_inference_steps", 2)[0] == 0
    image = Image.open(tmp_path / "images" / "a-sks-dog-5.png")
    assert image.size == (48, 40)
    assert re.fullmatch(r"a sks dog\nNegative prompt: blur, text\nSteps: 2, Sampler: PNDM, CFG scale: 4.0, Seed: 5, "
                        r"Size: 48x40, Model: ./output, Model hash: [0-9a-f]{10}", image.info["parameters"])
    first = image.tobytes()
    assert run(*flags, "--num_inference_steps", 3)[0] == 0  # another picture of that name: the first is kept
    assert Image.open(tmp_path / "images" / "a-sks-dog-5.png").tobytes() == first
    assert "Steps: 3" in Image.open(tmp_path / "images" / "a-sks-dog-5-2.png").info["parameters"]
    assert run(*flags, "--num_inference_steps", 2)[0] == 0  # the same picture again: no copies
    assert len(list((tmp_path / "images").glob("a-sks*"))) == 2
    assert train("sd1", "--overwrite", "--seed", 1)[0] == 0  # another training, so another picture
    assert run(*flags, "--num_inference_steps", 2)[0] == 0
    assert len(list((tmp_path / "images").glob("a-sks*"))) == 3


def test_flat_pictures_are_refused(tiny_model):
    pipeline = db.load_pipeline(str(tiny_model("sd1")), torch.float32)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.zero_()
        pipeline.vae.decoder.conv_out.bias.zero_()
    look = dict(steps=1, guidance_scale=4.0, height=32, width=32, batch_size=1)
    assert db.is_flat(next(db.draw(pipeline, [("a dog", 0)], **look)))  # float32 does not overflow: so be it
    with pytest.raises(db.UserError, match="flat colour"):
        next(db.draw(pipeline.to(torch.bfloat16), [("a dog", 0)], **look))


class Decoder(torch.nn.Linear):
    dtype = property(lambda self: self.weight.dtype)


def made_up(monkeypatch):
    """What is drawn are texts, by pipelines that are none."""
    monkeypatch.setattr(db, "is_flat", lambda picture: False)
    monkeypatch.setattr(db, "family_of", lambda pipeline: db.StableDiffusion())


class SmallMemory:
    """A pipeline that holds three pictures at most."""

    device, dtype, asked = torch.device("cpu"), torch.float32, ()
    _execution_device = device  # as diffusers' pipelines say where they compute

    def __init__(self):
        self.vae = Decoder(1, 1).half()

    def __call__(self, prompt, generator, **look):
        self.asked = (*self.asked, len(prompt))
        assert self.vae.dtype == torch.float16
        if len(prompt) > 3:
            self.vae.float()  # as SDXL's pipeline does to decode
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return types.SimpleNamespace(images=[f"{text} {g.initial_seed()}" for text, g in zip(prompt, generator)])

    def maybe_free_model_hooks(self):
        pass


def test_pictures_are_drawn_as_many_at_once_as_fit(monkeypatch, capsys):
    made_up(monkeypatch)
    jobs, look = [(f"p{i}", i) for i in range(7)], dict(steps=1, guidance_scale=1, height=512, width=512)
    pipeline = SmallMemory()
    assert list(db.draw(pipeline, jobs, batch_size=None, **look)) == [f"p{i} {i}" for i in range(7)]
    assert pipeline.asked == (4, 2, 2, 2, 1) and capsys.readouterr().out.count("2 at a time") == 1
    with pytest.raises(torch.OutOfMemoryError):  # what was asked for by hand is not changed
        list(db.draw(SmallMemory(), jobs, batch_size=4, **look))


GPU = torch.device("cuda", 0)


class TinyMemory(SmallMemory):
    """A pipeline that holds no picture beside all of its parts, and `room` of them beside one part."""

    device, takes_turns = GPU, False
    _execution_device = GPU

    def __init__(self, room=3):
        super().__init__()
        self.room = room

    def enable_model_cpu_offload(self, device):
        assert device == GPU
        self.device, self.takes_turns = torch.device("cpu"), True

    def maybe_free_model_hooks(self):
        self.device = torch.device("cpu") if self.takes_turns else GPU

    def __call__(self, prompt, generator, **look):
        if not self.takes_turns or len(prompt) > self.room:
            self.device = GPU  # of the part that found no room
            self.vae.float()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().__call__(prompt, generator, **look)


@pytest.mark.parametrize("batch_size, at_once", [(None, (1, 1, 1)), (2, (2, 1))])
def test_where_no_picture_fits_the_parts_of_the_model_take_turns(batch_size, at_once, monkeypatch, capsys):
    made_up(monkeypatch)
    jobs = [(f"p{i}", i) for i in range(3)]
    look = dict(steps=1, guidance_scale=1, height=512, width=512, batch_size=batch_size)
    pipeline = TinyMemory()
    assert list(db.draw(pipeline, jobs, **look)) == [f"p{i} {i}" for i in range(3)]
    assert pipeline.asked == at_once and capsys.readouterr().out.count("take turns") == 1
    with pytest.raises(torch.OutOfMemoryError):
        list(db.draw(TinyMemory(room=0), jobs, **look))


def test_a_model_larger_than_memory_is_drawn_with_by_parts_in_turn(monkeypatch, capsys):
    class Large(TinyMemory):
        device = torch.device("cpu")

        def to(self, device):
            raise torch.OutOfMemoryError("CUDA out of memory.")
    made_up(monkeypatch)
    told = []  # where the pictures are computed, not where the parts wait
    monkeypatch.setattr(db, "threads_that_help", lambda device: told.append(device))
    pipeline, look = Large(room=2), dict(steps=1, guidance_scale=1, height=512, width=512)
    assert db.placed(pipeline, GPU) is pipeline and pipeline.takes_turns
    assert list(db.draw(pipeline, [("p", 0), ("q", 1), ("r", 2)], batch_size=None, **look)) == ["p 0", "q 1", "r 2"]
    assert pipeline.asked == (2, 1) and "2 at a time" in capsys.readouterr().out and told == [GPU]
