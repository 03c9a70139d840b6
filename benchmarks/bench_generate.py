"""Speed of drawing class images and pictures, by the number drawn at once.

    python benchmarks/bench_generate.py                       the bundled model
    python benchmarks/bench_generate.py --arch sd15           full size, random weights, nothing is downloaded

All flags of `--infer` that shape a picture can be given, such as --num_inference_steps or --mixed_precision. Prints JSON,
and writes it to benchmarks/results/.
"""

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path

import torch
from bench_train import RESULTS, UNETS, machine, random_models, timed

from dreambooth.arguments import parse_settings
from dreambooth.device import peak_memory, plan_device
from dreambooth.drawing.draw import draw
from dreambooth.models.families.known import guidance_scale
from dreambooth.models.hub import BUNDLED_MODEL
from dreambooth.models.load import load_models


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="and flags of --infer")
    parser.add_argument("--arch", choices=list(UNETS), help="random weights of this size instead of the bundled model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of pictures drawn at once")
    parser.add_argument("--rounds", type=int, default=5, help="timed batches of each size")
    parser.add_argument("--results", type=Path, help="file to write, instead of one in benchmarks/results")
    args, rest = parser.parse_known_args()

    s = parse_settings(["--infer", *rest])
    plan = plan_device(s)
    models = random_models(args.arch, plan.device) if args.arch else load_models(str(BUNDLED_MODEL), torch.float32)
    pipeline = models.pipeline.to(plan.device, plan.dtype)
    side = models.resolution
    common = dict(steps=s.num_inference_steps, guidance_scale=guidance_scale(s, pipeline), height=side,
                  width=side)

    def batch_of(count):
        return lambda: list(draw(pipeline, [("a dog", seed) for seed in range(count)], batch_size=count, **common))
    seconds = timed([batch_of(count) for count in args.batches], plan.device, args.rounds, 1)
    result = {"date": datetime.date.today().isoformat(), "device": machine(plan.device), "torch": torch.__version__,
              "python": sys.version.split()[0], "model": args.arch or "bundled", "precision": plan.precision,
              "resolution": side, "num_inference_steps": s.num_inference_steps, "peak_memory": peak_memory(plan.device),
              "seconds_per_picture": {str(count): round(statistics.median(times) / count, 4)
                                      for count, times in zip(args.batches, seconds)}}
    print(json.dumps(result, indent=2))
    path = args.results or RESULTS / f"generate-{result['model']}-{plan.device.type}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
