"""Make the two networks that `--evaluate` measures subjects and prompts with in this world.

    python demo/metrics.py     # -> demo/metrics/clip and demo/metrics/vit

CLIP stands in for the paper's CLIP ViT-B/32, and a self-supervised ViT for its DINO ViT-S/16: the paper's
networks know photographs, not this world. The ViT never hears a class name. It learns to tell one drawing
from another, whatever the pose and the place, and so keeps what a class-supervised network would discard.
"""

import argparse
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
from transformers import ViTConfig, ViTImageProcessor, ViTModel

import world
from train import encode_captions, fit, load_world, new_tokenizer, to_floats

TOWER = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
PIXELS = dict(image_size=world.SIZE, patch_size=8)
PREPARE = dict(
    size={"height": world.SIZE, "width": world.SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
)


def augmented(pictures, indices, device):
    """Pictures as floats, all shifted by up to four pixels, half of them mirrored."""
    images = F.pad(to_floats(pictures[indices.numpy()], device), [4] * 4, mode="replicate")
    images = torch.where(torch.rand(len(images), 1, 1, 1, device=device) < 0.5, images.flip(-1), images)
    x, y = torch.randint(9, (2,)).tolist()
    return images[:, :, y : y + world.SIZE, x : x + world.SIZE]


def match(vectors, labels):
    """Of all other vectors (unit length) in the batch, find those of the same label: a contrastive loss."""
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    logits = (vectors @ vectors.T / 0.1).masked_fill(itself, -1e4)
    same = ((labels[:, None] == labels[None]) & ~itself).float()
    return F.cross_entropy(logits, same / same.sum(1, keepdim=True))


# ---- CLIP --------------------------------------------------------------------------------------------


def new_clip(tokenizer):
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = TOWER | special | dict(vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length)
    config = CLIPConfig(text_config=text, vision_config=TOWER | PIXELS, projection_dim=128)
    return CLIPModel._from_config(config, attn_implementation="eager")


def clip_loss(pictures, captions, tokens, icons, device):
    """CLIP's own loss, but a picture's caption may occur at several others: all of them are right.

    The world has too few drawings of each class to know one by another artist, so the image tower also learns, from a
    thousand other things, to put two artists' drawings of one thing together. Pictures change their colours where the
    caption names none, or the class would be known by the colours of its few drawings.
    """
    colourless = torch.tensor([not any(word in world.COLOURS for word in caption.split()) for caption in captions])

    def loss_fn(clip, indices):
        ids = tokens[indices].to(device)
        pairs = icons.pairs(len(indices) // 2)
        images = augmented(pictures, indices, device)
        images = torch.where(colourless[indices].to(device)[:, None, None, None], swapped(images), images)
        images = torch.cat([images, swapped(augmented(icons.pictures, pairs, device))])
        vision = F.normalize(clip.get_image_features(images).pooler_output.float(), dim=-1)
        text = F.normalize(clip.get_text_features(ids).pooler_output.float(), dim=-1)
        vision, things = vision.split([len(ids), len(pairs)])

        logits = clip.logit_scale.exp() * vision @ text.T
        same = (ids[:, None] == ids[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        named = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        return named + match(things, torch.arange(len(things) // 2, device=device).repeat(2))

    return loss_fn


def swapped(images):
    """Half of the images with their red, green and blue in another order: what a thing is does not hang on its colour."""
    order = torch.rand(len(images), 3, device=images.device).argsort(1)[:, :, None, None].expand_as(images)
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.gather(1, order), images)


class Icons:
    """The pictures of world.make_icons(), drawn in pairs."""

    def __init__(self):
        self.pictures, names = world.make_icons()
        self.rows_of = {}  # icon -> artist -> rows
        for row, name in enumerate(names):
            package, icon = name.split(" ")
            self.rows_of.setdefault(icon, {}).setdefault(package, []).append(row)
        self.icons = sorted(self.rows_of)

    def pairs(self, count):
        """Rows of `count` different things by one artist each, then of the same things by others."""
        rows = []
        for number in torch.randperm(len(self.icons))[:count].tolist():
            artists = list(self.rows_of[self.icons[number]].values())
            first, second = torch.randperm(len(artists))[:2].tolist()
            rows.append([artists[a][int(torch.randint(len(artists[a]), ()))] for a in (first, second)])
        return torch.tensor(rows).T.flatten()


# ---- ViT ---------------------------------------------------------------------------------------------


def new_vit():
    return ViTModel._from_config(
        ViTConfig(**TOWER, **PIXELS), attn_implementation="eager", add_pooling_layer=False
    )


def features(vit, images):
    """The class token, of unit length: what the DINO metric compares."""
    return F.normalize(vit(images).last_hidden_state[:, 0].float(), dim=-1)


def vit_loss(pictures, instances, device):
    """Instance discrimination: of all other pictures in the batch, find those of the same drawing."""
    pictures_of = {}
    for index, instance in enumerate(instances):
        pictures_of.setdefault(instance, []).append(index)
    partners = [pictures_of[instance] for instance in instances]
    labels = torch.tensor([members[0] for members in partners])

    def loss_fn(vit, indices):
        draws = torch.rand(len(indices)).tolist()
        partner = [partners[i][int(draw * len(partners[i]))] for i, draw in zip(indices.tolist(), draws)]
        indices = torch.cat([indices, torch.tensor(partner)])
        return match(features(vit, augmented(pictures, indices, device)), labels[indices].to(device))

    return loss_fn


# ---- main --------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clip_steps", type=int, default=8_000)
    parser.add_argument("--vit_steps", type=int, default=8_000)
    parser.add_argument("--output", type=Path, default=world.DEMO / "metrics")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    pictures, rows = load_world()
    captions = [row["caption"] for row in rows[: world.PICTURES]]
    tokenizer = new_tokenizer(captions)
    instances = [row["drawing"] for row in rows[: world.PICTURES]]

    torch.manual_seed(0)
    loss_fn = clip_loss(pictures, captions, encode_captions(tokenizer, captions), Icons(), device)
    clip = fit("clip", new_clip(tokenizer), loss_fn, args.clip_steps, 96, 1e-3, world.PICTURES, device)
    torch.manual_seed(0)
    loss_fn = vit_loss(pictures, instances, device)
    vit = fit("vit", new_vit(), loss_fn, args.vit_steps, 64, 5e-4, world.PICTURES, device)

    shutil.rmtree(args.output, ignore_errors=True)
    clip.half().save_pretrained(args.output / "clip")
    clip_images = CLIPImageProcessor(**PREPARE, do_center_crop=False)
    CLIPProcessor(clip_images, tokenizer).save_pretrained(args.output / "clip")
    vit.half().save_pretrained(args.output / "vit")
    ViTImageProcessor(**PREPARE).save_pretrained(args.output / "vit")


if __name__ == "__main__":
    main()
