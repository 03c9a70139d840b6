"""What other programs' own code, and plain diffusers', answers with an export: for clients.py, which tells more.

Each function returns {artifact: {"answer": the UNet's, or "picture": [side, side, 3], "missed": [lines], "predicts": ...}}.
"""

import importlib.abc
import importlib.machinery
import logging
import re
import sys
from unittest.mock import MagicMock

TIME, SIDE, PROMPT = 500, 16, "a photo of a {} at night"  # the latent is SIDE x SIDE
SEED, PICTURE_SIDE, LAST_TIME = 7, 64, 999  # of stable-diffusion.cpp's picture
# artifact: the --method that makes it; the whole model has none
METHODS = {"whole": None, "lora": "lora", "lora-unet": "lora", "lora-all-layers": "lora", "dora": "lora", "lokr": "lora",
           "word": "textual_inversion", "word-of-2-vectors": "textual_inversion", "pivotal": "pivotal"}
# Imported by these programs, and needed for nothing that is done here.
STAND_INS = ("torchvision", "torchaudio", "av", "kornia", "spandrel", "comfy_aimdo", "comfy_kitchen", "torchsde", "blake3",
             "simpleeval", "scipy")


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


def files_of(folder, name):
    """(LoRA or None, embedding or None) of an artifact, as exported."""
    stem, method = name.replace("-", ""), METHODS[name]
    if method == "pivotal":
        return folder / f"{stem}.safetensors", folder / f"{stem}-word.safetensors"
    file = folder / f"{stem}.safetensors"
    return (file if method == "lora" else None), (file if method == "textual_inversion" else None)


def latent():
    import torch

    return torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def answers_of_diffusers(folder, names):
    """Plain diffusers' answers, its token ids, and the pictures that stable-diffusion.cpp should draw."""
    import peft
    import torch

    import dreambooth_implementation as db

    pipe = db.load_pipeline(str(folder / "model"), torch.float32)
    is_xl, answers = "text_encoder_2" in pipe.components, {}
    for name in sorted(names, key=lambda name: (name == "lokr", METHODS[name] in ("textual_inversion", "pivotal"))):  # these stay
        trained = None if name == "whole" else db.find_trained(str(folder / name), "--model_path")
        if trained:
            db.add_words(pipe, trained, "--model_path")
        if name == "lokr":  # which diffusers does not load; so PEFT's own code
            for file in folder.glob("lokr/*/adapter_model.safetensors"):
                peft.PeftModel.from_pretrained(getattr(pipe, file.parent.name), str(file.parent))
        elif trained and trained.lora:
            pipe.load_lora_weights(trained.lora.parent, weight_name=trained.lora.name)
        prompt = PROMPT.format(next(iter(trained.words), "dog") if trained else "dog")
        with torch.no_grad():
            encoded = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
            sizes = dict(text_embeds=encoded[2], time_ids=torch.tensor([[512.0, 512, 0, 0, 512, 512]])) if is_xl else None

            def unet(x, time, encoded=encoded, sizes=sizes):
                return pipe.unet(x, time, encoder_hidden_states=encoded[0], added_cond_kwargs=sizes).sample
            answers[name] = {"answer": unet(latent(), TIME), "predicts": pipe.scheduler.config.prediction_type,
                             "ids": pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids}
            if is_xl:
                answers[name]["ids_2"] = pipe.tokenizer_2(prompt, padding="max_length", return_tensors="pt").input_ids
                sizes["time_ids"] = torch.tensor([[float(PICTURE_SIDE)] * 2 + [0, 0] + [float(PICTURE_SIDE)] * 2])
            answers[name]["picture"] = picture_of_one_step(pipe, unet)
        if trained and trained.lora and name != "lokr":
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
        if any(sign in text.lower() for sign in ("missing", "unexpected", "not loaded", "does not exist", "left over")):
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
                size = dict(width=512, height=512, target_width=512, target_height=512)
                options["y"] = inner.encode_adm(pooled_output=pooled, device="cpu", **size)
            answer = inner.diffusion_model(latent(), timesteps=torch.tensor([float(TIME)]), context=hidden.float(), **options)
        predicts = {"EPS": "epsilon", "V_PREDICTION": "v_prediction"}.get(inner.model_type.name, inner.model_type.name)
        answers[name] = {"answer": answer, "predicts": predicts, "missed": log.lines[:]}
        log.lines.clear()
        comfy.model_management.unload_all_models()
    return answers


def answers_of_sd_scripts(program, folder, names, reference):
    """It has code for embeddings in its scripts alone: words are left out. Token ids are diffusers', as it downloads tokenizers."""
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


def is_miss(text):
    """Whether a line of stable-diffusion.cpp tells of tensors that it did not take, and not that it took all."""
    counts = re.search(r"\((\d+) / (\d+)\) LoRA tensors", text)
    return counts[1] != counts[2] if counts else "applied, taking" not in text


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
        answers[name] = {"picture": torch.from_numpy(picture.to_numpy().copy()).float(), "missed": [text for text in said if is_miss(text)]}
        said.clear()
        del context
    return answers
