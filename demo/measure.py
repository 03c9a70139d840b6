"""Print every figure that the model card quotes, and draw its sheet of classes and scenes.

    python demo/measure.py                    # demo/model and demo/metrics -> figures, demo/sheet.png
    python demo/measure.py --model demo/model-flow --sheet demo/sheet_flow.png
    python demo/measure.py --pictures 1       # quicker: one picture of each class in each scene, not four

Who judges generated pictures: a small network that learns class and place from real pictures of the world.
Its own accuracy on unseen ones is printed too, since no figure it gives can be trusted beyond that.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ZImagePipeline
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer, ViTModel

import train
import train_flow
import world
from metrics import features
from train import encode_captions, fit, load_world, psnr, to_floats

NOUNS = list(world.CLASSES)
PLACES = [*world.SCENES, *world.BACKGROUNDS]
SHEET_NOUNS = ["dog", "cat", "robot", "backpack", "teapot", "clock", "boot", "car", "duck", "vase"]
SHEET_SCENES = list(world.SCENES)[:8]


# ---- judge -------------------------------------------------------------------------------------------


def new_judge():
    """Convolutions that end in one score for each noun, then one for each place."""
    widths = [3, 32, 64, 96, 128, 128]
    layers = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4, len(NOUNS) + len(PLACES)))


def judge_loss(pictures, nouns, places, device):
    def loss_fn(judge, indices):
        noun_scores, place_scores = judge(to_floats(pictures[indices.numpy()], device)).split(
            [len(NOUNS), len(PLACES)], dim=1
        )
        return F.cross_entropy(noun_scores.float(), nouns[indices].to(device)) + F.cross_entropy(
            place_scores.float(), places[indices].to(device)
        )

    return loss_fn


@torch.no_grad()
def accuracy(judge, images, nouns, places):
    """How often the judge names the noun, and how often the place."""
    scores = torch.cat([judge(batch) for batch in images.split(128)]).cpu()
    noun, place = (part.argmax(1) for part in scores.split([len(NOUNS), len(PLACES)], dim=1))
    return (noun == nouns).float().mean().item(), (place == places).float().mean().item()


# ---- generated pictures ------------------------------------------------------------------------------


def scene_prompts():
    """Every class in every scene."""
    return [f"{world.article(noun)} {scene}" for noun in NOUNS for scene in world.SCENES]


def generate(pipe, prompts, seed, batch_size=64):
    """One uint8 picture for each prompt, whose noise depends only on the seed and its place in the list."""
    images, settings = [], train_flow.DRAWING if isinstance(pipe, ZImagePipeline) else train.DRAWING
    for start in tqdm(range(0, len(prompts), batch_size), desc="pictures"):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        images += [np.asarray(image) for image in pipe(batch, generator=generators, **settings).images]
    return np.stack(images)


def draw_sheet(pictures, path):
    """Rows of classes, columns of scenes, from the pictures of every class in every scene."""
    grid = pictures.reshape(len(NOUNS), len(world.SCENES), *pictures.shape[1:])
    grid = grid[[NOUNS.index(noun) for noun in SHEET_NOUNS], : len(SHEET_SCENES)]
    rows = [np.concatenate(list(row), axis=1) for row in grid]
    Image.fromarray(np.concatenate(rows)).save(path)


# ---- metric networks on held-out subjects ------------------------------------------------------------


def in_every_scene(package, icon, seed):
    """A drawing, once in each scene, as uint8 pictures."""
    rng = random.Random(seed)
    drawing = world.render(package, icon)
    return np.stack([np.asarray(world.halve(world.compose(rng, drawing, scene))) for scene in world.SCENES])


def held_out_pictures():
    """[(noun, pictures of the subject, pictures of each other drawing of its class), ...]"""
    package_of = {artist: package for package, artist in reversed(world.ARTISTS.items())}
    others = world.training_drawings()
    return [
        (
            noun,
            in_every_scene(package_of[artist], icon, 2_000_000 + number),
            [in_every_scene(*other, 3_000_000 + number) for other in others[noun]],
        )
        for number, (noun, icon, artist) in enumerate(world.HELD_OUT)
    ]


@torch.no_grad()
def subject_auc(vit, subjects, device):
    """ROC-AUC of the ViT's similarity: the same drawing in two scenes, against another of its class."""
    same, different = [], []
    for _, pictures, others in subjects:
        own = features(vit, to_floats(pictures, device))
        similarity = own @ own.T
        same.append(similarity[~torch.eye(len(own), dtype=torch.bool)])
        different += [(own @ features(vit, to_floats(other, device)).T).flatten() for other in others]
    same, different = torch.cat(same).cpu(), torch.cat(different).cpu().sort().values
    return (torch.searchsorted(different, same) / len(different)).mean().item()


@torch.no_grad()
def best_captions(clip, tokenizer, pictures, device):
    """For each picture the number of CLIP's first choice among the captions of every class in every scene, as scene_prompts()."""
    text = clip.get_text_features(encode_captions(tokenizer, scene_prompts()).to(device)).pooler_output
    images = [clip.get_image_features(batch).pooler_output for batch in to_floats(pictures, device).split(128)]
    return (torch.cat(images) @ F.normalize(text, dim=-1).T).argmax(1).cpu()  # an image's vector of any length ranks alike


def caption_rank_one(clip, tokenizer, subjects, device):
    """How often CLIP puts a held-out picture's caption first among those of every class and scene."""
    hits = []
    for noun, pictures, _ in subjects:
        right = NOUNS.index(noun) * len(world.SCENES) + torch.arange(len(world.SCENES))
        hits.append(best_captions(clip, tokenizer, pictures, device) == right)
    return torch.cat(hits).float().mean().item()


# ---- main --------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=world.DEMO / "model")
    parser.add_argument("--metrics", type=Path, default=world.DEMO / "metrics")
    parser.add_argument("--sheet", type=Path, default=world.DEMO / "sheet.png")
    parser.add_argument("--pictures", type=int, default=4, help="of each class in each scene")
    parser.add_argument("--judge_steps", type=int, default=4000, help="0: without the judge; CLIP names what is drawn in any case")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {}

    pictures, rows = load_world()
    unseen = slice(world.PICTURES, None)
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    figures["vae_psnr_db"] = psnr(pipe.vae, pictures[unseen], device)

    prompts = scene_prompts()
    drawn = np.concatenate([generate(pipe, prompts, 10_000 * n) for n in range(args.pictures)])
    draw_sheet(drawn[: len(prompts)], args.sheet)
    wanted = torch.arange(len(prompts)).repeat(args.pictures)
    drawn_nouns, drawn_scenes = wanted // len(world.SCENES), wanted % len(world.SCENES)

    if args.judge_steps:
        nouns = torch.tensor([NOUNS.index(row["noun"]) for row in rows])
        places = torch.tensor([PLACES.index(row["place"]) for row in rows])
        torch.manual_seed(0)
        loss_fn = judge_loss(pictures, nouns, places, device)
        judge = fit("judge", new_judge(), loss_fn, args.judge_steps, 64, 1e-3, world.PICTURES, device)
        figures["judge_class"], figures["judge_place"] = accuracy(
            judge, to_floats(pictures[unseen], device), nouns[unseen], places[unseen]
        )
        figures["generated_class"], figures["generated_scene"] = accuracy(
            judge, to_floats(drawn, device), drawn_nouns, drawn_scenes
        )

    subjects = held_out_pictures()
    vit = ViTModel.from_pretrained(args.metrics / "vit", add_pooling_layer=False, dtype=torch.float32)
    figures["vit_auc"] = subject_auc(vit.to(device), subjects, device)
    clip = CLIPModel.from_pretrained(args.metrics / "clip", dtype=torch.float32).to(device)
    tokenizer = CLIPTokenizer.from_pretrained(args.metrics / "clip")
    named = best_captions(clip, tokenizer, drawn, device)
    figures["clip_generated_class"] = (named // len(world.SCENES) == drawn_nouns).float().mean().item()
    figures["clip_generated_scene"] = (named % len(world.SCENES) == drawn_scenes).float().mean().item()
    figures["clip_rank_one"] = caption_rank_one(clip, tokenizer, subjects, device)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
