"""--infer: draw with what was trained."""

import dataclasses
import hashlib
import json
from pathlib import Path

from dreambooth.base import UserError, default, say
from dreambooth.device import machine_name, plan_device
from dreambooth.drawing.draw import draw_pictures, placed
from dreambooth.drawing.pipeline import find_base, load_trained
from dreambooth.drawing.room import check_bits
from dreambooth.drawing.start import begun_as, start_of
from dreambooth.drawing.trained import find_adapters, find_trained, model_paths
from dreambooth.files import check_writable
from dreambooth.models.encoding import check_length
from dreambooth.models.families.known import family_of, guidance_scale, own_size
from dreambooth.models.find import family_at
from dreambooth.subjects.languages import tell_language
from dreambooth.subjects.syntax import tell_prompts
from dreambooth.subjects.words import fill_identifier


def infer(s):
    """Draw --prompt with what was trained into --image_dir."""
    paths = model_paths(s)
    if len(paths) > 1:
        raise UserError(f"--model_path {paths[1]}: --infer draws with one model; add a LoRA or an embedding with --adapter")
    check_writable(s.image_dir, "--image_dir")
    trained, adapters = find_trained(paths[0], "--model_path"), find_adapters(s)
    base = find_base(s, trained)
    family_at(base, "--model_path").check_drawn(s)
    if s.lora_scale != 1 and not trained.lora:
        raise UserError(f"--lora_scale {s.lora_scale:g}: there is no LoRA in {trained.source}; leave it out")
    record, others = trained.record, [subject for adapter, _ in adapters for subject in adapter.subjects]
    if not (s.prompt or trained.subjects or others):
        raise UserError('--prompt is missing: say what to draw, such as --prompt "a dog on the moon"')
    prompts = s.prompt or [f"{subject.instance_prompt} on the moon" for subject in trained.subjects or others]
    prompts = [fill_identifier(prompt, trained.subjects, trained.source, others) for prompt in prompts]
    tell_prompts([*prompts, s.negative_prompt], [*trained.subjects, *others])
    s = dataclasses.replace(s, negative_prompt=fill_identifier(s.negative_prompt, trained.subjects, trained.source, others))
    everything = [trained, *(adapter for adapter, _ in adapters)]
    tell_unspoken(everything, [*prompts, s.negative_prompt])

    plan = plan_device(s)
    check_bits(s, base, everything, plan)
    begun = begun_as(s, [*trained.subjects, *others], prompts)
    models = load_trained(s, base, trained, adapters, plan, [*prompts, s.negative_prompt, *begun])
    pipeline = placed(models.pipeline, plan.device)
    start = start_of(s, base, trained, adapters, pipeline, plan)
    check_length(pipeline, prompts)
    if s.negative_prompt and guidance_scale(s, pipeline) <= family_of(pipeline).unguided:
        say(f"Note: --negative_prompt: no effect without guidance; give --guidance_scale above {family_of(pipeline).unguided:g}.")
    tell_language([*prompts, s.negative_prompt], family_of(pipeline).reads_english_alone)
    side = record.get("used", {}).get("resolution")
    width, height = (side, side) if side else own_size(pipeline)
    for flag in ("width", "height"):  # some pipelines would draw smaller, and not say so
        family_of(pipeline).check_side(pipeline, default(getattr(s, flag), 0), f"--{flag}")
    say(f"Model: {trained.source}"
        + (f", {record['method']} on {pipeline.name_or_path}" if trained.is_adapter and record else "")
        + f"; machine: {machine_name(plan.device)}; arithmetic {'float32' if plan.precision == 'no' else plan.precision}")
    for prompt in prompts:
        say(f'Drawing "{prompt}", seeds {s.seed} to {s.seed + s.num_images - 1}')
    grid = draw_pictures(Path(s.image_dir), pipeline, s, prompts, range(s.seed, s.seed + s.num_images),
                         note_of_model(s, trained, adapters, models.base_precision), (default(s.width, width), default(s.height, height)),
                         models, start)
    say(f"{len(prompts) * s.num_images} pictures are in {s.image_dir}, all together in {grid}.")


def note_of_model(s, trained, adapters, base_precision):
    """What the pictures' text chunks say of the model."""
    note = {"Model": trained.source}
    if trained.lora:
        note["LoRA scale"] = f"{s.lora_scale:g}"
    if adapters:
        note["Adapters"] = "; ".join(f"{each.source}={strength:g}" for each, strength in adapters)
    if base_precision != "bf16":
        note["Base precision"] = base_precision
    if trained.record:  # tells pictures of one training from those of the next into the same folder
        note["Model hash"] = hashlib.sha256(json.dumps(trained.record).encode()).hexdigest()[:10]
    return note


def tell_unspoken(trained, prompts):
    """Say which embeddings change nothing, since no prompt has their word."""
    spoken = " ".join(prompts).casefold()
    for each in trained:
        if each.words and not each.lora and not any(word.casefold() in spoken for word in each.words):
            say(f'Note: no prompt has the word of {each.source}, "{next(iter(each.words))}", without which it changes nothing.')
