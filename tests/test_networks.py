"""The networks that measure pictures."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, picture
from PIL import Image
from torch.nn.functional import normalize

import dreambooth_implementation as db


def test_networks_embed_as_transformers_says(networks):
    from transformers import CLIPModel, ViTModel

    metrics = db.load_metrics(str(networks / "vit"), str(networks / "clip"), torch.device("cpu"))
    pictures = [picture(seed, size=(16, 16)) for seed in range(db.METRIC_BATCH + 2)]
    pixels = torch.tensor(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
    dino, clip = metrics.images(pictures)
    with torch.no_grad():
        vit = ViTModel.from_pretrained(networks / "vit", add_pooling_layer=False)
        model = CLIPModel.from_pretrained(networks / "clip")
        assert torch.allclose(dino, normalize(vit(pixels).last_hidden_state[:, 0], dim=-1), atol=1e-4)
        assert torch.allclose(clip, normalize(model.get_image_features(pixels).pooler_output, dim=-1), atol=1e-4)
        one = torch.tensor([metrics.tokenizer("a red dog").input_ids])
        expected = normalize(model.get_text_features(one).pooler_output, dim=-1)
    texts = metrics.texts(["a red dog", "a dog on the moon in the city at night"])
    assert torch.allclose(texts[:1], expected, atol=1e-5)  # the padding beside a longer prompt changes nothing
    assert torch.allclose(texts.norm(dim=-1), torch.ones(2)) and dino.dtype == torch.float32


def test_dino_sees_what_its_own_evaluation_shows_it(networks, tmp_path, capsys):
    """The hub's preprocessor of facebook/dino-vits16 is not used as it is; other folders' are."""
    shutil.copytree(networks / "vit", tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(
        {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor", "resample": 2,
         "size": 224, **db.IMAGENET}))
    metrics = db.load_metrics(str(tmp_path / "vit"), str(networks / "clip"), torch.device("cpu"))
    assert "DINO's own evaluation" in capsys.readouterr().out
    image = picture(0, size=(640, 512))
    expected = image.resize((320, 256), Image.Resampling.BICUBIC).crop((48, 16, 272, 240))
    expected = (np.asarray(expected) / 255 - db.IMAGENET["image_mean"]) / db.IMAGENET["image_std"]
    pixels = metrics.prepare_dino([image], return_tensors="pt").pixel_values[0].permute(1, 2, 0).numpy()
    assert pixels.shape == (224, 224, 3) and np.abs(pixels - expected).max() < 1e-4
    db.load_metrics(str(networks / "vit"), str(networks / "clip"), torch.device("cpu"))
    assert "as its own preprocessor says" in capsys.readouterr().out


def test_networks_come_from_the_cache_first_and_only_as_safetensors():
    asked = []

    class Network(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, name, **options):
            asked.append(options)
            if options["local_files_only"]:
                raise OSError("not in the cache")
            return cls(), {"missing_keys": set()}

    db.load_network("--dino_model", "facebook/dino-vits16", Network)
    assert [options["local_files_only"] for options in asked] == [True, False]
    assert all(options["use_safetensors"] and options["revision"] == "refs/pr/1" for options in asked)


def test_lpips_measures_where_it_is_installed(monkeypatch):
    class Fake(torch.nn.Module):
        def __init__(self, net, verbose):
            assert net == "alex"
            super().__init__()

        def forward(self, a, b):
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")  # monkeypatch puts it back
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Fake))
    distance = db.load_lpips(torch.device("cpu"))
    assert distance(torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)).tolist() == [1.0, 1.0]


def test_missing_lpips_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert db.load_lpips(torch.device("cpu")) is None
    assert "DIV: unavailable" in capsys.readouterr().out


def test_the_bundled_model_has_its_own_metrics(tiny_model, tmp_path):
    s, demo = db.Settings("evaluate"), REPOSITORY / "demo"
    assert [db.Path(name).resolve() for name in db.metric_models(s, [str(demo / "model"), str(tiny_model("sd1"))])] == [
        demo / "metrics" / "vit", demo / "metrics" / "clip"]
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        config = {name: demo / "metrics" / part / "config.json" for name, part in (
            ("facebook/dino-vits16", "vit"), ("openai/clip-vit-base-patch32", "clip"))}
        patch.setattr(db, "hub_file", lambda name, file, **options: asked.append((name, options)) or config[name])
        assert db.metric_models(s, [str(demo / "model"), str(tmp_path)]) == tuple(config)
    assert [options["revision"] for _, options in asked] == ["refs/pr/1", "refs/pr/15"]  # where the hub has safetensors


@pytest.mark.parametrize("damage, flag", [
    ("vit/model.safetensors", "--dino_model"), ("clip/model.safetensors", "--clip_model"),
    ("clip/preprocessor_config.json", "--clip_model"), ("weights", "--dino_model")])
def test_networks_that_cannot_be_loaded_whole_are_refused(damage, flag, run, recorded, networks, tmp_path, monkeypatch):
    recorded("output")
    shutil.copytree(networks, tmp_path / "networks")
    if damage == "weights":  # transformers itself would make up what is missing
        from safetensors.torch import load_file, save_file

        path = tmp_path / "networks" / "vit" / "model.safetensors"
        tensors = load_file(path)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, path, {"format": "pt"})
    else:
        (tmp_path / "networks" / damage).unlink()
    monkeypatch.setattr(db, "load_pipeline", lambda *args: pytest.fail("the diffusion model was loaded first"))
    status, _, err = run("--evaluate", "--dino_model", "networks/vit", "--clip_model", "networks/clip")
    assert status == 2 and err.startswith(f"error: {flag} networks/") and err.count("\n") == 1, err
