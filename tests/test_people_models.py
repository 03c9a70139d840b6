"""Models as they lie on people's disks, and adapters as other programs write them: taken for what they are, or one line."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_pipeline
from safetensors.torch import load_file, save_file
from training_runs import original_checkpoint

import dreambooth_implementation as db

QUICK = ["--class_prompt", "a dog", "--num_class_images", "1", "--num_inference_steps", "1", "--steps", "2"]
DRAW = ["--num_images", "1", "--num_inference_steps", "1"]


@pytest.fixture
def copy_of(tiny_model, tmp_path, monkeypatch):
    """copy_of(family, name, part={key: value, ...}) -> a copy of a tiny model, a folder in the working folder, with other configs."""
    monkeypatch.chdir(tmp_path)

    def copy(family="sd1", name="model", **edits):
        folder = Path(name)
        shutil.copytree(tiny_model(family), folder)
        for part, values in edits.items():
            file = folder / ("model_index.json" if part == "index" else f"{part}/{db.CONFIGS[part]}")
            file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
        return folder

    return copy


@pytest.fixture
def train(run, photos):
    return lambda *flags: run("--train", "--instance_data_dir", photos, *QUICK, *flags)


def refused(what, *said):
    """The one line of the UserError that `what` raises; it says all of `said`."""
    with pytest.raises(db.UserError) as problem:
        what()
    line = str(problem.value)
    assert "\n" not in line and all(text in line for text in said), line
    return line


def load(name, **options):
    return db.load_pipeline(str(name), torch.float32, **options)


def noise_of(models):
    return models.family.noise(db.Settings("train"), models.pipeline, 32)


def weights_of(pipeline):
    return {f"{part}.{name}": tensor for part in ("unet", "vae", "text_encoder", "text_encoder_2") if pipeline.components.get(part)
            for name, tensor in pipeline.components[part].state_dict().items()}


def same(ones, others):
    return ones.keys() == others.keys() and all(torch.equal(ones[name], others[name]) for name in ones)


def picture_of(pipeline, prompt="a dog", steps=2, **options):
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipeline(prompt, num_inference_steps=steps, generator=generator, output_type="np", **options).images[0])


# ---- weights in other variants


def as_variant(folder, variant, parts=("unet", "vae", "text_encoder"), dtype=torch.float16):
    for part in parts:
        stem = db.WEIGHTS[part]
        save_file({name: tensor.to(dtype) for name, tensor in load_file(folder / part / f"{stem}.safetensors").items()},
                  folder / part / f"{stem}.{variant}.safetensors", {"format": "pt"})
        (folder / part / f"{stem}.safetensors").unlink()


@pytest.mark.parametrize("variant, parts, said", [
    ("fp16", ("unet", "vae", "text_encoder"), "its unet and vae and text_encoder only as the variant fp16, that is, in half precision"),
    ("fp16", ("unet",), "its unet only as the variant fp16, that is, in half precision"),
    ("bf16", ("text_encoder",), "its text_encoder only as the variant bf16, that is, in half precision"),
    ("non_ema", ("unet",), "its unet only as the variant non_ema;")])
def test_a_variant_is_read_where_it_is_all_there_is(variant, parts, said, copy_of, tiny_model, capsys):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(variant, torch.float32)
    folder = copy_of(name=f"{variant}-{len(parts)}")
    as_variant(folder, variant, parts, dtype)
    assert db.find_model(str(folder), "--model_name") == str(folder)
    pipeline, plain = load(folder), weights_of(load(tiny_model("sd1")))
    assert said in capsys.readouterr().out
    for name, tensor in weights_of(pipeline).items():
        expected = plain[name].to(dtype).float() if name.split(".")[0] in parts else plain[name]
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected), name


def test_plain_weights_go_before_variants(copy_of, tiny_model, capsys):
    folder = copy_of()
    save_file({"x": torch.zeros(1)}, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert same(weights_of(load(folder)), weights_of(load(tiny_model("sd1")))) and "variant" not in capsys.readouterr().out


def test_sharded_weights_of_a_variant(copy_of, tiny_model):
    folder = copy_of()
    shutil.rmtree(folder / "unet")
    load(tiny_model("sd1")).unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="100KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    assert same(weights_of(load(folder)), weights_of(load(tiny_model("sd1"))))
    lost = sorted((folder / "unet").glob("*-of-*"))[1]
    lost.unlink()
    refused(lambda: load(folder), lost.name, "is missing")


def test_a_lora_and_words_on_a_model_in_half_precision(train, copy_of, run, tmp_path):
    folder = copy_of()
    as_variant(folder, "fp16")
    status, out, err = train("--model_name", folder, "--method", "pivotal")
    assert status == 0 and out.count("half precision") == 1, err
    assert 'from_pretrained("model", variant="fp16")' in (tmp_path / "output" / "README.md").read_text()
    status, _, err = run("--infer", *DRAW)
    assert status == 0, err


# ---- folders that are not whole, or hold something else


def gone(folder, pattern, other=None):
    for path in list(folder.glob(pattern)):
        path.rename(path.with_name(other)) if other else path.unlink()


BROKEN = {
    "flax": (lambda f: gone(f, "*/*.safetensors", "flax_model.msgpack"), "Flax's format"),
    "onnx": (lambda f: gone(f, "*/*.safetensors", "model.onnx"), "ONNX's format"),
    "openvino": (lambda f: gone(f, "*/*.safetensors", "openvino_model.bin"), "OpenVINO's format"),
    "pickles": (lambda f: gone(f, "*/*.safetensors", "pytorch_model.bin"), ".bin files, which may run code"),
    "a pickled vae": (lambda f: gone(f, "vae/*.safetensors", "diffusion_pytorch_model.bin"), ".bin files, which may run code"),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "unet: no config.json"),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder: no config.json"),
    "no weights": (lambda f: gone(f, "text_encoder/*.safetensors"), "text_encoder: no model.safetensors"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler: no scheduler_config.json"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "files of its tokenizer are missing"),
    "two parts gone": (lambda f: [shutil.rmtree(f / part) for part in ("unet", "vae")], "unet: no config.json; vae: no config.json"),
    "a folder for a file": (lambda f: [gone(f, "unet/*.safetensors"), (f / "unet/diffusion_pytorch_model.safetensors").mkdir()],
                            "unet: no diffusion_pytorch_model.safetensors"),
    "config of text": (lambda f: (f / "unet/config.json").write_text('"x"'), "unet/config.json cannot be read"),
    "config cut off": (lambda f: (f / "vae/config.json").write_text('{"a": '), "vae/config.json cannot be read"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_a_folder_lacks_is_said_before_anything_loads(kind, copy_of, monkeypatch):
    folder, (break_it, said) = copy_of(), BROKEN[kind]
    break_it(folder)
    monkeypatch.setattr(db, "load_part", lambda *args: pytest.fail("a part was loaded"))
    refused(lambda: db.find_model(str(folder), "--model_name"), "--model_name model", said)


FILES = {"empty": (lambda b: b"", "it is empty"), "cut in half": (lambda b: b[:len(b) // 2], "cannot be read"),
         "cut in its header": (lambda b: b[:500], "it is cut off"),
         "damaged": (lambda b: b"\xff" * 100 + b[100:], "cannot be read"),
         "a pointer of git-lfs": (lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "git lfs pull"),
         "a pickle": (lambda b: b"\x80\x04" + b, "a pickle under another name"),
         "a pickle of torch": (lambda b: b"PK\x03\x04" + b, "a pickle under another name"),
         "a web page": (lambda b: b"<!DOCTYPE html><html>...</html>", "it is a web page")}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_weights_that_are_none(kind, copy_of):
    folder, (damage, said) = copy_of(), FILES[kind]
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused(lambda: db.find_model(str(folder), "--model_path"), f"--model_path {file}", said)
    refused(lambda: db.find_adapters(db.parse_settings(["--infer", "--adapter", str(file)])), f"--adapter {file}", said)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_a_part_lacks_are_never_made_up(part, copy_of):
    folder = copy_of()
    file = folder / part / f"{db.WEIGHTS[part]}.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[3]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, {"format": "pt"})
    refused(lambda: load(folder), f"{part}: it lacks some of the weights", lost.removeprefix("text_model."))


def test_tensors_that_no_config_knows_are_said(copy_of, tiny_model, capsys):
    folder = copy_of()
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"extra.weight": torch.zeros(3)}, file, {"format": "pt"})
    assert same(weights_of(load(folder)), weights_of(load(tiny_model("sd1"))))
    assert "1 tensors of its unet are not in its config and are left out, such as extra.weight" in capsys.readouterr().out


def swapped(folder, part, other):
    shutil.rmtree(folder / part)
    shutil.copytree(other, folder / part) if isinstance(other, Path) else other.save_pretrained(folder / part)


def wide_text_encoder(tiny_model):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**{**load(tiny_model("sd1")).text_encoder.config.to_dict(), "hidden_size": 48}))


def other_unet(tiny_model, **config):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config({**load(tiny_model("sd1")).unet.config, **config})


def other_vae(tiny_model, **config):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config({**load(tiny_model("sd1")).vae.config, **config})


SWAPPED = {
    "a wider text encoder": ("text_encoder", wide_text_encoder, "attends to 32 text channels, but its text encoder makes 48"),
    "an SDXL UNet": ("unet", lambda tiny: tiny("sdxl") / "unet", "its UNet is one of SDXL, but the rest is not"),
    "an inpainting UNet": ("unet", lambda tiny: other_unet(tiny, in_channels=9), "takes 9 channels (an inpainting model?)"),
    "a depth UNet": ("unet", lambda tiny: other_unet(tiny, in_channels=5), "takes 5 channels (a depth model?)"),
    "an upscaler's UNet": ("unet", lambda tiny: other_unet(tiny, num_class_embeds=10), "an upscaler?"),
    "a VAE of 8 channels": ("vae", lambda tiny: other_vae(tiny, latent_channels=8), "its VAE makes 8")}


@pytest.mark.parametrize("kind", SWAPPED)
def test_parts_of_different_models_are_one_line_for_training_and_drawing(kind, copy_of, tiny_model):
    folder, (part, other, said) = copy_of(), SWAPPED[kind]
    swapped(folder, part, other(tiny_model))
    refused(lambda: db.find_model(str(folder), "--model_path"), "--model_path model", said)
    refused(lambda: load(folder), said)


def test_text_encoder_weights_of_another_size_than_the_config(copy_of, tiny_model):
    folder = copy_of()
    save_file({name: tensor for name, tensor in wide_text_encoder(tiny_model).state_dict().items()},
              folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    refused(lambda: load(folder), "text_encoder: its weights are of another size than its config says", "embedding")


def test_sdxl_with_one_text_encoder(copy_of):
    folder = copy_of("sdxl")
    shutil.rmtree(folder / "text_encoder_2")
    refused(lambda: db.find_model(str(folder), "--model_name"), "text_encoder_2: no config.json")
    refiner = copy_of("sdxl", "refiner", index={"text_encoder": [None, None], "tokenizer": [None, None]})
    refused(lambda: db.find_model(str(refiner), "--model_name"), "lists no text_encoder (an SDXL refiner?)")


def test_folders_that_are_parts_are_named(copy_of, tiny_model, tmp_path):
    folder = copy_of()
    for part, kind in (("vae", "a VAE alone"), ("unet", "a UNet alone"), ("text_encoder", "a text encoder alone")):
        refused(lambda: db.find_model(f"model/{part}", "--model_name"), kind, "such as model")
    (folder / "control").mkdir()
    (folder / "control" / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    refused(lambda: db.find_model("model/control", "--model_name"), "a ControlNet")
    Path("lora").mkdir()
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, "lora/pytorch_lora_weights.safetensors")
    refused(lambda: db.find_model("lora", "--model_name"), "a LoRA", "--adapter lora")
    Path("files").mkdir()
    save_file({"x": torch.zeros(1)}, "files/m.safetensors")
    refused(lambda: db.find_model("files", "--model_name"), "give one of them, such as files/m.safetensors")


def test_quantized_parts_are_refused(copy_of):
    folder = copy_of(unet={"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    refused(lambda: db.find_model(str(folder), "--model_name"), "its unet is quantized")


# ---- configs and tokenizers as they are


@pytest.mark.parametrize("values, size", [
    ({"attention_head_dim": [4, 4]}, (32, 32)), ({"cross_attention_dim": [32, 32]}, (32, 32)), ({"layers_per_block": [1, 1]}, (32, 32)),
    ({"sample_size": [16, 24]}, (48, 32)), ({"sample_size": None}, (128, 128)), ({"unknown_key": 3}, (32, 32)),
    ({"torch_dtype": "float16"}, (32, 32))], ids=str)
def test_unusual_configs_of_a_unet(values, size, copy_of, tiny_model, run):
    folder = copy_of(unet=values)
    models = db.load_models(str(folder), torch.float32)
    assert same(weights_of(models.pipeline), weights_of(load(tiny_model("sd1"))))
    assert db.own_size(models.pipeline) == size and models.resolution == min(size)
    assert models.family.name == "small"
    status, _, err = run("--infer", *DRAW, "--model_path", folder, "--prompt", "a dog")
    assert status == 0, err
    from PIL import Image
    assert Image.open(next(Path("images").glob("a-dog-*.png"))).size == size


def test_families_are_told_from_lists_of_widths():
    for width, family in (([768, 768], "stable-diffusion"), (1024, "stable-diffusion"), ([32, 32], "small"), (32, "small")):
        assert next(each for each in db.FAMILIES if "StableDiffusionPipeline" in each.pipelines
                    and each.fits({"cross_attention_dim": width})).name == family


def test_a_missing_sample_size_is_sdxls_in_sdxl(copy_of):
    assert db.own_size(load(copy_of("sdxl", unet={"sample_size": None}))) == (256, 256)  # its tiny VAE halves


def test_tokenizers_in_other_files(copy_of, tiny_model):
    plain = load(tiny_model("sd1"))
    folder = copy_of()
    tokenizer = folder / "tokenizer"
    own = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())

    def check(length):
        pipeline = load(folder)
        assert pipeline.tokenizer.model_max_length == length
        expected = plain.tokenizer("a dog", padding="max_length", max_length=length, truncation=True).input_ids
        assert db.tokenize(pipeline, pipeline.tokenizer, ["a dog"])[0].tolist() == expected
    (tokenizer / "tokenizer_config.json").unlink()  # then nothing says where to cut
    check(32)
    for length, found in ((20, 20), (999, 32)):
        less = {key: value for key, value in config.items() if key not in ("pad_token", "max_length")}
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(less | {"model_max_length": length}))
        check(found)
    (tokenizer / "vocab.json").write_text(json.dumps(own["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in own["merges"]]
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tokenizer / "tokenizer.json").unlink()
    check(32)


def test_a_tokenizer_of_another_model(copy_of):
    folder = copy_of()
    file = folder / "tokenizer" / "tokenizer.json"
    tokens = json.loads(file.read_text())
    tokens["model"]["vocab"] |= {f"word{i}</w>": 1000 + i for i in range(60)}
    file.write_text(json.dumps(tokens))
    refused(lambda: load(folder), "its tokenizer has", "its text_encoder only 397")


# ---- schedulers and VAEs


def with_scheduler(folder, scheduler):
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", type(scheduler).__name__]}))
    return folder


@pytest.mark.parametrize("kind, options, draws", [
    ("EDMEulerScheduler", {"sigma_data": 0.5}, True), ("EDMDPMSolverMultistepScheduler", {}, True), ("IPNDMScheduler", {}, True),
    ("CMStochasticIterativeScheduler", {}, True), ("FlowMatchEulerDiscreteScheduler", {}, False),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, True)])
def test_schedulers_that_are_not_of_the_ddpm_kind(kind, options, draws, copy_of):
    import diffusers

    folder = with_scheduler(copy_of("sdxl"), getattr(diffusers, kind)(**options))
    if not draws:
        refused(lambda: load(folder), kind)
        return
    refused(lambda: db.load_models(str(folder), torch.float32), "--model_name model", kind, "not of the DDPM kind")
    assert type(load(folder).scheduler).__name__ == kind


@pytest.mark.parametrize("kind, options", [
    ("UniPCMultistepScheduler", {}), ("HeunDiscreteScheduler", {}), ("KDPM2AncestralDiscreteScheduler", {}), ("DEISMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}), ("DDPMScheduler", {"trained_betas": [0.001] * 1000, "beta_start": None})])
def test_schedulers_of_the_ddpm_kind_train(kind, options, copy_of, capsys):
    import diffusers

    models = db.load_models(str(with_scheduler(copy_of(), getattr(diffusers, kind)(**options))), torch.float32)
    assert noise_of(models).predicts == "epsilon" and "distilled" not in capsys.readouterr().out


def test_other_prediction_types_are_refused(copy_of):
    folder = copy_of(scheduler={"prediction_type": "sample"})
    refused(lambda: db.load_models(str(folder), torch.float32), "prediction type sample")


@pytest.mark.parametrize("name, package", [("LMSDiscreteScheduler", "scipy"), ("DPMSolverSDEScheduler", "torchsde")])
def test_schedulers_that_want_a_package_name_it(name, package, copy_of, monkeypatch):
    import diffusers

    folder = copy_of(index={"scheduler": ["diffusers", name]})

    class Lacking(diffusers.SchedulerMixin):
        @classmethod
        def from_pretrained(cls, *args, **options):
            raise ImportError(f"\n{name} requires the {package} library but it was not found in your environment. You can install it with "
                              f"pip: `pip\ninstall {package}`\n")
        from_config = from_pretrained
    monkeypatch.setattr(diffusers, name, Lacking)
    refused(lambda: load(folder), "--model_name model", f"pip install {package}")


def test_vaes_with_a_mean_of_their_own_draw_but_do_not_train(copy_of):
    for number, (vae, said) in enumerate([({"latents_mean": [1.0] * 4, "latents_std": [5.0] * 4}, "latents_mean and latents_std"),
                                          ({"shift_factor": 0.1}, "shift_factor")]):
        folder = copy_of("sdxl", f"vae{number}", vae=vae)
        refused(lambda: db.load_models(str(folder), torch.float32), f"--model_name vae{number}", f"its VAE has {said} of its own")
        load(folder)
    idle = copy_of("sdxl", "idle", vae={"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": None})
    assert db.load_models(str(idle), torch.float32).resolution == 32


def test_other_vaes_draw_but_do_not_train(copy_of):
    import diffusers

    small = diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                                      num_decoder_blocks=(1, 1))
    uneven = diffusers.AsymmetricAutoencoderKL(
        down_block_out_channels=(16, 32), up_block_out_channels=(16, 32), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=8)
    for vae in (small, uneven):
        kind = type(vae).__name__
        folder = copy_of("sd1", kind, index={"vae": ["diffusers", kind]})
        swapped(folder, "vae", vae)
        refused(lambda: db.load_models(str(folder), torch.float32), f"its VAE is an {kind}")
        plain = diffusers.StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None)
        assert np.array_equal(picture_of(load(folder)), picture_of(plain))


@pytest.mark.parametrize("name, kind, options", [
    ("a", "LCMScheduler", {}), ("a", "TCDScheduler", {}), ("a", "EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("dreamXL_Turbo", "EulerDiscreteScheduler", {}), ("sdxl-lightning-4step", "EulerDiscreteScheduler", {}),
    ("my_lcm_v2", "DDIMScheduler", {})])
def test_models_distilled_for_few_steps_are_told(name, kind, options, copy_of, run, capsys):
    import diffusers

    folder = with_scheduler(copy_of(name=name), getattr(diffusers, kind)(**options))
    db.load_models(str(folder), torch.float32)
    assert "distilled for few steps: training undoes that" in capsys.readouterr().out
    draw = ["--infer", *DRAW, "--model_path", folder, "--prompt", "x"]
    status, out, err = run(*draw)
    assert status == 0 and "--num_inference_steps 4 --guidance_scale 1" in out, err
    assert "distilled" not in run(*draw, "--guidance_scale", "0")[1]  # as it should be drawn


def test_ordinary_models_are_not_called_distilled(copy_of, capsys):
    for name in ("falcmodel", "model"):
        db.load_models(str(copy_of(name=name)), torch.float32)
    assert "distilled" not in capsys.readouterr().out


# ---- single files


def wide_pipeline(kind):
    """A tiny pipeline whose single file diffusers' loader knows: SDXL's text encoders differ in width."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    pipeline = build_pipeline(kind)
    if kind == "sdxl":
        config = CLIPTextConfig(**{**pipeline.text_encoder_2.config.to_dict(), "hidden_size": 40})
        pipeline.text_encoder_2 = CLIPTextModelWithProjection(config)
        pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "cross_attention_dim": 72})
    return pipeline


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """originals(kind) -> (tensors under Stable Diffusion's own names, the whole folder). Made once."""
    root, made = tmp_path_factory.mktemp("originals"), {}

    def make(kind):
        if kind not in made:
            pipeline = wide_pipeline(kind)
            pipeline.save_pretrained(root / kind)
            made[kind] = {name: tensor.contiguous() for name, tensor in original_checkpoint(pipeline).items()}, root / kind
        return made[kind]

    return make


@pytest.fixture
def single_file(originals, tmp_path, monkeypatch):
    """single_file(kind, tensors or None, notes, name) -> a checkpoint in the working folder with its configs beside it."""
    monkeypatch.chdir(tmp_path)

    def make(kind="sd1", tensors=None, notes=None, name="mine.safetensors"):
        own, folder = originals(kind)
        save_file(own if tensors is None else tensors, name, notes)
        shutil.copytree(folder, Path(name).with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        return name

    return make


LAYOUTS = {"NovelAI's": lambda name: name.replace("transformer.text_model.", "transformer."),
           "with a prefix": lambda name: f"model.{name}", "in a state_dict": lambda name: f"state_dict.{name}",
           "ComfyUI's UNet": lambda name: name.replace("model.diffusion_model.", "diffusion_model.")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_single_files_in_other_layouts(kind, layout, single_file, originals):
    tensors, folder = originals(kind)
    name = single_file(kind, {LAYOUTS[layout](key): tensor for key, tensor in tensors.items()})
    assert db.find_model(name, "--model_name") == name
    assert same(weights_of(load(name)), weights_of(load(folder)))


def test_a_novelai_checkpoint_trains(single_file, originals, train, tmp_path):
    tensors, folder = originals("sd1")
    name = single_file("sd1", {LAYOUTS["NovelAI's"](key): tensor for key, tensor in tensors.items()})
    status, out, err = train("--model_name", name)
    assert status == 0, err
    assert same({k: v for k, v in weights_of(load(tmp_path / "output")).items() if not k.startswith("unet")},
                {k: v for k, v in weights_of(load(folder)).items() if not k.startswith("unet")})


@pytest.mark.parametrize("name", ["UPPER.SAFETENSORS", "Mixed.SafeTensors"])
def test_single_files_with_capitals(name, single_file, originals, run):
    single_file(name=name)
    assert same(weights_of(load(name)), weights_of(load(originals("sd1")[1])))
    status, _, err = run("--infer", *DRAW, "--model_path", name, "--prompt", "x")
    assert status == 0, err


def test_a_pipeline_folder_named_like_a_file(tiny_model, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model("sd1"), "pipe.safetensors")
    assert same(weights_of(load("pipe.safetensors")), weights_of(load(tiny_model("sd1"))))
    status, _, err = run("--infer", *DRAW, "--model_path", "pipe.safetensors", "--prompt", "x")
    assert status == 0, err


def test_halves_of_a_single_file_come_as_float32(single_file, originals):
    tensors, folder = originals("sd1")
    found = weights_of(load(single_file("sd1", {name: tensor.half() for name, tensor in tensors.items()})))
    plain = weights_of(load(folder))
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name], plain[name].half().float()) for name in plain)


NOISE = [("sdxl", {"v_pred": 0}, {}, "EulerDiscreteScheduler", "v_prediction", False),
         ("sdxl", {"v_pred": 0, "ztsnr": 0}, {}, "EulerDiscreteScheduler", "v_prediction", True),
         ("sdxl", {}, {"modelspec.prediction_type": "v"}, "EulerDiscreteScheduler", "v_prediction", False),
         ("sd1", {}, {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}, "DDIMScheduler", "v_prediction", True),
         ("sd1", {}, {"modelspec.prediction_type": "epsilon"}, "PNDMScheduler", "epsilon", False),
         ("sd2", {}, {"modelspec.prediction_type": "epsilon"}, "DDIMScheduler", "epsilon", False)]


@pytest.mark.parametrize("kind, flags, notes, scheduler, predicts, from_noise", NOISE)
def test_a_checkpoint_tells_what_it_predicts(kind, flags, notes, scheduler, predicts, from_noise, single_file, originals, capsys):
    name = single_file(kind, originals(kind)[0] | {flag: torch.empty(0) for flag in flags}, notes)
    db.say_once.cache_clear()
    models = db.load_models(name, torch.float32)
    own = models.pipeline.scheduler
    assert (type(own).__name__, own.config.prediction_type) == (scheduler, predicts)
    assert bool(own.config.get("rescale_betas_zero_snr")) == from_noise == bool(noise_of(models).scheduler.config.rescale_betas_zero_snr)
    assert noise_of(models).predicts == predicts
    assert noise_of(models).scheduler.alphas_cumprod[-1].item() == pytest.approx(0, abs=1e-6) or not from_noise
    said = "says of itself" in capsys.readouterr().out
    assert said == (kind != "sd1" or predicts != "epsilon")


def test_training_keeps_what_a_checkpoint_predicts(single_file, originals, train, run, tmp_path):
    name = single_file("sdxl", originals("sdxl")[0] | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, name="noob.safetensors")
    status, out, err = train("--model_name", name, "--export", "out.safetensors")
    assert status == 0 and "(stable-diffusion-xl, v_prediction)" in out, err
    config = json.loads((tmp_path / "output/scheduler/scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction" and config["rescale_betas_zero_snr"] is True
    header, notes = db.read_header("out.safetensors", "")
    assert {"v_pred", "ztsnr"} <= header.keys() and notes["modelspec.prediction_type"] == "v"
    status, _, err = train("--model_name", name, "--method", "lora", "--output_dir", "lora")
    assert status == 0, err
    card = Path("lora/README.md").read_text()
    assert "EulerDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type='v_prediction', rescale_betas_zero_snr=True)" in card


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_an_exported_model_is_read_back_as_the_same(kind, originals, tmp_path, monkeypatch):
    """Even with configs that say otherwise, such as those of the hub."""
    from diffusers import DDIMScheduler

    monkeypatch.chdir(tmp_path)
    pipeline = load(originals(kind)[1])
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipeline.save_pretrained("velocity")
    assert db.main(["--export", "mine.safetensors", "--model_path", "velocity"]) == 0
    shutil.copytree(originals(kind)[1], "mine", ignore=shutil.ignore_patterns("*.safetensors"))
    back = load("mine.safetensors").scheduler.config
    assert back.prediction_type == "v_prediction" and back.rescale_betas_zero_snr is True


def test_what_a_checkpoint_says_that_cannot_be(single_file, originals):
    tensors, _ = originals("sdxl")
    refused(lambda: load(single_file("sdxl", tensors, {"modelspec.prediction_type": "flow"})), "predicts flow")
    refused(lambda: load(single_file("sdxl", tensors | {"edm_mean": torch.zeros(4)})), "its noise is EDM's", "EulerDiscreteScheduler")


KINDS = {"Flux in ComfyUI": ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": 0, "vae.encoder.conv_in.weight": 0,
                              "text_encoders.t5xxl.shared.weight": 0}, "of the Flux kind in one file", "hub id alone", "FLUX.1-dev"),
         "Flux": ({"double_blocks.0.img_attn.qkv.weight": 0, "img_in.weight": 0}, "a model of the Flux kind", "FLUX.1-dev"),
         "Flux of diffusers": ({"single_transformer_blocks.0.attn.to_q.weight": 0}, "a model of the Flux kind", "FLUX.1-dev"),
         "Chroma": ({"double_blocks.0.img_attn.qkv.weight": 0, "distilled_guidance_layer.in_proj.weight": 0}, "a Chroma model in one file; give"),
         "FLUX.2": ({"double_stream_modulation_img.lin.weight": 0, "double_blocks.0.img_attn.qkv.weight": 0}, "a FLUX.2 model", "klein-base"),
         "FLUX.2 of diffusers": ({"double_stream_modulation_img.linear.weight": 0, "single_transformer_blocks.0.attn.x": 0}, "a FLUX.2 model"),
         "Qwen-Image": ({"model.diffusion_model.transformer_blocks.0.img_mod.1.weight": 0}, "a Qwen-Image model", "Qwen/Qwen-Image"),
         "Z-Image": ({"noise_refiner.0.adaLN_modulation.0.weight": 0, "layers.0.attention.qkv.weight": 0}, "a Z-Image model", "Tongyi-MAI"),
         "Lumina 2": ({"noise_refiner.0.adaLN_modulation.1.weight": 0, "layers.0.attention.qkv.weight": 0}, "transformer model of another kind"),
         "a LoRA of Flux": ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": 0}, "a LoRA or the like"),
         "SD 3": ({"model.diffusion_model.joint_blocks.0.x": 0, "first_stage_model.x": 0}, "a Stable Diffusion 3 model", "diffusers folder"),
         "a UNet": ({"down_blocks.0.resnets.0.conv1.weight": 0, "conv_in.weight": 0}, "a UNet alone"),
         "a VAE": ({"encoder.conv_in.weight": 0, "decoder.conv_in.weight": 0}, "a VAE alone"),
         "a text encoder": ({"text_model.encoder.layers.0.mlp.fc1.weight": 0}, "a text encoder alone"),
         "a LoRA": ({"lora_unet_x.lora_down.weight": 0}, "a LoRA or the like"),
         "a ControlNet": ({"controlnet_cond_embedding.conv_in.weight": 0}, "a ControlNet"),
         "an embedding": ({"emb_params": 0}, "an embedding"),
         "a refiner": ({"model.diffusion_model.x": 0, "first_stage_model.x": 0, "conditioner.embedders.0.model.x": 0}, "an SDXL refiner"),
         "without a VAE": ({"model.diffusion_model.x": 0, "cond_stage_model.transformer.x": 0}, "no VAE in it;")}


@pytest.mark.parametrize("kind", KINDS)
def test_single_files_of_other_kinds_are_named(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, *said = KINDS[kind]
    save_file({name: torch.zeros(1) for name in names}, "x.safetensors")
    refused(lambda: db.find_model("x.safetensors", "--model_name"), "--model_name x.safetensors", *said)


@pytest.mark.parametrize("configs", ["sdxl", "sd2"])
def test_configs_that_are_not_a_checkpoints(configs, originals, single_file):
    single_file("sd1")
    shutil.rmtree("mine")
    shutil.copytree(originals(configs)[1], "mine", ignore=shutil.ignore_patterns("*.safetensors"))
    refused(lambda: load("mine.safetensors"), "cannot be loaded", "configs in mine")


# ---- names that people paste


PASTED = {"https://huggingface.co/runwayml/stable-diffusion-v1-5/tree/main": "runwayml/stable-diffusion-v1-5",
          "https://huggingface.co/a/b?library=diffusers": "a/b", "https://huggingface.co/a/b#usage": "a/b",
          "http://www.huggingface.co/a/b/": "a/b", "huggingface.co/a/b": "a/b", "hf.co/a/b/": "a/b", "hf://a/b": "a/b",
          "https://hf-mirror.com/a/b/tree/main/unet": "a/b", " a/b ": "a/b", "'a/b'": "a/b", '"a/b"\n': "a/b", "\u201ca/b\u201d": "a/b",
          "a/b/": "a/b", "`a/b`": "a/b", "a/b": "a/b"}


@pytest.mark.parametrize("text", PASTED)
def test_pasted_names(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    db.say_once.cache_clear()
    assert db.located(text, "--model_name") == PASTED[text]
    assert capsys.readouterr().out == ("" if text == PASTED[text] else f"{text} is {PASTED[text]}.\n")


@pytest.mark.parametrize("text, said", [
    ("https://civitai.com/models/4384?modelVersionId=128713", "download the .safetensors file"),
    ("civitai.com/models/4384", "not a folder"), ("https://example.com/x.safetensors", "download the .safetensors file"),
    ("https://huggingface.co/datasets/a/b", "nothing is taken from this address"), ("https://huggingface.co/a", "nothing is taken"),
    ("https://huggingface.co/a/b/tree/fp16", "hf download a/b --revision fp16"),
    ("https://huggingface.co/a/b/resolve/main/v1-5.ckpt?download=true", "a .ckpt file can run any code"),
    ("https://huggingface.co/a/b/blob/main/x.safetensors", "x.safetensors is not in the cache"), ("  ", "it is empty"),
    ("a/b/c", "not a folder"), ("x.CKPT", "can run any code"), ("model.pt", "can run any code")])
def test_pasted_names_that_are_not_taken(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: db.find_model(text, "--model_name"), "--model_name", said)
    if "civitai.com/models/4384" != text:
        refused(lambda: db.find_trained(text, "--model_path"), "--model_path", said) if "folder" not in said else None


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_configs_that_may_not_be_read_are_named(name, copy_of, monkeypatch):
    folder, read_text = copy_of(), Path.read_text

    def forbidden(path, *arguments, **options):
        if path == folder / name:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *arguments, **options)
    monkeypatch.setattr(Path, "read_text", forbidden)
    refused(lambda: db.find_model(str(folder), "--model_name"), f"{folder / name}: you may not read this file")


@pytest.mark.parametrize("name, said", [
    ("m.gguf", "a GGUF file, in which weights are quantized"), ("m.ZIP", "an archive; unpack it"), ("m.onnx", "a model made for running alone"),
    ("m.safetensors.crdownload", "a download that is not finished"), ("m.safetensors.part", "a download that is not finished")])
def test_files_that_are_no_models(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"GGUF")
    refused(lambda: db.find_model(name, "--model_name"), f"--model_name {name}: {said}")


def test_paths_around_and_inside_a_model(tiny_model, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model("sd1"), "one/inner")
    shutil.copytree(tiny_model("sd1"), "models--x--y/snapshots/abc")
    shutil.copytree(tiny_model("sd1"), "hub/snapshots/old")
    shutil.copytree(tiny_model("sd1"), "hub/snapshots/new")
    Path("hub/refs").mkdir()
    Path("hub/refs/main").write_text("new\n")
    for text, found in (("one", "one/inner"), ("one/inner/model_index.json", "one/inner"), ("one\\inner", "one/inner"),
                        ("models--x--y", "models--x--y/snapshots/abc"), ("models--x--y/snapshots", "models--x--y/snapshots/abc"),
                        ("hub", "hub/snapshots/new"), ("one/inner", "one/inner"), ("one/inner/", "one/inner/")):
        assert db.find_model(text, "--model_name") == found
        assert db.find_trained(text, "--model_path").source == found
    shutil.copytree(tiny_model("sd1"), "one/other")
    refused(lambda: db.find_model("one", "--model_name"), "it holds several models", "one/inner, one/other")
    status, out, err = run("--infer", *DRAW, "--model_path", "hub", "--prompt", "x")
    assert status == 0 and "hub is hub/snapshots/new." in out, err


# ---- the hub and its cache


@pytest.fixture
def cache(tiny_model, tmp_path, monkeypatch):
    """cache(id, family, *patterns) puts a model in the hub's cache, without the files of the patterns; returns its snapshot."""
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    db.say_once.cache_clear()

    def put(name, family="sd1", *without):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(tiny_model(family), folder / "snapshots" / "abc")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        for pattern in without:
            gone(folder / "snapshots" / "abc", pattern)
        return folder / "snapshots" / "abc"

    return put


OLD, NEW = "runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.mark.parametrize("cached, asked, found, said", [
    ([OLD], OLD, OLD, "is no longer on the hub; using it from the cache"), ([OLD], NEW, OLD, "is not in the cache; using runwayml/"),
    ([OLD], "sd15", OLD, "the same weights"), ([NEW], OLD, NEW, "is no longer on the hub; using stable-diffusion-v1-5/"),
    ([NEW, OLD], OLD, NEW, "the same weights"), ([NEW], NEW, NEW, None),
    (["stabilityai/stable-diffusion-2-1-base"], "stabilityai/stable-diffusion-2-1-base", "stabilityai/stable-diffusion-2-1-base", "cache")])
def test_moved_models_are_taken_from_the_cache_under_either_id(cached, asked, found, said, cache, tiny_model, capsys):
    for name in cached:
        cache(name)
    assert db.find_model(asked, "--model_name") == found
    out = capsys.readouterr().out
    assert said in out if said else out == ""
    assert same(weights_of(load(found)), weights_of(load(tiny_model("sd1"))))


def test_the_whole_one_of_two_cached_ids_is_taken(cache, run):
    cache(NEW, "sd1", "*/*.safetensors")  # as reading a single file leaves it: configs alone
    cache(OLD)
    assert db.find_model(OLD, "--model_name") == OLD == db.find_model("sd15", "--model_name")
    status, _, err = run("--infer", *DRAW, "--model_path", "sd15", "--prompt", "x")
    assert status == 0, err


def test_a_variant_in_the_cache(cache, tiny_model, capsys):
    as_variant(cache("x/y"), "fp16")
    assert db.find_model("x/y", "--model_name") == "x/y"
    expected = {name: tensor.half().float() for name, tensor in weights_of(load(tiny_model("sd1"))).items()}
    assert same(weights_of(load("x/y")), expected) and "half precision" in capsys.readouterr().out


def test_what_the_cache_lacks_without_a_network_is_named(cache):
    cache("x/part", "sd1", "unet/*.safetensors", "vae/*")
    refused(lambda: load("x/part"), "--model_name x/part", "the cache lacks unet: no diffusion_pytorch_model.safetensors; vae: no config.json",
            "HF_HUB_OFFLINE")
    cache("x/words", "sd1", "tokenizer/tokenizer.json")
    refused(lambda: load("x/words"), "tokenizer: the files of its tokenizer are missing")


def test_only_what_is_needed_is_asked_of_the_hub(cache, monkeypatch, tiny_model):
    import types

    import huggingface_hub

    snapshot, asked = cache("x/y", "sd1", "*/*.safetensors"), []
    files = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin",
             "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
             "text_encoder/config.json", "text_encoder/model.fp16-00001-of-00002.safetensors",
             "text_encoder/model.fp16-00002-of-00002.safetensors", "text_encoder/model.safetensors.index.fp16.json",
             "text_encoder/flax_model.msgpack", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "v1-5.ckpt", "x.safetensors"]
    listed = types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=file) for file in files])
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, **options: listed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns, **options: asked.extend(allow_patterns) or str(snapshot))
    assert db.hub_folder("x/y", "--model_name") == snapshot
    assert set(files) - set(asked) == {"unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.safetensors",
                                       "text_encoder/flax_model.msgpack", "v1-5.ckpt", "x.safetensors"}
    listed.siblings = [entry for entry in listed.siblings if not entry.rfilename.startswith("unet/diffusion_pytorch_model.fp16")]
    asked.clear()
    refused(lambda: db.hub_folder("x/y", "--model_name"), ".bin files, which may run code")
    assert not asked  # and nothing is fetched in vain


def answer(status, code=None, message=None, url="https://huggingface.co/api/models/x/y"):
    """The exception of the hub's client for an answer of the hub."""
    from huggingface_hub.utils import _http, hf_raise_for_status

    httpx = getattr(_http, "httpx2", None) or _http.httpx  # whichever it was made for

    headers = {key: value for key, value in (("X-Error-Code", code), ("X-Error-Message", message)) if value}
    try:
        hf_raise_for_status(httpx.Response(status, headers=headers, request=httpx.Request("GET", url)))
    except Exception as problem:
        return problem


REFUSALS = [((401, "GatedRepo", "Access to model x/y is restricted."), ["accept its terms at https://huggingface.co/x/y", "hf auth login"]),
            ((403, "GatedRepo", "Access to model x/y is restricted and you are not in the authorized list."), ["accept its terms"]),
            ((401, "RepoNotFound", "Repository not found"), ["no such model", "check the spelling", "hf auth login"]),
            ((401, None, "Invalid username or password."), ["does not know this login", "https://huggingface.co/settings/tokens"]),
            ((401, None, "Invalid credentials in Authorization header"), ["does not know this login", "hf auth login"]),
            ((403, None, "Forbidden"), ["denies it to this login"]), ((404, "RepoNotFound", None), ["no such model"]),
            ((404, "EntryNotFound", None), ["it is on the hub, but has no model_index.json"]), ((429, None, None), ["wait a few minutes"]),
            ((404, "RevisionNotFound", None), ["no such revision"]), ((503, None, None), ["out of order (503)"])]


@pytest.mark.parametrize("given, said", REFUSALS, ids=str)
def test_refusals_of_the_hub_have_their_remedy(given, said, cache, monkeypatch):
    import huggingface_hub

    problem = answer(*given)

    def refuse(*args, **options):
        raise problem
    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    refused(lambda: db.find_model("x/y", "--model_name"), "--model_name x/y", *said)
    cache("x/y", "sd1", "vae/*")
    refused(lambda: load("x/y"), "the cache lacks vae", said[0].replace("model_index.json", ""))
    adapter = db.parse_settings(["--infer", "--adapter", "x/z"])
    refused(lambda: db.find_adapters(adapter), "--adapter x/z", said[0].replace("x/y", "x/z"))


def test_a_gated_model_is_one_line_of_the_program(run, train, monkeypatch):
    import huggingface_hub

    def refuse(*args, **options):
        raise answer(401, "GatedRepo", "Access to model x/y is restricted.")
    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    for status, _, err in (train("--model_name", "x/y"), run("--infer", "--model_path", "x/y", "--prompt", "x")):
        assert status == 2 and err.count("\n") == 1 and "accept its terms" in err and "hf auth login" in err, err


# ---- an output and the model that it needs


def test_what_an_output_needs_is_never_renamed_or_deleted(train, tiny_model, tmp_path, run):
    full = ["--model_name", tiny_model("sd1"), "--learning_rate", "1e-4"]
    status, _, err = train(*full)
    assert status == 0, err
    (tmp_path / "link").symlink_to("output")
    (tmp_path / "parts").mkdir()
    for path in (tmp_path / "output").iterdir():
        (tmp_path / "parts" / path.name).symlink_to(path)
    assert run("--export", "output/m.safetensors", "--model_path", "output")[0] == 0
    shutil.copytree("output", "output/m", ignore=shutil.ignore_patterns("*.safetensors", "m"))
    before = sorted(map(str, tmp_path.rglob("*")))
    for model in ("output", "./output/", tmp_path / "output", "link", "output/model_index.json", "output/m.safetensors", "parts"):
        for flags in (["--method", "lora"], ["--method", "lora", "--overwrite"], ["--method", "textual_inversion", "--output_dir", "link"]):
            status, _, err = train("--model_name", model, *flags)
            assert status == 2 and err.count("\n") == 1 and "--output_dir" in err and "give another" in err, (model, err)
    status, _, err = train("--model_name", "output/m.safetensors", "--overwrite")
    assert status == 2 and "would be deleted by --overwrite" in err
    assert sorted(map(str, tmp_path.rglob("*"))) == before
    shutil.copytree(tmp_path / "photos", "output/photos")
    status, _, err = train(*full, "--instance_data_dir", "output/photos")
    assert status == 2 and "output/photos lies in output, which is renamed" in err

    status, out, err = train("--model_name", "output", "--method", "lora", "--output_dir", "lora")  # elsewhere it may go
    assert status == 0 and "earlier" not in out, err
    assert run("--infer", *DRAW, "--model_path", "lora")[0] == 0

    status, out, err = train("--model_name", "output", "--learning_rate", "1e-4")  # a whole model needs its base no more
    assert status == 0 and "kept as output-1" in out, err
    assert json.loads(Path("output/dreambooth.json").read_text())["base_model"] == "output-1"
    assert "on `output-1`" in Path("output/README.md").read_text()

    status, _, err = run("--infer", *DRAW, "--model_path", "lora")  # another model has the name by now
    assert status == 2 and err.count("\n") == 1 and "trained on another model" in err and "such as output-1" in err, err
    status, _, err = run("--evaluate", "--model_path", "lora", "--num_images", "1", "--num_inference_steps", "1", *networks_of(tmp_path))
    assert status == 2 and "trained on another model" in err, err
    status, out, err = run("--infer", *DRAW, "--model_path", "lora", "--model_name", "output-1")
    assert status == 0 and "other weights" not in out, err
    status, out, err = run("--infer", *DRAW, "--model_path", "lora", "--model_name", "output")
    assert status == 0 and "lora was trained on output, and output has other weights" in out, err
    status, out, err = run("--infer", *DRAW, "--model_path", tiny_model("sd1"), "--adapter", "lora", "--prompt", "x")
    assert status == 0 and "lora was trained on output" in out, err

    status, out, err = train("--model_name", "output", "--learning_rate", "1e-4", "--overwrite")
    assert status == 0, err
    assert json.loads(Path("output/dreambooth.json").read_text())["base_model"] == "output (as it was; deleted by --overwrite)"


def networks_of(tmp_path):
    """Flags of the bundled networks, which are quick, and of prompts of one line."""
    (tmp_path / "prompts.txt").write_text("a [identifier] [class]\n")
    vit, clip = (db.short_path(folder) for folder in db.BUNDLED_METRICS.values())
    return "--prompts_file", "prompts.txt", "--dino_model", vit, "--clip_model", clip


def test_a_record_of_its_own_folder_is_not_followed(tiny_model, train, run, tmp_path):
    """As earlier versions left it: a LoRA in ./output that names ./output as its base."""
    assert train("--model_name", tiny_model("sd1"), "--method", "lora")[0] == 0
    record = json.loads(Path("output/dreambooth.json").read_text())
    Path("output/dreambooth.json").write_text(json.dumps(record | {"base_model": "output"}))
    shutil.copytree(tiny_model("sd1"), "output-1")
    status, _, err = run("--infer", *DRAW)
    assert status == 2 and err.count("\n") == 1 and "--model_name, such as output-1" in err, err
    assert run("--infer", *DRAW, "--model_name", "output-1")[0] == 0


def test_samples_tell_models_apart_in_every_precision(tiny_model):
    samples = {dtype: db.sample_weights(db.load_pipeline(str(tiny_model("sdxl")), dtype))
               for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    for one in samples.values():
        assert all(db.is_same_sample(one, other) for other in samples.values())
        for other in (tiny_model("sdxl", seed=1), tiny_model("sd1")):
            assert not db.is_same_sample(one, db.sample_weights(load(other)))
    assert len(json.dumps(samples[torch.float32])) < 4000
    pipeline = load(tiny_model("sdxl"))
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter += 1e-5  # as one step leaves it
    assert not db.is_same_sample(samples[torch.float32], db.sample_weights(pipeline))
    assert db.is_same_sample(samples[torch.float32], json.loads(json.dumps(samples[torch.float32])))


# ---- adapters


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """made(family, text=True, **settings) -> folder of a LoRA that changes much, as --train saves it. Made once."""

    root, done = tmp_path_factory.mktemp("loras"), {}

    def make(family="sd1", text=True, seed=0, rank=4, alpha=2, dora=False, target="all"):
        key = (family, text, seed, rank, alpha, dora, target)
        if key not in done:
            folder = done[key] = root / str(len(done))
            folder.mkdir()
            models = db.take_apart("x", load(tiny_model(family)))
            s = db.Settings("train", rank=rank, lora_alpha=alpha, use_dora=dora)
            recipe = db.Recipe(1, lora_target=target)
            groups = [db.denoiser_lora(s, models, [], recipe)] + ([db.text_encoder_lora(s, models, [], recipe)] if text else [])
            torch.manual_seed(seed)
            for group in groups:
                for parameter in group.parameters:
                    parameter.data += torch.randn_like(parameter) * 0.2
            db.save_lora(folder, models, [], {})
        return done[key]

    return make


@pytest.fixture
def draw(tiny_model, tmp_path, monkeypatch):
    """draw(*adapters, family, path, name) -> (what the program draws with, a picture of it)."""
    monkeypatch.chdir(tmp_path)
    db.say_once.cache_clear()

    def pipeline(*adapters, family="sd1", path=None, name=None):
        flags = [flag for adapter in adapters for flag in ("--adapter", str(adapter))] + (["--model_name", str(name)] if name else [])
        s = db.parse_settings(["--infer", "--model_path", str(path or tiny_model(family)), *flags])
        trained = db.find_trained(s.model_path[0], "--model_path")
        return db.load_trained(s, db.find_base(s, trained), trained, db.find_adapters(s), db.Plan(torch.device("cpu"), "no"), []).pipeline

    return pipeline


def plain(tiny_model, family="sd1", *loras):
    """Plain diffusers with (file, strength) of LoRAs."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(tiny_model(family), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for number, (file, _) in enumerate(loras):
        pipe.load_lora_weights(Path(file).parent, weight_name=Path(file).name, adapter_name=f"n{number}")
    if loras:
        pipe.set_adapters([f"n{number}" for number in range(len(loras))], [strength for _, strength in loras])
    return pipe


def pick(file, keep, target, change=lambda name: name):
    """Write some of a file's tensors into another one, under other names."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        notes = opened.metadata()
    save_file({change(name): tensor for name, tensor in load_file(file).items() if keep(name)}, target, notes)
    return target


@pytest.mark.parametrize("text, strength", [("=-0.5", -0.5), ("=1.5e-1", 0.15), ("=.5", 0.5), ("=1.", 1.0), ("", 1.0), ("=+0.3", 0.3),
                                            ("=2", 2.0)])
def test_strengths_are_numbers_of_any_kind(text, strength, draw, made, tiny_model):
    file = made() / db.LORA_FILE
    assert np.array_equal(picture_of(draw(f"{file}{text}")), picture_of(plain(tiny_model, "sd1", (file, strength))))


@pytest.mark.parametrize("text", ["=0,5", ":0.8", "=abc", " 0.8", "=", "=1e"])
def test_strengths_that_are_none(text, draw, made, tmp_path, monkeypatch):
    shutil.copy(made() / db.LORA_FILE, tmp_path / "x.safetensors")
    refused(lambda: draw(f"x.safetensors{text}"), f"--adapter x.safetensors{text}", "write x.safetensors=0.8")
    (tmp_path / "folder").mkdir()
    refused(lambda: draw(f"folder{text}"), f"--adapter folder{text}", "write folder=0.8")


def test_a_strength_given_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()
    refused(lambda: db.split_strength("lora=0.5=0.7"), '"0.5=0.7" is no strength; write lora=0.8')
    refused(lambda: db.split_strength("lora = 0.5"), '"0.5" is no strength; write lora=0.8')
    assert db.split_strength("owner/lora=0.5") == ("owner/lora", 0.5) and db.split_strength("owner/lora") == ("owner/lora", None)


def test_paths_with_signs_in_them(draw, made, tmp_path, tiny_model):
    folder = tmp_path / "x=1" / "C:"
    folder.mkdir(parents=True)
    file = shutil.copy(made() / db.LORA_FILE, folder / "a=0.5.safetensors")
    assert db.split_strength(str(file)) == (str(file), None) and db.split_strength(f"{file}=0.25") == (str(file), 0.25)
    assert db.split_strength(r"C:\loras\a=b.safetensors=0.5") == (r"C:\loras\a=b.safetensors", 0.5)
    assert np.array_equal(picture_of(draw(f"{file}=0.25")), picture_of(plain(tiny_model, "sd1", (file, 0.25))))


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "DoRA", "conv", "UNet alone", "text alone", "kohya text alone", "fp16"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_loras_draw_as_in_plain_diffusers(family, kind, draw, made, tiny_model, tmp_path):
    folder = made(family, dora=kind == "DoRA", text=kind != "DoRA", target="all" if kind in ("conv", "DoRA") else "attention")
    file = folder / (db.KOHYA_FILE if "kohya" in kind else db.LORA_FILE)
    if kind == "UNet alone":
        file = pick(file, lambda name: name.startswith("unet."), tmp_path / "x.safetensors")
    if "text alone" in kind:
        file = pick(file, lambda name: not name.startswith(("unet.", "lora_unet")), tmp_path / "x.safetensors")
    if kind == "fp16":
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, tmp_path / "x.safetensors")
        file = tmp_path / "x.safetensors"
    ours = picture_of(draw(file, family=family))
    assert np.abs(ours - picture_of(plain(tiny_model, family, (file, 1.0)))).max() < 1e-5
    assert np.abs(ours - picture_of(plain(tiny_model, family))).max() > 1e-3


def test_several_adapters_add_up_exactly(draw, made, tiny_model, tmp_path):
    """Two of the same file name, one twice, parts in common, and one that changes the text encoder alone."""
    (tmp_path / "b").mkdir()
    one, two = made() / db.LORA_FILE, made(seed=1, text=False) / db.LORA_FILE
    text = pick(one, lambda name: name.startswith("text"), tmp_path / "b" / db.LORA_FILE)
    ours = draw(f"{text}=0.5", one, f"{two}=-0.25", text)
    expected = plain(tiny_model, "sd1", (text, 0.5), (one, 1.0), (two, -0.25), (text, 1.0))
    assert np.abs(picture_of(ours) - picture_of(expected)).max() < 1e-5
    base, layer = load(tiny_model("sd1")), "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    changes = 0
    for file, strength in ((one, 1.0), (two, -0.25)):
        tensors = load_file(file)
        changes = changes + strength * 2 / 4 * tensors[f"unet.{layer}.lora_B.weight"] @ tensors[f"unet.{layer}.lora_A.weight"]
    ours.fuse_lora(adapter_names=[f"lora_{n}" for n in range(4)])
    merged = dict(ours.unet.named_modules())[layer].base_layer.weight
    assert torch.allclose(merged, base.unet.get_submodule(layer).weight + changes, atol=1e-5)


def test_an_adapter_added_twice_is_said(draw, made, tiny_model, capsys):
    folder = made()
    ours = draw(folder / db.LORA_FILE, path=folder / db.LORA_FILE, name=tiny_model("sd1"))
    assert "is added more than once; its strengths add up" in capsys.readouterr().out
    assert np.abs(picture_of(ours) - picture_of(plain(tiny_model, "sd1", (folder / db.LORA_FILE, 2.0)))).max() < 1e-5


def test_an_untouched_adapter_changes_nothing(draw, made, tiny_model, tmp_path):
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(made() / db.LORA_FILE).items()}, tmp_path / "zero.safetensors")
    assert np.array_equal(picture_of(draw("zero.safetensors")), picture_of(plain(tiny_model)))


@pytest.mark.parametrize("config, scale", [({"r": 4, "lora_alpha": 8}, 2.0), ({"r": 4, "lora_alpha": 4, "use_rslora": True}, 2.0),
                                           ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"to_q": 2, "to_k": 2, ".*": 2}}, 0.5), (None, 1.0)])
@pytest.mark.parametrize("names", ["base_model.model.", "base_model.model.unet."])
def test_pefts_own_files(names, config, scale, draw, made, tiny_model, tmp_path, capsys):
    own = pick(made(alpha=4, text=False) / db.LORA_FILE, lambda name: name.startswith("unet."), tmp_path / "own.safetensors")  # its scale: 1
    (tmp_path / "peft").mkdir()
    file = pick(own, lambda name: True, tmp_path / "peft" / "adapter_model.safetensors", lambda name: names + name.removeprefix("unet."))
    if config:
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    expected = picture_of(plain(tiny_model, "sd1", (own, scale)))
    for adapter in ("peft", file):
        assert np.abs(picture_of(draw(adapter)) - expected).max() < 1e-5
    assert ("no adapter_config.json" in capsys.readouterr().out) == (config is None)


def split(file, folder, alpha):
    """A LoRA as PEFT's own DreamBooth example leaves it: a folder for each part, without the part's name in the tensors' names."""
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if any(name.startswith(f"{part}.") for name in load_file(file)):
            (folder / part).mkdir(parents=True)
            pick(file, lambda name: name.startswith(f"{part}."), folder / part / "adapter_model.safetensors",
                 lambda name: f"base_model.model.{name.removeprefix(f'{part}.')}")
            (folder / part / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": alpha}))
    return folder


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_pefts_folders_of_each_part(family, draw, made, tiny_model, tmp_path, capsys):
    own = made(family, alpha=4) / db.LORA_FILE  # its scale: 1
    folder = split(own, tmp_path / "peft", alpha=8)
    expected = picture_of(plain(tiny_model, family, (own, 2.0)))
    assert np.abs(picture_of(draw("peft", family=family)) - expected).max() < 1e-5
    assert np.abs(picture_of(draw("peft=0.5", family=family)) - picture_of(plain(tiny_model, family, (own, 1.0)))).max() < 1e-5
    assert np.abs(picture_of(draw(path="peft", name=tiny_model(family))) - expected).max() < 1e-5
    alone = pick(own, lambda name: name.startswith("text_encoder."), tmp_path / "text.safetensors")
    expected = picture_of(plain(tiny_model, family, (alone, 2.0)))
    assert np.abs(picture_of(draw("peft/text_encoder", family=family)) - expected).max() < 1e-5
    assert capsys.readouterr().out == ""
    s = db.parse_settings(["--export", "o.safetensors", "--model_path", "peft"])
    refused(lambda: db.export(s), "--model_path peft", "give an output of --train")
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    refused(lambda: draw("peft", family=family), "--adapter peft", "adapter_model.bin is not opened")


@pytest.mark.parametrize("part, values", [("text_encoder_2", {"hidden_size": "32"}), ("unet", {"in_channels": [4]}),
                                          ("text_encoder", {"hidden_size": [32]}), ("vae", {"latent_channels": {}})])
def test_configs_with_something_else_where_a_number_belongs(part, values, copy_of):
    said = "UNet takes 4 channels" if part == "vae" else "copy or download it again"
    refused(lambda: load(copy_of("sdxl", **{part: values})), "--model_name model", said)


def test_a_copy_of_the_cache_with_texts_in_place_of_links(copy_of):
    folder = copy_of()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_text("../../../blobs/abc")
    refused(lambda: load(folder), "unet/diffusion_pytorch_model.safetensors", "a text in place of a link", "cp -rL")


def test_weights_that_are_no_numbers_are_refused(draw, made, tiny_model, tmp_path):
    own = load_file(made() / db.LORA_FILE)
    save_file({**own, max(own): torch.full_like(own[max(own)], float("nan"))}, tmp_path / "lora.safetensors")
    refused(lambda: draw("lora.safetensors"), "--adapter lora.safetensors",
            f"1 of its tensors hold no numbers (NaN or infinite), such as {max(own)}")
    save_file({"emb_params": torch.tensor([[1.0, float("inf")] * 16])}, tmp_path / "gronk.safetensors")
    refused(lambda: draw("gronk.safetensors"), "--adapter gronk.safetensors", "emb_params")


def test_a_model_of_no_numbers_draws_nothing(copy_of, run):
    file = copy_of() / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({**weights, "conv_in.bias": torch.full_like(weights["conv_in.bias"], float("nan"))}, file, {"format": "pt"})
    status, _, err = run("--infer", *DRAW, "--model_path", "model", "--prompt", "a dog")
    assert status == 2 and "error: model: weights of its unet are no numbers" in err
    assert not list(Path("images").glob("*.png"))


@pytest.mark.parametrize("part, method, said", [
    ("unet", "full", "error: model: weights of its unet are no numbers (NaN or infinite), such as unet."),
    ("unet", "lora", "is nan at step 1; nothing was learnt yet, so weights of model are no numbers (NaN or infinite): give another copy"),
    ("vae", "full", "is nan at step 1; nothing was learnt yet, so weights of model are no numbers")])
def test_a_model_of_no_numbers_is_not_put_down_to_the_learning_rate(part, method, said, copy_of, run, photos):
    file = next((copy_of() / part).glob("*.safetensors"))
    weights = load_file(file)
    name = next(name for name in weights if name in ("conv_in.bias", "encoder.conv_in.bias"))
    save_file({**weights, name: torch.full_like(weights[name], float("nan"))}, file, {"format": "pt"})
    status, _, err = run("--train", "--model_name", "model", "--instance_data_dir", photos, "--class_prompt", "a dog", "--identifier", "sks",
                         "--no-with_prior_preservation", "--steps", 2, "--method", method)
    assert status == 2 and said in err and "--learning_rate" not in err
    assert not Path("output").exists()


def test_arithmetic_that_is_too_coarse_is_told_at_the_first_step():
    run = SimpleNamespace(models=SimpleNamespace(name="sd"), course=SimpleNamespace(precision="fp16"))
    assert "or the arithmetic is too coarse for them: give --mixed_precision no" in db.cause_of(run, 1)
    assert "give a smaller --learning_rate" in db.cause_of(run, 2)


@pytest.mark.parametrize("scale", [0, -1, None, "0.18"])
def test_a_vae_that_scales_to_nothing_is_refused(scale, copy_of):
    pipeline = load(copy_of())
    pipeline.vae.register_to_config(scaling_factor=scale)
    refused(lambda: db.family_of(pipeline).check_trainable(pipeline, "model", "--model_name"), "--model_name model", "the scaling_factor of its VAE is", "0.18215")


@pytest.mark.parametrize("family, scale, whose", [("sd1", 0.13025, "SDXL"), ("sdxl", 0.18215, "Stable Diffusion"),
                                                  ("sd1", 0.18215, ""), ("sdxl", 0.13025, "")])
def test_a_vae_of_the_other_kind_is_said(family, scale, whose, tiny_model, capsys):
    pipeline = load(tiny_model(family))
    pipeline.vae.register_to_config(scaling_factor=scale)
    db.family_of(pipeline).check_trainable(pipeline, "model", "--model_name")
    out = capsys.readouterr().out
    assert (f"Note: model: its VAE has the scaling_factor of {whose}, {scale}" in out) if whose else out == ""


def test_a_negative_prompt_without_guidance_is_said(run, tiny_model):
    drawn = ["--infer", *DRAW, "--model_path", tiny_model("sd1"), "--prompt", "a dog", "--negative_prompt", "a cat"]
    said = "Note: --negative_prompt: no effect without guidance; give --guidance_scale above 1."
    assert said in run(*drawn, "--guidance_scale", 1)[1] and said not in run(*drawn, "--guidance_scale", 2)[1]


def test_an_embedding_that_no_prompt_names_is_said(run, tiny_model, tmp_path):
    save_file({"emb_params": torch.zeros(1, 32)}, "gronk.safetensors")
    flags = ["--infer", *DRAW, "--model_path", tiny_model("sd1"), "--adapter", "gronk.safetensors"]
    for more, is_said in ((["--prompt", "a dog"], True), (["--prompt", "a Gronk dog"], False),
                          (["--prompt", "a dog", "--negative_prompt", "gronk"], False)):
        status, out, err = run(*flags, *more)
        assert status == 0 and ('no prompt has the word of gronk.safetensors, "gronk"' in out) == is_said, err


def test_schedulers_of_older_configs_are_put_right_quietly(copy_of, recwarn):
    pipeline = load(copy_of(scheduler={"steps_offset": 0, "clip_sample": True}))
    assert pipeline.scheduler.config.steps_offset == 1 and not [w for w in recwarn if w.category is FutureWarning]


def test_two_tokenizers_that_end_prompts_at_different_places(copy_of):
    folder = copy_of("sdxl")
    config = folder / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 3}))
    refused(lambda: load(folder), f"--model_name {folder}", "end prompts after 3 and 32 words", "download the model again")


def test_a_folder_or_hub_id_with_nothing_but_the_lora(draw, made, tiny_model, tmp_path, run, cache):
    Path("D").mkdir()
    shutil.copy(made() / db.LORA_FILE, "D")
    expected = picture_of(plain(tiny_model, "sd1", (made() / db.LORA_FILE, 1.0)))
    assert np.array_equal(picture_of(draw("D")), expected)
    assert np.array_equal(picture_of(draw(path="D", name=tiny_model("sd1"))), expected)
    status, _, err = run("--infer", *DRAW, "--model_path", "D", "--prompt", "x")
    assert status == 2 and "name the model with --model_name" in err
    Path("E").mkdir()
    shutil.copy(made() / db.LORA_FILE, "E/dog.safetensors")
    assert np.array_equal(picture_of(draw("E=1.0")), expected)
    shutil.copy(made() / db.LORA_FILE, "E/cat.safetensors")
    refused(lambda: draw("E"), "--adapter E", "E/cat.safetensors, E/dog.safetensors")
    snapshot = tmp_path / "hub" / "models--x--lora" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    shutil.copy(made() / db.LORA_FILE, snapshot)
    assert np.array_equal(picture_of(draw("x/lora")), expected)
    assert np.array_equal(picture_of(draw("https://huggingface.co/x/lora/tree/main")), expected)
    assert np.array_equal(picture_of(draw(f"https://huggingface.co/x/lora/blob/main/{db.LORA_FILE}")), expected)
    Path("F").mkdir()
    Path("F/pytorch_lora_weights.bin").write_bytes(b"\x80\x02")
    refused(lambda: draw("F"), "--adapter F", "pytorch_lora_weights.bin is not opened")
    refused(lambda: draw("nowhere"), "--adapter nowhere", "no such file or folder")


def pair(name, size=8, kind="AB"):
    down, up = {"AB": ("lora_A", "lora_B"), "kohya": ("lora_down", "lora_up")}[kind]
    return {f"{name}.{down}.weight": torch.zeros(2, size), f"{name}.{up}.weight": torch.zeros(size, 2)}


FOREIGN = {
    "Flux of diffusers": (pair("transformer.transformer_blocks.0.attn.to_q"), "does not fit", "a transformer model"),
    "Flux of ai-toolkit": (pair("diffusion_model.double_blocks.0.img_attn.qkv"), "does not fit", "a transformer model"),
    "Z-Image": (pair("diffusion_model.layers.0.attention.qkv"), "does not fit", "a transformer model"),
    "Flux of kohya": (pair("lora_unet_double_blocks_0_img_attn_proj", kind="kohya"), "does not fit", "a transformer model"),
    "SD 3 of kohya": (pair("lora_unet_joint_blocks_0_x", kind="kohya"), "does not fit", "a transformer model"),
    "PEFT of something": (pair("base_model.model.foo"), "does not fit", "none of its 1 layers"),
    "nothing known": (pair("foo.bar"), "does not fit", "none of its 1 layers"),
    "SDXL's": (pair("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 2048), "does not fit", "2048 (SDXL) channels"),
    "LoHa": ({"lora_unet_x.hada_w1_a": torch.zeros(4, 2)}, "it is a LoHa", "only LoRAs are added"),
    "LoKr": ({"lora_unet_x.lokr_w1": torch.zeros(4, 2)}, "it is a LoKr", "only LoRAs are added"),
    "differences": ({"lora_unet_x.diff": torch.zeros(4, 2)}, "whole differences", "only LoRAs are added"),
    "half a pair": ({"lora_unet_x.lora_up.weight": torch.zeros(4, 2)}, "does not fit", "no pair of matrices"),
    "a UNet": ({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1), "conv_in.weight": torch.zeros(1)}, "neither", "a UNet alone"),
    "a picture": ({"x": torch.zeros(1, 2, 3, 4)}, "neither a LoRA nor an embedding", "give a .safetensors file of one")}


@pytest.mark.parametrize("kind", FOREIGN)
def test_adapters_of_other_kinds_are_one_line(kind, run, tiny_model):
    tensors, *said = FOREIGN[kind]
    save_file(tensors, "other.safetensors")
    status, _, err = run("--infer", *DRAW, "--model_path", tiny_model("sd1"), "--prompt", "x", "--adapter", "other.safetensors")
    assert status == 2 and err.count("\n") == 1 and "--adapter other.safetensors" in err and all(text in err for text in said), err


def test_loras_of_another_family_are_one_line(draw, made):
    for family, other in (("sd1", "sdxl"), ("sdxl", "sd1")):
        for file in (db.LORA_FILE, db.KOHYA_FILE):
            refused(lambda: draw(made(family) / file, family=other), f"--adapter {made(family) / file}", "does not fit", "channels")


def test_layers_without_a_place_are_counted(draw, made, tiny_model, tmp_path, capsys):
    tensors = load_file(made() / db.KOHYA_FILE)
    save_file(tensors | pair("lora_unet_foo", kind="kohya") | {"lora_unet_foo.alpha": torch.tensor(2.0)}, tmp_path / "more.safetensors")
    ours = draw("more.safetensors")
    total = sum("lora_down" in name for name in tensors) + 1
    assert f"1 of its {total} layers have no place" in capsys.readouterr().out
    assert np.abs(picture_of(ours) - picture_of(plain(tiny_model, "sd1", (made() / db.KOHYA_FILE, 1.0)))).max() < 1e-5


# ---- embeddings


EMBEDDINGS = {"half precision": ("x.safetensors", {"<rex>": torch.ones(2, 32).half()}, "<rex>", 2),
              "one vector": ("x.safetensors", {"<rex>": torch.ones(32)}, "<rex>", 1),
              "A1111's": ("rexy.safetensors", {"emb_params": torch.ones(1, 32)}, "rexy", 1),
              "converted": ("rexy.safetensors", {"string_to_param.*": torch.ones(3, 32)}, "rexy", 3)}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings_of_other_programs(kind, draw, tiny_model, tmp_path):
    name, tensors, word, count = EMBEDDINGS[kind]
    save_file(tensors, tmp_path / name)
    ours = draw(name)
    expected = plain(tiny_model)
    expected.load_textual_inversion({word: next(iter(tensors.values())).reshape(-1, 32).float()}, token=word)
    assert len(ours.tokenizer) == len(expected.tokenizer) == 397 + count
    assert np.array_equal(picture_of(ours, f"a {word} dog"), picture_of(expected, f"a {word} dog"))


def test_embeddings_that_do_not_fit_are_one_line(draw, tmp_path):
    save_file({"clip_l": torch.zeros(1, 32), "clip_g": torch.zeros(1, 32)}, tmp_path / "xl.safetensors")
    save_file({"<w>": torch.zeros(1, 33)}, tmp_path / "wide.safetensors")
    save_file({"<w>": torch.zeros(1, 32)}, tmp_path / "fits.safetensors")
    refused(lambda: draw("xl.safetensors"), "--adapter xl.safetensors", "does not fit", "it is for SDXL")
    refused(lambda: draw("fits.safetensors", family="sdxl"), "does not fit", "a model with one text encoder")
    refused(lambda: draw("wide.safetensors"), "its vectors have 33 numbers, those of this model 32")
    refused(lambda: draw("fits.safetensors=0.5"), "--adapter fits.safetensors=0.5", "an embedding has no strength")
    draw("xl.safetensors", family="sdxl")
    for name in ("x.pt", "learned_embeds.bin"):
        Path(name).write_bytes(b"\x80\x02")
        refused(lambda: draw(name), f"--adapter {name}: not opened", ".safetensors form")


def test_words_that_clash_are_one_line(draw, tmp_path):
    save_file({"emb_params": torch.zeros(1, 32)}, tmp_path / "dog.safetensors")
    refused(lambda: draw("dog.safetensors"), '--adapter dog.safetensors: its word "dog" is in the vocabulary already', "another name")
    for name in ("a", "b"):
        save_file({"<rex>": torch.zeros(2, 32)}, tmp_path / f"{name}.safetensors")
    refused(lambda: draw("a.safetensors", "b.safetensors"), '--adapter b.safetensors: its word "<rex>"', "leave it out")
    refused(lambda: draw("a.safetensors", "a.safetensors"), '--adapter a.safetensors: its word "<rex>"')
    save_file({"<rex>_1": torch.zeros(1, 32)}, tmp_path / "c.safetensors")
    refused(lambda: draw("a.safetensors", "c.safetensors"), '"<rex>_1" is in the vocabulary already')
