"""Does ComfyUI take our LoRAs of the families that draw by flow, and draw with them what diffusers draws? For docs/formats.md:

    python benchmarks/comfyui_loras.py --comfyui FOLDER

--comfyui is a checkout of github.com/comfyanonymous/ComfyUI. First the names: of each published transformer the names and shapes
alone are made, ComfyUI recognises it by its own rules and makes its own model of it, and its own loader is given a LoRA of each
--lora_target. Counted is what it does not load, and what does not fit the weight that it is for. Then the numbers: tiny models with
random weights and a LoRA as --train leaves it, alpha 2 of rank 4; its answer to a latent, time and prompt beside plain diffusers'.
It needs einops and comfy_kitchen, what else ComfyUI imports may be absent. 10 minutes, 4 GB.
"""

import argparse
import dataclasses
import logging
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from client_programs import StandIn

REPOSITORY = Path(__file__).resolve().parent.parent
KLEIN = dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False)
# published model: (class of its pipeline, class of its transformer, what the config has otherwise than that class's defaults)
PUBLISHED = {
    "Z-Image": ("ZImagePipeline", "ZImageTransformer2DModel", {}),
    "FLUX.2 klein 4B": ("Flux2KleinPipeline", "Flux2Transformer2DModel", KLEIN),
    "FLUX.2 klein 9B": ("Flux2KleinPipeline", "Flux2Transformer2DModel", KLEIN | dict(
        num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288)),
    "FLUX.2 dev": ("Flux2Pipeline", "Flux2Transformer2DModel", {}),
    "Qwen-Image": ("QwenImagePipeline", "QwenImageTransformer2DModel", {}),
    "FLUX.1 dev": ("FluxPipeline", "FluxTransformer2DModel", dict(guidance_embeds=True)),
    "SD3 medium": ("StableDiffusion3Pipeline", "SD3Transformer2DModel", dict(
        sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)),
    "SD3.5 medium": ("StableDiffusion3Pipeline", "SD3Transformer2DModel", dict(
        sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
        qk_norm="rms_norm", dual_attention_layers=tuple(range(13)))),
    "SD3.5 large": ("StableDiffusion3Pipeline", "SD3Transformer2DModel", dict(
        sample_size=128, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192,
        qk_norm="rms_norm"))}
TARGETS = ("attention", "attention+ff", "all")
# What that table has not of FLUX.2's layers without LoRA, and of those that all blocks share.
MORE_NAMES = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin"}.items()}


def flux_sizes(config):
    return dict(depth=config.num_layers, depth_single_blocks=config.num_single_layers,
                hidden_size=config.num_attention_heads * config.attention_head_dim)


# class of the transformer: (ComfyUI's table of diffusers' names, its arguments from diffusers' config)
TABLES = {
    "ZImageTransformer2DModel": ("z_image_to_diffusers", lambda config: dict(
        n_layers=config.n_layers, dim=config.dim, n_refiner_layers=config.n_refiner_layers)),
    "Flux2Transformer2DModel": ("flux_to_diffusers", flux_sizes), "FluxTransformer2DModel": ("flux_to_diffusers", flux_sizes),
    "SD3Transformer2DModel": ("mmdit_to_diffusers", lambda config: dict(
        depth=config.num_attention_heads, num_blocks=config.num_layers))}


def theirs_of(transformer):
    """{ComfyUI's name: tensor} of a transformer's weights, by ComfyUI's own table."""
    import comfy.utils
    import torch

    kind, joint, weights = type(transformer).__name__, {}, {}
    table, sizes = TABLES.get(kind, (None, None))
    names = getattr(comfy.utils, table)(sizes(transformer.config)) | MORE_NAMES if table else {}
    for name, tensor in transformer.state_dict().items():
        to = names.get(name, name)
        if isinstance(to, str):
            weights[to] = tensor
        elif to[1] is None:
            weights[to[0]] = to[2](tensor)
        else:
            joint.setdefault(to[0], {})[to[1][1]] = tensor
    return weights | {name: torch.cat([rows[first] for first in sorted(rows)]) for name, rows in joint.items()}


class Missed(logging.Handler):
    """Counts what ComfyUI says that it did not load, or could not apply."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        text = record.getMessage()
        if "not loaded" in text or "NOT LOADED" in text or record.levelno >= logging.ERROR:
            self.lines.append(text)


# ---- names and shapes


def full_size(name, db):
    """(family, transformer, ComfyUI's model) of a published config, names and shapes alone."""
    import comfy.model_detection
    import diffusers
    import torch

    pipeline, kind, config = PUBLISHED[name]
    with torch.device("meta"):
        transformer = getattr(diffusers, kind)(**config)
        weights = theirs_of(transformer)
    model_config = comfy.model_detection.model_config_from_unet(weights, "")
    model_config.set_inference_dtype(torch.bfloat16, None)
    model = model_config.get_model(weights, "", device="meta")
    own = model.diffusion_model.state_dict()
    if wrong := [key for key, tensor in weights.items() if key not in own or own[key].shape != tensor.shape]:
        print(f"    {name}: ComfyUI's model has other weights than {wrong[:3]} ({len(wrong)})", file=sys.stderr)
    return db.family_named(pipeline), transformer, model


def loras_of(db, family, transformer, target):
    """(LoRA for other programs, LoRA as diffusers names it), names and shapes alone."""
    import torch
    from peft import get_peft_model_state_dict

    s = db.Settings("train", method="lora", rank=4, lora_alpha=2)
    with torch.device("meta"):
        db.add_lora(s, transformer, target_modules=family.lora_targets[target])
    tensors = get_peft_model_state_dict(transformer, save_embedding_layers=False)
    elsewhere = db.lora_elsewhere(family, SimpleNamespace(denoiser=transformer), "transformer", tensors, 2)
    transformer.delete_adapters(["default"])
    for module in list(transformer.modules()):  # peft leaves its wrappers
        for child, layer in list(module.named_children()):
            if hasattr(layer, "base_layer"):
                setattr(module, child, layer.base_layer)
    return elsewhere, {f"transformer.{name}": tensor for name, tensor in tensors.items()}


def taken(model, lora, missed):
    """(matrix pairs that ComfyUI loads, names that it does not, pairs that do not fit their weights)."""
    import comfy.lora
    import comfy.lora_convert

    missed.lines.clear()
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), comfy.lora.model_lora_keys_unet(model, {}))
    shapes, wrong = {name: tensor.shape for name, tensor in model.state_dict().items()}, 0
    for target, adapter in patches.items():
        name, part = (target, None) if isinstance(target, str) else target[:2]
        axis, first, count = part or (0, 0, None)
        rows = shapes[name][0] if count is None else count
        up, down = adapter.weights[:2]
        wrong += (up.shape[0], down.shape[1]) != (rows, shapes[name][1]) or axis != 0 or first + rows > shapes[name][0]
    return len(patches), len(missed.lines), wrong


def print_names(db, missed, chosen):
    print("\n| model | --lora_target | layers | loads | missed | misfits | diffusers' file |\n" + "|---" * 7 + "|", flush=True)
    for name in chosen:
        family, transformer, model = full_size(name, db)
        for target in TARGETS:
            elsewhere, diffusers = loras_of(db, family, transformer, target)
            pairs, others, wrong = taken(model, elsewhere, missed)
            theirs = taken(model, diffusers, missed)[0]
            layers = len(diffusers) // 2
            print(f"| {name} | {target} | {layers} | {pairs} of {len(elsewhere) // 3} | {others} | {wrong} | "
                  f"{theirs} of {layers} |", flush=True)


# ---- numbers


def tiny(name):
    """A tiny pipeline, and what ComfyUI's model of it has otherwise than by its rules, which know published sizes alone."""
    import diffusers
    import torch
    from tiny_families import build, fill

    pipeline = build(name)
    torch.manual_seed(0)
    if name == "z-image":  # ComfyUI knows its embedding of the time from this width on alone
        pipeline.transformer = fill(diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=1024, n_layers=2, n_refiner_layers=1, n_heads=16, n_kv_heads=16, cap_feat_dim=32,
            axes_dims=[16, 24, 24], axes_lens=[256, 32, 32]))
    if name.startswith("sd3"):  # and SD3's heads of 64 alone
        options = dict(qk_norm="rms_norm", dual_attention_layers=(0,)) if "3.5" in name else {}
        pipeline.transformer = fill(diffusers.SD3Transformer2DModel(
            sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=64, num_attention_heads=2,
            joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=32, pos_embed_max_size=32, **options))
    if name.startswith("flux2"):  # and FLUX.2's 256 waves of the time
        pipeline.transformer = fill(diffusers.Flux2Transformer2DModel.from_config(
            pipeline.transformer.config, timestep_guidance_channels=256))
    config = pipeline.transformer.config
    heads = config.get("num_attention_heads")
    return pipeline, {
        "z-image": lambda: dict(
            in_channels=config.in_channels, n_heads=config.n_heads, n_kv_heads=config.n_kv_heads, axes_dims=config.axes_dims,
            axes_lens=config.axes_lens, n_refiner_layers=config.n_refiner_layers, multiple_of=1, rope_theta=256.0,
            ffn_dim_multiplier=8 / 3, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32),
        "flux": lambda: dict(axes_dim=config.axes_dims_rope, num_heads=heads, out_channels=4, guidance_embed=True),
        "flux2": lambda: dict(axes_dim=config.axes_dims_rope, num_heads=heads, out_channels=16,
                              guidance_embed=config.guidance_embeds),
        "qwen-image": lambda: dict(in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
                                   joint_attention_dim=32, axes_dims_rope=config.axes_dims_rope),
        "sd3": dict}[{"flux2-klein": "flux2", "sd3.5-without-t5": "sd3"}.get(name, name)]()


COMFYUI_KINDS = {"z-image": "ZImage", "flux2-klein": "Flux2", "flux2": "Flux2", "flux": "Flux", "qwen-image": "QwenImage",
                 "sd3": "SD3", "sd3.5-without-t5": "SD3"}


def comfyui_model(name, transformer, more):
    """ComfyUI's model of a tiny transformer, with its weights."""
    import comfy.model_detection
    import comfy.supported_models
    import torch

    weights = theirs_of(transformer)
    config = (comfy.model_detection.detect_unet_config(weights, "") or {"image_model": "qwen_image"}) | more
    model_config = getattr(comfy.supported_models, COMFYUI_KINDS[name])(config)
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model(weights, "", device="cpu")
    model.diffusion_model.load_state_dict({key: tensor.clone() for key, tensor in weights.items()}, strict=True)
    return model.eval()


def comfyui_answer(name, model, noisy, levels, told):
    """The model's velocity for latents [1, C, h, w] at a level, told of one prompt."""
    hidden = told["hidden"][0][None] if isinstance(told["hidden"], list) else told["hidden"]
    call = model.diffusion_model
    if name == "z-image":
        return call(noisy, levels, hidden, num_tokens=hidden.shape[1])
    if name == "qwen-image":
        return call(noisy.unsqueeze(2), levels, hidden).squeeze(2)
    if name.startswith("sd3"):
        return call(noisy, 1000 * levels, hidden, y=told["pooled"])
    options = {"y": told["pooled"]} if "pooled" in told else {}
    return call(noisy, levels, hidden, guidance=levels * 0 + 1, **options)


def lora_folder(db, base, folder, target):
    """What --train would leave of a LoRA with weights by chance."""
    import torch

    models = db.load_models(str(base), torch.float32)
    s = db.Settings("train", method="lora", rank=4, lora_alpha=2)
    group = db.denoiser_lora(s, models, [], dataclasses.replace(models.family.recipes["lora"], lora_target=target))
    torch.manual_seed(1)
    for parameter in group.parameters:
        parameter.data = torch.randn(parameter.shape) * 0.3
    db.save_lora(folder, models, [], {})


def print_numbers(db, missed, chosen):
    print("\n| tiny model | --lora_target | without LoRA | with it | the LoRA changes | missed |\n" + "|---" * 6 + "|", flush=True)
    for name in chosen:
        for target in TARGETS:
            far, changed, count = numbers_of(db, missed, name, target)
            print(f"| {name} | {target} | {far[0]:.0e} | {far[1]:.0e} | {changed:.2f} | {count} |", flush=True)


def numbers_of(db, missed, name, target):
    """([how far ComfyUI's answer is from diffusers' without LoRA, and with], how far the LoRA changes it, keys not loaded)."""
    import comfy.model_patcher
    import comfy.sd
    import comfy.utils
    import torch

    pipeline, more = tiny(name)
    with tempfile.TemporaryDirectory() as kept, torch.no_grad():
        pipeline.save_pretrained(kept)
        folder = Path(kept) / "lora"
        folder.mkdir()
        lora_folder(db, kept, folder, target)
        models = db.take_apart(name, pipeline)
        torch.manual_seed(2)
        noisy, told = torch.randn(1, *models.family.latent_shape(pipeline, 32)), models.family.encode(models, ["a dog at night"])
        asked = noisy, torch.tensor([0.6]), told
        model, cpu = comfyui_model(name, models.denoiser, more), torch.device("cpu")
        ours, theirs = [models.family.predict(models, *asked, None)], [comfyui_answer(name, model, *asked)]
        missed.lines.clear()
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        lora = comfy.utils.load_torch_file(str(folder / db.KOHYA_FILE))
        patcher = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)[0]
        patcher.patch_model()
        pipeline.load_lora_weights(folder, weight_name=db.LORA_FILE)
        ours.append(models.family.predict(models, *asked, None))
        theirs.append(comfyui_answer(name, patcher.model, *asked))

    def distance(one, other):
        return ((one - other).norm() / one.norm()).item()
    return [distance(*pair) for pair in zip(ours, theirs)], distance(*ours), len(missed.lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--models", default=",".join(PUBLISHED), help="some of them, with commas between; none with ''")
    parser.add_argument("--tiny", default=",".join(COMFYUI_KINDS), help="the same of the tiny ones")
    s = parser.parse_args()
    if not (s.comfyui / "comfy" / "lora.py").is_file():
        sys.exit(f"--comfyui {s.comfyui}: give a checkout of ComfyUI")
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
    import diffusers  # noqa: F401  (before the stand-ins, which would seem installed to it)
    import transformers  # noqa: F401

    import dreambooth_implementation as db

    sys.meta_path.append(StandIn())
    sys.path.insert(0, str(s.comfyui))
    sys.argv = ["main.py", "--cpu", "--force-fp32"]
    import comfy.options

    comfy.options.enable_args_parsing()
    missed = Missed()
    logging.getLogger().addHandler(missed)
    print_names(db, missed, [name for name in s.models.split(",") if name])
    print_numbers(db, missed, [name for name in s.tiny.split(",") if name])


if __name__ == "__main__":
    main()
