"""Models of the families that learnt rectified flow, of full size and with random weights, without their text encoders.

What these would say of a prompt is made up, of the shapes that they give. Sizes are those of the published configs.
"""

import contextlib
import dataclasses
import typing
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import _disable_current_modes

from dreambooth.models.parts import take_apart
from dreambooth.models.quantized import in_fewer_bits, quantization
from dreambooth.models.streamed_blocks import stream_blocks

TOKENS = 64  # of a prompt, with its template
SD35_LARGE = dict(sample_size=128, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192,
                  qk_norm="rms_norm")
KLEIN = dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False)


@dataclass(frozen=True)
class Arch:
    """A published model: the classes of its pipeline's parts, their configs, and what its prompts become."""

    pipeline: str
    transformer: tuple  # (class, what its config has otherwise than the class's defaults)
    vae: tuple
    told: typing.Callable  # () -> conditioning of one prompt
    without: tuple  # parts that are not made


def kl(channels):
    """An AutoencoderKL of eight pixels a latent, as Stable Diffusion's is but with more channels."""
    return "AutoencoderKL", dict(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
                                 up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=channels, sample_size=1024,
                                 shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False)


TEXT = "text_encoder", "tokenizer"
FLOWS = {
    "z-image": Arch("ZImagePipeline", ("ZImageTransformer2DModel", {}), kl(16), lambda: {"hidden": [torch.randn(TOKENS, 2560)]}, TEXT),
    "klein-4b": Arch("Flux2KleinPipeline", ("Flux2Transformer2DModel", KLEIN), ("AutoencoderKLFlux2", {}),
                     lambda: {"hidden": torch.randn(1, 512, 7680)}, TEXT),
    "qwen-image": Arch("QwenImagePipeline", ("QwenImageTransformer2DModel", {}), ("AutoencoderKLQwenImage", {}),
                       lambda: {"hidden": [torch.randn(TOKENS, 3584)]}, TEXT),
    "flux1": Arch("FluxPipeline", ("FluxTransformer2DModel", dict(guidance_embeds=True)), kl(16),
                  lambda: {"hidden": torch.randn(1, 512, 4096), "pooled": torch.randn(1, 768)},
                  (*TEXT, "text_encoder_2", "tokenizer_2")),
    "flux2-dev": Arch("Flux2Pipeline", ("Flux2Transformer2DModel", {}), ("AutoencoderKLFlux2", {}),
                      lambda: {"hidden": torch.randn(1, 512, 15360)}, TEXT),
    "sd35": Arch("StableDiffusion3Pipeline", ("SD3Transformer2DModel", SD35_LARGE), kl(16),
                 lambda: {"hidden": torch.randn(1, 333, 4096), "pooled": torch.randn(1, 2048)},
                 (*TEXT, "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")),
}


class MadeUpBook:
    """A PromptBook that knows every prompt."""

    weights = 0

    def __init__(self, arch):
        self.arch = arch

    @property
    def told(self):
        return self

    def __getitem__(self, prompt):
        return self.arch.told()

    def learn(self, models, prompts, device):
        pass

    def rows(self, models, prompts, device):
        kept = [self.arch.told() for _ in prompts]

        def there(tensor):
            return tensor.to(device, models.denoiser.dtype if tensor.is_floating_point() else None)
        return {name: [there(tensor) for one in kept for tensor in one[name]] if isinstance(value, list) else
                torch.cat([there(one[name]) for one in kept]) for name, value in kept[0].items()}


@contextlib.contextmanager
def making(device, dtype):
    """Have tensors made on `device`, and in `dtype` those that are not told theirs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def flow_models(name, device="cpu", dtype=torch.float32, **layers):
    """Late Models of a full-size architecture, made on `device` in `dtype`, with other numbers of `layers` than it has."""
    import diffusers

    arch = FLOWS[name]
    with making(device, dtype):
        transformer, vae = (getattr(diffusers, kind)(**config) for kind, config in
                            ((arch.transformer[0], arch.transformer[1] | layers), arch.vae))
    with _disable_current_modes():  # its tables are real where all else is pretended
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = getattr(diffusers, arch.pipeline)(
        scheduler=scheduler, vae=vae, transformer=transformer, **dict.fromkeys(arch.without))
    for module in (transformer, vae):
        module.requires_grad_(False).eval()
    return dataclasses.replace(take_apart(name, pipeline), book=MadeUpBook(arch))


def as_planned(models, levers, device):
    """Late models with their denoiser as the program would read it for this plan: in fewer bits, or with blocks that wait.

    What comes in fewer bits goes to the `device` layer by layer, so that it is never whole there.
    """
    if config := quantization(levers.base_precision, torch.bfloat16, models.denoiser).get("quantization_config"):
        from torchao.quantization import quantize_

        fewer = in_fewer_bits(models.denoiser, levers.base_precision)
        quantize_(models.denoiser, config.quant_type, lambda part, name: getattr(part, "weight", None) in fewer,
                  device=None if levers.offload_blocks else device)
    if levers.offload_blocks:
        stream_blocks(models.denoiser, device)
    return models
