"""The paper's metrics: exact numbers on hand-made embeddings."""

import pytest
import torch
from conftest import picture
from PIL import Image
from torch.nn.functional import normalize

import dreambooth_implementation as db

E = torch.eye(4)  # four embeddings at right angles


def test_identical_pictures_score_one():
    same = E[:1].expand(3, 4)
    assert db.mean_similarity(same, same) == 1.0
    assert db.real_row(same) == (1.0, 1.0)
    scores = db.prompt_scores((same, same), (same, same), E[:1], E[1:2])
    assert scores == {"dino": 1.0, "clip_i": 1.0, "clip_t": 1.0, "clip_t_raw": 0.0, "div_dino": 0.0}


def test_similarity_is_the_mean_over_all_pairs():
    drawn = torch.stack([E[0], normalize(E[0] + E[1], dim=0)])  # cosines with E0, E1: 1, 0 and 0.707, 0.707
    assert db.mean_similarity(drawn, E[:2]) == pytest.approx((1 + 0 + 2 * 0.5**0.5) / 4, abs=1e-7)
    assert db.mean_of_pairs(drawn @ drawn.T) == pytest.approx(0.5**0.5, abs=1e-7)
    assert db.prompt_scores((drawn, E[:2]), (E[:2], E[:1]), E[1:2], E[:1]) == pytest.approx(
        {"dino": (1 + 2**0.5) / 4, "clip_i": 0.5, "clip_t": 0.5, "clip_t_raw": 0.5, "div_dino": 1 - 0.5**0.5}, abs=1e-7)


@pytest.mark.parametrize("count", [2, 4, 5])
def test_self_pairs_raise_the_real_row_by_a_known_amount(count):
    real = normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(count)), dim=-1)
    without, with_self = db.real_row(real)
    pairs = [torch.dot(real[i], real[j]).item() for i in range(count) for j in range(count) if i != j]
    assert without == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert with_self == pytest.approx(without + (1 - without) / count, abs=1e-6)


def test_one_photo_or_picture_has_no_pairs():
    assert db.real_row(E[:1]) == (None, 1.0)
    assert db.prompt_scores((E[:1], E[:1]), (E, E), E[:1], E[:1])["div_dino"] is None
    assert db.mean_distance([picture(0)], lambda a, b: a.mean()) is None


def test_means_count_every_row_once():
    assert db.mean_scores([{"dino": 0.25, "div": 0.5}, {"dino": 0.75, "div": None}]) == {"dino": 0.5, "div": None}


def test_diversity_is_the_mean_distance_of_all_pairs():
    shades = [Image.new("RGB", (8, 8), (grey,) * 3) for grey in (0, 51, 255)]  # -1, -0.6 and 1 in the network's range
    seen = []

    def distance(a, b):
        assert a.shape == (3, 3, 8, 8)
        seen.extend(zip(a[:, 0, 0, 0].tolist(), b[:, 0, 0, 0].tolist()))
        return (a - b).abs().mean(dim=(1, 2, 3))

    assert db.mean_distance(shades, distance) == pytest.approx((0.4 + 2 + 1.6) / 3, abs=1e-6)
    assert len(seen) == 3
    assert db.mean_distance(shades, None) is None


def test_harmonic_mean_wants_both():
    assert db.harmonic_mean(0.6, 0.3) == pytest.approx(0.4)
    assert db.harmonic_mean(0.9, 0.0) == db.harmonic_mean(-0.1, 0.9) == 0.0
    rows = [{"step": 2, "score": 0.5}, {"step": 4, "score": 0.5}, {"step": 6, "score": 0.4}]
    assert db.best_of(rows)["step"] == 2
