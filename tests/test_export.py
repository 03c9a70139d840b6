"""Files for other programs: whole models, LoRAs in Kohya's layout, embeddings in A1111's."""

import json
import re
import shutil

import pytest
import torch
from conftest import KINDS
from PIL import Image
from safetensors.torch import load_file
from training_runs import same

import dreambooth_implementation as db


@pytest.mark.parametrize("kind", KINDS)
def test_plain_diffusers_draws_the_same_from_the_exported_file(kind, exported):
    import diffusers

    file, folder = exported(kind)
    ours = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs = type(ours).from_single_file(file, config=str(folder))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if part in ours.components:
            assert same(ours.components[part].state_dict(), theirs.components[part].state_dict()), part
    one, two = (pipeline("a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0]
                for pipeline in (ours, theirs))
    assert one.tobytes() == two.tobytes()


def test_export_while_training_and_afterwards(train, run, tmp_path):
    status, out, err = train("sd1", "--train_text_encoder", "--export", "files/dog.safetensors")
    assert status == 0 and "Exported files/dog.safetensors" in out, err
    status, out, err = run("--export", "later.safetensors", "--model_path", "output")
    assert status == 0 and "Stable Diffusion's own layout" in out, err
    assert same(load_file("later.safetensors"), load_file("files/dog.safetensors"))
    trained = load_file("output/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert torch.equal(load_file("later.safetensors")["model.diffusion_model.input_blocks.0.0.weight"], trained)
    assert not list(tmp_path.rglob("*.part"))
    shutil.copy("later.safetensors", "output.safetensors")  # beside the folder whose configs it needs
    for source, folder in (("output", "a"), ("output.safetensors", "b")):
        status, out, err = run("--infer", "--model_path", source, "--prompt", "a sks dog", "--num_images", 1,
                               "--num_inference_steps", 2, "--height", 32, "--width", 32, "--image_dir", folder)
        assert status == 0, err
    assert Image.open("a/a-sks-dog-0.png").tobytes() == Image.open("b/a-sks-dog-0.png").tobytes()


def test_an_exported_file_is_replaced_only_on_request(run, tiny_model, tmp_path):
    (tmp_path / "dog.safetensors").write_bytes(b"mine")
    flags = ["--export", "dog.safetensors", "--model_path", tiny_model("sd1")]
    status, _, err = run(*flags)
    assert status == 2 and "exists already" in err and (tmp_path / "dog.safetensors").read_bytes() == b"mine"
    assert run(*flags, "--overwrite")[0] == 0 and load_file("dog.safetensors")


def test_a_failed_export_leaves_nothing(run, tiny_model, tmp_path, monkeypatch):
    import safetensors.torch

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    status, _, err = run("--export", "dog.safetensors", "--model_path", tiny_model("sd1"))
    assert status == 2 and err.count("\n") == 1 and "No space left" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, said", [
    (["--export", "dog.ckpt", "--model_path", "{model}"], "must end in .safetensors"),
    (["--export", "x/dog.safetensors", "--model_path", "nowhere"], "--model_path nowhere"),
    (["--export", "dog.safetensors", "--steps", "3"], "--steps belongs to --train and has no meaning with --export"),
    (["--infer", "--export", "dog.safetensors", "--model_path", "{model}"], "--export belongs to --train"),
    (["--export", "file/dog.safetensors", "--model_path", "{model}"], "file is a file"),
    (["--train", "--instance_data_dir", "{photos}", "--class_prompt", "a dog", "--export", "dog.bin"], "--export dog.bin"),
    ([], "--train, --infer, --evaluate or --export"),
])
def test_wrong_exports_are_one_line(flags, said, run, photos, tiny_model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(db, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    status, _, err = run(*[flag.format(model=tiny_model("sd1"), photos=photos) for flag in flags])
    assert status == 2 and err.count("\n") == 1 and said in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "photos"]


def test_a_lora_is_exported_in_kohyas_layout(train, run, tmp_path):
    assert train("sd1", "--method", "lora", "--rank", "2", "--export", "dog.safetensors")[0] == 0
    assert (tmp_path / "dog.safetensors").read_bytes() == (tmp_path / "output" / "kohya_lora.safetensors").read_bytes()
    names = load_file("dog.safetensors")
    assert names and all(re.fullmatch(r"lora_unet_\w+\.(lora_down\.weight|lora_up\.weight|alpha)", name) for name in names)
    (tmp_path / "output" / "kohya_lora.safetensors").unlink()
    status, _, err = run("--export", "again.safetensors")
    assert status == 2 and "there is no kohya_lora.safetensors" in err and not (tmp_path / "again.safetensors").exists()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_an_embedding_is_exported_in_a1111s_layout(family, train, run, tmp_path):
    status, _, err = train(family, "--method", "textual_inversion", "--num_vectors", "2", "--identifier", "<rex>")
    assert status == 0, err
    status, out, err = run("--export", "rex.safetensors")
    assert status == 0 and 'the embedding of "<rex>"' in out, err
    vectors, own = load_file("rex.safetensors"), load_file("output/learned_embeds.safetensors")
    assert list(vectors) == (["emb_params"] if family == "sd1" else ["clip_g", "clip_l"])
    assert all(tensor.shape == (2, 32) for tensor in vectors.values())
    assert torch.equal(vectors[list(vectors)[0]], own["<rex>" if family == "sd1" else "clip_g"])
    status, _, err = run("--infer", "--model_path", "rex.safetensors", "--model_name", json.loads(
        (tmp_path / "output" / "dreambooth.json").read_text())["base_model"], "--prompt", "a rex", "--num_images", 1,
        "--num_inference_steps", 1, "--height", 32, "--width", 32)
    assert status == 0, err


def test_pivotal_tuning_is_exported_as_two_files(train, run, tmp_path):
    assert train("sd1", "--method", "pivotal", "--rank", "2", "--identifier", "<rex>")[0] == 0
    (tmp_path / "x-dog.safetensors").write_bytes(b"mine")
    status, _, err = run("--export", "x.safetensors")
    assert status == 2 and "x-dog.safetensors exists" in err and not (tmp_path / "x.safetensors").exists()
    assert run("--export", "x.safetensors", "--overwrite")[0] == 0
    assert any(name.endswith("lora_down.weight") for name in load_file("x.safetensors"))
    assert list(load_file("x-dog.safetensors")) == ["emb_params"]
