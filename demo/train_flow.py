"""Make the second bundled model: a rectified flow of Z-Image's shape, trained from nothing on the same world.

    python demo/train_flow.py                  # everything still to do, then demo/model-flow
    python demo/train_flow.py --steps 40000    # train on from where the last run ended
    python demo/train_flow.py --start demo/model-flow --steps 9000   # train on without demo/work: from a saved model

It needs the pictures of world.py and the autoencoder of demo/model. What is trained is a small ZImageTransformer2DModel
together with a small Qwen3 that reads the captions, as diffusers' ZImagePipeline calls them: that is what will draw.
Interrupted, it continues as if it had not been (train.fit).
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import world
from train import IDENTIFIERS, cached_moments, fit, lift_identifiers, load_world, sample_sheet, save_half

SHIFT = 1.0  # of the sigmas when drawing
DRAWING = {"num_inference_steps": 30, "guidance_scale": 3.0, "height": world.SIZE, "width": world.SIZE}  # its 3 is the other's 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TEMPLATE = (  # Qwen3's, without tools
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

# ---- text --------------------------------------------------------------------------------------------


def new_tokenizer(captions):
    """A byte-level tokenizer of Qwen's kind that knows every word of the captions as one token, and the identifiers last."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000,  # more than it finds: it stops when each word is one token
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["user\n", "assistant\n"] * 100
    rare = [form for word in IDENTIFIERS for form in (word, f" {word}")]
    bpe.train_from_iterator([*captions, *roles, *rare], trainer)
    bpe = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        additional_special_tokens=SPECIAL[1:],
        model_max_length=512,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encode_captions(tokenizer, captions):
    """Token ids and attention mask of each caption in the chat template, as the pipeline makes them but for the length."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for caption in captions
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch.input_ids.shape[1] <= 32, "PlainAttention takes captions of one length, padded to 32, alone"
    return batch.input_ids, batch.attention_mask.bool()


def new_text_encoder(tokenizer):
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=448,
            num_hidden_layers=3,  # Z-Image reads the last layer but one: the third is never trained
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            use_cache=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


# ---- transformer -------------------------------------------------------------------------------------


def new_transformer(latent_channels, text_width):
    transformer = ZImageTransformer2DModel(
        in_channels=latent_channels,
        dim=128,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=text_width,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 128, 128],
    )
    for name, parameter in transformer.named_parameters():
        if "pad_token" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        elif "adaLN_modulation" in name or "all_final_layer" in name:  # each block begins as nothing, the output as 0
            torch.nn.init.zeros_(parameter)
    return transformer


def new_model(tokenizer, latent_channels):
    text_encoder = new_text_encoder(tokenizer)
    transformer = new_transformer(latent_channels, text_encoder.config.hidden_size)
    return torch.nn.ModuleDict({"text_encoder": text_encoder, "transformer": transformer})


def load_start(folder, tokenizer):
    """The trained parts of a saved pipeline, as new_model() gives them."""
    pipe = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    assert pipe.tokenizer.get_vocab() == tokenizer.get_vocab(), "its tokens mean other words"
    return torch.nn.ModuleDict({"text_encoder": pipe.text_encoder, "transformer": pipe.transformer})


def hidden_matrices(model):
    """What Muon trains: the matrices of the blocks, but for those that read the time."""
    blocks = {name: weight for name, weight in model.named_parameters() if ".layers." in name or "_refiner." in name}
    return [weight for name, weight in blocks.items() if weight.ndim == 2 and "adaLN" not in name]


class PlainAttention:
    """What ZSingleStreamAttnProcessor computes, for sequences of one length, in half its time for so few tokens on a CPU."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, freqs_cis=None):
        assert attention_mask is None
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (self.rotate(norm(x), freqs_cis) for norm, x in ((attn.norm_q, query), (attn.norm_k, key)))
        query, key, value = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).to(value.dtype)
        return attn.to_out[0]((weights @ value).transpose(1, 2).flatten(2))

    @staticmethod
    def rotate(x, freqs_cis):
        """Pairs of channels as complex numbers, times freqs_cis; in real numbers, which torch.compile can fuse."""
        cosine, sine = freqs_cis.real.unsqueeze(2), freqs_cis.imag.unsqueeze(2)
        first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([first * cosine - second * sine, first * sine + second * cosine], -1).flatten(-2)


def plain_attention(transformer):
    for block in transformer.modules():
        if isinstance(block, ZImageTransformerBlock):
            block.attention.set_processor(PlainAttention())


def draw_sigmas(count):
    """Logit-normal (0.2, 1.4) sigmas, one from each of `count` equally likely ranges: less chance in a batch's loss."""
    quantiles = (torch.randperm(count) + torch.rand(count)) / count
    return torch.sigmoid(0.2 + 1.4 * torch.special.ndtri(quantiles.clamp(1e-6, 1 - 1e-6)))


def flow_loss(latents, tokens, empty, device):
    """Squared error of the velocity, as ZImagePipeline calls the model; a tenth of the captions are empty."""

    def loss_fn(model, indices):
        count = len(indices)
        clean = latents[indices].to(device).float()
        noise, sigmas = torch.randn_like(clean), draw_sigmas(count).to(device)
        noisy = torch.lerp(clean, noise, sigmas.view(-1, 1, 1, 1))

        dropped = torch.rand(count, 1) < 0.1
        ids, mask = (torch.where(dropped, none, some[indices]).to(device) for none, some in zip(empty, tokens))
        hidden = model["text_encoder"](input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        captions = [states[kept] for states, kept in zip(hidden, mask)]
        # The model is told 1 - sigma and answers with the velocity from noise to picture: the pipeline turns both around.
        answers = model["transformer"](list(noisy.unsqueeze(2)), 1 - sigmas, captions, return_dict=False)[0]
        return (torch.stack(answers).squeeze(2).float() - (clean - noise)).square().mean()

    return loss_fn


# ---- main --------------------------------------------------------------------------------------------


def export(vae, tokenizer, model, folder, sheet):
    """Write the pipeline (fp16) to `folder`, replacing it whole; then what it draws, read anew, to `sheet`."""
    lift_identifiers(tokenizer, model["text_encoder"], "Ġ{}")
    vae.register_to_config(shift_factor=0.0, _name_or_path="demo/model")  # the pipeline adds its shift
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    save_half(ZImagePipeline(scheduler, vae, model["text_encoder"], tokenizer, model["transformer"]), folder)
    pipe = ZImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    sample_sheet(pipe, sheet, DRAWING)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--start", type=Path, help="a pipeline whose weights to train on")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vae", type=Path, default=world.DEMO / "model", help="a pipeline whose autoencoder to use")
    parser.add_argument("--output", type=Path, default=world.DEMO / "model-flow")
    parser.add_argument("--sheet", type=Path, default=world.DEMO / "samples_flow.png")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=shutil.which("g++") is not None,
                        help="fuse operations (by default where there is a C++ compiler): a third faster")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    pictures, rows = load_world()
    captions = [row["caption"] for row in rows[: world.PICTURES]]
    vae = AutoencoderKL.from_pretrained(args.vae, subfolder="vae", dtype=torch.float32).to(device).requires_grad_(False)
    digest = hashlib.sha256(np.concatenate([p.detach().cpu().numpy().ravel() for p in vae.parameters()]).tobytes()).hexdigest()
    path = world.WORK / f"latents-{digest[:12]}.pt"  # another autoencoder has other latents
    latents = cached_moments(vae, pictures[: world.PICTURES], device, path).chunk(2, dim=1)[0]  # the mode: as the program's

    tokenizer = new_tokenizer(captions)
    tokens = encode_captions(tokenizer, [*captions, ""])
    empty, tokens = [part[-1:] for part in tokens], [part[:-1] for part in tokens]
    torch.manual_seed(0)
    model = load_start(args.start, tokenizer) if args.start else new_model(tokenizer, latents.shape[1])
    model["text_encoder"].set_attn_implementation("eager")
    plain_attention(model["transformer"])
    if args.compile:
        model["transformer"].compile_repeated_blocks()
    loss_fn = flow_loss(latents, tokens, empty, device)
    settings = dict(matrices=hidden_matrices(model), average_decay=0.999)
    settings |= dict(seed=1_000_000) if args.start else {}  # not the same pictures and noise again
    model = fit("flow", model, loss_fn, args.steps, args.batch_size, args.lr, world.PICTURES, device, **settings)
    export(vae, tokenizer, model, args.output, args.sheet)


if __name__ == "__main__":
    main()
