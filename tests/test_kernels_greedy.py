"""Kernels of determinant and coverage against the plain loops, token for token; see test_kernels.py."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import DEVICE, draws, there
from test_pruners_properties import Draw
from torch import Tensor

from vlm_pruner_eval import PruningError, VisualTokens, get_pruner, kernels
from vlm_pruner_eval.pruners import padding
from vlm_pruner_eval.pruners.base import unit_rows
from vlm_pruner_eval.pruners.determinant import NOISE, ROUNDING, by_steps, cosines_in
from vlm_pruner_eval.pruners.padding import padded
from vlm_pruner_eval.speed.bench_selection import image_tokens
from vlm_pruner_eval.types import QuestionTokens

pytest.importorskip("triton", reason="kernels need Triton")
FEW = settings(max_examples=8)  # the interpreter takes a millisecond for a step of a token


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Cosines of the tokens of an image, a weight for each, and how many to choose."""

    similarity: Tensor
    weight: Tensor
    keep: int


def weighted(draw: Draw) -> Weighted:
    unit = unit_rows(draw.tokens().hidden_states)
    return Weighted(unit @ unit.T, draw.numbers(draw.n_visual, 2)[:, 0].abs() + 1e-3, draw.keep)


def batch(images: list[Weighted]) -> tuple[Tensor, Tensor, Tensor, int]:
    """The arguments of a kernel; padding is of any finite value."""
    width = max(len(one.weight) for one in images)
    similarity = torch.full((len(images), width, width), 5.0)
    for square, one in zip(similarity, images, strict=True):
        square[: len(one.similarity), : len(one.similarity)] = one.similarity
    counts = torch.tensor([(len(one.weight), one.keep) for one in images])
    most = max(one.keep for one in images)
    return similarity.to(DEVICE), padded([one.weight for one in images]).to(DEVICE), counts.to(DEVICE), most


# ---- the determinant
def determinants(images: list[Weighted]) -> list[tuple[list[int], int]]:
    from vlm_pruner_eval.kernels.determinant_kernel import largest_determinant

    similarity, relevance, counts, most = batch(images)
    order, clear = largest_determinant(similarity, relevance, counts, NOISE, most, rounding=ROUNDING)
    return [(chosen[: one.keep].tolist(), int(n)) for one, chosen, n in zip(images, order, clear, strict=True)]


def by_plain_loop(one: Weighted) -> tuple[list[int], int]:
    order, clear = by_steps(cosines_in(one.similarity), one.weight, one.keep)
    return order.tolist(), clear


@FEW
@given(drawn=st.lists(draws(3), min_size=1, max_size=2))
def test_the_determinant_is_that_of_the_plain_loop(drawn: list[Draw]):
    """States of 1 to 6 channels: most draws run out of independent tokens, and the rest comes by relevance."""
    images = [weighted(draw) for draw in drawn]
    assert determinants(images) == [by_plain_loop(one) for one in images]


def photo(n_visual: int, keep: int) -> Weighted:
    unit = unit_rows(image_tokens(n_visual, 64, torch.device("cpu")).hidden_states)
    return Weighted(unit @ unit.T, torch.rand(n_visual, generator=torch.Generator().manual_seed(keep)) + 1e-3, keep)


def test_the_determinant_at_the_size_of_the_paper():
    images = [photo(576, 24), photo(300, 20)]
    assert determinants(images) == [by_plain_loop(one) for one in images]


# ---- the coverage
def coverages(images: list[Weighted], *, added: bool = False) -> list[tuple[list[int], bool]]:
    from vlm_pruner_eval.kernels.coverage_kernel import coverage

    order, idle = coverage(*batch(images), added=added)
    return [(chosen[: one.keep].tolist(), bool(n)) for one, chosen, n in zip(images, order, idle, strict=True)]


def by_coverage(one: Weighted, *, added: bool) -> tuple[list[int], bool]:
    """The rule as the paper writes it."""
    cover = torch.zeros(len(one.weight))
    chosen: list[int] = []
    idle = False
    for _ in range(one.keep):
        gain = (one.similarity - cover[:, None]).clamp(min=0).sum(0, dtype=torch.float64).float()
        gain = gain + one.weight if added else gain * one.weight
        gain[chosen] = -math.inf
        idle |= bool(gain.max() <= 0)
        chosen.append(int(gain.argmax()))
        cover = torch.maximum(cover, one.similarity[chosen[-1]])
    return chosen, idle


@FEW
@given(drawn=st.lists(draws(3), min_size=1, max_size=2), added=st.booleans())
def test_the_coverage_is_that_of_the_plain_loop(drawn: list[Draw], added: bool):
    images = [weighted(draw) for draw in drawn]
    assert coverages(images, added=added) == [by_coverage(one, added=added) for one in images]


def test_coverage_of_tokens_that_add_nothing():
    alike = Weighted(torch.ones(5, 5), torch.tensor([1.0, 2.0, 2.0, 1.0, 0.5]), 4)
    assert coverages([alike, photo(40, 3)])[0] == ([1, 0, 2, 3], True)
    assert not coverages([photo(40, 3)])[0][1]


def test_the_coverage_at_the_size_of_the_paper():
    images = [photo(576, 2), photo(300, 2)]
    assert coverages(images) == [by_coverage(one, added=False) for one in images]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_numbers_end_in_indices_in_range(bad: float):
    one = photo(20, 6)
    one.similarity[5], one.similarity[:, 9] = bad, -bad
    for order, _ in (*determinants([one]), *coverages([one])):
        assert min(order) >= 0 and max(order) < 20


# ---- CDPruner
DRAWN = [
    Draw(1, 1, 6, 7, 0, 50, 3, torch.float32, False, 300),
    Draw(2, 2, 4, 4, 3, 50, 4, torch.float32, True, 500),
    Draw(3, 1, 1, 1, 0, 50, 2, torch.float32, False, 1000),
    Draw(4, 1, 5, 5, 0, 50, 0, torch.float32, False, 0),
    Draw(5, 3, 3, 3, 0, 9, 1, torch.float32, True, 1000),
]


def asked(draw: Draw, n_text: int) -> VisualTokens:
    question = QuestionTokens(clip_image=draw.numbers(draw.n_visual, 8).to(DEVICE), clip_text=draw.numbers(n_text, 8).to(DEVICE))
    return dataclasses.replace(there(draw.tokens()), question=question, image=f"image {draw.seed // 2}")


@pytest.mark.parametrize("quirks", [False, True])
def test_a_batch_by_kernels_is_what_the_loop_chooses(quirks: bool, monkeypatch: pytest.MonkeyPatch):
    """Views of different sizes of several images, keep 0 and keep V, fewer independent tokens than asked, no text; in parts or at once."""
    views = [asked(draw, n_text=i) for i, draw in enumerate(DRAWN)]
    keeps = [draw.keep for draw in DRAWN]
    pruner = get_pruner("cdpruner", pruning_rate=0.5, text_tower="a folder", official_quirks=quirks)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "usable", lambda device, n_visual=1: False)
        expected = pruner.select_batch(views, keeps)
    assert {quirk for one in expected for quirk in one.quirks} == {"noise", "constant_relevance"}
    for most_bytes in (2**31, 1):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "usable", lambda device, n_visual=1: True)
            patch.setattr(padding, "MOST_BYTES", most_bytes)
            got = pruner.select_batch(views, keeps)
        for one, other in zip(got, expected, strict=True):
            assert one.order.tolist() == other.order.tolist() and one.quirks == other.quirks


def test_bad_tokens_of_one_view_are_refused_by_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "usable", lambda device, n_visual=1: True)
    views = [asked(draw, n_text=2) for draw in DRAWN]
    views[1].hidden_states[3] = math.nan
    with pytest.raises(PruningError, match=r"'sample 2': hidden_states holds NaN or infinity in 1 of 35 tokens \(first: token 3\)"):
        get_pruner("cdpruner", pruning_rate=0.5, text_tower="a folder").select_batch(views, [draw.keep for draw in DRAWN])
