"""FLUX.1 (Black Forest Labs): two streams of tokens, told by T5 and by CLIP's pooled embedding.

What is sent to the transformer, and with which sign, is as in diffusers' FluxPipeline.
"""

from dreambooth.device import moved
from dreambooth.models.families.family import Family, moments_of
from dreambooth.models.families.stable_diffusion import settle_clip, tokenize
from dreambooth.models.recipes import Recipe

BLOCKS_OF_FLUX = r"(single_)?transformer_blocks\.\d+"
ATTENTION_OF_FLUX = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
FEED_FORWARD_OF_FLUX = r"ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out"
MODULATION_OF_FLUX = r"norm(1(_context)?)?\.linear"

NAMES_OF_FLUX = {  # in the makers' own code
    ("transformer_blocks.*.", "double_blocks.*."): {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",), "img_mod.lin": ("norm1.linear",),
        "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",), "txt_mod.lin": ("norm1_context.linear",)},
    ("single_transformer_blocks.*.", "single_blocks.*."): {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",),
        "modulation.lin": ("norm.linear",)}}


class Flux(Family):
    """FLUX.1 dev, 12 thousand million weights, which is told by how much to be guided."""

    name = "flux"
    pipelines = ("FluxPipeline",)
    kind = "FLUX.1 dev"
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    word_encoders = ("text_encoder",)  # CLIP
    resting_text = ("text_encoder_2",)  # T5, which spells a new word
    trains_text = True
    exports = ("lora", "word")
    lora_prefixes = {"transformer": "lora_unet_", "text_encoder": "lora_te1_"}
    guidance = class_guidance = 3.5
    takes_negatives = False
    reads_english_alone = True
    lora_layers = NAMES_OF_FLUX
    lora_targets = {"attention": rf"{BLOCKS_OF_FLUX}\.({ATTENTION_OF_FLUX})",
                    "attention+ff": rf"{BLOCKS_OF_FLUX}\.({ATTENTION_OF_FLUX}|{FEED_FORWARD_OF_FLUX})",
                    "all": rf"{BLOCKS_OF_FLUX}\.({ATTENTION_OF_FLUX}|{FEED_FORWARD_OF_FLUX}|{MODULATION_OF_FLUX})"}
    # diffusers' example trains a LoRA of 500 steps, other trainers at 1e-4; the rate of full training is theirs, too; the text's rate and
    # the words' are those of Stable Diffusion XL. None was measured here.
    recipes = {"lora": Recipe(500, 1e-4, 1e-4, 5e-5), "full": Recipe(500, 1e-5, 1e-5, 1e-6),
               "textual_inversion": Recipe(3000, embedding_lr=5e-4), "pivotal": Recipe(1000, 1e-4, 1e-4, 5e-5, 3e-4)}
    base_of_distilled = "black-forest-labs/FLUX.1-dev"

    def distilled(self, index, config):
        """As schnell, which takes no guidance."""
        return bool(config) and not config.get("guidance_embeds")

    def misfit(self, index, configs):
        transformer, latents = configs["transformer"], configs["vae"].get("latent_channels", 4)
        if transformer.get("in_channels", 64) != 4 * latents:
            return (f"its transformer takes {transformer.get('in_channels', 64)} channels, its VAE makes 4 x {latents}; is it a model that "
                    f"edits pictures? Give a text-to-image model")
        for part, key, takes in (("text_encoder", "hidden_size", transformer.get("pooled_projection_dim", 768)),
                                 ("text_encoder_2", "d_model", transformer.get("joint_attention_dim", 4096))):
            if configs[part].get(key, takes) != takes:
                return (f"its transformer takes {takes} channels of {part}, which makes {configs[part][key]}; the parts are of different "
                        f"models")
        return ""

    def make_ready(self, pipeline):
        settle_clip(pipeline.tokenizer, pipeline.text_encoder)
        pipeline.tokenizer_max_length = pipeline.tokenizer.model_max_length

    def latent_shape(self, pipeline, side):
        return (pipeline.transformer.config.in_channels // 4, *[side // self.latent_scale(pipeline)] * 2)

    def moments(self, vae, pixels):
        return moments_of(vae, pixels)

    def encode(self, models, prompts):
        """{"hidden": T5's [P, tokens, channels], with what fills it up; "pooled": CLIP's [P, channels]}."""
        (words, pieces), (clip, t5) = models.tokenizers, models.text_encoders
        texts = models.pipeline.maybe_convert_prompt(list(prompts), pieces)
        of_t5 = pieces(texts, padding="max_length", max_length=self.prompt_tokens, truncation=True, return_tensors="pt").input_ids
        weight, of_clip = next(clip.parameters()), tokenize(models.pipeline, words, prompts)
        pooled, hidden = clip(moved(of_clip, weight.device)).pooler_output, t5(moved(of_t5, next(t5.parameters()).device))[0]
        return {"hidden": hidden.to(weight.device, next(t5.parameters()).dtype), "pooled": pooled.to(weight.dtype)}

    def summaries(self, models, prompts):
        return self.encode(models, prompts)["pooled"]

    def prompt_length(self, pipeline, prompt):
        """As T5 reads it; of CLIP only the sum counts."""
        return len(pipeline.tokenizer_2(prompt).input_ids), self.prompt_tokens

    def predict(self, models, noisy, levels, conditioning, sizes):
        import torch

        height, width = (side // 2 for side in noisy.shape[-2:])
        hidden, device = conditioning["hidden"], noisy.device
        tells = models.pipeline.transformer.config.guidance_embeds  # none in training: the model is to learn what the photos show
        predicted = models.denoiser(
            hidden_states=torch.nn.functional.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2), timestep=levels,
            guidance=torch.ones_like(levels) if tells else None, pooled_projections=conditioning["pooled"], encoder_hidden_states=hidden,
            txt_ids=hidden.new_zeros(hidden.shape[1], 3), img_ids=moved(picture_places(height, width), device).to(hidden.dtype),
            return_dict=False)[0]
        return torch.nn.functional.pixel_shuffle(predicted.transpose(1, 2).unflatten(2, (height, width)), 2)

    def book_options(self, told, against):
        return {"prompt_embeds": told["hidden"], "pooled_prompt_embeds": told["pooled"]}


def picture_places(height, width):
    """Numbers [tokens, 3] of the places in a picture: nothing, row, column."""
    import torch

    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))
