"""The names that Stable Diffusion's own code gave its weights, for a pipeline that diffusers loaded.

One file of them is what ComfyUI, A1111, Forge and diffusers' from_single_file() read: model.diffusion_model.* is the UNet,
first_stage_model.* the VAE, cond_stage_model.* the text encoder of SD 1.x (CLIP) and 2.x (OpenCLIP), and
conditioner.embedders.0.* and .1.* are those of SDXL (CLIP, OpenCLIP).

Sources: github.com/CompVis/stable-diffusion (ldm/modules/diffusionmodules), github.com/Stability-AI/generative-models (sgm),
github.com/mlfoundations/open_clip; the opposite way is diffusers' loaders/single_file_utils.py, against which it is tested.
"""

import re

UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
UNET_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
               "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}
OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}


def renamed(name, table):
    """`name`, a module's path and "weight" or "bias", with the path looked up in `table`."""
    module, _, kind = name.rpartition(".")
    return f"{table.get(module, module)}.{kind}"


def unet_name(name, config):
    """Original name of a UNet's tensor: its blocks are one list down, the middle, and one list up."""
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnet|attention|downsampler|upsampler)s\.(\d+)\.(.+)", name)
    if not match:
        return renamed(name, UNET_ENDS)
    way, block, kind, layer, inner = match.groups()
    if kind == "resnet":
        inner = renamed(inner, UNET_RESNET)
    if way == "mid":  # resnet 0, attention 0, resnet 1
        return f"middle_block.{2 * int(layer) + (kind == 'attention')}.{inner}"
    length = config["layers_per_block"] + 1  # items of a block; the last one down is its downsampler
    number = int(block) * length + (length - 1 if kind.endswith("sampler") else int(layer)) + (way == "down")
    if kind == "downsampler":
        return f"input_blocks.{number}.0.op.{inner.removeprefix('conv.')}"
    after_attention = "Attn" in config["up_block_types"][int(block)] if way == "up" else False
    slot = {"resnet": 0, "attention": 1, "upsampler": 1 + after_attention}[kind]
    return f"{'input' if way == 'down' else 'output'}_blocks.{number}.{slot}.{inner}"


def vae_name(name, config):
    """Original name of a VAE's tensor: the decoder's blocks are counted from the picture, not from the latents."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := re.fullmatch(r"(.+)\.mid_block\.(resnet|attention)s\.(\d+)\.(.+)", name):
        coder, kind, number, inner = match.groups()
        inner = renamed(inner, VAE_ATTENTION) if kind == "attention" else inner
        return f"{coder}.mid.{'attn' if kind == 'attention' else 'block'}_{int(number) + 1}.{inner}"
    if match := re.fullmatch(r"(.+)\.(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)|(\w+)samplers\.0)\.(.+)", name):
        coder, way, block, layer, sampler, inner = match.groups()
        block = int(block) if way == "down" else len(config["up_block_types"]) - 1 - int(block)
        return f"{coder}.{way}.{block}." + (f"{sampler}sample." if sampler else f"block.{layer}.") + inner
    return name


def vae_tensors(vae):
    """The VAE's tensors; its attention's linear layers [out, in] were convolutions [out, in, 1, 1]."""
    tensors = {}
    for name, tensor in vae.state_dict().items():
        is_convolution = re.search(r"\.attentions\.\d+\.to_\w+(\.0)?\.weight$", name)
        tensors[vae_name(name, vae.config)] = tensor[..., None, None] if is_convolution else tensor
    return tensors


def clip_tensors(text_encoder):
    """A text encoder's tensors as transformers names them, with the prefix "text_model." that version 5.6 dropped."""
    tensors = text_encoder.state_dict().items()
    return {name if name.startswith("text_projection") else f"text_model.{name.removeprefix('text_model.')}": tensor
            for name, tensor in tensors}


def open_clip_tensors(text_encoder):
    """A text encoder's tensors as OpenCLIP names them: query, key and value are one matrix, the projection is transposed."""
    import torch

    source = {name.removeprefix("text_model."): tensor for name, tensor in clip_tensors(text_encoder).items()}
    tensors = {}
    for name, tensor in source.items():
        if name == "text_projection.weight":
            tensors["text_projection"] = tensor.T
        elif name in OPEN_CLIP_ENDS:
            tensors[OPEN_CLIP_ENDS[name]] = tensor
        else:
            layer, inner = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name).groups()
            if match := re.fullmatch(r"self_attn\.q_proj\.(weight|bias)", inner):
                parts = [source[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                tensors[f"transformer.resblocks.{layer}.attn.in_proj_{match[1]}"] = torch.cat(parts)
            elif not re.match(r"self_attn\.[kv]_proj", inner):
                tensors[f"transformer.resblocks.{layer}.{renamed(inner, OPEN_CLIP)}"] = tensor
    return tensors


def original_checkpoint(pipeline):
    """{original name: tensor} of a whole pipeline of SD 1.x, 2.x or XL.

    SD 2.x is known by the linear layers around its UNet's attention, as ComfyUI knows it, SDXL by its second text encoder.
    The empty tensors v_pred and ztsnr are how ComfyUI tells such an SDXL model (its supported_models.py).
    """
    import torch

    unet = pipeline.unet
    parts = {"model.diffusion_model.": {unet_name(name, unet.config): tensor for name, tensor in unet.state_dict().items()},
             "first_stage_model.": vae_tensors(pipeline.vae)}
    flags = {}
    if pipeline.components.get("text_encoder_2") is not None:
        parts["conditioner.embedders.0.transformer."] = clip_tensors(pipeline.text_encoder)
        parts["conditioner.embedders.1.model."] = open_clip_tensors(pipeline.text_encoder_2)
        scheduler = pipeline.scheduler.config
        flags = {"v_pred": scheduler.prediction_type == "v_prediction", "ztsnr": scheduler.get("rescale_betas_zero_snr")}
    elif unet.config.use_linear_projection:
        parts["cond_stage_model.model."] = open_clip_tensors(pipeline.text_encoder)
    else:
        parts["cond_stage_model.transformer."] = clip_tensors(pipeline.text_encoder)
    tensors = {prefix + name: tensor.contiguous() for prefix, part in parts.items() for name, tensor in part.items()}
    return tensors | {name: torch.empty(0) for name, is_set in flags.items() if is_set}


def notes_of_noise(scheduler):
    """Notes for a checkpoint's header that tell what its model predicts, as Stability's ModelSpec and Kohya's tools write them."""
    velocity, from_noise = scheduler.config.get("prediction_type") == "v_prediction", scheduler.config.get("rescale_betas_zero_snr")
    return {"modelspec.prediction_type": "v" if velocity else "epsilon", **({"ss_zero_terminal_snr": "True"} if from_noise else {})}
