"""Every row against the unpruned one and against the other rows of its rate: paired, over whole clusters of documents."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlm_pruner_eval.report.answer_arrays import Answers
from vlm_pruner_eval.report.load import Results, RunResult
from vlm_pruner_eval.report.rows import Row, is_plumbing
from vlm_pruner_eval.report.stats import paired
from vlm_pruner_eval.report.stats.comparisons import AVERAGE, Comparison, Comparisons, Contest, Pair, Power
from vlm_pruner_eval.report.stats.flip_counts import Flips, flips
from vlm_pruner_eval.report.stats.paired import Estimate
from vlm_pruner_eval.store.summaries import ClusterCount
from vlm_pruner_eval.sweep.grid import RATELESS, UNPRUNED


def compare(results: Results, rows: Sequence[Row]) -> Comparisons:
    """Compare every row with the unpruned one, and the rows of each rate with one another.

    All intervals are paired: replicate k of every run holds the same clusters of documents. Replicates of several seeds are averaged,
    so the interval of such a row is about the documents; the spread of the seeds is in `sd`. `AVERAGE` is computed on every replicate
    together with its denominators, replicate k of each task over replicate k of the unpruned run's; tasks are independent.

    Parameters
    ----------
    rows
        Of `rows_of`.
    """
    table = _Table.read(results, rows)
    known = [(line, task) for line in table.lines for task in (*results.tasks, AVERAGE) if line.values.get(task) is not None]
    cells = [table.cell(line, task) for line, task in known]
    fields = list(table.fields())
    contests = tuple(contest for group, task in fields if (contest := table.contest(group, task)) is not None)
    won = {(contest.best, contest.pruning_rate, contest.task) for contest in contests if contest.decided}
    cells = tuple(
        replace(cell, p_holm=p, bold=(cell.label, line.row.asked_rate, cell.task) in won)
        for cell, p, (line, _) in zip(cells, paired.holm([cell.p for cell in cells]), known, strict=True)
    )
    pairs = tuple(pair for group, task in fields for pair in table.pairs(group, task))
    power = tuple(found for task in results.tasks if (found := table.power(task)) is not None)
    return Comparisons(cells, contests, pairs, power, tuple(table.notes()))


@dataclass(frozen=True)
class _Task:
    """What the record of a run says of one task.

    Attributes
    ----------
    clusters
        Number and digest of the clusters that were resampled.
    leaves
        Tasks that the answers are logged under: itself, or the tasks of a group.
    note
        Reason why its score has no interval, if there is one.
    """

    clusters: ClusterCount | None
    leaves: tuple[str, ...]
    note: str | None


def _read_tasks(run: RunResult) -> dict[str, _Task]:
    found = {}
    for task, held in run.record.scores.items():
        leaves = tuple(name for name, part in held.metrics.items() if part.metric is not None)
        note = next((part.note for part in held.metrics.values() if part.note is not None), None)
        found[task] = _Task(held.clusters, leaves or (task,), note)
    return found


@dataclass(frozen=True)
class _Line:
    """A row with what its comparisons need, by task and `AVERAGE`: values, replicates [resamples], flips of each of its runs."""

    row: Row
    values: dict[str, float | None]
    draws: dict[str, np.ndarray]
    flips: dict[str, list[Flips]]


@dataclass(frozen=True)
class _Table:
    """All rows; `of_record` is what the first finished run says of its tasks, whose clusters all others must have drawn as well."""

    results: Results
    of_record: dict[str, _Task]
    lines: list[_Line]
    unpruned: _Line | None
    blind: _Line | None

    @classmethod
    def read(cls, results: Results, rows: Sequence[Row]) -> _Table:
        """Read replicates and answers of all runs."""
        runs = {run.run_id: _read_tasks(run) for run in results.runs if run.finished}
        reference = next((row for row in rows if row.cells and row.method == UNPRUNED), None)
        answers = results.answers(reference.runs[0]) if reference is not None else None
        lines = [_line(results, row, runs, None if row is reference else answers) for row in rows]
        unpruned = next((line for line in lines if line.row is reference), None)
        blind = next((line for line in lines if line.row.cells and line.row.method in RATELESS), None)
        # the average on every replicate, over the unpruned scores on the same
        full = unpruned.draws.copy() if unpruned is not None else {}
        for line in lines:
            if all(task in line.draws and task in full and (full[task] > 0).all() for task in results.tasks):
                line.draws[AVERAGE] = 100.0 * np.mean([line.draws[task] / full[task] for task in results.tasks], axis=0)
        return cls(results, next(iter(runs.values()), {}), lines, unpruned, blind)

    # ---- against the unpruned row
    def cell(self, line: _Line, task: str) -> Comparison:
        """One row on one task; the row has a value there."""
        row, source = line.row, line.row.relative if task == AVERAGE else line.row.cells[task]
        score = paired.estimate(source.value, line.draws.get(task))
        if source.low is not None:
            score = Estimate(source.value, source.low, source.high)  # Wilson's interval if replicates show no spread
        alone = Comparison(row.label, row.pruning_rate, task, score, source.sd, source.seeds)
        if self.unpruned is None or line is self.unpruned or self.unpruned.values.get(task) is None:
            return alone
        difference, p = self._difference(line, self.unpruned, task)
        listed = line.flips.get(task, [])
        return replace(
            alone,
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
        of_tasks = {name: held.clusters.n for name, held in self.of_record.items() if held.clusters is not None}
        return min(of_tasks.values()) if task == AVERAGE else of_tasks[task]

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
    def fields(self) -> Iterator[tuple[list[_Line], str]]:
        """The rows of each rate that have a value, task after task."""
        pruned = [line for line in self.lines if line.row.method != UNPRUNED and line.row.method not in RATELESS]
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
        return [replace(pair, p_holm=p) for pair, p in zip(made, paired.holm([pair.p for pair in made]), strict=True)]

    def contest(self, group: list[_Line], task: str) -> Contest | None:
        """The best two rows of a rate; None of fewer than two."""
        ranked = sorted((line for line in group if line.row.iso_layer is None), key=lambda line: -line.values[task])
        if len(ranked) < 2:
            return None
        best, second = ranked[:2]
        difference, _ = self._difference(best, second, task)
        decided = difference.excludes_zero and not is_plumbing(self.results.tasks)
        return Contest(task, best.row.asked_rate, best.row.label, second.row.label, difference, decided)

    def power(self, task: str) -> Power | None:
        """None if no pruned row differs from the unpruned one on any replicate: of such data the spread is not known."""
        if self.unpruned is None or task not in self.unpruned.draws:
            return None
        n = self._n_clusters(task)
        pruned = [line for line in self.lines if line.row.group[0] == 1 and task in line.draws]
        errors = [paired.standard_error(line.draws[task] - self.unpruned.draws[task], n) for line in pruned]
        spread = [error for error in errors if error > 0]
        if not spread:
            return None
        return Power(task, self.unpruned.row.cells[task].n, n, paired.smallest_difference(statistics.median(spread)))

    # ---- what is missing
    def notes(self) -> Iterator[str]:
        """A sentence for everything that could not be computed."""
        if self.unpruned is None:
            yield "The unpruned run is not finished, so there are no differences to it, no flips and no relative averages."
            return
        values, draws = self.unpruned.values, self.unpruned.draws
        for task in self.results.tasks:
            if values.get(task) is not None and task not in draws:
                yield f"{task}: differences have no interval ({self.of_record[task].note or 'its replicates are not there'})."
            elif task in draws and not (draws[task] > 0).all():
                yield f"Relative averages have no interval: in some resamples of {task} the unpruned model scores 0 (few documents)."
        missing = [task for task in self.results.tasks if task not in draws]
        if missing and values.get(AVERAGE) is not None:
            yield f"Relative averages have no interval and no p value: {', '.join(missing)} has none."
        for line in self.lines:
            lacks = [task for task in self.results.tasks if task in draws and task not in line.draws]
            if lacks and line.values.get(AVERAGE) is not None:
                yield f"{line.row.label}: its relative average has no interval and no p value: {', '.join(lacks)} has none in this row."
        for task in self.results.tasks if self.blind is not None else ():
            known = values.get(task) is not None and self.blind.values.get(task) is not None
            if known and self._gain(self.unpruned, task) is None:
                yield f"{task}: these documents show no gain of the unpruned model over the blind one, so there is no share of it to keep."


def _line(results: Results, row: Row, runs: Mapping[str, dict[str, _Task]], answers: Answers | None) -> _Line:
    """Read the runs of a row; flips are counted against `answers`, those of the unpruned run."""
    first = next(iter(runs.values()), {})
    finished = [run_id for run_id in row.runs if run_id in runs]
    drawn: dict[str, list[np.ndarray]] = {}
    flipped: dict[str, list[Flips]] = {}
    for run_id in finished:
        for task, draws in results.read_draws(run_id).items():
            if task in first and first[task].clusters is not None and runs[run_id][task].clusters == first[task].clusters:
                drawn.setdefault(task, []).append(draws)
        ours = {} if answers is None else results.answers(run_id)
        for task, held in first.items() if answers is not None else ():
            if (one := flips(ours, answers, list(held.leaves))) is not None:
                flipped.setdefault(task, []).append(one)
    return _Line(
        row,
        {task: cell.value for task, cell in row.cells.items()} | {AVERAGE: row.relative.value},
        {task: np.mean(listed, axis=0) for task, listed in drawn.items() if len(listed) == len(finished)},
        {task: listed for task, listed in flipped.items() if len(listed) == len(finished)},
    )
