"""accuracy_vs_rate.png and .svg: one panel a benchmark, one line a method, with intervals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.tables import Cell, Row, is_plumbing
from vlm_pruner_eval.sweep.grid import RATELESS, UNPRUNED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AVERAGE = "relative Avg, %"
# Okabe and Ito's palette: told apart with every common form of colour blindness, and by marker in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A6D00")
_MARKERS = "osD^vPX*"


def draw(rows: list[Row], tasks: list[str], stem: Path) -> list[Path]:
    """Write the figure as .png and .svg next to `stem`; returns the two paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = text.short_names(tasks)
    panels = [AVERAGE, *tasks]
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    with plt.rc_context({"svg.hashsalt": "vlm-pruner-eval", "font.size": 9}):
        figure, axes = plt.subplots(lines, columns, figsize=(3.1 * columns, 2.7 * lines + 0.5), squeeze=False, layout="constrained")
        for axis, panel in zip(axes.flat, panels, strict=False):
            _panel(axis, rows, panel)
            axis.set_title(names.get(panel, panel))
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(8, len(handles)), frameon=False)
        figure.supxlabel("visual tokens removed, %" + (" (embedded benchmark: checks the plumbing)" if is_plumbing(tasks) else ""))
        paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
        plt.close(figure)
    return paths


def _panel(axis: Axes, rows: list[Row], panel: str) -> None:
    labels = list(dict.fromkeys(row.label for row in rows if row.percent is not None))
    for index, label in enumerate(labels):
        points = [(row.percent, cell) for row in rows if row.label == label and (cell := _cell(row, panel)) is not None]
        if not points:
            continue
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        offset = 0.35 * (index - (len(labels) - 1) / 2)  # so that intervals at one rate do not hide each other
        x, y = [percent + offset for percent, _ in points], [cell.value for _, cell in points]
        axis.errorbar(x, y, yerr=_errors(points), label=label, color=colour, marker=marker, markersize=4, linewidth=1.2, capsize=2)
    for row in rows:
        cell = _cell(row, panel)
        if cell is not None and row.method in (UNPRUNED, *RATELESS):
            style = "-" if row.method == UNPRUNED else ":"
            axis.axhline(cell.value, color="#777777", linestyle=style, linewidth=1, label=row.label)
    rates = sorted({row.percent for row in rows if row.percent is not None})
    if rates:
        axis.set_xticks(rates, [f"{rate:.1f}" for rate in rates])
        axis.set_xlim(rates[0] - 4, rates[-1] + 4)
    axis.grid(alpha=0.25)


def _cell(row: Row, panel: str) -> Cell | None:
    cell = row.relative if panel == AVERAGE else row.cells.get(panel)
    return None if cell is None or cell.value is None else cell


def _errors(points: list[tuple[float, Cell]]) -> list[list[float]]:
    """Distances [2, n] from each point down and up to the ends of its bar."""
    downs, ups = [], []
    for _, cell in points:
        if cell.sd is not None:
            downs.append(cell.sd)
            ups.append(cell.sd)
        else:
            # a percentile interval of a skewed score need not contain the score itself
            downs.append(0.0 if cell.low is None else max(0.0, cell.value - cell.low))
            ups.append(0.0 if cell.high is None else max(0.0, cell.high - cell.value))
    return [downs, ups]
