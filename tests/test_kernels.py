"""Kernels against the plain loops, token for token: on a GPU where there is one, otherwise in Triton's interpreter on the CPU."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import test_golden_vlmpruner as golden
import torch
from every_field import afresh, mapped
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden_vlmpruner import corner_files  # noqa: F401 (a fixture)
from test_pruners_properties import Draw, pruner_named
from thinning import only, some
from torch import Tensor
from toy_pruners import IN_MODEL, KeyNorm, NoCheck, StateNorm

from vlm_pruner_eval import PruningError, Selection, VisualTokens, kernels
from vlm_pruner_eval.pruners import padding
from vlm_pruner_eval.pruners.aggregation import merge_batch, plan_merge
from vlm_pruner_eval.pruners.base import unit_rows
from vlm_pruner_eval.pruners.bss import BssScores, Growth, places
from vlm_pruner_eval.pruners.divprune import by_kernel, by_steps
from vlm_pruner_eval.pruners.padding import groups, padded, products
from vlm_pruner_eval.pruners.uniform import Uniform
from vlm_pruner_eval.pruners.vlm_pruner import farthest_of_batch, farthest_points
from vlm_pruner_eval.speed.bench_selection import image_tokens

pytest.importorskip("triton", reason="kernels need Triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
interpreted = pytest.mark.skipif(DEVICE.type == "cuda", reason="tensors are on the CPU, where Triton has to interpret kernels")
FEW = settings(max_examples=20)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take kernels on the CPU too, if tests have Triton interpret them there; images of each launch of the growth."""
    from vlm_pruner_eval.kernels import bss_kernel

    launches: list[int] = []
    grow = bss_kernel.grow

    def counted(similarity: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        launches.append(len(similarity))
        return grow(similarity, *args, **kwargs)

    monkeypatch.setattr(kernels, "usable", lambda device, n_visual=1: True)
    monkeypatch.setattr(bss_kernel, "grow", counted)
    return launches


# ---- the growth
@dataclass(frozen=True)
class Image:
    """Cosines and places of the tokens of one image, and what is asked of them."""

    similarity: Tensor
    coords: Tensor
    grid: tuple[int, int]
    start: Tensor
    keep: int


@dataclass(frozen=True)
class Rules:
    threshold: float = 0.8
    step: float = 0.1
    weight: float = 0.5
    block: int = 16
    stop: bool = False


def image(draw: Draw, pivots: int = 4) -> Image:
    tokens = draw.tokens()
    unit = unit_rows(tokens.hidden_states.float())
    start = torch.randperm(draw.n_visual, generator=torch.Generator().manual_seed(draw.seed))[:pivots]
    return Image(unit @ unit.T, tokens.coords, tokens.grid, start[: draw.keep], draw.keep)


def plain(one: Image, rules: Rules) -> tuple[list[int], bool]:
    growth = Growth(threshold=rules.threshold, step=rules.step, block=rules.block, stop_on_stall=rules.stop)
    order, stalled = growth.order(BssScores(one.similarity, one.coords, one.grid, rules.weight), one.start, one.keep)
    return order.tolist(), stalled


def launched(images: list[Image], rules: Rules) -> tuple[Tensor, Tensor]:
    from vlm_pruner_eval.kernels.bss_kernel import grow

    width = max(len(one.similarity) for one in images)
    similarity = torch.full((len(images), width, width), 5.0)  # padding of any finite value
    for square, one in zip(similarity, images, strict=True):
        square[: len(one.similarity), : len(one.similarity)] = one.similarity
    coords = padded([places(one.coords).T for one in images]).mT.contiguous()
    counts = torch.tensor([(len(one.similarity), one.keep, len(one.start)) for one in images])
    numbers = [(rules.threshold, rules.step, rules.weight / math.hypot(*one.grid)) for one in images]
    given = (similarity, coords, padded([one.start for one in images]), counts, torch.tensor(numbers, dtype=torch.float64))
    columns = max(max(one.keep, len(one.start)) for one in images)
    order, found = grow(*(part.to(DEVICE) for part in given), columns, block=rules.block, stop=rules.stop)
    return order.cpu(), found.cpu()


def assert_as_plain(images: list[Image], rules: Rules) -> list[bool]:
    """Returns which of them stalled."""
    order, found = launched(images, rules)
    expected = [plain(one, rules) for one in images]
    for chosen, (n, stalled, lowest), (wanted, stall) in zip(order.tolist(), found.tolist(), expected, strict=True):
        assert chosen[: int(n)] == wanted
        assert (bool(stalled), lowest) == (stall, 0)
    return [stall for _, stall in expected]


def draws(most_rows: int = 6) -> st.SearchStrategy[Draw]:
    """Images of 1 to 3 frames, some with newline tokens, coarse ones with many exact ties."""
    return st.builds(
        Draw,
        seed=st.integers(0, 10**6),
        frames=st.integers(1, 3),
        rows=st.integers(1, most_rows),
        cols=st.integers(1, most_rows),
        newlines=st.integers(0, 4),
        width=st.integers(1, 6),
        n_text=st.just(1),
        dtype=st.just(torch.float32),
        coarse=st.booleans(),
        keep_of_1000=st.integers(0, 1000),
    )


RULES = st.builds(
    Rules,
    threshold=st.sampled_from([0.8, 0.0, -0.5, 2.0]),
    step=st.sampled_from([0.1, 0.05, 1e-3, 7.0]),
    weight=st.sampled_from([0.5, 0.0, 3.0]),
    block=st.integers(1, 20),
    stop=st.booleans(),
)


@settings(max_examples=6)
@given(drawn=st.lists(draws(), min_size=1, max_size=3), pivots=st.integers(1, 6), rules=RULES)
def test_the_growth_is_that_of_the_plain_loop(drawn: list[Draw], pivots: int, rules: Rules):
    assert_as_plain([image(draw, pivots) for draw in drawn], rules)


@settings(max_examples=3)
@given(draw=draws(10), rules=RULES)
def test_the_growth_of_larger_images(draw: Draw, rules: Rules):
    """Up to 300 tokens, beside a small image in the same batch."""
    assert_as_plain([image(draw), image(dataclasses.replace(draw, frames=1, rows=2, cols=3))], dataclasses.replace(rules, block=16))


def photo(n_visual: int, rate: float) -> Image:
    tokens = image_tokens(n_visual, 64, torch.device("cpu"))
    unit = unit_rows(tokens.hidden_states)
    return Image(unit @ unit.T, tokens.coords, tokens.grid, torch.tensor([n_visual - 1, 0, 7, 100]), round(n_visual * (1 - rate)))


@pytest.mark.slow
def test_the_growth_at_the_size_of_the_paper():
    assert_as_plain([photo(576, 0.889), photo(576, 0.95)], Rules())


@pytest.mark.slow
def test_the_growth_of_three_thousand_tokens():
    assert_as_plain([photo(3000, 0.97)], Rules())


def flat(n_visual: int, cosines: list[float]) -> Image:
    """A row of tokens of which token i has the same cosine, `cosines[i]`, to all others."""
    values = torch.tensor(cosines)
    similarity = torch.maximum(values[:, None], values[None])
    coords = torch.stack([torch.zeros(n_visual), torch.zeros(n_visual), torch.arange(n_visual)], 1).long()
    return Image(similarity, coords, (1, n_visual), torch.tensor([0]), n_visual)


COSINES = [-1.0, 0.7, 0.8, 0.8, 0.9, -0.25, 0.0, -0.0, 1e-40, 0.99999994, 0.7, 3e38]


LADDERS = itertools.product((0.7, 0.8, -1e300, -1e-7, 0.0), (0.1, 0.3, 1e-9, 1e-300, 1e300))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's, of rungs and thresholds that are then not taken
@pytest.mark.parametrize(
    ("threshold", "step"), some(itertools.product((0.7, 0.8, -1e300, -1e-7, 0.0), (0.1, 0.3, 1e-9, 1e-300, 1e300)), 13)
)
def test_the_ladder_of_thresholds_is_the_same_to_the_bit(threshold: float, step: float):
    """Scores that are float32's 0.7 or 0.8 at a threshold of that, steps below the spacing of floats, and jumps over many rungs."""
    for block in (1, 16):
        stalls = assert_as_plain([flat(12, COSINES), flat(5, COSINES[3:8])], Rules(threshold, step, weight=0.0, block=block))
        assert block > 1 or any(stalls)


def test_a_block_may_be_larger_than_all_tokens():
    assert_as_plain([photo(112, 0.5)], Rules(block=10**15))
    assert_as_plain([photo(112, 0.9)], Rules(block=97, threshold=3.0))


def test_scores_that_no_threshold_is_above_end_the_growth():
    one = flat(6, [math.inf] * 6)
    (order,), ((n, stalled, lowest),) = launched([one], Rules())
    assert (n, stalled, lowest) == (1, 1, math.inf) and order[0] == 0
    with pytest.raises(PruningError, match="best score of a candidate is inf"):
        plain(one, Rules())


@pytest.mark.parametrize("bad", some([math.nan, math.inf, -math.inf], 3))
def test_bad_numbers_end_in_indices_in_range(bad: float):
    """They are refused when the answer arrives, so that there has to be one."""
    one = photo(120, 0.5)
    one.similarity[5], one.similarity[:, 9] = bad, -bad
    order, _ = launched([one], Rules(stop=False))
    assert order.min() >= 0 and order.max() < 120
    from vlm_pruner_eval.kernels.max_min_kernel import max_min

    order, _ = max_min(one.similarity[None].to(DEVICE), torch.tensor([5], device=DEVICE), torch.tensor([[120, 60]], device=DEVICE), 60)
    assert order.min() >= 0 and order.max() < 120


# ---- the pivots
@given(drawn=st.lists(draws(), min_size=1, max_size=4), count=st.integers(1, 7))
def test_pivots_of_a_batch(drawn: list[Draw], count: int):
    keys = [draw.tokens().keys.flatten(1) for draw in drawn]
    lengths = torch.tensor([*map(len, keys)])
    pivots, repeated = farthest_of_batch(padded(keys), lengths, count)
    for one, found, again in zip(keys, pivots, repeated, strict=True):
        expected, would = farthest_points(one, count)
        assert found[: len(expected)].tolist() == expected.tolist() and bool(again) == bool(would)


# ---- the merge
@given(drawn=st.lists(draws(), min_size=1, max_size=4), plain_sum=st.booleans())
def test_the_merge_of_a_batch(drawn: list[Draw], plain_sum: bool):
    """Sums in float64 and in the same order; what differs is the sum of the states, in float32."""
    states = [dataclasses.replace(draw, width=drawn[0].width).tokens().hidden_states for draw in drawn]
    squares = [unit_rows(one) @ unit_rows(one).T for one in states]
    generator = torch.Generator().manual_seed(drawn[0].seed)
    orders = [torch.randperm(draw.n_visual, generator=generator)[: draw.keep] for draw in drawn]
    lengths, sizes = torch.tensor([*map(len, states)]), torch.tensor([*map(len, orders)])
    similarity = products([unit_rows(one) for one in states])
    how = {"self_weight": 0.3, "plain_sum": plain_sum}
    merged, cancelled, amplification = merge_batch(similarity, padded(states), padded(orders), lengths, sizes, **how)
    for i, (one, square, order) in enumerate(zip(states, squares, orders, strict=True)):
        plan = plan_merge(square, order, **how)
        assert (bool(cancelled[i]), amplification[i].item()) == (plan.cancelled, pytest.approx(plan.amplification, rel=1e-9))
        expected = plan.apply(one)
        torch.testing.assert_close(merged[i, : len(order)], expected, rtol=1e-5, atol=1e-6 * max(1.0, plan.amplification))


# ---- max-min
@FEW
@given(drawn=st.lists(draws(), min_size=1, max_size=3))
def test_max_min_is_that_of_the_plain_loop(drawn: list[Draw]):
    states, keeps = [draw.tokens().hidden_states.to(DEVICE) for draw in drawn], [draw.keep for draw in drawn]
    for one, keep, (order, repeats) in zip(states, keeps, by_kernel(states, keeps), strict=True):
        expected, would = by_steps(one, keep)
        assert order.tolist() == expected.tolist() and bool(repeats) == bool(would)


def test_max_min_at_the_size_of_the_paper():
    states = [image_tokens(n, 64, torch.device("cpu")).hidden_states.to(DEVICE) for n in (576, 300)]
    for one, keep, (order, _) in zip(states, (64, 300), by_kernel(states, (64, 300)), strict=True):
        assert order.tolist() == by_steps(one, keep)[0].tolist()


# ---- whole methods
def there(tokens: VisualTokens) -> VisualTokens:
    return mapped(tokens, lambda tensor: tensor.to(DEVICE))


GOLDEN = {"case_02", "case_23", "case_28", "case_29"}  # of 576, 384 and 63 tokens
ALONE = [("vlmpruner", False), ("divprune", True)]  # by default
DRAWN = [
    Draw(1, 1, 6, 7, 0, 9, 3, torch.float32, False, 300),
    Draw(2, 2, 4, 4, 3, 9, 4, torch.float32, True, 500),
    Draw(3, 1, 1, 1, 0, 9, 2, torch.float32, False, 1000),
    Draw(4, 1, 5, 5, 0, 9, 0, torch.float32, False, 0),
    Draw(5, 3, 3, 3, 0, 9, 1, torch.float32, True, 1000),
    Draw(6, 1, 4, 8, 2, 9, 5, torch.float32, False, 60),
]


def assert_same(got: Selection, expected: Selection) -> None:
    assert got.order.tolist() == expected.order.tolist() == got.host_order.tolist()
    assert got.quirks == expected.quirks and (got.hidden_states is None) == (expected.hidden_states is None)
    if expected.hidden_states is not None:
        torch.testing.assert_close(got.hidden_states, expected.hidden_states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "quirks"), only(itertools.product(("vlmpruner", "divprune"), (False, True)), ALONE))
def test_a_batch_by_kernels_is_what_the_plain_loops_choose(method: str, quirks: bool, monkeypatch: pytest.MonkeyPatch):
    """Images of different sizes, keep 0 and keep V, fewer than pivots, several frames, newline tokens, ties; in parts or at once."""
    given = [there(draw.tokens()) for draw in DRAWN]
    keeps = [draw.keep for draw in DRAWN]
    fired = set()
    for params in ({}, *([{"merge": False, "pivots": 9}, {"threshold": -2.0}] if method == "vlmpruner" else [])):
        pruner = pruner_named(method, official_quirks=quirks, **params)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "usable", lambda device, n_visual=1: False)
            expected = [pruner.select(*one) for one in zip(given, keeps, strict=True)]
        fired |= {quirk for one in expected for quirk in one.quirks}
        for most_bytes in (2**31, 1) if method == "divprune" or params else (2**31,):
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "usable", lambda device, n_visual=1: True)
                patch.setattr(padding, "MOST_BYTES", most_bytes)
                got = pruner.select_batch(given, keeps)
            for one, other in zip(got, expected, strict=True):
                assert_same(one, other)
    assert method == "divprune" or fired >= {"stall", "fewer_than_pivots", "repeated_pivots"}


@pytest.mark.parametrize(
    "case", only([case for case in golden.CASES if case["id"] in GOLDEN], [case for case in golden.CASES if case["id"] == "case_02"])
)
@interpreted
def test_what_the_release_answered(case: dict, forced: list[int]):
    golden.test_case(case, quirks=case["id"] == "case_29")
    assert forced, "the plain loop answered"


# before anything is chosen
REFUSED = {"nan_hidden_row", "nan_hidden_elem", "nan_key", "batch_zero", "pivots_zero", "length_past_end", "length_zero", "qwen_zero_hw"}


@pytest.mark.parametrize("name", some(golden.EXPECTED, 8))
@interpreted
def test_what_the_release_answered_in_corners(name: str, corner_files, forced: list[int]):  # noqa: F811
    for quirks in (False, True):
        forced.clear()
        golden.test_corner(name, quirks, corner_files)
        assert bool(forced) == (name not in REFUSED), "the plain loop answered, or what is refused was launched"


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("method", ["vlmpruner", "divprune"])
def test_bad_tokens_of_one_image_are_refused_by_its_name(method: str):
    given = [there(draw.tokens()) for draw in DRAWN]
    given[1].hidden_states[3] = math.nan
    with pytest.raises(PruningError, match=r"'sample 2': hidden_states holds NaN or infinity in 1 of 35 tokens \(first: token 3\)"):
        pruner_named(method).select_batch(given, [draw.keep for draw in DRAWN])


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.usefixtures("forced")
def test_a_weight_that_no_threshold_is_above_is_a_sentence():
    tokens = DRAWN[0].tokens()
    alike = there(dataclasses.replace(tokens, hidden_states=tokens.hidden_states + 5))  # no cosine is below 0
    with pytest.raises(PruningError, match=r"best score of a candidate is inf; lower spatial_weight \(got 1e\+40\)"):
        pruner_named("vlmpruner", spatial_weight=1e40, threshold_step=1e9).select_batch([alike], [42])


# ---- select_batch of every method
@pytest.mark.parametrize("method", [*IN_MODEL, "keynorm", "statenorm", "nocheck"])
def test_a_batch_is_the_images_one_by_one(method: str):
    own = {"keynorm": KeyNorm(pruning_rate=0.5, merge=True), "statenorm": StateNorm(pruning_rate=0.5)}
    own["nocheck"] = NoCheck(pruning_rate=0.5, fault="all")
    pruner = own[method] if method in own else pruner_named(method)
    given = [draw.tokens() for draw in DRAWN]
    for keeps in (None, [draw.keep for draw in DRAWN]):
        if method == "nocheck" and keeps is None:
            continue
        got = pruner.select_batch([*map(afresh, given)], keeps)
        for i, (one, tokens) in enumerate(zip(got, map(afresh, given), strict=True)):
            alone = pruner.select(tokens, keeps and keeps[i])
            assert torch.equal(one.order, alone.order) and one.quirks == alone.quirks
            assert one.hidden_states is alone.hidden_states is None or torch.equal(one.hidden_states, alone.hidden_states)
    assert pruner.select_batch([]) == []


def test_a_choice_of_its_own_is_made_in_a_batch_too():
    """In place of the `choose_batch` of the method that it is made from."""

    class Backwards(Uniform):
        def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
            return super().choose(tokens, keep).flip(0)

    given = [draw.tokens() for draw in DRAWN]
    for one, plainly in zip(Backwards(pruning_rate=0.5).select_batch(given), Uniform(pruning_rate=0.5).select_batch(given), strict=True):
        assert one.order.tolist() == plainly.order.tolist()[::-1]


def test_counts_that_do_not_fit_the_batch():
    with pytest.raises(PruningError, match="got 1 numbers of tokens to keep for 2 images"):
        pruner_named("fastv").select_batch([DRAWN[0].tokens()] * 2, [3])
    with pytest.raises(PruningError, match=r"sample 2'.*asked to keep 99 of 35"):
        pruner_named("fastv").select_batch([draw.tokens() for draw in DRAWN[:2]], [3, 99])


# ---- where kernels are used
def test_kernels_need_a_gpu_and_triton(monkeypatch: pytest.MonkeyPatch):
    assert not kernels.usable(torch.device("cpu")) and not kernels.usable(torch.device("meta"))
    assert kernels.usable(torch.device("cuda"), kernels.MOST_TOKENS) and not kernels.usable(torch.device("cuda"), kernels.MOST_TOKENS + 1)
    monkeypatch.setitem(sys.modules, "triton", None)
    kernels._has_triton.cache_clear()
    assert not kernels.usable(torch.device("cuda"))
    monkeypatch.undo()
    kernels._has_triton.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has compilers for Linux only")
def test_kernels_compile_for_a_gpu(tmp_path: Path):
    """Without one at hand; a fused multiply-add would round otherwise than the plain loop."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).parent / "compiled_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["_grow", "0", "_max_min", "0", "_determinant", "0", "_coverage", "0"]


CUTS = {(5,): [1], (100, 100, 100): [2, 3], (10,) * 9: [9], (900, 10, 10): [1, 3], (10, 900): [1, 2]}


@pytest.mark.parametrize("counts", CUTS)
def test_batches_are_cut_where_the_memory_ends(counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(padding, "MOST_BYTES", 4 * 20000)
    parts = [*groups(counts)]
    assert [part.stop for part in parts] == CUTS[counts] and [part.start for part in parts] == [0, *CUTS[counts][:-1]]
