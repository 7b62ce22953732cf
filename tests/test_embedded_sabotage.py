"""The embedded benchmark notices a broken pruner: at 88.9 % each kind of sabotage loses answers beyond chance, paired."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from thinning import only
from torch import Tensor

from vlm_pruner_eval import Pruner, VisualTokens, get_pruner, prune
from vlm_pruner_eval.embedded.measure import generate_answers, load_minivlm, read_questions, score
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
