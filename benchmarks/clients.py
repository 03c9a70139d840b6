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
    --work FOLDER       where the models are made, and kept (default: clients)

Memory: a model in float32 at a time, 5 GB for SD 1.5, 14 GB for SDXL. The families that draw by flow are not exported yet.
"""

import argparse
import dataclasses
import importlib.abc
import importlib.machinery
import json
import logging
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

REPOSITORY = Path(__file__).resolve().parent.parent
TIME, SIDE, PROMPT = 500, 16, "a photo of a {} at night"  # the latent is SIDE x SIDE
SEED, PICTURE_SIDE, LAST_TIME = 7, 64, 999  # of stable-diffusion.cpp's picture

CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu", projection_dim=768)
CLIP_H = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu", projection_dim=512)
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu", projection_dim=1280)
SD2_UNET = dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
XL_UNET = dict(
    block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, sample_size=128)
# family: (UNet's config, text encoders' configs, what the UNet predicts)
FAMILIES = {"sd15": (dict(cross_attention_dim=768, attention_head_dim=8), [CLIP_L], "epsilon"),
            "sd21-base": (SD2_UNET, [CLIP_H], "epsilon"), "sd21": (SD2_UNET, [CLIP_H], "v_prediction"), "sdxl": (XL_UNET, [CLIP_L, CLIP_G], "epsilon")}
LORA = dict(rank=4, lora_alpha=2, train_text_encoder=True)
ARTIFACTS = {  # name: (--method, its flags); the whole model has none
    "whole": (None, {}),
    "lora": ("lora", LORA),
    "lora-all-layers": ("lora", {**LORA, "lora_target": "all"}),
    "dora": ("lora", {"rank": 4, "use_dora": True}),
    "word": ("textual_inversion", {}),
    "word-of-2-vectors": ("textual_inversion", {"num_vectors": 2}),
    "pivotal": ("pivotal", LORA)}
CLIENTS = ("comfyui", "sd_scripts", "sd_cpp")
STAND_INS = ("torchvision", "torchaudio", "av", "kornia", "spandrel")  # imported by these programs, and needed for nothing that is done here


# ---- what is made


def make_model(family, folder, tokenizer_folder):
    """A pipeline of the family's shape in half precision, whose random numbers are such as training would leave: none is zero."""
    import torch
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    unet_config, texts, prediction = FAMILIES[family]
    unet = UNet2DConditionModel(**unet_config)
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4, layers_per_block=2,
                        up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.13025 if len(texts) > 1 else 0.18215)
    ends = dict(vocab_size=49408, bos_token_id=49406, eos_token_id=2)  # as the hub's configs have it
    encoders = [(CLIPTextModelWithProjection if number else CLIPTextModel)(CLIPTextConfig(**text, **ends)) for number, text in enumerate(texts)]
    torch.set_default_dtype(torch.float32)
    for module in (unet, vae, *encoders):
        for name, parameter in module.half().named_parameters():
            if name.endswith("bias"):  # most are zero; a wide one in this place is how ComfyUI tells that an SD 2.x predicts velocity
                wide = name.startswith("up_blocks.3.attentions.2.transformer_blocks.0.norm1") and prediction == "v_prediction"
                parameter.data = (torch.randn(parameter.shape) * (0.2 if wide else 0.02)).half()
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction,
                                       steps_offset=1)

    def tokenizer(pad):
        return CLIPTokenizer(str(tokenizer_folder / "vocab.json"), str(tokenizer_folder / "merges.txt"), pad_token=pad, model_max_length=77)
    parts = dict(vae=vae, unet=unet, scheduler=scheduler, text_encoder=encoders[0],
                 tokenizer=tokenizer("!" if family.startswith("sd21") else "<|endoftext|>"))
    if len(texts) > 1:
        parts |= dict(text_encoder_2=encoders[1], tokenizer_2=tokenizer("!"), add_watermarker=False)
        StableDiffusionXLPipeline(**parts).save_pretrained(folder)
    else:
        StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)


def make_artifact(base, name, folder):
    """What --train would leave in `folder`, with weights changed by chance, and what --export makes of it."""
    import torch

    import dreambooth_implementation as db

    target = folder / f"{name.replace('-', '')}.safetensors"
    if target.exists():
        return
    method, options = ARTIFACTS[name]
    if method is None:
        source = str(base)
    else:
        source = str(folder / name)
        s = db.Settings("train", method=method, output_dir=source, **options)
        models = db.load_models(str(base), torch.bfloat16, freezes_unet=True)
        word = f"<{target.stem}>" if db.METHODS[method].adds_words else "dog"
        subjects = [db.Subject(word, "a dog", f"a {word}", "word")]
        recipe = dataclasses.replace(db.RECIPES["stable-diffusion"][method], lora_target=options.get("lora_target", "attention"))
        groups = db.parameter_groups(s, models, subjects, recipe)
        torch.manual_seed(1)
        for parameter in (parameter for group in groups for parameter in group.parameters):
            parameter.data += torch.randn(parameter.shape) * (0.05 if parameter.dim() > 1 else 0.1 * parameter.abs().mean())
        for group in groups:
            group.finish()
        Path(source).mkdir(exist_ok=True)
        notes = db.notes_of(models.unet.config, models.noise_scheduler.config, str(base), subjects, 512)
        for save in db.METHODS[method].saves:
            save(Path(source), models, subjects, notes)
        (Path(source) / "dreambooth.json").write_text(json.dumps(
            {"method": method, "base_model": str(base), "subjects": [dataclasses.asdict(subject) for subject in subjects]}))
        del models, groups
    if db.main(["--export", str(target), "--model_path", source]) != 0:
        sys.exit(f"{target}: not exported")


def files_of(folder, name):
    """(LoRA or None, embedding or None) of an artifact, as exported."""
    stem, method = name.replace("-", ""), ARTIFACTS[name][0]
    if method == "pivotal":
        return folder / f"{stem}.safetensors", folder / f"{stem}-word.safetensors"
    file = folder / f"{stem}.safetensors"
    return (file if method == "lora" else None), (file if method == "textual_inversion" else None)


# ---- what each program answers: {artifact: {"answer": tensor, "missed": [what it left out], "predicts": ...}}


def latent():
    import torch

    return torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def answers_of_diffusers(folder, names):
    """Plain diffusers' answers, its token ids, and the pictures that stable-diffusion.cpp should draw."""
    import torch

    import dreambooth_implementation as db

    pipe = db.load_pipeline(str(folder / "model"), torch.float32)
    is_xl, answers = "text_encoder_2" in pipe.components, {}
    for name in sorted(names, key=lambda name: ARTIFACTS[name][0] in ("textual_inversion", "pivotal")):  # words stay, LoRAs go again
        trained = None if name == "whole" else db.find_trained(str(folder / name), "--model_path")
        if trained:
            db.add_words(pipe, trained, "--model_path")
        if trained and trained.lora:
            pipe.load_lora_weights(trained.lora.parent, weight_name=trained.lora.name)
        prompt = PROMPT.format(next(iter(trained.words), "dog") if trained else "dog")
        with torch.no_grad():
            encoded = pipe.encode_prompt(prompt, "cpu", 1, False)
            sizes = dict(text_embeds=encoded[2], time_ids=torch.tensor([[512.0, 512, 0, 0, 512, 512]])) if is_xl else None

            def unet(x, time, encoded=encoded, sizes=sizes):
                return pipe.unet(x, time, encoder_hidden_states=encoded[0], added_cond_kwargs=sizes).sample
            answers[name] = {"answer": unet(latent(), TIME), "predicts": pipe.scheduler.config.prediction_type,
                             "ids": pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids}
            if is_xl:
                answers[name]["ids_2"] = pipe.tokenizer_2(prompt, padding="max_length", return_tensors="pt").input_ids
                sizes["time_ids"] = torch.tensor([[float(PICTURE_SIDE)] * 2 + [0, 0] + [float(PICTURE_SIDE)] * 2])
            answers[name]["picture"] = picture_of_one_step(pipe, unet)
        if trained and trained.lora:
            pipe.unload_lora_weights()
    return answers


def picture_of_one_step(pipe, unet):
    """[side, side, 3] numbers from 0 to 255: all noise is taken away at once, as Euler's method does in one step."""
    import torch

    alpha = pipe.scheduler.alphas_cumprod[LAST_TIME].item()
    sigma = ((1 - alpha) / alpha) ** 0.5
    side = PICTURE_SIDE // 8
    x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(SEED)) * sigma
    said = unet(x / (sigma**2 + 1) ** 0.5, LAST_TIME)
    if pipe.scheduler.config.prediction_type == "v_prediction":
        clean = x / (sigma**2 + 1) - said * sigma / (sigma**2 + 1) ** 0.5
    else:
        clean = x - sigma * said
    picture = pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample[0]
    return ((picture + 1) / 2).clamp(0, 1).permute(1, 2, 0) * 255


class Log(logging.Handler):
    """What a program says of keys that it misses or does not know."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        text = record.getMessage()
        if any(sign in text.lower() for sign in ("missing", "unexpected", "not loaded", "unet unexpected", "does not exist", "left over")):
            self.lines.append(text)


def answers_of_comfyui(program, folder, names, reference):
    import torch

    sys.path.insert(0, str(program))
    sys.argv = ["main.py", "--cpu", "--force-fp32", "--fp32-text-enc", "--fp32-vae"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management
    import comfy.sd
    import comfy.utils

    log, answers = Log(), {}
    logging.getLogger().addHandler(log)
    model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(str(folder / "whole.safetensors"), embedding_directory=str(folder))
    for name in names:
        lora, word = files_of(folder, name)
        own_model, own_clip = model, clip
        if lora:
            own_model, own_clip = comfy.sd.load_lora_for_models(model, clip, comfy.utils.load_torch_file(str(lora)), 1.0, 1.0)
        prompt = PROMPT.format(f"embedding:{word.stem}" if word else "dog")
        with torch.no_grad():
            hidden, pooled = own_clip.encode_from_tokens(own_clip.tokenize(prompt), return_pooled=True)
            comfy.model_management.load_models_gpu([own_model], force_full_load=True)
            inner, options = own_model.model, {}
            if inner.adm_channels:
                options["y"] = inner.encode_adm(pooled_output=pooled, width=512, height=512, target_width=512, target_height=512, device="cpu")
            answer = inner.diffusion_model(latent(), timesteps=torch.tensor([float(TIME)]), context=hidden.float(), **options)
        predicts = {"EPS": "epsilon", "V_PREDICTION": "v_prediction"}.get(inner.model_type.name, inner.model_type.name)
        answers[name] = {"answer": answer, "predicts": predicts, "missed": log.lines[:]}
        log.lines.clear()
        comfy.model_management.unload_all_models()
    return answers


def answers_of_sd_scripts(program, folder, names, reference):
    """It has no code of its own for embeddings but in its scripts: words are left out. Token ids are diffusers', as it downloads its
    own tokenizers."""
    import torch

    sys.path.insert(0, str(program))
    from library import model_util, sdxl_model_util
    from networks import lora as networks

    whole, answers = str(folder / "whole.safetensors"), {}
    is_xl, is_2 = "ids_2" in reference["whole"], folder.name.startswith("sd21")
    for name in names:
        lora, word = files_of(folder, name)
        if word:
            continue
        if is_xl:
            one, two, vae, unet, _, _ = sdxl_model_util.load_models_from_sdxl_checkpoint(
                sdxl_model_util.MODEL_VERSION_SDXL_BASE_V1_0, whole, "cpu", torch.float32)
        else:
            one, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(is_2, whole, dtype=torch.float32)
            two = None
        encoders, missed = [encoder.float().eval() for encoder in (one, two) if encoder is not None], []
        unet.float().eval()
        if lora:
            network, weights = networks.create_network_from_weights(
                1.0, str(lora), vae, encoders if is_xl else encoders[0], unet, for_inference=True)
            network.apply_to(encoders if is_xl else encoders[0], unet, True, True)
            info = network.load_state_dict(weights, strict=False)
            missed = [*info.missing_keys, *info.unexpected_keys]
        ids = [reference[name][key] for key in ("ids", "ids_2")[:len(encoders)]]
        with torch.no_grad():
            if is_xl:
                hidden = [encoder(tokens, output_hidden_states=True) for encoder, tokens in zip(encoders, ids)]
                context = torch.cat([hidden[0].hidden_states[11], hidden[1].hidden_states[-2]], dim=2)
                from library.sdxl_train_util import get_size_embeddings

                size = torch.tensor([[512, 512]])
                y = torch.cat([hidden[1].text_embeds, get_size_embeddings(size, torch.zeros_like(size), size, "cpu")], dim=1)
                answer = unet(latent(), torch.tensor([TIME]), context, y)
            else:
                answer = unet(latent(), torch.tensor([TIME]), encoders[0](ids[0])[0]).sample
        answers[name] = {"answer": answer, "missed": missed}
        del unet, encoders
    return answers


def answers_of_sd_cpp(program, folder, names, reference):
    """Pictures. It has a folder of embeddings, but cyllama gives no access to it: words are left out."""
    import torch
    from cyllama import sd

    said, answers = [], {}
    sd.set_log_callback(lambda level, text: said.append(text) if any(
        sign in text.lower() for sign in ("unknown tensor", "not in model file", "unused lora", "missing", "applied")) else None)
    for name in names:
        lora, word = files_of(folder, name)
        if word:
            continue
        params = sd.SDContextParams(model_path=str(folder / "whole.safetensors"), n_threads=1, wtype=sd.SDType.F32)
        params.rng_type = params.sampler_rng_type = sd.RngType.CPU
        if reference["whole"]["predicts"] == "v_prediction":
            params.prediction = sd.Prediction.V
        context = sd.SDContext(params)
        options = sd.SDImageGenParams(prompt=PROMPT.format("dog"), width=PICTURE_SIDE, height=PICTURE_SIDE, seed=SEED)
        options.sample_params.sample_steps, options.sample_params.cfg_scale = 1, 1.0
        options.sample_params.sample_method, options.sample_params.scheduler = sd.SampleMethod.EULER, sd.Scheduler.DISCRETE
        if lora:
            options.set_loras([{"path": str(lora), "multiplier": 1.0}])
        picture = context.generate_with_params(options)[0]
        answers[name] = {"picture": torch.from_numpy(picture.to_numpy().copy()).float(), "missed": said[:]}
        said.clear()
        del context
    return answers


# ---- the table


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An importer of modules that can be imported and do nothing."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in STAND_INS else None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__ = [], spec
        return module

    def exec_module(self, module):
        pass


def answer(client, program, folder, names):
    """In a process of its own: write folder/CLIENT.pt."""
    import diffusers  # noqa: F401  (before the stand-ins, which would seem installed to it)
    import torch
    import transformers  # noqa: F401

    if client == "diffusers":
        sys.path.insert(0, str(REPOSITORY))
        answers = answers_of_diffusers(folder, names)
    else:
        sys.meta_path.append(StandIn())
        answers = globals()[f"answers_of_{client}"](program, folder, names, torch.load(folder / "diffusers.pt", weights_only=True))
    torch.save(answers, folder / f"{client}.pt")


def cell(theirs, ours, without):
    """What the table says of an artifact: how far a program's answer is from diffusers', and what it left out."""
    if theirs is None:
        return "-"
    if "picture" in theirs:
        far = (theirs["picture"] - ours["picture"]).abs()
        text = f"{far.mean():.1f} of 255" + (f" ({(ours['picture'] - without['picture']).abs().mean():.0f} without)" if ours is not without else "")
    else:
        text = f"{(theirs['answer'] - ours['answer']).norm() / ours['answer'].norm():.0e}"
        if ours is not without:
            text += f" ({(ours['answer'] - without['answer']).norm() / ours['answer'].norm():.2f} without)"
    if theirs.get("predicts", ours["predicts"]) != ours["predicts"]:
        text += f", **taken for {theirs['predicts']}**"
    return text + (f", {len(theirs['missed'])} missed" if theirs["missed"] else "")


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
    parser.add_argument("--artifacts", default=",".join(ARTIFACTS))
    parser.add_argument("--work", type=Path, default=Path("clients"))
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
    common = ["--work", s.work.resolve(), "--families", family, "--artifacts", ",".join(names), "--tokenizer", tokenizer.resolve(), *programs]
    steps = [] if (folder / "model" / "model_index.json").is_file() else [(sys.executable, "model", family)]
    steps += [(sys.executable, "artifact", name) for name in names]
    steps += [(pythons.get(client, sys.executable), "answers", client) for client in ("diffusers", *clients)]
    for python, step, what in steps:
        if child(python, *common, "--do", step, what) and what not in clients:
            sys.exit(f"{family}: {what} failed")
    found = {client: torch.load(folder / f"{client}.pt", weights_only=True) if (folder / f"{client}.pt").exists() else {}
             for client in ("diffusers", *clients)}
    ours = found["diffusers"]
    for name in names:
        cells = [cell(found[client].get(name), ours[name], ours["whole"]) for client in clients]
        print(f"| {family} | {name} | {' | '.join(cells)} |", flush=True)
    for client in clients:
        for name in names:
            for line in found[client].get(name, {}).get("missed", [])[:3]:
                print(f"    {client}, {name}: {line[:300]}", file=sys.stderr)


if __name__ == "__main__":
    main()
