"""The networks that compare pictures with pictures and with prompts: DINO, CLIP and, where it is installed, LPIPS."""

import hashlib
import json
import os
import typing
from dataclasses import dataclass
from pathlib import Path

from dreambooth.base import HERE, UserError, default, is_first_process, say, short_path
from dreambooth.models.vision import check_network, load_network
from dreambooth.progress import progress

METRIC_MODELS = {"dino": "facebook/dino-vits16", "clip": "openai/clip-vit-base-patch32"}  # paper section 4.1: ViT-S/16, CLIP
BUNDLED_METRICS = {"dino": HERE / "demo" / "metrics" / "vit", "clip": HERE / "demo" / "metrics" / "clip"}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
EMOJI_WORDS = ("e643ecfb7275a7a74447bdeb066b6f98cadb98650bbed4a2d9688b3742efbbf8",  # sha256 of the bundled models' vocabularies
               "c474d9db5f2b7ee301fa0e316028a9aed15b16f1ddd241662fe3aac310145287")
METRIC_BATCH = 50  # pictures that a metric network sees at once


@dataclass(frozen=True)
class Metrics:
    """The networks that pictures and prompts are compared with, in float32, and what makes their input."""

    dino: typing.Any
    clip: typing.Any
    prepare_dino: typing.Any
    prepare_clip: typing.Any
    tokenizer: typing.Any

    def images(self, pictures):
        """(class tokens of DINO [N, d], image embeddings of CLIP [N, e]) of N PIL pictures: unit length, on the CPU."""
        import torch

        rows, hidden = [], not is_first_process() or len(pictures) <= METRIC_BATCH
        for start in progress(range(0, len(pictures), METRIC_BATCH), "measuring", "batch", hidden=hidden):
            dino_pixels, clip_pixels = (
                prepare(pictures[start:start + METRIC_BATCH], return_tensors="pt").pixel_values.to(self.clip.device)
                for prepare in (self.prepare_dino, self.prepare_clip))
            with torch.no_grad():  # of DINO the class token: the hub's copies have no trained pooler
                rows.append((self.dino(dino_pixels).last_hidden_state[:, 0],
                             self.clip.get_image_features(clip_pixels).pooler_output))
        return tuple(torch.nn.functional.normalize(torch.cat(part), dim=-1).cpu() for part in zip(*rows))

    def texts(self, prompts):
        """CLIP's text embeddings [P, e] of P prompts: unit length, on the CPU."""
        import torch

        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt",
                                max_length=self.clip.config.text_config.max_position_embeddings).to(self.clip.device)
        with torch.no_grad():
            return torch.nn.functional.normalize(self.clip.get_text_features(**tokens).pooler_output, dim=-1).cpu()


def metric_models(s, bases):
    """(DINO, CLIP) as folder or hub id: the flags', else those that know what the models `bases` draw.

    Raises UserError if one is something else, without importing torch.
    """
    usual = METRIC_MODELS
    if all(map(knows_only_emoji, bases)):
        usual = {part: short_path(folder) for part, folder in BUNDLED_METRICS.items()}
        if None in (s.dino_model, s.clip_model) and not all(folder.is_dir() for folder in BUNDLED_METRICS.values()):
            raise UserError(f"--dino_model, --clip_model: the networks that know this model's emoji are not beside the program, in "
                            f"{usual['dino']} and {usual['clip']}; bring the folder demo from its repository, or give others")
    names = default(s.dino_model, usual["dino"]), default(s.clip_model, usual["clip"])
    for flag, name, kind in zip(("--dino_model", "--clip_model"), names, ("vit", "clip")):
        check_network(flag, name, kind)
    return names


def knows_only_emoji(base):
    """Whether a model's words are those of a bundled model, which has seen no photograph: it needs metrics of its own."""
    try:
        path = Path(base) / "tokenizer" / "tokenizer.json"
        words = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):  # a hub id, or another kind of tokenizer
        return False
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest() in EMOJI_WORDS


def load_metrics(dino, clip, device):
    """The Metrics of a ViTModel and a CLIPModel, each a folder or a hub id. Says how DINO's pictures are prepared.

    Raises UserError if one cannot be loaded whole.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, ViTModel

    vit, prepare_dino = load_network("--dino_model", dino, ViTModel, AutoImageProcessor, add_pooling_layer=False)
    model, prepare_clip, tokenizer = load_network("--clip_model", clip, CLIPModel, AutoImageProcessor, AutoTokenizer)
    look = "as its own preprocessor says"
    if dict(prepare_dino.size) == {"height": 224, "width": 224} and list(prepare_dino.image_mean) == IMAGENET["image_mean"]:
        from transformers import CLIPImageProcessor  # here, where transformers no longer remarks on a missing torchvision

        # The hub's preprocessor for DINO scales to 224 x 224 outright; its authors' evaluation does this instead.
        prepare_dino = CLIPImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, **IMAGENET)
        look = "scaled to 256 pixels and cut to the middle 224, as in DINO's own evaluation"
    say(f"DINO: {dino}, pictures {look}. CLIP: {clip}.")
    return Metrics(vit.to(device), model.to(device), prepare_dino, prepare_clip, tokenizer)


def load_lpips(device):
    """LPIPS (Zhang et al., arXiv 1801.03924) as a function: two batches of pixels [N, 3, H, W] in -1 .. 1 to distances [N].

    None where the package or its weights are missing, which is said.
    """
    import torch

    try:
        from lpips import LPIPS

        # Its weights come as pickles of tensors: torch shall take nothing else from them, and run no code in them.
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
        network = LPIPS(net="alex", verbose=False).to(device).eval()
    except Exception as problem:  # not installed, or whatever fetching its weights raises
        reason = str(problem).strip().split("\n")[0][:100]
        say(f"DIV: unavailable ({reason}); it needs `pip install lpips`. DIV_DINO, by DINO instead of LPIPS, is another "
            f"measure.")
        return None
    return torch.no_grad()(lambda a, b: network(a.to(device), b.to(device)).flatten().cpu())
