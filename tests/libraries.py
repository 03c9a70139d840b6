"""All that is slow to import, imported, and out of the sight of Python's garbage collector, which each training calls."""

import gc

import accelerate  # noqa: F401
import diffusers.loaders.lora_pipeline  # noqa: F401
import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: F401
import diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl  # noqa: F401
import diffusers.schedulers.scheduling_dpmsolver_multistep  # noqa: F401
import peft  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

gc.collect()
gc.freeze()
