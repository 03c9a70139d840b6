"""Stable Diffusion 3 and 3.5 (Stability AI, gated): two streams of tokens, told by two CLIPs and, where it is there, T5.

What is sent to the transformer, and with which sign, is as in diffusers' StableDiffusion3Pipeline.
"""

from dreambooth.base import UserError, default
from dreambooth.device import moved
from dreambooth.models.families.family import Family, tokenizer_of
from dreambooth.models.families.stable_diffusion import settle_clip
from dreambooth.models.recipes import Recipe

CLIP_TOKENS = 77
ATTENTION_OF_SD3 = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
                    "attn.to_add_out")
FEED_FORWARD_OF_SD3 = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
OTHERS_OF_SD3 = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "norm1.linear", "norm1_context.linear")

NAMES_OF_SD3 = {  # in the makers' own code
    ("transformer_blocks.*.", "joint_blocks.*."): {
        "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "x_block.attn.proj": ("attn.to_out.0",),
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.proj": ("attn2.to_out.0",),
        "x_block.mlp.fc1": ("ff.net.0.proj",), "x_block.mlp.fc2": ("ff.net.2",), "x_block.adaLN_modulation.1": ("norm1.linear",),
        "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "context_block.attn.proj": ("attn.to_add_out",), "context_block.mlp.fc1": ("ff_context.net.0.proj",),
        "context_block.mlp.fc2": ("ff_context.net.2",), "context_block.adaLN_modulation.1": ("norm1_context.linear",)}}


class StableDiffusion3(Family):
    """Stable Diffusion 3, 2 thousand million weights."""

    name = "stable-diffusion-3"
    pipelines = ("StableDiffusion3Pipeline",)
    kind = "Stable Diffusion 3"
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    word_encoders = ("text_encoder", "text_encoder_2")
    resting_text = ("text_encoder_3",)
    trains_text = True
    exports = ("lora", "word")
    lora_layers = NAMES_OF_SD3
    lora_prefixes = {"transformer": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    guidance = class_guidance = 7.0
    lora_targets = {"attention": [*ATTENTION_OF_SD3], "attention+ff": [*ATTENTION_OF_SD3, *FEED_FORWARD_OF_SD3],
                    "all": [*ATTENTION_OF_SD3, *FEED_FORWARD_OF_SD3, *OTHERS_OF_SD3]}
    # diffusers' example trains a LoRA of 500 steps at 4e-4; the text's rate and the words' are those of Stable Diffusion XL, the rate of
    # full training is other trainers'. None was measured here.
    recipes = {"lora": Recipe(500, 4e-4, 4e-4, 5e-5), "full": Recipe(500, 1e-5, 1e-5, 1e-6),
               "textual_inversion": Recipe(3000, embedding_lr=5e-4), "pivotal": Recipe(1000, 4e-4, 4e-4, 5e-5, 3e-4)}
    prompt_tokens = 256  # that T5 reads
    reads_english_alone = True
    base_of_distilled = "stabilityai/stable-diffusion-3.5-large"

    def fits(self, config):
        return not config.get("qk_norm")

    def misfit(self, index, configs):
        transformer, latents = configs["transformer"], configs["vae"].get("latent_channels", 4)
        if transformer.get("in_channels", 16) != latents:
            return (f"its transformer takes {transformer.get('in_channels', 16)} channels, its VAE makes {latents}; give a text-to-image "
                    f"model of one make")
        clips = [configs[part] for part in self.word_encoders]
        takes, makes = transformer.get("pooled_projection_dim", 2048), [clip.get("projection_dim", 512) for clip in clips]
        if takes != sum(makes):
            return (f"its transformer is told {takes} numbers of a whole prompt, but its text encoders make "
                    f"{' + '.join(map(str, makes))}; the parts are of different models")
        takes = transformer.get("joint_attention_dim", 4096)
        if "text_encoder_3" in configs and (makes := configs["text_encoder_3"].get("d_model")) != takes:
            return f"its transformer attends to {takes} text channels, but its T5 makes {makes}; the parts are of different models"
        return ""

    def check_flags(self, s):
        super().check_flags(s)
        if default(s.num_vectors, 1) > 1:
            raise UserError(f"--num_vectors {s.num_vectors}: {self.kind}'s pipeline reads a new word as one vector; leave it out")

    def check_side(self, pipeline, side, flag):
        super().check_side(pipeline, side, flag)
        largest = pipeline.transformer.config.pos_embed_max_size * self.multiple(pipeline)
        if side > largest:
            raise UserError(f"{flag} {side}: {pipeline.name_or_path} knows places in pictures of up to {largest} px; give less")

    def make_ready(self, pipeline):
        for part in self.word_encoders:
            settle_clip(tokenizer_of(pipeline, part), pipeline.components.get(part))
        pipeline.tokenizer_max_length = min(pipeline.tokenizer.model_max_length, CLIP_TOKENS)

    def own_size(self, pipeline):
        return (pipeline.default_sample_size * pipeline.vae_scale_factor,) * 2

    def multiple(self, pipeline):
        return pipeline.patch_size * self.latent_scale(pipeline)

    def moments(self, vae, pixels):
        distribution, scale = vae.encode(pixels).latent_dist, vae.config.scaling_factor
        return (distribution.mean - (vae.config.shift_factor or 0)) * scale, distribution.std * scale

    def encode(self, models, prompts):
        """{"hidden": [P, tokens, channels], "pooled": [P, channels]}: both CLIPs' last but one layers beside each other, padded to the
        width of T5's, which follow; zeros stand for a T5 that is not there."""
        import torch

        told = [clip_told(models.pipeline, tokenizer, clip, prompts) for tokenizer, clip in models.readers]
        clips, pooled = (torch.cat(each, dim=-1) for each in zip(*told))
        t5 = self.t5_told(models, prompts, clips)
        return {"hidden": torch.cat([torch.nn.functional.pad(clips, (0, t5.shape[-1] - clips.shape[-1])), t5], dim=1), "pooled": pooled}

    def t5_told(self, models, prompts, like):
        """T5's last layer [P, tokens, channels]."""
        if len(models.text_encoders) <= len(models.readers):
            return like.new_zeros(len(like), self.prompt_tokens, self.denoiser_of(models.pipeline).config.joint_attention_dim)
        ids = models.tokenizers[-1](list(prompts), padding="max_length", max_length=self.prompt_tokens, truncation=True,
                                    return_tensors="pt").input_ids
        return models.text_encoders[-1](moved(ids, like.device))[0]

    def summaries(self, models, prompts):
        return self.encode(models, prompts)["pooled"]

    def prompt_length(self, pipeline, prompt):
        if pipeline.text_encoder_3 is not None:
            return len(pipeline.tokenizer_3(prompt).input_ids), self.prompt_tokens
        return len(pipeline.tokenizer(prompt).input_ids), pipeline.tokenizer_max_length

    def predict(self, models, noisy, levels, conditioning, sizes):
        return models.denoiser(hidden_states=noisy, timestep=1000 * levels, encoder_hidden_states=conditioning["hidden"],
                               pooled_projections=conditioning["pooled"], return_dict=False)[0]

    def book_options(self, told, against):
        return {"prompt_embeds": told["hidden"], "pooled_prompt_embeds": told["pooled"], "negative_prompt_embeds": against["hidden"],
                "negative_pooled_prompt_embeds": against["pooled"]}

    def rows_elsewhere(self, denoiser, layer, up):
        """The last block's text is scaled and shifted by one layer alone, which has the shift first there."""
        last = f"transformer_blocks.{len(denoiser.transformer_blocks) - 1}.norm1_context.linear"
        return up.roll(len(up) // 2, 0) if layer == last else up


class StableDiffusion35(StableDiffusion3):
    """Stable Diffusion 3.5 medium and large, 2.5 and 8 thousand million weights."""

    name = "stable-diffusion-3.5"
    kind = "Stable Diffusion 3.5"
    guidance = class_guidance = 4.5

    def fits(self, config):
        return True


def clip_told(pipeline, tokenizer, clip, prompts):
    """(The last but one layer [P, tokens, channels], pooled [P, channels]) of one of the CLIPs."""
    ids = tokenizer(list(prompts), padding="max_length", max_length=pipeline.tokenizer_max_length, truncation=True,
                    return_tensors="pt").input_ids
    out = clip(moved(ids, next(clip.parameters()).device), output_hidden_states=True)
    return out.hidden_states[-2], out[0]
