"""A finished run in one line: its scores, their average against the unpruned run, and what it kept."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_pruner_eval.sweep.grid import UNPRUNED, Run, rate_percent
from vlm_pruner_eval.sweep.speed import duration
from vlm_pruner_eval.sweep.store import FINISHED

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


def score_line(record: Mapping[str, Any], unpruned: Mapping[str, Any] | None, took_s: float | None = None) -> str:
    """Scores of a finished run, or why it failed.

    Parameters
    ----------
    record
        Of the run.
    unpruned
        Record of the sweep's unpruned run, if that is finished.
    took_s
        Seconds; not shown of a run that shared work with others, as they are no measure of anything.
    """
    took = None if took_s is None or record.get("shared_prefix") else duration(took_s)
    if record.get("status") != FINISHED:
        others = f" Scores: {_listed(_scores(record))}" if record.get("unscored") else ""
        return f"FAILED{'' if took is None else f' after {took}'}: {record.get('problem')}{others}"
    scores = _scores(record)
    line = _listed(scores)
    average = None if unpruned is None or record["method"] == UNPRUNED else relative_average(scores, _scores(unpruned))
    if average is not None:
        line += f" ({number(average)} % of unpruned)"
    kept, there = (record["tokens"][name] for name in ("kept", "n_visual"))
    if kept is not None:
        line += f", kept {kept['mean']:.4g} of {there['mean']:.4g}"
    return line if took is None else f"{line}, {took}"


def _listed(scores: Mapping[str, float | None]) -> str:
    names = short_names(list(scores))
    return ", ".join(f"{names[task]} {number(score)}" for task, score in scores.items())


def _scores(record: Mapping[str, Any]) -> dict[str, float | None]:
    return {task: None if (main := found["main"]) is None else main["value"] for task, found in record["tasks"].items()}
