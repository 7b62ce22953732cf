"""The rows of a reproduction: scores beside printed numbers, equivalence of the release rows, and how often quirks fired."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.tables import Cell, Row
from vlm_pruner_eval.reproduce.gate import tolerance, within
from vlm_pruner_eval.reproduce.noise import Noise
from vlm_pruner_eval.reproduce.plan import Plan
from vlm_pruner_eval.reproduce.printed import AVERAGE, BENCHMARKS, Number, PrintedNumbers, full_score, is_possible, is_whole_paper
from vlm_pruner_eval.sweep.grid import UNPRUNED, Run, expand

EQUIVALENT, DIFFERENT, INCOMPARABLE = "equivalent", "different", "not comparable"
# Parameters in which a row may differ from the method's defaults and still be what the paper ran.
_FREE = frozenset({"official_quirks", "selection_dtype", "seed"})


@dataclass(frozen=True)
class Compared:
    """A score with its 95 % interval, the printed number with its tolerance if there is one, and, on release rows, the verdict."""

    cell: Cell
    printed: Number | None
    tolerance: float | None
    verdict: str | None

    @property
    def difference(self) -> float | None:
        """Score minus printed number."""
        return None if self.printed is None or self.cell.value is None else self.cell.value - self.printed.value


@dataclass(frozen=True)
class ReproducedRow:
    """A line of the table.

    Attributes
    ----------
    row
        What the report of the sweep says of it.
    release
        Whether it runs with the release's quirks.
    cells
        By task; empty unless a run is finished.
    average
        The relative average; a printed one stands beside it when the tasks are the paper's nine.
    samples
        Prompts with images over all finished seeds.
    quirks
        Share of them in which a quirk fired (release) or would have fired.
    """

    row: Row
    release: bool
    cells: dict[str, Compared]
    average: Compared
    samples: int
    quirks: dict[str, float]


@dataclass(frozen=True)
class _Reference:
    """What rows are held against."""

    plan: Plan
    noise: Noise
    printed: PrintedNumbers

    def compare(self, run: Run, row: Row, cell: Cell, benchmark: str | None, spread: float | None) -> Compared:
        """A cell beside its printed number."""
        number = self.printed.find(self.plan.vlm, run.method, row.percent, benchmark) if _is_as_published(run) else None
        if number is None:
            return Compared(cell, None, None, None)
        allowed = tolerance(full_score(benchmark), spread)
        return Compared(cell, number, allowed, self._verdict(run, cell, number, benchmark, allowed))

    def _verdict(self, run: Run, cell: Cell, number: Number, benchmark: str, allowed: float) -> str | None:
        if cell.value is None or not _is_release(run):
            return None
        unsound = not is_possible(number, benchmark) or (benchmark == AVERAGE and not self.printed.has_sound_averages(self.plan.vlm))
        if self.plan.incomparable or unsound:
            return INCOMPARABLE
        return EQUIVALENT if within(cell.value - number.value, allowed) else DIFFERENT


def reproduced_rows(plan: Plan, results: Results, rows: list[Row], noise: Noise, printed: PrintedNumbers) -> list[ReproducedRow]:
    """Every row of the sweep under DIR/rows with its printed numbers.

    Parameters
    ----------
    results, rows
        ``load_results(plan.rows_dir)`` and ``rows_of(results)``.
    """
    against = _Reference(plan, noise, printed)
    runs = {(run.label, run.pruning_rate): run for run in expand(plan.rows)}
    return [_reproduced(against, runs[row.label, row.pruning_rate], row, results) for row in rows]


def _reproduced(against: _Reference, run: Run, row: Row, results: Results) -> ReproducedRow:
    samples = sum(_with_images(results, row))
    spreads = {task: measured.spread for task, measured in against.noise.tasks.items()}
    whole = AVERAGE if is_whole_paper(results.tasks) else None
    return ReproducedRow(
        row=row,
        release=_is_release(run),
        cells={task: against.compare(run, row, cell, BENCHMARKS.get(task), spreads.get(task)) for task, cell in row.cells.items()},
        average=against.compare(run, row, row.relative, whole, against.noise.average_spread),
        samples=samples,
        quirks={name: count / samples for name, count in sorted(row.quirks.items())},
    )


def _with_images(results: Results, row: Row) -> Iterator[int]:
    for run in results.runs:
        if run.finished and (run.label, run.pruning_rate) == (row.label, row.pruning_rate):
            yield run.record["tokens"]["samples_with_images"]


def _is_release(run: Run) -> bool:
    return run.method != UNPRUNED and bool(run.config["parameters"]["official_quirks"])


def _is_as_published(run: Run) -> bool:
    """Whether the row has the method's default settings, which are the paper's: an ablation has no printed number here."""
    from vlm_pruner_eval.pruners import parameters, pruner_class

    defaults = parameters(pruner_class(run.method))
    return all(value == defaults[name] for name, value in run.config["parameters"].items() if name not in _FREE)


def as_json(rows: list[ReproducedRow]) -> list[dict[str, Any]]:
    """The rows in plain types."""
    return [
        {
            **{name: getattr(item.row, name) for name in ("label", "method", "pruning_rate", "status")},
            "removed_percent": item.row.percent,
            "release": item.release,
            "scores": {task: compared_json(compared) for task, compared in item.cells.items()},
            "relative_average": compared_json(item.average),
            "tokens_asked": item.row.asked,
            "tokens_kept": item.row.kept,
            "samples_with_images": item.samples,
            "quirks": {name: {"samples": item.row.quirks[name], "share": share} for name, share in item.quirks.items()},
            "problems": list(item.row.problems),
        }
        for item in rows
    ]


def compared_json(compared: Compared) -> dict[str, Any]:
    """A cell in plain types."""
    printed = None if compared.printed is None else dataclasses.asdict(compared.printed)
    return dataclasses.asdict(compared.cell) | {
        "printed": printed,
        "difference": compared.difference,
        "tolerance": compared.tolerance,
        "verdict": compared.verdict,
    }
