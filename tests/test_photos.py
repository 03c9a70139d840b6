"""The folder of photos: what counts, what is left out, and what is doubted."""

import os

import pytest
import torch
from conftest import picture
from training_runs import settings

import dreambooth_implementation as db


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
