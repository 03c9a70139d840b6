"""Tiny pipelines with random weights of the families that learnt rectified flow."""

import functools
from pathlib import Path

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
    """A tokenizer like sentencepiece's: words with their space, most frequent first, and letters."""
    from transformers import T5Tokenizer

    words = dict.fromkeys([f"▁{word}" for text in (*COMMON, *RARE) for word in text.split()])
    letters = dict.fromkeys(["▁", *"abcdefghijklmnopqrstuvwxyz,.<>[]*-_0123456789"])
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -9.0) for letter in letters), *((word, -4.0) for word in words)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def t5(tokenizer):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=len(tokenizer) + 8, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=2))


def clip():
    """(CLIP's tokenizer, a text encoder)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(Path(__file__).resolve().parent.parent / "demo" / "model", subfolder="tokenizer")
    return tokenizer, CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def flux():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, text_encoder = clip()
    tokenizer_2 = t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=[4, 6, 6])
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
                        vae=tiny_vae(latent_channels=4, shift_factor=0.1, scaling_factor=2.7), text_encoder=text_encoder,
                        tokenizer=tokenizer, text_encoder_2=t5(tokenizer_2), tokenizer_2=tokenizer_2, transformer=fill(transformer))


TINY = {"z-image": z_image, "flux2-klein": flux2_klein, "flux2": flux2_dev, "flux": flux}


def build(family, seed=0):
    """A pipeline of this family, 32 px."""
    torch.manual_seed(seed)
    return TINY[family]()
