"""Tiny pipelines with random weights of the families that learnt rectified flow."""

import functools
from pathlib import Path

import numpy as np
import torch

COMMON = ("a dog on the moon", "a photo of a cat in the snow", "the red house under a tree", "user assistant system think")
RARE = ("zwx", "xqr", "qvk", "vkz", "wjq", "jxv", "fzw", "kqx")  # words of the program's list
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
            "<think>\n\n</think>\n\n{% endif %}{% endif %}")
MISTRAL_TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}[{{ message.content[0].text }}]<|im_end|>{% endfor %}")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@functools.cache
def bpe():
    """(vocabulary, merges) of a byte-level byte-pair encoding like Qwen's; rare words are its last tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=2, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([*COMMON * 50, *(f"a {word} dog" for word in RARE for _ in range(5))], trainer)
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def qwen_tokenizer(**options):
    from transformers import Qwen2Tokenizer

    vocabulary, merges = bpe()
    tokenizer = Qwen2Tokenizer(vocab=dict(vocabulary), merges=list(merges), pad_token=SPECIAL[0], eos_token=SPECIAL[2],
                               **options)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:2])})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_vae(**options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=[16, 32], down_block_types=["DownEncoderBlock2D"] * 2, sample_size=32,
                         up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=8, use_quant_conv=False,
                         use_post_quant_conv=False, **options)


def fill(module):
    """Give weights that a constructor leaves at zero, or as memory was, random values."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "pad_token" in name or not parameter.any() or not parameter.isfinite().all():
                parameter.normal_(std=0.02)
    return module


def qwen3(tokenizer, layers=3, hidden_size=32):
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(vocab_size=len(tokenizer) + 8, hidden_size=hidden_size, intermediate_size=48, num_hidden_layers=layers,
                                  num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024))


def z_image():
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32])
    return ZImagePipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
                          vae=tiny_vae(latent_channels=4, shift_factor=0.01, scaling_factor=2.7), text_encoder=qwen3(tokenizer),
                          tokenizer=tokenizer, transformer=fill(transformer))


def flux2_parts(text_channels, guidance_embeds):
    """Transformer, VAE with statistics of its own, and scheduler of FLUX.2."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    vae = AutoencoderKLFlux2(block_out_channels=[16, 32], down_block_types=["DownEncoderBlock2D"] * 2, sample_size=32, latent_channels=4,
                             up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=8)
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.03, 0.1)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, axes_dims_rope=[4, 4, 4, 4],
        joint_attention_dim=3 * text_channels, timestep_guidance_channels=32, guidance_embeds=guidance_embeds)
    return dict(vae=vae, transformer=fill(transformer),
                scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential"))


def flux2_klein():
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    text_encoder = Qwen3ForCausalLM(qwen3(tokenizer, layers=31, hidden_size=16).config)
    return Flux2KleinPipeline(text_encoder=text_encoder, tokenizer=tokenizer, **flux2_parts(16, guidance_embeds=False))


def flux2_dev():
    """With a tokenizer alone: that of pictures beside it, which needs torchvision, reads no prompt."""
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    tokenizer = qwen_tokenizer(padding_side="left")
    tokenizer.chat_template = MISTRAL_TEMPLATE
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, head_dim=8)
    config = Mistral3Config(
        text_config=dict(model_type="mistral", vocab_size=len(tokenizer) + 8, num_hidden_layers=31, num_key_value_heads=2, **sizes),
        vision_config=dict(model_type="pixtral", num_hidden_layers=1, image_size=32, patch_size=8, **sizes))
    return Flux2Pipeline(text_encoder=Mistral3ForConditionalGeneration(config), tokenizer=tokenizer,
                         **flux2_parts(16, guidance_embeds=True))


def t5_tokenizer():
    """A unigram vocabulary like T5's: pieces of words that follow a space, the frequent first; rare words are its last tokens."""
    from transformers import T5Tokenizer

    words = list(dict.fromkeys(" ".join(COMMON).split()))
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [f"\u2581{word}" for word in words] + ["\u2581", *letters, *"<>_-.,\"0123456789"]
    pieces += [f"\u2581{a}{b}" for a in letters for b in letters][:200] + [f"\u2581{word}" for word in RARE]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=special + [(piece, -3.0 - i / 100) for i, piece in enumerate(pieces)], extra_ids=0)


def t5(tokenizer, d_model=32):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=len(tokenizer) + 8, d_model=d_model, d_kv=8, d_ff=37, num_layers=2, num_heads=2))


def clip(kind, hidden_size, **options):
    """(CLIP's tokenizer, a text encoder of this class)."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(Path(__file__).resolve().parent.parent / "demo" / "model", subfolder="tokenizer")
    return tokenizer, kind(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **options))


def flux():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    tokenizer, text_encoder = clip(CLIPTextModel, 24)
    tokenizer_2 = t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=[4, 6, 6])
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
                        vae=tiny_vae(latent_channels=4, shift_factor=0.1, scaling_factor=2.7), text_encoder=text_encoder,
                        tokenizer=tokenizer, text_encoder_2=t5(tokenizer_2), tokenizer_2=tokenizer_2, transformer=fill(transformer))


def qwen_image():
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
                                 latents_mean=[0.1, -0.2, 0.3, 0], latents_std=[0.5, 0.4, 0.6, 0.7])
    with torch.no_grad():  # else what it makes of one picture and of another is nearly the same
        for name, parameter in vae.named_parameters():
            parameter *= 0 if name.endswith("bias") else 4 if name == "encoder.conv_out.weight" else 3 if name == "decoder.conv_out.weight" else 1
    text_encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer) + 8, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=2, max_position_embeddings=2048,
                         rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[0])))
    transformer = QwenImageTransformer2DModel(in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
                                              joint_attention_dim=32, axes_dims_rope=[4, 6, 6])
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
                                                shift_terminal=0.02)
    return QwenImagePipeline(scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=fill(transformer))


def stable_diffusion_3(with_t5=True, **options):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    (tokenizer, text_encoder), (tokenizer_2, text_encoder_2) = (clip(CLIPTextModelWithProjection, hidden_size=width, projection_dim=16)
                                                             for width in (32, 24))
    tokenizer_3 = t5_tokenizer() if with_t5 else None
    text_encoder_3 = t5(tokenizer_3, d_model=64) if with_t5 else None
    transformer = SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=64,
        caption_projection_dim=64, pooled_projection_dim=32, pos_embed_max_size=32, **options)
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_vae(latent_channels=4, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3, transformer=fill(transformer))


def stable_diffusion_35_without_t5():
    return stable_diffusion_3(with_t5=False, dual_attention_layers=(0,), qk_norm="rms_norm")


TINY = {"z-image": z_image, "flux2-klein": flux2_klein, "flux2": flux2_dev, "flux": flux,
        "qwen-image": qwen_image, "sd3": stable_diffusion_3, "sd3.5-without-t5": stable_diffusion_35_without_t5}


def build(family, seed=0):
    """A pipeline of this family, 32 px, whose VAE's latents of a picture are as large as noise, as those of trained ones are."""
    torch.manual_seed(seed)
    pipeline = TINY[family]()
    if type(pipeline.vae).__name__ != "AutoencoderKLQwenImage":
        calibrate(pipeline.vae)
    return pipeline


def calibrate(vae):
    """Have mean and deviation of a picture's latents be 0 and 1, by what the VAE has for that."""
    from conftest import picture
    from PIL import Image

    image = picture(5, (32, 32)).resize((4, 4)).resize((32, 32), Image.Resampling.NEAREST)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
    if hasattr(vae, "bn"):
        channels = torch.nn.functional.pixel_unshuffle(latents, 2)
        vae.bn.running_mean.copy_(channels.mean((0, 2, 3)))
        vae.bn.running_var.copy_(channels.var((0, 2, 3)))
    else:
        vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
