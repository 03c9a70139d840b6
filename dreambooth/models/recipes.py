"""Defaults of every method on every model family: steps, learning rates, guidance.

The only module that tells the families apart, and it asks a model's config, never its name.
"""

from dataclasses import dataclass

from dreambooth.base import default


@dataclass(frozen=True)
class Recipe:
    """Defaults of a method on a model family. Learning rates are for AdamW at batch size 1; None: nothing of it trains."""

    steps: int
    learning_rate: float | None = None
    learning_rate_with_text_encoder: float | None = None
    text_encoder_lr: float | None = None
    embedding_lr: float | None = None
    lora_target: str = "attention"
    lr_scheduler: str = "constant"
    use_ema: bool = False
    selecting: tuple = ()  # (name, value) of what is otherwise with --select_best


# diffusers' guides: LoRA 1e-4; textual inversion 5e-4, 3000 steps; pivotal tuning 1e-4 and 3e-4, 1000 steps.
ADAPTER_RECIPES = {"lora": Recipe(800, 1e-4, 1e-4, 5e-5), "textual_inversion": Recipe(3000, embedding_lr=5e-4),
                   "pivotal": Recipe(1000, 1e-4, 1e-4, 5e-5, 3e-4)}
GUIDANCE = {"stable-diffusion": 7.5, "stable-diffusion-xl": 5.0, "small": 4.0}
# Class images are to be samples of the model as it is (paper, section 3.2). Guided ones show less than the class's variety, and
# training on them would teach the model that; but what Stable Diffusion draws without guidance is hardly a picture.
CLASS_GUIDANCE = {**GUIDANCE, "small": 1.0}
RECIPES = {
    # Paper: 5e-6. diffusers' DreamBooth guide: 800 steps, and 2e-6 for both parts when the text encoder trains.
    "stable-diffusion": {"full": Recipe(800, 5e-6, 2e-6, 2e-6), **ADAPTER_RECIPES},
    # Three times the UNet: gentler, as is usual for fine-tuning it whole.
    "stable-diffusion-xl": {"full": Recipe(1000, 2e-6, 2e-6, 1e-6), **ADAPTER_RECIPES},
    # Small models like the bundled one: chosen by experiment on it.
    "small": {
        # Falling at the end: at this rate, constant, likeness and prompt vary from one step to the next. --select_best may
        # keep any step, so there the rate falls nowhere and the weights are averaged.
        "full": Recipe(1600, 2e-4, 2e-4, 5e-5, lr_scheduler="warmup_stable_decay",
                       selecting=(("lr_scheduler", "constant"), ("use_ema", True))),
        "lora": Recipe(800, 1e-3, 1e-3, 5e-4, lora_target="all"),
        "textual_inversion": Recipe(800, embedding_lr=2e-3),
        "pivotal": Recipe(800, 1e-3, 1e-3, 5e-4, 2e-3, lora_target="all")},
}


TEXT_CHANNELS = {768: " (SD 1.x)", 1024: " (SD 2.x)", 2048: " (SDXL)"}  # that a UNet attends to


def family_of(unet_config):
    """The name of a UNet's model family, which RECIPES and GUIDANCE are listed by."""
    if unet_config["addition_embed_type"] == "text_time":
        return "stable-diffusion-xl"
    width = unet_config["cross_attention_dim"]  # or a list with one for each block
    widths = set(width) if isinstance(width, (list, tuple)) else {width}
    return "stable-diffusion" if widths <= {768, 1024} else "small"  # those of SD 1.x and 2.x


def guidance_scale(s, unet_config):
    return default(s.guidance_scale, GUIDANCE[family_of(unet_config)])
