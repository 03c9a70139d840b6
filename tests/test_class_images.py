"""Class images are never stale, and only what is missing is drawn."""

import io

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from training_runs import settings

import dreambooth_implementation as db


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
    monkeypatch.setattr(db.SmallStableDiffusion, "class_steps", (2, 2))
    monkeypatch.setattr(db, "draw", lambda pipeline, jobs, **look: seeds.extend(seed for _, seed in jobs)
                        or draw(pipeline, jobs, **look))
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
    families = db.StableDiffusion(), db.StableDiffusionXL(), db.SmallStableDiffusion()
    looks = {family.name: db.class_image_look(settings(), family) for family in families}
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


def test_a_flat_class_image_is_drawn_from_another_seed(tmp_path, tiny_model, drawn, monkeypatch):
    draw = db.draw

    def flat_at_seed_1(pipeline, jobs, **options):
        for (_, seed), image in zip(jobs, draw(pipeline, jobs, **options)):
            yield Image.new("RGB", image.size) if seed == 1 else image

    monkeypatch.setattr(db, "draw", flat_at_seed_1)
    paths = class_images(tmp_path, tiny_model("sd1"))
    assert drawn == [0, 1, 2, 3, 1 + 2**32] and not any(db.is_flat(Image.open(p)) for p in paths)


def test_class_images_leave_no_hooks_on_a_model_that_is_to_train(flags, run, monkeypatch):
    """Without half precision its own pipeline draws them."""
    offloaded, draw, train_step = [], db.draw, db.train_step

    def short_of_memory(pipeline, *args, title="drawing", **look):
        if title == "class images":
            pipeline.enable_model_cpu_offload(device="cpu")
            offloaded.append(pipeline)
        return draw(pipeline, *args, title=title, **look)

    def watched(run, step):
        assert offloaded == [run.models.pipeline] and not hasattr(offloaded[0].unet, "_hf_hook")
        return train_step(run, step)
    monkeypatch.setattr(db, "draw", short_of_memory)
    monkeypatch.setattr(db, "train_step", watched)
    status, _, err = run(*flags("full"), "--steps", 1, "--validation_prompt", "a dog")
    assert status == 0, err
