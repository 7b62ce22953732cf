"""What must hold for every method on any input: one strategy of tokens, every registered pruner."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from every_field import afresh, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_pruners import IN_MODEL, PARAMETERS
from vision_scenes import bent

from vlm_pruner_eval import Pruner, PruningError, Selection, TextTokens, VisualTokens, get_pruner, keep_count
from vlm_pruner_eval.pruners.fields import PARTS, PLAIN, replaced
from vlm_pruner_eval.pruners.in_stages import PUBLISHED_DEPTH, StagedPruner
from vlm_pruner_eval.types import QuestionTokens, VisionTokens

METHODS = IN_MODEL
LAYERS = (5, 8, -2, -1)  # of the tower
FEWER = settings(max_examples=10)  # of 25, where one example already says much

# what does not hold of a method by its definition
OWN_COUNT = {"prumerge", "prumerge_plus", "sparsevlm", "mustdrop"}  # decides how many it keeps, in any mode
OWN_RATES = {"sparsevlm": (0, "2/3", "7/9", "8/9")}  # for which its authors published a schedule
ALL_OR_NOTHING = {"blind": False, "none": True}  # keeps all tokens or none, however many are asked for


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
    stage: int = 0
    has_cls: bool = True

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
            own_attention=self.numbers(n_visual).float().roll(1).softmax(0).to(self.dtype),
            text_attention=partial(of_rows, self.numbers(self.n_text, n_visual).float().softmax(-1).to(self.dtype)),
            vision=self.vision(),
            question=QuestionTokens(
                image_embeddings=self.numbers(n_visual, self.width).flip(0),
                text_embeddings=self.numbers(self.n_text, self.width),
                clip_image=self.numbers(n_visual, 4),
                clip_text=self.numbers(2, 4),
            ),
            ids=torch.arange(n_visual) * (1 + (self.stage > 0)),  # later stages see every second token
            n_original=n_visual * (1 + (self.stage > 0)),
            stage=self.stage,
            sample_id=f"sample {self.seed}",
        )

    def vision(self) -> VisionTokens:
        """Of a tower in which pairs of neighbouring patches may have become one."""
        n_visual, heads = self.n_visual, 3
        cells, view = self.frames * self.rows * self.cols, self.rows * self.cols
        frame, place = torch.arange(cells) // view, torch.arange(cells) % view
        no_token = torch.full((self.newlines,), -1)

        def each(*shape: int) -> dict[int, Tensor]:
            return {layer: self.numbers(*shape).roll(layer, 0) for layer in LAYERS}

        return VisionTokens(
            states=self.numbers(n_visual, self.width).roll(1, 0),
            project=bent,
            cls_state=self.numbers(self.width) if self.has_cls else None,
            cls_attention={layer: self.numbers(heads, n_visual).roll(layer, 1).float().softmax(-1).to(self.dtype) for layer in LAYERS},
            received_attention={layer: self.numbers(n_visual).roll(layer).float().softmax(-1).to(self.dtype) for layer in LAYERS},
            keys=each(n_visual, heads, 3),
            cls_query=each(heads, 3),
            cls_key=each(heads, 3),
            groups=torch.cat([frame * ((view + 1) // 2) + place // 2, no_token]),
            views=torch.cat([frame, no_token]),
        )


def of_rows(attention: Tensor, rows: Tensor | None) -> Tensor:
    return attention if rows is None else attention[rows]


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
    stage=st.sampled_from([0, 0, 1, 3]),
    has_cls=st.booleans(),
)


def pruner_named(method: str, **params: object) -> Pruner:
    small = {"channels": 4} if method == "vlmpruner" else {}  # fewer than the widths drawn, so that channels are selected
    rate = "2/3" if method in OWN_RATES else 0.5
    return get_pruner(method, **{"pruning_rate": rate, **small, **PARAMETERS.get(method, {}), **params})


def looked_at(pruner: Pruner, tokens: VisualTokens) -> set[str]:
    """What the method reads of these tokens, as `needs` spells it."""
    return {*pruner.needs_now(tokens.stage, tokens.memory)}


def without(tokens: VisualTokens, need: str) -> VisualTokens:
    """The tokens, and nothing under a name that `needs` may hold."""
    owner, _, _ = need.partition(".")
    if need not in PARTS:
        return replace(tokens, **{owner: None})
    held = getattr(tokens, owner)
    nothing = {name: {} if isinstance(getattr(held, name), dict) else None for name in PARTS[need]}
    return replace(tokens, **{owner: replace(held, **nothing)})


def assert_same(left: Selection, right: Selection) -> None:
    assert torch.equal(left.order, right.order)
    assert left.quirks == right.quirks
    assert (left.hidden_states is None) == (right.hidden_states is None)
    if left.hidden_states is not None:
        assert torch.equal(left.hidden_states, right.hidden_states)


def expected_count(method: str, n_visual: int, keep: int) -> int:
    return n_visual * ALL_OR_NOTHING[method] if method in ALL_OR_NOTHING else keep


def test_the_tables_are_of_methods_that_there_are():
    deciding = {method for method in METHODS if pruner_named(method).decides_count()}
    assert deciding == OWN_COUNT and {*OWN_RATES, *ALL_OR_NOTHING} <= {*METHODS}


@pytest.mark.parametrize("method", METHODS)
@given(draw=DRAWS, quirks=st.booleans(), selection_dtype=st.sampled_from(["float32", "model"]))
def test_the_answer(method: str, quirks: bool, selection_dtype: str, draw: Draw):
    """As many as asked, unless the release is asked for, whose count may differ; unique and in range all the same."""
    pruner = pruner_named(method, official_quirks=quirks, selection_dtype=selection_dtype)
    got = pruner.select(draw.tokens(), draw.keep)
    if not pruner.decides_count():
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
@FEWER
@given(draw=DRAWS, data=st.data())
def test_keep_defaults_to_the_budget(method: str, draw: Draw, data: st.DataObject):
    """Of methods with several cuts to that of the tokens' stage."""
    rate = data.draw(st.sampled_from(OWN_RATES.get(method, (0, 0.1, 0.5, 0.889, "2/3", "8/9"))))
    tokens, pruner = draw.tokens(), pruner_named(method, pruning_rate=rate)
    keep = keep_count(draw.n_visual, rate)
    if isinstance(pruner, StagedPruner):
        stages = pruner.stages(PUBLISHED_DEPTH)
        keep = min(draw.n_visual, pruner.keep_at(stages[min(draw.stage, len(stages) - 1)], tokens.n_original))
    by_default = pruner.select(tokens)
    if method not in OWN_COUNT:
        assert len(by_default.order) == expected_count(method, draw.n_visual, keep)
    assert_same(by_default, pruner.select(afresh(tokens), keep))


@pytest.mark.parametrize("method", METHODS)
@FEWER
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
    third = pruner.select(afresh(tokens), draw.keep)
    assert torch.equal(torch.random.get_rng_state(), torch_state) and random.getstate() == python_state
    assert_same(first, second)
    assert_same(first, third)
    after = tensors(tokens)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", METHODS)
@FEWER
@given(draw=DRAWS, shift=st.integers(1, 4000))
def test_translation_of_positions(method: str, draw: Draw, shift: int):
    """A longer prompt before the image changes nothing (with official_quirks DART walks a set of absolute positions)."""
    tokens = draw.tokens()
    text = replace(tokens.text, positions=tokens.text.positions + shift)
    moved = replace(afresh(tokens), positions=tokens.positions + shift, text=text)
    here, there = pruner_named(method).select(tokens, draw.keep), pruner_named(method).select(moved, draw.keep)
    assert_same(replace(here, quirks=frozenset()), replace(there, quirks=frozenset()))


@pytest.mark.parametrize("method", METHODS)
@FEWER
@given(draw=DRAWS, where=st.integers(0, 10**6), bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_nan_and_infinity_are_refused(method: str, draw: Draw, where: int, bad: float):
    """In what the method reads; what it does not read is not looked at."""
    pruner, stage = pruner_named(method), f"stage {draw.stage}"
    needs = looked_at(pruner, draw.tokens())
    nested = {f"{need.partition('.')[0]}.{part}" for need in needs & PARTS.keys() for part in PARTS[need]}
    read = {"hidden_states", *(needs & PLAIN), *nested}
    every, unread = tensors(draw.tokens()), {}
    for name, tensor in every.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        poisoned = tensor.clone()
        poisoned.view(-1)[where % tensor.numel()] = bad
        if name.partition("[")[0] not in read and not ("text" in read and name.startswith("text.")):
            unread[name] = poisoned
            continue
        tokens = replaced(draw.tokens(), every | {name: poisoned})
        with pytest.raises(PruningError) as refusal:
            pruner.select(tokens, draw.keep)
        sentence = str(refusal.value)
        assert name in sentence and repr(tokens.sample_id) in sentence
        assert (stage if isinstance(pruner, StagedPruner) else f"layer {pruner.layer}") in sentence
    assert_same(pruner.select(replaced(draw.tokens(), every | unread), draw.keep), pruner.select(draw.tokens(), draw.keep))


@pytest.mark.parametrize("method", METHODS)
def test_fields_it_does_not_name_and_counts_that_can_not_be(method: str):
    tokens = Draw(3, 1, 4, 5, 0, 6, 5, torch.float32, False, 300).tokens()
    pruner = pruner_named(method)
    needs = looked_at(pruner, tokens)
    bare = tokens
    for need in (PLAIN | PARTS.keys()) - needs:
        bare = without(bare, need)
    assert_same(pruner.select(tokens, 6), pruner.select(afresh(bare), 6))
    for need in needs:
        with pytest.raises(PruningError, match=rf"needs '{need}'(, got None| of layers \[.*\], got \[\])"):
            pruner.select(afresh(without(tokens, need)), 6)
    if method in ALL_OR_NOTHING:
        return
    for keep in (-1, 21, 2.0, True, "5"):
        with pytest.raises(PruningError, match=r"asked to keep .* of 20 tokens, expected a whole number from 0 to 20"):
            pruner.select(tokens, keep)
