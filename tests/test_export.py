"""Files for other programs: whole models, LoRAs in Kohya's layout, embeddings in A1111's."""

import json
import re
import shutil

import pytest
import torch
import yaml
from conftest import KINDS, pipeline_of
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import original_checkpoint, same

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
    exact = ("--export_precision", "fp32")
    status, out, err = train("sd1", "--train_text_encoder", "--export", "files/dog.safetensors", *exact)
    assert status == 0 and "Exported files/dog.safetensors" in out, err
    status, out, err = run("--export", "later.safetensors", "--model_path", "output", *exact)
    assert status == 0 and "Stable Diffusion's own layout, all of it" in out, err
    assert (tmp_path / "later.safetensors").read_bytes() == (tmp_path / "files" / "dog.safetensors").read_bytes()
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
    def full(tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(db, "bytes_of", full)
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


# ---- precision, and what a file says of itself


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_from_a_folder_is_what_a_loaded_model_has(kind, exported):
    _, folder = exported(kind)
    parts, unet_config, open_part, scheduler = db.stored_model(str(folder), "--model_path")
    layout = db.layout_of(parts, unet_config)
    assert layout == {"demo": "sd1"}.get(kind, kind)
    assert same(dict(db.original_tensors(layout, open_part, scheduler)), original_checkpoint(pipeline_of(kind)))


@pytest.mark.parametrize("flags, kind", [([], torch.float16), (["--export_precision", "bf16"], torch.bfloat16),
                                         (["--export_precision", "fp32"], torch.float32)])
def test_a_whole_model_is_half_as_large_unless_asked_for(flags, kind, exported, run, tmp_path):
    file, folder = exported("sdxl")
    exact = load_file(file)
    for source in (folder, file):
        status, out, err = run("--export", "x.safetensors", "--model_path", source, "--overwrite", *flags)
        assert status == 0 and ("--export_precision fp32 rounds nothing" in out) == (flags == []), err
        half = load_file("x.safetensors")
        assert half.keys() == exact.keys() and all(torch.equal(half[name], exact[name].to(kind)) for name in exact)
    assert list(tmp_path.glob("*")) == [tmp_path / "x.safetensors"]


def test_numbers_that_half_precision_does_not_hold(tmp_path):
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, 1e5])}
    with pytest.raises(db.UserError, match="b has numbers that are too large for it; give bf16 or fp32"):
        db.write_file(tmp_path / "x.safetensors", lambda part: db.save_streamed(part, tensors.items(), {}, "fp16"))
    assert not list(tmp_path.iterdir())
    db.save_streamed(tmp_path / "x.safetensors", tensors.items(), {"note": "ä"}, "bf16")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["b"], tensors["b"].bfloat16())


def test_a_model_whose_names_are_older_ones_is_loaded_first(tiny_model, run, tmp_path):
    shutil.copytree(tiny_model("sd1"), tmp_path / "old")
    path = tmp_path / "old" / "vae" / "diffusion_pytorch_model.safetensors"
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(path)
    for new, old in older.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, path)
    assert any(".proj_attn." in name for name in tensors)
    for name, folder in (("old", "old"), ("new", tiny_model("sd1"))):
        assert run("--export", f"{name}.safetensors", "--model_path", folder)[0] == 0
    assert same(load_file("old.safetensors"), load_file("new.safetensors"))


def test_a_damaged_part_leaves_no_file(tiny_model, run, tmp_path):
    shutil.copytree(tiny_model("sd1"), tmp_path / "m")
    path = tmp_path / "m" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(dict(list(load_file(path).items())[1:]), path)
    status, _, err = run("--export", "x.safetensors", "--model_path", "m")
    assert status == 2 and err.count("\n") == 1 and "m: cannot be loaded (vae: it lacks some of the weights" in err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_adapters_in_another_precision(train, run, tmp_path):
    assert train("sd1", "--method", "pivotal", "--identifier", "<rex>", "--no-samples")[0] == 0
    assert not (tmp_path / "output" / "samples").exists()
    assert run("--export", "x.safetensors")[0] == 0 and run("--export", "y.safetensors", "--export_precision", "fp16")[0] == 0
    for name in ("", "-dog"):
        exact, half = load_file(f"x{name}.safetensors"), load_file(f"y{name}.safetensors")
        assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
        assert half.keys() == exact.keys() and all(torch.equal(half[key], exact[key].half()) for key in exact)
        assert db.read_header(f"x{name}.safetensors", "")[1] == db.read_header(f"y{name}.safetensors", "")[1]
    assert (tmp_path / "y-dog.safetensors").stat().st_size < 5_000  # a vector of 32 numbers


@pytest.mark.parametrize("model, name", [
    ("me/here", "here"), ("me/there@main", "me/there"), ("/home/me/d.safetensors", "d.safetensors"), ("models/of/mine", "mine")])
def test_a_files_notes_tell_nobodys_folders(model, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "here").mkdir(parents=True)
    assert db.name_of(model) == name


SD15, SD2, XL = {"cross_attention_dim": 768}, {"cross_attention_dim": [1024, 1024]}, {"cross_attention_dim": 2048}


@pytest.mark.parametrize("config, velocity, architecture, version, v2", [
    (SD15, False, "stable-diffusion-v1", "sd_v1", "False"), (SD2, False, "stable-diffusion-v2-512", "sd_v2", "True"),
    (SD2, True, "stable-diffusion-v2-768-v", "sd_v2_v", "True"),
    (XL, False, "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "False"),
    ({"cross_attention_dim": 32}, False, None, None, None)])
def test_what_a_file_says_of_itself(config, velocity, architecture, version, v2):
    subjects = [db.Subject("sks", "a dog", "a sks dog", "dog")]
    notes = db.notes_of(db.StableDiffusion(), config, {"prediction_type": "v_prediction" if velocity else "epsilon"}, "me/model@main", subjects, 512)
    assert notes["modelspec.trigger_phrase"] == "a sks dog" and notes["modelspec.resolution"] == "512x512"
    assert notes["modelspec.prediction_type"] == ("v" if velocity else "epsilon") and notes["ss_sd_model_name"] == "me/model"
    assert [notes.get(key) for key in ("modelspec.architecture", "ss_base_model_version", "ss_v2")] == [architecture, version, v2]
    lora = db.with_kind(notes, "lora", {"ss_network_dim": "4"})
    assert lora.get("modelspec.architecture") == (architecture and f"{architecture}/lora") and lora["ss_network_dim"] == "4"
    assert "ss_output_name" not in lora  # A1111 would call the file by it


def test_a_lora_says_what_it_is_for(train, run, tmp_path):
    dora = ("--method", "lora", "--rank", "2", "--lora_alpha", "3", "--use_dora")
    assert train("sd2", *dora, "--no-samples", "--resolution", "40")[0] == 0
    _, notes = db.read_header("output/kohya_lora.safetensors", "")
    assert notes["ss_network_dim"] == "2" and notes["ss_network_alpha"] == "3" and notes["modelspec.prediction_type"] == "v"
    assert notes["modelspec.resolution"] == "40x40" and notes["ss_sd_model_name"] == "sd2-0"
    assert json.loads(notes["ss_tag_frequency"]) == {"dog": {"a sks dog": 1}}
    status, out, _ = run("--export", "dog.safetensors")
    assert status == 0 and "Note: dog.safetensors: a DoRA: ComfyUI and Forge draw it otherwise" in out


def test_an_sd2_model_that_predicts_velocity_gets_a_config_beside_it(exported, run, tmp_path):
    _, folder = exported("sd2")
    (tmp_path / "x.yaml").write_text("mine")
    status, _, err = run("--export", "x.safetensors", "--model_path", folder)
    assert status == 2 and "x.yaml exists already" in err and not (tmp_path / "x.safetensors").exists()
    assert run("--export", "x.safetensors", "--model_path", folder, "--overwrite")[0] == 0
    config = yaml.safe_load((tmp_path / "x.yaml").read_text())["model"]["params"]
    assert config["parameterization"] == "v" and config["unet_config"]["params"]["context_dim"] == 1024
    assert config["cond_stage_config"]["target"] == "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"
    assert db.read_header("x.safetensors", "")[1]["modelspec.prediction_type"] == "v"
    assert run("--export", "y.safetensors", "--model_path", exported("sd1")[1])[0] == 0 and not (tmp_path / "y.yaml").exists()
