"""Numbers as text, the same in every output."""

from __future__ import annotations

from vlm_pruner_eval.report.rows import Cell, Row

NOTHING = "n/a"


def number(value: float | None) -> str:
    """One decimal; none from 1000 up, where benchmarks count points."""
    if value is None:
        return NOTHING
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}"


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


def short_names(tasks: list[str]) -> dict[str, str]:
    """Task names without the prefix that they all share."""
    heads = {task.rpartition("_")[0] for task in tasks}
    prefix = f"{heads.pop()}_" if len(tasks) > 1 and len(heads) == 1 and "" not in heads else ""
    return {task: task.removeprefix(prefix) for task in tasks}
