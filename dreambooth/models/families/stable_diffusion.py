"""Stable Diffusion 1.x, 2.x and XL, and small models of their kind: a UNet that learnt diffusion, told by CLIP's text encoders."""

import math
import re

from dreambooth.base import UserError, say
from dreambooth.device import moved
from dreambooth.models.families.family import LORA_LAYER, OF_TRANSFORMERS, Family, tokenizer_of
from dreambooth.models.noise import Diffusion
from dreambooth.models.recipes import ADAPTER_RECIPES, Recipe

TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
TEXT_CHANNELS = {768: " (SD 1.x)", 1024: " (SD 2.x)", 2048: " (SDXL)"}  # that a UNet attends to
# What a UNet takes beside or instead of noise and text: its config's key and value -> what that makes it.
OTHER_CHANNELS = {9: "an inpainting model", 5: "a depth model", 8: "a model that edits pictures", 7: "an upscaler"}
CODE = "https://github.com/Stability-AI/generative-models"  # whose layout is meant
# (channels of the text that a UNet attends to, whether it predicts velocity): (ModelSpec's name, Kohya's) of the architecture. Of
# others, such as the bundled model, nothing is claimed, since no other program has them.
ARCHITECTURES = {(768, False): ("stable-diffusion-v1", "sd_v1"), (768, True): ("stable-diffusion-v1", "sd_v1_v"),
                 (1024, False): ("stable-diffusion-v2-512", "sd_v2"), (1024, True): ("stable-diffusion-v2-768-v", "sd_v2_v"),
                 (2048, False): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
                 (2048, True): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")}
SCALES = (0.18215, 0.13025)  # of the latents of Stable Diffusion 1.x and 2.x, of SDXL
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def numbers(value):
    """The different numbers in a config's value, which is one or a list of them: 768, or [768, 768]."""
    return sorted({value} if isinstance(value, (int, float)) else {part for part in value or [] if isinstance(part, (int, float))})


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x."""

    name = "stable-diffusion"
    pipelines = ("StableDiffusionPipeline",)
    kind = "Stable Diffusion 1.x or 2.x"
    denoiser = "unet"
    parts = ("unet", "vae", "text_encoder")
    word_encoders = ("text_encoder",)
    trains_text = bf16_throughout = reads_english_alone = says_after_norm = True
    exports = ("model", "lora", "dora", "lokr", "word")
    other_programs = "ComfyUI, A1111 and Forge"
    diffusers_lora_there = "ComfyUI reads none of the UNet's layers"
    comes_late = False
    guidance = class_guidance = 7.5
    blocks = ("ResnetBlock2D", "BasicTransformerBlock", "Transformer2DModel", "Downsample2D", "Upsample2D")  # these leave little
    # The usual "leading" spacing spends no step on the noisiest timestep, and needs 25 to come as near to the picture of 80 as 15
    # do here. Pictures without guidance follow a straighter path: 10 steps come nearer still.
    class_steps = 15, 10
    class_sampler = {"scheduler": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"}
    lora_targets = {
        "attention": ATTENTION,
        "attention+ff": [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"],
        "all": [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "conv",
                "time_emb_proj"]}
    # Paper: 5e-6. diffusers' DreamBooth guide: 800 steps, and 2e-6 for both parts when the text encoder trains.
    recipes = {"full": Recipe(800, 5e-6, 2e-6, 2e-6), **ADAPTER_RECIPES}
    scheduler_has = "init_noise_sigma"
    latents_of_its_own = 64  # along a side, where the UNet's config says nothing
    lora_prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}

    def fits(self, config):
        return set(numbers(config["cross_attention_dim"])) <= {768, 1024}

    def misfit(self, index, configs):
        unet, latents = configs["unet"], configs["vae"].get("latent_channels", 4)
        channels, is_xl = unet.get("in_channels", 4), len(self.word_encoders) > 1
        if channels != latents:
            kind = OTHER_CHANNELS.get(channels)
            kind = f"{kind}?" if kind else f"its VAE makes {latents}; is that of another kind of model?"
            return f"its UNet takes {channels} channels ({kind}); give a text-to-image model"
        if is_xl != (unet.get("addition_embed_type") == "text_time"):
            return f"its UNet is {'not ' if is_xl else ''}one of SDXL, but the rest is{'' if is_xl else ' not'}; give parts of one model"
        if unet.get("class_embed_type") or unet.get("num_class_embeds"):
            return "its UNet wants a class or a noise level beside the prompt (an upscaler?); give a text-to-image model"
        widths = [configs[part].get("hidden_size") for part in self.word_encoders]
        takes = numbers(unet.get("encoder_hid_dim") or unet.get("cross_attention_dim", 1280))
        if None not in widths and takes != [sum(widths)]:
            return (f"its UNet attends to {' or '.join(map(str, takes))} text channels, but its text encoder{'s make' if is_xl else ' makes'} "
                    f"{' + '.join(map(str, widths))}; the parts are of different models")
        return ""

    def check_flags(self, s):
        given = {"--timestep_sampling": s.timestep_sampling, "--flow_shift": None if s.flow_shift == "auto" else s.flow_shift}
        if wrong := [flag for flag, value in given.items() if value is not None]:
            raise UserError(f"{wrong[0]}: for models that learnt rectified flow, and {self.kind} learnt diffusion; leave it out")

    def check_trainable(self, pipeline, name, flag):
        """UserError unless a loaded pipeline's noise, latents and text are those that the loss is made for.

        A model that draws well may still be one that must not be trained here, since its noise is not that of DDPM (Ho et al.,
        arXiv 2006.11239) or its latents are shifted: it would learn from made-up noise, without a sign of it.
        """
        scheduler, config, vae = type(pipeline.scheduler).__name__, pipeline.scheduler.config, pipeline.vae.config
        has_betas = config.get("beta_start") is not None or config.get("trained_betas") is not None
        flows = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        if not has_betas or flows or "FlowMatch" in scheduler or scheduler.startswith("EDM"):
            raise UserError(f"{flag} {name}: its scheduler, {scheduler}, is not of the DDPM kind (it has no betas: EDM or flow matching), "
                            f"and training with made-up noise would spoil the model; give a model of the DDPM kind")
        if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
            raise UserError(f"{flag} {name}: prediction type {config.prediction_type} is not supported; give a model that predicts epsilon "
                            f"or velocity")
        if type(pipeline.vae).__name__ != "AutoencoderKL":
            raise UserError(f"{flag} {name}: its VAE is an {type(pipeline.vae).__name__}, which only draws; give a model with an "
                            f"AutoencoderKL")
        shifted = {"latents_mean": 0, "latents_std": 1, "shift_factor": 0}
        if own := [key for key, usual in shifted.items() if vae.get(key) is not None and numbers(vae[key]) != [usual]]:
            raise UserError(f"{flag} {name}: its VAE has {' and '.join(own)} of its own, which training does not know; give a model whose "
                            f"VAE has a scaling_factor alone")
        scale, is_xl = vae.get("scaling_factor"), len(self.word_encoders) > 1
        if not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
            raise UserError(f"{flag} {name}: the scaling_factor of its VAE is {scale}; write the right one into vae/config.json "
                            f"(Stable Diffusion's is 0.18215, SDXL's 0.13025)")
        if math.isclose(scale, SCALES[not is_xl], rel_tol=0.001):
            say(f"Note: {name}: its VAE has the scaling_factor of {'Stable Diffusion' if is_xl else 'SDXL'}, {scale}; if it is that "
                f"one's VAE, what is learnt is spoilt.")
        for part in ("text_encoder", "text_encoder_2"):
            kind = type(pipeline.components.get(part)).__name__
            if kind not in (*TEXT_ENCODERS, "NoneType"):
                raise UserError(f"{flag} {name}: its {part} is a {kind}; give a model with CLIP's")

    def make_ready(self, pipeline):
        pipeline.watermark = None  # SDXL marks its pictures where invisible-watermark is installed; SD never does
        for part in self.word_encoders:
            settle_clip(tokenizer_of(pipeline, part), pipeline.components[part])

    def own_size(self, pipeline):
        size = pipeline.unet.config.sample_size or self.latents_of_its_own
        height, width = (size, size) if isinstance(size, int) else size
        return width * pipeline.vae_scale_factor, height * pipeline.vae_scale_factor

    def multiple(self, pipeline):
        return 8

    def latent_shape(self, pipeline, side):
        return (pipeline.unet.config.in_channels, *[side // self.latent_scale(pipeline)] * 2)

    def noise(self, s, pipeline, side, snr_gamma=None):
        """With the model's own betas and prediction type."""
        from diffusers import DDPMScheduler

        return Diffusion(DDPMScheduler.from_config(pipeline.scheduler.config), snr_gamma)

    def moments(self, vae, pixels):
        distribution, scale = vae.encode(pixels).latent_dist, vae.config.scaling_factor
        return distribution.mean * scale, distribution.std * scale

    def encode(self, models, prompts):
        hidden, pooled = encode_prompts(models, prompts)
        return {"hidden": hidden} | ({} if pooled is None else {"pooled": pooled})

    def summaries(self, models, prompts):
        """The text embeddings [P, channels] of P prompts where they end, which sums each up."""
        import torch

        tokenizer = models.tokenizers[-1]
        ends = (tokenize(models.pipeline, tokenizer, prompts) == tokenizer.eos_token_id).int().argmax(-1)
        return encode_prompts(models, prompts)[0][torch.arange(len(prompts)), ends]

    def prompt_length(self, pipeline, prompt):
        tokenizer = pipeline.tokenizer
        return len(tokenizer(pipeline.maybe_convert_prompt(prompt, tokenizer)).input_ids), tokenizer.model_max_length

    def predict(self, models, noisy, levels, conditioning, sizes):
        added = {"text_embeds": conditioning["pooled"], "time_ids": sizes} if "pooled" in conditioning else None
        return models.denoiser(noisy, levels, encoder_hidden_states=conditioning["hidden"], added_cond_kwargs=added).sample

    def last_layers(self, denoiser):
        return [module for module in (denoiser.conv_norm_out, denoiser.conv_out) if module]

    def class_scheduler(self, scheduler):
        from diffusers import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler.from_config(scheduler.config, timestep_spacing=self.class_sampler["timestep_spacing"])

    def text_parameters(self, models):
        parameters = []
        for text_encoder in models.text_encoders:
            inner = getattr(text_encoder, "text_model", text_encoder)  # transformers 5.6 flattened CLIPTextModel, not its twin
            unread = inner.encoder.layers[self.text_layers(models, text_encoder):]
            unused = {*unread.parameters(), *inner.final_layer_norm.parameters()} if unread else set()
            parameters += [p for p in text_encoder.parameters() if p not in unused]
        return parameters

    def text_layers(self, models, text_encoder):
        """SDXL reads its first encoder before the last layer."""
        skips_last = len(models.text_encoders) > 1 and text_encoder is models.text_encoders[0]
        return text_encoder.config.num_hidden_layers - skips_last

    def lora_misfit(self, pipeline, shapes):
        if any(re.search(OF_TRANSFORMERS, name) for name in shapes):
            return f"it is for a transformer model, such as Flux or Stable Diffusion 3 ({min(shapes)})"
        wants = sorted({shape[1] for name, shape in shapes.items()
                        if re.search(r"attn2[._]?(processor[._])?to_[kv]", name) and re.search(LORA_LAYER, name) and len(shape) > 1})
        has = pipeline.unet.config.cross_attention_dim
        if not wants or not isinstance(has, int) or wants == [has]:
            return ""
        of = [f"{width}{TEXT_CHANNELS.get(width, '')}" for width in (*wants, has)]
        return f"it is for a model whose text has {' or '.join(of[:-1])} channels, and this one's has {of[-1]}"

    def notes(self, config, scheduler):
        widths = numbers(config.get("cross_attention_dim"))
        velocity = scheduler.get("prediction_type") == "v_prediction"
        # Where its layers differ in width it is as no published model.
        architecture, version = ARCHITECTURES.get((widths[0] if len(widths) == 1 else None, velocity), (None, None))
        return {"modelspec.architecture": architecture, "modelspec.implementation": architecture and CODE,
                "modelspec.prediction_type": "v" if velocity else "epsilon",
                "ss_base_model_version": version, "ss_v2": version and str(version.startswith("sd_v2")),
                "ss_zero_terminal_snr": "True" if scheduler.get("rescale_betas_zero_snr") else None}


class StableDiffusionXL(StableDiffusion):
    """Two text encoders, and the picture's sizes beside the prompt."""

    name = "stable-diffusion-xl"
    pipelines = ("StableDiffusionXLPipeline",)
    kind = "Stable Diffusion XL"
    word_encoders = ("text_encoder", "text_encoder_2")
    says_after_norm = False
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    guidance = class_guidance = 5.0
    # Three times the UNet: gentler, as is usual for fine-tuning it whole.
    recipes = {"full": Recipe(1000, 2e-6, 2e-6, 1e-6), **ADAPTER_RECIPES}
    latents_of_its_own = 128
    lora_prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}

    def fits(self, config):
        return True


class SmallStableDiffusion(StableDiffusion):
    """Small models of the first kind, like the bundled one: all was chosen by experiment on it."""

    name = "small"
    guidance = 4.0
    # Class images are to be samples of the model as it is (paper, section 3.2). Guided ones show less than the class's variety, and
    # training on them would teach the model that; but what Stable Diffusion draws without guidance is hardly a picture.
    class_guidance = 1.0
    recipes = {
        # Falling at the end: at this rate, constant, likeness and prompt vary from one step to the next. --select_best may
        # keep any step, so there the rate falls nowhere and the weights are averaged.
        "full": Recipe(1600, 2e-4, 2e-4, 5e-5, lr_scheduler="warmup_stable_decay",
                       selecting=(("lr_scheduler", "constant"), ("use_ema", True))),
        "lora": Recipe(1200, 1e-3, 1e-3, 5e-4, lora_target="all"),
        # Words as long as that say what their start says and nothing of the rest of the prompt. A shape is settled where noise is
        # strong, and there an error of the noise is small: so small a gamma makes it the error of the picture (docs/results.md, "Long words").
        "textual_inversion": Recipe(1600, embedding_lr=2e-2, num_vectors=8, embedding_norm=126, lr_scheduler="cosine", snr_gamma=0.1),
        "pivotal": Recipe(800, 1e-3, 1e-3, 5e-4, 2e-3, lora_target="all")}

    def fits(self, config):
        return True


def settle_clip(tokenizer, text_encoder):
    """Have CLIP's text encoder find the end of a text, and its tokenizer know where to cut; where it is there yet."""
    if text_encoder is None:
        return
    # Without a config of its own a tokenizer would not know that, and the text encoder has no more places.
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    # Older configs name another id, and then the highest one is taken for the end of the text: with words added to the
    # vocabulary that would be the new word, and SDXL's pooled embedding would miss all that follows it.
    text_encoder.config.eos_token_id = getattr(text_encoder, "text_model", text_encoder).eos_token_id = tokenizer.eos_token_id


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


def tokenize(pipeline, tokenizer, prompts):
    """Token ids [P, tokens] of P prompts, padded by the tokenizer's own rule and cut at its length.

    A new word of several vectors is written once: diffusers spells it out, "<x>" as "<x> <x>_1".
    """
    prompts = pipeline.maybe_convert_prompt(list(prompts), tokenizer)
    return tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                     return_tensors="pt").input_ids
