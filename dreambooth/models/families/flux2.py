"""FLUX.2 (Black Forest Labs): klein, told by three layers of Qwen3, and dev, told by three of Mistral's.

What is sent to the transformer, and with which sign, is as in diffusers' Flux2KleinPipeline and Flux2Pipeline.
"""

import importlib.util

from dreambooth.device import moved
from dreambooth.models.families.family import Family, tokenizer_of
from dreambooth.models.noise import shift_of
from dreambooth.models.recipes import Recipe

ATTENTION_OF_FLUX2 = r"(single_)?transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|to_qkv_mlp_proj)|single_transformer_blocks\.\d+\.attn\.to_out"
REST_OF_FLUX2 = r"transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|ff(_context)?\.linear_(in|out))"
SHARED_OF_FLUX2 = r"(double_stream_modulation_(img|txt)|single_stream_modulation)\.linear"

NAMES_OF_FLUX2 = {  # in the makers' own code
    ("transformer_blocks.*.", "double_blocks.*."): {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.linear_in",), "img_mlp.2": ("ff.linear_out",),
        "txt_mlp.0": ("ff_context.linear_in",), "txt_mlp.2": ("ff_context.linear_out",)},
    ("single_transformer_blocks.*.", "single_blocks.*."): {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
    ("", ""): {f"{name}.lin": (f"{name}.linear",)
               for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")}}


class Flux2Klein(Family):
    """FLUX.2 klein base, 4 and 9 thousand million weights."""

    name = "flux2-klein"
    pipelines = ("Flux2KleinPipeline",)
    kind = "FLUX.2 klein"
    guidance = class_guidance = 4.0
    takes_negatives = False
    lora_layers = NAMES_OF_FLUX2
    blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock", "Flux2Modulation")
    lora_targets = {"attention": ATTENTION_OF_FLUX2, "attention+ff": f"{ATTENTION_OF_FLUX2}|{REST_OF_FLUX2}",
                    "all": f"{ATTENTION_OF_FLUX2}|{REST_OF_FLUX2}|{SHARED_OF_FLUX2}"}
    # diffusers' example trains a LoRA of 500 steps at 1e-4; the rate of full training is other trainers'. Neither was measured here.
    recipes = {"lora": Recipe(500, 1e-4), "full": Recipe(500, 1e-5)}
    base_of_distilled = "black-forest-labs/FLUX.2-klein-base-4B or -9B"
    usual_steps = 30  # of drawing; the shift depends on their number

    def distilled(self, index, config):
        return bool(index.get("is_distilled"))

    def misfit(self, index, configs):
        transformer, latents = configs["transformer"], configs["vae"].get("latent_channels", 32)
        if transformer.get("in_channels", 128) != 4 * latents:
            return (f"its transformer takes {transformer.get('in_channels', 128)} channels, its VAE makes 4 x {latents}; the parts are of "
                    f"different models")
        takes, makes = transformer.get("joint_attention_dim", 15360), text_channels(configs["text_encoder"])
        if makes and takes != 3 * makes:
            return (f"its transformer attends to {takes} text channels, but three layers of its text encoder make 3 x {makes}; the parts "
                    f"are of different models")
        return ""

    def latent_scale(self, pipeline):
        return 2 * pipeline.vae_scale_factor

    def multiple(self, pipeline):
        return self.latent_scale(pipeline)

    def usual_shift(self, pipeline, side):
        """As the pipeline has it for so many tokens and steps."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        config = pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return super().usual_shift(pipeline, side)
        return shift_of(config, compute_empirical_mu(self.tokens(pipeline, side), self.usual_steps))

    def moments(self, vae, pixels):
        """Of 2 x 2 latents as channels, each by its own mean and deviation over many pictures (the VAE's BatchNorm)."""
        import torch

        mean = torch.nn.functional.pixel_unshuffle(vae.encode(pixels).latent_dist.mode(), 2)
        of_many, squared = (numbers.view(1, -1, 1, 1).to(mean) for numbers in (vae.bn.running_mean, vae.bn.running_var))
        mean = (mean - of_many) / (squared + vae.config.batch_norm_eps).sqrt()
        return mean, mean.new_zeros(mean.shape)

    def encode(self, models, prompts):
        """{"hidden": [P, tokens, channels]}, of the template and with what fills it up."""
        device = next(models.text_encoders[0].parameters()).device
        hidden, _ = models.pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=self.prompt_tokens)
        return {"hidden": hidden}

    def summaries(self, models, prompts):
        import torch

        hidden, places = self.encode(models, prompts)["hidden"], [-1] * len(prompts)
        if tokenizer_of(models.pipeline, "text_encoder").padding_side == "right":
            places = [min(self.prompt_length(models.pipeline, prompt)) - 1 for prompt in prompts]
        return hidden[torch.arange(len(prompts)), places]

    def prompt_length(self, pipeline, prompt):
        """With its template."""
        return len(self.templated(pipeline, prompt)["input_ids"][0]), self.prompt_tokens

    def templated(self, pipeline, prompt):
        """What a tokenizer makes of a prompt in its template."""
        return pipeline.tokenizer.apply_chat_template([[{"role": "user", "content": prompt}]], add_generation_prompt=True,
                                                      enable_thinking=False, return_dict=True)

    def predict(self, models, noisy, levels, conditioning, sizes):
        hidden, (height, width), device = conditioning["hidden"], noisy.shape[-2:], noisy.device
        predicted = models.denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2), timestep=levels, guidance=self.told_guidance(models, levels),
            encoder_hidden_states=hidden, txt_ids=moved(grid_places((1, 1, 1, hidden.shape[1]), len(hidden)), device),
            img_ids=moved(grid_places((1, height, width, 1), len(noisy)), device), return_dict=False)[0]
        return predicted.transpose(1, 2).unflatten(2, (height, width))

    def told_guidance(self, models, levels):
        """[B]: none in training, where the model is to learn what the photos show; None where it takes no such number."""
        import torch

        return torch.ones_like(levels) if models.pipeline.transformer.config.guidance_embeds else None


class Flux2Dev(Flux2Klein):
    """FLUX.2 dev, 32 thousand million weights, which is told by how much to be guided."""

    name = "flux2"
    pipelines = ("Flux2Pipeline",)
    kind = "FLUX.2 dev"
    base_of_distilled = "black-forest-labs/FLUX.2-dev"

    def book_options(self, told, against):
        return {"prompt_embeds": told["hidden"]}

    def misfit(self, index, configs):
        if "Processor" in str(index.get("tokenizer")) and not importlib.util.find_spec("torchvision"):
            return "its text encoder reads pictures, too, and needs torchvision for that: pip install torchvision"
        return super().misfit(index, configs)

    def templated(self, pipeline, prompt):
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        return pipeline.tokenizer.apply_chat_template(format_input([prompt], pipeline.system_message), add_generation_prompt=False,
                                                      tokenize=True, return_dict=True)


def grid_places(counts, pictures):
    """Numbers [pictures, tokens, axes] of the places in a grid of so many along each axis."""
    import torch

    return torch.cartesian_prod(*map(torch.arange, counts)).expand(pictures, -1, -1)


def text_channels(config):
    """How many channels a text encoder's layers have; Mistral's config has them beside those of its pictures. None if unsaid."""
    return (config.get("text_config") or config).get("hidden_size")
