"""The families that this program knows, and which of them a model is of."""

from dreambooth.base import default
from dreambooth.models.families.flux import Flux
from dreambooth.models.families.flux2 import Flux2Dev, Flux2Klein
from dreambooth.models.families.qwen_image import QwenImage
from dreambooth.models.families.stable_diffusion import SmallStableDiffusion, StableDiffusion, StableDiffusionXL
from dreambooth.models.families.stable_diffusion_3 import StableDiffusion3, StableDiffusion35
from dreambooth.models.families.z_image import SmallZImage, ZImage

FAMILIES = (  # of those that fit, the first
    StableDiffusion(), StableDiffusionXL(), SmallStableDiffusion(),
    ZImage(), SmallZImage(),
    Flux2Klein(), Flux2Dev(),
    Flux(),
    QwenImage(),
    StableDiffusion3(), StableDiffusion35(),
)
PIPELINES = tuple(dict.fromkeys(kind for family in FAMILIES for kind in family.pipelines))


def family_named(kind):
    """A family of the pipelines of this class, for questions that all such families answer alike; None if there is none."""
    return next((family for family in FAMILIES if kind in family.pipelines), None)


def known_kinds():
    """The families, in words."""
    kinds = list(dict.fromkeys(family.kind for family in FAMILIES))
    return f"{', '.join(kinds[:-1])} and {kinds[-1]}"


def family_of(pipeline):
    """The family of a loaded pipeline."""
    kind = type(pipeline).__name__
    return next(family for family in FAMILIES if kind in family.pipelines and family.fits(family.denoiser_of(pipeline).config))


def guidance_scale(s, pipeline):
    return default(s.guidance_scale, family_of(pipeline).guidance)


def own_size(pipeline):
    """(width, height) in pixels that a pipeline draws by itself."""
    return family_of(pipeline).own_size(pipeline)
