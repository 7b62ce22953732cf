"""PDrop, SparseVLM, VScan and MustDrop against slow loops written from the papers, and what must hold on any input."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo_llm_loops import slow_clusters, slow_inside, slow_raters, slow_vscan
from zoo_llm_scenes import SCENES, Scene, all_stages, method_named

from vlm_pruner_eval import ConfigError, PruningError
from vlm_pruner_eval.pruners.in_stages import scaled_layers
from vlm_pruner_eval.pruners.sparsevlm import clusters
from vlm_pruner_eval.pruners.vscan import local_choice
from vlm_pruner_eval.types import QuestionTokens

METHODS = ("pdrop", "sparsevlm", "vscan", "mustdrop")
PUBLISHED_RATES = ("2/3", "7/9", "8/9")


# ---- what holds for all
@pytest.mark.parametrize("name", METHODS)
@given(scene=SCENES, quirks=st.booleans(), rate=st.sampled_from(PUBLISHED_RATES), selection_dtype=st.sampled_from(["float32", "model"]))
def test_every_stage_keeps_distinct_tokens_in_range(name: str, quirks: bool, rate: str, selection_dtype: str, scene: Scene):
    params = {"budget": "kept"} if name == "pdrop" else {}
    method = method_named(name, rate, official_quirks=quirks, selection_dtype=selection_dtype, **params)
    n_left = scene.n_visual
    for stage, selection in zip(method.stages(32), all_stages(method, scene), strict=True):
        assert len(selection.order.unique()) == len(selection.order) <= n_left
        assert selection.order.numel() == 0 or (selection.order.min() >= 0 and selection.order.max() < n_left)
        if not method.decides_count():
            assert len(selection.order) == min(n_left, method.keep_at(stage, scene.n_visual))
        if selection.hidden_states is not None:
            assert selection.hidden_states.dtype == scene.dtype
        if selection.merged is not None:
            assert torch.isin(selection.merged, selection.order).all()
        n_left = len(selection.order)
    assert n_left >= 1


@pytest.mark.parametrize("name", METHODS)
@given(scene=SCENES)
def test_the_answer_is_the_same_again_and_the_input_as_it_was(name: str, scene: Scene):
    method, keep = method_named(name), scene.n_visual // 2
    tokens, twin = scene.tokens(), scene.tokens()
    first, again = method.select(tokens, keep), method.select(tokens, keep)
    assert torch.equal(first.order, again.order) and first.quirks == again.quirks
    assert torch.equal(tokens.hidden_states, twin.hidden_states) and torch.equal(tokens.own_attention, twin.own_attention)
    assert torch.equal(tokens.text_attention(None), twin.text_attention(None))


@pytest.mark.parametrize("name", METHODS)
def test_rate_0_cuts_nothing_and_one_token_stays(name: str):
    scene = Scene(1, 4, 6)
    whole = method_named(name, 0)
    assert all(whole.keep_at(stage, 24) == 24 for stage in whole.stages(32))
    assert torch.equal(whole.select(scene.tokens(), 24).keep, torch.arange(24))
    alone = Scene(2, 1, 1)
    for quirks in (False, True):
        assert method_named(name, official_quirks=quirks).select(alone.tokens(), 1).keep.tolist() == [0]


@pytest.mark.parametrize("name", METHODS)
def test_layers_of_any_depth_are_distinct_and_ascending(name: str):
    method = method_named(name, **({"budget": "kept"} if name == "pdrop" else {}))
    for n_layers in range(2, 50):
        layers = [stage.layer for stage in method.stages(n_layers)]
        assert layers == sorted(set(layers)) and layers[-1] < n_layers
        assert (layers[0] == 0) == (name in ("vscan", "mustdrop"))


def test_layers_of_the_published_depth():
    expected = {"pdrop": [8, 16, 24], "sparsevlm": [3, 7, 16], "vscan": [0, 16], "mustdrop": [0, 3, 7, 11, 15]}
    assert {name: [stage.layer for stage in method_named(name).stages(32)] for name in METHODS} == expected
    assert scaled_layers([Fraction(1, 4), Fraction(1, 2), Fraction(3, 4)], 28) == [7, 14, 21]
    assert scaled_layers([Fraction(1, 4), Fraction(1, 2), Fraction(3, 4)], 3) == [1, 2]


@pytest.mark.parametrize("name", METHODS)
def test_positions_close_up_except_under_mrope(name: str):
    assert [method_named(name).position_policy(mrope) for mrope in (False, True)] == ["contiguous", "original"]
    assert method_named(name, positions="original").position_policy(False) == "original"
    with pytest.raises(ConfigError, match="layers of its own"):
        method_named(name, layer=5)


def test_a_field_that_is_missing_is_named():
    for name, field in {"pdrop": "own_attention", "vscan": "vision", "sparsevlm": "question", "mustdrop": "vision"}.items():
        tokens = Scene(0, 3, 4).tokens()
        object.__setattr__(tokens, field, None)
        with pytest.raises(PruningError, match=rf"{field}.*got None"):
            method_named(name).select(tokens, 4)


# ---- PDrop
@given(rate=st.floats(0, 0.74), n_layers=st.integers(4, 60), n_visual=st.integers(200, 3000))
def test_pdrop_reaches_the_average(rate: float, n_layers: int, n_visual: int):
    method = method_named("pdrop", rate)
    try:
        stages = method.stages(n_layers)
    except ConfigError:  # the first quarter alone is more
        assert scaled_layers([Fraction(1, 4)], n_layers)[0] / n_layers >= 1 - rate
        return
    held = [n_visual] * n_layers
    for stage in stages:
        held[stage.layer :] = [method.keep_at(stage, n_visual)] * (n_layers - stage.layer)
    assert abs(sum(held) / n_layers - (1 - rate) * n_visual) <= 1
    ratios = [float(after.share / before) for after, before in zip(stages, [1, *(stage.share for stage in stages)], strict=False)]
    assert max(ratios) - min(ratios) < 1e-9


def test_pdrop_counts():
    kept = method_named("pdrop", "8/9", budget="kept")
    assert [kept.keep_at(stage, 576) for stage in kept.stages(32)] == [277, 133, 64]
    assert [stage.layer for stage in method_named("pdrop", "8/9").stages(32)] == [2, 16, 24], "too few for a cut at layer 8"
    with pytest.raises(ConfigError, match=r"0\.1111 over 4 layers.*below 0\.7500"):
        method_named("pdrop", "8/9").stages(4)
    released = method_named("pdrop", "8/9", schedule="published")
    assert [released.keep_at(stage, 391) for stage in released.stages(32)] == [195, 97, 48]
    with pytest.raises(ConfigError, match="schedule: got 'pyramid'"):
        method_named("pdrop", schedule="pyramid")


def test_pdrop_published_keeps_a_token_of_a_tiny_image():
    scene = Scene(3, 1, 5)
    sane, release = (method_named("pdrop", schedule="published", official_quirks=quirks) for quirks in (False, True))
    assert [len(found.order) for found in all_stages(sane, scene)] == [2, 1, 1]
    assert [len(found.order) for found in all_stages(release, scene)][:2] == [2, 1]
    assert release.keep_at(release.stages(32)[2], 5) == 0
    assert [found.quirks for found in all_stages(sane, scene)] == [frozenset(), frozenset(), {"none_left"}]


@given(scene=SCENES)
def test_pdrop_ranks_by_own_attention(scene: Scene):
    tokens = scene.tokens()
    ranked = sorted(range(scene.n_visual), key=lambda i: (-float(tokens.own_attention[i]), i))
    assert method_named("pdrop").select(tokens, scene.n_visual // 2).order.tolist() == ranked[: scene.n_visual // 2]


# ---- SparseVLM
@given(seed=st.integers(0, 10**6), side=st.integers(2, 9), n_text=st.integers(2, 8), share=st.floats(0, 0.9))
def test_sparsevlm_is_the_slow_loop(seed: int, side: int, n_text: int, share: float):
    scene = Scene(seed, side, side, n_text=n_text)
    tokens, keep = scene.tokens(), int(share * side * side)
    got = method_named("sparsevlm").select(tokens, keep)
    # who rates, and whom they like
    question = tokens.question
    chosen = slow_raters(question.image_embeddings.double().numpy(), question.text_embeddings.double().numpy())
    assert tokens.memory["raters"].tolist() == chosen
    scores = tokens.text_attention(None).double().numpy()[chosen].mean(0)
    ranked = np.argsort(-scores, kind="stable")
    assert got.order[:keep].tolist() == ranked[:keep].tolist()
    # the clusters, behind the kept ones
    dropped = ranked[keep:]
    recycled = dropped[: int(0.3 * len(dropped)) + 1]
    states = tokens.hidden_states.double().numpy()
    merged = slow_clusters(states[recycled], int(len(recycled) / 10) + 1)
    assert len(got.order) == keep + len(merged) and torch.equal(got.order[keep:], got.merged)
    expected = np.stack([*states[np.sort(ranked[:keep])], *merged])
    assert np.abs(got.hidden_states.double().numpy() - expected).max() < 1e-5


def test_sparsevlm_places_of_clusters_are_the_last_that_are_free():
    tokens = Scene(5, 12, 12).tokens()
    got = method_named("sparsevlm").select(tokens, 20)
    free = [i for i in range(144) if i not in got.order[:20].tolist()]
    assert got.merged.tolist() == free[-len(got.merged) :]


def test_sparsevlm_raters_are_found_once_and_handed_on():
    scene, asked = Scene(6, 24, 24), []
    method, memory = method_named("sparsevlm", "8/9"), {}
    found = all_stages(method, scene)
    assert [len(selection.order) for selection in found] == [66 + 16, 30 + 2, 17 + 1]
    tokens = scene.tokens(memory=memory)
    first = method.select(tokens, 66)
    later = scene.tokens(torch.arange(82), first.hidden_states, stage=1, memory=memory)
    object.__setattr__(later, "question", None)  # embeddings are not looked at again
    object.__setattr__(later, "text_attention", lambda rows: asked.append(rows) or torch.ones(len(rows), 82))
    method.select(later, 30)
    assert asked[0] is memory["raters"]


@pytest.mark.parametrize("n_text", [0, 4])
def test_sparsevlm_without_raters(n_text: int):
    """Texts that all attend equally: each rates, and of equal scores the first are kept; the release keeps the first ones always."""
    scene = Scene(7, 4, 4, n_text=n_text)
    tokens = scene.tokens()
    object.__setattr__(tokens, "question", QuestionTokens(image_embeddings=torch.ones(16, 2), text_embeddings=torch.zeros(n_text, 2)))
    got = method_named("sparsevlm").select(tokens, 5)
    assert "no_raters" in got.quirks
    scores = tokens.text_attention(None).sum(0)
    assert got.order[:5].tolist() == scores.sort(descending=True, stable=True).indices[:5].tolist()
    release = method_named("sparsevlm", official_quirks=True).select(tokens, 5)
    assert release.order[:5].tolist() == [0, 1, 2, 3, 4] and "no_raters" in release.quirks


def test_sparsevlm_two_nearest_neighbours_are_not_both_centres():
    """The densest two are as dense, so neither has a denser state near it; no random numbers are needed to tell them apart."""
    states = torch.tensor([0, 0.1, 5, 6, 7.2, 8.5, 10, 12, 14, 17, 20])[:, None]
    assert clusters(states, 2).tolist() == [0, 0] + [1] * 9
    tied = clusters(states, 2, noise=torch.zeros(11))
    assert tied[:2].tolist() == [0, 1]


def test_sparsevlm_schedules():
    published = {"2/3": [300, 200, 110], "7/9": [303, 110, 36], "5/6": [238, 48, 26], 0.889: [66, 30, 17]}
    for rate, counts in published.items():
        method = method_named("sparsevlm", rate)
        assert [method.keep_at(stage, 576) for stage in method.stages(32)] == counts
    for schedule in ("288/144/72", "0.5/0.25/0.125"):
        method = method_named("sparsevlm", 0.3, schedule=schedule)
        assert [method.keep_at(stage, 1152) for stage in method.stages(32)] == [576, 288, 144]
    with pytest.raises(ConfigError, match=r"got 0\.5, expected 2/3, 7/9, 5/6 or 8/9"):
        method_named("sparsevlm", 0.5)
    for schedule in ("300/200", "100/200/50", "0/0/0", "1.5/1/1", "600/1/1", "a/b/c", ""):
        with pytest.raises(ConfigError, match="schedule: got"):
            method_named("sparsevlm", schedule=schedule)


# ---- VScan
@given(seed=st.integers(0, 10**6), grid=st.sampled_from([(24, 24), (4, 4), (9, 14), (7, 23), (3, 8), (1, 2)]), share=st.floats(0, 1))
def test_vscan_is_the_slow_loop(seed: int, grid: tuple[int, int], share: float):
    scene = Scene(seed, *grid)
    tokens, keep = scene.tokens(), int(share * grid[0] * grid[1])
    got = method_named("vscan").select(tokens, keep)
    assert {*got.order.tolist()} == slow_vscan(scene, keep) and len(got.order) == keep
    if keep == 0:
        return
    # every dropped token is in the mean of the kept one that resembles it most
    states = tokens.hidden_states.double().numpy()
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    kept = got.keep.tolist()
    bags: dict[int, list[int]] = {i: [i] for i in kept}
    for i in {*range(scene.n_visual)} - {*kept}:
        bags[max(kept, key=lambda j: unit[i] @ unit[j])].append(i)
    expected = np.stack([states[bags[i]].mean(0) for i in kept])
    assert np.abs(got.hidden_states.double().numpy() - expected).max() < 1e-5


def test_vscan_budgets():
    def counts(rate: object, n_layers: int = 32, **params: object) -> list[int]:
        method = method_named("vscan", rate, **params)
        return [method.keep_at(stage, 576) for stage in method.stages(n_layers)]

    assert [counts(rate) for rate in PUBLISHED_RATES] == [[288, 96], [192, 64], [96, 32]]
    assert counts("8/9", budget="kept") == [192, 64]
    assert counts("8/9", second_stage=False) == counts("8/9", n_layers=1) == [64]
    assert counts("1/4") == [576, 288]
    assert counts("1/9", budget="kept") == [576, 512]
    odd = method_named("vscan", "8/9").stages(27)
    assert [stage.layer for stage in odd] == [0, 14] and (14 * odd[0].share + 13 * odd[1].share) / 27 == Fraction(1, 9)


def test_vscan_second_stage_reads_the_language_model_only():
    scene = Scene(9, 4, 5)
    tokens = scene.tokens(torch.arange(3, 18), stage=1)
    object.__setattr__(tokens, "vision", None)
    got = method_named("vscan").select(tokens, 4)
    assert got.order.tolist() == tokens.own_attention.sort(descending=True, stable=True).indices[:4].tolist()
    assert got.hidden_states is None


def test_vscan_quirks():
    scene = Scene(10, 24, 24)
    sane, release = (method_named("vscan", official_quirks=quirks) for quirks in (False, True))
    for keep, released in ((101, 99), (77, 71), (1, 1), (96, 96)):
        found = [method.select(scene.tokens(), keep) for method in (sane, release)]
        assert [len(selection.order) for selection in found] == [keep, released]
        assert all(("count" in selection.quirks) == (keep != released) for selection in found)
    tokens = scene.tokens()
    tokens.vision.cls_attention[-2].zero_()
    found = [method.select(tokens, 96) for method in (sane, release)]
    assert len(found[0].order) == 96 > len(found[1].order)
    assert all("chosen_twice" in selection.quirks for selection in found)
    assert sane.select(Scene(11, 3, 8).tokens(), 5).quirks == {"small_grid"}


def test_vscan_frames_have_windows_of_their_own():
    scene = Scene(12, 8, 4)
    tokens = scene.tokens()
    object.__setattr__(tokens, "grid", (4, 4))
    object.__setattr__(tokens, "coords", torch.stack([torch.arange(32) // 16, torch.arange(32) % 16 // 4, torch.arange(32) % 4], -1))
    local = local_choice(tokens.vision.cls_attention[5].mean(0), tokens.coords, tokens.grid, 8)
    assert (local < 16).sum() == (local >= 16).sum() == 2


# ---- MustDrop
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 13), cols=st.integers(1, 13), views=st.integers(1, 3), cls=st.booleans())
def test_mustdrop_inside_the_tower_is_the_slow_loop(seed: int, rows: int, cols: int, views: int, cls: bool):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(views, cls + rows * cols, 4, generator=generator) * torch.rand(views, cls + rows * cols, 1, generator=generator)
    states = flat + 0.8
    method = method_named("mustdrop", window_threshold=0.5)
    groups = method.inside_tower(states, (rows, cols))
    assert groups.tolist() == slow_inside(states[:, int(cls) :].double().numpy(), (rows, cols), 0.5)
    merged = method.merged_inside(states, groups)
    for view, group, before in zip(merged, groups, states, strict=True):
        assert torch.equal(view[: int(cls)], before[: int(cls)])
        for number in range(int(group.max()) + 1):
            assert torch.allclose(view[cls + number], before[int(cls) :][group == number].mean(0), atol=1e-5)
    assert torch.equal(method_named("mustdrop", 0).inside_tower(states, (rows, cols))[0], torch.arange(rows * cols))


@given(scene=SCENES, thresholds=st.sampled_from([(0.001, 0.001), (0.03, 0.2), (0.2, 0.9), (0.9, 0.01)]))
def test_mustdrop_filter_is_the_slow_loop(scene: Scene, thresholds: tuple[float, float]):
    overall, individual = thresholds
    method = method_named("mustdrop", thresholds=f"{overall}/{individual}")
    ids, memory = torch.arange(scene.n_visual), {}
    heads = scene.tokens().vision.cls_attention[-1].mean(0).tolist()
    key = sorted(range(scene.n_visual), key=lambda i: (-heads[i], i))[: math.ceil(0.08 * scene.n_visual)]
    for number in range(4):
        tokens = scene.tokens(ids, stage=number, memory=memory)
        got = method.select(tokens, 0)
        attention = tokens.text_attention(None).double()
        total = float(attention.sum())
        expected = [
            i
            for i, name in enumerate(ids.tolist())
            if name in key or float(attention[:, i].sum()) >= overall * total or max(attention[:, i].tolist(), default=0) >= individual
        ]
        assert got.keep.tolist() == expected
        ids = ids[got.keep]
    assert memory["key_set"].tolist() == key and torch.isin(memory["key_set"], ids).all()


def test_mustdrop_key_sets_of_views():
    """Of each view its own share; newline tokens are in none of them."""
    scene = Scene(13, 6, 10)
    tokens = scene.tokens()
    coords = torch.stack([torch.arange(60) // 30, torch.arange(60) % 30 // 10, torch.arange(60) % 10], -1)
    coords[::7] = -1
    object.__setattr__(tokens, "coords", coords)
    method_named("mustdrop", key_share=0.2).select(tokens, 1)
    weights = tokens.vision.cls_attention[-1].mean(0)
    views = [[i for i in range(60) if coords[i].tolist()[0] == view] for view in (0, 1)]
    expected = [sorted(view, key=lambda i: -float(weights[i]))[: math.ceil(0.2 * len(view))] for view in views]
    assert tokens.memory["key_set"].tolist() == [*itertools.chain(*expected)]


def test_mustdrop_key_set_goes_by_original_numbers():
    tokens = Scene(14, 5, 5).tokens(torch.arange(10, 25))
    method_named("mustdrop").select(tokens, 1)
    best = tokens.vision.cls_attention[-1].mean(0).sort(descending=True).indices[:2]  # ceil(0.08 * 15)
    assert tokens.memory["key_set"].tolist() == (best + 10).tolist()


def test_mustdrop_thresholds_and_caches():
    assert [method_named("mustdrop", rate)._thresholds() for rate in PUBLISHED_RATES] == [(0.001, 0.001), (0.0012, 0.001), (0.011, 0.01)]
    assert method_named("mustdrop", 0.3, thresholds="0.005/0.001")._thresholds() == (0.005, 0.001)
    assert method_named("mustdrop").cached_as_last(32) == range(2, 15)
    with pytest.raises(ConfigError, match=r"got 0\.3, expected 2/3, 7/9 or 8/9"):
        method_named("mustdrop", 0.3)
    for wrong in ({"thresholds": "0.1"}, {"thresholds": "-1/2"}, {"key_share": 0}, {"window_threshold": -2}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: got"):
            method_named("mustdrop", **wrong)
