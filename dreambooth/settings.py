"""Every flag, declared once: the command line, --help and dreambooth.json are made from `Settings`.

Knows nothing of what the flags do; what depends on several of them at once is checked where it is used. Flags of other programs
are in `compatible`; the command line is read in `arguments`.
"""

import dataclasses
import typing
from dataclasses import dataclass

from dreambooth.files import given_path, given_text

DESCRIPTION = "DreamBooth: teach a text-to-image diffusion model your subject, then draw it anywhere."
MODES = {  # which commands know a flag; --help lists the flags in this order
    "all": ("train", "infer", "evaluate"), "all+export": ("train", "infer", "evaluate", "export"),
    "train+evaluate": ("train", "evaluate"), "train": ("train",),
    "train+export": ("train", "export"), "trained": ("infer", "evaluate", "export"), "infer": ("infer",),
    "infer+evaluate": ("infer", "evaluate"), "evaluate": ("evaluate",)}
SAMPLE_PHOTOS = "./instance_images"
DEFAULT_OUTPUT = "./output"


def _field(mode, default, help, **options):
    """One flag of the commands in `mode`: a key of MODES.

    `options`: minimum, maximum, above and below (not the number itself), choices, methods it belongs to, shown (--help's
    default), const (if given bare).
    """
    return dataclasses.field(default=default, metadata={"mode": mode, "help": help, **options})


@dataclass(frozen=True)
class Settings:
    """Every flag with its type, default and help; the command line and dreambooth.json are made from this list.

    A default of None means that the value depends on the model (its family's recipe) or the machine; it is derived where it is
    used and printed there. Settings are never changed after parsing.
    """

    mode: typing.Literal["train", "infer", "evaluate", "export"]

    # Model
    model_name: str | None = _field(
        "all", None, "model to start from: a hub id, a diffusers folder, a .safetensors checkpoint, or sd14, sd15, sd21, "
        "sdxl or demo; otherwise: where the base model of a LoRA or an embedding is now",
        shown="Stable Diffusion 1.5 on a CUDA GPU, else the small model in demo/model; otherwise: what training recorded")
    revision: str | None = _field("train", None, "branch, tag or commit of the model's repository on the hub; ID@REVISION says "
                                                 "the same", shown="main")
    variant: str | None = _field("train", None, "which of a model's weights to read, such as fp16: those named *.fp16.safetensors",
                                 shown="those without such a word")
    cache_dir: str | None = _field("all+export", None, "folder where models from the hub are kept",
                                   shown="the hub client's own, which HF_HOME moves")
    resolution: int | None = _field("train", None, "side of the square training pictures in pixels", minimum=32, maximum=8192,
                                    shown="the model's own")

    # Subject and class
    instance_data_dir: str | None = _field("train+evaluate", None, "folder with 3-5 photos of the subject",
                                           shown=f"{SAMPLE_PHOTOS}; with --evaluate: what training recorded")
    class_prompt: str | None = _field("train+evaluate", None, 'what kind of thing the subject is: "a dog"',
                                      shown="what class_prompt.txt in the photo folder says")
    identifier: str = _field("train+evaluate", "auto", "rare word that stands for the subject; auto: chosen from the "
                                                       "tokenizer, with --evaluate what training recorded")
    instance_prompt: str | None = _field("train", None, "caption of every photo; may hold [identifier]",
                                         shown='the class prompt with the identifier: "a sks dog"')
    concepts: str | None = _field("train+evaluate", None, "JSON list of several subjects to learn together, instead of the "
                                                          "flags above", shown="none")
    caption: str | None = _field("train", None, "captions of single photos: files beside them; auto: these, and where there is "
                                 "none --caption_model writes one; or none", choices=["auto", "files", "none"],
                                 shown="files, where there are any")
    caption_model: str | None = _field("train", None, "BLIP network that writes captions, a folder or hub id",
                                       shown="Salesforce/blip-image-captioning-base")
    mask: str | None = _field("train", None, "masks, white where the subject is: files beside the photos and the photos' own "
                              "transparency; auto: these, and for the others what --mask_model draws; or none",
                              choices=["auto", "files", "none"], shown="files, where there are any")
    unmasked_weight: float | None = _field("train", None, "how much what is not the subject counts, of 1, where there is a mask",
                                           minimum=0, maximum=1, shown="0.1")
    mask_model: str | None = _field("train", None, "CLIPSeg network that finds the class in a photo, a folder or hub id",
                                    shown="CIDAS/clipseg-rd64-refined")
    mask_dir: str = _field("train", "./drawn_masks", "cache of masks that the program draws")
    aspect_ratio_buckets: bool | None = _field("train", None, "train photos in shapes near their own, not in squares; a batch has one",
                                               shown="on from 512 pixels on, below that if the photos differ in shape")
    random_flip: bool = _field("train", False, "also train on mirrored photos (not for subjects with a left and a right)")

    # Prior preservation
    with_prior_preservation: bool | None = _field(
        "train", None, "train the class beside the photos (paper section 3.2)",
        shown="on; off for textual_inversion, which cannot change the class")
    prior: str | None = _field(
        "train", None, "what the class is kept by: class images, or the predictions of the frozen model for the class prompt on the "
        "photos themselves, for which nothing is drawn", choices=["images", "frozen"], shown="images")
    prior_loss_weight: float = _field("train", 1.0, "weight of the class's loss, lambda in the paper", minimum=0)
    num_class_images: int = _field("train", 200, "how many class images", minimum=1)
    class_guidance_scale: float | None = _field("train", None, "classifier-free guidance of the class images; 1: none, "
                                                "which keeps all of the class's variety", minimum=0, shown="depends on the model")
    prior_generation_precision: str | None = _field("train", None, "arithmetic of drawing class images", shown="--mixed_precision",
                                                    choices=["no", "fp32", "fp16", "bf16"])
    class_data_dir: str = _field("train", "./class_images", "cache of generated class images; images put directly "
                                                            "in it are taken as your own and used instead")

    # Method
    method: str = _field("train", "full", "what trains: every layer, a LoRA beside them, the vectors of a new word, or "
                                          "word and LoRA", choices=["full", "lora", "textual_inversion", "pivotal"])
    train_text_encoder: bool = _field("train", False, "train the text encoder(s) as well as the denoiser",
                                      methods=("full", "lora", "pivotal"))
    adapter_type: str | None = _field(
        "train", None, "what stands beside the layers: a LoRA; oft: rotations of what a layer takes, in blocks of --rank; lokr: Kronecker "
        "products of small matrices", choices=["lora", "oft", "lokr"], shown="lora", methods=("lora", "pivotal"))
    rank: int = _field("train", 16, "rank of the LoRA or LoKr, side of an OFT's blocks", minimum=1, methods=("lora", "pivotal"))
    lora_alpha: int | None = _field("train", None, "the LoRA or LoKr is scaled by alpha / rank", minimum=1, shown="the rank",
                                    methods=("lora", "pivotal"))
    lora_target: str | None = _field("train", None, "layers of the denoiser with a LoRA", methods=("lora", "pivotal"),
                                     choices=["attention", "attention+ff", "all"], shown="attention; all in small models")
    use_dora: bool = _field("train", False, "LoRA of the denoiser with trained magnitudes (DoRA)", methods=("lora", "pivotal"))
    lora_dropout: float | None = _field("train", None, "chance with which an input of the LoRA is left out of a step", minimum=0,
                                        below=1, shown="0", methods=("lora", "pivotal"))
    num_vectors: int | None = _field("train", None, "vectors of each new word", minimum=1, shown="1; 8 for textual_inversion in small "
                                     "models", methods=("textual_inversion", "pivotal"))
    embedding_norm: float | None = _field(
        "train", None, "length of a new word's vectors at first; long ones the text encoder hands on nearly as they are: they begin as "
        "what it says of their start, and their learning rate is for numbers around 1; 0: as long as the vocabulary's", minimum=0,
        shown="0; 126 for textual_inversion in small models", methods=("textual_inversion", "pivotal"))
    initializer_token: str | None = _field("train", None, "word whose vector a new word starts from",
                                           shown="the class noun; for pivotal a rare word",
                                           methods=("textual_inversion", "pivotal"))

    save_as_full_pipeline: bool | None = _field("train", None, "save the model with the new word in it, beside the word alone",
                                                shown="off", methods=("textual_inversion",))

    # Optimization
    steps: int | None = _field("train", None, "optimizer steps", minimum=1, shown="depends on the model")
    num_train_epochs: int | None = _field("train", None, "passes over the photos, or over the class images if they are more, "
                                          "instead of --steps", minimum=1, shown="--steps counts")
    repeats: int | None = _field("train", None, "how often a pass takes each photo", minimum=1,
                                 shown="1; 100 for textual_inversion")
    learning_rate: float | None = _field("train", None, "learning rate of the denoiser or its LoRA", minimum=0,
                                         shown="depends on the model", methods=("full", "lora", "pivotal"))
    text_encoder_lr: float | None = _field("train", None, "learning rate of the text encoder or its LoRA", minimum=0,
                                           shown="depends on the model", methods=("full", "lora", "pivotal"))
    embedding_lr: float | None = _field("train", None, "learning rate of new words", minimum=0, shown="depends on the model",
                                        methods=("textual_inversion", "pivotal"))
    embedding_frac: float = _field("train", 0.5, "new words stop after this fraction of the steps, the LoRA goes on",
                                   minimum=0, maximum=1, methods=("pivotal",))
    scale_lr: bool | None = _field("train", None, "multiply the learning rates by batch size, accumulated batches and processes",
                                   shown="off")
    train_batch_size: int = _field("train", 1, "photos per step and GPU; as many class images join them", minimum=1)
    gradient_accumulation_steps: int = _field("train", 1, "batches per optimizer step", minimum=1)
    lr_scheduler: str | None = _field("train", None, "learning rate schedule", choices=[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "warmup_stable_decay"],
                                      shown="constant; warmup_stable_decay, which falls to 0 in the last quarter, for --method "
                                            "full of small models without --select_best")
    lr_warmup_steps: int = _field("train", 0, "optimizer steps over which the learning rate rises", minimum=0)
    lr_num_cycles: int | None = _field("train", None, "waves of --lr_scheduler cosine_with_restarts", minimum=1, shown="1")
    lr_power: float | None = _field("train", None, "power of --lr_scheduler polynomial; 1: a straight line", minimum=0, shown="1")
    max_grad_norm: float = _field("train", 1.0, "gradients are scaled down to this norm; 0: they are not", minimum=0)
    optimizer: str | None = _field("train", None, "what turns gradients into steps; adamw8bit needs the package torchao, "
                                   "prodigy prodigyopt", shown="adamw, or as --max_vram needs",
                                   choices=["adamw", "adamw8bit", "adafactor", "prodigy"], parse=str.lower)
    adam_weight_decay: float = _field("train", 1e-2, "weight decay of any optimizer", minimum=0)
    adam_weight_decay_text_encoder: float | None = _field("train", None, "weight decay of the text encoders", minimum=0,
                                                          shown="--adam_weight_decay")
    adam_beta1: float | None = _field("train", None, "how much of the mean gradient AdamW and prodigy keep from step to step",
                                      minimum=0, below=1, shown="0.9")
    adam_beta2: float | None = _field("train", None, "how much of the mean squared gradient they keep", minimum=0, below=1,
                                      shown="0.999")
    adam_epsilon: float | None = _field("train", None, "what they add to the root of that", above=0, shown="1e-08")
    prodigy_beta3: float | None = _field("train", None, "how much of its estimate of the learning rate prodigy keeps", minimum=0,
                                         below=1, shown="the root of --adam_beta2")
    noise_offset: float | None = _field("train", None, "noise that a channel has in common, which teaches darker and lighter "
                                        "pictures; 0.1 is usual", minimum=0, shown="0")
    snr_gamma: float | None = _field("train", None, "min-SNR loss weighting; 5.0 is usual, 0: off", minimum=0,
                                    shown="off; 0.1 for textual_inversion in small models")
    timestep_sampling: str | None = _field("train", None, "how the noise of flow models is drawn, before its shift", shown="uniform",
                                           choices=["uniform", "logit_normal"])
    flow_shift: str = _field("train", "auto", "shift of that towards more noise, a number; auto: that of the model's own pictures")
    use_ema: bool | None = _field("train", None, "draw and save the running average of the weights, over about the last 100 steps",
                                  shown="on for --method full of small models with --select_best, else off")
    max_vram: str = _field("train", "auto", "GiB of memory that training may take, which decides what of the following is "
                           "on; auto: nearly all that a CUDA GPU has free, without one no limit")
    gradient_checkpointing: bool | None = _field("train", None, "recompute activations to save memory",
                                                 shown="as --max_vram needs")
    split_batch: bool | None = _field("train", None, "photos and class images one after the other within a step: half the "
                                      "activations", shown="as --max_vram needs")
    fused_backward: bool | None = _field("train", None, "step each tensor as soon as its gradient is there and free it; "
                                         "each is then scaled down by itself", shown="as --max_vram needs")
    weights: str | None = _field("train", None, "precision of the trained weights; bf16 is rounded stochastically, and needs "
                                 "--optimizer adamw8bit or --fused_backward", choices=["fp32", "bf16"], methods=("full",),
                                 shown="fp32, or as --max_vram needs")
    base_precision: str | None = _field("all", None, "precision of the frozen transformer that a LoRA stands on, or that draws: int8 and fp8 need torchao, "
                                        "nf4 needs bitsandbytes and a CUDA GPU; bf16: that of the arithmetic", methods=("lora", "pivotal"),
                                        choices=["auto", "bf16", "int8", "fp8", "nf4"], shown="as --max_vram needs")
    offload_optimizer: bool | None = _field("train", None, "keep what the optimizer remembers in the CPU's memory; needs "
                                            "--fused_backward and takes time", shown="as --max_vram needs")
    shard: bool | None = _field("train", None, "split the denoiser, its gradients and what the optimizer remembers over all "
                                "processes, block by block (FSDP2)", shown="as --max_vram needs, or accelerate's configuration says")
    offload_blocks: bool | None = _field("all", None, "keep a frozen transformer's blocks in the CPU's memory, from where each comes when it is "
                                         "its turn; in training of a LoRA, with --gradient_checkpointing", methods=("lora",),
                                         shown="as --max_vram needs")
    compile: bool = _field("train", False, "compile the denoiser's transformer blocks with torch.compile: the first steps take a "
                                           "minute longer")
    channels_last: bool = _field("train", False, "lay a UNet's weights out channels last, as tensor cores read them")

    # Output of training
    output_dir: str = _field("train", DEFAULT_OUTPUT, "folder for the trained pipeline, LoRA or embeddings")
    overwrite: bool = _field("train+export", False, "delete an earlier --output_dir once the new one is complete "
                                             "(otherwise it is kept under another name)")
    checkpointing_steps: int = _field("train", 500, "steps between checkpoints; 0: only when training is interrupted", minimum=0)
    checkpoints_total_limit: int = _field("train", 1, "checkpoints kept, the newest ones", minimum=1)
    resume: str | None = _field("train", None, "go on with an interrupted training: latest, or a checkpoint's folder",
                                const="latest", shown="start anew; latest if given bare")
    validation_prompt: list[str] | None = _field("train", None, "prompt of the samples; repeatable",
                                                 shown="subject, subject on the moon, class")
    validation_steps: int | None = _field("train", None, "steps between samples", minimum=1,
                                          shown="samples are drawn at the end only; a tenth of the steps with --select_best")
    validation_epochs: int | None = _field("train", None, "passes over the photos between samples, instead of "
                                           "--validation_steps", minimum=1, shown="--validation_steps counts")
    samples: bool = _field("train", True, "draw samples when training is over")
    num_validation_images: int | None = _field("train", None, "pictures of each sample prompt", minimum=1, shown="4")
    logging_dir: str | None = _field("train", None, "folder in --output_dir for TensorBoard's files", shown="logs")
    select_best: bool = _field("train", False, "score the samples by likeness to photos and prompt, and keep the weights of the "
                                               "best instead of the last")

    push_to_hub: bool | None = _field("train", None, "upload the finished output, without photos, to the hub", shown="off")
    hub_model_id: str | None = _field("train", None, "its repository on the hub", shown="the name of --output_dir")
    export: str | None = _field(
        "train+export", None, "also write a .safetensors file that ComfyUI, A1111 and Forge read: the whole model in Stable "
        "Diffusion's own layout, the LoRA in Kohya's, the embedding in A1111's; without --train: of what --model_path "
        "holds", shown="none")
    export_precision: str | None = _field("train+export", None, "precision of what --export writes", choices=["fp32", "fp16", "bf16"],
                                          shown="fp16 for a whole model; a LoRA or an embedding as it was trained")

    # Inference
    model_path: list[str] | None = _field("trained", None, "what was trained: a folder or hub id; with --evaluate "
                                          "repeatable, to compare", shown=DEFAULT_OUTPUT)
    prompt: list[str] | None = _field("infer", None, "what to draw; [identifier] stands for the subject, [identifier:NAME] "
                                                     "for one of several; repeatable", shown="the subject on the moon")
    lora_scale: float = _field("infer", 1.0, "strength of the LoRA in --model_path", minimum=0)
    subject_start: float = _field(
        "infer+evaluate", 0.0, "first share of the denoising steps, such as 0.5, in which the model as it was before training takes "
        "every other one, told the prompt without the subject's word: more of the prompt, and pictures that differ more",
        minimum=0, maximum=1)
    adapter: list[str] | None = _field("infer", None, "another LoRA or embedding to add, as PATH or PATH=STRENGTH: an "
                                                      "output of --train or a .safetensors file; repeatable", shown="none")
    negative_prompt: str = _field("infer", "", "what not to draw")
    num_images: int = _field("infer+evaluate", 4, "pictures per prompt, with seeds --seed, --seed + 1, ...", minimum=1)
    height: int | None = _field("infer", None, "height in pixels", minimum=8, shown="the model's own")
    width: int | None = _field("infer", None, "width in pixels", minimum=8, shown="the model's own")
    image_dir: str = _field("infer", "./images", "folder for the pictures")

    # Evaluation
    subject_type: str = _field("train+evaluate", "auto", "which of the paper's two lists of 25 prompts; auto: by the class noun, "
                               "and for the bundled model a list of its own", choices=["auto", "object", "live"])
    prompts_file: str | None = _field("train+evaluate", None, "text file with a prompt a line, such as "
                                      '"a red [identifier] [class]", to use instead', shown="none")
    dino_model: str | None = _field("train+evaluate", None, "ViT that compares pictures: a folder or hub id",
                                    shown="facebook/dino-vits16; for the bundled model demo/metrics/vit")
    clip_model: str | None = _field("train+evaluate", None, "CLIP that compares pictures, and prompts with them",
                                    shown="openai/clip-vit-base-patch32; for the bundled model demo/metrics/clip")
    eval_dir: str = _field("evaluate", "./evaluation", "folder for the pictures, the scores and the contact sheets")

    # All
    num_inference_steps: int = _field("all", 30, "denoising steps of a picture", minimum=1)
    guidance_scale: float | None = _field("all", None, "classifier-free guidance", minimum=0,
                                          shown="depends on the model")
    sample_batch_size: int | None = _field("all", None, "pictures drawn at once", minimum=1,
                                           shown="16 on a CUDA GPU, fewer once its memory is full; on a CPU 4, or 16 "
                                                 "small ones")
    mixed_precision: str = _field("all", "auto", "bf16 or fp16 arithmetic; auto: bf16 where the GPU has it, else fp16, "
                                                  "and none without a CUDA GPU", choices=["auto", "no", "fp16", "bf16"])
    seed: int = _field("all", 0, "seed of all randomness", minimum=0, maximum=2**32 - 1)


PATH_FLAGS = ("model_name", "instance_data_dir", "concepts", "class_data_dir", "output_dir", "resume", "export", "model_path",
              "adapter", "image_dir", "prompts_file", "dino_model", "clip_model", "eval_dir", "cache_dir", "logging_dir", "mask_model",
              "mask_dir", "caption_model")
CONCEPT_FLAGS = ("instance_data_dir", "class_prompt", "identifier", "instance_prompt")  # one subject's; not for --concepts


def _value_type(annotation):
    """(type, is_list) of a field: `int | None` is (int, False), `list[str] | None` is (str, True)."""
    options = [a for a in typing.get_args(annotation) if a is not type(None)]
    kind = options[0] if options and typing.get_origin(annotation) is not list else annotation
    return (typing.get_args(kind)[0], True) if typing.get_origin(kind) is list else (kind, False)


def given_value(value, name, flag="--"):
    """A flag's value with paths and texts as given_path() and given_text() have them."""
    if isinstance(value, list):
        return [given_value(part, name, flag) for part in value]
    return (given_path if name in PATH_FLAGS else given_text)(value, f"{flag}{name}") if isinstance(value, str) else value
