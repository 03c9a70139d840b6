"""The bundled models and the sample subject, as they ship."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image

import dreambooth_implementation as db

MODEL = REPOSITORY / "demo" / "model"
FLOW = REPOSITORY / "demo" / "model-flow"


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


@pytest.fixture(scope="module")
def flow():
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(FLOW)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """The recipe of the flow model, in a world of 16 pictures of nothing."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(REPOSITORY / "demo")
    import train_flow
    import world

    monkeypatch.setattr(world, "WORK", tmp_path)
    monkeypatch.setattr(world, "PICTURES", 12)
    folder = tmp_path / "world"
    folder.mkdir()
    np.save(folder / "pictures.npy", np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8))
    captions = [f"a {colour} dog on a blue background" for colour in world.COLOURS] * 2
    (folder / "captions.json").write_text(json.dumps([{"caption": caption} for caption in captions[:16]]))
    yield train_flow
    for name in {"train", "train_flow", "world"} - before:
        del sys.modules[name]


def test_plain_diffusers_draws_with_the_flow_model(flow):
    images = [flow(prompt, height=64, width=64, num_inference_steps=6, guidance_scale=3.0,
                   generator=torch.Generator().manual_seed(0)).images[0] for prompt in ("a dog in the snow", "a dog at night")]
    assert all(image.size == (64, 64) and not db.is_flat(image) for image in images)
    snow, night = (np.asarray(image).mean() for image in images)
    assert snow > night + 80  # it has learnt that much
    assert sum(p.stat().st_size for p in FLOW.rglob("*") if p.is_file()) < 25e6


def test_the_flow_models_vocabulary_ends_with_rare_words(flow):
    """Each is one token in a sentence, of the last fifth, and no two are as alike as the untrained vectors of one length are."""
    def ids(text):
        return flow.tokenizer(text).input_ids
    rare = [word for word in db.RARE_WORDS.split() if ids(f"a {word} dog") == [*ids("a"), ids(f" {word}")[0], *ids(" dog")]]
    assert {"phol", "zwx", "xqr", "qvk", "vkz", "wjq", "jxv", "fzw", "kqx"} <= set(rare)
    assert all(ids(f" {word}")[0] >= 0.8 * len(flow.tokenizer) for word in rare)
    table = flow.text_encoder.get_input_embeddings().weight
    lengths = [table[[ids(f" {word}")[0] for word in words]].norm(dim=-1).mean() for words in (rare, ["red", "green", "black"])]
    assert 0.5 < lengths[0] / lengths[1] < 2


def test_the_recipe_reads_a_caption_as_the_pipeline_does(flow, recipe):
    ids, mask = recipe.encode_captions(flow.tokenizer, ["a dog", "a red dog on the moon"])
    hidden = flow.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    expected = flow.encode_prompt(["a dog", "a red dog on the moon"], do_classifier_free_guidance=False)[0]
    for states, kept, right in zip(hidden, mask, expected):
        torch.testing.assert_close(states[kept], right, rtol=1e-4, atol=1e-4)


def test_the_recipes_attention_is_the_models_own(recipe):
    torch.manual_seed(0)
    transformer = recipe.new_transformer(4, 16)
    for parameter in transformer.parameters():  # or the blocks, which begin as nothing, would hide the difference
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = [torch.randn(4, 1, 8, 16) for _ in range(2)], torch.tensor([0.2, 0.9]), [torch.randn(n, 16) for n in (5, 9)]
    with torch.no_grad():
        expected = torch.stack(transformer(*inputs, return_dict=False)[0])
        recipe.plain_attention(transformer)
        torch.testing.assert_close(torch.stack(transformer(*inputs, return_dict=False)[0]), expected, rtol=1e-3, atol=1e-4)


def test_the_recipes_loss_is_of_what_the_pipeline_asks(recipe):
    """A model that knows the picture, and so the velocity, has no loss; of the two signs it is Z-Image's."""
    clean = torch.randn(3, 4, 8, 8).repeat_interleave(4, 0)[:12]
    seen = {}

    class Knowing:
        def __call__(self, noisy, times, captions, return_dict):
            x, sigma = torch.stack(noisy).squeeze(2), (1 - times).view(-1, 1, 1, 1)
            seen.update(times=times, lengths=[len(caption) for caption in captions])
            return [list(((seen["clean"] - x) / sigma).unsqueeze(2))]  # x0 - e, since x = x0 + s (e - x0)

    class Encoder:
        def __call__(self, input_ids, attention_mask, output_hidden_states):
            return type("Output", (), {"hidden_states": [None, torch.zeros(*input_ids.shape, 2), None]})

    tokens = torch.ones(12, 6, dtype=torch.long), torch.ones(12, 6, dtype=torch.bool)
    empty = torch.ones(1, 6, dtype=torch.long), torch.arange(6)[None] < 4
    indices = torch.arange(12)
    seen["clean"] = clean[indices]
    torch.manual_seed(0)
    loss_fn = recipe.flow_loss(clean, tokens, empty, torch.device("cpu"))
    loss = loss_fn({"transformer": Knowing(), "text_encoder": Encoder()}, indices)
    assert loss < 1e-6 and set(seen["lengths"]) <= {4, 6} and 0 < seen["times"].min() < 0.3 < 0.6 < seen["times"].max() < 1


def test_the_recipe_runs_and_resumes(recipe, monkeypatch, tmp_path):
    from diffusers import ZImagePipeline

    quick = {"num_inference_steps": 1, "guidance_scale": 0, "max_sequence_length": 32}
    monkeypatch.setattr(recipe, "DRAWING", recipe.DRAWING | quick)
    def train(steps):
        monkeypatch.setattr(sys, "argv", ["train_flow.py", "--steps", str(steps), "--batch_size", "2", "--no-compile",
                                          "--output", str(tmp_path / "flow"), "--sheet", str(tmp_path / "sheet.png")])
        recipe.main()
        return torch.load(tmp_path / "flow.pt")["losses"]
    first = train(1)
    assert len(first) == 1 and first == train(2)[:1]
    assert Image.open(tmp_path / "sheet.png").size == (1024, 512)
    assert ZImagePipeline.from_pretrained(tmp_path / "flow").vae.config.shift_factor == 0


def test_the_samples_are_what_their_list_says():
    folder = REPOSITORY / "instance_images"
    sums = db.read_sums(folder / db.SAMPLE_LIST)
    assert {p.name for p in folder.iterdir()} == {*sums, db.SAMPLE_LIST} and len(sums) == 6
    assert all(db.file_digest(folder / name) == digest for name, digest in sums.items())
    assert all(Image.open(folder / name).size == (128, 128) for name in sums if name.endswith(".png"))


def metric_pictures():
    """(pixels [N, 3, 64, 64] in -1 .. 1, subject number of each) of the held-out subjects."""
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
    robot, poodle = (metrics.images([db.photo_square(path) for path in sorted((demo / "subjects" / name).glob("*.png"))])[0]
                     for name in ("robot-t", "poodle-b"))
    without, with_self = db.real_row(robot)
    assert 0.6 < without < with_self < 1 and db.mean_similarity(robot, poodle) < without - 0.3
