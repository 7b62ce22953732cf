"""The embedded benchmark notices a broken pruner: at 88.9 % each kind of sabotage loses answers beyond chance, paired."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from thinning import only
from torch import Tensor

from vlm_pruner_eval import Pruner, Selection, VisualTokens, get_pruner, prune
from vlm_pruner_eval.embedded.measure import generate_answers, load_minivlm, read_questions, score
from vlm_pruner_eval.pruners.pdrop import PDrop
from vlm_pruner_eval.pruners.sparsevlm import SparseVLM
from vlm_pruner_eval.pruners.vispruner import VisPruner
from vlm_pruner_eval.pruners.vlm_pruner import VLMPruner

TASK, N, RATE = "where", 30, "8/9"  # the task that needs both the digits and their positions


@dataclass(frozen=True, kw_only=True)
class Inverted(VLMPruner):
    """Keeps what VLM-Pruner chooses last."""

    name: ClassVar[str] = "inverted"

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        return super().choose(tokens, tokens.n_visual).order.flip(0)[:keep]


@dataclass(frozen=True, kw_only=True)
class Shifted(VLMPruner):
    """Keeps the tokens half an image away from VLM-Pruner's: a wrong offset."""

    name: ClassVar[str] = "shifted"

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        return (super().choose(tokens, keep).order + tokens.n_visual // 2) % tokens.n_visual


@pytest.fixture(scope="module")
def minivlm():
    return load_minivlm()


@pytest.fixture(scope="module")
def right(minivlm):
    """Scores of VLM-Pruner as it should be."""
    return answers(minivlm, get_pruner("vlmpruner", pruning_rate=RATE))


def answers(minivlm: tuple, pruner: Pruner) -> list[float]:
    model, processor = minivlm
    rows = read_questions(TASK)[:N]
    with prune(model, pruner) as ledger:
        given = list(generate_answers(model, processor, rows, 10))
    assert {record.n_visual for record in ledger.records} == {576}
    assert [record.n_kept for record in ledger.records] == [pruner.default_keep(576)] * N
    return [score(TASK, row, answer)["exact_match"] for row, answer in zip(rows, given, strict=True)]


def paired_p(right: list[float], other: list[float]) -> float:
    """Exact sign test: the chance of at least this many losses among the questions that changed."""
    lost = sum(a > b for a, b in zip(right, other, strict=True))
    changed = sum(a != b for a, b in zip(right, other, strict=True))
    return sum(math.comb(changed, k) for k in range(lost, changed + 1)) / 2**changed


BROKEN = {
    "inverted choice": Inverted(pruning_rate=RATE),
    "shifted by half the image": Shifted(pruning_rate=RATE),
    "everything dropped": get_pruner("blind", pruning_rate=RATE),
    "contiguous positions": VLMPruner(pruning_rate=RATE, positions="contiguous"),
    "random choice": get_pruner("random", pruning_rate=RATE),
}


@pytest.mark.parametrize("name", only(BROKEN, ["shifted by half the image", "contiguous positions"]))
def test_a_broken_pruner_is_caught(minivlm, right, name):
    assert paired_p(right, answers(minivlm, BROKEN[name])) < 0.005


def test_the_right_one_is_not(minivlm, right):
    unpruned = answers(minivlm, get_pruner("none", pruning_rate=0))
    assert sum(unpruned) / N > 0.75
    assert paired_p(unpruned, right) > 0.05


def test_what_merging_does_shows_in_the_states_not_in_the_answers(minivlm):
    """Leaving the merge out costs no answer here, so it is tested where it can be seen: in the states of kept tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = VisualTokens(torch.randn(36, 32, generator=generator), grid=(6, 6), keys=torch.randn(36, 2, 8, generator=generator))
    merged, plain = (VLMPruner(pruning_rate=0.5, merge=merge).select(tokens) for merge in (True, False))
    assert torch.equal(merged.order, plain.order)
    assert plain.hidden_states is None
    changed = (merged.hidden_states - tokens.hidden_states[merged.keep]).abs().amax(1) > 1e-3
    assert int(changed.sum()) >= 5


# ---- methods of the vision tower, of several stages, and that make rows
@dataclass(frozen=True, kw_only=True)
class Misaligned(VisPruner):
    """Looks at the tower's values of the patch half an image away: a wrong alignment of patches and tokens."""

    name: ClassVar[str] = "misaligned"

    def choose(self, tokens: VisualTokens, keep: int) -> Selection:
        half = tokens.n_visual // 2
        attention = {layer: values.roll(half, 1) for layer, values in tokens.vision.cls_attention.items()}
        vision = dataclasses.replace(tokens.vision, states=tokens.vision.states.roll(half, 0), cls_attention=attention)
        return super().choose(dataclasses.replace(tokens, vision=vision), keep)


@dataclass(frozen=True, kw_only=True)
class LateInversion(PDrop):
    """Keeps what is attended to least at its last stage."""

    name: ClassVar[str] = "lateinversion"

    def choose(self, tokens: VisualTokens, keep: int) -> Selection:
        sign = -1 if tokens.stage == 2 else 1
        return super().choose(dataclasses.replace(tokens, own_attention=sign * tokens.own_attention), keep)


@dataclass(frozen=True, kw_only=True)
class MisplacedRows(SparseVLM):
    """Writes the rows of its stages in the wrong order: kept tokens stand in each other's places."""

    name: ClassVar[str] = "misplacedrows"

    def choose(self, tokens: VisualTokens, keep: int) -> Selection:
        found = super().choose(tokens, keep)
        return dataclasses.replace(found, hidden_states=found.hidden_states.flip(0))


KINDS = {
    "vision tower": (VisPruner(pruning_rate=RATE), Misaligned(pruning_rate=RATE)),
    "stages": (PDrop(pruning_rate=RATE, budget="kept"), LateInversion(pruning_rate=RATE, budget="kept")),
    "rows": (SparseVLM(pruning_rate="2/3"), MisplacedRows(pruning_rate="2/3")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_method_of_each_kind_is_caught(minivlm, kind):
    """By what the regression sweep compares, kept sets, and where only rows are wrong by the logits; answers alone would not show it."""
    right, again, broken = (kept_and_logits(minivlm, pruner) for pruner in (KINDS[kind][0], *KINDS[kind]))
    assert right[0] == again[0]
    assert torch.equal(right[1], again[1])
    if kind == "rows":
        assert float((right[1] - broken[1]).abs().max(-1).values.min()) > 1e-2
    else:
        assert all(one != other for one, other in zip(right[0], broken[0], strict=True))


def kept_and_logits(minivlm: tuple, pruner: Pruner) -> tuple[list[list[int]], Tensor]:
    """Kept positions of eight prompts, and the logits of their first answers [8, vocabulary]."""
    model, processor = minivlm
    seen: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[:, -1].clone()))
    with prune(model, pruner) as ledger:
        list(generate_answers(model, processor, read_questions(TASK)[:8], 8))
    handle.remove()
    assert all(record.n_kept < 576 for record in ledger.records)
    return [record.kept_positions for record in ledger.records], seen[0]
