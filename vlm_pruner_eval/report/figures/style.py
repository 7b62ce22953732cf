"""Shared by the figures: colours, markers, fonts, and the way from a figure to a .png and an .svg."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_pruner_eval.report.rows import Cell, Row, is_plumbing
from vlm_pruner_eval.store.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AVERAGE = "relative Avg, %"
INK, MUTED, GRID, PAPER = "#1f2328", "#6b7280", "#d5d9de", "#ffffff"
# After Okabe and Ito's palette: told apart with every common form of colour blindness, by marker in print, and with a
# contrast of at least 3 : 1 on white and on near-black.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#C26A9C", "#C98500", "#3598D6", INK, "#8A6D00")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "p")  # nine to eight colours: 72 methods until both repeat
_PANEL_INCHES, _LEGEND_INCHES = (3.1, 2.7), 0.5
_KEY_INCHES, _LETTER_INCHES = 0.6, 0.065  # a legend's line sample with its spaces, and a letter
SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "vlm-pruner-eval",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label with a dollar sign is a label
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "legend.frameon": False,
}


class Look(NamedTuple):
    """Colour and marker of a method, the same in every figure of a report."""

    colour: str
    marker: str


def looks(rows: Sequence[Row]) -> dict[str, Look]:
    """Colour and marker by label, in the order of the rows; rows without a rate have none."""
    labels = dict.fromkeys(row.label for row in rows if row.percent is not None)
    return {label: Look(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, label in enumerate(labels)}


def score(row: Row, panel: str) -> Cell | None:
    """The cell of a row that a panel shows (a task, or `AVERAGE`), None where there is no number."""
    cell = row.relative if panel == AVERAGE else row.cells.get(panel)
    return None if cell is None or cell.value is None else cell


def bounds(cell: Cell) -> tuple[float, float]:
    """Ends of a cell's interval: 95 %, or one standard deviation over seeds, or the value itself where neither is known.

    A percentile interval of a skewed score need not contain the score; the ends returned here always do.
    """
    if cell.low is not None and cell.high is not None:
        return min(cell.low, cell.value), max(cell.high, cell.value)
    return cell.value - (cell.sd or 0.0), cell.value + (cell.sd or 0.0)


def new_figure(columns: int, lines: int, *, panel: tuple[float, float] = _PANEL_INCHES) -> Figure:
    """An empty figure for `lines` x `columns` panels (inches), apart from pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(panel[0] * columns, panel[1] * lines + _LEGEND_INCHES), layout="constrained")


def add_legend(figure: Figure) -> None:
    """One legend above all panels, with every label once, in as many columns as the figure's width holds."""
    found = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        widest = _KEY_INCHES + _LETTER_INCHES * max(map(len, found))
        fitting = max(1, min(len(found), int(figure.get_figwidth() / widest)))
        columns = math.ceil(len(found) / math.ceil(len(found) / fitting))  # as many in every line
        figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=columns)


def visible(label: str) -> str:
    """A label that legends show: they leave out those that begin with an underscore."""
    return f" {label}" if label.startswith("_") else label


def plumbing_note(tasks: Sequence[str]) -> str:
    """Remark of a figure of the embedded benchmark."""
    return " (embedded benchmark: checks the plumbing)" if is_plumbing(tasks) else ""


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as .png and .svg next to `stem`, the same bytes for the same figure; returns the two paths."""
    paths = [stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")]
    for path, options in zip(paths, ({"dpi": 150}, {"metadata": {"Date": None}}), strict=True):
        content = io.BytesIO()
        figure.savefig(content, format=path.suffix.removeprefix("."), **options)
        write_atomic(path, content.getvalue())
    return paths
