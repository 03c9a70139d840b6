"""Prompts as the UNet is told them: token ids and the text encoders' embeddings."""

from dreambooth.base import say
from dreambooth.device import moved


def encode_prompts(models, prompts):
    """Text conditioning of P prompts: (hidden [P, tokens, channels], pooled [P, channels] or None where unused).

    SD 1.x and 2.x use the encoder's last layer. SDXL joins the last but one layer of both encoders and pools the second.
    """
    import torch

    hidden, pooled = [], None
    joined = models.pipeline.unet.config.addition_embed_type == "text_time"
    for tokenizer, text_encoder in zip(models.tokenizers, models.text_encoders):
        ids = moved(tokenize(models.pipeline, tokenizer, prompts), next(text_encoder.parameters()).device)
        out = text_encoder(ids, output_hidden_states=joined)
        hidden.append(out.hidden_states[-2] if joined else out.last_hidden_state)
        pooled = out.text_embeds if joined and "text_embeds" in out else pooled
    return torch.cat(hidden, dim=-1), pooled


def embed_ends(models, prompts):
    """The text embeddings [P, channels] of P prompts where they end, which sums each up."""
    import torch

    tokenizer = models.tokenizers[-1]
    ends = (tokenize(models.pipeline, tokenizer, prompts) == tokenizer.eos_token_id).int().argmax(-1)
    with torch.no_grad():
        hidden, _ = encode_prompts(models, prompts)
    return hidden[torch.arange(len(prompts)), ends]


def tokenize(pipeline, tokenizer, prompts):
    """Token ids [P, tokens] of P prompts, padded by the tokenizer's own rule and cut at its length.

    A new word of several vectors is written once: diffusers spells it out, "<x>" as "<x> <x>_1".
    """
    prompts = pipeline.maybe_convert_prompt(list(prompts), tokenizer)
    return tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                     return_tensors="pt").input_ids


def check_length(pipeline, prompts):
    """Say so if a prompt is longer than the model reads."""
    tokenizer = pipeline.tokenizer
    for prompt in prompts:
        length = len(tokenizer(pipeline.maybe_convert_prompt(prompt, tokenizer)).input_ids)
        if length > tokenizer.model_max_length:
            say(f'Note: "{prompt[:60]}..." is {length} tokens; the model reads only the first '
                f'{tokenizer.model_max_length}.')
