"""From runs to table rows: scores with intervals, the paper's relative average, tokens, times, quirks."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_pruner_eval.report.load import Results, RunResult
from vlm_pruner_eval.sweep.grid import RATELESS, UNPRUNED, rate_percent
from vlm_pruner_eval.sweep.score_line import relative_average
from vlm_pruner_eval.sweep.store import FAILED, FINISHED

PLUMBING = "The embedded benchmark (digitscenes) checks the plumbing; it is no evidence about which method is better. No winner is marked."

Key = tuple[str, str | float | None]  # label and rate


@dataclass(frozen=True)
class Cell:
    """A score: one run's value with its 95 % interval, or the mean over `seeds` runs with their standard deviation."""

    value: float | None
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    n: int | None = None
    seeds: int = 1


@dataclass(frozen=True)
class Row:
    """A line of the table: a method at a rate, over all its seeds.

    Attributes
    ----------
    pruning_rate
        The fraction removed.
    status
        "finished", "failed", "not run", "not run: samples missing", or "3 of 5 seeds finished".
    cells
        By task; empty unless a run is finished, or failed for tasks that could not be scored only.
    relative
        Relative average in percent.
    asked, kept, layer_averaged
        Visual tokens a prompt: asked for, measured, measured and averaged over the decoder layers.
    params
        Every parameter of the method, without the seed where there are several.
    changed
        Those that differ from the method's defaults; None where an older version did not record them.
    runs
        Ids of its runs, finished or not.
    asked_rate
        The rate of the sweep file under which the row is listed: `pruning_rate`, but for iso-compute rows.
    iso_layer
        Of an iso-compute row: the layer of the methods that it matches in compute.
    n_samples
        Samples with images, of all its finished runs: those that `quirks` counts of.
    """

    label: str
    method: str
    pruning_rate: str | float | None
    status: str
    cells: dict[str, Cell]
    relative: Cell
    asked: dict[str, float] | None
    kept: dict[str, float] | None
    layer_averaged: float | None
    prefill_ms: dict[str, float] | None
    selection_ms: dict[str, float] | None
    quirks: dict[str, int]
    problems: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] | None = None
    runs: tuple[str, ...] = ()
    asked_rate: str | float | None = None
    iso_layer: int | None = None
    n_samples: int = 0

    @property
    def key(self) -> Key:
        """What tells it from the other rows of its table."""
        return self.label, self.pruning_rate

    @property
    def release(self) -> bool:
        """Whether it runs with the misbehaviours of the authors' release."""
        return bool(self.params.get("official_quirks"))

    @property
    def percent(self) -> float | None:
        """Percentage of visual tokens removed; None for the unpruned and the blind row."""
        return rate_percent(self.pruning_rate)

    @property
    def removed_percent(self) -> float | None:
        """The same for programs: 0 for the unpruned row, 100 for the blind one."""
        return {UNPRUNED: 0.0}.get(self.method, 100.0 if self.method in RATELESS else self.percent)

    @property
    def group(self) -> tuple[int, float]:
        """Sort key: unpruned first, rates ascending, then methods without a rate."""
        if self.method == UNPRUNED:
            return 0, 0.0
        return (2, 0.0) if self.method in RATELESS else (1, rate_percent(self._listed) or 0.0)

    @property
    def _listed(self) -> str | float | None:
        return self.pruning_rate if self.iso_layer is None else self.asked_rate

    @property
    def heading(self) -> str:
        """The heading of its group."""
        if self.method == UNPRUNED:
            return "unpruned"
        if self.method in RATELESS:
            return "no visual token"
        exact = f" ({self._listed})" if isinstance(self._listed, str) else ""
        return f"{rate_percent(self._listed):.1f} % removed{exact}"


def rows_of(results: Results) -> list[Row]:
    """All rows, unpruned first, then by rate in the order of the grid."""
    unpruned = next((run for run in results.runs if run.method == UNPRUNED and run.finished), None)
    groups: dict[tuple, list[RunResult]] = {}
    for run in results.runs:
        groups.setdefault((run.label, run.pruning_rate), []).append(run)
    rows = [_row(runs, results.tasks, unpruned) for runs in groups.values()]
    return sorted(rows, key=lambda row: row.group)


def time_over_seeds(records: Sequence[dict[str, Any]], name: str) -> dict[str, float] | None:
    """Median over the records of their `median` and of their `iqr`, in their unit; None where none of them has such a time."""
    known = [found for record in records if (found := record["times"].get(name)) is not None]
    return {key: statistics.median(found[key] for found in known) for key in ("median", "iqr")} if known else None


def is_plumbing(tasks: Sequence[str]) -> bool:
    """Whether a table shows the embedded benchmark."""
    return any(task.startswith("digitscenes") for task in tasks)


def _row(runs: list[RunResult], tasks: list[str], unpruned: RunResult | None) -> Row:
    finished = [run for run in runs if run.finished]
    records = [run.record for run in finished]
    averages = [_average(run, unpruned) for run in finished]
    known = [value for value in averages if value is not None]
    complete = len(known) == len(averages) and bool(known)
    return Row(
        label=runs[0].label,
        method=runs[0].method,
        pruning_rate=runs[0].pruning_rate,
        status=_status(runs),
        cells={task: _cell([record["tasks"][task]["main"] for record in records]) for task in tasks if records},
        relative=Cell(statistics.fmean(known), sd=_sd(known), seeds=len(known)) if complete else Cell(None),
        asked=_merged([record["tokens"]["asked"] for record in records]),
        kept=_merged([record["tokens"]["kept"] for record in records]),
        layer_averaged=_mean([(record["tokens"]["layer_averaged"] or {}).get("mean") for record in records]),
        prefill_ms=time_over_seeds(records, "prefill_ms"),
        selection_ms=time_over_seeds(records, "selection_ms"),
        quirks=dict(sum((Counter(record["tokens"]["quirks"]) for record in records), Counter())),
        problems=tuple(f"{run.key}: {run.record['problem']}" for run in runs if run.status == FAILED),
        params={name: value for name, value in runs[0].params.items() if name != "seed" or len(runs) == 1},
        changed=runs[0].changed,
        runs=tuple(run.run_id for run in runs),
        asked_rate=runs[0].asked_rate,
        iso_layer=runs[0].iso_layer,
        n_samples=sum(record["tokens"].get("samples_with_images", 0) for record in records),
    )


def _status(runs: list[RunResult]) -> str:
    kinds = {run.status for run in runs}
    return runs[0].status if len(kinds) == 1 else f"{[run.status for run in runs].count(FINISHED)} of {len(runs)} seeds {FINISHED}"


def _average(run: RunResult, unpruned: RunResult | None) -> float | None:
    if unpruned is None:
        return None
    return relative_average(run.scores, unpruned.scores)


def _cell(mains: list[dict[str, Any] | None]) -> Cell:
    if any(main is None for main in mains):
        return Cell(None)
    if len(mains) == 1:
        return Cell(**{name: mains[0][name] for name in ("value", "low", "high", "n")})
    values = [main["value"] for main in mains]
    return Cell(statistics.fmean(values), sd=_sd(values), n=mains[0]["n"], seeds=len(values))


def _sd(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _merged(spreads: list[dict[str, float] | None]) -> dict[str, float] | None:
    known = [spread for spread in spreads if spread is not None]
    if not known:
        return None
    low, high = min(spread["min"] for spread in known), max(spread["max"] for spread in known)
    return {"mean": statistics.fmean(spread["mean"] for spread in known), "min": low, "max": high}
