"""The gate: no pruned row says anything about the paper before the unpruned row gives the number that the paper prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlm_pruner_eval.report.paper.printed import Number, PrintedNumbers, benchmark_of, full_score, is_possible
from vlm_pruner_eval.sweep.grid import UNPRUNED

POINTS, SPREADS = 0.5, 2.0
RULE = (
    f"A score reproduces a printed one when they differ by at most max({POINTS:g} % of the benchmark's full score, {SPREADS:g} × the "
    f"spread of the unpruned score over batch sizes and attention kernels). Full scores are 100, MME 2800 ({POINTS * 28:g} points) and "
    f"OCRBench 1000 ({POINTS * 10:g} points)."
)
INSIDE, OUTSIDE, NO_NUMBER, NO_SCORE = "inside", "outside", "no printed number", "no score"
IMPOSSIBLE = "printed number is above the benchmark's maximum"
REPRODUCES, FAILS, INCOMPARABLE = "reproduces", "does not reproduce", "not comparable"


@dataclass(frozen=True)
class TaskVerdict:
    """One task of the unpruned row beside the printed upper bound, in the benchmark's own unit; without one, there is no tolerance."""

    task: str
    benchmark: str | None
    score: float | None
    printed: Number | None
    spread: float | None
    tolerance: float | None
    verdict: str

    @property
    def difference(self) -> float | None:
        """Score minus printed number."""
        return None if self.printed is None or self.score is None else self.score - self.printed.value


@dataclass(frozen=True)
class Gate:
    """The verdict on the unpruned row.

    Attributes
    ----------
    status
        "reproduces", "does not reproduce", "not comparable" or "no printed number"; only the second stops.
    sentence
        The same for a reader, with the reason.
    tasks
        The verdicts task by task.
    """

    status: str
    sentence: str
    tasks: tuple[TaskVerdict, ...]

    @property
    def stops(self) -> bool:
        """True if pruned rows must wait."""
        return self.status == FAILS


def tolerance(full: float, spread: float | None) -> float:
    """Return how far a score may be from the printed one: max(0.5 % of the full score, twice the measured spread).

    Parameters
    ----------
    full
        The benchmark's full score, in its own unit.
    spread
        Largest minus smallest unpruned score over the variants, in the same unit; None counts as 0.
    """
    return max(POINTS * full / 100, SPREADS * (spread or 0.0))


def within(difference: float, allowed: float) -> bool:
    """Return True if a difference is inside; the last digits of a float never decide."""
    return abs(difference) <= allowed + 1e-9


def judge_scores(
    scores: Mapping[str, float | None],
    spreads: Mapping[str, float | None],
    printed: PrintedNumbers,
    vlm: str | None,
    incomparable: Sequence[str],
) -> Gate:
    """Hold the scores of the unpruned model, by task, against the printed upper bound.

    Parameters
    ----------
    spreads
        By task, the measured spread of the unpruned score; a task without one is held to the half point alone.
    incomparable
        Why printed numbers can't be held against this run; empty when they can.
    """
    verdicts = tuple(_verdict(task, score, spreads.get(task), printed, vlm) for task, score in scores.items())
    if incomparable:
        return Gate(INCOMPARABLE, f"The unpruned row is not comparable with printed numbers ({'; '.join(incomparable)}).", verdicts)
    bad = [verdict.task for verdict in verdicts if verdict.verdict in (OUTSIDE, NO_SCORE)]
    n_inside = sum(verdict.verdict == INSIDE for verdict in verdicts)
    gated = n_inside + len(bad)
    if bad:
        return Gate(FAILS, f"The unpruned row does not reproduce: {', '.join(bad)} ({len(bad)} of {gated} tasks) outside.", verdicts)
    if not gated:
        return Gate(NO_NUMBER, "The unpruned row has no printed number for any of these tasks, so nothing was held against it.", verdicts)
    return Gate(REPRODUCES, f"The unpruned row reproduces: {gated} of {gated} tasks with a printed number are inside.", verdicts)


def _verdict(task: str, score: float | None, spread: float | None, printed: PrintedNumbers, vlm: str | None) -> TaskVerdict:
    benchmark = benchmark_of(task, vlm, printed.paper)
    number = printed.find(vlm, UNPRUNED, None, benchmark)
    if number is None:
        return TaskVerdict(task, benchmark, score, None, spread, None, NO_NUMBER)
    allowed = tolerance(full_score(benchmark), spread)
    if not is_possible(number, benchmark):
        verdict = IMPOSSIBLE
    elif score is None:
        verdict = NO_SCORE
    else:
        verdict = INSIDE if within(score - number.value, allowed) else OUTSIDE
    return TaskVerdict(task, benchmark, score, number, spread, allowed, verdict)
