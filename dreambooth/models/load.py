"""Loading a pipeline, whole and from safetensors alone, to draw with it or to train it."""

import contextlib
import dataclasses
import functools
import importlib
import re
import warnings
from pathlib import Path

from dreambooth.base import UserError, default, say_once
from dreambooth.mishaps import is_of_machine
from dreambooth.models.addresses import is_single_file
from dreambooth.models.checkpoint import load_single_file
from dreambooth.models.families.family import text_encoders_of, tokenizer_of
from dreambooth.models.families.known import family_of
from dreambooth.models.find import family_at
from dreambooth.models.fits import check_fit, say_if_distilled
from dreambooth.models.headers import read_json
from dreambooth.models.hub import hub_folder
from dreambooth.models.inventory import DENOISERS, PARTS, WEIGHTS, check_folder, choose_variant, files_in, parts_of
from dreambooth.models.parts import sample_weights, take_apart

LIBRARIES = ("diffusers", "transformers")  # whose classes a part may be of
FOREIGN_CODE = "its {part} is a {class_name} of code of its own, which is not run"


def load_pipeline(name, dtype, flag="--model_name", parts=None, dtypes=None, variant=None):
    """The diffusers pipeline in a folder, of a hub id or in a file, in `dtype`, on the CPU, without a safety checker.

    `parts`, {name: module}, take the place of its own; those in `dtypes`, {name: dtype}, come in that precision, and the weights from
    the files of `variant`, if given. Only safetensors are read. The network is asked only for what the cache lacks. UserError for whatever is missing, in pieces or of another kind.
    """
    quiet_libraries()
    dtypes = {"default": dtype, **default(dtypes, {})}
    load = load_single_file if is_single_file(name) else functools.partial(load_folder, variant=variant)
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of schedulers' older configs that it puts right
            pipeline = load(name, flag, dtypes, parts or {})
    except Exception as problem:  # configs and files of all kinds meet libraries that check little
        if isinstance(problem, UserError) or is_of_machine(problem):
            raise
        reason = " ".join(str(problem).split())
        package = re.search(r"pip install [\w-]+", reason)
        reason = f"it needs a package that is not here: {package[0]}" if package else reason[:300]
        raise UserError(f"{flag} {name}: cannot be loaded ({reason})") from None
    make_ready(pipeline, name, flag)
    return pipeline


def quiet_libraries():
    """Have diffusers and transformers say nothing by themselves: what goes wrong is raised as well."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(library.utils.logging.CRITICAL)
        library.utils.logging.disable_progress_bar()


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
    absent = {part: None for part in PARTS if part in index and part not in parts_of(index)}  # such as Stable Diffusion 3's T5
    pipeline = DiffusionPipeline.from_pretrained(
        str(folder), **loaded, **parts, **absent, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
        local_files_only=True)
    pipeline.register_to_config(_name_or_path=name)
    return pipeline


def load_part(folder, part, kind, variant, dtype, **options):
    """A part of a pipeline, of the class `kind`, (library, name), with all of its weights. ValueError if some are missing."""
    library, class_name = kind
    if library not in LIBRARIES:
        raise ValueError(FOREIGN_CODE.format(part=part, class_name=class_name))
    try:
        module, report = getattr(importlib.import_module(library), class_name).from_pretrained(
            str(folder), subfolder=part, variant=variant or None, use_safetensors=True, dtype=dtype, local_files_only=True,
            output_loading_info=True, **options, **({"ignore_mismatched_sizes": True} if library == "transformers" else {}))
    except Exception as problem:
        if is_of_machine(problem):
            raise
        raise ValueError(f"{part}: {problem}") from None
    if missing := report["missing_keys"]:  # the library would make them up
        raise ValueError(f"{part}: it lacks some of the weights that its config asks for, such as {min(missing)}")
    if others := sorted(report["mismatched_keys"]):  # here it would, too, and says which only so
        raise ValueError(f"{part}: its weights are of another size than its config says, such as {others[0][0]}")
    if part in (*DENOISERS, "vae") and (unread := sorted(report["unexpected_keys"])):
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
    """What every loaded pipeline needs here. UserError where its parts are of different models."""
    pipeline.set_progress_bar_config(disable=True)
    family = family_of(pipeline)
    if not hasattr(pipeline.scheduler, family.scheduler_has):
        raise UserError(f"{flag} {name}: its scheduler, {type(pipeline.scheduler).__name__}, is of another kind of model than {family.kind}; "
                        f"give a model with its own scheduler")
    with contextlib.suppress(NotImplementedError, AttributeError):  # not every VAE can
        pipeline.vae.enable_slicing()  # decode a batch one by one: at 1024 px its activations outweigh the denoiser's
    check_tokenizers(pipeline, name, flag)
    family.make_ready(pipeline)
    if len(lengths := {tokenizer_of(pipeline, part).model_max_length for part in family.word_encoders}) > 1:
        raise UserError(f"{flag} {name}: its two tokenizers end prompts after {' and '.join(map(str, sorted(lengths)))} words; "
                        f"one of them is damaged, copy or download the model again")


def check_tokenizers(pipeline, name, flag):
    """UserError where a tokenizer is not that of its text encoder."""
    for part, text_encoder in text_encoders_of(pipeline).items():
        words, rows = len(tokenizer_of(pipeline, part)), len(text_encoder.get_input_embeddings().weight)
        if words < rows // 2:  # transformers makes up a tokenizer of two words where its files are damaged
            raise UserError(f"{flag} {name}: cannot be loaded (the files of its tokenizer are missing or of another model: {words} words, "
                            f"and {rows} in {part})")
        if words > rows:
            raise UserError(f"{flag} {name}: its tokenizer has {words} words, its {part} only {rows}; the two are of different models")


def load_models(name, arithmetic, freezes_denoiser=False, variant=None):
    """Load a pipeline for training in float32 and take it apart. Raises UserError if it cannot be trained here.

    A denoiser that stays as it is comes in the precision of the arithmetic, and a text encoder that never trains in bf16: half the
    memory of the CPU, too.
    """
    import torch

    dtypes = dict.fromkeys(DENOISERS, arithmetic if freezes_denoiser else torch.float32)
    if arithmetic != torch.float32:
        dtypes |= dict.fromkeys(family_at(name, "--model_name").resting_text, torch.bfloat16)
    pipeline = load_pipeline(name, torch.float32, dtypes=dtypes, variant=variant)
    family_of(pipeline).check_trainable(pipeline, name, "--model_name")
    say_if_distilled(pipeline, name, trains=True)
    models = dataclasses.replace(take_apart(name, pipeline), arithmetic=arithmetic, sample=sample_weights(pipeline))
    for module in (models.denoiser, models.vae, *models.text_encoders):
        module.requires_grad_(False).eval()
    return models
