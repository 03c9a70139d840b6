"""What a recipe is: the defaults of a method on a model family. Each family has its own, in its file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Defaults of a method on a model family. Learning rates are for AdamW at batch size 1; None: nothing of it trains."""

    steps: int
    learning_rate: float | None = None
    learning_rate_with_text_encoder: float | None = None
    text_encoder_lr: float | None = None
    embedding_lr: float | None = None
    num_vectors: int = 1
    embedding_norm: float | None = None  # None: as in the vocabulary
    lora_target: str = "attention"
    lr_scheduler: str = "constant"
    snr_gamma: float | None = None  # None: all timesteps weigh the same
    use_ema: bool = False
    selecting: tuple = ()  # (name, value) of what is otherwise with --select_best


# diffusers' guides: LoRA 1e-4; textual inversion 5e-4, 3000 steps; pivotal tuning 1e-4 and 3e-4, 1000 steps.
ADAPTER_RECIPES = {"lora": Recipe(800, 1e-4, 1e-4, 5e-5), "textual_inversion": Recipe(3000, embedding_lr=5e-4),
                   "pivotal": Recipe(1000, 1e-4, 1e-4, 5e-5, 3e-4)}
