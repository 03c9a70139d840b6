"""Pictures of an evaluation are drawn once, and the scores are those of the files."""

import shutil

import pytest
import torch
from PIL import Image

import dreambooth_implementation as db


def test_two_models_are_compared_and_nothing_is_drawn_twice(evaluate, recorded, tmp_path, photos):
    recorded("output"), recorded("other", seed=1)
    out, result = evaluate("--model_path", "output", "--model_path", "other")
    first, second = result["models"]
    assert [m["model_path"] for m in result["models"]] == ["output", "other"] and first["model_hash"] != second["model_hash"]
    assert first["pictures_drawn"] == second["pictures_drawn"] == 8  # two prompts of two, and as many of the class
    assert first["scores"] != second["scores"] and first["record"]["subjects"][0]["identifier"] == "sks"
    folder = tmp_path / "evaluation" / "output" / "dog"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [f"{n}-{seed}.png" for n in ("00-a-sks-dog-on-the-moon", "01-a-red-sks-dog") for seed in (0, 1)]
        + [f"class-{seed}.png" for seed in range(4)])
    assert db.png_parameters(folder / "01-a-red-sks-dog-1.png").startswith("a red sks dog\nSteps: 2, Sampler: PNDM")
    table = [line.split() for line in out.splitlines() if line.startswith(("real photos", "output ", "other "))]
    assert [row[:1] for row in table] == [["real"], ["output"], ["other"]]
    assert table[1][1:3] == [f"{first['scores'][name]:.3f}" for name in ("dino", "clip_i")]
    assert table[0][2] == f"{first['subjects'][0]['real']['dino']:.3f}"
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    (folder / "class-2.png").unlink()
    again = evaluate("--model_path", "output", "--model_path", "other")[1]
    assert [m["pictures_drawn"] for m in again["models"]] == [1, 0]
    assert [m["scores"] for m in again["models"]] == [m["scores"] for m in result["models"]]
    assert sum(p.stat().st_mtime_ns != before[p] for p in folder.iterdir()) == 1
    shutil.rmtree(tmp_path / "output")
    recorded("output", seed=1)  # other weights of the same name: every picture is drawn anew
    assert evaluate("--model_path", "output", "--num_images", 1)[1]["models"][0]["pictures_drawn"] == 4
    assert not list((tmp_path / "evaluation").rglob("*.part"))


def test_scores_are_those_of_the_pictures_on_disk(evaluate, recorded, tmp_path, photos, networks):
    recorded("output")
    out, result = evaluate("--model_path", "output")
    metrics = db.load_metrics(str(networks / "vit"), str(networks / "clip"), torch.device("cpu"))
    folder = tmp_path / "evaluation" / "output" / "dog"

    def embedded(paths):
        return metrics.images([Image.open(path).convert("RGB") for path in paths])

    real = metrics.images([Image.open(path).crop((4, 0, 44, 40)) for path in sorted(photos.iterdir())])
    drawn, of_class = embedded(sorted(folder.glob("0*.png"))), embedded(sorted(folder.glob("class*.png")))
    captions = metrics.texts(["a dog on the moon", "a red dog"])
    raw = metrics.texts(["a sks dog on the moon", "a red sks dog"])
    scores = result["models"][0]["scores"]
    assert scores["dino"] == pytest.approx((drawn[0] @ real[0].T).mean().item(), abs=1e-5)
    assert scores["clip_i"] == pytest.approx((drawn[1] @ real[1].T).mean().item(), abs=1e-5)
    assert scores["pres"] == pytest.approx((of_class[0] @ real[0].T).mean().item(), abs=1e-5)
    assert scores["clip_t"] == pytest.approx((drawn[1] * captions.repeat_interleave(2, 0)).sum(1).mean().item(), abs=1e-5)
    assert scores["clip_t_raw"] == pytest.approx((drawn[1] * raw.repeat_interleave(2, 0)).sum(1).mean().item(), abs=1e-5)
    pairs = [torch.dot(drawn[0][i], drawn[0][i + 1]).item() for i in (0, 2)]
    assert scores["div_dino"] == pytest.approx(1 - sum(pairs) / 2, abs=1e-5) and scores["div"] is None
    entry = result["models"][0]["subjects"][0]
    assert entry["prompts"][1]["caption"] == "a red dog" and len(entry["prompts"][1]["files"]) == 2
    assert entry["real"]["dino"] == pytest.approx(((real[0] @ real[0].T).sum().item() - 3) / 6, abs=1e-5)
    sheet = Image.open(tmp_path / "evaluation" / "output" / "sheet.png")
    assert sheet.height == 3 * 34 and sheet.width == 300 + 3 * 34  # the photos and two prompts, 32 pixels and a gap each


def test_an_interrupted_drawing_leaves_no_half_picture(evaluate, recorded, tmp_path, monkeypatch):
    recorded("output")
    save, saved = Image.Image.save, []

    def fail_at_third(image, path, *args, **options):
        save(image, path, *args, **options)
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", fail_at_third)
    with pytest.raises(AssertionError):
        evaluate("--model_path", "output")  # it ends with status 130
    folder = tmp_path / "evaluation" / "output" / "dog"
    assert len(list(folder.iterdir())) == 2 and not (tmp_path / "evaluation" / "evaluation.json").exists()
    monkeypatch.setattr(Image.Image, "save", save)
    assert evaluate("--model_path", "output")[1]["models"][0]["pictures_drawn"] == 6
