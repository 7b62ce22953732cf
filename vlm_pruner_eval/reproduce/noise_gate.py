"""The gate of a reproduction: no pruned row is worth running before the unpruned row gives the number that the paper prints."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_pruner_eval.report.paper.gate import FAILS, Gate, judge_scores
from vlm_pruner_eval.report.paper.printed import PrintedNumbers
from vlm_pruner_eval.reproduce.noise import Noise


def judge(noise: Noise, printed: PrintedNumbers, vlm: str | None, incomparable: Sequence[str]) -> Gate:
    """Hold the unpruned reference run against the printed upper bound."""
    reference = noise.variants[0].name
    if noise.record is None:
        return Gate(FAILS, f"The unpruned row does not reproduce: the run {reference} failed ({noise.problems[reference]}).", ())
    scores = {task: measured.scores[reference] for task, measured in noise.tasks.items()}
    spreads = {task: measured.spread for task, measured in noise.tasks.items()}
    return judge_scores(scores, spreads, printed, vlm, incomparable)
