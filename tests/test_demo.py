"""The bundled model and the sample subject, as they ship."""

import pytest
import torch
from conftest import REPOSITORY
from PIL import Image

import dreambooth_implementation as db

MODEL = REPOSITORY / "demo" / "model"


def test_plain_diffusers_draws_with_the_bundled_model():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(MODEL)
    image = pipeline("a dog on the moon", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64) and not db.is_flat(image)
    assert sum(p.stat().st_size for p in MODEL.rglob("*") if p.is_file()) < 40e6


@pytest.mark.parametrize("identifier", ["sks", "ohwx", "phol", "shs"])
def test_bundled_tokenizer_keeps_rare_identifiers_whole(identifier):
    tokenizer = db.load_models(str(MODEL), torch.float32).tokenizers[0]
    assert len(tokenizer.tokenize(identifier)) == 1
    assert tokenizer.unk_token_id not in tokenizer(f"a {identifier} dog").input_ids[1:-1]


def test_the_samples_are_what_their_list_says():
    folder = REPOSITORY / "instance_images"
    sums = db.read_sums(folder / db.SAMPLE_LIST)
    assert {p.name for p in folder.iterdir()} == {*sums, db.SAMPLE_LIST} and len(sums) == 6
    assert all(db.file_digest(folder / name) == digest for name, digest in sums.items())
    assert all(Image.open(folder / name).size == (128, 128) for name in sums if name.endswith(".png"))
