"""`sweep FILE --dry-run`: the grid, what each run keeps, and what the sweep will ask, write and take. Loads and writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.store.folder import Store
from vlm_pruner_eval.store.schema import FAILED, FINISHED
from vlm_pruner_eval.sweep import estimate, preflight
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.grid import Run, expand, rate_percent
from vlm_pruner_eval.sweep.progress import duration
from vlm_pruner_eval.sweep.units import run_status, status_of, units_of

_UNKNOWN = "unknown: run with --limit 8 first, into the same folder"
_PER = 1000  # questions, where their number is unknown


@dataclass(frozen=True)
class Preview:
    """What can be said of a sweep before it runs.

    Attributes
    ----------
    status
        Of every run as it stands in the results directory; None where it is left.
    seconds
        That the runs left will take; None where unknown.
    basis
        Of `seconds`: runs by how near the measured ones are to them.
    processors
        That earlier runs were measured on.
    notices
        See `preflight.notices`.
    per
        Questions that `disk` and `seconds` are for, where the sweep's number is unknown.
    """

    config: SweepConfig
    runs: Sequence[Run]
    status: Sequence[str | None]
    n_visual: int | None
    kept: Sequence[estimate.Kept]
    questions: estimate.Questions
    disk: estimate.Disk | None
    seconds: float | None
    basis: Counter[str]
    processors: Sequence[str]
    per: int | None
    notices: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain types; bytes and seconds are None where a number of questions had to be assumed."""
        is_known = self.per is None
        return {
            "runs": len(self.runs),
            "tasks": len(self.config.tasks),
            "dry_run": True,
            "left": sum(status is None for status in self.status),
            "questions": self.questions.total,
            "questions_exact": self.questions.is_exact,
            "bytes": self.disk.records + self.disk.pictures if self.disk and is_known else None,
            "seconds": self.seconds if is_known else None,
        }


def preview(config: SweepConfig, output: Path) -> Preview:
    """Look at a sweep and at what its results directory holds.

    Raises
    ------
    ConfigError
        Methods that can't keep what they are asked; tasks that lmms-eval does not know or can't load.
    """
    runs, store = expand(config), Store(output)
    preflight.refuse_other_sweep(store, config)
    units = units_of(config, runs)
    states = status_of(store, units, config.limit)
    status = [run_status(states, run) for run in runs]
    notices = preflight.notices(store, runs, units, states)
    earlier = estimate.read_earlier(store)
    n_visual, layers = estimate.visual_tokens(config, earlier), estimate.layers_of(config, earlier)
    kept = _all_kept(runs, n_visual, layers)
    questions = estimate.count_questions(config, earlier)
    per = None if questions.total is not None else _PER
    counted = questions if per is None else estimate.Questions({"any": per}, False)
    left = [(run, of_run) for run, of_run, state in zip(runs, kept, status, strict=True) if state is None]
    counts = [of_run.kept for _, of_run in left]
    disk = None if None in counts else estimate.disk(config, counts, n_visual, counted)
    paces = [estimate.pace(run, earlier) for run, _ in left]
    seconds = None if None in paces else sum(pace.per_question_s * counted.total + pace.per_unit_s * len(config.tasks) for pace in paces)
    basis = Counter(pace.nearness for pace in paces if pace is not None)
    processors = sorted({one.unit.provenance.processor for one in earlier})
    _check_tasks(config)  # last, as it takes seconds to import lmms-eval
    return Preview(config, runs, status, n_visual, kept, questions, disk, seconds, basis, processors, per, notices)


def _check_tasks(config: SweepConfig) -> None:
    from vlm_pruner_eval.sweep.opening import check_tasks

    check_tasks(config)


def _all_kept(runs: Sequence[Run], n_visual: int | None, layers: int | None) -> list[estimate.Kept]:
    found, problems = [], []
    for run in runs:
        try:
            found.append(estimate.kept_tokens(run, n_visual, layers))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def print_preview(console: Console, seen: Preview) -> None:
    """Print the grid and the estimates."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", no_wrap=True, min_width=max(len(run.key) for run in seen.runs))  # which tells runs apart, seeds included
    for name in ("method", "removed", "kept", "layers", ""):
        table.add_column(name)
    for run, kept, status in zip(seen.runs, seen.kept, seen.status, strict=True):
        percent = rate_percent(run.pruning_rate)
        table.add_row(
            escape(run.key),
            escape(run.method),
            "" if percent is None else f"{percent:.1f} %",
            "" if kept.kept is None else f"{kept.kept} of {seen.n_visual}",
            "" if kept.layer_averaged is None else f"{kept.layer_averaged:.1f}",
            {FINISHED: "finished", FAILED: "failed"}.get(status, ""),
        )
    console.print(table)
    console.print("kept: visual tokens from the cut on; layers: the same, averaged over all layers", markup=False, highlight=False)
    for name, text in (("questions", _questions(seen)), ("disk", _disk(seen)), ("time", _time(seen))):
        console.print(f"{name:10s}{text}", markup=False, highlight=False, soft_wrap=True)
    for notice in seen.notices:
        console.print(notice, markup=False, highlight=False, soft_wrap=True)


def _questions(seen: Preview) -> str:
    total, left = seen.questions.total, sum(status is None for status in seen.status)
    if total is None:
        return "unknown without the data sets; --limit says how many at most"
    about = "" if seen.questions.is_exact else "about "
    why = "" if seen.questions.is_exact else " (the limit of each task; more where a task is a group, fewer where it has fewer)"
    return f"{about}{total:,} a run, {about}{total * left:,} in the {left} runs left{why}"


def _disk(seen: Preview) -> str:
    if seen.disk is None:
        return "unknown: set model.visual_tokens (and model.layers, for budget: layer_average), or run with --limit 8 first"
    records, pictures = (_size(count) for count in (seen.disk.records, seen.disk.pictures))
    return f"about {records} of records, and up to {pictures} of pictures{_per(seen)}"


def _time(seen: Preview) -> str:
    if seen.seconds is None:
        return _UNKNOWN
    basis = ", ".join(f"{count} by {nearness}" for nearness, count in seen.basis.items())
    measured = f" (of the runs left {basis}, as measured in this folder on {', '.join(seen.processors)})" if basis else ""
    most = "at most, since they share work, " if seen.config.share_prefix else "about "
    return f"{most}{duration(seen.seconds)} in one process{_per(seen)}{measured}"


def _per(seen: Preview) -> str:
    return "" if seen.per is None else f", if a run asked {seen.per:,} questions"


def _size(count: float) -> str:
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"
