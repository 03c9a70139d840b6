"""Run a script once a line comes in on standard input, with the slow libraries loaded by then: bench_gpu.py saves their time."""

import runpy
import sys

import accelerate  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: F401
from transformers import CLIPTextModel  # noqa: F401

if __name__ == "__main__":
    if not sys.stdin.readline():
        raise SystemExit("not told")  # whoever would have is gone
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
