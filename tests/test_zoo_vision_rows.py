"""Methods of the vision tower that make or move rows (VisionZip, PruMerge, HoloV) against slow loops written from the papers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vision_scenes import SCENES, Scene, bent, changed

from vlm_pruner_eval import Pruner, Selection, VisualTokens, get_pruner

RATE = 0.5  # not used: the tests pass `keep`
SEEDS = range(4)


def pruner_of(method: str, **parameters: object) -> Pruner:
    return get_pruner(method, pruning_rate=RATE, **parameters)


def assert_rows(got: Selection, expected: list[np.ndarray]) -> None:
    """Rows in the order of the sequence, before the projector, against those of the answer, behind it."""
    rows = bent(torch.from_numpy(np.array(expected)))
    assert got.hidden_states.shape == rows.shape
    torch.testing.assert_close(got.hidden_states.double(), rows, rtol=1e-4, atol=1e-4)


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


# ---- VisionZip (arXiv 2412.04467)
def slow_visionzip(tokens: VisualTokens, keep: int, share: float) -> tuple[list[int], list[int], list[np.ndarray]]:
    """Dominant patches, targets, and all rows."""
    vision, n_contextual = tokens.vision, min(round(keep * share), keep - 1)
    states, metric = numbers(vision.states), numbers(vision.keys[-2]).mean(1)
    score = numbers(vision.cls_attention[-2]).sum(0)
    rows = [] if vision.cls_state is None else [numbers(vision.cls_state)]
    ranked = sorted(range(len(states)), key=lambda i: (-score[i], i))
    dominant = sorted(ranked[: keep - n_contextual - len(rows)])
    rest = [i for i in range(len(states)) if i not in dominant]
    targets = rest[:: max(1, len(rest) // max(1, n_contextual))][:n_contextual]
    members: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest:
        if i not in targets and targets:
            members[max(targets, key=lambda t: cosine(metric[i], metric[t]))].append(i)
    merged = [states[t] + (np.mean([states[i] for i in members[t]], axis=0) if members[t] else 0) for t in targets]
    return dominant, targets, rows + [states[i] for i in dominant] + merged


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize(("keep", "share"), [(13, 5 / 32), (10, 0.5), (41, 0.3), (2, 0.9), (6, 0.0), (1, 5 / 32)])
def test_visionzip_against_a_slow_loop(keep: int, share: float, cls: bool, seed: int):
    tokens = Scene(seed, rows=6, cols=7, cls=cls).tokens()
    dominant, targets, rows = slow_visionzip(tokens, keep, share)
    got = pruner_of("visionzip", contextual_share=share).select(tokens, keep)
    assert_rows(got, rows)
    free = {*got.merged.tolist()}
    assert len(free) == int(cls) and {*got.order.tolist()} - free == {*dominant, *targets}


@pytest.mark.parametrize(("keep", "contextual"), [(192, 30), (128, 20), (64, 10), (32, 5)])
def test_visionzip_divides_budgets_as_published(keep: int, contextual: int):
    tokens = Scene(1, rows=24, cols=24, width=2).tokens()
    got = pruner_of("visionzip").select(tokens, keep)
    score = tokens.vision.cls_attention[-2].sum(0)
    dominant = got.order[1 : keep - contextual]
    assert dominant.tolist() == score.sort(descending=True, stable=True).indices[: keep - contextual - 1].tolist()


def test_visionzip_puts_tiles_in_order():
    """A base view and two tiles side by side, whose rows interleave in the prompt; another image is untouched by them."""
    scenes = [Scene(seed, rows=4, cols=5) for seed in range(5)]
    at = torch.arange(40).reshape(4, 10)
    positions = [torch.arange(20) + 5, at[:, :5].flatten() + 25, at[:, 5:].flatten() + 25, torch.arange(20) + 70, torch.arange(20) + 90]
    images = ["first", "first", "first", "second", None]
    views = [replace(one.tokens(image=image), positions=p) for one, image, p in zip(scenes, images, positions, strict=True)]
    pruner = pruner_of("visionzip", contextual_share=0.3)
    together = pruner.select_batch(views, [9, 9, 8, 9, 9])
    alone = [pruner.select(view, keep) for view, keep in zip(views, [9, 9, 8, 9, 9], strict=True)]
    for i in (0, 3, 4):
        assert torch.equal(together[i].order, alone[i].order) and torch.equal(together[i].hidden_states, alone[i].hidden_states)
    # by hand: rows of a tile alone are CLS, dominant patches ascending, contextual rows (3 of 9, 2 of 8)
    dominant, cls, contextual = [], [], []
    for i, n_contextual in ((1, 3), (2, 2)):
        rows, n_dominant = alone[i].hidden_states, len(alone[i].order) - 1 - n_contextual
        places = positions[i][alone[i].order[1 : 1 + n_dominant].sort().values]
        dominant += [(int(p), row) for p, row in zip(places, rows[1 : 1 + n_dominant], strict=True)]
        cls.append(rows[0])
        contextual += [*rows[1 + n_dominant :]]
    expected = [row for _, row in sorted(dominant, key=lambda pair: pair[0])] + cls + contextual
    stand = torch.cat([positions[i][together[i].keep] for i in (1, 2)])
    rows = torch.cat([together[i].hidden_states for i in (1, 2)])
    assert torch.equal(rows[stand.argsort()], torch.stack(expected))


# ---- PruMerge and PruMerge+ (arXiv 2403.15388)
def slow_attention(tokens: VisualTokens) -> np.ndarray:
    query, own = (numbers(one[-1]).reshape(-1) for one in (tokens.vision.cls_query, tokens.vision.cls_key))
    keys = numbers(tokens.vision.keys[-1]).reshape(tokens.n_visual, -1)
    logits = np.array([own @ query, *(key @ query for key in keys)]) / math.sqrt(len(query))
    weights = np.exp(logits - logits.max())
    return (weights / weights.sum())[1:]


def slow_rows(tokens: VisualTokens, kept: list[int], neighbours: int) -> list[np.ndarray]:
    """Rows of the patches `kept`, which may name one twice, and the extra row; as many dropped ones as there are repeats get lost."""
    attention, states = slow_attention(tokens), numbers(tokens.vision.states)
    keys = numbers(tokens.vision.keys[-1]).reshape(len(states), -1)
    dropped = [i for i in range(len(states)) if i not in kept][len(kept) - len({*kept}) :]
    rows = []
    for r, i in enumerate(kept):
        others = kept[:r] + kept[r + 1 :] + dropped
        near = sorted(others, key=lambda j: -cosine(keys[i], keys[j]))[:neighbours]
        rows.append(states[i] + sum((attention[j] * states[j] for j in near), np.zeros_like(states[i])))
    return [*rows, sum((attention[j] * states[j] for j in dropped), np.zeros(states.shape[1]))]


def slow_kept(views: list[VisualTokens], plus: bool) -> list[list[int]]:
    """Patches of each view: one share of outliers for all, then the grid."""
    attention = [slow_attention(view) for view in views]
    together = np.concatenate(attention)
    low, high = np.percentile(together, [25, 75])
    n = int((together > high + 1.5 * (high - low)).sum())
    found = []
    for one in attention:
        kept = sorted(range(len(one)), key=lambda i: (-one[i], i))[: len(one) * n // len(together)]
        step = len(together) // n // 3 if plus and n else 0
        found.append(kept + [i for i in range(0, len(one) - 1, step or len(one)) if step and i not in kept])
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", ["prumerge", "prumerge_plus"])
def test_prumerge_decides_the_count_by_one_share_of_all_views(method: str, seed: int):
    views = [Scene(3 * seed + i, rows=6, cols=8).tokens(image="one") for i in range(3)]
    kept = slow_kept(views, method == "prumerge_plus")
    assert all(kept)
    got = pruner_of(method, neighbours=4).select_batch(views, [1, 1, 1])
    for view, patches, one in zip(views, kept, got, strict=True):
        assert one.order[:-1].tolist() == patches
        assert one.merged.tolist() == [min({*range(48)} - {*patches})] == one.order[-1:].tolist()
        assert_rows(one, slow_rows(view, patches, 4))
    alone = [pruner_of(method).select(view, 1) for view in views]
    assert [one.order[:-1].tolist() for one in alone] == [slow_kept([view], method == "prumerge_plus")[0] for view in views]


@given(scene=SCENES, share=st.floats(0, 1), neighbours=st.integers(0, 40), plus=st.booleans())
def test_prumerge_fixed_keeps_what_is_asked(scene: Scene, share: float, neighbours: int, plus: bool):
    tokens, keep = replace(scene, coarse=False).tokens(), round(scene.n_visual * share)
    got = pruner_of("prumerge_plus" if plus else "prumerge", fixed=True, neighbours=neighbours).select(tokens, keep)
    assert len(got.order) == keep
    if keep:
        attention, n_top = slow_attention(tokens), keep // 2 if plus else keep - 1
        patches = got.order[:-1].tolist()
        rest = sorted(attention[[i for i in range(scene.n_visual) if i not in patches[:n_top]]])
        assert not patches[:n_top] or not rest or min(attention[patches[:n_top]]) >= rest[-1] - 1e-6
        assert patches[n_top:] == sorted(patches[n_top:])
        assert got.merged.tolist() == got.order[-1:].tolist()
        assert_rows(got, slow_rows(tokens, patches, neighbours))


def test_prumerge_as_released_has_one_row_more():
    tokens = Scene(7, rows=6, cols=8).tokens()
    exact, released = (pruner_of("prumerge", fixed=True, official_quirks=mode).select(tokens, 12) for mode in (False, True))
    assert exact.quirks == released.quirks == {"extra_row"}
    assert (len(exact.order), len(released.order)) == (12, 13)
    assert released.order[:11].tolist() == exact.order[:11].tolist()


def test_prumerge_plus_as_released_repeats_patches():
    """R by attention, and every (N / R)-th patch from the middle of the first step; both copies are rows."""
    tokens = Scene(7, rows=6, cols=8).tokens()
    attention = slow_attention(tokens)
    by_attention = sorted(range(48), key=lambda i: -attention[i])[:12]
    patches = [*by_attention, *range(2, 48, 4)]
    repeats = len(patches) - len({*patches})
    got = pruner_of("prumerge_plus", fixed=True, official_quirks=True, neighbours=4).select(tokens, 12)
    assert repeats > 0 and got.quirks == {"extra_row", "repeats"} and len(got.merged) == repeats + 1
    assert_rows(got, slow_rows(tokens, patches, 4))
    assert "wrong_count" in pruner_of("prumerge_plus", fixed=True, official_quirks=True).select(tokens, 11).quirks


@pytest.mark.parametrize("method", ["prumerge", "prumerge_plus"])
@pytest.mark.parametrize("quirks", [False, True])
def test_prumerge_without_outliers_is_one_row(method: str, quirks: bool):
    tokens = Scene(1, flat=True).tokens()
    got = pruner_of(method, official_quirks=quirks).select(tokens, 7)
    assert got.quirks == {"no_outliers"} and len(got.order) == 1 and got.merged.tolist() == [0]
    assert_rows(got, slow_rows(tokens, [], 32))


def test_prumerge_plus_may_find_no_place_for_the_extra_row():
    """The last patch by attention, all others by a grid of step 1."""
    tokens = Scene(1, rows=2, cols=10, heads=1).tokens()
    keys = torch.zeros(20, 1, 3)
    keys[16:, 0, 0] = torch.tensor([5.0, 6.0, 7.0, 8.0])
    tower = {"cls_query": {-1: torch.ones(1, 3)}, "cls_key": {-1: torch.zeros(1, 3)}, "keys": {-1: keys}}
    got = pruner_of("prumerge_plus").select(changed(tokens, **tower), 5)
    assert got.quirks == {"no_place"} and got.order.tolist() == [19, 18, 17, 16, *range(16)] and len(got.merged) == 0


# ---- HoloV (arXiv 2510.02912)
def slow_holov(features: np.ndarray, attention: np.ndarray, keep: int, n_crops: int, alpha: float, *, released: bool) -> list[int]:
    """Patches in the order of the rows; -1 is a row of zeros."""
    crops = [[*part] for part in np.array_split(np.arange(len(features)), min(n_crops, len(features)))]
    scores = []
    for crop in crops:
        n, value = len(crop), 1000 * attention[crop]
        if n == 1:
            scores.append(attention[crop[0]] if released else value[0] * (1 + alpha))
            continue
        unit = [features[i] / (np.linalg.norm(features[i]) + 1e-6) for i in crop]
        table = [[0.0 if i == j else float(unit[i] @ unit[j]) for j in range(n)] for i in range(n)]
        variance = np.array([sum((x - sum(row) / (n - 1)) ** 2 for x in row) / (n - 1) for row in table])
        scores.append(np.mean(value + alpha * variance * value.mean() / (variance.mean() + 1e-6)))
    share = np.array(scores) / (sum(scores) + 1e-6)
    quota = np.floor(share * keep).astype(int)
    ranked = sorted(range(len(crops)), key=lambda c: (-share[c], c))
    if not released:
        quota = np.array([min(q, len(crop)) for q, crop in zip(quota, crops, strict=True)])
    turn = 0
    while quota.sum() < keep:
        c = ranked[turn % len(crops)]
        quota[c] += 1 if released or quota[c] < len(crops[c]) else 0
        turn += 1
    order = []
    for q, crop in zip(quota, crops, strict=True):
        order += crop if q >= len(crop) else sorted(crop, key=lambda i: (-attention[i], i))[:q]
    return order + [-1] * (keep - len(order))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("keep", "crops"), [(12, 4), (30, 6), (30, 5), (41, 16), (7, 40), (20, 30)])
def test_holov_against_a_slow_loop(keep: int, crops: int, seed: int):
    tokens = Scene(seed, rows=6, cols=7).tokens()
    features, attention = numbers(tokens.hidden_states), numbers(tokens.vision.cls_attention[-2]).mean(0)
    exact, released = (slow_holov(features, attention, keep, crops, 0.09, released=mode) for mode in (False, True))
    got, as_released = (pruner_of("holov", crops=crops, official_quirks=mode).select(tokens, keep) for mode in (False, True))
    assert got.order.tolist() == exact and -1 not in exact
    assert torch.equal(got.hidden_states, tokens.hidden_states[exact])
    n_lost = released.count(-1)
    assert as_released.order.tolist()[: keep - n_lost] == released[: keep - n_lost]
    assert as_released.merged.tolist() == as_released.order.tolist()[keep - n_lost :]
    assert (as_released.hidden_states == 0).all(1).tolist() == [i == -1 for i in released]
    single = {"single_patch_crops"} if crops in (30, 40) else set()
    assert got.quirks == as_released.quirks == single | ({"overflow"} if n_lost else set())


def test_holov_as_released_and_overflow_do_happen():
    tokens = Scene(2, rows=6, cols=7).tokens()
    attention = torch.full((1, 42), 0.001).index_fill(1, torch.arange(14, 21), 0.1)
    tokens = changed(tokens, cls_attention={-2: attention})
    exact, released = (pruner_of("holov", crops=6, official_quirks=mode).select(tokens, 20) for mode in (False, True))
    assert exact.quirks == released.quirks == {"overflow"}
    assert len(released.merged) > 0 and len(exact.merged) == 0
    assert {*range(14, 21)} < {*exact.order.tolist()}


def test_holov_leaves_newline_tokens_for_last():
    tokens = Scene(3, rows=6, cols=7).tokens()
    coords = tokens.coords.clone()
    coords[6::7, 1:] = -1  # the last column
    given = replace(tokens, coords=coords)
    patches = (coords[:, 1] >= 0).nonzero()[:, 0]
    vision = tokens.vision
    inner = VisualTokens(
        tokens.hidden_states[patches], grid=(6, 6), vision=replace(vision, cls_attention={-2: vision.cls_attention[-2][:, patches]})
    )
    pruner = pruner_of("holov", crops=4)
    assert torch.equal(pruner.select(given, 20).order, patches[pruner.select(inner, 20).order])
    assert pruner.select(given, 38).order[36:].tolist() == [6, 13]


def test_holov_keeps_prompt_order_where_a_row_has_the_position_of_its_place():
    tokens = Scene(3, rows=6, cols=7).tokens()
    got = pruner_of("holov", crops=4, positions="original").select(tokens, 15)
    assert torch.equal(got.hidden_states, tokens.hidden_states[got.keep])
    assert torch.equal(got.order, pruner_of("holov", crops=4).select(tokens, 15).order)


@pytest.mark.parametrize(("n_visual", "keep", "crops"), [(576, 64, 16), (391, 87, 7), (20, 19, 1)])
def test_holov_number_of_crops_by_rate(n_visual: int, keep: int, crops: int):
    tokens = Scene(4, rows=1, cols=n_visual, width=3).tokens()
    by_rate, given_number = (pruner_of("holov", crops=n).select(tokens, keep).order for n in (0, crops))
    assert torch.equal(by_rate, given_number)
