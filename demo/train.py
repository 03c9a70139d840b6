"""Make the bundled model: autoencoder, tokenizer, text encoder and UNet, trained from nothing on the world.

    python demo/train.py                    # everything still to do, then demo/model
    python demo/train.py --unet_steps 60000 # train on from where the last run ended
    python demo/train.py --start demo/model --unet_steps 9000   # train on without demo/work: from a saved model

Stages, each starting from what demo/work/ holds and continuing where it was interrupted:

    world      pictures and captions                          (world.py)
    vae        AutoencoderKL on the pictures
    latents    every picture's latent distribution, once
    unet       CLIPTextModel + UNet2DConditionModel on latents and captions
    export     the averaged weights as a StableDiffusionPipeline in fp16, and a sheet of samples

A step's data and noise depend on its number alone, so an interrupted run continues as if it had not been.
"""

import argparse
import copy
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import world

CHECKPOINT_SECONDS = 180
CAPTION_TOKENS = 32
DRAWING = {"num_inference_steps": 30, "guidance_scale": 4.0}
SHEET_PROMPTS = [
    "a dog",
    "a dog on the moon",
    "a cat on the beach",
    "a robot in the snow",
    "a red car in the city",
    "a teapot on a blue background",
    "a backpack in the jungle",
    "a duck underwater",
]
# Rare tokens for DreamBooth to give a meaning: each is one token and appears in no caption.
IDENTIFIERS = "sks ohwx phol shs zwx xqr qvk vkz wjq jxv fzw kqx".split()

# ---- training loop -----------------------------------------------------------------------------------


def learning_rate(step, steps, peak, warmup=200, decay=0.3):
    """Linear warm-up, constant, then linear to nothing over the last `decay` of the steps."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def fit(name, model, loss_fn, steps, batch_size, lr, examples, device, seed=0, matrices=(), average_decay=0.9995):
    """Train `model` with `loss_fn(model, indices)` for `steps` steps; returns a copy with the averaged weights.

    AdamW trains all parameters but `matrices`: those Muon trains.
    The checkpoint demo/work/NAME.pt is replaced every few minutes, whole or not at all.
    """
    path = world.WORK / f"{name}.pt"
    model.to(device).train()
    rest = [parameter for parameter in model.parameters() if not any(parameter is matrix for matrix in matrices)]
    optimizers = {"optimizer": torch.optim.AdamW(rest, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)}
    if matrices:
        optimizers["muon"] = torch.optim.Muon(matrices, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    average = EMAModel(model.parameters(), decay=average_decay, foreach=True)
    start, losses = 0, []
    if path.exists():
        state = torch.load(path, map_location=device)
        model.load_state_dict(state["model"])
        for key, optimizer in optimizers.items():
            optimizer.load_state_dict(state[key])
        average.load_state_dict(state["average"])
        start, losses = state["step"], state["losses"]

    def save(step):
        state = {key: optimizer.state_dict() for key, optimizer in optimizers.items()}
        state |= {"model": model.state_dict(), "average": average.state_dict(), "step": step, "losses": losses}
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    saved = time.monotonic()
    progress = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=5)
    for step in progress:
        torch.manual_seed(seed + step)
        indices = torch.randint(examples, (batch_size,))
        # bfloat16 is several times faster on CPUs with AMX or AVX512-BF16, and on any recent GPU.
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_fn(model, indices)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr)
            optimizer.step()
        average.step(model.parameters())

        losses.append(loss.item())
        progress.set_postfix(loss=f"{np.mean(losses[-200:]):.4f}", refresh=False)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            save(step + 1)
            saved = time.monotonic()
    if start < steps:
        save(steps)
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    average.copy_to(averaged.parameters())
    return averaged


# ---- data --------------------------------------------------------------------------------------------


def load_world():
    """The world's pictures (uint8, on disk) and what is known of each; the validation pictures are last."""
    world.make_world()
    folder = world.WORK / "world"
    return np.load(folder / "pictures.npy", mmap_mode="r"), json.loads((folder / "captions.json").read_text())


def to_floats(pictures, device):
    """uint8 pictures N x H x W x 3 -> floats in [-1, 1], N x 3 x H x W."""
    return torch.tensor(pictures, device=device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


# ---- vae ---------------------------------------------------------------------------------------------


def new_vae():
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        # One group: several would hide a picture's mean colour from the layers that must reproduce it.
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=world.SIZE,
        scaling_factor=1.0,  # standardise_latents() sees to it
    )
    # Every residual branch starts at zero: what is left is almost linear, and learns faster.
    for name, parameter in vae.named_parameters():
        if ".conv2." in name:
            torch.nn.init.zeros_(parameter)
    return vae.to(memory_format=torch.channels_last)


def vae_loss(pictures, device):
    def loss_fn(vae, indices):
        clean = to_floats(pictures[indices.numpy()], device).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(clean).latent_dist
        decoded = vae.decode(posterior.sample()).sample.float()
        # Group normalisation makes large areas' colour the last thing learnt; coarse scales speed it up.
        error = F.mse_loss(decoded, clean)
        for scale in (4, 16):
            error = error + F.mse_loss(F.avg_pool2d(decoded, scale), F.avg_pool2d(clean, scale))
        # The divergence is there to smooth the latent space and to bound it, not to compress it.
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return error + 2e-4 * divergence

    return loss_fn


@torch.no_grad()
def encode_moments(vae, pictures, device, batch_size=64):
    """Mean and log-variance of every picture's latents, fp16, N x 2C x H x W."""
    moments = []
    for start in tqdm(range(0, len(pictures), batch_size), desc="latents", mininterval=5):
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(to_floats(pictures[start : start + batch_size], device)).latent_dist
        moments.append(posterior.parameters.half().cpu())
    return torch.cat(moments)


def cached_moments(vae, pictures, device, path):
    """encode_moments() of the pictures, from the file if it is there."""
    if not path.exists():
        torch.save(encode_moments(vae, pictures, device), path)
    return torch.load(path)


@torch.no_grad()
def standardise_latents(vae, pictures, device):
    """Rescale each latent channel to mean 0 and deviation 1, inside the VAE's own 1 x 1 convolutions.

    Diffusion noise then means the same in every channel; one scaling_factor could not do that.
    """
    mean_of, logvar_of = encode_moments(vae, pictures, device).float().chunk(2, dim=1)
    mean = mean_of.mean((0, 2, 3)).to(device)
    std = (mean_of.var((0, 2, 3)) + logvar_of.exp().mean((0, 2, 3))).sqrt().to(device)

    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    encoder.bias[:channels] -= mean
    encoder.weight[:channels] /= std[:, None, None, None]
    encoder.bias[:channels] /= std
    encoder.bias[channels:] -= 2 * std.log()
    decoder.bias += decoder.weight[:, :, 0, 0] @ mean
    decoder.weight *= std[None, :, None, None]


@torch.no_grad()
def psnr(vae, pictures, device):
    """Mean peak signal-to-noise ratio of reconstructed pictures, in dB."""
    scores = []
    for batch in np.array_split(pictures, 16):
        clean = to_floats(batch, device)
        decoded = vae.decode(vae.encode(clean).latent_dist.mode()).sample.clamp(-1, 1)
        scores.append(10 * torch.log10(4 / (decoded - clean).square().mean((1, 2, 3))))
    return torch.cat(scores).mean().item()


# ---- text encoder and UNet ---------------------------------------------------------------------------


def new_tokenizer(captions):
    """A CLIP tokenizer that knows every word of the captions, and every identifier, as one token."""
    characters = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,  # more than it finds: it stops when each word is one token
        min_frequency=1,
        end_of_word_suffix="</w>",
        # Named up front, because the trainer would number the characters in another order each time.
        special_tokens=characters + [character + "</w>" for character in characters],
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([*captions, *IDENTIFIERS], trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    vocab = bpe["vocab"] | {"<|startoftext|>": len(bpe["vocab"]), "<|endoftext|>": len(bpe["vocab"]) + 1}
    return CLIPTokenizer(
        vocab=vocab, merges=[tuple(pair) for pair in bpe["merges"]], model_max_length=CAPTION_TOKENS
    )


def encode_captions(tokenizer, captions):
    return tokenizer(
        captions, padding="max_length", max_length=CAPTION_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def new_text_encoder(tokenizer):
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=640,
            projection_dim=160,
            num_hidden_layers=3,
            num_attention_heads=5,
            max_position_embeddings=CAPTION_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet(latent_channels):
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=160,
        attention_head_dim=4,  # the number of heads, despite its name
        norm_num_groups=16,
    )


def new_scheduler():
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def denoising_loss(moments, tokens, empty, scheduler, device):
    """Error of the predicted noise, weighted by min-SNR 5; a tenth of the captions are dropped."""

    def loss_fn(model, indices):
        mean, logvar = moments[indices].to(device).float().chunk(2, dim=1)
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(indices),), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)

        dropped = torch.rand(len(indices), 1) < 0.1
        ids = torch.where(dropped, empty, tokens[indices]).to(device)
        hidden = model["text_encoder"](ids).last_hidden_state
        predicted = model["unet"](noisy, timesteps, hidden).sample

        snr = compute_snr(scheduler, timesteps)
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        return (error * snr.clamp(max=5) / snr).mean()

    return loss_fn


# ---- export ------------------------------------------------------------------------------------------


def sample_sheet(pipe, path, settings, seeds=4):
    """A row for each seed, a column for each prompt."""
    sheet = Image.new("RGB", (len(SHEET_PROMPTS) * 2 * world.SIZE, seeds * 2 * world.SIZE))
    for row in range(seeds):
        generators = [torch.Generator().manual_seed(row) for _ in SHEET_PROMPTS]
        images = pipe(list(SHEET_PROMPTS), generator=generators, **settings).images
        for column, image in enumerate(images):
            box = (column * 2 * world.SIZE, row * 2 * world.SIZE)
            sheet.paste(image.resize((2 * world.SIZE, 2 * world.SIZE), Image.Resampling.BICUBIC), box)
    sheet.save(path)


@torch.no_grad()
def lift_identifiers(tokenizer, text_encoder, token="{}</w>"):
    """Make the vectors of IDENTIFIERS as long as a colour's; `token` is how the vocabulary writes a word in a sentence.

    No caption has them, so they are as short as they began, a fourth of a word's length. Prompts that differ in nothing
    else were then all but equal to the UNet, and it could not learn two subjects of one class.
    """
    table = text_encoder.get_input_embeddings().weight
    rare, words = ([tokenizer.convert_tokens_to_ids(token.format(word)) for word in part] for part in (IDENTIFIERS, world.COLOURS))
    table[rare] *= table[words].norm(dim=-1).mean() / table[rare].norm(dim=-1, keepdim=True)


def export(vae, tokenizer, model, folder, sheet):
    """Write the pipeline (fp16) to `folder`, replacing it whole, and its samples to `sheet`."""
    lift_identifiers(tokenizer, model["text_encoder"])
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model["text_encoder"],
        tokenizer=tokenizer,
        unet=model["unet"],
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    sample_sheet(pipe, sheet, DRAWING)
    save_half(pipe, folder)


def save_half(pipe, folder):
    """Write the pipeline in half precision to `folder`, replacing it whole."""
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(partial)
    # transformers loads in the precision that the config names; without this it would differ from the other parts'.
    config = partial / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


# ---- main --------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vae_steps", type=int, default=20_000)
    parser.add_argument("--unet_steps", type=int, default=40_000)
    parser.add_argument("--unet_lr", type=float, default=8e-4)
    parser.add_argument("--start", type=Path, help="a pipeline whose weights to train on; its vae is kept")
    parser.add_argument("--output", type=Path, default=world.DEMO / "model")
    parser.add_argument("--sheet", type=Path, default=world.DEMO / "samples.png")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    pictures, rows = load_world()
    captions = [row["caption"] for row in rows[: world.PICTURES]]

    tokenizer = new_tokenizer(captions)
    if args.start:
        start = StableDiffusionPipeline.from_pretrained(args.start, dtype=torch.float32)
        assert start.tokenizer.get_vocab() == tokenizer.get_vocab(), "its tokens mean other words"
        vae = start.vae.to(device).requires_grad_(False)
        model = torch.nn.ModuleDict({"text_encoder": start.text_encoder, "unet": start.unet})
        latents = world.WORK / "latents-start.pt"
    else:
        torch.manual_seed(0)
        vae = fit("vae", new_vae(), vae_loss(pictures, device), args.vae_steps, 8, 5e-4, world.PICTURES, device)
        standardise_latents(vae, pictures[:2000], device)
        torch.manual_seed(0)
        model = torch.nn.ModuleDict(
            {"text_encoder": new_text_encoder(tokenizer), "unet": new_unet(vae.config.latent_channels)}
        )
        latents = world.WORK / f"latents-{args.vae_steps}.pt"  # another autoencoder has other latents
    print(f"vae: {psnr(vae, pictures[world.PICTURES :], device):.2f} dB PSNR on unseen pictures")

    moments = cached_moments(vae, pictures[: world.PICTURES], device, latents)
    tokens, empty = encode_captions(tokenizer, captions), encode_captions(tokenizer, [""])
    # For so few tokens plain matrix products beat the fused attention, by a third of the whole step on a CPU.
    model["text_encoder"].set_attn_implementation("eager")
    model["unet"].set_attn_processor(AttnProcessor())
    loss_fn = denoising_loss(moments, tokens, empty, new_scheduler(), device)
    seed = 1_000_000 if args.start else 0  # not the same pictures and noise again
    model = fit("unet", model, loss_fn, args.unet_steps, 32, args.unet_lr, world.PICTURES, device, seed)
    export(vae, tokenizer, model, args.output, args.sheet)


if __name__ == "__main__":
    main()
