"""A process that runs the program and may be killed at any moment; it starts at once, forked from one that has imported all."""

import multiprocessing
import os
import sys

import accelerate  # noqa: F401  (imported here, once, for all that are forked)
import diffusers.loaders.lora_pipeline  # noqa: F401
import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: F401
import diffusers.schedulers.scheduling_dpmsolver_multistep  # noqa: F401
import peft  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import dreambooth_implementation as db


def work(folder, flags):
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(db.main(flags))


def start(folder, *flags):
    """Start the program with these flags in `folder`; returns its multiprocessing.Process. Its words go to log.txt."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed"])
    process = context.Process(target=work, args=(str(folder), [str(flag) for flag in flags]))
    process.start()
    return process
