"""Do other programs draw with our exports what diffusers draws? A table, for docs/formats.md:

    python benchmarks/clients.py --comfyui FOLDER --sd_scripts FOLDER --sd_cpp --tokenizer FOLDER

For each family a model of its real shape with random weights is made, and everything that --export writes of it. Each program loads
that with its own code, in a process of its own, and its UNet's answer to one latent, time and prompt is compared with plain
diffusers'. stable-diffusion.cpp gives out pictures alone; they are of one step, and compared with one that diffusers' parts make.

    --comfyui FOLDER, --sd_scripts FOLDER   checkouts of github.com/comfyanonymous/ComfyUI and github.com/kohya-ss/sd-scripts
    --sd_cpp            the package cyllama, which contains stable-diffusion.cpp
    --python NAME=PATH  the Python that has what a program needs, such as sd_scripts=venv/bin/python; otherwise this one
    --tokenizer FOLDER  CLIP's vocab.json and merges.txt; otherwise those in ComfyUI's folder
    --families, --artifacts   some of them, with commas between
    --work FOLDER       where models and answers are made, and kept for the next time (default: clients)
    --results FILE      where the figures are kept (default: benchmarks/results/clients.json)

Memory: a model in float32 at a time, 5 GB for SD 1.5, 14 GB for SDXL. LoRAs of families that draw by flow: comfyui_loras.py.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import client_programs
from client_programs import METHODS

REPOSITORY = Path(__file__).resolve().parent.parent

CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
              hidden_act="quick_gelu")
CLIP_H = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, projection_dim=512,
              hidden_act="gelu")
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
              hidden_act="gelu")
SD2_UNET = dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
XL_UNET = dict(
    block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, sample_size=128)
# family: (UNet's config, text encoders' configs, what the UNet predicts)
FAMILIES = {"sd15": (dict(cross_attention_dim=768, attention_head_dim=8), [CLIP_L], "epsilon"),
            "sd21-base": (SD2_UNET, [CLIP_H], "epsilon"), "sd21": (SD2_UNET, [CLIP_H], "v_prediction"),
            "sdxl": (XL_UNET, [CLIP_L, CLIP_G], "epsilon")}
LORA = dict(rank=4, lora_alpha=2, train_text_encoder=True)
FLAGS = {"lora": LORA, "lora-unet": {"rank": 4, "lora_alpha": 2}, "lora-all-layers": {**LORA, "lora_target": "all"},
         "dora": {"rank": 4, "use_dora": True}, "lokr": {**LORA, "lora_target": "all", "adapter_type": "lokr"},
         "word-of-2-vectors": {"num_vectors": 2}, "pivotal": LORA}  # of --train, beside --method
CLIENTS = ("comfyui", "sd_scripts", "sd_cpp")


# ---- what is made


def make_model(family, folder, tokenizer_folder):
    """A pipeline of the family's shape in half precision, with random numbers, its biases too."""
    import torch
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    unet_config, texts, prediction = FAMILIES[family]
    ends = dict(vocab_size=49408, bos_token_id=49406, eos_token_id=2)  # as the hub's configs have it
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config)
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4, layers_per_block=2,
                            up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.13025 if len(texts) > 1 else 0.18215)
        encoders = [(CLIPTextModelWithProjection if number else CLIPTextModel)(CLIPTextConfig(**text, **ends))
                    for number, text in enumerate(texts)]
    unet, vae, *encoders = (fill(module, prediction) for module in (unet, vae, *encoders))
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                       prediction_type=prediction)

    def tokenizer(pad):
        files = [str(tokenizer_folder / file) for file in ("vocab.json", "merges.txt")]
        return CLIPTokenizer(*files, pad_token=pad, model_max_length=77)
    parts = dict(vae=vae, unet=unet, scheduler=scheduler, text_encoder=encoders[0],
                 tokenizer=tokenizer("!" if family.startswith("sd21") else "<|endoftext|>"))
    if len(texts) > 1:
        parts |= dict(text_encoder_2=encoders[1], tokenizer_2=tokenizer("!"), add_watermarker=False)
        pipeline = StableDiffusionXLPipeline(**parts)
    else:
        pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder)


def fill(module, prediction):
    """A module of shapes alone, with random numbers in half precision; a few millions again and again, which takes seconds."""
    import torch

    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(1 << 23, generator=generator)
    module = module.half().to_empty(device="cpu")
    for name, buffer in module.named_buffers():  # CLIP's position_ids
        buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape))
    for name, parameter in module.named_parameters():
        # By a wide bias in this place ComfyUI knows an SD 2.x that predicts velocity.
        wide = name == "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias" and prediction == "v_prediction"
        scale = (0.2 if wide else 0.02) if parameter.dim() == 1 or "embedding.weight" in name else (3 * parameter[0].numel()) ** -0.5
        for piece in parameter.data.view(-1).split(1 << 22):
            start = int(torch.randint(1 << 22, (1,), generator=generator))
            piece.copy_(numbers[start:start + len(piece)] * scale)
        if parameter.dim() == 1 and name.endswith("weight"):  # of a norm
            parameter.data += 1
    return module


def exported(folder, name):
    return folder / f"{name.replace('-', '')}.safetensors"


def make_artifact(base, name, folder):
    """What --train would leave in `folder`, with weights changed by chance, and what --export makes of it."""
    import torch

    import dreambooth_implementation as db

    target = exported(folder, name)
    method, options = METHODS[name], FLAGS.get(name, {})
    if method is None:
        source = str(base)
    else:
        source = str(folder / name)
        s = db.Settings("train", method=method, output_dir=source, **options)
        models = db.load_models(str(base), torch.bfloat16, freezes_denoiser=True)
        word = f"<{target.stem}>" if db.METHODS[method].adds_words else "dog"
        subjects = [db.Subject(word, "a dog", f"a {word}", "word")]
        recipe = dataclasses.replace(db.StableDiffusion.recipes[method], lora_target=options.get("lora_target", "attention"))
        groups = db.parameter_groups(s, models, subjects, recipe)
        torch.manual_seed(1)
        for parameter in (parameter for group in groups for parameter in group.parameters):
            parameter.data += torch.randn(parameter.shape) * (0.05 if parameter.dim() > 1 else 0.1 * parameter.abs().mean())
        for group in groups:
            group.finish()
        Path(source).mkdir(exist_ok=True)
        notes = db.notes_of(models.family, models.denoiser.config, models.pipeline.scheduler.config, str(base), subjects, 512)
        for save in db.METHODS[method].saves:
            save(Path(source), models, subjects, notes)
        (Path(source) / "dreambooth.json").write_text(json.dumps(
            {"method": method, "base_model": str(base), "settings": {"adapter_type": s.adapter_type},
             "subjects": [dataclasses.asdict(subject) for subject in subjects]}))
        del models, groups
    if db.main(["--export", str(target), "--model_path", source]) != 0:
        sys.exit(f"{target}: not exported")


# ---- the table


def answer(client, program, folder, names):
    """In a process of its own: write folder/CLIENT.pt."""
    import diffusers  # noqa: F401  (before the stand-ins, which would seem installed to it)
    import torch
    import transformers  # noqa: F401

    if client == "diffusers":
        sys.path.insert(0, str(REPOSITORY))
        answers = client_programs.answers_of_diffusers(folder, names)
    else:
        sys.meta_path.append(client_programs.StandIn())
        reference = torch.load(folder / "diffusers.pt", weights_only=True)
        answers = getattr(client_programs, f"answers_of_{client}")(program, folder, names, reference)
    torch.save(answers, folder / f"{client}.pt")


def figures(theirs, ours, without):
    """How far a program's answer to an artifact is from diffusers', and the answer without the artifact; what it left out."""
    picture = "picture" in theirs

    def difference(one):
        if picture:
            return (one["picture"] - ours["picture"]).abs().mean().item()  # of 255
        return ((one["answer"] - ours["answer"]).norm() / ours["answer"].norm()).item()
    return {"of": "255" if picture else "1", "difference": difference(theirs), "without": difference(without) if ours is not without else None,
            "missed": theirs["missed"], "predicts": theirs.get("predicts", ours["predicts"])}


def cell(found, predicts):
    """What the table says of figures(); "-" where the program was not asked."""
    if found is None:
        return "-"
    is_picture = found["of"] == "255"
    text = f"{found['difference']:.1f} of 255" if is_picture else f"{found['difference']:.0e}"
    if found["without"] is not None:
        text += f" ({found['without']:.{0 if is_picture else 2}f} without)"
    if found["predicts"] != predicts:
        text += f", **taken for {found['predicts']}**"
    return text + (f", {len(found['missed'])} lines of keys missed" if found["missed"] else "")


def keep(path, family, rows):
    """Put a family's figures into the file of all."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    for name, row in rows.items():
        known.setdefault(family, {}).setdefault(name, {}).update(row)
    path.write_text(json.dumps(known, indent=1) + "\n")


def child(python, *words):
    """Run this file again; its exit status."""
    return subprocess.run([python, __file__, *map(str, words)]).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--sd_scripts", type=Path)
    parser.add_argument("--sd_cpp", action="store_true")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--python", action="append", default=[])
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--artifacts", default=",".join(METHODS))
    parser.add_argument("--work", type=Path, default=Path("clients"))
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results" / "clients.json")
    parser.add_argument("--do", nargs=2, help=argparse.SUPPRESS)  # a step, in a process of its own: its name, and of what
    s = parser.parse_args()
    tokenizer = s.tokenizer or s.comfyui and s.comfyui / "comfy" / "sd1_tokenizer"
    names, pythons = s.artifacts.split(","), dict(text.split("=", 1) for text in s.python)
    if s.do:
        step, what = s.do
        folder, sys.path[:0] = s.work / s.families, [str(REPOSITORY)]
        if step == "model":
            return make_model(what, folder / "model", tokenizer)
        if step == "artifact":
            return make_artifact(folder / "model", what, folder)
        return answer(what, getattr(s, what, None), folder, names)
    if not (tokenizer and (tokenizer / "vocab.json").is_file()):
        sys.exit("--tokenizer: give a folder with CLIP's vocab.json and merges.txt, or --comfyui")
    clients = [client for client in CLIENTS if getattr(s, client)]
    print("\n| family | artifact | " + " | ".join(clients) + " |\n|---|---|" + "---|" * len(clients), flush=True)
    for family in s.families.split(","):
        table_of(family, s, clients, names, pythons, tokenizer)


def table_of(family, s, clients, names, pythons, tokenizer):
    """Make what is not there yet, ask the programs, and print a family's rows."""
    import torch

    folder = (s.work / family).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    programs = [f"--{client}={getattr(s, client).resolve()}" for client in clients if client != "sd_cpp"]
    common = ["--work", s.work.resolve(), "--families", family, "--artifacts", ",".join(names), "--tokenizer", tokenizer.resolve(),
              *programs]
    steps = [] if (folder / "model" / "model_index.json").is_file() else [(sys.executable, "model", family)]
    steps += [(sys.executable, "artifact", name) for name in names if not exported(folder, name).exists()]
    for python, step, what in steps:
        if child(python, *common, "--do", step, what):
            sys.exit(f"{family}: {what} failed")
    newest = max(file.stat().st_mtime for file in folder.glob("*.safetensors"))
    for client in ("diffusers", *clients):
        kept = folder / f"{client}.pt"
        if not kept.exists() or kept.stat().st_mtime < newest:
            kept.unlink(missing_ok=True)
            failed = child(pythons.get(client, sys.executable), *common, "--do", "answers", client)
            if failed and client == "diffusers":
                sys.exit(f"{family}: diffusers, with which the others are compared, gave no answer")
    found = {client: torch.load(folder / f"{client}.pt", weights_only=True) if (folder / f"{client}.pt").exists() else {}
             for client in ("diffusers", *clients)}
    ours, rows = found["diffusers"], {}
    for name in names:
        rows[name] = {client: figures(found[client][name], ours[name], ours["whole"]) for client in clients if name in found[client]}
        cells = [cell(rows[name].get(client), ours[name]["predicts"]) for client in clients]
        print(f"| {family} | {name} | {' | '.join(cells)} |", flush=True)
    for name, row in rows.items():
        for client, said in row.items():
            for line in said["missed"][:3]:
                print(f"    {client}, {name}: {line[:300]}", file=sys.stderr)
            said["missed"] = [line[:200] for line in said["missed"][:3]] + [f"{len(said['missed'])} in all"] * (len(said["missed"]) > 3)
    keep(s.results, family, rows)


if __name__ == "__main__":
    main()
