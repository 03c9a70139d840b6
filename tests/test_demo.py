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


def metric_pictures():
    """(pixels [N, 3, 64, 64] in -1 .. 1, subject number of each) of the held-out subjects."""
    import numpy as np

    pixels, owner = [], []
    for number, folder in enumerate(sorted(p for p in (REPOSITORY / "demo" / "subjects").iterdir() if p.is_dir())):
        for path in sorted(folder.glob("*.png")):
            pixels.append(np.asarray(Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BOX)))
            owner.append(number)
    return torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(owner)


def test_metric_networks_load_and_tell_subjects_apart():
    from transformers import CLIPModel, ViTModel

    metrics = REPOSITORY / "demo" / "metrics"
    assert sum(p.stat().st_size for p in metrics.rglob("*") if p.is_file()) < 15e6
    pixels, owner = metric_pictures()
    assert len(owner.unique()) == 13 and len(owner) == 65
    vit = ViTModel.from_pretrained(metrics / "vit", add_pooling_layer=False, dtype=torch.float32).eval()
    clip = CLIPModel.from_pretrained(metrics / "clip", dtype=torch.float32).eval()
    with torch.no_grad():
        vectors = {"vit": vit(pixels).last_hidden_state[:, 0], "clip": clip.get_image_features(pixels).pooler_output}
    same = owner[:, None] == owner[None]
    for name, vector in vectors.items():
        vector = torch.nn.functional.normalize(vector, dim=-1)
        similarity = vector @ vector.T
        within, across = similarity[same & ~torch.eye(65, dtype=torch.bool)], similarity[~same]
        auc = (within[:, None] > across[None]).float().mean()
        assert auc > {"vit": 0.97, "clip": 0.75}[name], (name, auc)


def test_metric_clip_names_what_artists_it_has_not_seen_drew():
    from transformers import CLIPModel, CLIPTokenizer

    metrics, subjects = (REPOSITORY / "demo" / name for name in ("metrics", "subjects"))
    prompts = [path.read_text().strip() for path in sorted(subjects.glob("*/class_prompt.txt"))]
    classes = sorted(set(prompts))
    pixels, owner = metric_pictures()
    clip = CLIPModel.from_pretrained(metrics / "clip", dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(metrics / "clip")(classes, padding=True, return_tensors="pt")
    with torch.no_grad():
        text = torch.nn.functional.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1)
        guess = (clip.get_image_features(pixels).pooler_output @ text.T).argmax(1)
    right = torch.tensor([classes.index(prompts[number]) for number in owner])
    assert (guess == right).float().mean() > 0.8


def test_the_real_row_of_held_out_subjects(tmp_path):
    """With the bundled networks: pictures of one drawing are alike, those of another are not."""
    demo = REPOSITORY / "demo"
    metrics = db.load_metrics(str(demo / "metrics" / "vit"), str(demo / "metrics" / "clip"), torch.device("cpu"))
    robot, poodle = (metrics.images([db.load_square(path) for path in sorted((demo / "subjects" / name).glob("*.png"))])[0]
                     for name in ("robot-t", "poodle-b"))
    without, with_self = db.real_row(robot)
    assert 0.6 < without < with_self < 1 and db.mean_similarity(robot, poodle) < without - 0.3
