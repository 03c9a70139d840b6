"""Speed and peak memory of training at full size. The weights are random, so nothing is downloaded.

    python benchmarks/full_size.py --family sd15 --steps 50
    python benchmarks/full_size.py --family sdxl --steps 50 --gradient_checkpointing

Times the program's own training loop on latents of made-up pictures, one photo and one class image a step, and prints
one JSON line. The first five steps, in which CUDA chooses its kernels, are run but not timed.
"""

import argparse
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
import dreambooth_implementation as db

WARM_UP = 5

# The hub's configs of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0, where they differ from diffusers' defaults.
UNETS = {
    "sd15": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "sdxl": dict(sample_size=128, cross_attention_dim=2048, attention_head_dim=[5, 10, 20], block_out_channels=(320, 640, 1280),
                 down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                 up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
                 transformer_layers_per_block=[1, 2, 10], addition_embed_type="text_time", addition_time_embed_dim=256,
                 projection_class_embeddings_input_dim=2816),
}
TEXT_ENCODERS = {
    "sd15": [dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)],
    "sdxl": [dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768),
             dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
                  hidden_act="gelu")],
}


def random_models(family, device):
    """Models of the family's full size with random weights, made on `device`."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(REPOSITORY / "demo" / "model", subfolder="tokenizer", model_max_length=77)
    with torch.device(device):
        unet = UNet2DConditionModel(**UNETS[family])
        kinds = [CLIPTextModel, CLIPTextModelWithProjection]
        encoders = [kind(CLIPTextConfig(vocab_size=49408, eos_token_id=tokenizer.eos_token_id, **config))
                    for kind, config in zip(kinds, TEXT_ENCODERS[family])]
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
                            up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    parts = dict(vae=vae, unet=unet, scheduler=scheduler, tokenizer=tokenizer, text_encoder=encoders[0])
    if family == "sdxl":
        pipeline = StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, text_encoder_2=encoders[1], add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    for module in (unet, vae, *encoders):
        module.requires_grad_(False).eval()
    return db.Models(family, pipeline, [tokenizer] * len(encoders), encoders, vae.to("cpu"), unet, scheduler)


def random_cache(models, resolution):
    """The latent cache of four photos and eight class images that nobody took."""
    side, rows = resolution // models.latent_scale, 12
    return db.LatentCache(torch.randn(rows, 4, side, side), torch.full((rows, 4, side, side), 0.1),
                          torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]] * rows).float(),
                          (torch.arange(rows) >= 4).long(), ["a phol dog", "a dog"], [list(range(4))], [list(range(4, rows))])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--family", choices=list(UNETS), required=True)
    parser.add_argument("--steps", type=int, default=50, help="timed steps")
    parser.add_argument("--resolution", type=int, help="default: the model's own, 512 or 1024")
    parser.add_argument("--mixed_precision", default="auto")
    parser.add_argument("--method", choices=list(db.METHODS), default="full")
    parser.add_argument("--train_text_encoder", action="store_true")
    parser.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction)
    args = parser.parse_args()

    from accelerate import Accelerator

    s = db.Settings("train", mixed_precision=args.mixed_precision, gradient_checkpointing=args.gradient_checkpointing,
                    method=args.method, train_text_encoder=args.train_text_encoder)
    plan = db.plan_device(s)
    accelerator = Accelerator(mixed_precision=plan.precision, cpu=plan.device.type == "cpu")
    models = random_models(args.family, plan.device)
    resolution = args.resolution or models.resolution
    recipe = db.RECIPES[db.family_of(models.unet.config)][args.method]
    if db.METHODS[args.method].is_adapter:
        models.unet.to(plan.dtype)
    groups = db.parameter_groups(s, models, [db.Subject("<dog>", "a dog", "a <dog> dog", "dog")], recipe)
    checkpointing = db.set_checkpointing(s, models, groups, plan)
    stamps, report = [], db.report_losses

    def timed_report(*arguments):
        if plan.device.type == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.monotonic())
        report(*arguments)

    db.report_losses, db.REPORT_EVERY = timed_report, WARM_UP
    steps = WARM_UP + -(-args.steps // WARM_UP) * WARM_UP
    with tempfile.TemporaryDirectory() as logs:
        db.optimize(s, models, groups, random_cache(models, resolution), steps, accelerator, logs)
    result = {
        "date": datetime.date.today().isoformat(), "device": db.machine_name(plan.device), "torch": torch.__version__,
        "family": args.family, "method": args.method, "resolution": resolution, "precision": plan.precision, "batch": "1 photo + 1 class image",
        "trains": {group.name: sum(p.numel() for p in group.parameters) for group in groups},
        "gradient_checkpointing": checkpointing,
        "steps": steps - WARM_UP, "steps_per_second": round((steps - WARM_UP) / (stamps[-1] - stamps[0]), 3),
    }
    if plan.device.type == "cuda":
        result["peak_allocated_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        result["peak_reserved_GiB"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
