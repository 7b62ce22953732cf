"""From runs to table rows: scores with intervals, the paper's relative average, tokens, times, costs, quirks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_pruner_eval.report.load import Results, RunResult
from vlm_pruner_eval.store.schema import FAILED, FINISHED
from vlm_pruner_eval.store.summaries import Score, Spread, Tokens
from vlm_pruner_eval.sweep.grid import RATELESS, UNPRUNED, rate_percent
from vlm_pruner_eval.sweep.metrics.score_line import relative_average

PLUMBING = "The embedded benchmark (digitscenes) checks the plumbing; it is no evidence about which method is better. No winner is marked."
LITERATURE_FORMULA = "4nd² + 2n²d + 2ndm per layer (FastV, arXiv 2403.06764)"
OUR_FORMULA = "every matrix of the language model's prefill, 2 per multiply-add, full attention matrix, one position of logits"

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
class Costs:
    """Arithmetic, memory and time of a row over its finished seeds. What was not measured or can't be known is None.

    Attributes
    ----------
    flops, literature_flops
        Of one prompt's prefill in the language model (mean), without vision tower and projector: by `OUR_FORMULA`, and by
        `LITERATURE_FORMULA`.
    flops_share
        `flops` as a share of the unpruned row's, 0 to 1 (above 1 if a method makes prompts longer).
    kv_bytes_counted, kv_bytes_measured
        Keys and values after the prefill, a prompt (mean): from the lengths of the layers, and from the cache's tensors, in which a
        prompt's share of its batch holds padding too.
    peak_bytes
        The most that the GPU held at a time, weights included; None on a CPU.
    decode_ms
        `median` and `iqr` of a decoding step.
    decoded_tokens_per_s
        `median` and `iqr` of the rows of a batch over the time of a decoding step.
    prefill_speedup
        Median prefill of the unpruned row over this row's; None if either ran in other batches or on another processor.
    batch_sizes
        Rows of the batches behind the times.
    """

    flops: float | None = None
    literature_flops: float | None = None
    flops_share: float | None = None
    kv_bytes_counted: float | None = None
    kv_bytes_measured: float | None = None
    peak_bytes: int | None = None
    decode_ms: dict[str, float] | None = None
    decoded_tokens_per_s: dict[str, float] | None = None
    prefill_speedup: float | None = None
    batch_sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """A line of the table: a method at a rate, over all its seeds.

    Attributes
    ----------
    pruning_rate
        The fraction removed.
    status
        "finished", "failed", "not run", "not run: answers missing", or "3 of 5 seeds finished".
    cells
        By task; empty unless a run is finished, or failed for tasks that could not be scored only.
    relative
        Relative average in percent.
    tokens
        Visual tokens and misbehaviours of the release, over the samples with images of all its finished runs.
    prefill_ms, selection_ms
        `median` and `iqr` of a batch's prefill, and of a sample's selection (part of the prefill).
    params
        Every parameter of the method, without the seed if there are several.
    changed
        Those that differ from the method's defaults.
    runs
        Ids of its runs, finished or not.
    asked_rate
        The rate of the sweep file under which the row is listed: `pruning_rate`, but for iso-compute rows.
    iso_layer
        Of an iso-compute row: the layer of the methods that it matches in compute.
    costs
        None without a finished run.
    adapted
        How the method is adapted to the model; None if it is as published.
    """

    label: str
    method: str
    pruning_rate: str | float | None
    status: str
    cells: dict[str, Cell]
    relative: Cell
    tokens: Tokens
    prefill_ms: dict[str, float] | None
    selection_ms: dict[str, float] | None
    problems: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    runs: tuple[str, ...] = ()
    asked_rate: str | float | None = None
    iso_layer: int | None = None
    costs: Costs | None = None
    adapted: str | None = None

    @property
    def key(self) -> Key:
        """Label and rate, which tell it from the other rows of its table."""
        return self.label, self.pruning_rate

    @property
    def release(self) -> bool:
        """True if it runs with the misbehaviours of the authors' release."""
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
    groups: dict[Key, list[RunResult]] = {}
    for run in results.runs:
        groups.setdefault((run.label, run.pruning_rate), []).append(run)
    unpruned = [run for run in results.runs if run.method == UNPRUNED and run.finished]
    return sorted((_row(runs, results.tasks, unpruned) for runs in groups.values()), key=lambda row: row.group)


def is_plumbing(tasks: Sequence[str]) -> bool:
    """Return True if a table shows the embedded benchmark."""
    return any(task.startswith("digitscenes") for task in tasks)


def has_one_condition(runs: Sequence[RunResult]) -> bool:
    """Return True if the times of these finished runs (one or more) may be compared: one processor, the same batch sizes."""
    return len({(*run.record.processors, str(run.record.times.batch_sizes)) for run in runs}) == 1


def _row(runs: list[RunResult], tasks: list[str], unpruned: list[RunResult]) -> Row:
    first, finished = runs[0], [run for run in runs if run.finished]
    records = [run.record for run in finished]
    return Row(
        label=first.label,
        method=first.method,
        pruning_rate=first.pruning_rate,
        status=_status(runs),
        cells={task: _cell([record.scores[task].main for record in records]) for task in tasks if records},
        relative=_relative(finished, unpruned),
        tokens=Tokens.merged([record.tokens for record in records]),
        prefill_ms=_time(finished, "prefill_ms"),
        selection_ms=_time(finished, "selection_ms"),
        problems=tuple(f"{run.key}: {run.record.problem}" for run in runs if run.status == FAILED),
        params={name: value for name, value in first.params.items() if name != "seed" or len(runs) == 1},
        changed=first.changed,
        runs=tuple(run.run_id for run in runs),
        asked_rate=first.asked_rate,
        iso_layer=first.iso_layer,
        costs=_costs(finished, unpruned) if finished else None,
        adapted=records[0].adapted if records else None,
    )


def _costs(runs: list[RunResult], unpruned: list[RunResult]) -> Costs:
    memory = [run.record.memory for run in runs]
    flops, full_flops = (_mean([run.record.memory.flops for run in listed]) for listed in (runs, unpruned))
    prefill, full_prefill = _time(runs, "prefill_ms"), _time(unpruned, "prefill_ms")
    comparable = prefill and full_prefill and has_one_condition([*runs, *unpruned])
    means = {
        name: _mean([getattr(held, name) for held in memory]) for name in ("literature_flops", "kv_bytes_counted", "kv_bytes_measured")
    }
    return Costs(
        flops=flops,
        flops_share=flops / full_flops if flops is not None and full_flops else None,
        **means,
        peak_bytes=max((held.peak_bytes for held in memory if held.peak_bytes is not None), default=None),
        decode_ms=_time(runs, "decode_ms"),
        decoded_tokens_per_s=_time(runs, "decoded_tokens_per_s"),
        prefill_speedup=full_prefill["median"] / prefill["median"] if comparable and prefill["median"] > 0 else None,
        batch_sizes=tuple(sorted({size for run in runs for size in run.record.times.batch_sizes})),
    )


def _time(runs: Sequence[RunResult], name: str) -> dict[str, float] | None:
    """Median over the runs of their `median` and of their `iqr`, in their unit; None if none of them has such a time."""
    known = [found for run in runs if (found := getattr(run.record.times, name)) is not None]
    return {key: statistics.median(getattr(found, key) for found in known) for key in ("median", "iqr")} if known else None


def _status(runs: list[RunResult]) -> str:
    kinds = {run.status for run in runs}
    return runs[0].status if len(kinds) == 1 else f"{[run.status for run in runs].count(FINISHED)} of {len(runs)} seeds {FINISHED}"


def _relative(finished: list[RunResult], unpruned: list[RunResult]) -> Cell:
    averages = [relative_average(run.scores, unpruned[0].scores) if unpruned else None for run in finished]
    if not averages or None in averages:
        return Cell(None)
    return Cell(statistics.fmean(averages), sd=_sd(averages), seeds=len(averages))


def _cell(mains: list[Score | None]) -> Cell:
    if any(main is None for main in mains):
        return Cell(None)
    if len(mains) == 1:
        return Cell(mains[0].value, mains[0].low, mains[0].high, n=mains[0].n)
    values = [main.value for main in mains]
    return Cell(statistics.fmean(values), sd=_sd(values), n=mains[0].n, seeds=len(values))


def _sd(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _mean(spreads: Sequence[Spread | None]) -> float | None:
    known = [spread.mean for spread in spreads if spread is not None]
    return math.fsum(known) / len(known) if known else None
