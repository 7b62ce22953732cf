"""The controls (random, uniform, pool, downsample, blind, none), and the corners of VLM-Pruner's own parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import prompts

from vlm_pruner_eval import ConfigError, PruningError, Stage, VisualTokens, get_pruner, prune
from vlm_pruner_eval.pruners.downsample import smaller_grid
from vlm_pruner_eval.pruners.pool import cell_of
from vlm_pruner_eval.pruners.random import stable_seed


def image(rows: int = 24, cols: int = 24, *, frames: int = 1, sample_id: str | None = "a") -> VisualTokens:
    cells = [(f, r, c) for f in range(frames) for r in range(rows) for c in range(cols)]
    return VisualTokens(torch.zeros(len(cells), 1), grid=(rows, cols), coords=torch.tensor(cells), sample_id=sample_id)


# ---- random
def drawn(seed: int, sample_id: str | None, keep: int = 64) -> list[int]:
    return get_pruner("random", pruning_rate=0.5, seed=seed).select(image(sample_id=sample_id), keep).order.tolist()


def test_random_depends_on_seed_and_sample_only():
    assert drawn(0, "a") == drawn(0, "a")
    assert len({tuple(drawn(seed, name)) for seed in (0, 1) for name in ("a", "b", None)}) == 6
    assert drawn(1, "1") != drawn(11, ""), "seed and sample must not run together"


def test_random_seeds_do_not_depend_on_the_process():
    """Python's own hash of a text changes from process to process; SHA-256 does not."""
    assert [stable_seed(0, "a"), stable_seed(3, None)] == [739273521946992771, 6504113113311635732]


def test_random_is_even():
    """Over 400 samples every token is kept about equally often: 400 * 64 / 576 = 44 times, standard deviation 6.3."""
    counts = torch.zeros(576)
    for sample in range(400):
        counts[drawn(0, str(sample))] += 1
    assert counts.min() > 44.4 - 5 * 6.3 and counts.max() < 44.4 + 5 * 6.3


# ---- uniform
@pytest.mark.parametrize("keep", [192, 128, 64])
@pytest.mark.parametrize("rows, cols", [(24, 24), (27, 27), (16, 24), (20, 36)])
def test_uniform_spreads_over_rows_and_columns(rows: int, cols: int, keep: int):
    order = get_pruner("uniform", pruning_rate=0.5).select(image(rows, cols), keep).order
    for counts in (torch.bincount(order // cols, minlength=rows), torch.bincount(order % cols, minlength=cols)):
        assert counts.min() >= 1, "a row or a column is missed"
        assert (counts - keep / len(counts)).abs().max() <= 2


def test_uniform_is_a_lattice_in_two_dimensions():
    """Kept tokens keep their distance: on average the nearest other one is farther than half of a square lattice's spacing."""
    order = get_pruner("uniform", pruning_rate=0.5).select(image(), 64).order
    cells = torch.stack([order // 24, order % 24], dim=1).double()
    nearest = torch.cdist(cells, cells).fill_diagonal_(torch.inf).amin(1)
    assert nearest.mean() > 0.7 * 3 and nearest.min() >= 2**0.5  # a square lattice of 64 in 576 has spacing 3


def test_uniform_spreads_over_frames_and_newlines():
    order = get_pruner("uniform", pruning_rate=0.5).select(image(8, 8, frames=6), 96).order
    assert (torch.bincount(order // 64, minlength=6) - 16).abs().max() <= 3
    cells = [cell for row in range(24) for cell in [*((0, row, col) for col in range(24)), (0, -1, -1)]]
    tokens = VisualTokens(torch.zeros(600, 1), grid=(24, 24), coords=torch.tensor(cells))
    kept = get_pruner("uniform", pruning_rate=0.5).select(tokens, 200).keep
    newlines = kept[kept % 25 == 24] // 25
    assert 7 <= len(newlines) <= 9, "a third of the 24 newline tokens"
    assert newlines.diff().max() <= 5, "spread along the image"


# ---- pool
@dataclass(frozen=True)
class Grids:
    """Frames of one size, newline tokens behind them, and how many cells are wanted."""

    frames: int
    rows: int
    cols: int
    newlines: int
    keep_of_1000: int

    @property
    def places(self) -> int:
        return self.frames * self.rows * self.cols

    @property
    def keep(self) -> int:
        return round((self.places + self.newlines) * self.keep_of_1000 / 1000)

    @property
    def coords(self) -> torch.Tensor:
        cells = [(f, r, c) for f in range(self.frames) for r in range(self.rows) for c in range(self.cols)]
        return torch.tensor(cells + [(0, -1, -1)] * self.newlines)


GRIDS = st.builds(
    Grids,
    frames=st.integers(1, 4),
    rows=st.integers(1, 12),
    cols=st.integers(1, 12),
    newlines=st.integers(0, 3),
    keep_of_1000=st.integers(0, 1000),
)


def members(coords: torch.Tensor, keep: int) -> dict[int, list[tuple[int, int, int]]]:
    """Coordinates of the tokens of every cell; -1 holds those that are in none."""
    found = defaultdict(list)
    for cell, where in zip(cell_of(coords, keep).tolist(), coords.tolist(), strict=True):
        found[cell].append(tuple(where))
    return found


@given(grids=GRIDS)
def test_pool_has_exactly_r_cells_that_are_rectangles_of_like_size_and_cover_the_grid(grids: Grids):
    cells = members(grids.coords, grids.keep)
    left_out = cells.pop(-1, [])
    assert sorted(cells) == [*range(grids.keep)]
    covered = set()
    for tokens in cells.values():
        frames, rows, cols = (sorted(set(values)) for values in zip(*tokens, strict=True))
        assert len(tokens) == len(frames) * len(rows) * len(cols) and len(frames) == 1
        assert (rows[-1] - rows[0], cols[-1] - cols[0]) == (len(rows) - 1, len(cols) - 1)
        covered.add(frames[0])
    assert {frame for frame, row, _ in left_out if row >= 0}.isdisjoint(covered), "a frame that has cells is covered by them"
    assert len(covered) == min(grids.frames, grids.keep)
    if grids.keep > grids.places:  # each token is a cell, newline tokens too
        return
    counts = [sum(tokens[0][0] == frame for tokens in cells.values()) for frame in range(grids.frames)]
    assert max(counts) - min(counts) <= 1, "frames share the cells"
    for frame in range(grids.frames):
        heights = [len({row for _, row, _ in tokens}) for tokens in cells.values() if tokens[0][0] == frame]
        assert not heights or max(heights) - min(heights) <= 1


@given(grids=GRIDS)
def test_pool_means_are_those_of_a_slow_loop_and_stand_nearest_to_the_centre(grids: Grids):
    generator = torch.Generator().manual_seed(grids.places)
    coords, keep = grids.coords, grids.keep
    states = torch.randn(len(coords), 5, generator=generator)
    got = get_pruner("pool", pruning_rate=0.5).select(VisualTokens(states, grid=(grids.rows, grids.cols), coords=coords), keep)
    cell = cell_of(coords, keep).tolist()
    assert sorted(cell[token] for token in got.keep.tolist()) == [*range(keep)], "one token of every cell"
    for token, mean in zip(got.keep.tolist(), got.hidden_states, strict=True):
        own = [other for other in range(len(cell)) if cell[other] == cell[token]]
        assert torch.allclose(mean, sum(states[other] for other in own) / len(own), atol=1e-5)
        centre = [sum(coords[other][axis].item() for other in own) / len(own) for axis in (1, 2)]
        away = {other: math.dist(centre, coords[other][1:].tolist()) for other in own}
        assert away[token] <= min(away.values()) + 1e-9


def test_pool_of_64_in_576_is_average_pooling_by_three_and_other_cells_are_near_square():
    states = torch.randn(576, 7, generator=torch.Generator().manual_seed(0))
    got = get_pruner("pool", pruning_rate="8/9").select(VisualTokens(states, grid=(24, 24)))
    expected = torch.nn.functional.avg_pool2d(states.T.reshape(7, 24, 24), 3).flatten(1).T
    assert torch.allclose(got.hidden_states, expected, atol=1e-6)
    assert got.keep.tolist() == [24 * row + col for row in range(1, 24, 3) for col in range(1, 24, 3)]
    for keep in (192, 128):
        sizes = [len(tokens) for tokens in members(image().coords, keep).values()]
        assert min(sizes) >= 576 / keep / 3 and max(sizes) <= 2 * 576 / keep


def test_pool_keeps_newline_tokens_only_where_every_other_token_has_a_cell():
    coords = torch.tensor([(0, row, col) for row in range(3) for col in range(4)] + [(0, -1, -1)] * 3)
    assert [cell_of(coords, keep)[12:].ge(0).sum().item() for keep in (6, 12, 13, 15)] == [0, 0, 1, 3]
    tokens = VisualTokens(torch.arange(15.0)[:, None], grid=(3, 4), coords=coords)
    got = get_pruner("pool", pruning_rate=0.5).select(tokens, 14)
    assert torch.equal(got.hidden_states, tokens.hidden_states[got.keep]), "cells of one token are left as they are"


def test_pool_takes_rows_of_different_lengths():
    """A strip whose last row is not full, as the release lays LLaVA-NeXT's tokens out."""
    cell = torch.arange(31)
    coords = torch.stack([torch.zeros_like(cell), cell // 6, cell % 6], -1)
    for keep in range(1, 32):
        assert sorted(set(cell_of(coords, keep).tolist())) == [*range(keep)]


def test_pool_refuses_two_tokens_at_one_place():
    tokens = VisualTokens(torch.zeros(4, 2), grid=(2, 2), coords=torch.tensor([(0, 0, 0)] * 2 + [(0, 1, 1), (1, 0, 0)]), sample_id="doc 3")
    with pytest.raises(PruningError, match=r"pool: sample 'doc 3' has two tokens at one place of its grid"):
        get_pruner("pool", pruning_rate=0.5).select(tokens, 2)


@pytest.mark.parametrize("layer", [0, 3])
def test_pool_puts_the_means_where_its_layer_begins(tiny_model, layer: int):
    model, inputs, seen = tiny_model("llava"), prompts("llava", [[4, "i0", 7]]), {}
    hook = model.model.language_model.layers[layer].register_forward_pre_hook(lambda _, args: seen.setdefault("states", args[0].clone()))
    try:
        with torch.no_grad():
            model(**inputs)
            full = seen.pop("states")[0, 4:20]
        with prune(model, get_pruner("pool", pruning_rate="3/4", layer=layer)) as ledger, torch.no_grad():
            late = model.model.language_model.layers[layer].register_forward_pre_hook(lambda _, args: seen.update(late=args[0].clone()))
            model(**inputs)
            late.remove()
    finally:
        hook.remove()
    record = ledger.records[0]
    assert record.kv_lengths == [27] * layer + [15] * (5 - layer)
    expected = torch.nn.functional.avg_pool2d(full.T.reshape(-1, 4, 4), 2).flatten(1).T
    assert torch.allclose(seen["late"][0, 4:8], expected, atol=1e-5)


# ---- downsample
def test_prune_refuses_downsample_on_every_family(tiny_model, family: str):
    with pytest.raises(ConfigError, match=r"prune: got method downsample, which makes the images smaller before the model sees them"):
        prune(tiny_model(family), get_pruner("downsample", pruning_rate="8/9"))


def test_downsample_does_not_choose_among_tokens():
    pruner = get_pruner("downsample", pruning_rate="8/9")
    assert pruner.default_keep(576) == 64 and pruner.stages(32) == ()
    with pytest.raises(PruningError, match="makes images smaller before the model; use it through lmms-eval or a sweep"):
        pruner.select(image())
    for params, sentence in (
        ({"scope": "per_sample"}, "scope: got per_sample, expected per_image"),
        ({"layer": 2}, "layer: got 2, but this method acts at layer 0 only"),
        ({"positions": "contiguous"}, "positions: got 'contiguous', expected one of original"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            get_pruner("downsample", pruning_rate=0.5, **params)


@given(height=st.integers(1, 3000), width=st.integers(1, 3000), n_tokens=st.integers(1, 3000))
def test_a_smaller_grid_fits_and_keeps_the_proportions(height: int, width: int, n_tokens: int):
    rows, cols = smaller_grid(height, width, n_tokens)
    assert rows >= 1 and cols >= 1 and rows * cols <= n_tokens
    exact = min(max(1.0, math.sqrt(n_tokens * height / width)), n_tokens)
    assert abs(rows - exact) < 1 and abs(cols - n_tokens / exact) < 1
    taller, wider = (rows + 1, cols), (rows, cols + 1)
    for r, c in (taller, wider):  # one row or column more is too many, or away from the proportions
        assert r * c > n_tokens or r >= exact + 1 or c >= n_tokens / exact + 1


def test_smaller_grids_by_hand():
    assert smaller_grid(480, 640, 142) == (10, 14)
    assert smaller_grid(400, 400, 142) == (11, 12)
    assert smaller_grid(10, 2000, 64) == (1, 64)
    assert smaller_grid(300, 300, 1) == (1, 1)


# ---- blind and none
def test_blind_keeps_nothing_whatever_it_is_asked():
    blind = get_pruner("blind", pruning_rate=0.667)
    assert [stage.layer for stage in blind.stages(32)] == [0]
    assert blind.keep_at(blind.stages(32)[0], 576) == blind.keep_at(Stage(2, 1.0), 576) == blind.default_keep(576) == 0
    assert blind.select(image()).order.tolist() == blind.select(image(), 64).order.tolist() == []


def test_none_keeps_everything_and_makes_no_cut():
    plain = get_pruner("none", pruning_rate=0.667)
    assert plain.stages(32) == ()
    assert plain.default_keep(576) == 576
    assert plain.select(image()).order.tolist() == plain.select(image(), 64).order.tolist() == [*range(576)]


# ---- VLM-Pruner
def nearly_uniform() -> VisualTokens:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(16, generator=generator) + 0.1 * torch.randn(100, 16, generator=generator)
    return VisualTokens(states, grid=(10, 10), keys=torch.randn(100, 2, 4, generator=generator))


def test_a_tiny_threshold_step_ends_and_jumping_is_the_same_as_climbing():
    """A stalled pass jumps to the first rung above the lowest score: passes are bounded by R, and a start 7 rungs lower changes nothing."""
    for step in (1e-3, 1e-12, 1e-300):
        got = get_pruner("vlmpruner", pruning_rate=0.5, threshold=-5.0, threshold_step=step).select(nearly_uniform(), 40)
        assert len(got.order) == 40 and "stall" in got.quirks
    high, low = (get_pruner("vlmpruner", pruning_rate=0.5, threshold=t, threshold_step=0.125) for t in (0.875, 0.0))
    assert torch.equal(high.select(nearly_uniform(), 40).order, low.select(nearly_uniform(), 40).order)


def test_a_score_that_overflows_is_an_error():
    pruner = get_pruner("vlmpruner", pruning_rate=0.5, spatial_weight=1e300)
    zero = VisualTokens(torch.zeros(9, 4), grid=(3, 3), keys=torch.randn(9, 1, 2))
    with pytest.raises(PruningError, match="lower spatial_weight"):
        pruner.select(zero, 8)


def test_equal_keys_give_distinct_pivots():
    tokens = nearly_uniform()
    same = VisualTokens(tokens.hidden_states, grid=(10, 10), keys=torch.ones(100, 2, 4))
    for quirks in (False, True):
        got = get_pruner("vlmpruner", pruning_rate=0.5, official_quirks=quirks).select(same, 4)
        assert got.order.tolist() == [0, 1, 2, 3] and got.quirks == {"repeated_pivots"}


def test_selection_dtype_model_computes_in_the_models_dtype():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(256, 32, generator=generator).half()
    tokens = VisualTokens(states, grid=(16, 16), keys=torch.randn(256, 1, 8, generator=generator).half())
    orders = [get_pruner("vlmpruner", pruning_rate=0.5, selection_dtype=dtype).select(tokens).order for dtype in ("float32", "model")]
    assert not torch.equal(*orders)
