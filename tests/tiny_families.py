"""Tiny pipelines with random weights of the families that learnt rectified flow."""

import functools

import torch

COMMON = ("a dog on the moon", "a photo of a cat in the snow", "the red house under a tree", "user assistant system think")
RARE = ("zwx", "xqr", "qvk", "vkz", "wjq", "jxv", "fzw", "kqx")  # words of the program's list
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
            "<think>\n\n</think>\n\n{% endif %}{% endif %}")
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


def qwen_tokenizer():
    from transformers import Qwen2Tokenizer

    vocabulary, merges = bpe()
    tokenizer = Qwen2Tokenizer(vocab=dict(vocabulary), merges=list(merges), pad_token=SPECIAL[0], eos_token=SPECIAL[2])
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


def qwen3(tokenizer, layers=3):
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(vocab_size=len(tokenizer) + 8, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
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


TINY = {"z-image": z_image}


def build(family, seed=0):
    """A pipeline of this family, 32 px."""
    torch.manual_seed(seed)
    return TINY[family]()
