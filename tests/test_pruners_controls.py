"""The controls (random, uniform, blind, none), and the corners of VLM-Pruner's own parameters."""

from __future__ import annotations

import pytest
import torch

from vlm_pruner_eval import PruningError, Stage, VisualTokens, get_pruner
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


@pytest.mark.parametrize("step", [1e-3, 1e-12, 1e-300])
def test_a_tiny_threshold_step_still_ends(step: float):
    """A stalled pass jumps to the first threshold above the lowest score, so the number of passes is bounded by R."""
    got = get_pruner("vlmpruner", pruning_rate=0.5, threshold=-5.0, threshold_step=step).select(nearly_uniform(), 40)
    assert len(got.order) == 40 and "stall" in got.quirks


def test_jumping_is_the_same_as_climbing():
    """The threshold after a jump is a rung of the same ladder: a start that is 7 rungs lower changes nothing."""
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
