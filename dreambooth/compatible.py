"""Command lines of diffusers' training scripts: what each of their flags, or the script's name, is here, as one table.

Flags that mean the same under the same name are in `settings`; DIFFUSERS_FLAGS has all others of the scripts in SCRIPT_METHODS, and
OTHER_FLAGS a few of other programs.
"""

import dataclasses
from dataclasses import dataclass

_MODELS = ("sdxl", "sd3", "flux", "flux2", "flux2_klein", "z_image", "qwen_image", "sd15_advanced", "sdxl_advanced", "flux_advanced")
SCRIPT_METHODS = {**dict.fromkeys(("train_dreambooth.py", "train_dreambooth_sd3.py", "train_dreambooth_flux.py"), "full"),
                  "train_dreambooth_lora.py": "lora", **{f"train_dreambooth_lora_{model}.py": "lora" for model in _MODELS},
                  **dict.fromkeys(("textual_inversion.py", "textual_inversion_sdxl.py"), "textual_inversion")}
# Flags that diffusers' LoRA scripts have: they tell the method of a command whose script is not named. The last three are also those of
# its scripts for full training of Stable Diffusion 3 and FLUX, which few can run.
LORA_SIGNS = {"rank", "lora_alpha", "lora_dropout", "use_dora", "output_kohya_format", "upcast_before_saving", "cache_latents",
              "pretrained_vae_model_name_or_path", "text_encoder_lr", "validation_epochs", "image_interpolation_mode"}
GIVEN = object()  # in the table: the very value that was given


@dataclass(frozen=True)
class Foreign:
    """What a flag of another program is here."""

    here: str  # in words, for --help and to be said when it is given
    sets: dict = dataclasses.field(default_factory=dict)  # {setting: its value, or GIVEN}
    implies: dict = dataclasses.field(default_factory=dict)  # {setting: value, or {given: value}} where it is not given itself
    beside: tuple = ()  # values of that setting that may be given as well, and give way
    takes: str | None = None  # what it is given, as --help shows it; None: nothing
    only: tuple = ()  # the values that it can have here
    off: str | None = None  # the value that asks for nothing
    otherwise: str = "leave it out"  # what to do instead of giving another
    environment: str | None = None  # the variable of the environment that it sets
    can_be_had: bool = True

    def is_refused(self, value):
        """Whether this value cannot be had; a path or hub id counts by its last part."""
        return bool(self.only) and str(value).rstrip("/").split("/")[-1].lower() not in self.only


def _same(name, **options):
    return Foreign(f"the same as --{name}", sets={name: GIVEN}, **options)


def _means(flag, setting, value, **options):
    return Foreign(f"means {flag}", sets={setting: value}, **options)


def _needless(reason, **options):
    return Foreign(f"needless: {reason}", **options)


def _refused(reason, **options):
    return Foreign(f"not to be had: {reason}", can_be_had=False, **options)


_DATASET = "give files: hf download --repo-type dataset ID --local-dir photos, --instance_data_dir photos"
_OF_DATASET = "it belongs to --dataset_name"
_IF_ONLY = "it is for DeepFloyd IF; Stable Diffusion has no use for it"
_PRODIGY = "prodigy has it on"
_TRUE = ("true", "1", "yes")
_NOUGHT, _ONE = ("0", "0.0"), ("1", "1.0", "1.")
_NO_FOURTH = "the script itself does not use it, since Qwen-Image has one text encoder"
_ALL_BLOCKS = "a LoRA stands in every block; --lora_target says in which layers of it"
DIFFUSERS_FLAGS = {
    "pretrained_model_name_or_path": _same("model_name"),
    "train_data_dir": _same("instance_data_dir"),
    "placeholder_token": _same("identifier", implies={"method": "textual_inversion"}),
    "max_train_steps": _same("steps"),
    "resume_from_checkpoint": _same("resume"),
    "initializer_concept": _same("initializer_token"),
    "num_new_tokens_per_abstraction": _same("num_vectors"),
    "train_text_encoder_ti_frac": _same("embedding_frac"),
    "token_abstraction": _same("identifier"),
    "use_8bit_adam": _means("--optimizer adamw8bit", "optimizer", "adamw8bit", beside=("adamw",)),
    "offset_noise": _means("--noise_offset 0.1", "noise_offset", 0.1),
    "train_text_encoder_ti": _means("--method pivotal", "method", "pivotal", beside=("lora",)),
    "use_aspect_ratio_buckets": _means("--aspect_ratio_buckets", "aspect_ratio_buckets", True),
    "skip_final_inference": _means("--no-samples", "samples", False),
    "weighting_scheme": Foreign("none is --timestep_sampling uniform, logit_normal is that", takes="none|logit_normal",
                                only=("none", "logit_normal"), otherwise="give one of these",
                                implies={"timestep_sampling": {"none": "uniform", "logit_normal": "logit_normal"}}),
    "final_validation_prompt": Foreign("the same as --validation_prompt, which goes before it", takes="STR",
                                       implies={"validation_prompt": GIVEN}),
    "hub_token": Foreign("the token for the hub, kept in no file", takes="TOKEN", environment="HF_TOKEN"),

    "learnable_property": Foreign('without --instance_prompt a style is captioned "a painting in the style of [identifier]"',
                                  takes="object|style", only=("object", "style"), implies={
        "method": "textual_inversion", "instance_prompt": {"style": "a painting in the style of [identifier]"}}),
    "center_crop": _needless("the middle of each photo is what trains always; photos are never cropped at random"),
    "image_interpolation_mode": _needless("photos are always scaled by Lanczos' filter", takes="NAME", only=("lanczos",)),
    "pre_compute_text_embeddings": _needless("prompts are encoded once, unless the text encoder trains"),
    "tokenizer_max_length": _needless("prompts are read up to the 77 tokens that Stable Diffusion takes", takes="77", only=("77",)),
    "pretrained_vae_model_name_or_path": _needless("the VAE works in float32, where SDXL's own does not overflow",
                                                   takes="sdxl-vae-fp16-fix", only=("sdxl-vae-fp16-fix",),
                                                   otherwise="save the model with that VAE and give its folder: pipe.vae = ..., "
                                                             "pipe.save_pretrained(FOLDER)"),
    "dataloader_num_workers": _needless("photos are read and encoded once, before training", takes="INT"),
    "enable_xformers_memory_efficient_attention": _needless("torch's own attention saves the same memory"),
    "set_grads_to_none": _needless("always done"),
    "allow_tf32": _needless("GPUs that have TF32 compute in bf16, which is faster still, unless --mixed_precision no"),
    "local_rank": _needless("accelerate launch tells each process its number", takes="INT"),
    "prodigy_decouple": _needless(_PRODIGY, takes="True", only=_TRUE),
    "prodigy_use_bias_correction": _needless(_PRODIGY, takes="True", only=_TRUE),
    "prodigy_safeguard_warmup": _needless(_PRODIGY, takes="True", only=_TRUE),
    "validation_scheduler": _needless("samples are drawn with the model's own scheduler", takes="NAME"),
    "report_to": _needless("losses are in losses.png and in TensorBoard's files; nothing is sent anywhere", takes="NAME"),
    "save_steps": _needless("--checkpointing_steps keeps the words on the way, --select_best the best of them", takes="INT"),
    "output_kohya_format": _needless("a LoRA is always written for Kohya's tools as well"),
    "skip_save_text_encoder": _needless("an output is always whole, so that it can be loaded as it is"),
    "cache_latents": _needless("always done"),
    "upcast_before_saving": _needless("a LoRA is trained and written in float32"),
    "max_sequence_length": _needless("prompts are read as the model's own pipeline does when it draws", takes="INT"),
    "logit_mean": _needless("the normal number of logit_normal has mean 0", takes="0", only=_NOUGHT),
    "logit_std": _needless("the normal number of logit_normal has deviation 1", takes="1", only=_ONE),
    "mode_scale": _needless("it is for --weighting_scheme mode, which is not to be had", takes="FLOAT"),
    "precondition_outputs": _needless("the loss is that of the velocity, weighing all noise the same", takes="0", only=_NOUGHT,
                                      otherwise="leave it out, or give 0"),
    "caption_dropout": _needless("no caption is ever left out", takes="0", only=_NOUGHT),
    "train_text_encoder_frac": _needless("the text encoder trains to the end", takes="1", only=_ONE),
    "train_transformer_frac": _needless("the LoRA trains to the end; the word alone is --method textual_inversion", takes="1", only=_ONE),
    "offload": _needless("text encoders and VAE make room before training, unless they train"),
    "do_fp8_training": _needless("arithmetic is bf16; --base_precision fp8 keeps the frozen transformer in fp8"),
    "remote_text_encoder": _needless("prompts are encoded here, before training; none is sent anywhere"),
    "fsdp_text_encoder": _needless("the text encoder makes room before training"),
    "enable_npu_flash_attention": _needless("torch's own attention saves the same memory"),
    "pretrained_tokenizer_4_name_or_path": _needless(_NO_FOURTH, takes="ID"),
    "pretrained_text_encoder_4_name_or_path": _needless(_NO_FOURTH, takes="ID"),

    "dataset_name": _refused(_DATASET, takes="ID"),
    "dataset_config_name": _refused(_OF_DATASET, takes="NAME"),
    "image_column": _refused(_OF_DATASET, takes="NAME"),
    "caption_column": _refused("give captions as files, dog1.txt beside dog1.jpg or metadata.jsonl", takes="NAME"),
    "tokenizer_name": _refused("the model's own tokenizer is used; put another into the folder of the model", takes="NAME"),
    "text_encoder_use_attention_mask": _refused(_IF_ONLY),
    "class_labels_conditioning": _refused(_IF_ONLY, takes="NAME"),
    "validation_images": _refused(_IF_ONLY, takes="FILE ..."),
    "do_edm_style_training": _refused("models with an EDM scheduler cannot be trained here; choose one of Stable Diffusion's"),
    "lora_layers": _refused("--lora_target attention, attention+ff or all says which layers have a LoRA", takes="NAMES"),
    "lora_blocks": _refused(_ALL_BLOCKS, takes="NUMBERS"),
    "lora_unet_blocks": _refused(_ALL_BLOCKS, takes="NAMES"),
    "use_blora": _refused(_ALL_BLOCKS),
    "clip_skip": _refused("prompts are read by the layer that the model's own config says", takes="INT"),
    "text_encoder_out_layers": _refused("prompts are read by the layers that the model's own pipeline reads", takes="INT ..."),
    "enable_t5_ti": _refused("T5 takes no new words here"),
    "bnb_quantization_config_path": _refused("--base_precision nf4 or int8 does what such a file says", takes="FILE"),
    "no_safe_serialization": _refused("weights are written as safetensors alone, which every program reads"),
}
_OFFLOADS = {"sets": {"offload_blocks": True}, "implies": {"gradient_checkpointing": True}}
OTHER_FLAGS = {  # of Kohya's scripts and others
    "blocks_to_swap": Foreign("means --offload_blocks: all blocks wait, whatever their number", takes="INT", off="0", **_OFFLOADS),
    "enable_group_offload": Foreign("means --offload_blocks", **_OFFLOADS),
}
FOREIGN_FLAGS = DIFFUSERS_FLAGS | OTHER_FLAGS


def _has_prior(s):
    return s.method != "textual_inversion" if s.with_prior_preservation is None else s.with_prior_preservation


# Flags that have an effect only beside others: what that takes, and whether it is there.
_PRIOR = ("--with_prior_preservation", _has_prior)
_SELECTION = ("--select_best", lambda s: s.mode != "train" or s.select_best)
_SAMPLES = ("--samples, --validation_steps or --select_best",
            lambda s: s.samples or s.validation_steps or s.validation_epochs or s.select_best)
EFFECTIVE = {
    **dict.fromkeys(("prior", "prior_loss_weight"), _PRIOR),
    "prior_generation_precision": ("--with_prior_preservation and --prior images", lambda s: _has_prior(s) and s.prior != "frozen"),
    **dict.fromkeys(("subject_type", "prompts_file", "dino_model", "clip_model"), _SELECTION),
    "text_encoder_lr": ("--train_text_encoder", lambda s: s.train_text_encoder),
    "lr_num_cycles": ("--lr_scheduler cosine_with_restarts", lambda s: s.lr_scheduler == "cosine_with_restarts"),
    "lr_power": ("--lr_scheduler polynomial", lambda s: s.lr_scheduler == "polynomial"),
    "prodigy_beta3": ("--optimizer prodigy", lambda s: s.optimizer == "prodigy"),
    "adam_weight_decay_text_encoder": ("--train_text_encoder", lambda s: s.train_text_encoder),
    "num_train_epochs": ("no --steps", lambda s: s.steps is None),
    "repeats": ("--num_train_epochs or --validation_epochs",
                lambda s: (s.num_train_epochs and not s.steps) or (s.validation_epochs and not s.validation_steps)),
    "validation_epochs": ("no --validation_steps", lambda s: s.validation_steps is None),
    "unmasked_weight": ("masks, which --mask none rules out", lambda s: s.mask != "none"),
    "caption_model": ("--caption auto", lambda s: s.caption == "auto"),
    **dict.fromkeys(("mask_model", "mask_dir"), ("--mask auto", lambda s: s.mask == "auto")),
    "hub_model_id": ("--push_to_hub", lambda s: s.push_to_hub),
    **dict.fromkeys(("validation_prompt", "num_validation_images"), _SAMPLES),
}
