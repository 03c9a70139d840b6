"""The card of an output: what the hub shows of it, and the Python that draws with it without this program."""

import dataclasses
import json
from pathlib import Path

from dreambooth.base import default
from dreambooth.files import write_file
from dreambooth.methods.lora import KOHYA_FILE, LORA_FILE, adapted_parts, save_lora
from dreambooth.methods.new_words import embedding_file, save_words
from dreambooth.methods.table import METHODS
from dreambooth.models.addresses import is_single_file
from dreambooth.models.checkpoint import TRAILING, configs_place, told_of_noise
from dreambooth.models.families.family import NOT_WRITTEN, made_by
from dreambooth.models.families.known import guidance_scale, own_size
from dreambooth.models.hub import cached_file, split_revision
from dreambooth.models.inventory import choose_variant, files_in
from dreambooth.models.vocabulary import XL_EMBEDDING
from dreambooth.settings import Settings
from dreambooth.subjects.nouns import noun_of

CARD = "README.md"
DORA_ELSEWHERE = ("a DoRA: ComfyUI and Forge draw it otherwise, since they divide by the norm of the weights without what was "
                  "learnt, and stable-diffusion.cpp and sd-scripts leave its magnitudes out; train without --use_dora for them")
ADAPTERS_ELSEWHERE = {
    "lokr": f"{KOHYA_FILE}, a LoKr in LyCORIS's names, is for ComfyUI and Forge; sd-scripts without LyCORIS reads none of it",
    "oft": "they have no place for these rotations; train with --adapter_type lora or lokr for them"}
STEPS_DRAWN = Settings.num_inference_steps  # of a picture, where nobody says how many


def save_card(folder, s, models, subjects, sample=None):
    """Write the card of an output, README.md: what the hub shows of it and how plain diffusers uses it.

    The header is the hub's; `sample` is a picture in the folder. (huggingface.co/docs/hub/model-cards)
    """
    from huggingface_hub import ModelCardData

    saves, family = METHODS[s.method].saves, models.family.name
    prompts = [subject.instance_prompt for subject in subjects]
    tags = [tag for tag, fits in {"dreambooth": METHODS[s.method].changes_class, s.adapter_type or "lora": save_lora in saves,
                                  "textual_inversion": save_words in saves, family: not family.startswith("small")}.items() if fits]
    widget = {"text": f"{prompts[0]} on the moon"}
    if sample:
        widget["output"] = {"url": Path(sample).relative_to(folder).as_posix()}
    header = ModelCardData(
        base_model=None if Path(models.name).exists() else split_revision(models.name)[0],  # the hub knows its own ids alone
        library_name="diffusers", pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", *tags], instance_prompt=", ".join(prompts), widget=[widget])
    words = "\n".join(f'- `{subject.instance_prompt}`: the {noun_of(subject.class_prompt or subject.name)} that was learnt'
                      for subject in subjects)
    text = f"""---
{header.to_yaml().strip()}
---
# {", ".join(prompts)}

{f"![samples]({widget['output']['url']})" if sample else ""}

Made from photos by the method `{s.method}` (see DreamBooth, arXiv 2208.12242) on `{models.name}`, whose licence applies.
Write in the prompt:

{words}

```python
{usage(s, models, subjects)}
```

{for_other_programs(s, models.family)}
"""
    write_file(folder / CARD, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))


def for_other_programs(s, family):
    """Sentences that tell which of an output's files ComfyUI, A1111 and Forge read."""
    lora = f"{KOHYA_FILE} is theirs; of {LORA_FILE}, which is diffusers', {family.diffusers_lora_there}"
    told = {"model": f"they read the one file that `--export NAME.safetensors --model_path {s.output_dir}` writes",
            "lora": lora, "dora": lora, **ADAPTERS_ELSEWHERE,
            "word": f"they know a word by its file's name: `--export NAME.safetensors --model_path {s.output_dir}` writes it"}
    made = made_by(s)
    text = "; ".join(told[kind] if kind in (*family.exports, "oft") else f"{NOT_WRITTEN[kind]} of {family.kind} is not written for them"
                     for kind in made)
    return f"{family.other_programs}: {text}." + f" It is {DORA_ELSEWHERE}." * ("dora" in made and "dora" in family.exports)


def usage(s, models, subjects):
    """Python that draws with an output without this program: the first picture that --infer draws of the subject on the moon."""
    method, kind = METHODS[s.method], type(models.pipeline).__name__
    load, scheduler = how_to_load(models, s.variant) if method.is_adapter else ("from_pretrained(folder)", [])
    words = load_words(subjects, len(models.readers)) if save_words in method.saves else []
    reads = ["from safetensors.torch import load_file"] if words and len(models.readers) > 1 else []
    is_lora_file = save_lora in method.saves and s.adapter_type in (None, "lora")
    parts = adapted_parts(models) if save_lora in method.saves and not is_lora_file else []
    reads += ["from peft import PeftModel"] if parts else []
    kinds = ", ".join(sorted({kind, *([type(models.pipeline.scheduler).__name__] if scheduler else [])}))
    lines = ["import torch", f"from diffusers import {kinds}", *reads, "",
             f"folder = {quoted(s.output_dir)}  # or the id that it has on the hub",
             f"pipe = {kind}.{load}", *scheduler]
    lines += [f'pipe.{part} = PeftModel.from_pretrained(pipe.{part}, folder, subfolder="{part}")' for part in parts]
    if is_lora_file:
        lines.append(f'pipe.load_lora_weights(folder, weight_name="{LORA_FILE}")')
    lines += [*words, '# pipe.to("cuda")', "noise = torch.Generator().manual_seed(0)  # that of --seed 0",
              f"pipe({quoted(f'{subjects[0].instance_prompt} on the moon')}, {look_of(s, models)}, generator=noise)"
              '.images[0].save("subject.png")']
    return "\n".join(lines)


def quoted(text):
    """A text as Python and JSON write it."""
    return json.dumps(str(text), ensure_ascii=False)


def look_of(s, models):
    """Options of the pipeline's call as --infer has them by itself, whatever the samples of the training were drawn with."""
    usual = dataclasses.replace(s, guidance_scale=None)
    side = default(s.resolution, models.resolution)
    size = f"height={side}, width={side}, " if own_size(models.pipeline) != (side, side) else ""
    return f"{size}num_inference_steps={STEPS_DRAWN}, guidance_scale={guidance_scale(usual, models.pipeline):g}"


def load_words(subjects, encoders):
    """Lines of Python that give a pipeline with so many text encoders the subjects' new words."""
    lines = []
    for subject in subjects:
        file = embedding_file(subject, subjects)
        if encoders == 1:
            lines.append(f'pipe.load_textual_inversion(folder, weight_name="{file}")')
            continue
        lines.append(f'vectors = load_file(f"{{folder}}/{file}")  # a folder on this machine, then')
        for key, number in zip(XL_EMBEDDING, ("", "_2")):
            lines.append(f'pipe.load_textual_inversion(vectors["{key}"], token={quoted(subject.identifier)}, '
                         f"text_encoder=pipe.text_encoder{number}, tokenizer=pipe.tokenizer{number})")
    if encoders > 1:  # its config on the hub has a wrong id, for which the highest one is taken, which is now a new word's
        lines.append("pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id  # where a text ends")
    return lines


def how_to_load(models, variant):
    """(the call that loads the model to start from, lines that then give it the scheduler it tells of): plain diffusers, from its
    place."""
    if not is_single_file(models.name):
        cached = None if Path(models.name).is_dir() else cached_file(models.name, "model_index.json")
        folder = Path(models.name) if Path(models.name).is_dir() else cached and cached.parent
        variant = variant or folder and choose_variant(files_in(folder), models.family.denoiser)
        place, revision = split_revision(models.name)
        options = [f"{key}={quoted(value)}" for key, value in (("revision", revision), ("variant", variant)) if value]
        return f"from_pretrained({', '.join([quoted(place), *options])})", []
    is_here = Path(models.name).is_file()
    told = told_of_noise(models.name, "--model_name") if is_here else {}
    if told.get("rescale_betas_zero_snr") and type(models.pipeline.scheduler).__name__ == "DDIMScheduler":
        told |= {key: models.pipeline.scheduler.config[key] for key in TRAILING}
    options = "".join(f", {key}={value!r}" for key, value in told.items())
    set_scheduler = f"pipe.scheduler = {type(models.pipeline.scheduler).__name__}.from_config(pipe.scheduler.config{options})"
    configs = f", config={quoted(configs_place(models.name, '--model_name'))}" if is_here else ""
    return f"from_single_file({quoted(models.name)}{configs})", [set_scheduler] if told else []
