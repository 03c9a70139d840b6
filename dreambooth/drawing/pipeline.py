"""The pipeline to draw with: a base model and everything that was trained beside it."""

from pathlib import Path

from dreambooth.base import HERE, UserError
from dreambooth.models.find import find_model
from dreambooth.models.load import load_pipeline
from dreambooth.models.parts import take_apart
from dreambooth.models.vocabulary import add_word, embedding_vectors


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
        return find_model(found, "--model_name")
    except UserError as problem:
        if s.model_name is not None:
            raise
        raise UserError(f"--model_path {trained.source}: it belongs to the model {recorded}, which cannot be found here "
                        f"({problem}); give its place with --model_name") from None


def add_trained(pipeline, trained, strength, flag):
    """Add words and LoRA to a loaded pipeline. Raises UserError if they are not of this model."""
    from safetensors.torch import load_file

    models = take_apart(trained.source, pipeline)
    for word, path in trained.words.items():
        try:
            vectors = embedding_vectors(models, load_file(path))
        except ValueError as problem:
            raise UserError(f"{flag} {path}: this embedding does not fit {pipeline.name_or_path} ({problem})") from None
        for tokenizer, text_encoder, rows in zip(models.tokenizers, models.text_encoders, vectors):
            add_word(tokenizer, text_encoder, word, rows)
    if trained.lora:
        name = f"lora_{len(pipeline.get_list_adapters().get('unet', []))}"
        try:
            pipeline.load_lora_weights(trained.lora.parent, weight_name=trained.lora.name, adapter_name=name)
        except (RuntimeError, ValueError, KeyError, OSError) as problem:
            reason = " ".join(str(problem).split())[:200]
            raise UserError(f"{flag} {trained.lora}: this LoRA does not fit {pipeline.name_or_path} ({reason})") from None
    return {name: strength} if trained.lora else {}


def load_trained(s, base, trained, adapters, dtype):
    """The pipeline of --model_path with everything of --adapter in it."""
    recorded = trained.record.get("settings", {}).get("variant")  # of the base, as training read it
    variant = recorded if trained.is_adapter and s.model_name is None else None
    pipeline = load_pipeline(base, dtype, "--model_path", variant=variant)
    strengths = {}
    for each, strength in [(trained, s.lora_scale)] * trained.is_adapter + adapters:
        strengths |= add_trained(pipeline, each, strength, "--model_path" if each is trained else "--adapter")
    if strengths:
        pipeline.set_adapters(list(strengths), list(strengths.values()))
    return pipeline
