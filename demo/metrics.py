"""Make the two networks that `--evaluate` measures subjects and prompts with in this world.

    python demo/metrics.py     # -> demo/metrics/clip and demo/metrics/vit

CLIP stands in for the paper's CLIP ViT-B/32, and a self-supervised ViT for its DINO ViT-S/16: the paper's
networks know photographs, not this world. The ViT never hears a class name. It learns to tell one drawing
from another, whatever the pose and the place, and so keeps what a class-supervised network would discard.

CLIP must know a drawing by an artist it has not seen. It has more drawings of each class than the world (drawings.py),
bent and recoloured at random.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
from transformers import ViTConfig, ViTImageProcessor, ViTModel

import drawings
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


def clip_loss(pictures, rows, tokenizer, things, device):
    """CLIP's own loss, but a picture's caption may occur at several others: all of them are right.

    Two more terms are there for drawings by other artists. A picture must be nearest to its class among the bare class
    nouns, which CLIP's own loss alone learns slowly, since most other captions in a batch differ in the place already.
    And two artists' drawings of one thing, of a thousand things without a name, must be found together.
    """
    captions = [row["caption"] for row in rows]
    tokens = encode_captions(tokenizer, captions)
    tokens = tokens[:, : 1 + (tokens != tokenizer.pad_token_id).sum(1).max()]  # most of the text tower's work was padding
    nouns = encode_captions(tokenizer, [world.article(noun) for noun in world.CLASSES])[:, : tokens.shape[1]].to(device)
    number = {noun: index for index, noun in enumerate(world.CLASSES)}
    noun_of = torch.tensor([number[row["noun"]] for row in rows])
    colourless = torch.tensor([not any(word in world.COLOURS for word in caption.split()) for caption in captions])

    def loss_fn(clip, indices):
        ids, pairs = tokens[indices].to(device), things.pairs(len(indices) // 6)
        images = np.concatenate([pictures[indices.numpy()], things.pictures[pairs.numpy()]])
        free = torch.cat([colourless[indices], torch.ones(len(pairs), dtype=torch.bool)]).to(device)
        with torch.autocast(device.type, enabled=False):
            images = distorted(to_floats(images, device))
            images = torch.where(free[:, None, None, None], recoloured(images), images)
        vision = F.normalize(clip.get_image_features(images).pooler_output.float(), dim=-1)
        text = F.normalize(clip.get_text_features(torch.cat([ids, nouns])).pooler_output.float(), dim=-1)
        vision, alike = vision.split([len(ids), len(pairs)])

        logits = clip.logit_scale.exp() * vision @ text.T
        logits, noun_logits = logits.split([len(ids), len(nouns)], dim=1)
        same = (ids[:, None] == ids[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        named = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        named = named + F.cross_entropy(noun_logits, noun_of[indices].to(device))
        return named + match(alike, torch.arange(len(alike) // 2, device=device).repeat(2))

    return loss_fn


def distorted(images):
    """Images N x 3 x H x W, each turned, scaled, sheared, shifted and half the time mirrored, then bent a little.

    What another artist draws differs in proportion and outline before it differs in anything else.
    """

    def draw(low, high):
        return low + (high - low) * torch.rand(len(images), device=images.device)

    angle, zoom, shear = draw(-0.3, 0.3), draw(0.8, 1.25), draw(-0.15, 0.15)
    flip = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    across = torch.stack([flip * angle.cos(), shear - angle.sin(), draw(-0.12, 0.12)], 1)
    down = torch.stack([flip * angle.sin(), angle.cos(), draw(-0.12, 0.12)], 1)
    grid = F.affine_grid(torch.stack([across, down], 1) / zoom[:, None, None], images.shape, align_corners=False)
    bumps = 0.04 * torch.randn(len(images), 2, 5, 5, device=images.device)
    bumps = F.interpolate(bumps, images.shape[-2:], mode="bicubic").permute(0, 2, 3, 1)
    return F.grid_sample(images, grid + bumps, padding_mode="reflection", align_corners=False)


def recoloured(images):
    """Images with their red, green and blue mixed anew (half of them), blurred (a quarter) or gray (an eighth)."""
    chance = torch.rand(3, len(images), 1, 1, 1, device=images.device)
    mixture = (4 * torch.randn(len(images), 3, 3, device=images.device)).softmax(-1)
    images = torch.where(chance[0] < 0.5, torch.einsum("nij,njhw->nihw", mixture, images), images)
    images = torch.where(chance[1] < 0.25, F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), images)
    return torch.where(chance[2] < 0.125, images.mean(1, keepdim=True).expand_as(images), images)


class Things:
    """The pictures of drawings.make_things(), drawn in pairs by two artists."""

    def __init__(self):
        self.pictures, names = drawings.make_things()
        self.rows_of = {}  # icon -> artist -> rows
        for row, name in enumerate(names):
            package, icon = name.split(" ")
            self.rows_of.setdefault(icon, {}).setdefault(drawings.MANY[package], []).append(row)
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
    drawn, drawn_rows = drawings.make_drawn()
    both = np.concatenate([pictures[: world.PICTURES], drawn])  # 0.8 GB
    loss_fn = clip_loss(both, rows[: world.PICTURES] + drawn_rows, tokenizer, Things(), device)
    clip = new_clip(tokenizer)
    # In a trial of 200 steps Muon lowered the loss three times as much as AdamW.
    matrices = [weight for name, weight in clip.named_parameters() if weight.ndim == 2 and ".layers." in name]
    clip = fit("clip", clip, loss_fn, args.clip_steps, 96, 1e-3, len(both), device, matrices=matrices)
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
