"""Masks drawn by the program, with a random CLIPSeg."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, picture
from PIL import Image
from training_runs import ALONE

import dreambooth_implementation as db


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory):
    """Folder of a random CLIPSeg that sees 32 pixels."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    folder = tmp_path_factory.mktemp("clipseg")
    torch.manual_seed(0)
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=1.0)
    text = dict(tower, vocab_size=397, max_position_embeddings=32, bos_token_id=395, eos_token_id=396, pad_token_id=396)
    config = CLIPSegConfig(text_config=text, vision_config=dict(tower, image_size=32, patch_size=8), projection_dim=8,
                           extract_layers=[0, 1], reduce_dim=8, decoder_num_attention_heads=2,
                           decoder_intermediate_size=16, conditional_layer=0)
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "demo" / "metrics" / "clip" / name, folder)
    return folder


def settings(clipseg, folder):
    return db.Settings("train", mask="auto", mask_model=str(clipseg), mask_dir=str(folder))


def concept(photos, class_prompt="a dog", **options):
    paths = tuple((path, None) for path in sorted(photos.glob("*.png")))
    return db.Concept(str(photos), "", 0, class_prompt=class_prompt, photos=paths, **options)


def test_masks_are_what_the_network_sees_and_are_drawn_once(clipseg, photos, tmp_path, monkeypatch):
    s, cache = settings(clipseg, tmp_path / "drawn"), tmp_path / "drawn"
    db.with_drawn_masks(s, [concept(photos)], torch.device("cpu"))
    files = sorted(cache.iterdir())
    assert [path.name[0] for path in files] == ["0", "1", "2"]
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPSegForImageSegmentation

    network = CLIPSegForImageSegmentation.from_pretrained(clipseg).eval()
    pixels = AutoImageProcessor.from_pretrained(clipseg)([db.load_image(photos / "0.png")], return_tensors="pt")
    with torch.no_grad():
        seen = network(**pixels, **AutoTokenizer.from_pretrained(clipseg)(["dog"], return_tensors="pt")).logits.sigmoid()
    expected = Image.fromarray((255 * seen).round().byte().reshape(32, 32).numpy()).resize((48, 40), Image.Resampling.BILINEAR)
    assert np.array_equal(np.array(Image.open(files[0])), np.array(expected))

    monkeypatch.setattr(db, "draw_masks", lambda s, jobs, device: pytest.fail("drawn again"))
    shutil.copy(photos / "0.png", photos / "0-copy.png")
    (photos / "0.png").unlink()
    db.check_drawing_masks(settings("gone/away", cache), [concept(tmp_path)])  # of no photos
    db.with_drawn_masks(s, [concept(photos, masks={photos / "0-copy.png": "of its own"})], torch.device("cpu"))
    monkeypatch.setattr(db, "draw_masks", lambda s, jobs, device: drawn.extend(path.name for path in jobs) or [
        Image.new("L", (48, 40), 255).save(file) for _, file in jobs.values()])
    drawn = []
    picture(9).save(photos / "1.png")
    db.with_drawn_masks(s, [concept(photos)], torch.device("cpu"))
    assert drawn == ["0-copy.png", "1.png"]
    db.with_drawn_masks(s, [concept(photos, "a cat")], torch.device("cpu"))
    assert len(drawn) == 5


def likely(most, box):
    mask = Image.new("L", (40, 40))
    mask.paste(most, box)
    return mask


def test_masks_of_no_use_are_left_out_and_said(capsys):
    assert db.of_use("a.png", likely(100, (0, 0, 20, 20)), "dog").getextrema() == (0, 255) and capsys.readouterr().out == ""
    for most, box, words in ((40, (0, 0, 20, 20), "no dog was found"), (200, (0, 0, 2, 2), "no dog was found"),
                             (200, (0, 0, 40, 40), "would be all of it")):
        assert db.of_use("a.png", likely(most, box), "dog") is None
        assert words in capsys.readouterr().out


def test_a_training_draws_its_masks(clipseg, train, tmp_path, monkeypatch):
    of_use = db.of_use
    monkeypatch.setattr(db, "of_use", lambda path, mask, noun: of_use(path, likely(200, (0, 0, 20, 20)).resize(mask.size), noun))
    status, out, err = train("sd1", *ALONE, "--mask", "auto", "--mask_model", clipseg, "--mask_dir", "drawn")
    assert status == 0 and "Masks: 3 of 3 photos without one" in out, err
    assert len(list((tmp_path / "drawn").iterdir())) == 3
    assert (np.array(Image.open(tmp_path / "output" / "photos.png")) == 0).mean() < 0.5


@pytest.mark.parametrize("flags, words", [
    (["--mask_model", "nowhere/clipseg"], ("--mask_model nowhere/clipseg", "neither a folder", "HF_HUB_OFFLINE")),
    ([], ("--mask_model CIDAS/clipseg-rd64-refined", "neither a folder"))])
def test_without_the_network_one_line_is_left(flags, words, train):
    status, _, err = train("sd1", "--mask", "auto", *flags)
    assert status == 2 and err.count("\n") == 1 and all(word in err for word in words), err


def test_a_network_of_another_kind_is_refused(networks, train, photos):
    status, _, err = train("sd1", "--mask", "auto", "--mask_model", networks / "vit")
    assert status == 2 and "of type vit; give one of type clipseg" in err
    with pytest.raises(db.UserError, match="--class_prompt is missing"):
        db.drawn_masks(settings("none", "none"), [concept(photos, None)])
