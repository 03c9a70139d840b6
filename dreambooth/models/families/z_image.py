"""Z-Image (Tongyi-MAI, Apache-2.0): one stream of picture and text tokens, told by Qwen3's last but one layer.

What is sent to the transformer, and with which sign, is as in diffusers' ZImagePipeline.
"""

from dreambooth.models.families.family import Family, moments_of
from dreambooth.models.recipes import Recipe

ATTENTION_OF_Z = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD_OF_Z = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


class ZImage(Family):
    """Z-Image, 6 thousand million weights."""

    name = "z-image"
    pipelines = ("ZImagePipeline",)
    kind = "Z-Image"
    lora_prefixes = {"transformer": "diffusion_model."}  # ComfyUI finds q, k and v in its joint layer by these names
    guidance, class_guidance, unguided = 4.0, 4.0, 0.0  # the pipeline adds it to 1: none is 0
    lora_targets = {"attention": [*ATTENTION_OF_Z], "attention+ff": [*ATTENTION_OF_Z, *FEED_FORWARD_OF_Z],
                    "all": r".*\.\d+\.(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)"}
    # diffusers' example trains a LoRA of 500 steps at 1e-4; the rate of full training is other trainers'. Neither was measured here.
    recipes = {"lora": Recipe(500, 1e-4), "full": Recipe(500, 1e-5)}
    base_of_distilled = "Tongyi-MAI/Z-Image"

    def fits(self, config):
        return config["dim"] >= 1024

    def misfit(self, index, configs):
        transformer, text = configs["transformer"], configs["text_encoder"]
        if transformer.get("in_channels", 16) != configs["vae"].get("latent_channels", 4):
            return (f"its transformer takes {transformer.get('in_channels', 16)} channels, its VAE makes "
                    f"{configs['vae'].get('latent_channels', 4)}; the parts are of different models")
        if transformer.get("cap_feat_dim", 2560) != text.get("hidden_size"):
            return (f"its transformer attends to {transformer.get('cap_feat_dim', 2560)} text channels, but its text encoder makes "
                    f"{text.get('hidden_size')}; the parts are of different models")
        return ""

    def moments(self, vae, pixels):
        return moments_of(vae, pixels)

    def encode(self, models, prompts):
        """{"hidden": a list of P tensors [tokens, channels]}."""
        device = next(models.text_encoders[0].parameters()).device
        hidden, _ = models.pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
        return {"hidden": hidden}

    def predict(self, models, noisy, levels, conditioning, sizes):
        import torch

        pictures = list(noisy.unsqueeze(2).unbind())  # of [C, 1, h, w] each
        predicted = models.denoiser(pictures, 1 - levels, conditioning["hidden"], return_dict=False)[0]
        return -torch.stack(predicted).squeeze(2)  # it predicts x_0 - e


class SmallZImage(ZImage):
    """Small models of the same kind, like the bundled one."""

    name = "small-flow"
    guidance = 3.0
    class_guidance = 0.0
    recipes = {"lora": Recipe(800, 1e-3, lora_target="all"), "full": Recipe(1600, 2e-4)}

    def fits(self, config):
        return True
