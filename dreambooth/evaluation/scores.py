"""The paper's metrics (paper, section 4.1) as arithmetic on embeddings."""

SCORES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "clip_t_raw": "CLIP-T raw", "pres": "PRES", "div": "DIV",
          "div_dino": "DIV_DINO"}


def mean_similarity(generated, real):
    """Mean cosine of all pairs of N and M embeddings, [N, d] and [M, d] of unit length (paper section 4.1)."""
    return (generated.double() @ real.double().T).mean().item()


def mean_of_pairs(similarity):
    """Mean of a matrix [N, N] off its diagonal: over pairs of different pictures. None for a single picture."""
    n = len(similarity)
    return None if n < 2 else ((similarity.double().sum() - similarity.double().trace()) / (n * (n - 1))).item()


def real_row(real):
    """(mean cosine of different photos, the same with each photo also paired with itself) of embeddings [M, d].

    The second is the first plus (1 - first) / M. The paper does not say which of the two its "Real Images" are.
    """
    return mean_of_pairs(real @ real.T), mean_similarity(real, real)


def mean_distance(pictures, distance):
    """Mean of `distance` over all pairs of one prompt's pictures, N PIL images; None without a distance or a pair."""
    import numpy as np
    import torch

    if distance is None or len(pictures) < 2:
        return None
    pixels = torch.from_numpy(np.stack([np.array(picture) for picture in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
    first, second = torch.triu_indices(len(pixels), len(pixels), offset=1)
    return distance(pixels[first], pixels[second]).double().mean().item()


def prompt_scores(drawn, real, caption, raw_caption):
    """Scores of one prompt's pictures. `drawn` and `real` are (DINO [N, d], CLIP [N, e]), the captions are [1, e]."""
    diversity = mean_of_pairs(drawn[0] @ drawn[0].T)
    return {"dino": mean_similarity(drawn[0], real[0]), "clip_i": mean_similarity(drawn[1], real[1]),
            "clip_t": mean_similarity(drawn[1], caption), "clip_t_raw": mean_similarity(drawn[1], raw_caption),
            "div_dino": None if diversity is None else 1 - diversity}


def mean_scores(rows):
    """{score: mean over `rows`}, each row counting once; None for a score that a row lacks."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: None if None in column else sum(column) / len(column) for name, column in columns.items()}


def harmonic_mean(dino, clip_t):
    """High only if both are; 0 if one is not positive."""
    return 2 * dino * clip_t / (dino + clip_t) if min(dino, clip_t) > 0 else 0.0
