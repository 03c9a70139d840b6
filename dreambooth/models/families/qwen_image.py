"""Qwen-Image (Alibaba, Apache-2.0): two streams of tokens, told by Qwen2.5-VL's last layer under a template of its own.

What is sent to the transformer, and with which sign, is as in diffusers' QwenImagePipeline.
"""

from dreambooth.base import GIB
from dreambooth.models.families.family import Family
from dreambooth.models.families.flux2 import text_channels
from dreambooth.models.recipes import Recipe

ATTENTION_OF_QWEN = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION_OF_QWEN = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD_OF_QWEN = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")


class QwenImage(Family):
    """Qwen-Image, 20 thousand million weights."""

    name = "qwen-image"
    pipelines = ("QwenImagePipeline",)
    kind = "Qwen-Image"
    guidance = class_guidance = 4.0
    room_to_draw = 4.2 * GIB
    usual_negative = " "  # without a negative prompt it would not be guided; this is what its makers draw with
    # The pictures' attention alone, as others train it; then the text's, too.
    lora_targets = {"attention": [*ATTENTION_OF_QWEN],
                    "attention+ff": [*ATTENTION_OF_QWEN, *TEXT_ATTENTION_OF_QWEN, *FEED_FORWARD_OF_QWEN],
                    "all": [*ATTENTION_OF_QWEN, *TEXT_ATTENTION_OF_QWEN, *FEED_FORWARD_OF_QWEN, "img_mod.1", "txt_mod.1"]}
    # diffusers' example trains a LoRA of 500 steps at 2e-4; the rate of full training is other trainers'. Neither was measured here.
    recipes = {"lora": Recipe(500, 2e-4), "full": Recipe(500, 1e-5)}
    base_of_distilled = "Qwen/Qwen-Image"

    def misfit(self, index, configs):
        transformer, vae, text = configs["transformer"], configs["vae"], configs["text_encoder"]
        if transformer.get("guidance_embeds") or transformer.get("use_additional_t_cond"):
            return "its transformer wants more than a prompt (a model that edits pictures or was distilled?); give Qwen/Qwen-Image"
        takes, makes = transformer.get("in_channels", 64), vae.get("z_dim", 16)
        if takes != 4 * makes:
            return f"its transformer takes {takes} channels, its VAE makes 4 x {makes}; the parts are of different models"
        takes, makes = transformer.get("joint_attention_dim", 3584), text_channels(text)
        if takes != makes:
            return (f"its transformer attends to {takes} text channels, but its text encoder makes {makes}; the parts are of different "
                    f"models")
        return ""

    def own_size(self, pipeline):
        return (pipeline.default_sample_size * pipeline.vae_scale_factor,) * 2

    def latent_shape(self, pipeline, side):
        return (pipeline.vae.config.z_dim, *[side // self.latent_scale(pipeline)] * 2)

    def moments(self, vae, pixels):
        """Of a film of one picture, and each channel by its own mean and deviation."""
        import torch

        distribution = vae.encode(pixels.unsqueeze(2)).latent_dist
        mean, deviation = (torch.tensor(numbers).view(1, -1, 1, 1).to(pixels) for numbers in (vae.config.latents_mean, vae.config.latents_std))
        return (distribution.mean.squeeze(2) - mean) / deviation, distribution.std.squeeze(2) / deviation

    def encode(self, models, prompts):
        """{"hidden": a list of P tensors [tokens, channels]}: what the template puts before the prompt is dropped."""
        device = next(models.text_encoders[0].parameters()).device
        hidden, mask = models.pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=self.prompt_tokens)
        counts = [hidden.shape[1]] * len(hidden) if mask is None else mask.sum(1).tolist()
        return {"hidden": [row[:count] for row, count in zip(hidden, counts)]}

    def predict(self, models, noisy, levels, conditioning, sizes):
        import torch

        height, width = (side // 2 for side in noisy.shape[-2:])
        hidden, mask = padded(conditioning["hidden"])
        predicted = models.denoiser(
            hidden_states=torch.nn.functional.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2), timestep=levels,
            encoder_hidden_states_mask=mask, encoder_hidden_states=hidden, img_shapes=[[(1, height, width)]] * len(noisy), return_dict=False)[0]
        return torch.nn.functional.pixel_shuffle(predicted.transpose(1, 2).unflatten(2, (height, width)), 2)

    def unread_layers(self, denoiser):
        """Of the last block those that only change its text."""
        last = f"transformer_blocks.{len(denoiser.transformer_blocks) - 1}"
        return [f"{last}.attn.to_add_out", f"{last}.txt_mlp.net.0.proj", f"{last}.txt_mlp.net.2"]

    def book_options(self, told, against):
        (hidden, mask), (other, other_mask) = padded(told["hidden"]), padded(against["hidden"])
        return {"prompt_embeds": hidden, "prompt_embeds_mask": mask, "negative_prompt_embeds": other,
                "negative_prompt_embeds_mask": other_mask}

    def call_options(self, scale, negatives):
        guides = scale > 1 and negatives
        return {"true_cfg_scale": scale} | ({"negative_prompt": negatives} if guides else {})


def padded(hidden):
    """(Embeddings [B, tokens, channels] of a list, with zeros at their ends, mask [B, tokens] or None where all are of one length)."""
    import torch

    counts = [len(row) for row in hidden]
    rows = torch.nn.utils.rnn.pad_sequence(hidden, batch_first=True)
    if len(set(counts)) == 1:
        return rows, None
    return rows, (torch.arange(rows.shape[1]) < torch.tensor(counts)[:, None]).long().to(rows.device)
