"""The model as it was before training, whose predictions --prior frozen takes for the class's targets.

After the "prior prediction" of OneTrainer and the "differential output preservation" of ai-toolkit and Kohya's scripts: what the
trained model says of the photos' noisy latents is to be the subject under its own prompt, and what it always was under the class's.
Nothing is drawn beforehand. A step costs one more forward pass, without gradients, of its class half; full training keeps a copy of
the denoiser, where a LoRA has the model itself, switched off.
"""

import contextlib
import copy
import dataclasses

from dreambooth.models.parts import Models
from dreambooth.training.precision import compute_as_weights_are


class Untouched:
    """What a model predicted before it was trained: untouched(noisy latents [B, C, h, w], their batch) -> [B, C, h, w]."""

    def __init__(self, models: Models, conditioning):
        """`models` have the denoiser that is asked; `conditioning` maps prompt numbers [B] to what the text encoders told before."""
        self.models, self.conditioning = models, conditioning

    def __call__(self, noisy, batch):
        import torch

        with torch.no_grad(), adapters_off(self.models.denoiser):
            return self.models.family.predict(self.models, noisy, batch["levels"], self.conditioning(batch["prompt"]), batch["sizes"])


    def forget(self):
        """Let go of the model."""
        self.models = self.conditioning = None


@contextlib.contextmanager
def adapters_off(denoiser):
    """Within the block, a denoiser is without its adapters, if it has any."""
    if not getattr(denoiser, "peft_config", None):
        yield
        return
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()


def untouched_copy(denoiser, dtype, device):
    """A copy of a denoiser's weights in `dtype` on the device, that trains never and computes in that precision.

    Each tensor is converted by itself: there is no second copy in the precision of the first, not even for a while.
    """
    import torch

    copies = {id(weight): torch.nn.Parameter(weight.detach().to(device, dtype, copy=True), requires_grad=False)
              for weight in denoiser.parameters()}
    frozen_copy = copy.deepcopy(denoiser, copies).to(device).eval()
    if dtype != torch.float32:
        compute_as_weights_are(frozen_copy, dtype)
    return frozen_copy


def make_untouched(models, conditioning, frozen_copy):
    """The Untouched of models whose denoiser is about to train; `frozen_copy` is its untouched_copy(), or None where adapters train."""
    denoiser = models.family.denoiser_of(models.pipeline) if frozen_copy is None else frozen_copy
    return Untouched(dataclasses.replace(models, denoiser=denoiser), conditioning)
