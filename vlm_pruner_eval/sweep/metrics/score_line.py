"""A finished run in one line: its scores, their average against the unpruned run, and what it kept."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from vlm_pruner_eval.store.schema import FINISHED, UnitRecord
from vlm_pruner_eval.store.summaries import Tokens
from vlm_pruner_eval.sweep.grid import Run, rate_percent
from vlm_pruner_eval.sweep.progress import duration

NOTHING = "n/a"


def number(value: float | None) -> str:
    """One decimal; none from 1000 up, where benchmarks count points."""
    if value is None:
        return NOTHING
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def short_names(tasks: Sequence[str]) -> dict[str, str]:
    """Task names without the prefix that they all share."""
    heads = {task.rpartition("_")[0] for task in tasks}
    prefix = f"{heads.pop()}_" if len(tasks) > 1 and len(heads) == 1 and "" not in heads else ""
    return {task: task.removeprefix(prefix) for task in tasks}


def relative_average(scores: dict[str, float | None], reference: dict[str, float | None]) -> float | None:
    """``100 x mean over benchmarks of score / unpruned score``, equal weights.

    Paper: arXiv 2512.02700, the Avg column of tables 1 and 2.

    Returns
    -------
    float or None
        None when a score is missing or an unpruned score is 0: an average over other benchmarks would be another number.
    """
    if not scores or any(scores[task] is None or not reference.get(task) for task in scores):
        return None
    return 100.0 * statistics.fmean(scores[task] / reference[task] for task in scores)


def title(run: Run) -> str:
    """Name of a run for people: "random seed 3, 88.9 % removed"."""
    seed = f" seed {run.seed}" if run.key.endswith(f"-seed{run.seed}") else ""
    percent = rate_percent(run.pruning_rate)
    return f"{run.label}{seed}" + ("" if percent is None else f", {percent:.1f} % removed")


def score_line(
    units: Sequence[UnitRecord], unpruned: Sequence[UnitRecord] | None, took_s: float | None = None, *, is_named: bool = True
) -> str:
    """Scores of finished units of a run, or why it failed.

    Parameters
    ----------
    unpruned
        The same units of the sweep's unpruned run, if they are finished.
    took_s
        Seconds; not shown of units that shared work with others, as they are no measure of anything.
    """
    is_shared = any(unit.shared_prefix for unit in units)
    took = None if took_s is None or is_shared else duration(took_s)
    scores = main_scores(units)
    if any(unit.status != FINISHED for unit in units):
        problem = " ".join(unit.problem for unit in units if unit.problem)
        others = f" Scores: {_listed(scores)}" if all(unit.is_usable for unit in units) else ""
        return f"FAILED{'' if took is None else f' after {took}'}: {problem}{others}"
    line = number(*scores.values()) if len(scores) == len(units) == 1 and not is_named else _listed(scores)
    average = None if unpruned is None else relative_average(scores, main_scores(unpruned))
    if average is not None:
        line += f" ({number(average)} % of unpruned)"
    tokens = Tokens.merged([unit.tokens for unit in units])
    if tokens.kept is not None:
        line += f", kept {tokens.kept.mean:.4g} of {tokens.n_visual.mean:.4g}"
    return line if took is None else f"{line}, {took}"


def main_scores(units: Sequence[UnitRecord]) -> dict[str, float | None]:
    """By benchmark the score in the unit of papers; None if it has none."""
    return {task: None if score.main is None else score.main.value for unit in units for task, score in unit.scores.items()}


def _listed(scores: Mapping[str, float | None]) -> str:
    names = short_names(list(scores))
    return ", ".join(f"{names[task]} {number(score)}" for task, score in scores.items())
