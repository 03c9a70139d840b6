"""Loading a pipeline, whole and from safetensors alone, to draw with it or to train it."""

import contextlib
import dataclasses
import functools
import importlib
import re
from pathlib import Path

from dreambooth.base import UserError, default, say_once
from dreambooth.mishaps import is_of_machine
from dreambooth.models.addresses import is_single_file
from dreambooth.models.checkpoint import load_single_file
from dreambooth.models.fits import check_fit, check_trainable, say_if_distilled
from dreambooth.models.headers import read_json
from dreambooth.models.hub import hub_folder
from dreambooth.models.inventory import WEIGHTS, check_folder, choose_variant, files_in, parts_of
from dreambooth.models.parts import sample_weights, take_apart, text_encoders_of

LIBRARIES = ("diffusers", "transformers")  # whose classes a part may be of
FOREIGN_CODE = "its {part} is a {class_name} of code of its own, which is not run"


def load_pipeline(name, dtype, flag="--model_name", unet=None, unet_dtype=None, variant=None):
    """The diffusers pipeline in a folder, of a hub id or in a file, in `dtype`, on the CPU, without a safety checker.

    Its UNet in `unet_dtype`, if given, or `unet` in its place; its weights from the files of `variant`, if given. Only safetensors
    are read. The network is asked only for what the cache lacks. UserError for whatever is missing, in pieces or of another kind.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(library.utils.logging.CRITICAL)  # what goes wrong is raised as well
        library.utils.logging.disable_progress_bar()
    dtypes = {"default": dtype, "unet": default(unet_dtype, dtype)}
    load = load_single_file if is_single_file(name) else functools.partial(load_folder, variant=variant)
    try:
        pipeline = load(name, flag, dtypes, {} if unet is None else {"unet": unet})
    except Exception as problem:  # configs and files of all kinds meet libraries that check little
        if isinstance(problem, UserError) or is_of_machine(problem):
            raise
        reason = " ".join(str(problem).split())
        package = re.search(r"pip install [\w-]+", reason)
        reason = f"it needs a package that is not here: {package[0]}" if package else reason[:300]
        raise UserError(f"{flag} {name}: cannot be loaded ({reason})") from None
    make_ready(pipeline, name, flag)
    return pipeline


def load_folder(name, flag, dtypes, parts, variant=None):
    """The pipeline in a diffusers folder or of a hub id, with `parts` in place of its own. Each part in `variant`, or else in the
    variant that is there."""
    from diffusers import DiffusionPipeline

    folder = Path(name) if Path(name).is_dir() else hub_folder(name, flag, variant)
    check_folder(folder, name, flag)
    check_fit(folder, name, flag)
    index, files = read_json(folder / "model_index.json"), files_in(folder)
    variants = {part: choose_variant(files, part, variant) for part in parts_of(index) if part in WEIGHTS}
    loaded = {part: load_part(folder, part, index[part], variant, dtypes.get(part, dtypes["default"]))
              for part, variant in variants.items() if part not in parts}
    if variant is None:
        say_variants(name, variants)
    pipeline = DiffusionPipeline.from_pretrained(
        str(folder), **loaded, **parts, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
        local_files_only=True)
    pipeline.register_to_config(_name_or_path=name)
    return pipeline


def load_part(folder, part, kind, variant, dtype):
    """A part of a pipeline, of the class `kind`, (library, name), with all of its weights. ValueError if some are missing."""
    library, class_name = kind
    if library not in LIBRARIES:
        raise ValueError(FOREIGN_CODE.format(part=part, class_name=class_name))
    try:
        module, report = getattr(importlib.import_module(library), class_name).from_pretrained(
            str(folder), subfolder=part, variant=variant or None, use_safetensors=True, dtype=dtype, local_files_only=True,
            output_loading_info=True, **({"ignore_mismatched_sizes": True} if library == "transformers" else {}))
    except Exception as problem:
        if is_of_machine(problem):
            raise
        raise ValueError(f"{part}: {problem}") from None
    if missing := report["missing_keys"]:  # the library would make them up
        raise ValueError(f"{part}: it lacks some of the weights that its config asks for, such as {min(missing)}")
    if others := sorted(report["mismatched_keys"]):  # here it would, too, and says which only so
        raise ValueError(f"{part}: its weights are of another size than its config says, such as {others[0][0]}")
    if part in ("unet", "vae") and (unread := sorted(report["unexpected_keys"])):
        say_once(f"Note: {folder}: {len(unread)} tensors of its {part} are not in its config and are left out, such as {unread[0]}.")
    return module.eval()


def bare_part(folder, part, kind):
    """A part of a pipeline, of the class `kind`, (library, name), without its weights: names and shapes alone."""
    import torch

    library, class_name = kind
    if library not in LIBRARIES:
        raise ValueError(FOREIGN_CODE.format(part=part, class_name=class_name))
    kind = getattr(importlib.import_module(library), class_name)
    with torch.device("meta"):
        if library == "diffusers":
            return kind.from_config(kind.load_config(str(folder), subfolder=part, local_files_only=True))
        return kind(kind.config_class.from_pretrained(str(folder), subfolder=part, local_files_only=True))


def say_variants(name, variants):
    """Say where a model's weights are there only in half precision, or as another variant."""
    for variant in sorted({variant for variant in variants.values() if variant}):
        parts = " and ".join(part for part, own in variants.items() if own == variant)
        half = ", that is, in half precision" if variant in ("fp16", "bf16") else ""
        say_once(f"Note: {name} has its {parts} only as the variant {variant}{half}; that is what is used.")


def make_ready(pipeline, name, flag):
    """What every loaded pipeline needs here. UserError where its tokenizer is not that of its text encoder."""
    pipeline.set_progress_bar_config(disable=True)
    if not hasattr(pipeline.scheduler, "init_noise_sigma"):
        raise UserError(f"{flag} {name}: its scheduler, {type(pipeline.scheduler).__name__}, is of another kind of model than Stable "
                        f"Diffusion; give a model with its own scheduler")
    with contextlib.suppress(NotImplementedError, AttributeError):  # not every VAE can
        pipeline.vae.enable_slicing()  # decode a batch one by one: at 1024 px its activations outweigh the UNet's
    pipeline.watermark = None  # SDXL marks its pictures where invisible-watermark is installed; SD never does
    for part, text_encoder in text_encoders_of(pipeline).items():
        tokenizer = getattr(pipeline, part.replace("text_encoder", "tokenizer"))
        words, rows = len(tokenizer), text_encoder.config.vocab_size
        if words < rows // 2:  # transformers makes up a tokenizer of two words where its files are damaged
            raise UserError(f"{flag} {name}: cannot be loaded (the files of its tokenizer are missing or of another model: {words} words, "
                            f"and {rows} in {part})")
        if words > rows:
            raise UserError(f"{flag} {name}: its tokenizer has {words} words, its {part} only {rows}; the two are of different models")
        # Without a config of its own a tokenizer would not know where to cut, and the text encoder has no more places.
        tokenizer.model_max_length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
        # Older configs name another id, and then the highest one is taken for the end of the text: with words added to
        # the vocabulary that would be the new word, and SDXL's pooled embedding would miss all that follows it.
        text_encoder.config.eos_token_id = getattr(text_encoder, "text_model", text_encoder).eos_token_id = tokenizer.eos_token_id


def load_models(name, arithmetic, freezes_unet=False, variant=None):
    """Load a pipeline for training in float32 and take it apart. Raises UserError if it cannot be trained here.

    A UNet that stays as it is comes in the precision of the arithmetic: half the memory of the CPU, too.
    """
    import torch

    pipeline = load_pipeline(name, torch.float32, unet_dtype=arithmetic if freezes_unet else torch.float32, variant=variant)
    check_trainable(pipeline, name)
    say_if_distilled(pipeline, name, trains=True)
    models = dataclasses.replace(take_apart(name, pipeline), arithmetic=arithmetic, sample=sample_weights(pipeline))
    for module in (models.unet, models.vae, *models.text_encoders):
        module.requires_grad_(False).eval()
    return models
