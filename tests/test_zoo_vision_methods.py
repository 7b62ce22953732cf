"""Methods of the vision tower that merge nothing, against slow loops written from the papers, and what holds for all of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vision_scenes import SCENES, Scene, changed

from vlm_pruner_eval import ConfigError, PruningError, Selection, VisualTokens, get_pruner
from vlm_pruner_eval.pruners.scope import Growth, greedy, greedy_by_bounds
from vlm_pruner_eval.types import VisionTokens

RATE = 0.5  # not used: the tests pass `keep`
EXACT = {
    "fastervlm": {},
    "vispruner": {},
    "scope": {},
    "hiprune": {"alpha": 0.8},
    "holov": {"crops": 5},
    "visionzip": {},
    "prumerge": {"fixed": True, "neighbours": 3},
    "prumerge_plus": {"fixed": True, "neighbours": 3},
}
CHANGES_COUNT = {"hiprune", "prumerge", "prumerge_plus"}
SEEDS = range(4)


def select(method: str, tokens: VisualTokens, keep: int, **parameters: object) -> Selection:
    return get_pruner(method, pruning_rate=RATE, **parameters).select(tokens, keep)


# ---- all of them
@pytest.mark.parametrize("method", EXACT)
@given(scene=SCENES, share=st.floats(0, 1), quirks=st.booleans())
def test_as_many_rows_as_asked(method: str, scene: Scene, share: float, quirks: bool):
    """Also for one token, all but one, constant attention and ties; the release's count only where it is said to differ."""
    tokens, keep = scene.tokens(), round(scene.n_visual * share)
    got = select(method, tokens, keep, **EXACT[method], official_quirks=quirks)
    assert len(got.order.unique()) == len(got.order)
    assert (len(got.order) == keep) or (quirks and method in CHANGES_COUNT)
    assert {*got.order.tolist()} <= {*range(scene.n_visual)}
    if got.hidden_states is not None:
        assert got.hidden_states.shape == (len(got.order), scene.width)
    again = select(method, scene.tokens(), keep, **EXACT[method], official_quirks=quirks)
    assert torch.equal(again.order, got.order) and again.quirks == got.quirks


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("keep", [1, 19])
def test_one_row_and_all_but_one(method: str, keep: int):
    got = select(method, Scene(3).tokens(), keep, **EXACT[method])
    assert len(got.order.unique()) == keep
    if method in ("prumerge", "prumerge_plus", "visionzip"):
        assert len(got.merged) == 1


@pytest.mark.parametrize("method", EXACT)
def test_what_it_reads_must_be_there_and_finite(method: str):
    tokens, pruner = Scene(5).tokens(), get_pruner(method, pruning_rate=RATE, **EXACT[method])
    for need in pruner.needs - {"positions"}:
        field = need.removeprefix("vision.")
        value = getattr(tokens.vision, field)
        empty, layer = ({}, pruner.tower_layers()[0]) if isinstance(value, dict) else (None, None)
        with pytest.raises(PruningError, match=f"needs '{need}'"):
            pruner.select(changed(tokens, **{field: empty}), 6)
        poisoned = (value if layer is None else value[layer]).clone()
        poisoned.view(-1)[2] = math.nan
        with pytest.raises(PruningError, match=f"{need}.* NaN"):
            pruner.select(changed(tokens, **{field: poisoned if layer is None else value | {layer: poisoned}}), 6)


@pytest.mark.parametrize("method", EXACT)
def test_half_precision_and_the_input_is_left_alone(method: str):
    tokens = Scene(2).tokens()
    before, states = tokens.vision.states.clone(), tokens.hidden_states.clone()
    half = replace(tokens, hidden_states=tokens.hidden_states.bfloat16())
    got = select(method, half, 7, **EXACT[method])
    assert got.hidden_states is None or got.hidden_states.dtype == torch.bfloat16
    assert torch.equal(tokens.vision.states, before) and torch.equal(tokens.hidden_states, states)


@pytest.mark.parametrize("method", EXACT)
def test_views_do_not_change_each_other_where_nothing_is_joint(method: str):
    """Images that are asked about together; VisionZip and PruMerge look at several views only if they name one image."""
    scenes = [Scene(seed, rows=3, cols=4 + seed).tokens() for seed in SEEDS]
    pruner = get_pruner(method, pruning_rate=RATE, **EXACT[method])
    together = pruner.choose_batch(scenes, [5, 6, 7, 8])
    for tokens, keep, got in zip(scenes, [5, 6, 7, 8], together, strict=True):
        alone = pruner.select(tokens, keep)
        assert torch.equal(alone.order, got if isinstance(got, torch.Tensor) else got.order)


@pytest.mark.parametrize(
    ("method", "wrong"),
    [("vispruner", {"important_ratio": 1.5}), ("scope", {"alpha": -1.0}), ("scope", {"combined": "both"}), ("hiprune", {"alpha": 2.0})]
    + [("holov", {"crops": -1}), ("holov", {"alpha": -0.1}), ("visionzip", {"contextual_share": 1.0}), ("prumerge", {"neighbours": -1})]
    + [(method, {"layer": 2}) for method in EXACT],
)
def test_values_that_can_not_be(method: str, wrong: dict[str, object]):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        get_pruner(method, pruning_rate=RATE, **wrong)


# ---- FasterVLM (arXiv 2412.01818v1)
def test_fastervlm_takes_the_largest_head_means_and_ties_from_the_lowest():
    attention = torch.tensor([[0.1, 0.3, 0.2, 0.2, 0.0], [0.3, 0.3, 0.2, 0.2, 0.0]])
    tokens = VisualTokens(torch.zeros(5, 1), grid=(1, 5), vision=VisionTokens(cls_attention={-2: attention}))
    assert select("fastervlm", tokens, 4).order.tolist() == [1, 0, 2, 3]


# ---- VisPruner (arXiv 2412.01818)
def slow_vispruner(states: np.ndarray, attention: np.ndarray, keep: int, ratio: float) -> list[int]:
    ranked = sorted(range(len(states)), key=lambda i: (-attention[i], i))
    n_important = int(keep * ratio)
    chosen, rest, count = ranked[:n_important], ranked[n_important:], keep - n_important
    while len(rest) > count:
        judged, others = rest[::2], rest[1::2]
        likeness = [max(states[i] @ states[j] for j in others) for i in judged]
        by_likeness = sorted(range(len(judged)), key=lambda k: -likeness[k])
        removed = min(8, len(rest) - count, len(judged))
        rest = [judged[k] for k in by_likeness[removed:]] + others
    return chosen + rest


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("keep", "ratio"), [(12, 0.5), (13, 0.5), (8, 0.0), (9, 0.25), (3, 0.9), (1, 0.0), (41, 0.5)])
def test_vispruner_against_a_slow_loop(keep: int, ratio: float, seed: int):
    """States of 16 signs: their cosines are exact in any precision, with many ties."""
    tokens = Scene(seed, rows=6, cols=7).tokens()
    signs = torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], size=(42, 16)).astype(np.float32))
    got = select("vispruner", changed(tokens, states=signs), keep, important_ratio=ratio)
    attention = tokens.vision.cls_attention[-2].double().mean(0).numpy()
    assert got.order.tolist() == slow_vispruner(signs.double().numpy() / 4, attention, keep, ratio)


@pytest.mark.parametrize(
    ("keep", "quirks"),
    [(64, set()), (58, {"odd_split"}), (190, {"odd_split"}), (8, {"small_diverse"}), (2, {"odd_split", "small_diverse"})],
)
def test_vispruner_says_where_its_release_raises(keep: int, quirks: set[str]):
    got = select("vispruner", Scene(1, rows=24, cols=24).tokens(), keep)
    assert got.quirks == quirks and len(got.order) == keep


# ---- SCOPE (arXiv 2510.24214)
def slow_scope(states: np.ndarray, attention: np.ndarray, keep: int, alpha: float, added: bool) -> list[int]:
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    similarity, cover, chosen = unit @ unit.T, np.zeros(len(states)), []
    for _ in range(keep):
        gains = []
        for j in range(len(states)):
            growth = sum(max(0.0, similarity[i, j] - cover[i]) for i in range(len(states)))
            gain = growth + attention[j] ** alpha if added else growth * attention[j] ** alpha
            gains.append(-1.0 if j in chosen else gain)
        chosen.append(int(np.argmax(gains)))
        cover = np.maximum(cover, similarity[:, chosen[-1]])
    return chosen


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("alpha", "combined"), [(1.0, "multiply"), (0.5, "multiply"), (0.0, "multiply"), (1.0, "add")])
def test_scope_against_a_slow_loop(alpha: float, combined: str, seed: int):
    tokens = Scene(seed, rows=6, cols=6).tokens()
    keep = 14 if alpha else 4  # without weights two patches of which each covers the other tie in the end, but for rounding
    got = select("scope", tokens, keep, alpha=alpha, combined=combined)
    attention = tokens.vision.cls_attention[-2].double().sum(0).numpy()
    assert got.order.tolist() == slow_scope(tokens.vision.states.double().numpy(), attention, keep, alpha, combined == "add")


@given(scene=SCENES, share=st.floats(0, 1), added=st.booleans())
def test_scope_by_bounds_is_scope(scene: Scene, share: float, added: bool):
    """To the last tie: one-hot states make whole numbers of the sums."""
    vision = scene.vision()
    picked = torch.eye(3)[vision.states.abs().argmax(1) % 3]
    states = picked if scene.coarse else torch.nn.functional.normalize(vision.states, dim=1)
    weight, keep = vision.cls_attention[-2].sum(0), round(scene.n_visual * share)
    cosine = states @ states.T
    assert greedy_by_bounds(Growth(cosine, weight, added=added), keep).equal(greedy(Growth(cosine, weight, added=added), keep))


def test_scope_of_equal_patches_goes_by_index():
    vision = VisionTokens(states=torch.ones(6, 4), cls_attention={-2: torch.full((2, 6), 0.1)})
    assert select("scope", VisualTokens(torch.zeros(6, 1), grid=(2, 3), vision=vision), 5).order.tolist() == [0, 1, 2, 3, 4]


# ---- HiPrune (arXiv 2508.00553)
def slow_hiprune(shallow: np.ndarray, deep: np.ndarray, keep: int, alpha: float, width: int, *, released: bool) -> set[int]:
    by_shallow = sorted(range(len(deep)), key=lambda i: (-shallow[i], i))
    first = set()
    for i in by_shallow[: round(keep * alpha / 5)]:
        first |= {min(max(i + step, 0), len(deep) - 1) for step in (0, -1, 1, -width, width)}
    lowered = 1.0 if released else 1e9
    score = [value - lowered if i in first else value for i, value in enumerate(deep)]
    return first | {*sorted(range(len(deep)), key=lambda i: (-score[i], i))[: keep - len(first)]}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("keep", "alpha"), [(20, 0.5), (9, 0.1), (33, 1.0)])
def test_hiprune_against_a_slow_loop(keep: int, alpha: float, large: bool, seed: int):
    """With scores around 1, as in the port to Qwen2.5-VL, the release takes some patches twice."""
    tokens = Scene(seed, rows=6, cols=8).tokens()
    received = {layer: row * (48 if large else 1) for layer, row in tokens.vision.received_attention.items()}
    tokens = changed(tokens, received_attention=received)
    shallow, deep = (received[layer].double().numpy() for layer in (8, -2))
    exact, released = (slow_hiprune(shallow, deep, keep, alpha, 8, released=mode) for mode in (False, True))
    got = select("hiprune", tokens, keep, alpha=alpha)
    as_released = select("hiprune", tokens, keep, alpha=alpha, official_quirks=True)
    assert {*got.order.tolist()} == exact and len(exact) == keep
    assert {*as_released.order.tolist()} == released
    assert got.quirks == as_released.quirks == ({"anchor_twice"} if len(released) < keep else set())
    assert large or not got.quirks


def test_hiprune_neighbours_wrap_and_stop_at_the_ends():
    shallow, deep = torch.zeros(12), torch.linspace(0.01, 0, 12)
    for anchor, near in ((3, {2, 3, 4, 7, 0}), (0, {0, 1, 4}), (11, {10, 11, 7})):
        tower = VisionTokens(received_attention={8: shallow.index_fill(0, torch.tensor(anchor), 1.0), -2: deep})
        got = select("hiprune", VisualTokens(torch.zeros(12, 1), grid=(3, 4), vision=tower), len(near), alpha=5 / len(near) * 0.6)
        assert {*got.order.tolist()} == near and got.order[0] == anchor


def test_hiprune_neighbours_in_a_grid_that_lost_columns():
    """Tiles of an image that was padded: the row below begins as many tokens later as are left in a row."""
    coords = torch.tensor([(0, row, col) for row in range(4) for col in range(2, 5)])
    shallow = torch.zeros(12).index_fill(0, torch.tensor(7), 1.0)
    tower = VisionTokens(received_attention={8: shallow, -2: torch.linspace(0.01, 0, 12)})
    got = select("hiprune", VisualTokens(torch.zeros(12, 1), grid=(6, 6), coords=coords, vision=tower), 5, alpha=1.0)
    assert {*got.order.tolist()} == {4, 6, 7, 8, 10}
