"""The card of an output: what the hub shows of it, and the Python that draws with it without this program."""

import functools
import json
from pathlib import Path

from dreambooth.files import write_file
from dreambooth.methods.lora import LORA_FILE, save_lora
from dreambooth.methods.new_words import embedding_file, save_words
from dreambooth.methods.table import METHODS
from dreambooth.models.addresses import is_single_file
from dreambooth.models.checkpoint import TRAILING, told_of_noise
from dreambooth.models.families.known import guidance_scale
from dreambooth.models.hub import cached_file, split_revision
from dreambooth.models.inventory import choose_variant, files_in
from dreambooth.models.vocabulary import XL_EMBEDDING
from dreambooth.subjects.nouns import noun_of

CARD = "README.md"


def save_card(folder, s, models, subjects, sample=None):
    """Write the card of an output, README.md: what the hub shows of it and how plain diffusers uses it.

    The header is the hub's; `sample` is a picture in the folder. (huggingface.co/docs/hub/model-cards)
    """
    from huggingface_hub import ModelCardData

    saves, family = METHODS[s.method].saves, models.family.name
    prompts = [subject.instance_prompt for subject in subjects]
    tags = [tag for tag, fits in {"dreambooth": METHODS[s.method].changes_class, "lora": save_lora in saves,
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
"""
    write_file(folder / CARD, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))


def usage(s, models, subjects):
    """Python that draws with an output without this program."""
    method, kind = METHODS[s.method], type(models.pipeline).__name__
    quoted = functools.partial(json.dumps, ensure_ascii=False)
    load, scheduler = how_to_load(models, s.variant, quoted) if method.is_adapter else ("from_pretrained(folder)", [])
    is_xl_embedding = save_words in method.saves and len(models.readers) > 1
    kinds = ", ".join(sorted({kind, *([type(models.pipeline.scheduler).__name__] if scheduler else [])}))
    lines = ["import safetensors.torch"] * is_xl_embedding + [f"from diffusers import {kinds}", ""]
    lines += [f"folder = {quoted(s.output_dir)}  # or the id that it has on the hub",
              f"pipe = {kind}.{load}", *scheduler]
    if save_lora in method.saves:
        lines.append(f'pipe.load_lora_weights(folder, weight_name="{LORA_FILE}")')
    for subject in subjects if save_words in method.saves else ():
        file = embedding_file(subject, subjects)
        if not is_xl_embedding:
            lines.append(f'pipe.load_textual_inversion(folder, weight_name="{file}")')
            continue
        lines.append(f'vectors = safetensors.torch.load_file(f"{{folder}}/{file}")  # a folder on this machine, then')
        for key, number in zip(XL_EMBEDDING, ("", "_2")):
            lines.append(f'pipe.load_textual_inversion(vectors["{key}"], token={quoted(subject.identifier)}, '
                         f"text_encoder=pipe.text_encoder{number}, tokenizer=pipe.tokenizer{number})")
    scale = guidance_scale(s, models.pipeline)
    lines += ['# pipe.to("cuda")', f"pipe({quoted(f'{subjects[0].instance_prompt} on the moon')}, num_inference_steps=30, "
              f'guidance_scale={scale:g}).images[0].save("subject.png")']
    return "\n".join(lines)


def how_to_load(models, variant, quoted):
    """(the call that loads the model to start from, lines that then give it the scheduler it tells of): plain diffusers, from its
    place."""
    if not is_single_file(models.name):
        folder = Path(models.name) if Path(models.name).is_dir() else getattr(cached_file(models.name, "model_index.json"), "parent", None)
        variant = variant or folder and choose_variant(files_in(folder), models.family.denoiser)
        place, revision = split_revision(models.name)
        options = [f"{key}={quoted(value)}" for key, value in (("revision", revision), ("variant", variant)) if value]
        return f"from_pretrained({', '.join([quoted(place), *options])})", []
    told = told_of_noise(models.name, "--model_name") if Path(models.name).is_file() else {}
    if told.get("rescale_betas_zero_snr") and type(models.pipeline.scheduler).__name__ == "DDIMScheduler":
        told |= {key: models.pipeline.scheduler.config[key] for key in TRAILING}
    options = "".join(f", {key}={value!r}" for key, value in told.items())
    set_scheduler = f"pipe.scheduler = {type(models.pipeline.scheduler).__name__}.from_config(pipe.scheduler.config{options})"
    return f"from_single_file({quoted(models.name)})", [set_scheduler] if told else []
