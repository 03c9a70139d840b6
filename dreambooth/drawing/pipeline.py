"""The pipeline to draw with: a base model and everything that was trained beside it."""

import dataclasses
import warnings
from pathlib import Path

from dreambooth.base import HERE, UserError, say, say_once
from dreambooth.drawing.foreign import check_lora, layers_in, layers_taken, lora_files, lora_weights
from dreambooth.drawing.merged import check_strength, merge_adapter, merged_type
from dreambooth.drawing.room import base_to_draw_with, is_read_late
from dreambooth.files import load_tensors
from dreambooth.models.families.family import text_encoders_of
from dreambooth.models.families.known import family_of
from dreambooth.models.find import find_model
from dreambooth.models.fits import say_if_distilled
from dreambooth.models.late import load_late, with_denoiser
from dreambooth.models.load import load_pipeline
from dreambooth.models.parts import is_same_sample, sample_weights, take_apart
from dreambooth.models.vocabulary import add_word, embedding_vectors, taken_tokens


def find_base(s, trained):
    """The model that what is at --model_path belongs to: itself, or the base that its record names, wherever it is now."""
    if not trained.is_adapter:
        if s.model_name is not None:
            raise UserError(f"--model_name {s.model_name}: {trained.source} is a whole model and needs no base; leave it out")
        return find_model(trained.source, "--model_path")
    recorded = trained.record.get("base_model")
    if recorded is None and s.model_name is None:
        raise UserError(f"--model_path {trained.source}: a file for some model; name the model with --model_name")
    places = [recorded, str(HERE / recorded)] if s.model_name is None else [s.model_name]
    found = next((place for place in places if Path(place).exists()), places[0])
    try:
        if Path(found).exists() and Path(found).resolve() == Path(trained.source).resolve():
            raise UserError("it is recorded as lying in that very folder")
        return find_model(found, "--model_name")
    except UserError as problem:
        if s.model_name is not None:
            raise
        raise UserError(f"--model_path {trained.source}: it belongs to the model {recorded}, which cannot be found here "
                        f"({problem}); give its place with --model_name{kept_beside(recorded)}") from None


def kept_beside(name):
    """Where an earlier output that had this name may be now: ", such as output-1" or ""."""
    path = Path(name)
    kept = sorted(other for other in path.parent.glob(f"{path.name}-*") if (other / "model_index.json").is_file())
    return f", such as {kept[0]}" if kept else ""


def check_base(s, base, sample, trained, flag):
    """That what was trained is added to the weights that it was trained on; `sample` is sample_weights() of the model at `base`.

    UserError if another model has the recorded name by now; a line if it is another on purpose.
    """
    expected = trained.record.get("base_sample")
    if not trained.is_adapter or not isinstance(expected, dict) or is_same_sample(expected, sample):
        return
    recorded = trained.record.get("base_model")
    if flag == "--model_path" and s.model_name is None:
        raise UserError(f"--model_path {trained.source}: it was trained on another model than the one that is at {base} now; give the "
                        f"place of its own with --model_name{kept_beside(recorded)}, or --model_name {base} to use this one all the same")
    say(f"Note: {trained.source} was trained on {recorded}, and {base} has other weights: what was learnt may look different.")


def check_numbers(path, flag):
    """UserError if a file holds what is no number, as a training that overflowed leaves it: pictures would be black."""
    broken = [name for name, tensor in load_tensors(path, flag).items() if not tensor.float().isfinite().all()]
    if broken:
        raise UserError(f"{flag} {path}: {len(broken)} of its tensors hold no numbers (NaN or infinite), such as {min(broken)}; "
                        f"its training failed, give another")


def add_words(pipeline, trained, flag):
    """Add the new words of what was trained. UserError if they are not of this model, or there is such a word."""
    models = take_apart(trained.source, pipeline)
    for word, path in trained.words.items():
        check_numbers(path, flag)
        try:
            vectors = embedding_vectors(models, load_tensors(path, flag))
        except ValueError as problem:
            raise UserError(f"{flag} {path}: this embedding does not fit {pipeline.name_or_path} ({problem})") from None
        for tokenizer, text_encoder, rows in zip(*zip(*models.readers), vectors):
            if taken := taken_tokens(tokenizer, word, len(rows)):
                raise UserError(f'{flag} {path}: its word "{taken[0]}" is in the vocabulary already, of the model or of what else is added; '
                                f"leave it out" + ("" if trained.record else ", or give the file another name if that is its word"))
            add_word(tokenizer, text_encoder, word, rows)


def add_lora_file(pipeline, trained, adapter, flag):
    """Add a LoRA by the name `adapter`. UserError if it is not for this model; a line if some of its layers have no place in it."""
    for file in lora_files(trained.lora):
        check_lora(file, pipeline, flag)
    try:
        weights, options = lora_weights(trained.lora)
        with warnings.catch_warnings(action="ignore"):  # of PEFT, that there are several LoRAs, and of layers that are counted below
            pipeline.load_lora_weights(weights, adapter_name=adapter, **options)
    except UserError:
        raise
    except Exception as problem:  # whatever diffusers' converters of other programs' names raise
        reason = " ".join(str(problem).split())[:200]
        raise UserError(f"{flag} {trained.lora}: this LoRA does not fit {pipeline.name_or_path} ({reason})") from None
    taken = layers_taken([family_of(pipeline).denoiser_of(pipeline), *text_encoders_of(pipeline).values()], adapter)
    total = layers_in(trained.lora)
    if not taken:
        raise UserError(f"{flag} {trained.lora}: this LoRA does not fit {pipeline.name_or_path} (none of its {total} layers is in it)")
    if taken < total:
        say_once(f"Note: {trained.lora}: {total - taken} of its {total} layers have no place in {pipeline.name_or_path} and are left out.")


def add_loras(pipeline, loras):
    """Add all [(Trained, strength, flag)] to a pipeline: first what is merged into its weights, then the LoRAs that stand beside them."""
    for row in loras:
        if merged_type(row[0].lora):
            merge_adapter(pipeline, *row)
    beside = [row for row in loras if not merged_type(row[0].lora)]
    for number, (each, _, flag) in enumerate(beside):
        add_lora_file(pipeline, each, f"lora_{number}", flag)
    if beside:
        pipeline.set_adapters([f"lora_{number}" for number in range(len(beside))], [strength for _, strength, _ in beside])


def load_trained(s, base, trained, adapters, plan, prompts):
    """The Models of --model_path, with everything of --adapter in their pipeline.

    Large ones have read the `prompts` and, but for others, need their text encoders no more (see models/late.py).
    """
    everything = [(trained, s.lora_scale, "--model_path")] * trained.is_adapter + [(each, strength, "--adapter") for each, strength in adapters]
    for row in everything:
        check_strength(*row)
    recorded = trained.record.get("settings", {}).get("variant")  # of the base, as training read it
    variant = recorded if trained.is_adapter and s.model_name is None else None
    if is_read_late(base, [trained, *(each for each, _ in adapters)]):
        models = load_late(base, plan.dtype, variant, "--model_path", trains=False)
        models.book.learn(models, [*prompts, models.family.usual_negative], plan.device)
        base_precision, waits = base_to_draw_with(s, models, plan)
        models = with_denoiser(models, plan.dtype, base_precision, plan.device if waits else None)
    else:
        models = take_apart(base, load_pipeline(base, plan.dtype, "--model_path", variant=variant))
        models = dataclasses.replace(models, sample=sample_weights(models.pipeline))
    pipeline = models.pipeline
    if s.guidance_scale is None or s.num_inference_steps > 12:
        say_if_distilled(pipeline, base, trains=False)
    check_base(s, base, models.sample, trained, "--model_path")
    for each, _, flag in everything:
        add_words(pipeline, each, flag)
    loras = [(each, strength, flag) for each, strength, flag in everything if each.lora]
    for number, (each, _, flag) in enumerate(loras):
        if any(each.lora.resolve() == other.lora.resolve() for other, _, _ in loras[:number]):
            say(f"Note: {each.source} is added more than once; its strengths add up.")
        for file in lora_files(each.lora):
            check_numbers(file, flag)
    add_loras(pipeline, loras)
    for each, _ in adapters:
        check_base(s, base, models.sample, each, "--adapter")
    return models
