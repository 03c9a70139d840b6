#!/usr/bin/env python3
"""DreamBooth in one file: teach a text-to-image diffusion model your subject, then draw it anywhere.

    python dreambooth_implementation.py --train --instance_data_dir ./instance_images --class_prompt "a dog"
    python dreambooth_implementation.py --infer --prompt "a [identifier] dog on the moon"
    python dreambooth_implementation.py --help

Three to five photos of one subject fine-tune every layer of the UNet (and, with --train_text_encoder, of the text
encoders) of a Stable Diffusion 1.x, 2.x or XL model. Pictures of the subject's class, drawn by the model before it is
tuned, are trained beside the photos so that the class is not forgotten. The result is an ordinary diffusers pipeline.

Method: Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation",
arXiv 2208.12242. "Paper" below means this one.

Where to change what:
    Settings       a flag, its default, its help              Loss          the objective
    Model          a model family, its defaults               Memory plan   device, precision, checkpointing
    Identifier     prompts and the rare word in them          Training      optimizer, schedule, logs
    Data           photos, class images, the latent cache     Saving        what ./output holds
    Methods        which weights train                        Inference     pictures and their metadata
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import typing
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, PngImagePlugin

# torch, diffusers and transformers take seconds to import: each function that needs one imports it, so that --help
# and every complaint about the input answer at once.


class UserError(Exception):
    """Something the user can put right. Its text is one line that names the flag or file and the remedy."""


def is_first_process():
    """False in all but one of the processes that `accelerate launch` starts."""
    return os.environ.get("RANK", "0") == "0"


@functools.cache
def say_once(message):
    """say(), but not again if the same line comes up again."""
    say(message)


def say(message):
    """Print one line, once however many processes train together."""
    if is_first_process():
        print(message, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Settings


def _field(mode, default, help, **options):
    """One flag. `options`: minimum, maximum, choices, aliases, shown (how --help words the default)."""
    return dataclasses.field(default=default, metadata={"mode": mode, "help": help, **options})


@dataclass(frozen=True)
class Settings:
    """Every flag with its type, default and help; the command line and dreambooth.json are made from this list.

    A default of None means that the value depends on the model (see RECIPES) or the machine; it is derived where it is
    used and printed there. Settings are never changed after parsing.
    """

    mode: typing.Literal["train", "infer"]

    # Model
    model_name: str | None = _field(
        "train", None, "model to start from: a hub id or a diffusers folder", aliases=["--pretrained_model_name_or_path"],
        shown="Stable Diffusion 1.5 on a CUDA GPU, else the small model in demo/model")
    resolution: int | None = _field("train", None, "side of the square training pictures in pixels", minimum=32,
                                    shown="the model's own")

    # Subject and class
    instance_data_dir: str = _field("train", "./instance_images", "folder with 3-5 photos of the subject")
    class_prompt: str | None = _field("train", None, 'what kind of thing the subject is: "a dog"',
                                      shown="what class_prompt.txt in the photo folder says")
    identifier: str = _field("train", "sks", "rare word that will stand for the subject")
    instance_prompt: str | None = _field("train", None, "caption of every photo; may hold [identifier]",
                                         shown='the class prompt with the identifier: "a sks dog"')
    random_flip: bool = _field("train", False, "also train on mirrored photos (not for subjects with a left and a right)")

    # Prior preservation
    with_prior_preservation: bool = _field("train", True, "train class images beside the photos (paper section 3.2)")
    prior_loss_weight: float = _field("train", 1.0, "weight of the class images' loss, lambda in the paper", minimum=0)
    num_class_images: int = _field("train", 200, "how many class images", minimum=1)
    class_data_dir: str = _field("train", "./class_images", "cache of generated class images; images put directly "
                                                            "in it are taken as your own and used instead")

    # Optimization
    steps: int | None = _field("train", None, "optimizer steps", minimum=1, aliases=["--max_train_steps"],
                               shown="depends on the model")
    train_text_encoder: bool = _field("train", False, "train the text encoder(s) as well as the UNet")
    learning_rate: float | None = _field("train", None, "UNet learning rate", minimum=0, shown="depends on the model")
    text_encoder_lr: float | None = _field("train", None, "text encoder learning rate", minimum=0,
                                           shown="depends on the model")
    train_batch_size: int = _field("train", 1, "photos per step and GPU; as many class images join them", minimum=1)
    gradient_accumulation_steps: int = _field("train", 1, "batches per optimizer step", minimum=1)
    lr_scheduler: str = _field("train", "constant", "learning rate schedule", choices=[
        "constant", "constant_with_warmup", "linear", "cosine"])
    lr_warmup_steps: int = _field("train", 0, "optimizer steps over which the learning rate rises", minimum=0)
    max_grad_norm: float = _field("train", 1.0, "gradients are scaled down to this norm; 0: they are not", minimum=0)
    adam_weight_decay: float = _field("train", 1e-2, "AdamW weight decay", minimum=0)
    snr_gamma: float | None = _field("train", None, "min-SNR loss weighting; 5.0 is usual", minimum=0, shown="off")
    gradient_checkpointing: bool | None = _field("train", None, "recompute activations to save memory",
                                                 shown="on where the GPU needs it")

    # Output of training
    output_dir: str = _field("train", "./output", "folder for the trained pipeline")
    overwrite: bool = _field("train", False, "delete an earlier --output_dir once the new one is complete "
                                             "(otherwise it is kept under another name)")
    validation_prompt: list[str] | None = _field("train", None, "prompt of the sample grid; repeatable",
                                                 shown="subject, subject on the moon, class")

    # Inference
    model_path: str = _field("infer", "./output", "trained model: a diffusers folder or hub id")
    prompt: list[str] | None = _field("infer", None, "what to draw; [identifier] stands for the subject; repeatable",
                                      shown="the subject on the moon")
    negative_prompt: str = _field("infer", "", "what not to draw")
    num_images: int = _field("infer", 4, "pictures per prompt, with seeds --seed, --seed + 1, ...", minimum=1)
    height: int | None = _field("infer", None, "height in pixels", minimum=8, shown="the model's own")
    width: int | None = _field("infer", None, "width in pixels", minimum=8, shown="the model's own")
    image_dir: str = _field("infer", "./images", "folder for the pictures")

    # Both
    num_inference_steps: int = _field("both", 30, "denoising steps of a picture", minimum=1)
    guidance_scale: float | None = _field("both", None, "classifier-free guidance", minimum=0,
                                          shown="depends on the model")
    sample_batch_size: int = _field("both", 4, "pictures drawn at once", minimum=1)
    mixed_precision: str = _field("both", "auto", "bf16 or fp16 arithmetic; auto: bf16 where the GPU has it, else fp16, "
                                                  "and none without a CUDA GPU", choices=["auto", "no", "fp16", "bf16"])
    seed: int = _field("both", 0, "seed of all randomness", minimum=0, maximum=2**32 - 1)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")


def _value_type(annotation):
    """(type, is_list) of a field: `int | None` is (int, False), `list[str] | None` is (str, True)."""
    options = [a for a in typing.get_args(annotation) if a is not type(None)]
    kind = options[0] if options and typing.get_origin(annotation) is not list else annotation
    return (typing.get_args(kind)[0], True) if typing.get_origin(kind) is list else (kind, False)


def build_parser():
    """The argparse parser of `Settings`. A flag that was not given leaves no attribute."""
    parser = _Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS,
                     usage="%(prog)s (--train | --infer) [flags]")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--train", dest="mode", action="store_const", const="train", help="teach a model the subject")
    what.add_argument("--infer", dest="mode", action="store_const", const="infer", help="draw with a trained model")
    titles = {"train": "with --train", "infer": "with --infer", "both": "with both"}
    groups = {mode: parser.add_argument_group(title) for mode, title in titles.items()}
    for field in dataclasses.fields(Settings)[1:]:
        meta, (kind, is_list) = field.metadata, _value_type(field.type)
        default = meta.get("shown", "off" if field.default is False else "on" if field.default is True else field.default)
        options = {"help": f"{meta['help']} (default: {'none' if default == '' else default})".replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "choices": meta.get("choices"), "action": "append" if is_list else "store"}
            options["metavar"] = None if meta.get("choices") else kind.__name__.upper()
        groups[meta["mode"]].add_argument(f"--{field.name}", *meta.get("aliases", []), dest=field.name, **options)
    return parser


def parse_settings(argv=None):
    """Settings from the command line. Raises UserError for anything argparse or a field's limits reject."""
    given = vars(build_parser().parse_args(argv))
    settings = Settings(**given)
    for field in dataclasses.fields(Settings)[1:]:
        value, meta = getattr(settings, field.name), field.metadata
        if field.name in given and meta["mode"] not in ("both", settings.mode):
            raise UserError(f"--{field.name} belongs to --{meta['mode']} and has no meaning with --{settings.mode}")
        low, high = meta.get("minimum"), meta.get("maximum", sys.float_info.max)
        if low is not None and value is not None and not low <= value <= high:
            raise UserError(f"--{field.name} {value}: must be a number of at least {low}"
                            + (f" and at most {high}" if "maximum" in meta else ""))
    for name in ("resolution", "height", "width"):
        if (getattr(settings, name) or 0) % 8:
            raise UserError(f"--{name} {getattr(settings, name)}: must be a multiple of 8")
    return settings


# ----------------------------------------------------------------------------------------------------------------------
# Model: the only section that knows the model families apart, and it asks their configs, never their names

HERE = Path(__file__).resolve().parent
BUNDLED_MODEL = HERE / "demo" / "model"
DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# Repositories that were removed from the hub, and where the same weights live now.
MOVED_MODELS = {"runwayml/stable-diffusion-v1-5": DEFAULT_MODEL} | {
    f"stabilityai/stable-diffusion-{v}": f"sd2-community/stable-diffusion-{v}" for v in ("2", "2-base", "2-1", "2-1-base")}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


@dataclass(frozen=True)
class Recipe:
    """Defaults of a model family. Learning rates are for AdamW at batch size 1 with prior preservation."""

    steps: int
    learning_rate: float
    learning_rate_with_text_encoder: float
    text_encoder_lr: float
    guidance_scale: float


RECIPES = {
    # Paper: 5e-6. diffusers' DreamBooth guide: 800 steps, and 2e-6 for both parts when the text encoder trains.
    "stable-diffusion": Recipe(800, 5e-6, 2e-6, 2e-6, 7.5),
    # Three times the UNet: gentler, as is usual for fine-tuning it whole.
    "stable-diffusion-xl": Recipe(1000, 2e-6, 2e-6, 1e-6, 5.0),
    # Small models like the bundled one: chosen by experiment on it.
    "small": Recipe(1600, 2e-4, 2e-4, 5e-5, 4.0),
}


def recipe_for(unet_config):
    """(name, Recipe) for a UNet config."""
    if unet_config["addition_embed_type"] == "text_time":
        name = "stable-diffusion-xl"
    else:  # SD 1.x attends to 768 and SD 2.x to 1024 text channels
        name = "stable-diffusion" if unet_config["cross_attention_dim"] in (768, 1024) else "small"
    return name, RECIPES[name]


@dataclass(frozen=True)
class Models:
    """The parts of a loaded pipeline. SD 1.x and 2.x have one tokenizer and text encoder, SDXL two of each."""

    name: str  # folder or hub id
    pipeline: typing.Any
    tokenizers: list
    text_encoders: list
    vae: typing.Any
    unet: typing.Any
    noise_scheduler: typing.Any  # DDPM with the model's own betas and prediction type, for training

    @property
    def latent_scale(self):
        """Pixels per latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self):
        """The side in pixels that the UNet was trained at."""
        return self.unet.config.sample_size * self.latent_scale


def find_model(name, flag):
    """Folder or hub id of a model, without importing torch. Raises UserError if there is none of a supported kind."""
    if name in MOVED_MODELS and not Path(name).exists():
        say(f"{name} is no longer on the hub; using {MOVED_MODELS[name]}, the same weights.")
        name = MOVED_MODELS[name]
    if Path(name).is_dir():
        index = Path(name) / "model_index.json"
        if not index.is_file():
            raise UserError(f"{flag} {name}: this folder has no model_index.json; give a diffusers pipeline folder")
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        try:
            index = hub_file(name, "model_index.json")
        except Exception as problem:  # whatever the hub's client raises, the user's remedy is the same
            reason = str(problem).strip().split("\n")[0][:100]
            raise UserError(f"{flag} {name}: neither a local folder nor in the cache, and the hub did not give it "
                            f"({reason}); check the spelling and the network") from None
    else:
        raise UserError(f"{flag} {name}: not a folder; give a diffusers pipeline folder or a hub id such as {DEFAULT_MODEL}")
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{flag} {name}: its model_index.json cannot be read; the model is damaged") from None
    if kind not in PIPELINES:
        raise UserError(f"{flag} {name}: it is a {kind}; Stable Diffusion 1.x, 2.x and XL pipelines are supported")
    return name


def hub_file(name, file):
    """Path of one file of a hub model, from the cache if it is there. Raises what the hub's client raises."""
    from huggingface_hub import hf_hub_download, model_info, try_to_load_from_cache

    cached = try_to_load_from_cache(name, file)
    if not isinstance(cached, str):
        model_info(name)  # fails at once without a network or such a model, where a download would try again and again
        cached = hf_hub_download(name, file)
    return Path(cached)


def load_pipeline(name, dtype, flag="--model_name"):
    """The diffusers pipeline in a folder or of a hub id, in `dtype`, on the CPU, without a safety checker.

    Only safetensors are read. The network is asked only for what the cache lacks.
    """
    import diffusers
    import transformers
    from safetensors import SafetensorError

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(library.utils.logging.CRITICAL)  # what goes wrong is raised as well
        library.utils.logging.disable_progress_bar()
    for cached_only in (True,) if Path(name).is_dir() else (True, False):
        try:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                name, dtype=dtype, use_safetensors=True, local_files_only=cached_only,
                safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False)
            # transformers makes up a tokenizer of two words where its files are missing
            if len(pipeline.tokenizer) < pipeline.text_encoder.config.vocab_size // 2:
                raise ValueError("the files of its tokenizer are missing")
            break
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
            reason = " ".join(str(problem).split())[:300]
    else:
        raise UserError(f"{flag} {name}: cannot be loaded ({reason})")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()  # decode a batch one by one: at 1024 px its activations outweigh the UNet's
    pipeline.watermark = None  # SDXL marks its pictures where invisible-watermark is installed; SD never does
    return pipeline


def load_models(name, dtype):
    """Load a pipeline for training and take it apart. Raises UserError if it cannot be trained here."""
    from diffusers import DDPMScheduler

    pipeline = load_pipeline(name, dtype)
    parts = pipeline.components
    models = Models(
        name=name,
        pipeline=pipeline,
        tokenizers=[parts[k] for k in ("tokenizer", "tokenizer_2") if parts.get(k) is not None],
        text_encoders=[parts[k] for k in ("text_encoder", "text_encoder_2") if parts.get(k) is not None],
        vae=pipeline.vae,
        unet=pipeline.unet,
        noise_scheduler=DDPMScheduler.from_config(pipeline.scheduler.config))
    if models.unet.config.in_channels != models.vae.config.latent_channels:
        raise UserError(f"--model_name {name}: its UNet takes {models.unet.config.in_channels} channels (an inpainting or "
                        f"depth model?); give a text-to-image model")
    if models.noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"--model_name {name}: prediction type {models.noise_scheduler.config.prediction_type} "
                        f"is not supported")
    for module in (models.unet, models.vae, *models.text_encoders):
        module.requires_grad_(False).eval()
    return models


def encode_prompts(models, prompts):
    """Text conditioning of P prompts: (hidden [P, tokens, channels], pooled [P, channels] or None where unused).

    SD 1.x and 2.x use the encoder's last layer. SDXL joins the last but one layer of both encoders and pools the second.
    """
    import torch

    hidden, pooled = [], None
    joined = models.pipeline.unet.config.addition_embed_type == "text_time"
    for tokenizer, text_encoder in zip(models.tokenizers, models.text_encoders):
        ids = tokenize(tokenizer, prompts).to(next(text_encoder.parameters()).device)
        out = text_encoder(ids, output_hidden_states=joined)
        hidden.append(out.hidden_states[-2] if joined else out.last_hidden_state)
        pooled = out.text_embeds if joined and "text_embeds" in out else pooled
    return torch.cat(hidden, dim=-1), pooled


def tokenize(tokenizer, prompts):
    """Token ids [P, tokens] of P prompts, padded by the tokenizer's own rule and cut at its length."""
    return tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                     return_tensors="pt").input_ids


def predict(unet, noisy_latents, timesteps, hidden, pooled, time_ids):
    """The UNet's output [B, C, h, w] for B noisy latents; `time_ids` [B, 6] and `pooled` matter to SDXL alone."""
    sizes = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
    return unet(noisy_latents, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=sizes).sample


def text_encoder_parameters(models):
    """The text encoders' parameters that reach the loss.

    SDXL reads its first encoder before the last layer, so that layer and the final norm get no gradient.
    """
    parameters = []
    for text_encoder in models.text_encoders:
        unused = set()
        inner = getattr(text_encoder, "text_model", text_encoder)  # transformers 5.6 flattened CLIPTextModel, not its twin
        if len(models.text_encoders) > 1 and not hasattr(text_encoder, "text_projection"):
            unused = {*inner.encoder.layers[-1].parameters(), *inner.final_layer_norm.parameters()}
        parameters += [p for p in text_encoder.parameters() if p not in unused]
    return parameters


def fingerprint(models):
    """A hex digest of all weights: tells one model from another wherever it was loaded from."""
    import torch

    digest = hashlib.sha256()
    for module in (models.unet, models.vae, *models.text_encoders):
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {torch.hash_tensor(tensor).item()}".encode())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Identifier: the rare word that stands for the subject, and the prompts it appears in

ARTICLE = re.compile(r"^((?:an? (?:photo|picture|image|drawing|painting|close-up) of )?)(?:(?:an?|the) )?(.+)$", re.IGNORECASE)


@dataclass(frozen=True)
class Subject:
    """What dreambooth.json records of a subject."""

    identifier: str
    class_prompt: str
    instance_prompt: str


def make_subject(s, class_prompt):
    """The subject of these settings: 'a dog' makes 'a sks dog' (paper section 3.1: "a [identifier] [class noun]")."""
    if not re.fullmatch(r"\S+", s.identifier):
        raise UserError(f'--identifier "{s.identifier}": must be one word without spaces')
    if s.instance_prompt is None and class_prompt is None:
        raise UserError(f'--class_prompt is missing: say what kind of thing the subject in {s.instance_data_dir} is, '
                        f'such as --class_prompt "a dog"')
    if s.with_prior_preservation and class_prompt is None:
        raise UserError('--class_prompt is missing: prior preservation needs it, such as --class_prompt "a dog"; '
                        'or give --no-with_prior_preservation')
    if "[identifier]" in (class_prompt or ""):
        raise UserError(f'--class_prompt "{class_prompt}": the class goes without the identifier, such as "a dog"')
    opening, noun = ARTICLE.match(class_prompt).groups() if class_prompt else ("", "")
    prompt = s.instance_prompt or f"{opening}a [identifier] {noun}"
    subject = Subject(s.identifier, class_prompt or "", prompt.replace("[identifier]", s.identifier))
    if not re.search(rf"(?<!\w){re.escape(s.identifier)}(?!\w)", subject.instance_prompt):
        say(f'Note: the instance prompt "{subject.instance_prompt}" does not contain the identifier "{s.identifier}".')
    return subject


def check_identifier(tokenizer, identifier):
    """Say so if the tokenizer does not read the identifier as one token."""
    pieces = tokenizer.tokenize(identifier)
    if len(pieces) > 1:
        say(f'Note: the tokenizer splits the identifier "{identifier}" into {len(pieces)} tokens '
            f'({" ".join(pieces)}); one rare token is best.')


def check_length(tokenizer, prompts):
    """Say so if a prompt is longer than the model reads."""
    for prompt in prompts:
        if (length := len(tokenizer(prompt).input_ids)) > tokenizer.model_max_length:
            say(f'Note: "{prompt[:60]}..." is {length} tokens; the model reads only the first '
                f'{tokenizer.model_max_length}.')


def read_record(model):
    """dreambooth.json of a trained model, a folder or hub id, as a dict; {} where there is none.

    Raises UserError if it is damaged.
    """
    path = Path(model) / "dreambooth.json"
    if not Path(model).is_dir():
        try:
            path = hub_file(model, "dreambooth.json")
        except Exception:  # the model itself was found: it has no record, or the machine is offline
            return {}
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        Subject(**record["subjects"][0])
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"{path}: cannot be read; it is damaged, train the model again") from None
    return record


def fill_identifier(prompt, record, model_path):
    """Put the recorded identifier where the prompt says [identifier]."""
    if "[identifier]" not in prompt:
        return prompt
    if not record:
        raise UserError(f'--prompt "{prompt}": {model_path} has no dreambooth.json to tell what [identifier] stands for; '
                        f'write the word itself or give a model made by --train')
    return prompt.replace("[identifier]", record["subjects"][0]["identifier"])


# ----------------------------------------------------------------------------------------------------------------------
# Data: photos

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"}
SAMPLE_LIST = "SAMPLES.sha256"  # names the files that came with the program, as `sha256sum` writes them
CLASS_PROMPT_FILE = "class_prompt.txt"


def list_images(folder, flag):
    """Paths of the images directly in `folder`, by name. Says what it leaves out; UserError if nothing is left."""
    folder, images = Path(folder), []
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder")
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in (SAMPLE_LIST, CLASS_PROMPT_FILE):
            continue
        if path.is_dir():
            say(f"Skipped {path}{os.sep}: folders inside {folder} are not searched.")
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            say(f"Skipped {path}: not an image.")
        else:
            images.append(path)
    if not images:
        raise UserError(f"{flag} {folder}: no images in this folder; put 3-5 photos ({', '.join(sorted(IMAGE_SUFFIXES))}) in it")
    return images


def load_image(path):
    """The picture at `path` as the eye sees it: upright, 8-bit RGB, transparent parts white, first frame of several.

    Raises UserError if it cannot be read to its last pixel.
    """
    if path.suffix.lower() in (".heic", ".heif"):
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise UserError(f"{path}: HEIC needs one more package, `pip install pillow-heif`; or convert it to JPEG") from None
        register_heif_opener()
    try:
        image = Image.open(path)
        if getattr(image, "n_frames", 1) > 1:
            say_once(f"{path} has {image.n_frames} frames; the first is used.")
        image = ImageOps.exif_transpose(image)  # phones store photos sideways and say so in EXIF
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_8_bit(image)
        if image.has_transparency_data:
            # convert("RGB") alone would show whatever colour lies hidden under the transparent pixels
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as problem:  # decoders raise all kinds of things on damaged files
        reason = "not an image" if isinstance(problem, Image.UnidentifiedImageError) else " ".join(str(problem).split())
        raise UserError(f"{path}: cannot be read ({reason}); remove or replace it") from None


def _to_8_bit(image):
    """A 16-bit, 32-bit or float grey image as mode L; Pillow's own convert() would clip nearly all of it to white."""
    import numpy as np

    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    top = values.max(initial=0)
    full = next(full for full in (1, 255, 65535, max(top, 65536)) if top <= full)
    return Image.fromarray((values.clip(0) * (255 / full)).round().astype(np.uint8))


def find_photos(s):
    """(photo paths, class prompt or None) for training. Says whatever a person should know about them.

    Photos and class prompt that came with the program are left out as soon as there are others beside them.
    """
    folder = Path(s.instance_data_dir)
    photos = list_images(folder, "--instance_data_dir")
    sums = read_sums(folder / SAMPLE_LIST)
    is_sample = {p: sums.get(p.name) == file_digest(p) for p in photos} if sums else {}
    own = [p for p in photos if not is_sample.get(p)]
    prompt_file = folder / CLASS_PROMPT_FILE
    if own and any(is_sample.values()):
        say(f"{folder} holds {len(own)} photos of your own beside the {len(photos) - len(own)} sample pictures that came with "
            f"the program: the samples are left out. Delete them, or move yours to a folder of their own.")
        photos = own
    class_prompt = s.class_prompt
    describes_samples = own and prompt_file.is_file() and sums.get(prompt_file.name) == file_digest(prompt_file)
    if class_prompt is None and prompt_file.is_file() and not describes_samples:
        class_prompt = read_text(prompt_file)
        say(f'Class prompt "{class_prompt}", from {prompt_file}.')
    if class_prompt is not None:
        class_prompt = " ".join(class_prompt.split())
        if not class_prompt:
            raise UserError('--class_prompt is empty: say what kind of thing the subject is, such as "a dog"')
    check_photos(photos)
    return photos, class_prompt


def read_text(path):
    """Text of a file a person wrote. Raises UserError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None


def check_photos(photos):
    """Decode every photo (UserError if one fails) and warn of duplicates and of too few."""
    seen = {}
    for path in photos:
        image = load_image(path)
        pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        if pixels in seen:
            say(f"Note: {path} is the same picture as {seen[pixels]}; remove one, a repeated photo counts twice.")
        seen.setdefault(pixels, path)
    if len(photos) < 3:
        names = ", ".join(str(p) for p in photos)
        say(f"Note: only {len(photos)} photo{'s' * (len(photos) > 1)} ({names}); 3-5 different ones are usual.")


def square(image, resolution):
    """(square image, [height, width, top, left, side, side]): the middle of `image`, scaled to `resolution` pixels.

    The numbers are SDXL's size conditioning: original size, crop corner, target size (SDXL paper, section 2.2).
    """
    width, height = image.size
    scale = resolution / min(width, height)
    scaled = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    left, top = (scaled[0] - resolution) // 2, (scaled[1] - resolution) // 2
    image = image.resize(scaled, Image.Resampling.LANCZOS).crop((left, top, left + resolution, top + resolution))
    return image, [height, width, top, left, resolution, resolution]


def file_digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_sums(path):
    """{file name: sha256} from a file that `sha256sum` could have written; {} where there is none. Last line wins."""
    if not Path(path).is_file():
        return {}
    lines = (line.split(maxsplit=1) for line in Path(path).read_text(encoding="utf-8").splitlines())
    return {parts[1].strip(): parts[0] for parts in lines if len(parts) == 2}


# ----------------------------------------------------------------------------------------------------------------------
# Data: class images

CLASS_IMAGE_STEPS = 25
MANIFEST = "MANIFEST.sha256"


def class_image_settings(s, models, class_prompt, resolution, plan):
    """Everything that shapes a class image. Two runs that differ in any of it never share a cache folder."""
    configs = {**models.pipeline.config, **models.pipeline.scheduler.config}
    return {"prompt": class_prompt, "model": fingerprint(models), "resolution": resolution,
            "scheduler": "DPMSolverMultistepScheduler", "num_inference_steps": CLASS_IMAGE_STEPS,
            "guidance_scale": guidance_scale(s, models.unet.config), "precision": plan.precision, "seed": "index",
            "config": {k: str(v) for k, v in configs.items() if not k.startswith("_")}}


def missing_class_images(folder, count):
    """Indices of the first `count` class images that `folder` lacks, or holds other than as they were made."""
    made = read_sums(folder / MANIFEST)
    names = {i: class_image_name(i) for i in range(count)}
    return [i for i, name in names.items()
            if not (folder / name).is_file() or made.get(name) != file_digest(folder / name)]


def class_image_name(index):
    return f"{index:05d}.png"


def prepare_class_images(s, models, subject, resolution, plan, accelerator):
    """Paths of the class images (paper section 3.2: samples of the frozen model), making only what is missing.

    Every process makes its share, each image from the seed of its own index, so neither an interruption nor the number
    of GPUs changes what is made (but for rounding). The manifest grows by one line as each image is complete.
    """
    root = Path(s.class_data_dir)
    if root.is_dir() and any(p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES for p in root.iterdir()):
        own = list_images(root, "--class_data_dir")[:s.num_class_images]
        check_photos(own)
        say(f"Class images: the {len(own)} pictures in {root} are used as they are.")
        return own
    settings = class_image_settings(s, models, subject.class_prompt, resolution, plan)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = root / f"{slug(subject.class_prompt)}-{key}"
    paths = [folder / class_image_name(i) for i in range(s.num_class_images)]
    missing = missing_class_images(folder, s.num_class_images)
    say(f"Class images: {len(paths) - len(missing)} of {len(paths)} are in {folder}"
        + (f"; drawing {len(missing)}." if missing else "."))
    accelerator.wait_for_everyone()  # all have counted before any draws
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        share = missing[accelerator.process_index::accelerator.num_processes]
        draw_class_images(s, models, subject.class_prompt, resolution, plan, folder, share)
    accelerator.wait_for_everyone()
    return paths


def draw_class_images(s, models, class_prompt, resolution, plan, folder, indices):
    """Draw the class images of these indices into `folder` and enter each in its manifest."""
    from diffusers import DPMSolverMultistepScheduler

    # In half precision the model is read a second time, so that the weights to be trained keep all their digits.
    pipeline = models.pipeline if plan.precision == "no" else load_pipeline(models.name, plan.dtype)
    own_scheduler = pipeline.scheduler
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(own_scheduler.config)
    pipeline.to(plan.device)
    look = dict(steps=CLASS_IMAGE_STEPS, guidance_scale=guidance_scale(s, models.unet.config), height=resolution,
                width=resolution, title="class images")
    pictures = draw(pipeline, [(class_prompt, index) for index in indices], batch_size=s.sample_batch_size, **look)
    for picture, index in zip(pictures, indices):
        if is_flat(picture):  # another seed; a class image teaches nothing if it shows nothing
            picture = next(draw(pipeline, [(class_prompt, index + 2**32)], batch_size=1, **look))
        name = class_image_name(index)
        picture.save(folder / f"{name}.part", format="PNG")
        os.replace(folder / f"{name}.part", folder / name)
        with open(folder / MANIFEST, "a", encoding="utf-8") as manifest:
            manifest.write(f"{file_digest(folder / name)}  {name}\n")
    pipeline.scheduler = own_scheduler


# ----------------------------------------------------------------------------------------------------------------------
# Data: the latent cache


@dataclass(frozen=True)
class LatentCache:
    """The VAE's view of every training picture, one row each, on the CPU; a mirrored picture is a row of its own.

    A row keeps mean and deviation, so that each step samples its latents afresh (the VAE is not run again), together
    with its size record and the number of its prompt: whatever order rows are drawn in, they cannot come apart.
    """

    mean: typing.Any  # [N, C, h, w], times the VAE's scaling factor
    std: typing.Any  # [N, C, h, w], likewise
    time_ids: typing.Any  # [N, 6]
    prompt: typing.Any  # [N], index into `prompts`
    is_class: typing.Any  # [N] bool
    prompts: list


def cache_latents(models, pictures, prompts, resolution, device, random_flip=False):
    """Encode `pictures`, a list of (path, prompt index, is_class), into a LatentCache.

    The VAE works in float32 whatever else does: SDXL's overflows in fp16. Class images are mirrored as the photos are.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    vae = models.vae.to(device)
    rows = []
    for path, prompt, is_class in tqdm(pictures, desc="encoding", unit="image", disable=not is_first_process()):
        image = load_image(path)
        if min(image.size) < resolution and not is_class:
            say(f"Note: {path} is {image.width} x {image.height}; it is enlarged to {resolution}, which blurs it.")
        image, sizes = square(image, resolution)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device, vae.dtype) / 127.5 - 1  # [1, 3, H, W]
        for variant in (pixels, pixels.flip(-1)) if random_flip else (pixels,):
            with torch.no_grad():
                moments = vae.encode(variant).latent_dist
            rows.append((moments.mean.float().cpu(), moments.std.float().cpu(), sizes, prompt, is_class))
    vae.to("cpu")
    mean, std, time_ids, prompt, is_class = zip(*rows)
    scale = vae.config.scaling_factor
    return LatentCache(torch.cat(mean) * scale, torch.cat(std) * scale, torch.tensor(time_ids, dtype=torch.float32),
                       torch.tensor(prompt), torch.tensor(is_class), list(prompts))


def random_source(*key):
    """A CPU torch.Generator that depends on `key` alone: randomness is the same on every device and after a restart."""
    import torch

    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big"))


def shuffled(size, start, count, *key):
    """Draws start .. start + count - 1 of an endless run of shuffles of range(size): every row once before any twice."""
    import torch

    orders = {}
    for epoch in {draw // size for draw in range(start, start + count)}:
        orders[epoch] = torch.randperm(size, generator=random_source("order", *key, epoch))
    return [int(orders[draw // size][draw % size]) for draw in range(start, start + count)]


def make_batch(cache, s, micro_step, num_train_timesteps, process=0, num_processes=1):
    """The batch of one micro-step: `train_batch_size` photos and, with prior preservation, as many class images.

    Photos and class images are drawn independently, each row with its own noise and timestep (paper equation 2). The
    batch depends on nothing but seed, micro-step and process. `weight` [B] makes the loss a weighted sum: a photo counts
    1 / photos, a class image prior_loss_weight / class images.
    """
    import torch

    start = (micro_step * num_processes + process) * s.train_batch_size
    rows, weight = [], []
    for is_class, share in ((False, 1.0), (True, s.prior_loss_weight)):
        pool = (cache.is_class == is_class).nonzero().flatten()
        if len(pool):
            picks = shuffled(len(pool), start, s.train_batch_size, s.seed, is_class)
            rows.append(pool[picks])
            weight += [share / len(picks)] * len(picks)
    rows = torch.cat(rows)
    source = random_source("noise", s.seed, micro_step, process)
    mean, std = cache.mean[rows], cache.std[rows]
    return {
        "latents": mean + std * torch.randn(mean.shape, generator=source),
        "noise": torch.randn(mean.shape, generator=source),
        "timesteps": torch.randint(num_train_timesteps, (len(rows),), generator=source),
        "time_ids": cache.time_ids[rows],
        "prompt": cache.prompt[rows],
        "is_class": cache.is_class[rows],
        "weight": torch.tensor(weight),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Methods: what trains


@dataclass(frozen=True)
class ParameterGroup:
    """Weights that train together: the modules they live in, the parameters, their learning rate."""

    name: str
    modules: list
    parameters: list
    lr: float


def full_fine_tuning(s, models):
    """The paper's method: every layer of the UNet and, if asked, of the text encoder(s) (paper section 3.2)."""
    name, recipe = recipe_for(models.unet.config)
    unet_lr = recipe.learning_rate_with_text_encoder if s.train_text_encoder else recipe.learning_rate
    groups = [ParameterGroup("unet", [models.unet], list(models.unet.parameters()), default(s.learning_rate, unet_lr))]
    if s.train_text_encoder:
        groups.append(ParameterGroup("text_encoder", models.text_encoders, text_encoder_parameters(models),
                                     default(s.text_encoder_lr, recipe.text_encoder_lr)))
    return groups


def default(value, otherwise):
    return otherwise if value is None else value


def guidance_scale(s, unet_config):
    return default(s.guidance_scale, recipe_for(unet_config)[1].guidance_scale)


# ----------------------------------------------------------------------------------------------------------------------
# Loss


def min_snr_weights(noise_scheduler, timesteps, snr_gamma):
    """Loss weights [B] that even out the timesteps (Hang et al., arXiv 2303.09556, section 3.4).

    min(snr, gamma) / snr when the model predicts noise, min(snr, gamma) / (snr + 1) when it predicts velocity.
    """
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=snr_gamma) / (snr + 1)
    return (snr_gamma / snr).clamp(max=1)  # written so that snr = 0 gives 1, not 0 / 0


def diffusion_loss(noise_scheduler, batch, denoiser, snr_gamma=None):
    """(loss, per-picture losses [B]): the paper's equation 2.

    `denoiser` maps noisy latents [B, C, h, w] and their batch to the model's prediction. The prior-preservation term is
    not a term here but the weight that each picture of the batch carries.
    """
    noisy = noise_scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    target = batch["noise"]
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(batch["latents"], batch["noise"], batch["timesteps"])
    losses = (denoiser(noisy, batch).float() - target.float()).square().mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        losses = losses * min_snr_weights(noise_scheduler, batch["timesteps"], snr_gamma)
    return (batch["weight"] * losses).sum(), losses


# ----------------------------------------------------------------------------------------------------------------------
# Memory plan


@dataclass(frozen=True)
class Plan:
    """Where and in which precision to compute."""

    device: typing.Any
    precision: str  # "no", "fp16" or "bf16"

    @property
    def dtype(self):
        import torch

        return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]


def plan_device(s):
    """The Plan for this machine: CUDA, else Apple's MPS, else the CPU. Raises UserError for fp16 without a CUDA GPU."""
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("mps" if mps else "cpu")
    precision = s.mixed_precision
    if precision == "auto":
        precision = ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16") if cuda else "no"
    if precision == "fp16" and not cuda:
        raise UserError(f"--mixed_precision fp16 needs a CUDA GPU and this machine has none; give no{'' if mps else ' or bf16'}")
    return Plan(device, precision)


def wants_checkpointing(s, parameters, plan):
    """Whether to recompute activations. By default only on a CUDA GPU with less than 34 bytes per trained weight.

    Weights, gradients and AdamW's two moments take 16 bytes; the activations of a photo and a class image at the
    model's own resolution, by estimate, about as much again.
    """
    import torch

    if s.gradient_checkpointing is not None or plan.device.type != "cuda":
        return bool(s.gradient_checkpointing)
    return torch.cuda.get_device_properties(plan.device).total_memory < 34 * parameters


def machine_name(device):
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return "Apple GPU (MPS)" if device.type == "mps" else f"CPU, {torch.get_num_threads()} threads"


# ----------------------------------------------------------------------------------------------------------------------
# Training

REPORT_EVERY = 10  # optimizer steps between reads of the losses; reading makes the CPU wait for the GPU


def optimize(s, models, groups, cache, steps, accelerator, log_dir):
    """Train `groups` for `steps` optimizer steps. Returns the history: one (instance loss, prior loss) per step.

    Both losses are means over their own pictures, before lambda; prior is None without class images. A batch depends on
    the number of its step alone, so nothing has to be remembered from one step to the next but weights and optimizer.
    """
    import torch
    from tqdm import tqdm

    models, modules, conditioning, optimizer, lr_scheduler = prepare_training(s, models, groups, cache.prompts, steps, accelerator)

    def denoiser(noisy_latents, batch):
        hidden, pooled = conditioning(batch["prompt"])
        return predict(models.unet, noisy_latents, batch["timesteps"], hidden, pooled, batch["time_ids"])

    history, unread, writer = [], [], loss_writer(log_dir)
    bar = tqdm(range(steps), desc="training", unit="step", disable=not is_first_process())
    for step in bar:
        for micro_step in range(step * s.gradient_accumulation_steps, (step + 1) * s.gradient_accumulation_steps):
            batch = make_batch(cache, s, micro_step, models.noise_scheduler.config.num_train_timesteps,
                               accelerator.process_index, accelerator.num_processes)
            batch = {key: value.to(accelerator.device) for key, value in batch.items()}
            with accelerator.accumulate(*modules):
                loss, losses = diffusion_loss(models.noise_scheduler, batch, denoiser, s.snr_gamma)
                accelerator.backward(loss)
                if accelerator.sync_gradients and s.max_grad_norm:
                    accelerator.unscale_gradients(optimizer)
                    for group in groups:
                        torch.nn.utils.clip_grad_norm_(group.parameters, s.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            unread.append(split_means(losses.detach(), batch["is_class"]))
        lr_scheduler.step()
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            read = accelerator.reduce(torch.stack(unread), "mean").view(-1, s.gradient_accumulation_steps, 2).mean(1)
            report_losses(read.tolist(), history, cache, groups, lr_scheduler, bar, writer)
            unread = []
    if writer:
        writer.close()
    for group in groups:
        for module in group.modules:
            end_training(module)
    return history


def end_training(module):
    """Take accelerate's autocast off again; its own unwrap_model would strip transformers' wrappers of forward as well."""
    module.eval()
    for name in ("forward", "_original_forward"):
        vars(module).pop(name, None)


def prepare_training(s, models, groups, prompts, steps, accelerator):
    """Bring what trains to the device, wrapped for precision and processes, and make its optimizer and schedule.

    Returns (models with the wrapped modules, wrapped modules, conditioning function, optimizer, learning rate schedule).
    """
    import torch
    from diffusers.optimization import get_scheduler

    device, training = accelerator.device, [module for group in groups for module in group.modules]
    for module in training:
        module.to(device).train()
    for group in groups:
        for parameter in group.parameters:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([{"params": g.parameters, "lr": g.lr} for g in groups],
                                  weight_decay=s.adam_weight_decay, fused=device.type in ("cuda", "cpu") or None)
    # diffusers' "constant" has no warmup. The schedule stays ours: accelerate would advance it once per process.
    schedule = "constant_with_warmup" if s.lr_scheduler == "constant" else s.lr_scheduler
    lr_scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=s.lr_warmup_steps, num_training_steps=steps)
    trains_text = any(t in training for t in models.text_encoders)
    models = dataclasses.replace(models, unet=accelerator.prepare(models.unet), text_encoders=[
        accelerator.prepare(t) if t in training else t for t in models.text_encoders])
    modules = [models.unet, *(models.text_encoders if trains_text else [])]
    conditioning = prompt_conditioning(models, prompts, trains_text, device)
    return models, modules, conditioning, accelerator.prepare(optimizer), lr_scheduler


def split_means(losses, is_class):
    """[mean over photos, mean over class images (nan without any)] of losses [B], without waiting for the GPU."""
    import torch

    return torch.stack([(losses * chosen).sum() / chosen.sum() for chosen in (~is_class, is_class)])


def prompt_conditioning(models, prompts, trains, device):
    """A function from prompt numbers [B] to their conditioning ([B, tokens, channels], pooled [B, channels] or None).

    Every distinct prompt is encoded once: for good when no text encoder trains, which then leaves the GPU, else once
    per call.
    """
    import torch

    def encode():
        return encode_prompts(models, prompts)

    if not trains:
        with torch.no_grad():
            for text_encoder in models.text_encoders:
                text_encoder.to(device)
            frozen = encode()
            for text_encoder in models.text_encoders:
                text_encoder.to("cpu")

    def conditioning(numbers):
        hidden, pooled = encode() if trains else frozen
        return hidden[numbers], None if pooled is None else pooled[numbers]

    return conditioning


def report_losses(read, history, cache, groups, lr_scheduler, bar, writer):
    """Append the losses just read to `history`, to the progress bar and to TensorBoard. UserError if one is not finite."""
    has_class = bool(cache.is_class.any())
    for instance, prior in read:
        history.append((instance, prior if has_class else None))
        if not all(abs(x) < float("inf") for x in history[-1] if x is not None):
            raise UserError(f"training stopped: the loss is {instance} at step {len(history)}; "
                            f"give a smaller --learning_rate, or --mixed_precision no")
        if writer:
            writer.add_scalar("loss/instance", instance, len(history))
            if has_class:
                writer.add_scalar("loss/prior", prior, len(history))
    for group, lr in zip(groups, lr_scheduler.get_last_lr()):
        if writer:
            writer.add_scalar(f"lr/{group.name}", lr, len(history))
    means = loss_means(history[-50:])
    bar.set_postfix({k: f"{v:.4f}" for k, v in means.items() if v is not None})


def loss_means(history):
    """{"instance": mean, "prior": mean or None} of a stretch of history."""
    columns = zip(("instance", "prior"), zip(*history))
    return {name: None if None in column else sum(column) / len(column) for name, column in columns}


def loss_writer(log_dir):
    """A TensorBoard writer, None on all processes but the first."""
    if not is_first_process():
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir)


def train(s):
    """Fine-tune a model on a subject and write it to --output_dir."""
    photos, class_prompt = find_photos(s)
    subject = make_subject(s, class_prompt)
    check_output_dir(s)
    if s.with_prior_preservation:
        check_writable(s.class_data_dir, "--class_data_dir")
    name = find_model(s.model_name or default_model(), "--model_name")

    plan = plan_device(s)

    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=plan.precision, cpu=plan.device.type == "cpu",
                              gradient_accumulation_steps=s.gradient_accumulation_steps)
    started = time.monotonic()
    models = load_models(name, torch.float32)
    family, recipe = recipe_for(models.unet.config)
    steps, resolution = default(s.steps, recipe.steps), default(s.resolution, models.resolution)
    if s.lr_warmup_steps >= steps:
        raise UserError(f"--lr_warmup_steps {s.lr_warmup_steps}: must be less than the {steps} steps of this run")
    groups = full_fine_tuning(s, models)
    used = {"steps": steps, "resolution": resolution, "precision": plan.precision,
            "learning_rates": {group.name: group.lr for group in groups},
            "gradient_checkpointing": set_checkpointing(s, groups, plan),
            "guidance_scale": guidance_scale(s, models.unet.config)}
    announce(models, family, plan, used, s, subject, photos, groups)

    pictures, prompts = [(path, 0, False) for path in photos], [subject.instance_prompt]
    if s.with_prior_preservation:
        class_images = prepare_class_images(s, models, subject, resolution, plan, accelerator)
        pictures, prompts = pictures + [(path, 1, True) for path in class_images], prompts + [subject.class_prompt]
    cache = cache_latents(models, pictures, prompts, resolution, plan.device, s.random_flip)
    prepared = time.monotonic()
    with new_output(s) if accelerator.is_main_process else contextlib.nullcontext() as folder:
        history = optimize(s, models, groups, cache, steps, accelerator, folder and folder / "logs")
        seconds = {"preparing": round(prepared - started, 1), "training": round(time.monotonic() - prepared, 1)}
        accelerator.free_memory()
        if accelerator.is_main_process:
            save_output(folder, s, models, subject, used, history, seconds)
    report_training(s, history, seconds)
    if accelerator.is_main_process:
        draw_samples(s, models, subject, resolution, plan)
    accelerator.wait_for_everyone()


def announce(models, family, plan, used, s, subject, photos, groups):
    """Say everything that was decided before the long part begins."""
    check_identifier(models.tokenizers[0], subject.identifier)
    check_length(models.tokenizers[0], [subject.instance_prompt, subject.class_prompt])
    say(f"Model: {models.name} ({family}, {models.noise_scheduler.config.prediction_type}), {used['resolution']} px")
    say(f"Machine: {machine_name(plan.device)}; arithmetic {'float32' if plan.precision == 'no' else plan.precision}")
    say(f'Subject: "{subject.instance_prompt}", {len(photos)} photos'
        + (f'; class: "{subject.class_prompt}", weight {s.prior_loss_weight:g}' if s.with_prior_preservation else "; no class images"))
    for group in groups:
        say(f"Trains: {group.name}, {sum(p.numel() for p in group.parameters) / 1e6:.1f} M weights, "
            f"learning rate {group.lr:g}, {used['steps']} steps")


def default_model():
    """Stable Diffusion 1.5 on a CUDA GPU, else the bundled model; says which."""
    import torch

    if torch.cuda.is_available():
        say(f"No --model_name given: using {DEFAULT_MODEL}.")
        return DEFAULT_MODEL
    say(f"No --model_name and no CUDA GPU: using the small bundled model, {short_path(BUNDLED_MODEL)}, which knows only "
        f"emoji. Give --model_name {DEFAULT_MODEL} for the real one (hours on a CPU).")
    return short_path(BUNDLED_MODEL)


def set_checkpointing(s, groups, plan):
    """Turn on activation checkpointing in every module that trains, if it is wanted; says and returns whether it is."""
    wanted = wants_checkpointing(s, sum(p.numel() for g in groups for p in g.parameters), plan)
    if wanted:
        say("Gradient checkpointing: on (less memory, but slower).")
        for module in (module for group in groups for module in group.modules):
            enable = getattr(module, "enable_gradient_checkpointing", None) or module.gradient_checkpointing_enable
            enable()
    return wanted


def report_training(s, history, seconds):
    """Say how the losses went and what to do next."""
    for when, stretch in (("first", history[:100]), ("last", history[-100:])):
        losses = ", ".join(f"{k} {v:.4f}" for k, v in loss_means(stretch).items() if v is not None)
        say(f"Mean loss of the {when} {len(stretch)} steps: {losses}")
    say(f"Trained in {seconds['training']:.0f} s after {seconds['preparing']:.0f} s of preparation. The model is in "
        f"{s.output_dir}.")
    say(f'Draw with it: python {Path(__file__).name} --infer --model_path "{s.output_dir}" --prompt "a [identifier] ..."')


# ----------------------------------------------------------------------------------------------------------------------
# Saving


def check_output_dir(s):
    """UserError unless --output_dir can be made, is empty, or is an earlier output of --train that can be renamed."""
    folder = Path(s.output_dir).resolve()
    check_writable(s.output_dir, "--output_dir")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "dreambooth.json").is_file():
        raise UserError(f"--output_dir {s.output_dir}: the folder holds something else (no dreambooth.json); give another folder")
    if folder == Path.cwd() or os.path.ismount(folder):
        raise UserError(f"--output_dir {s.output_dir}: this folder cannot be renamed; give one inside it")


def check_writable(path, flag):
    """UserError unless `path` is, or can be made, a folder to write in."""
    whole = Path(path).resolve()
    existing = next(p for p in (whole, *whole.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "is write-protected" if existing.is_dir() else "is a file"
        raise UserError(f"{flag} {path}: {short_path(existing)} {problem}; give another folder")


@contextlib.contextmanager
def new_output(s):
    """A folder to fill that becomes --output_dir if the block succeeds, and is removed if it fails."""
    target = Path(s.output_dir).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
    folder.chmod(0o755)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    replace_output(folder, target, s.overwrite)


def replace_output(folder, target, overwrite):
    """Rename `folder` to `target`; what was there is kept under another name, or deleted if `overwrite`."""
    earlier = None
    try:
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()
        if target.exists():
            earlier = next(p for n in range(1, 10**6) if not (p := target.with_name(f"{target.name}-{n}")).exists())
            target.rename(earlier)
        folder.rename(target)
    except OSError as problem:
        if earlier and not target.exists():
            earlier.rename(target)
        raise UserError(f"{target} cannot be replaced ({problem.strerror}); the new model is complete in {folder}") from None
    if earlier and overwrite:
        shutil.rmtree(earlier)
    elif earlier:
        say(f"The earlier {target.name} is kept as {short_path(earlier)}; --overwrite would have deleted it.")


def short_path(path):
    """`path` as seen from the working folder, whole if it lies on another drive."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def save_output(folder, s, models, subject, used, history, seconds):
    """Write the pipeline, which plain diffusers loads, and dreambooth.json beside it."""
    from importlib.metadata import version

    models.pipeline.to("cpu")
    models.pipeline.save_pretrained(folder, safe_serialization=True)
    record = {
        "base_model": models.name,
        "subjects": [dataclasses.asdict(subject)],
        "used": used,
        "loss": {"first_100_steps": loss_means(history[:100]), "last_100_steps": loss_means(history[-100:])},
        "seconds": seconds,
        "settings": dataclasses.asdict(s),
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers", "accelerate")},
    }
    (folder / "dreambooth.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Inference


def draw(pipeline, jobs, *, steps, guidance_scale, height, width, batch_size, negative_prompt="", title="drawing"):
    """Yield one PIL image per (prompt, seed) in `jobs`, in order, `batch_size` at a time.

    Each picture's noise comes from its own seed on the CPU, so it depends neither on its neighbours nor on the device.
    """
    import torch
    from tqdm import tqdm

    with tqdm(total=len(jobs), desc=title, unit="image", disable=not is_first_process()) as bar:
        for start in range(0, len(jobs), batch_size):
            prompts, seeds = zip(*jobs[start:start + batch_size])
            pictures = pipeline(
                list(prompts), negative_prompt=[negative_prompt] * len(prompts) if negative_prompt else None,
                num_inference_steps=steps, guidance_scale=guidance_scale, height=height, width=width,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images
            for prompt, picture in zip(prompts, pictures):
                bar.update()
                if is_flat(picture) and pipeline.dtype != torch.float32:
                    raise UserError(f'"{prompt}" came out in one flat colour, as happens when {pipeline.dtype} overflows; '
                                    f"give --mixed_precision no")
                yield picture


def is_flat(picture):
    """Whether a picture is all one colour, as it is after an overflow."""
    return all(high - low < 4 for low, high in picture.getextrema())


def draw_pictures(folder, pipeline, s, prompts, seeds, model, size):
    """Draw every prompt with every seed into `folder`, one PNG each and a grid of all; returns the grid's path.

    `model` is what the pictures' text chunks say of the model, `size` is (width, height).
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    guidance, pictures = guidance_scale(s, pipeline.unet.config), []
    common = {"Steps": s.num_inference_steps, "Sampler": type(pipeline.scheduler).__name__.removesuffix("Scheduler"),
              "CFG scale": guidance}
    negative = [f"Negative prompt: {s.negative_prompt}"] if s.negative_prompt else []
    drawn = draw(pipeline, jobs, steps=s.num_inference_steps, guidance_scale=guidance, height=size[1], width=size[0],
                 batch_size=s.sample_batch_size, negative_prompt=s.negative_prompt)
    for picture, (prompt, seed) in zip(drawn, jobs):
        settings = {**common, "Seed": seed, "Size": f"{picture.width}x{picture.height}", **model}
        lines = [prompt, *negative, ", ".join(f"{key}: {value}" for key, value in settings.items())]
        save_picture(folder, f"{slug(prompt)}-{seed}", picture, "\n".join(lines))
        pictures.append(picture)
    return save_picture(folder, f"grid-{slug(prompts[0])}-{seeds[0]}", image_grid(pictures, columns=len(seeds)),
                        "\n".join([*prompts, *negative, f"Seeds: {seeds[0]} to {seeds[-1]}, {common | model}"]))


def save_picture(folder, name, picture, parameters):
    """Save as NAME.png with `parameters` in the text chunk of that name, as A1111 and others write and read it.

    A picture made with other parameters that has the name already is kept: the new one gets a number.
    """
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", parameters)
    for number in range(1, 10**6):
        path = folder / f"{name}{f'-{number}' if number > 1 else ''}.png"
        if not path.exists() or png_parameters(path) == parameters:
            break
    picture.save(path, pnginfo=text)
    return path


def png_parameters(path):
    """What a PNG says it was made with; None if it says nothing or cannot be read."""
    try:
        with Image.open(path) as image:
            return image.info.get("parameters")
    except OSError:
        return None


def slug(text):
    """A prompt as part of a file name: words joined by "-", short enough for every file system."""
    return re.sub(r"\W+", "-", text.lower()).encode()[:120].decode(errors="ignore").strip("-") or "prompt"


def image_grid(pictures, columns):
    """One image of all `pictures`, `columns` to a row, with a thin white line between them."""
    width, height = pictures[0].size
    rows, gap = -(-len(pictures) // columns), max(1, width // 64)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return grid


def draw_samples(s, models, subject, resolution, plan):
    """The sample grid of a finished training: the subject, the subject elsewhere, and the class without it.

    The model is safe by then: whatever goes wrong here is only said.
    """
    prompts = s.validation_prompt or [subject.instance_prompt, f"{subject.instance_prompt} on the moon",
                                      *([subject.class_prompt] if subject.class_prompt else [])]
    prompts = [prompt.replace("[identifier]", subject.identifier) for prompt in prompts]
    try:
        models.pipeline.to(plan.device, plan.dtype)
        grid = draw_pictures(Path(s.output_dir) / "samples", models.pipeline, s, prompts, range(s.seed, s.seed + 4),
                             {"Model": s.output_dir}, (resolution, resolution))
        say(f"A look at it is in {grid}.")
    except (UserError, RuntimeError, OSError) as problem:
        say(f"Note: the samples could not be drawn ({problem}); the model is complete.")


def infer(s):
    """Draw --prompt with a trained model into --image_dir."""
    if s.model_path == "./output" and not Path(s.model_path).exists():
        raise UserError("--model_path ./output: no such folder; make a model with --train first, or give another path")
    check_writable(s.image_dir, "--image_dir")
    name = find_model(s.model_path, "--model_path")
    record = read_record(name)
    if not s.prompt and not record:
        raise UserError('--prompt is missing: say what to draw, such as --prompt "a dog on the moon"')
    prompts = s.prompt or [f"{record['subjects'][0]['instance_prompt']} on the moon"]
    prompts = [fill_identifier(prompt, record, s.model_path) for prompt in prompts]
    s = dataclasses.replace(s, negative_prompt=fill_identifier(s.negative_prompt, record, s.model_path))

    plan = plan_device(s)
    pipeline = load_pipeline(name, plan.dtype, "--model_path").to(plan.device)
    check_length(pipeline.tokenizer, prompts)
    side = record.get("used", {}).get("resolution") or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    model = {"Model": s.model_path}
    if record:  # tells pictures of one training from those of the next into the same folder
        model["Model hash"] = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:10]
    say(f"Model: {name}; machine: {machine_name(plan.device)}; "
        f"arithmetic {'float32' if plan.precision == 'no' else plan.precision}")
    for prompt in prompts:
        say(f'Drawing "{prompt}", seeds {s.seed} to {s.seed + s.num_images - 1}')
    grid = draw_pictures(Path(s.image_dir), pipeline, s, prompts, range(s.seed, s.seed + s.num_images), model,
                         (default(s.width, side), default(s.height, side)))
    say(f"{len(prompts) * s.num_images} pictures are in {s.image_dir}, all together in {grid}.")


# ----------------------------------------------------------------------------------------------------------------------
# main


REMEDIES = {"train": "try --gradient_checkpointing, --train_batch_size 1, a smaller --resolution or --sample_batch_size 1",
            "infer": "try --sample_batch_size 1, --mixed_precision fp16, or a smaller --height and --width"}


def main(argv=None):
    """Run one command; the exit status is 0, or 2 after one line on standard error if the user can put it right."""
    try:
        settings = parse_settings(argv)
        {"train": train, "infer": infer}[settings.mode](settings)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; pictures drawn so far are kept, and so is an earlier output", file=sys.stderr)
        return 130
    except RuntimeError as problem:
        if "out of memory" not in str(problem):
            raise
        print(f"error: the GPU's memory is full; {REMEDIES[settings.mode]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
