"""The whole process, class images included, beside diffusers' reference script on the same work.

    python benchmarks/bench_reference.py PATH/TO/diffusers/examples/dreambooth/train_dreambooth.py

Both teach the same model the same photos: batch 1 + 1 with prior preservation, as many class images and steps, the same
precision, each in a process of its own and into empty folders. Give --model_name and --mixed_precision for a GPU. What is
printed is also written to benchmarks/results/. Where torchvision cannot be imported, the four transforms that the reference
script needs of it are stood in for.
"""

import argparse
import datetime
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"


def stand_in_for_torchvision():
    """Modules `torchvision` and `torchvision.transforms` with what train_dreambooth.py uses of them."""
    import numpy as np
    import torch
    from PIL import Image

    def compose(steps):
        def run(image):
            for step in steps:
                image = step(image)
            return image
        return run

    def resize(size, interpolation=None):
        def run(image):
            scale = size / min(image.size)
            return image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
        return run

    def crop(size):
        def run(image):
            left, top = ((side - size) // 2 for side in image.size)
            return image.crop((left, top, left + size, top + size))
        return run

    transforms = types.ModuleType("torchvision.transforms")
    transforms.Compose, transforms.Resize, transforms.CenterCrop, transforms.RandomCrop = compose, resize, crop, crop
    transforms.ToTensor = lambda: lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    transforms.Normalize = lambda mean, std: lambda pixels: (pixels - mean[0]) / std[0]
    transforms.InterpolationMode = types.SimpleNamespace(BILINEAR=None)
    package = types.ModuleType("torchvision")
    package.transforms = transforms
    sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}


def run_reference(script, flags, after_step=lambda: None):
    """Be the reference script, and call `after_step` after each of its steps, once the GPU has done it.

    transformers and diffusers are imported first, which ask for the real torchvision.
    """
    import diffusers  # noqa: F401
    import transformers  # noqa: F401
    from diffusers import DiffusionPipeline  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401

    try:
        from torchvision import transforms  # noqa: F401
    except (ImportError, RuntimeError):
        stand_in_for_torchvision()
    from accelerate import Accelerator

    class Listening(Accelerator):
        def log(self, values, *args, **options):  # of a step whose loss has been read
            super().log(values, *args, **options)
            after_step()
    sys.modules["accelerate"].Accelerator = Listening
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


def measured(command):
    """(seconds, what it said) of a process."""
    started = time.monotonic()
    done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"failed:\n{done.stdout[-2000:]}")
    return time.monotonic() - started, done.stdout


def seconds_of_bar(output, steps):
    """The seconds that the last progress bar of `steps` steps shows."""
    *_, last = re.findall(rf"{steps}/{steps} \[(?:(\d+):)?(\d+):(\d+)<", output)
    return sum(int(part or 0) * unit for part, unit in zip(last, (3600, 60, 1)))


def main():
    if sys.argv[1:2] == ["--as-reference"]:
        return run_reference(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("script", help="diffusers' train_dreambooth.py")
    parser.add_argument("--model_name", default="demo/model")
    parser.add_argument("--instance_data_dir", default="instance_images")
    parser.add_argument("--class_prompt", default="a dog")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--num_class_images", type=int, default=200)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--results", type=Path, default=RESULTS / "reference-bundled-cpu.json")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"  # the reference script takes every file of the folder for a picture
        photos.mkdir()
        for path in (REPOSITORY / args.instance_data_dir).iterdir():
            if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
                (photos / path.name).write_bytes(path.read_bytes())
        common = ["--instance_data_dir", photos, "--class_prompt", args.class_prompt, "--resolution", args.resolution,
                  "--num_class_images", args.num_class_images, "--max_train_steps", args.steps, "--seed", 0,
                  "--learning_rate", args.learning_rate, "--mixed_precision", args.mixed_precision,
                  "--pretrained_model_name_or_path", args.model_name, "--with_prior_preservation"]
        ours, said = measured([sys.executable, "dreambooth_implementation.py", "--train", *common, "--output_dir",
                               f"{folder}/ours", "--class_data_dir", f"{folder}/class", "--checkpointing_steps", 0])
        theirs, their_output = measured([
            sys.executable, __file__, "--as-reference", args.script, *common, "--output_dir", f"{folder}/theirs",
            "--class_data_dir", f"{folder}/their_class", "--instance_prompt", "a phol dog", "--train_batch_size", 1,
            "--checkpointing_steps", 10**6, "--prior_generation_precision",
            {"no": "fp32"}.get(args.mixed_precision, args.mixed_precision)])
        seconds = json.loads(Path(folder, "ours", "dreambooth.json").read_text())["seconds"]
    import torch

    sys.path.insert(0, str(REPOSITORY))
    from dreambooth.device import machine_name, plan_device
    from dreambooth.settings import Settings

    training = seconds_of_bar(their_output, args.steps)
    result = {"date": datetime.date.today().isoformat(), "device": machine_name(plan_device(Settings("train")).device),
              "torch": torch.__version__, "load_average": round(os.getloadavg()[0], 1), "model": args.model_name,
              "steps": args.steps, "class_images": args.num_class_images, "precision": args.mixed_precision,
              "whole_process_s": round(ours, 1), "reference_whole_process_s": round(theirs, 1),
              "share_of_reference": round(ours / theirs, 3), "training_s": seconds["training"],
              "reference_training_s": training}
    print(json.dumps(result, indent=2))
    args.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
