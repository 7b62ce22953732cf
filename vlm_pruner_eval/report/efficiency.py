"""What each row of the table cost: tokens, arithmetic, memory, time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.rows import Key, Row, rows_of, time_over_seeds
from vlm_pruner_eval.sweep.grid import UNPRUNED

LITERATURE_FORMULA = "4nd² + 2n²d + 2ndm per layer (FastV, arXiv 2403.06764)"
OUR_FORMULA = "every matrix of the language model's prefill, 2 per multiply-add, full attention matrix, one position of logits"


@dataclass(frozen=True)
class EfficiencyRow:
    """The cost of a line of the table, over all its seeds. What was not measured or can't be known is None.

    Attributes
    ----------
    kept, layer_averaged
        Visual tokens a prompt: in the last layer, and averaged over the decoder layers.
    flops, literature_flops
        Of one prompt's prefill in the language model (mean), without vision tower and projector: by `OUR_FORMULA`, and by
        `LITERATURE_FORMULA`.
    flops_share
        `flops` as a share of the unpruned row's, 0 to 1 (above 1 where a method makes prompts longer).
    kv_bytes_counted, kv_bytes_measured
        Keys and values after the prefill, a prompt (mean): from the lengths of the layers, and from the cache's tensors, where a
        prompt's share of its batch holds padding too.
    peak_bytes
        The most that the GPU held at a time, weights included; None on a CPU.
    prefill_ms, decode_ms, selection_ms
        `median` and `iqr`: a batch's prefill, a decoding step, a sample's selection (part of the prefill).
    decoded_tokens_per_s
        `median` and `iqr` of the rows of a batch over the time of a decoding step.
    prefill_speedup
        Median prefill of the unpruned row over this row's; None where either ran in other batches or on another processor.
    batch_sizes
        Rows of the batches behind the times.
    """

    label: str
    method: str
    pruning_rate: str | float | None
    kept: float | None = None
    layer_averaged: float | None = None
    flops: float | None = None
    literature_flops: float | None = None
    flops_share: float | None = None
    kv_bytes_counted: float | None = None
    kv_bytes_measured: float | None = None
    peak_bytes: int | None = None
    prefill_ms: dict[str, float] | None = None
    decode_ms: dict[str, float] | None = None
    selection_ms: dict[str, float] | None = None
    decoded_tokens_per_s: dict[str, float] | None = None
    prefill_speedup: float | None = None
    batch_sizes: tuple[int, ...] = ()

    @property
    def key(self) -> Key:
        """That of the line of the table."""
        return self.label, self.pruning_rate


def efficiency(results: Results) -> list[EfficiencyRow]:
    """One row for every row of the main table that has a finished run, in its order.

    Runs that were made before costs were recorded have tokens and times only.
    """
    records = {run.run_id: run.record for run in results.runs if run.finished}
    rows = rows_of(results)
    of_rows = [(row, [records[run_id] for run_id in row.runs if run_id in records]) for row in rows]
    unpruned = next((found for row, found in of_rows if row.method == UNPRUNED), [])
    return [_row(row, found, unpruned) for row, found in of_rows if found]


def _row(row: Row, records: Sequence[dict[str, Any]], unpruned: Sequence[dict[str, Any]]) -> EfficiencyRow:
    flops, full_flops = _mean(records, "flops"), _mean(unpruned, "flops")
    peaks = [peak for record in records if (peak := record.get("memory", {}).get("peak_bytes")) is not None]
    return EfficiencyRow(
        label=row.label,
        method=row.method,
        pruning_rate=row.pruning_rate,
        kept=None if row.kept is None else row.kept["mean"],
        layer_averaged=row.layer_averaged,
        flops=flops,
        literature_flops=_mean(records, "literature_flops"),
        flops_share=flops / full_flops if flops is not None and full_flops else None,
        kv_bytes_counted=_mean(records, "kv_bytes_counted"),
        kv_bytes_measured=_mean(records, "kv_bytes_measured"),
        peak_bytes=max(peaks, default=None),
        prefill_ms=time_over_seeds(records, "prefill_ms"),
        decode_ms=time_over_seeds(records, "decode_ms"),
        selection_ms=time_over_seeds(records, "selection_ms"),
        decoded_tokens_per_s=time_over_seeds(records, "decoded_tokens_per_s"),
        prefill_speedup=_speedup(records, unpruned),
        batch_sizes=tuple(sorted({size for record in records for size in record["times"]["batch_sizes"]})),
    )


def _mean(records: Sequence[dict[str, Any]], name: str) -> float | None:
    known = [spread["mean"] for record in records if (spread := record.get("memory", {}).get(name)) is not None]
    return statistics.fmean(known) if known else None


def _speedup(records: Sequence[dict[str, Any]], unpruned: Sequence[dict[str, Any]]) -> float | None:
    mine, full = time_over_seeds(records, "prefill_ms"), time_over_seeds(unpruned, "prefill_ms")
    comparable = has_one_condition([*records, *unpruned])
    return full["median"] / mine["median"] if mine and full and comparable and mine["median"] > 0 else None


def has_one_condition(records: Sequence[dict[str, Any]]) -> bool:
    """Whether the times of these runs (one or more) may be compared: one processor, the same batch sizes."""
    return len({(record["provenance"]["processor"], str(record["times"]["batch_sizes"])) for record in records}) == 1
