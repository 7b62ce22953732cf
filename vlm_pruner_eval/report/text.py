"""Numbers as text, the same in every output."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_pruner_eval.report.rows import Cell, Row
from vlm_pruner_eval.store.summaries import Spread
from vlm_pruner_eval.sweep.metrics.score_line import NOTHING, number, short_names  # noqa: F401 (as one module)

_ALIKE = 0.25  # of an interval's width: by so much its two sides may differ and still be written as one


def significant(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def exact(value: float | None) -> str:
    """Two decimals, as papers print them."""
    return NOTHING if value is None else f"{value:.2f}"


def p_value(value: float) -> str:
    """Three decimals."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval(low: float | None, high: float | None) -> str:
    """Both ends; "to" if a dash would run into a minus sign; empty if they are not known."""
    if low is None or high is None:
        return ""
    between = " to " if min(low, high) < 0 else "–"
    return f"{number(low)}{between}{number(high)}"


def cell_lines(row: Row, cell: Cell | None) -> tuple[str, str]:
    """A score and the line under it: its interval, or the deviation over seeds; the row's status if there is no score."""
    if cell is None:
        return row.status, ""
    if cell.sd is not None:
        return number(cell.value), f"± {number(cell.sd)}"
    return number(cell.value), interval(cell.low, cell.high)


def cell_short(row: Row, cell: Cell | None) -> tuple[str, str]:
    """A score and its interval (or the deviation over seeds) for one line.

    An interval is ± half of it if both sides are alike, else its ends.
    """
    if cell is None:
        return row.status, ""
    if cell.sd is not None:
        return number(cell.value), f" sd {cell.sd:.1f}"
    if cell.low is None:
        return number(cell.value), ""
    sides = cell.value - cell.low, cell.high - cell.value
    if abs(sides[0] - sides[1]) <= _ALIKE * sum(sides):
        return number(cell.value), f" ±{sum(sides) / 2:.0f}"
    return number(cell.value), f" {cell.low:.0f}–{cell.high:.0f}"


def spread(values: Spread | None) -> str:
    """A mean token count, with its range if it varies."""
    if values is None:
        return NOTHING
    mean = f"{values.mean:.0f}" if float(values.mean).is_integer() else f"{values.mean:.1f}"
    return mean if values.min == values.max else f"{mean} ({values.min:.0f}–{values.max:.0f})"


# Behaviour of the authors' releases, by the name under which methods count it.
QUIRKS = {
    "count": "DART and VScan keep another number of tokens than asked",
    "set_order": "DART takes its pivots in the order of a Python set, which depends on the length of the prompt",
    "stall": "VLM-Pruner stops when a pass adds nothing, and keeps fewer tokens than asked",
    "fewer_than_pivots": "VLM-Pruner keeps all its pivots where fewer tokens are asked",
    "repeated_pivots": "VLM-Pruner keeps one token several times where keys are equal",
    "negative_weight_sum": "VLM-Pruner divides by merging weights that cancel out",
    "repeats": "DivPrune, and PruMerge+ in training, keep one token several times",
    "noise": "rounding (CDPruner, above the rank of the features) or random numbers (SparseVLM) decide what is kept",
    "constant_relevance": "CDPruner divides by zero where all tokens are equally relevant",
    "no_raters": "SparseVLM finds no word above the average",
    "odd_split": "VisPruner raises an error where an odd number of tokens is split",
    "small_diverse": "VisPruner may raise an error where few diverse tokens are asked",
    "extra_row": "PruMerge adds a row to the number that is asked",
    "rounding": "PruMerge cuts a token off by rounding a ratio",
    "no_outliers": "PruMerge finds no outlier and keeps the sum of all tokens only",
    "no_place": "PruMerge adds a row of zeros where nothing is dropped",
    "wrong_count": "PruMerge+ in training keeps another number of tokens than asked",
    "anchor_twice": "HiPrune on Qwen takes an anchor twice, and keeps fewer tokens than asked",
    "overflow": "HoloV fills rows with zeros where a crop has fewer tokens than its share",
    "single_patch_crops": "HoloV scores crops of one token a thousand times lower",
    "none_left": "PDrop drops the last token of a small image",
    "chosen_twice": "VScan takes a token locally and globally",
    "small_grid": "VScan raises an error on grids of fewer than four rows or columns",
    "all_kept": "TRIM raises an error where nothing is dropped",
    "none_kept": "TRIM raises an error where no token of the image is kept",
    "base_view_only": "TRIM passes on the base view only",
}
# official_quirks does not bring these back
_NEVER_DONE = frozenset(
    {
        "repeated_pivots",
        "repeats",
        "odd_split",
        "small_diverse",
        "constant_relevance",
        "small_grid",
        "all_kept",
        "none_kept",
        "base_view_only",
    }
)


def quirks(row: Row) -> str:
    """Misbehaviours of the authors' release in one cell: on how many samples, and if they acted or were mended."""
    acted = {name: count for name, count in sorted(row.tokens.quirks.items()) if row.release and name not in _NEVER_DONE}
    mended = {name: count for name, count in sorted(row.tokens.quirks.items()) if name not in acted}
    parts = [
        f"{word}: {_counted(counts, row.tokens.samples_with_images)}"
        for word, counts in (("acted", acted), ("mended here", mended))
        if counts
    ]
    return "; ".join(parts) or "none"


def _counted(counts: dict[str, int], of: int) -> str:
    return ", ".join(f"{name} {count} of {of}" for name, count in counts.items())


def adaptations(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for every way in which methods are adapted to the model, with their labels."""
    labels: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.adapted:
            labels.setdefault(row.adapted, {})[row.label] = None
    return [f"Adapted, not as published: {', '.join(names)} ({reason})." for reason, names in labels.items()]


def quirk_names(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for every misbehaviour that was counted in any row."""
    names = sorted({name for row in rows for name in row.tokens.quirks})
    return [f"{name}: {QUIRKS[name]}." for name in names if name in QUIRKS]
