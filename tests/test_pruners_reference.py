"""Each method against slow loops in float64, written from the papers' text and sharing no code with the package."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vlm_pruner_eval import TextTokens, VisualTokens, get_pruner
from vlm_pruner_eval.pruners.dart import largest_keys

RATE = 0.5  # not used: the tests pass `keep`
SEEDS = range(4)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def layout(kind: str) -> tuple[tuple[int, int], list[tuple[int, int, int]]]:
    """The grid, and (frame, row, col) of every token."""
    if kind == "image":
        return (6, 7), [(0, r, c) for r in range(6) for c in range(7)]
    if kind == "frames":
        return (4, 4), [(f, r, c) for f in range(3) for r in range(4) for c in range(4)]
    rows = [[(1, r, c) for c in range(5)] + [(1, -1, -1)] for r in range(6)]  # a tile with newlines, after a base image
    return (6, 5), [(0, r, c) for r in range(3) for c in range(3)] + [cell for row in rows for cell in row]


def smooth_tokens(kind: str, seed: int, width: int = 24, *, common: float = 1.0) -> dict:
    """Neighbours resemble each other and all share a mean, as in real images: several passes, some of them stalled."""
    rng = np.random.default_rng(seed)
    grid, cells = layout(kind)
    waves = rng.normal(size=(3, width)) * 1.5
    states = np.stack([np.cos(np.array([f + 1, r, c]) * 0.7) @ waves for f, r, c in cells])
    states = states + common * rng.normal(size=width) + 0.4 * rng.normal(size=states.shape)
    return {
        "grid": grid,
        "cells": cells,
        "states": states.astype(np.float32),
        "keys": rng.normal(size=(len(cells), 2, 4)).astype(np.float32),
    }


# ---- VLM-Pruner (arXiv 2512.02700)
def slow_pivots(keys: np.ndarray, count: int) -> list[int]:
    flat = keys.reshape(len(keys), -1).astype(np.float64)
    pivots = [int(np.abs(flat).sum(1).argmax())]
    while len(pivots) < count:
        gaps = [-1.0 if i in pivots else min(math.dist(flat[i], flat[p]) for p in pivots) for i in range(len(flat))]
        pivots.append(int(np.argmax(gaps)))
    return pivots


def slow_score(data: dict, features: np.ndarray, token: int, chosen: list[int], weight: float) -> float:
    frame, *cell = data["cells"][token]
    near = [math.dist(cell, data["cells"][j][1:]) for j in chosen if data["cells"][j][0] == frame and -1 not in data["cells"][j]]
    distance = min(near) if near and -1 not in cell else 0.0
    return max(cosine(features[token], features[j]) for j in chosen) * (1 + weight * distance / math.hypot(*data["grid"]))


def slow_growth(data: dict, features: np.ndarray, keep: int, p: dict, *, stop: bool = False) -> list[int]:
    chosen = slow_pivots(data["keys"], p["pivots"])[:keep]
    threshold = p["threshold"]
    while len(chosen) < keep:
        rest = [i for i in range(len(features)) if i not in chosen]
        rest.sort(key=lambda i: slow_score(data, features, i, chosen, p["spatial_weight"]))
        before = len(chosen)
        for at in range(0, len(rest), p["token_batch"]):
            block = rest[at : at + p["token_batch"]]
            scores = [slow_score(data, features, i, chosen, p["spatial_weight"]) for i in block]
            joins = [i for i, score in zip(block, scores, strict=True) if score < threshold]
            if len(chosen) + len(joins) > keep:
                joins = [block[i] for i in np.argsort(scores, kind="stable")[: keep - len(chosen)]]
            chosen += joins
            if len(chosen) == keep or len(chosen) == before:
                break
        if stop and len(chosen) == before:
            return chosen
        threshold += p["threshold_step"]
    return chosen


def slow_merge(states: np.ndarray, features: np.ndarray, chosen: list[int], beta: float, *, plain_sum: bool = False) -> np.ndarray:
    received: dict[int, list[tuple[float, int]]] = {j: [] for j in chosen}
    for i in range(len(states)):
        if i not in received:
            similarity = [cosine(features[i], features[j]) for j in chosen]
            received[chosen[int(np.argmax(similarity))]].append((max(similarity), i))
    rows = []
    for j in sorted(chosen):
        pairs, own = received[j], states[j].astype(np.float64)
        if not plain_sum and sum(w for w, _ in pairs) <= 1e-3 * sum(abs(w) for w, _ in pairs):
            pairs = [(max(w, 0.0), i) for w, i in pairs]
        total = sum(w for w, _ in pairs)
        rows.append(own if total <= 0 else beta * own + (1 - beta) * sum(w * states[i] for w, i in pairs) / max(total, 1e-8))
    return np.stack(rows)


VARIANTS = [
    {},
    {"pivots": 1, "token_batch": 1},
    {"pivots": 6, "token_batch": 4, "threshold": 0.3, "threshold_step": 0.02},
    {"channels": 5, "spatial_weight": 2.0, "self_weight": 0.8},
    {"spatial_weight": 0.0, "threshold": 0.95, "token_batch": 5},
]
DEFAULTS = {
    "pivots": 4,
    "threshold": 0.8,
    "threshold_step": 0.1,
    "token_batch": 16,
    "channels": 256,
    "spatial_weight": 0.5,
    "self_weight": 0.3,
}


def visual_tokens(data: dict) -> VisualTokens:
    coords = torch.tensor(data["cells"])
    return VisualTokens(torch.from_numpy(data["states"]), grid=data["grid"], coords=coords, keys=torch.from_numpy(data["keys"]))


def slow_features(states: np.ndarray, channels: int) -> np.ndarray:
    states = states.astype(np.float64)
    return states[:, np.argsort(-states.var(axis=0, ddof=1))[:channels]]


# every variant on every layout; diverse tokens, and tokens that resemble each other, in turn
KINDS = ("image", "frames", "newlines")
CASES = [(kind, variant, 1.5 * ((i + k) % 2)) for i, variant in enumerate(VARIANTS) for k, kind in enumerate(KINDS)]


@pytest.mark.parametrize(("kind", "variant", "common"), CASES)
def test_vlm_pruner(kind: str, variant: dict, common: float):
    p, data = DEFAULTS | variant, smooth_tokens(kind, 0, common=common)
    features, n_visual = slow_features(data["states"], p["channels"]), len(data["cells"])
    pruner = get_pruner("vlmpruner", pruning_rate=RATE, **variant)
    for keep in (2, n_visual // 4, n_visual // 2, n_visual):
        expected = slow_growth(data, features, keep, p)
        got = pruner.select(visual_tokens(data), keep)
        assert got.order.tolist() == expected, keep
        merged = slow_merge(data["states"], features, expected, p["self_weight"])
        np.testing.assert_allclose(got.hidden_states.numpy(), merged, atol=2e-4)
        stopped = slow_growth(data, features, keep, p, stop=True)
        assert ("stall" in got.quirks) == (len(stopped) < keep)
        if keep >= p["pivots"]:
            released = get_pruner("vlmpruner", pruning_rate=RATE, official_quirks=True, **variant).select(visual_tokens(data), keep)
            assert released.order.tolist() == stopped, keep


def test_these_inputs_exercise_both_ends():
    """The comparison above means little unless some growth takes several passes and some stalls."""
    stalls = []
    for seed in range(8):
        data = smooth_tokens("image", seed, common=1.5)
        features = slow_features(data["states"], 256)
        stalls.append(len(slow_growth(data, features, 21, DEFAULTS, stop=True)) < 21)
    assert any(stalls) and not all(stalls)


def test_vlm_pruner_without_merge():
    data = smooth_tokens("image", 0)
    plain, merging = (get_pruner("vlmpruner", pruning_rate=RATE, merge=merge).select(visual_tokens(data), 12) for merge in (False, True))
    assert plain.hidden_states is None and merging.hidden_states is not None
    assert torch.equal(plain.order, merging.order)


@pytest.mark.parametrize("seed", SEEDS)
def test_vlm_pruner_merges_weights_that_cancel(seed: int):
    """Around a mean of zero most cosines to few kept tokens are negative for somebody."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], size=(30, 1))
    data = {"grid": (5, 6), "cells": [(0, i // 6, i % 6) for i in range(30)]}
    data["states"] = (signs * rng.normal(size=12) + 0.3 * rng.normal(size=(30, 12))).astype(np.float32)
    data["keys"] = rng.normal(size=(30, 1, 4)).astype(np.float32)
    features = slow_features(data["states"], 256)
    for quirks in (False, True):
        got = get_pruner("vlmpruner", pruning_rate=RATE, pivots=1, official_quirks=quirks).select(visual_tokens(data), 1)
        expected = slow_merge(data["states"], features, got.order.tolist(), 0.3, plain_sum=quirks)
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(got.hidden_states.numpy() / scale, expected / scale, atol=2e-4)
        sums = [cosine(features[i], features[int(got.order)]) for i in range(30) if i != int(got.order)]
        assert ("negative_weight_sum" in got.quirks) == (sum(sums) <= 1e-3 * sum(map(abs, sums)))


# ---- FastV (arXiv 2403.06764)
@pytest.mark.parametrize("seed", SEEDS)
def test_fastv(seed: int):
    attention = np.random.default_rng(seed).random(40).round(2).astype(np.float32)  # rounded: some tie
    expected = sorted(range(40), key=lambda i: (-attention[i], i))
    tokens = VisualTokens(torch.zeros(40, 1), grid=(5, 8), attention=torch.from_numpy(attention))
    for keep in (0, 1, 13, 40):
        assert get_pruner("fastv", pruning_rate=RATE).select(tokens, keep).order.tolist() == expected[:keep]


# ---- DART (arXiv 2502.11494)
def slow_dart(image: dict, text: dict, keep: int) -> list[int]:
    def strongest(keys: np.ndarray, count: int) -> list[int]:
        norms = np.abs(keys.astype(np.float64)).sum((1, 2))
        return sorted(range(len(keys)), key=lambda i: -norms[i])[:count]

    chosen = strongest(image["keys"], 4)
    pivots = [image["states"][i] for i in chosen] + [text["states"][i] for i in strongest(text["keys"], 4)]
    chosen, share = chosen[:keep], keep // len(pivots)
    for turn, pivot in enumerate(pivots):
        rest = sorted((i for i in range(len(image["states"])) if i not in chosen), key=lambda i: cosine(image["states"][i], pivot))
        missing = keep - len(chosen)
        chosen += rest[: missing if turn == len(pivots) - 1 else min(share, missing)]
    return chosen


@pytest.mark.parametrize("n_text", [0, 1, 9])
@pytest.mark.parametrize("seed", SEEDS)
def test_dart(seed: int, n_text: int):
    rng = np.random.default_rng(100 + seed)
    image = smooth_tokens("newlines", seed)
    text = {"states": rng.normal(size=(n_text, 24)).astype(np.float32), "keys": rng.normal(size=(n_text, 2, 4)).astype(np.float32)}
    n_visual = len(image["cells"])
    tokens = VisualTokens(
        torch.zeros(n_visual, 1),
        grid=(1, n_visual),
        keys=torch.from_numpy(image["keys"]),
        normed_hidden_states=torch.from_numpy(image["states"]),
        positions=torch.arange(n_visual) + 7,
        text=TextTokens(
            normed_hidden_states=torch.from_numpy(text["states"]),
            keys=torch.from_numpy(text["keys"]),
            positions=torch.arange(n_text) + 7 + n_visual,
        ),
    )
    for keep in (0, 3, 8, 9, 12, 20, 23, n_visual):
        got = get_pruner("dart", pruning_rate=RATE).select(tokens, keep)
        assert got.order.tolist() == slow_dart(image, text, keep), keep
        pivots = 4 + min(n_text, 4)
        released = get_pruner("dart", pruning_rate=RATE, official_quirks=True).select(tokens, keep)
        assert len(released.order) == min(n_visual, 4 + pivots * (keep // pivots))
        assert ("count" in got.quirks) == (len(released.order) != keep)


def test_darts_pivots_of_equal_norm_are_the_first():
    assert largest_keys(torch.ones(9, 2, 3), 4).tolist() == [0, 1, 2, 3]
