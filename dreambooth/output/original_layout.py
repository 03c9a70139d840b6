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


def unet_tensors(tensors, config):
    """Pairs (original name, tensor) of a UNet's tensors."""
    for name, tensor in tensors.items():
        yield unet_name(name, config), tensor


def vae_tensors(tensors, config):
    """Pairs of a VAE's tensors; its attention's linear layers [out, in] were convolutions [out, in, 1, 1]."""
    for name, tensor in tensors.items():
        is_convolution = re.search(r"\.attentions\.\d+\.to_\w+(\.0)?\.weight$", name)
        yield vae_name(name, config), tensor[..., None, None] if is_convolution else tensor


def clip_tensors(tensors, config):
    """Pairs of a text encoder's tensors as transformers names them, with the prefix "text_model." that version 5.6 dropped."""
    for name, tensor in tensors.items():
        yield name if name.startswith("text_projection") else f"text_model.{name.removeprefix('text_model.')}", tensor


def open_clip_tensors(tensors, config):
    """Pairs of a text encoder's tensors as OpenCLIP names them: query, key and value in one matrix, the projection transposed."""
    source = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    for name, tensor in source.items():
        if name == "text_projection.weight":
            yield "text_projection", tensor.T
        elif name in OPEN_CLIP_ENDS:
            yield OPEN_CLIP_ENDS[name], tensor
        else:
            yield from open_clip_layer(source, name)


def open_clip_layer(source, name):
    """The pair of a layer's tensor: that of the query has key and value as well, which then have none."""
    import torch

    layer, inner = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name).groups()
    if match := re.fullmatch(r"self_attn\.q_proj\.(weight|bias)", inner):
        parts = [source[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
        yield f"transformer.resblocks.{layer}.attn.in_proj_{match[1]}", torch.cat(parts)
    elif not re.match(r"self_attn\.[kv]_proj", inner):
        yield f"transformer.resblocks.{layer}.{renamed(inner, OPEN_CLIP)}", source[name]


def open_clip_h_tensors(tensors, config):
    """The same for SD 2.x, whose encoder had a 24th layer that nothing reads. The hub's models are without it, and ComfyUI misses
    it: one that adds nothing to what the 23rd gives takes its place."""
    import torch

    for name, tensor in open_clip_tensors(tensors, config):
        yield name, tensor
        if config.num_hidden_layers == 23 and name.startswith("transformer.resblocks.22."):
            yield name.replace(".22.", ".23."), torch.zeros_like(tensor)


# How each part of a model is called and renamed. SD 2.x is known by the linear layers around its UNet's attention, as ComfyUI knows
# it, SDXL by its second text encoder.
UNET_AND_VAE = {"unet": ("model.diffusion_model.", unet_tensors), "vae": ("first_stage_model.", vae_tensors)}
LAYOUTS = {
    "sd1": {**UNET_AND_VAE, "text_encoder": ("cond_stage_model.transformer.", clip_tensors)},
    "sd2": {**UNET_AND_VAE, "text_encoder": ("cond_stage_model.model.", open_clip_h_tensors)},
    "sdxl": {**UNET_AND_VAE, "text_encoder": ("conditioner.embedders.0.transformer.", clip_tensors),
             "text_encoder_2": ("conditioner.embedders.1.model.", open_clip_tensors)}}
# A layout's empty tensors, by which ComfyUI and Forge tell a model's noise: {name: (key, value) of a scheduler's config}.
TELLING = {"sdxl": {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}}


def layout_of(parts, unet_config):
    """Which of LAYOUTS a pipeline with parts of these names has."""
    return "sdxl" if "text_encoder_2" in parts else "sd2" if unet_config.get("use_linear_projection") else "sd1"


def original_tensors(layout, open_part, scheduler):
    """Pairs (original name, tensor) of a whole model of a layout, part by part: open_part(part) gives (its config, {name: tensor}).
    `scheduler` is a scheduler's config.
    """
    import torch

    for part, (prefix, convert) in LAYOUTS[layout].items():
        config, tensors = open_part(part)
        for name, tensor in convert(tensors, config):
            yield prefix + name, tensor
    for name, (key, value) in TELLING.get(layout, {}).items():
        if scheduler.get(key) == value:
            yield name, torch.empty(0)


def loaded_part(pipeline, part):
    """(config, {name: tensor}) of a part of a pipeline that is loaded."""
    module = getattr(pipeline, part)
    return module.config, module.state_dict()


# How A1111 and Forge are told that an SD 2.x model predicts velocity: by such a file of its name beside it, the published
# v2-inference-v.yaml (github.com/Stability-AI/stablediffusion).
VELOCITY_CONFIG = """\
model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 64
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {use_checkpoint: True, use_fp16: True, image_size: 32, in_channels: 4, out_channels: 4, model_channels: 320,
               attention_resolutions: [4, 2, 1], num_res_blocks: 2, channel_mult: [1, 2, 4, 4], num_head_channels: 64, legacy: False,
               use_spatial_transformer: True, use_linear_in_transformer: True, transformer_depth: 1, context_dim: 1024}
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig: {double_z: true, z_channels: 4, resolution: 256, in_channels: 3, out_ch: 3, ch: 128, ch_mult: [1, 2, 4, 4],
                   num_res_blocks: 2, attn_resolutions: [], dropout: 0.0}
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder
      params: {freeze: True, layer: "penultimate"}
"""
