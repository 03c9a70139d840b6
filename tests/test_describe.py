"""Captions written by the program, with a random BLIP."""

import json
import re

import pytest
import torch
from training_runs import ALONE, assert_same_weights

import dreambooth_implementation as db

WORDS = "a the dog cat lying sitting on in sofa grass moon red , .".split()


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """Folder of a random BLIP that sees 16 pixels and knows a dozen words."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

    folder = tmp_path_factory.mktemp("blip")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    text = dict(vocab_size=len(vocabulary), hidden_size=16, encoder_hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                projection_dim=8, num_attention_heads=2, max_position_embeddings=64, bos_token_id=5, eos_token_id=3,
                sep_token_id=3, pad_token_id=0,
                initializer_range=1.0)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "BlipImageProcessor", "size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3}))
    return folder


def test_captions_are_written_beside_the_photos_and_used(blip, train, photos, tmp_path):
    (photos / "1.txt").write_text("a [identifier] dog of mine")
    (photos / "2.caption").write_text("a [identifier] dog of hers")
    status, out, err = train("sd1", *ALONE, "--caption", "auto", "--caption_model", blip)
    assert status == 0, err
    written = (photos / "0.txt").read_text().strip()
    assert re.match(r"a \[identifier\] dog\b", written) and f'Caption of 0.png: "{written}"' in out
    assert (photos / "1.txt").read_text() == "a [identifier] dog of mine"
    assert sorted(path.name for path in photos.iterdir()) == ["0.png", "0.txt", "1.png", "1.txt", "2.caption", "2.png"]
    status, out, _ = train("sd1", *ALONE, "--caption", "auto", "--caption_model", "not/needed", "--output_dir", "again")
    assert status == 0 and "Caption of" not in out and "Captions: 3 of 3 photos" in out
    assert_same_weights(tmp_path / "output", tmp_path / "again")  # the first has trained on what it has written


def test_photos_of_one_name_get_captions_of_their_own(photos):
    (photos / "0.png").rename(photos / "1.jpg")
    paths = [photos / name for name in ("1.jpg", "1.png", "2.png")]
    concept = db.Concept(str(photos), "", 0, photos=tuple((path, None) for path in paths))
    assert [file.name for file in db.without_caption(concept).values()] == ["1.jpg.txt", "1.png.txt", "2.txt"]
    (photos / "2.caption").write_text("")  # a person wants none
    assert len(db.without_caption(concept)) == 2 and db.with_files(concept) == concept


@pytest.mark.parametrize("text, words", [("a dog lying on a sofa", "lying on a sofa"), ("a dog", ""),
                                         ("a dog. on the the moon .", "on the moon"), ("a dog [SEP] , in grass", "SEP , in grass")])
def test_words_are_tidied(text, words):
    assert db.tidy_continuation(text, "a dog") == words


@pytest.mark.parametrize("flags, words", [
    ([], ("--caption_model Salesforce/blip-image-captioning-base", "neither a folder")),
    (["--caption_model", "."], ("--caption_model .", "neither a folder"))])
def test_without_the_network_one_line_is_left(flags, words, train, photos):
    status, _, err = train("sd1", "--caption", "auto", *flags)
    assert status == 2 and err.count("\n") == 1 and all(word in err for word in words), err
    assert len(list(photos.iterdir())) == 3


def test_captions_can_be_left_out(train, photos):
    (photos / "1.txt").write_text("a [identifier] dog of mine")
    status, out, _ = train("sd1", *ALONE, "--caption", "none")
    assert status == 0 and "Captions" not in out
