"""Numbers as text, the same in every output."""

from __future__ import annotations

from vlm_pruner_eval.report.rows import Cell, Row
from vlm_pruner_eval.sweep.score_line import NOTHING, number, short_names

__all__ = ["NOTHING", "cell_lines", "cell_short", "exact", "number", "quirks", "short_names", "significant", "spread"]


def significant(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def exact(value: float | None) -> str:
    """Two decimals, as papers print them."""
    return NOTHING if value is None else f"{value:.2f}"


def cell_lines(row: Row, cell: Cell | None) -> tuple[str, str]:
    """A score and the line under it: its interval, or the deviation over seeds; the row's status where there is no score."""
    if cell is None:
        return row.status, ""
    if cell.sd is not None:
        return number(cell.value), f"± {number(cell.sd)}"
    return number(cell.value), "" if cell.low is None else f"{number(cell.low)}–{number(cell.high)}"


def cell_short(row: Row, cell: Cell | None) -> tuple[str, tuple[str, str]]:
    """A score and, dimmed, half the width of its interval (or the deviation over seeds), on one line."""
    if cell is None:
        return row.status, ("", "dim")
    if cell.sd is not None:
        return number(cell.value), (f" sd {cell.sd:.1f}", "dim")
    return number(cell.value), ("" if cell.low is None else f" ±{(cell.high - cell.low) / 2:.0f}", "dim")


def spread(values: dict[str, float] | None) -> str:
    """A mean token count, with its range where it varies."""
    if values is None:
        return NOTHING
    mean = f"{values['mean']:.0f}" if float(values["mean"]).is_integer() else f"{values['mean']:.1f}"
    return mean if values["min"] == values["max"] else f"{mean} ({values['min']:.0f}–{values['max']:.0f})"


def quirks(counts: dict[str, int]) -> str:
    """Quirk counts in one cell."""
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"
