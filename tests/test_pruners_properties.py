"""What must hold for every method on any input: one strategy of tokens, every registered pruner."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toy_pruners import IN_MODEL

from vlm_pruner_eval import Pruner, PruningError, Selection, TextTokens, VisualTokens, get_pruner, keep_count

METHODS = IN_MODEL


@dataclass(frozen=True)
class Draw:
    """A seed and the shape of an input; hypothesis shrinks the shape, the numbers come from torch."""

    seed: int
    frames: int
    rows: int
    cols: int
    newlines: int
    width: int
    n_text: int
    dtype: torch.dtype
    coarse: bool
    keep_of_1000: int

    @property
    def n_visual(self) -> int:
        return self.frames * self.rows * self.cols + self.newlines

    @property
    def keep(self) -> int:
        return round(self.n_visual * self.keep_of_1000 / 1000)

    def numbers(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + len(shape) * 1000 + sum(shape))
        values = torch.randn(*shape, generator=generator)
        return (values.round() if self.coarse else values).to(self.dtype)  # coarse: repeats, zeros and exact ties

    def tokens(self) -> VisualTokens:
        n_visual, heads = self.n_visual, 2
        cells = [(f, r, c) for f in range(self.frames) for r in range(self.rows) for c in range(self.cols)]
        return VisualTokens(
            self.numbers(n_visual, self.width),
            grid=(self.rows, self.cols),
            coords=torch.tensor(cells + [(0, -1, -1)] * self.newlines),
            keys=self.numbers(n_visual, heads, 3),
            attention=self.numbers(n_visual).float().softmax(0).to(self.dtype),
            normed_hidden_states=self.numbers(n_visual, self.width + 1),
            positions=torch.arange(n_visual) + 5,
            text=TextTokens(
                normed_hidden_states=self.numbers(self.n_text, self.width + 1),
                keys=self.numbers(self.n_text, heads, 3),
                positions=torch.arange(self.n_text) + 5 + n_visual,
            ),
            sample_id=f"sample {self.seed}",
        )


DRAWS = st.builds(
    Draw,
    seed=st.integers(0, 10**6),
    frames=st.integers(1, 3),
    rows=st.integers(1, 5),
    cols=st.integers(1, 5),
    newlines=st.integers(0, 3),
    width=st.integers(1, 9),
    n_text=st.integers(0, 6),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    coarse=st.booleans(),
    keep_of_1000=st.integers(0, 1000),
)


def pruner_named(method: str, **params: object) -> Pruner:
    small = {"channels": 4} if method == "vlmpruner" else {}  # fewer than the widths drawn, so that channels are selected
    return get_pruner(method, pruning_rate=0.5, **small, **params)


def tensors(value: object) -> dict[str, Tensor]:
    """The tensors of a VisualTokens or TextTokens by path."""
    found = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, Tensor):
            found[field.name] = part
        elif isinstance(part, TextTokens):
            found |= {f"text.{name}": tensor for name, tensor in tensors(part).items()}
    return found


def assert_same(left: Selection, right: Selection) -> None:
    assert torch.equal(left.order, right.order)
    assert left.quirks == right.quirks
    assert (left.hidden_states is None) == (right.hidden_states is None)
    if left.hidden_states is not None:
        assert torch.equal(left.hidden_states, right.hidden_states)


def expected_count(method: str, n_visual: int, keep: int) -> int:
    return {"blind": 0, "none": n_visual}.get(method, keep)


@pytest.mark.parametrize("method", METHODS)
@given(draw=DRAWS, quirks=st.booleans(), selection_dtype=st.sampled_from(["float32", "model"]))
def test_the_answer(method: str, quirks: bool, selection_dtype: str, draw: Draw):
    """As many as asked, unless the release is asked for, whose count may differ; unique and in range all the same."""
    pruner = pruner_named(method, official_quirks=quirks, selection_dtype=selection_dtype)
    got = pruner.select(draw.tokens(), draw.keep)
    if not (quirks and pruner.quirks_change_count):
        assert len(got.order) == expected_count(method, draw.n_visual, draw.keep)
    assert got.order.dtype == torch.int64
    assert len({*got.order.tolist()}) == len(got.order)
    assert {*got.order.tolist()} <= {*range(draw.n_visual)}
    assert got.keep.tolist() == sorted(got.order.tolist())
    if got.hidden_states is not None:
        assert got.hidden_states.dtype == draw.dtype
        assert got.hidden_states.shape == (len(got.order), draw.width)
        assert quirks or torch.isfinite(got.hidden_states).all()


@pytest.mark.parametrize("method", METHODS)
@given(draw=DRAWS, rate=st.sampled_from([0, 0.1, 0.5, 0.889, "2/3", "8/9"]))
def test_keep_defaults_to_the_budget(method: str, draw: Draw, rate: object):
    tokens, pruner = draw.tokens(), get_pruner(method, pruning_rate=rate)
    by_default = pruner.select(tokens)
    assert len(by_default.order) == expected_count(method, draw.n_visual, keep_count(draw.n_visual, rate))
    assert_same(by_default, pruner.select(tokens, keep_count(draw.n_visual, rate)))


@pytest.mark.parametrize("method", METHODS)
@given(draw=DRAWS)
def test_deterministic_and_no_trace(method: str, draw: Draw):
    """The same answer twice, the input bit-equal afterwards, and the global random states untouched."""
    tokens, pruner = draw.tokens(), pruner_named(method)
    before = {name: tensor.clone() for name, tensor in tensors(tokens).items()}
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()
    first = pruner.select(tokens, draw.keep)
    torch.manual_seed(1)
    second = pruner_named(method).select(draw.tokens(), draw.keep)
    torch.random.set_rng_state(torch_state)
    third = pruner.select(tokens, draw.keep)
    assert torch.equal(torch.random.get_rng_state(), torch_state) and random.getstate() == python_state
    assert_same(first, second)
    assert_same(first, third)
    after = tensors(tokens)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", METHODS)
@given(draw=DRAWS, shift=st.integers(1, 4000))
def test_translation_of_positions(method: str, draw: Draw, shift: int):
    """A longer prompt before the image changes nothing (with official_quirks DART walks a set of absolute positions)."""
    tokens = draw.tokens()
    text = replace(tokens.text, positions=tokens.text.positions + shift)
    moved = replace(tokens, positions=tokens.positions + shift, text=text)
    here, there = pruner_named(method).select(tokens, draw.keep), pruner_named(method).select(moved, draw.keep)
    assert_same(replace(here, quirks=frozenset()), replace(there, quirks=frozenset()))


@pytest.mark.parametrize("method", METHODS)
@given(draw=DRAWS, where=st.integers(0, 10**6), bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_nan_and_infinity_are_refused(method: str, draw: Draw, where: int, bad: float):
    pruner = pruner_named(method)
    for name, tensor in tensors(draw.tokens()).items():
        field, _, nested = name.partition(".")
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        poisoned, tokens = tensor.clone(), draw.tokens()
        poisoned.view(-1)[where % tensor.numel()] = bad
        tokens = replace(tokens, **{field: replace(tokens.text, **{nested: poisoned}) if nested else poisoned})
        if field == "hidden_states" or field in pruner.needs:
            with pytest.raises(PruningError) as refusal:
                pruner.select(tokens, draw.keep)
            sentence = str(refusal.value)
            assert name in sentence and repr(tokens.sample_id) in sentence and f"layer {pruner.layer}" in sentence
        else:
            pruner.select(tokens, draw.keep)  # not looked at


@pytest.mark.parametrize("method", METHODS)
def test_fields_it_does_not_name_and_counts_that_can_not_be(method: str):
    tokens = Draw(3, 1, 4, 5, 0, 6, 5, torch.float32, False, 300).tokens()
    pruner = pruner_named(method)
    unread = dict.fromkeys({"keys", "attention", "normed_hidden_states", "positions", "text"} - pruner.needs)
    assert_same(pruner.select(tokens, 6), pruner.select(replace(tokens, **unread), 6))
    for field in pruner.needs:
        with pytest.raises(PruningError, match=f"needs '{field}', got None"):
            pruner.select(replace(tokens, **{field: None}), 6)
    if method in ("blind", "none"):  # which keep what they keep, whatever they are asked
        return
    for keep in (-1, 21, 2.0, True, "5"):
        with pytest.raises(PruningError, match=r"asked to keep .* of 20 tokens, expected a whole number from 0 to 20"):
            pruner.select(tokens, keep)
