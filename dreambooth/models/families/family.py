"""What a family of models answers: all that training, drawing, evaluation and the memory plan have to know of it.

They ask this object and know no names. A family is one file beside this one and a row in known.py.
"""

import re

from dreambooth.base import GIB, UserError
from dreambooth.models.noise import Flow, usual_shift

LORA_LAYER = r"(lora_A(\.\w+)?|lora_down|lora\.down)\.weight$"  # one such tensor for each layer that a LoRA changes
# Layers of the one kind of denoiser and of the other, as the names in LoRAs of all programs begin.
OF_UNETS = r"^(base_model\.model\.)?(unet\.)?(down_blocks|up_blocks|mid_block)\.|^lora_unet_(down_blocks|up_blocks|mid_block|input_blocks)"
OF_TRANSFORMERS = (r"^(base_model\.model\.)?(transformer|transformer_blocks|single_transformer_blocks|(diffusion_model\.)?(double_blocks|"
                   r"single_blocks|joint_blocks|layers|blocks))\.|^lora_(transformer|unet_(double|single|joint)_blocks)")
# A kind of Family.exports, in a message.
NOT_WRITTEN = {"model": "a whole model", "lora": "a LoRA", "dora": "a DoRA", "lokr": "a LoKr", "oft": "an OFT", "word": "a new word"}


def text_encoders_of(pipeline):
    """{part name: text encoder} of a pipeline: one, two or three."""
    parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return {part: module for part in parts if (module := pipeline.components.get(part)) is not None}


def tokenizer_of(pipeline, part):
    """The tokenizer of the text encoder of this name; of a processor of text and pictures, the one within."""
    found = pipeline.components[part.replace("text_encoder", "tokenizer")]
    return getattr(found, "tokenizer", found)


def moments_of(vae, pixels):
    """(mean, 0) of an AutoencoderKL's latents [B, C, h, w], shifted and scaled, of pixels [B, 3, H, W] in -1 to 1."""
    mean = vae.encode(pixels).latent_dist.mode()
    mean = (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    return mean, mean.new_zeros(mean.shape)


def is_positive(text):
    """Whether a text is a number above 0."""
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def made_by(s):
    """What the flags make, of Family.exports."""
    lora = "dora" if s.use_dora else s.adapter_type or "lora"
    return {"full": ["model"], "lora": [lora], "textual_inversion": ["word"], "pivotal": [lora, "word"]}[s.method]


class Family:
    """The answers of most families: a transformer that learnt rectified flow. `models` is a Models, `side` a number of pixels.

    Conditioning is {name: a tensor [P, ...], or a list of P tensors} of P prompts.
    """

    name = None  # as models' cards on the hub have it
    pipelines = ()  # classes of model_index.json
    kind = "a transformer"  # in a message
    denoiser = "transformer"  # the pipeline's part that trains
    parts = ("transformer", "vae", "text_encoder")  # that a pipeline has to have
    word_encoders = ()  # names of the text encoders that take new words, if any
    says_after_norm = False  # whether what these say of each token has come through their last normalization
    resting_text = ()  # names of those that never train beside them
    trains_text = False
    comes_late = True  # whether it may be read part by part (see late.py)
    exports = ("lora",)  # what is written for other programs, of "model", "lora", "dora" and "word"
    other_programs = "ComfyUI"
    diffusers_lora_there = "ComfyUI does not find its alpha"  # what they make of the file for diffusers
    # {(how names of layers begin, how they do in other programs): {end of a name there: ends of those here whose outputs follow one
    # another in it}}, * for a block's number. All others are called alike.
    lora_layers = {}
    lora_prefixes = {"transformer": "lora_unet_"}  # {part: what stands before its layers' names there}; after a dot their dots stay
    bf16_throughout = False  # whether the denoiser may compute in bf16 alone, but for last_layers(); else under autocast
    recipes = {}  # {method: Recipe}
    guidance = 1.0
    class_guidance = 1.0
    unguided = 1.0  # the guidance that is none, and lets negative prompts have no effect
    takes_negatives = True  # negative prompts
    usual_negative = ""  # the negative prompt where none is given; "" is none
    # Class images: (denoising steps with guidance, and without), and what shapes them beside.
    class_steps = 20, 20
    class_sampler = {"scheduler": "FlowMatchEulerDiscreteScheduler"}
    blocks = ()  # classes of what is split over processes block by block, if not those that diffusers splits by
    lora_targets = {}  # {--lora_target: how the names of layers end, or a pattern of whole names}
    room_to_draw = 2.2 * GIB  # beside the denoiser's weights, for a picture of 1024 px in bf16; mostly the autoencoder's
    side_of_its_own = 1024  # pixels, where no config says
    scheduler_has = "scale_noise"  # which tells a scheduler of this kind of model from others
    prompt_tokens = 512  # that the text encoder reads
    reads_english_alone = False  # whether it learnt from captions in English and nothing else
    base_of_distilled = None  # hub id of the model that those distilled for few steps were made of

    def fits(self, config):
        """Whether a denoiser's config, {name: value}, is of this family, given that its pipeline is."""
        return True

    def misfit(self, index, configs):
        """What does not fit between a pipeline's parts, with a remedy, as a phrase; "" if all does."""
        return ""

    def distilled(self, index, config):
        """Whether a model_index.json and the denoiser's config, each {} where it is not there yet, say that it was distilled."""
        return False

    def check_drawn(self, s):
        """UserError for flags that have no meaning where this family draws."""
        if s.negative_prompt and not self.takes_negatives:
            raise UserError(f"--negative_prompt: {self.kind} takes none; leave it out, and say in --prompt what is to be seen instead")

    def check_flags(self, s):
        """UserError for flags that have no meaning in this family."""
        if s.method not in self.recipes:
            raise UserError(f"--method {s.method}: not to be had for {self.kind}, whose text encoder takes no new words; give "
                            f"--method {' or '.join(self.recipes)}")
        if s.train_text_encoder and not self.trains_text:
            raise UserError(f"--train_text_encoder: the text encoder of {self.kind} does not train; leave it out")
        if s.channels_last:
            raise UserError(f"--channels_last: convolutions have such a layout, and the transformer of {self.kind} has none; leave it out")
        if s.snr_gamma:
            raise UserError(f"--snr_gamma {s.snr_gamma:g}: for models that learnt diffusion, and {self.kind} learnt rectified flow; leave "
                            f"it out, or give --timestep_sampling logit_normal")
        if s.export and (missing := [kind for kind in made_by(s) if kind not in self.exports]):
            raise UserError(f"--export: {NOT_WRITTEN[missing[0]]} of {self.kind} is not written for other programs; leave it out, "
                            f"or train {' or '.join(NOT_WRITTEN[kind] for kind in self.exports)}")
        if s.flow_shift != "auto" and not is_positive(s.flow_shift):
            raise UserError(f"--flow_shift {s.flow_shift}: must be auto or a number above 0")

    def check_side(self, pipeline, side, flag):
        """UserError unless a picture may have this side."""
        if side % self.multiple(pipeline):
            raise UserError(f"{flag} {side}: must be a multiple of {self.multiple(pipeline)} for {self.kind}")

    def check_trainable(self, pipeline, name, flag):
        """UserError unless a loaded pipeline is such as the loss is made for."""

    def make_ready(self, pipeline):
        """Set right what a loaded pipeline of this family has otherwise than it should be."""

    def denoiser_of(self, pipeline):
        return pipeline.components[self.denoiser]

    # ---- sizes

    def own_size(self, pipeline):
        """(width, height) in pixels that a pipeline draws by itself."""
        side = pipeline.vae.config.get("sample_size") or self.side_of_its_own
        return side, side

    def latent_scale(self, pipeline):
        """Pixels per latent, along a side."""
        return pipeline.vae_scale_factor

    def multiple(self, pipeline):
        """What the sides of a picture have to be multiples of, in pixels."""
        return 2 * self.latent_scale(pipeline)

    def latent_shape(self, pipeline, side):
        """(C, h, w) of a square's latents."""
        return (pipeline.transformer.config.in_channels, *[side // self.latent_scale(pipeline)] * 2)

    def latents_of(self, pipeline, size):
        """(C, h, w) of the latents of a picture of `size` (width, height)."""
        multiple = self.multiple(pipeline)
        channels, *least = self.latent_shape(pipeline, multiple)  # of the smallest square
        return channels, *(side // multiple * cells for side, cells in zip(reversed(size), least))

    def tokens(self, pipeline, side):
        """How many tokens the denoiser makes of a square's latents."""
        return (side // self.multiple(pipeline)) ** 2

    # ---- latents, prompts, prediction

    def noise(self, s, pipeline, side, snr_gamma=None):
        """The Flow or Diffusion to train with; min-SNR weights are diffusion's alone."""
        auto = self.usual_shift(pipeline, side)
        return Flow(auto if s.flow_shift == "auto" else float(s.flow_shift), s.timestep_sampling or "uniform")

    def usual_shift(self, pipeline, side):
        """The shift that the pipeline draws with."""
        return usual_shift(pipeline.scheduler.config, self.tokens(pipeline, side))

    def moments(self, vae, pixels):
        """(mean, deviation) [B, C, h, w] of the latents, as the denoiser takes them, of pixels [B, 3, H, W] in -1 to 1."""
        raise NotImplementedError

    def encode(self, models, prompts):
        """The conditioning of P prompts."""
        raise NotImplementedError

    def summaries(self, models, prompts):
        """Text embeddings [P, channels] that sum up P prompts: where they end, of text encoders that read from left to right."""
        import torch

        return torch.stack([hidden[-1] for hidden in self.encode(models, prompts)["hidden"]])

    def prompt_length(self, pipeline, prompt):
        """(tokens of a prompt, how many the model reads)."""
        return len(pipeline.tokenizer(prompt).input_ids), self.prompt_tokens

    def predict(self, models, noisy, levels, conditioning, sizes):
        """The denoiser's output [B, C, h, w] for noisy latents [B, C, h, w], with the sign of its target.

        `sizes` [B, 6] are the pictures' original height and width, the crop's top and left, and the target's height and width.
        """
        raise NotImplementedError

    def last_layers(self, denoiser):
        """What comes last, to stay in float32 where all else computes in bf16."""
        raise NotImplementedError

    # ---- drawing

    def call_options(self, scale, negatives):
        """What a pipeline's call is given of a guidance scale and of negative prompts, a list or None."""
        return {"guidance_scale": scale} | ({"negative_prompt": negatives} if negatives else {})

    def class_scheduler(self, scheduler):
        """The scheduler that class images are drawn with, made of the pipeline's own."""
        return scheduler

    def lora_misfit(self, pipeline, shapes):
        """Why a LoRA of tensors {name: shape} is not for this pipeline, as a phrase; "" if nothing is known against it."""
        if found := next((name for name in sorted(shapes) if re.search(OF_UNETS, name)), None):
            return f"it is for a Stable Diffusion model with a UNet ({found})"
        layers = dict(self.denoiser_of(pipeline).named_modules())
        for name, shape in sorted(shapes.items()):
            layer = layers.get(re.sub(rf"^(base_model\.model\.)?({self.denoiser}\.)?|\.{LORA_LAYER}", "", name))
            takes = getattr(layer, "in_features", None)
            if takes and re.search(LORA_LAYER, name) and shape[1] != takes:
                return f"its {name} takes {shape[1]} channels, that layer here {takes}; it is for another model of this kind"
        return ""

    def book_options(self, told, against):
        """What a pipeline's call is given instead of prompts and negative prompts: their conditioning."""
        return {"prompt_embeds": told["hidden"], "negative_prompt_embeds": against["hidden"]}

    def unread_layers(self, denoiser):
        """Names of the denoiser's layers, with weights, that nothing reads what comes of: they could not learn."""
        return []

    # ---- the text encoders, where they train

    def text_parameters(self, models):
        """The text encoders' parameters that reach the loss."""
        return [parameter for _, text_encoder in models.readers for parameter in text_encoder.parameters()]

    def text_layers(self, models, text_encoder):
        """How many of a text encoder's layers reach the denoiser: all, where its pooled embedding does."""
        return text_encoder.config.num_hidden_layers

    # ---- other programs

    def notes(self, config, scheduler):
        """{note: text or None} that a file's header says of the architecture, as ModelSpec and Kohya's tools have it, by the configs of
        denoiser and scheduler."""
        return {}

    def rows_elsewhere(self, denoiser, layer, up):
        """A matrix [outputs, rank] of a layer of this name, its outputs in the order that other programs have."""
        return up
