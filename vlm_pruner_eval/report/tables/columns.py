"""Every column of every table, once: name in CSV files, where its number is, header on pages and on the screen, how it is shown there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.paper import gate as gates
from vlm_pruner_eval.report.paper.gate import TaskVerdict
from vlm_pruner_eval.report.paper.paper_comparison import EQUIVALENT, OUTSIDE, Compared, said
from vlm_pruner_eval.report.rows import Cell, Row
from vlm_pruner_eval.report.stats.comparisons import Comparison, Contest
from vlm_pruner_eval.report.stats.paired import Estimate
from vlm_pruner_eval.report.stats.strata import Stratum
from vlm_pruner_eval.report.tables.table import Column, Entry
from vlm_pruner_eval.store.schema import FINISHED
from vlm_pruner_eval.store.summaries import Spread
from vlm_pruner_eval.sweep.grid import UNPRUNED

SIGNIFICANT = 0.05
_ROUNDED_TO_ZERO = 0.05  # one decimal is shown
_GIGA, _MIB = 1e9, 2**20
_KINDS = {EQUIVALENT: "good", OUTSIDE: "bad", gates.INSIDE: "good", gates.OUTSIDE: "bad"}


@dataclass(frozen=True)
class Item:
    """A row, from which columns take their numbers; in some tables on one task, on `AVERAGE` or on one capability (`key`).

    Attributes
    ----------
    found
        Comparison with the unpruned row, or with the printed number; or the score on a capability.
    average
        Comparison of the relative average.
    gate
        Of the unpruned row beside the paper: the verdict on the task.
    has_winners
        True if the best of a rate is marked.
    """

    row: Row
    key: str = ""
    found: Comparison | Compared | Stratum | None = None
    average: Comparison | None = None
    gate: TaskVerdict | None = None
    has_winners: bool = False

    @property
    def cell(self) -> Cell:
        """The score on the task, without a value if the row has none."""
        return self.row.cells.get(self.key, Cell(None, seeds=0))


# ---- cells of pages
def _cell(shown: str, *small: str, kind: str = "", best: bool = False) -> Entry:
    """Return a cell with the lines under it that are not empty."""
    return Entry(shown, tuple(filter(None, small)), kind, best)


def _score(cell: Cell, item: Item) -> Entry:
    shown, small = text.cell_lines(item.row, item.row.cells.get(item.key))
    best = item.has_winners and item.found is not None and item.found.bold
    return _cell(shown, small, kind="missing" if cell.value is None else "", best=best)


def _average(value: float, item: Item) -> Entry:
    relative, average = item.row.relative, item.average
    small = "" if relative.sd is None else f"± {relative.sd:.1f}"
    if not small and average is not None and average.score is not None and item.row.method != UNPRUNED:
        small = text.interval(average.score.low, average.score.high)
    return _cell(text.number(value), small, best=item.has_winners and average is not None and average.bold)


def _estimate(found: Estimate, item: object) -> Entry:
    return _cell(text.number(found.value), text.interval(found.low, found.high))


def _percent(share: Estimate, item: object) -> Entry:
    low, high = (None if end is None else 100 * end for end in (share.low, share.high))
    return _cell(text.number(100 * share.value), text.interval(low, high))


def _difference(found: Estimate, item: Item) -> Entry:
    compared = item.found
    if compared.alike is not None:
        is_zero = abs(found.value) < _ROUNDED_TO_ZERO
        small = f"{compared.alike} of {compared.alike} equal" if is_zero else f"the same on all {compared.alike}"
        return _cell(f"{0.0 if is_zero else found.value:+.1f}", small)
    small = [text.interval(found.low, found.high)]
    if compared.p_holm is not None:
        small.append(f"p {text.p_value(compared.p_holm)}")
    if compared.mcnemar_p is not None:
        small.append(f"McNemar {text.p_value(compared.mcnemar_p)}")
    shown = compared.p_holm is not None and compared.p_holm < SIGNIFICANT
    kind = ("good" if found.value > 0 else "bad") if shown else ""
    return _cell(f"{found.value:+.1f}", *small, kind=kind)


def _beside(cell: Cell, item: Item) -> Entry:
    compared, gate = item.found, item.gate
    ours = "" if cell.value is None else f"± {text.number(cell.sd)}" if cell.sd is not None else text.interval(cell.low, cell.high)
    verdict, words = (compared.verdict, said(compared)) if gate is None else (gate.verdict, gate.verdict)
    kind = _KINDS.get(verdict, "missing" if cell.value is None else "")
    return _cell(text.number(cell.value), ours, _printed(compared), words, kind=kind)


def _printed(compared: Compared) -> str:
    if compared.printed is None:
        return ""
    notes = "".join(f" [{number}]" for number in compared.errata)
    difference = "" if compared.difference is None else f" ({compared.difference:+.2f})"
    return f"paper {compared.printed.value:g}{difference}{notes}"


def _best(label: str, contest: Contest) -> Entry:
    return Entry(label, kind="words", best=contest.decided)


def _signed(found: Estimate, item: object) -> Entry:
    return _cell(f"{found.value:+.1f}", text.interval(found.low, found.high))


def _scaled(unit: float, small: Callable[[Row], str] = lambda row: "") -> Callable[[float, Item], Entry]:
    return lambda value, item: _cell(text.significant(value / unit), small(item.row))


def _time(small: Callable[[Row], str] = lambda row: "") -> Callable[[dict[str, float], Item], Entry]:
    def show(value: dict[str, float], item: Item) -> Entry:
        return _cell(text.significant(value["median"]), f"IQR {text.significant(value['iqr'])}", small(item.row))

    return show


def _of_unpruned(row: Row) -> str:
    return "" if row.costs.flops_share is None else f"{100 * row.costs.flops_share:.0f} % of unpruned"


def _speedup(row: Row) -> str:
    return "" if row.costs.prefill_speedup is None else f"{text.significant(row.costs.prefill_speedup)} × as fast"


def _status(status: str, item: Item) -> Entry:
    return Entry(status, kind="words" if status == FINISHED else "words missing")


def _spread(values: Spread, item: object) -> Entry:
    return Entry(text.spread(values))


def _tasks(parts: tuple[str, ...], item: Stratum) -> Entry:
    return Entry(", ".join(text.short_names(parts).values()), kind="words")


# ---- cells of the screen: text, and dimmed text
def _brief_score(cell: Cell, item: Item) -> tuple[str, str]:
    return text.cell_short(item.row, item.row.cells.get(item.key))


def _brief_average(value: float, item: Item) -> tuple[str, str]:
    deviation = item.row.relative.sd
    return text.number(value) + ("" if deviation is None else f" sd {deviation:.1f}"), ""


def _brief_kept(kept: Spread, item: Item) -> tuple[str, str]:
    asked, shown = text.spread(item.row.tokens.asked), text.spread(kept)
    return shown if asked == shown else f"{shown} of {asked} asked", ""


# ---- parts of a number: header in the CSV file -> path
def _ends(name: str) -> dict[str, str]:
    return {name: "value", f"{name}_low_95": "low", f"{name}_high_95": "high"}


def _times(name: str) -> dict[str, str]:
    return {name: "median", f"{name}_iqr": "iqr"}


_INTERVAL = {"score": "value", "low_95": "low", "high_95": "high"}
_CELL = _INTERVAL | {"sd_over_seeds": "sd", "seeds": "seeds", "n_documents": "n"}

# ---- the columns
_ROW = (
    Column("method", "row.method"),
    Column("label", "row.label"),
    Column("pruning_rate", "row.pruning_rate"),
    Column("asked_rate", "row.asked_rate"),
    Column("removed_percent", "row.removed_percent"),
)
_TASK = (Column("status", "row.status"), Column("task", "key"))
_KEPT = (
    Column(
        "tokens_kept",
        "row.tokens.kept",
        "tokens kept",
        _spread,
        parts={"tokens_kept": "mean"},
        screen="kept",
        brief=_brief_kept,
    ),
    Column("tokens_layer_averaged", "row.tokens.layer_averaged.mean", "layer-averaged", screen="layers"),
)
_TESTS = (
    Column("p", "found.p"),
    Column("p_holm", "found.p_holm"),
    Column("mcnemar_p", "found.mcnemar_p"),
    Column("flip_rate", "found.flip_rate"),
    Column("gain_kept", "found.gain_kept", parts=_ends("gain_kept")),
)
SCORES = (
    *_ROW,
    *_TASK,
    Column("score", "cell", show=_score, parts=_CELL, brief=_brief_score, across=True),
    Column("relative_avg", "row.relative.value", "relative Avg, %", _average, screen="Avg", brief=_brief_average),
    Column("avg_flip_rate", "average.flip_rate", "flips, %", lambda share, item: Entry(f"{100 * share:.1f}")),
    Column("avg_gain_kept", "average.gain_kept", "gain kept, %", _percent, parts=_ends("avg_gain_kept")),
    Column("tokens_asked", "row.tokens.asked.mean"),
    *_KEPT,
    Column("prefill_ms", "row.prefill_ms.median", screen="ms", brief=lambda median, item: (f"{median:.0f}", "")),
    Column("flops", "row.costs.flops", screen="GFLOPs", brief=lambda flops, item: (text.significant(flops / _GIGA), "")),
    Column("selection_ms", "row.selection_ms.median"),
    Column("quirks", lambda item: ";".join(f"{name}={count}" for name, count in sorted(item.row.tokens.quirks.items()))),
    Column("difference", "found.difference", parts=_ends("difference")),
    *_TESTS,
)
DIFFERENCES = (
    *_ROW,
    *_TASK,
    Column("difference", "found.difference", show=_difference, parts=_ends("difference"), across=True),
    *_TESTS,
)
PAPER = (
    *_ROW,
    Column("release", "row.release"),
    *_TASK,
    Column("score", "found.cell", show=_beside, parts=_INTERVAL, across=True),
    Column("printed", "found.printed.value"),
    Column("difference", "found.difference"),
    Column("tolerance", "found.tolerance"),
    Column("verdict", "found.verdict"),
    Column("reason", "found.reason"),
    Column("table", "found.printed.table"),
    Column("read_from", "found.printed.read_from"),
    Column("errata", "found.errata"),
)
PRINTED = (
    Column("method", "of.method"),
    Column("removed_percent", "of.percent"),
    Column("benchmark", "of.benchmark"),
    Column("paper", "key"),
    Column("printed", "number.value", show=lambda value, item: Entry(f"{value:g}"), across=True),
    Column("differ_by", "of.spread", "differ by", lambda spread, item: Entry(f"{spread:g}")),
    Column("table", "number.table"),
    Column("read_from", "number.read_from"),
)

CONTESTS = (
    Column("task", "task"),
    Column("pruning_rate", "pruning_rate"),
    Column("best", "best", "best", _best, words=True),
    Column("runner_up", "runner_up", "runner-up", words=True),
    Column("difference", "difference", "difference", _signed, parts=_ends("difference")),
    Column("decided", "decided", "decided", lambda decided, item: Entry("yes" if decided else "no")),
)
PAIRS = (
    Column("task", "task"),
    Column("pruning_rate", "pruning_rate"),
    Column("first", "first"),
    Column("second", "second"),
    Column("difference", "difference", parts=_ends("difference")),
    Column("p", "p"),
    Column("p_holm", "p_holm"),
)
POWER = (
    Column("task", "task"),
    Column("n_documents", "n_documents", "documents"),
    Column("n_clusters", "n_clusters", "clusters"),
    Column("smallest", "smallest", "smallest difference", lambda smallest, item: Entry(text.exact(smallest))),
)
TOKENS = (
    *_ROW,
    Column("status", "row.status", "status", _status, words=True),
    Column("tokens_asked", "row.tokens.asked", "tokens asked", _spread, parts={"tokens_asked": "mean"}),
    *_KEPT,
    Column("quirks", lambda item: text.quirks(item.row), "misbehaviours of the release", words=True),
    Column("flips", lambda item: text.flips(item.row), "differ in a joint batch", words=True),
    Column("adapted", lambda item: item.row.adapted or "as published", "adapted", words=True),
)
COSTS = (
    *_ROW,
    Column("flops", "row.costs.flops", "GFLOPs, ours", _scaled(_GIGA, _of_unpruned)),
    Column("flops_share", "row.costs.flops_share"),
    Column("literature_flops", "row.costs.literature_flops", "GFLOPs, literature", _scaled(_GIGA)),
    Column("kv_bytes_counted", "row.costs.kv_bytes_counted", "KV counted, MiB", _scaled(_MIB)),
    Column("kv_bytes_measured", "row.costs.kv_bytes_measured", "KV measured, MiB", _scaled(_MIB)),
    Column("prefill_ms", "row.prefill_ms", "prefill, ms", _time(_speedup), parts=_times("prefill_ms")),
    Column("prefill_speedup", "row.costs.prefill_speedup"),
    Column("selection_ms", "row.selection_ms", "selection, ms", _time(), parts=_times("selection_ms")),
    Column("decode_ms", "row.costs.decode_ms", "decode, ms a step", _time(), parts=_times("decode_ms")),
    Column(
        "tokens_per_s",
        "row.costs.decoded_tokens_per_s",
        "tokens a second",
        _time(),
        parts=_times("decoded_tokens_per_s"),
    ),
    Column("peak_bytes", "row.costs.peak_bytes", "peak memory, MiB", _scaled(_MIB)),
    Column("batch_sizes", "row.costs.batch_sizes"),
)
CAPABILITIES = (
    *_ROW,
    Column("capability", "key"),
    Column("score", "found.score", show=_estimate, parts=_INTERVAL, across=True),
    Column("n_documents", "found.n_documents"),
    Column("parts", "found.parts"),
)
HARD = (
    Column("control", "control"),
    Column("label", "label"),
    Column("method", "method"),
    Column("pruning_rate", "pruning_rate"),
    Column("score", "score", "score, %", _estimate, parts=_INTERVAL),
    Column("n_documents", "n_documents", "documents"),
    Column("parts", "parts", "tasks", _tasks, words=True),
)
FACTS = (Column("value", "value", "value", words=True),)
