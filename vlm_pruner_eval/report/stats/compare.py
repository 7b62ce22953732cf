"""Every row against the unpruned one and against the other rows of its rate: paired, over whole clusters of documents."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.rows import Row, is_plumbing, rows_of
from vlm_pruner_eval.report.stats import paired
from vlm_pruner_eval.report.stats.answers import Answers, Flips, flips, read_answers
from vlm_pruner_eval.report.stats.comparisons import AVERAGE, Comparison, Comparisons, Contest, Pair, Power
from vlm_pruner_eval.report.stats.paired import Estimate
from vlm_pruner_eval.sweep.grid import RATELESS, UNPRUNED


def compare(results: Results, rows: Sequence[Row] | None = None) -> Comparisons:
    """Compare every row with the unpruned one, and the rows of each rate with one another.

    All intervals are paired: draw k of every run holds the same clusters of documents. Draws of several seeds are averaged, so
    the interval of such a row is about the documents; what the seeds add is in `sd`. `AVERAGE` is computed on every draw together
    with its denominators, draw k of each task over draw k of the unpruned run's; tasks are independent.

    Parameters
    ----------
    rows
        Of `rows.rows_of`, if they are there already.
    """
    rows = rows_of(results) if rows is None else rows
    table = _Table.read(results, rows)
    lines = [table.line(row) for row in rows]
    cells = [table.cell(line, task) for line in lines for task in (*results.tasks, AVERAGE) if line.values.get(task) is not None]
    cells = [dataclasses.replace(cell, p_holm=p) for cell, p in zip(cells, paired.holm([cell.p for cell in cells]), strict=True)]
    pairs = tuple(pair for group, task in table.fields(lines) for pair in table.pairs(group, task))
    contests = tuple(contest for group, task in table.fields(lines) if (contest := table.contest(group, task)) is not None)
    won = {(contest.best, contest.pruning_rate, contest.task) for contest in contests if contest.decided}
    listed = {row.key: row.asked_rate for row in rows}
    cells = [dataclasses.replace(cell, bold=(cell.label, listed[cell.label, cell.pruning_rate], cell.task) in won) for cell in cells]
    power = tuple(found for task in results.tasks if (found := table.power(lines, task)) is not None)
    return Comparisons(tuple(cells), contests, pairs, power, tuple(table.notes(lines)))


@dataclass(frozen=True)
class _Line:
    """A row with what its comparisons need, by task and `AVERAGE`: values, draws [resamples], flips of its one run or of each seed."""

    row: Row
    values: dict[str, float | None]
    draws: dict[str, np.ndarray]
    flips: dict[str, list[Flips]]


@dataclass(frozen=True)
class _Table:
    """The runs behind a table; `clusters` is what the first finished run drew by task, which all others must have drawn as well."""

    results: Results
    records: dict[str, dict[str, Any]]
    clusters: dict[str, dict[str, Any]]
    leaves: dict[str, list[str]]
    unpruned: _Line | None
    answers: Answers | None
    blind: _Line | None

    @classmethod
    def read(cls, results: Results, rows: Sequence[Row]) -> _Table:
        records = {run.run_id: run.record for run in results.runs if run.finished}
        tasks = next(iter(records.values()))["tasks"] if records else {}
        clusters = {task: held["clusters"] for task, held in tasks.items() if "clusters" in held}
        leaves = {task: [leaf for leaf, part in held["metrics"].items() if "metric" in part] or [task] for task, held in tasks.items()}
        table = cls(results, records, clusters, leaves, None, None, None)
        found = {row.method: row for row in rows if row.cells and (row.method == UNPRUNED or row.method in RATELESS)}
        if UNPRUNED in found:
            (run_id, *_) = found[UNPRUNED].runs
            table = dataclasses.replace(table, unpruned=table.line(found[UNPRUNED]), answers=read_answers(results.store, run_id))
        blind = next((found[name] for name in RATELESS if name in found), None)
        return table if blind is None else dataclasses.replace(table, blind=table.line(blind))

    def line(self, row: Row) -> _Line:
        if self.unpruned is not None and row is self.unpruned.row:
            return self.unpruned
        if self.blind is not None and row is self.blind.row:
            return self.blind
        finished = [run_id for run_id in row.runs if run_id in self.records]
        values = {task: cell.value for task, cell in row.cells.items()} | {AVERAGE: row.relative.value}
        of_runs = [self._draws(run_id) for run_id in finished]
        shared = set.intersection(*(set(held) for held in of_runs)) if of_runs else set()
        draws = {task: np.mean([held[task] for held in of_runs], axis=0) for task in shared}
        reference = draws if row.method == UNPRUNED else self.unpruned.draws if self.unpruned else {}
        if all(task in draws and task in reference and (reference[task] > 0).all() for task in self.results.tasks):
            draws[AVERAGE] = 100.0 * np.mean([draws[task] / reference[task] for task in self.results.tasks], axis=0)
        return _Line(row, values, draws, self._flips(finished))

    def _draws(self, run_id: str) -> dict[str, np.ndarray]:
        """By task, where they are of the same clusters as the other runs'."""
        scored = self.records[run_id]["tasks"]
        same = {task for task, own in self.clusters.items() if task in scored and scored[task].get("clusters") == own}
        return {task: draws for task, draws in self.results.store.read_draws(run_id).items() if task in same}

    def _flips(self, finished: list[str]) -> dict[str, list[Flips]]:
        if self.answers is None:
            return {}
        found: dict[str, list[Flips]] = {}
        for run_id in finished:
            ours = read_answers(self.results.store, run_id)
            for task, leaves in self.leaves.items():
                if (one := flips(ours, self.answers, leaves)) is not None:
                    found.setdefault(task, []).append(one)
        return {task: listed for task, listed in found.items() if len(listed) == len(finished)}

    # ---- against the unpruned row
    def cell(self, line: _Line, task: str) -> Comparison:
        """One row on one task; the row has a value there."""
        row, source = line.row, line.row.relative if task == AVERAGE else line.row.cells[task]
        score = paired.estimate(source.value, line.draws.get(task))
        if source.low is not None:
            score = Estimate(source.value, source.low, source.high)  # Wilson's interval where draws show no spread
        shared = {"score": score, "sd": source.sd, "seeds": source.seeds}
        if self.unpruned is None or row is self.unpruned.row or self.unpruned.values.get(task) is None:
            return Comparison(row.label, row.pruning_rate, task, **shared)
        difference, p = self._difference(line, self.unpruned, task)
        listed = line.flips.get(task, [])
        return Comparison(
            *(row.label, row.pruning_rate, task),
            **shared,
            difference=difference,
            p=p,
            mcnemar_p=listed[0].mcnemar_p if len(listed) == 1 else None,
            flip_rate=self._flip_rate(line, task),
            gain_kept=self._gain(line, task),
            alike=self._documents(row, task) if p is not None and difference.low is None else None,
        )

    def _difference(self, first: _Line, second: _Line, task: str) -> tuple[Estimate, float | None]:
        value = first.values[task] - second.values[task]
        if task not in first.draws or task not in second.draws:
            return Estimate(value), None
        draws = first.draws[task] - second.draws[task]
        return paired.difference(value, draws), paired.p_of_no_difference(value, draws, self._n_clusters(task))

    def _documents(self, row: Row, task: str) -> int:
        """Those of a row's task, or of all of them."""
        return sum(row.cells[name].n or 0 for name in (self.results.tasks if task == AVERAGE else [task]))

    def _n_clusters(self, task: str) -> int:
        """Of an average, those of the task with the fewest."""
        return min(held["n"] for held in self.clusters.values()) if task == AVERAGE else self.clusters[task]["n"]

    def _flip_rate(self, line: _Line, task: str) -> float | None:
        tasks = self.results.tasks if task == AVERAGE else [task]
        if not all(name in line.flips for name in tasks):
            return None
        return statistics.fmean(statistics.fmean(one.rate for one in line.flips[name]) for name in tasks)

    def _gain(self, line: _Line, task: str) -> Estimate | None:
        if self.blind is None or line is self.blind or self.blind.values.get(task) is None:
            return None
        three = (line, self.unpruned, self.blind)
        return paired.share_of_gain(*(one.values[task] for one in three), [one.draws.get(task) for one in three])

    # ---- against one another
    def fields(self, lines: list[_Line]) -> Iterator[tuple[list[_Line], str]]:
        """The rows of each rate that have a value, task after task."""
        pruned = [line for line in lines if line.row.method != UNPRUNED and line.row.method not in RATELESS]
        for _, group in itertools.groupby(pruned, key=lambda line: line.row.group):
            listed = list(group)
            for task in (*self.results.tasks, AVERAGE):
                yield [line for line in listed if line.values.get(task) is not None], task

    def pairs(self, group: list[_Line], task: str) -> list[Pair]:
        """All pairs of the rows of a rate."""
        made = [
            Pair(task, first.row.asked_rate, first.row.label, second.row.label, *self._difference(first, second, task))
            for first, second in itertools.combinations(group, 2)
        ]
        return [dataclasses.replace(pair, p_holm=p) for pair, p in zip(made, paired.holm([pair.p for pair in made]), strict=True)]

    def contest(self, group: list[_Line], task: str) -> Contest | None:
        """The best two rows of a rate; None of fewer than two."""
        ranked = sorted((line for line in group if line.row.iso_layer is None), key=lambda line: -line.values[task])
        if len(ranked) < 2:
            return None
        best, second = ranked[:2]
        difference, _ = self._difference(best, second, task)
        decided = difference.excludes_zero and not is_plumbing(self.results.tasks)
        return Contest(task, best.row.asked_rate, best.row.label, second.row.label, difference, decided)

    def power(self, lines: list[_Line], task: str) -> Power | None:
        """None where no pruned row differs from the unpruned one on any draw: of such data the spread is not known."""
        if self.unpruned is None or task not in self.unpruned.draws:
            return None
        pruned = [line for line in lines if line.row.group[0] == 1 and task in line.draws]
        n = self.clusters[task]["n"]
        errors = [paired.standard_error(line.draws[task] - self.unpruned.draws[task], n) for line in pruned]
        spread = [error for error in errors if error > 0]
        if not spread:
            return None
        documents = self.unpruned.row.cells[task].n
        return Power(task, documents, n, paired.smallest_difference(statistics.median(spread)))

    # ---- what is missing
    def notes(self, lines: list[_Line]) -> Iterator[str]:
        """A sentence for everything that could not be computed."""
        if self.unpruned is None:
            yield "The unpruned run is not finished, so there are no differences to it, no flips and no relative averages."
        older = [line.row.label for line in lines if line.row.cells and not self._is_new(line.row)]
        if older:
            names = ", ".join(dict.fromkeys(older))
            yield f"Intervals of differences are not available for {names}: run made by an older version; run the sweep again for them."
        if self.unpruned is None or not self._is_new(self.unpruned.row):
            return
        for task in self.results.tasks:
            if self.unpruned.values.get(task) is not None and task not in self.unpruned.draws:
                yield f"{task}: differences have no interval ({self._why(task)})."
            elif task in self.unpruned.draws and not (self.unpruned.draws[task] > 0).all():
                yield f"Relative averages have no interval: in some resamples of {task} the unpruned model scores 0 (few documents)."
        yield from self._no_average(lines)
        if self.blind is not None:
            yield from self._no_gain()

    def _no_average(self, lines: list[_Line]) -> Iterator[str]:
        """Tasks that leave relative averages without intervals and p values, and the rows that this concerns where not all are."""
        missing = [task for task in self.results.tasks if task not in self.unpruned.draws]
        if missing and self.unpruned.values.get(AVERAGE) is not None:
            yield f"Relative averages have no interval and no p value: {', '.join(missing)} has none."
        for line in lines:
            lacks = [task for task in self.results.tasks if task in self.unpruned.draws and task not in line.draws]
            if lacks and line.values.get(AVERAGE) is not None and self._is_new(line.row):
                yield f"{line.row.label}: its relative average has no interval and no p value: {', '.join(lacks)} has none in this row."

    def _is_new(self, row: Row) -> bool:
        return any("clusters" in held for run_id in row.runs if run_id in self.records for held in self.records[run_id]["tasks"].values())

    def _why(self, task: str) -> str:
        (run_id, *_) = self.unpruned.row.runs
        notes = [held["note"] for held in self.records[run_id]["tasks"][task]["metrics"].values() if "note" in held]
        return notes[0] if notes else "its draws are not there"

    def _no_gain(self) -> Iterator[str]:
        for task in self.results.tasks:
            known = self.unpruned.values.get(task) is not None and self.blind.values.get(task) is not None
            if known and self._gain(self.unpruned, task) is None:
                yield f"{task}: these documents show no gain of the unpruned model over the blind one, so there is no share of it to keep."
