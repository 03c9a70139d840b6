"""Stable Diffusion's own layout, name by name."""

import pytest
import torch
from conftest import KINDS, build_pipeline, pipeline_of
from training_runs import original_checkpoint, same

import dreambooth_implementation as db


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_own_converters_give_every_tensor_back(kind):
    from diffusers.loaders import single_file_utils as diffusers_utils

    pipeline = pipeline_of(kind)
    tensors = original_checkpoint(pipeline)
    assert same(diffusers_utils.convert_ldm_unet_checkpoint(tensors, pipeline.unet.config), pipeline.unet.state_dict())
    assert same(diffusers_utils.convert_ldm_vae_checkpoint(tensors, pipeline.vae.config), pipeline.vae.state_dict())
    texts = {"text_encoder": diffusers_utils.convert_ldm_clip_checkpoint(tensors)}
    if kind == "sd2":
        texts = {"text_encoder": diffusers_utils.convert_open_clip_checkpoint(pipeline.text_encoder, tensors)}
    if kind == "sdxl":
        texts["text_encoder_2"] = diffusers_utils.convert_open_clip_checkpoint(
            pipeline.text_encoder_2, tensors, prefix="conditioner.embedders.1.model.")
    for part, converted in texts.items():
        bare = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
        own = {name.removeprefix("text_model."): tensor for name, tensor in getattr(pipeline, part).state_dict().items()}
        assert same(bare, own), part
    prefixes = {"sd1": ["cond_stage_model.transformer"], "sd2": ["cond_stage_model.model"],
                "sdxl": ["conditioner.embedders.0.transformer", "conditioner.embedders.1.model"]}
    known = ("model.diffusion_model.", "first_stage_model.", *prefixes.get(kind, prefixes["sd1"]))
    assert all(name.startswith(known) for name in tensors)


SD1_UNET = dict(cross_attention_dim=768, attention_head_dim=8)
SDXL_UNET = dict(
    block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)


@pytest.mark.parametrize("config, count, some", [
    (SD1_UNET, 686, [
        "input_blocks.3.0.op.weight", "input_blocks.11.0.in_layers.2.weight", "middle_block.2.out_layers.3.bias",
        "output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight", "output_blocks.11.0.skip_connection.weight"]),
    (SDXL_UNET, 1680, [
        "label_emb.0.0.weight", "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight",
        "output_blocks.2.2.conv.weight", "output_blocks.5.2.conv.bias", "output_blocks.8.0.emb_layers.1.weight"])])
def test_full_size_unets_have_the_published_names(config, count, some):
    """Counts and names as in the published v1-5-pruned-emaonly and sd_xl_base_1.0; no memory is taken for the weights."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    names = [db.unet_name(name, unet.config) for name in unet.state_dict()]
    assert len(set(names)) == count and set(some) <= set(names)
    back = convert_ldm_unet_checkpoint({f"model.diffusion_model.{name}": name for name in names}, unet.config)
    assert back == dict(zip(unet.state_dict(), names))


def test_full_size_vae_has_the_published_names():
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
                            up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4)
    shapes = {name: tuple(tensor.shape) for name, tensor in db.vae_tensors(vae.state_dict(), vae.config)}
    assert len(shapes) == 248
    assert shapes["encoder.mid.attn_1.q.weight"] == shapes["decoder.mid.attn_1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)  # up.0 is nearest to the picture
    assert "encoder.down.2.downsample.conv.bias" in shapes and "decoder.up.3.upsample.conv.weight" in shapes


def test_velocity_models_of_sdxl_say_so():
    pipeline = build_pipeline("sdxl")
    assert not {"v_pred", "ztsnr"} & set(original_checkpoint(pipeline))
    pipeline.scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    tensors = original_checkpoint(pipeline)
    assert tensors["v_pred"].numel() == tensors["ztsnr"].numel() == 0


def test_an_sd2_text_encoder_without_its_last_layer_gets_one_that_adds_nothing():
    from diffusers.loaders import single_file_utils as diffusers_utils
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=16, num_attention_heads=2, max_position_embeddings=5,
                 hidden_act="gelu", bos_token_id=7, eos_token_id=8, pad_token_id=0)
    ours = CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=23)).eval()
    tensors = {f"cond_stage_model.model.{name}": tensor for name, tensor in db.open_clip_h_tensors(ours.state_dict(), ours.config)}
    last = [name for name in tensors if ".resblocks.23." in name]
    assert len(last) == len([name for name in tensors if ".resblocks.22." in name]) == 12
    theirs = CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=24)).eval()
    ignored, diffusers_utils.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE = diffusers_utils.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE, []
    try:
        weights = diffusers_utils.convert_open_clip_checkpoint(theirs, tensors)
    finally:
        diffusers_utils.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE = ignored
    theirs.load_state_dict({name.removeprefix("text_model."): tensor for name, tensor in weights.items()})
    ids = torch.tensor([[7, 1, 2, 3, 8]])
    with torch.no_grad():
        assert torch.equal(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)
    assert set(last) <= set(ignored)  # what diffusers' from_single_file leaves out
