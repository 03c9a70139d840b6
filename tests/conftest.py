"""What the tests share: the single file made anew, tiny pipelines of every supported family with random weights, trainings.

No hub and no GPU is needed.
"""
# ruff: noqa: E402  (what is set in the environment comes before the imports)

import json
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # results are the CPU's on every machine
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # models this small only lose by sharing their work
REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tools")]

import numpy as np
import pytest
import single_file
from PIL import Image

FOUND = "SINGLE_FILE_FOUND"  # in the environment: "true" if the single file was what the modules give, else "stale"
if FOUND not in os.environ:  # the workers of pytest-xdist find it there
    made = single_file.single_file()
    before = single_file.TARGET.read_text(encoding="utf-8") if single_file.TARGET.is_file() else None
    os.environ[FOUND] = "true" if before == made else "stale"
    if before != made:
        part = single_file.TARGET.with_suffix(".part")
        part.write_text(made, encoding="utf-8")
        os.replace(part, single_file.TARGET)

SLOW = tuple(line for line in (REPOSITORY / "tests" / "slow.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
FAMILIES = ("sd1", "sd2", "sdxl")
KINDS = (*FAMILIES, "demo")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long soak; not in the quick suite")
    config.addinivalue_line("markers", "long: takes ten seconds or more, and begins before the others")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config, items):
    """Those in slow.txt are slow. Long tests first, in each worker's share of them all, so that no worker waits for another's in the end."""
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(SLOW):
            item.add_marker("slow")
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    long, others = ([item for item in items if bool(item.get_closest_marker("long")) == is_long] for is_long in (True, False))
    size, ordered = -(-len(items) // workers), []
    for worker in range(workers):
        share = long[worker::workers]
        rest = max(0, size - len(share))
        ordered += [*share, *others[:rest]]
        others = others[rest:]
    items[:] = ordered + others


def build_pipeline(family, seed=0):
    """A pipeline of some ten thousand weights with the parts, wiring and prediction type of its family; 32 px."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        EulerDiscreteScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    if family not in FAMILIES:
        from tiny_families import build

        return build(family, seed)
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(REPOSITORY / "demo" / "model", subfolder="tokenizer")
    text_config = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=3,
                       num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, projection_dim=32,
                       bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                       pad_token_id=tokenizer.pad_token_id)
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    scheduler = {"sd1": lambda: PNDMScheduler(skip_prk_steps=True, **betas),
                 "sd2": lambda: DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False,
                                              **betas),
                 "sdxl": lambda: EulerDiscreteScheduler(**betas)}[family]()
    vae = AutoencoderKL(block_out_channels=[16, 32], down_block_types=["DownEncoderBlock2D"] * 2,
                        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=8, sample_size=32,
                        scaling_factor=0.18)
    sdxl = dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64 if family == "sdxl" else 32, use_linear_projection=family != "sd1",
        **(sdxl if family == "sdxl" else {}))
    parts = dict(vae=vae, unet=unet, scheduler=scheduler, tokenizer=tokenizer,
                 text_encoder=CLIPTextModel(CLIPTextConfig(**text_config)))
    if family == "sdxl":
        return StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, add_watermarker=False,
                                         text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text_config)))
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def pipeline_of(kind):
    """A pipeline of each layout. SDXL's two text encoders differ in width, by which diffusers' loader tells them apart."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    import dreambooth_implementation as db

    if kind == "demo":
        return db.load_pipeline(str(db.BUNDLED_MODEL), torch.float32)
    pipeline = build_pipeline(kind)
    if kind == "sdxl":
        config = CLIPTextConfig(**{**pipeline.text_encoder_2.config.to_dict(), "hidden_size": 40})
        pipeline.text_encoder_2 = CLIPTextModelWithProjection(config)
        pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "cross_attention_dim": 72})
    return pipeline


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model(family, seed=0) -> folder of a saved pipeline, made once."""
    root = tmp_path_factory.mktemp("models")

    def folder(family, seed=0):
        path = root / f"{family}-{seed}"
        if not path.exists():
            build_pipeline(family, seed).save_pretrained(path)
        return path

    return folder


def picture(seed, size=(48, 40)):
    """A colourful picture that no other seed makes."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    """A folder of three photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*flags) -> (exit status, standard output, standard error) of the program, in an empty working folder."""
    import libraries  # noqa: F401
    from accelerate.state import AcceleratorState

    import dreambooth_implementation as db

    monkeypatch.chdir(tmp_path)

    def call(*flags):
        AcceleratorState._reset_state(reset_partial_state=True)  # it is one per process, and keeps the first precision
        capsys.readouterr()  # what building a model printed is not the program's
        status = db.main([str(flag) for flag in flags])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def train(run, tiny_model, photos):
    """train(family="sd1", *flags) -> what `run` returns of two steps."""
    from training_runs import QUICK

    def call(family="sd1", *flags):
        return run("--train", "--model_name", tiny_model(family), "--instance_data_dir", photos, *QUICK, *flags)

    return call


@pytest.fixture
def train_adapter(run, tiny_model, photos):
    """train_adapter(family, method, *flags) -> standard output of three steps at high rates."""
    from training_runs import ADAPTER_FLAGS, SHORT

    def call(family, method, *flags):
        status, out, err = run("--train", "--model_name", tiny_model(family), "--instance_data_dir", photos, *SHORT,
                               "--steps", 3, "--method", method, *ADAPTER_FLAGS[method], *flags)
        assert status == 0, err
        return out

    return call


@pytest.fixture
def train_scored(run, tiny_model, photos, networks):
    """train_scored(method, *flags, family="sd1") -> what `run` returns; random networks score the samples for --select_best."""
    from training_runs import SHORT

    trains = {"full": ["--train_text_encoder"], "textual_inversion": ["--num_vectors", "2"], "lora": ["--rank", "2"], "pivotal": ["--rank", "2"]}

    def call(method, *flags, family="sd1"):
        best = ["--dino_model", networks / "vit", "--clip_model", networks / "clip"] if "--select_best" in flags else []
        return run("--train", "--model_name", tiny_model(family), "--instance_data_dir", photos, *SHORT,
                   "--num_inference_steps", 1, "--method", method, *trains[method], *best, *flags)

    return call


@pytest.fixture
def flags(tiny_model, photos):
    """flags(method, family="sd1", ...) -> the flags of a short training."""
    from training_runs import METHODS, SHORT, STEPS

    def make(method, family="sd1", *more):
        return ["--train", "--model_name", tiny_model(family), "--instance_data_dir", photos, *SHORT,
                "--num_inference_steps", 1, "--steps", STEPS, "--method", method, *METHODS[method], *more]

    return make


def record(folder, photos):
    """Make `folder` look as if --train had written it."""
    subject = {"identifier": "sks", "class_prompt": "a dog", "instance_prompt": "a sks dog", "name": "dog"}
    (folder / "dreambooth.json").write_text(json.dumps(
        {"method": "full", "base_model": "x", "subjects": [subject], "settings": {"instance_data_dir": str(photos)}}))


@pytest.fixture
def recorded(tmp_path, tiny_model, photos):
    """recorded(name, seed=0) makes the folder of a tiny model with the record of a training on `photos`."""
    def make(name, seed=0):
        shutil.copytree(tiny_model("sd1", seed), tmp_path / name)
        record(tmp_path / name, photos)

    return make


@pytest.fixture
def evaluate(run, networks, tmp_path):
    """evaluate(*flags) -> (output, evaluation.json) of a short --evaluate with two prompts and the random networks."""
    (tmp_path / "prompts.txt").write_text("a [identifier] [class] on the moon\na red [identifier] [class]\n")

    def call(*flags):
        status, out, err = run("--evaluate", "--prompts_file", "prompts.txt", "--num_images", 2, "--num_inference_steps", 2,
                               "--dino_model", networks / "vit", "--clip_model", networks / "clip", *flags)
        assert status == 0, err
        return out, json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())

    return call


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """exported(kind) -> (KIND.safetensors with the configs alone in KIND/ beside it, the whole folder). Made once."""
    import dreambooth_implementation as db

    root = tmp_path_factory.mktemp("checkpoints")

    def make(kind):
        file, folder = root / f"{kind}.safetensors", root / "whole" / kind
        if not file.exists():
            pipeline_of(kind).save_pretrained(folder)
            assert db.main(["--export", str(file), "--model_path", str(folder), "--export_precision", "fp32"]) == 0
            shutil.copytree(folder, root / kind, ignore=shutil.ignore_patterns("*.safetensors"))
        return file, folder

    return make


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """Folders of a random ViTModel and a random CLIPModel that see 16 pixels."""
    import torch
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=1.0)
    pixels = dict(image_size=16, patch_size=8)
    ViTModel(ViTConfig(**tower, **pixels), add_pooling_layer=False).save_pretrained(root / "vit")
    look = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (root / "vit" / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor", **look}))
    text = dict(tower, vocab_size=397, max_position_embeddings=32, bos_token_id=395, eos_token_id=396, pad_token_id=396)
    CLIPModel(CLIPConfig(text_config=text, vision_config=tower | pixels, projection_dim=8)).save_pretrained(root / "clip")
    (root / "clip" / "preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, **look}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "demo" / "metrics" / "clip" / name, root / "clip")
    return root
