"""The tables about tokens, arithmetic, memory and time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.efficiency import LITERATURE_FORMULA, OUR_FORMULA, EfficiencyRow
from vlm_pruner_eval.report.rows import Row
from vlm_pruner_eval.report.sheets.table import NO_NUMBER, Entry, Table, grouped, without_empty_columns

_MIB = 2**20
_COSTS = (
    "GFLOPs, ours",
    "GFLOPs, literature",
    "KV counted, MiB",
    "KV measured, MiB",
    "prefill, ms",
    "selection, ms",
    "decode, ms a step",
    "tokens a second",
    "peak memory, MiB",
)


def tokens(rows: Sequence[Row]) -> Table:
    """Tokens asked for and kept, the status of the runs, and the misbehaviours of releases that were counted."""

    def entries(row: Row) -> Iterator[Entry]:
        yield Entry(row.status, kind="words" if row.status == "finished" else "words missing")
        for value in (text.spread(row.asked), text.spread(row.kept), text.number(row.layer_averaged)):
            yield Entry(value, kind="missing" if value == text.NOTHING else "")
        yield Entry(text.quirks(row), kind="words")

    columns = ("method", "status", "tokens asked", "tokens kept", "layer-averaged", "misbehaviours of the release")
    legend = (
        "Visual tokens a prompt: asked for, measured from the tensors (with their range where it varies), and the measured count averaged "
        "over all decoder layers. Misbehaviours of the authors' release: on how many samples they acted (rows with official_quirks), or "
        "would have acted and were mended here.",
        *text.quirk_names(rows),
    )
    return Table("table-tokens", "Visual tokens", columns, grouped(rows, entries), legend, words=("status", "misbehaviours of the release"))


def costs(rows: Sequence[Row], found: Sequence[EfficiencyRow]) -> Table | None:
    """Arithmetic, memory and time of the rows that have run; None where none has."""
    of_rows = {cost.key: cost for cost in found}
    shown = [row for row in rows if row.key in of_rows]
    if not shown:
        return None

    def entries(row: Row) -> Iterator[Entry]:
        cost = of_rows[row.key]
        yield _scaled(cost.flops, 1e9, small=_percent(cost.flops_share))
        yield _scaled(cost.literature_flops, 1e9)
        yield _scaled(cost.kv_bytes_counted, _MIB)
        yield _scaled(cost.kv_bytes_measured, _MIB)
        yield _time(cost.prefill_ms, small=() if cost.prefill_speedup is None else (f"{text.significant(cost.prefill_speedup)} × as fast",))
        yield _time(cost.selection_ms)
        yield _time(cost.decode_ms)
        yield _time(cost.decoded_tokens_per_s)
        yield _scaled(cost.peak_bytes, _MIB)

    legend = (
        f"GFLOPs of one prompt's prefill in the language model; ours: {OUR_FORMULA}; the literature's: {LITERATURE_FORMULA}. KV: keys and "
        "values after the prefill, a prompt; measured from the tensors of the cache, padding included. Times: median, and in small "
        f"print or brackets the interquartile range; the prefill of a batch ({_batches(found)}) with the selection, without the vision "
        "tower. Peak memory is measured on a GPU only.",
    )
    return without_empty_columns(Table("table-costs", "What a prompt costs", ("method", *_COSTS), grouped(shown, entries), legend))


def _scaled(value: float | None, unit: float, small: tuple[str, ...] = ()) -> Entry:
    return NO_NUMBER if value is None else Entry(text.significant(value / unit), small)


def _percent(share: float | None) -> tuple[str, ...]:
    return () if share is None else (f"{100 * share:.0f} % of unpruned",)


def _time(value: dict[str, float] | None, small: tuple[str, ...] = ()) -> Entry:
    if value is None:
        return NO_NUMBER
    return Entry(text.significant(value["median"]), (f"IQR {text.significant(value['iqr'])}", *small))


def _batches(found: Sequence[EfficiencyRow]) -> str:
    sizes = sorted({size for cost in found for size in cost.batch_sizes})
    return f"{', '.join(map(str, sizes))} prompts" if sizes != [1] else "1 prompt"
