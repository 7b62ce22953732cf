"""accuracy_vs_rate: one panel a benchmark, one line a method, with intervals as bands."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.figures import style
from vlm_pruner_eval.report.rows import Cell, Row
from vlm_pruner_eval.sweep.grid import RATELESS, UNPRUNED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4
_APART = 0.35  # percent between methods at one rate, so that their bars do not hide each other
_MARGIN = 4  # percent, left and right of the rates
_SPARE = 0.06  # of a panel's height, above and below its data


def draw(rows: Sequence[Row], tasks: Sequence[str], stem: Path) -> list[Path]:
    """Write the figure as .png and .svg next to `stem`; returns the two paths."""
    names = text.short_names(list(tasks))
    panels = [style.AVERAGE, *tasks]
    columns = min(_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(style.SETTINGS):
        figure = style.new_figure(columns, lines)
        axes = figure.subplots(lines, columns, squeeze=False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            _panel(axis, rows, panel)
            axis.set_title(names.get(panel, panel))
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        style.add_legend(figure)
        figure.supxlabel("visual tokens removed, %" + style.plumbing_note(tasks), fontsize="medium")
        return style.save(figure, stem)


def _panel(axis: Axes, rows: Sequence[Row], panel: str) -> None:
    looks = style.looks(rows)
    ends: list[float] = []
    for index, (label, look) in enumerate(looks.items()):
        points = sorted(_points(rows, label, panel))
        if points:
            ends += _line(axis, points, label, look, shift=_APART * (index - (len(looks) - 1) / 2))
    ends += [cell.value for row in rows if row.method == UNPRUNED and (cell := style.score(row, panel)) is not None]
    _references(axis, rows, panel, ends)
    asked = sorted({row.percent for row in rows if row.percent is not None and row.iso_layer is None})
    if asked:
        every = [row.percent for row in rows if row.percent is not None]
        axis.set_xticks(asked, [f"{rate:.1f}" for rate in asked])
        axis.set_xlim(min(every) - _MARGIN, max(every) + _MARGIN)
    axis.grid(axis="y")


def _points(rows: Sequence[Row], label: str, panel: str) -> Iterator[tuple[float, Cell]]:
    for row in rows:
        cell = style.score(row, panel)
        if row.label == label and row.percent is not None and cell is not None:
            yield row.percent, cell


def _line(axis: Axes, points: list[tuple[float, Cell]], label: str, look: style.Look, *, shift: float) -> list[float]:
    """Draw a method's line, band and bars; returns the ends of its intervals."""
    x = [percent + shift for percent, _ in points]
    y = [cell.value for _, cell in points]
    low, high = zip(*(style.bounds(cell) for _, cell in points), strict=True)
    bars = [[value - end for value, end in zip(y, low, strict=True)], [end - value for value, end in zip(y, high, strict=True)]]
    axis.fill_between(x, low, high, color=look.colour, alpha=0.10, linewidth=0)
    axis.errorbar(x, y, yerr=bars, color=look.colour, linestyle="none", elinewidth=0.8, alpha=0.6)
    axis.plot(x, y, color=look.colour, marker=look.marker, markersize=4, linewidth=1.2, label=style.visible(label))
    return [*low, *high]


def _references(axis: Axes, rows: Sequence[Row], panel: str, ends: list[float]) -> None:
    """Lines of the rows without a rate; one far below the others is named at the edge, so that the others can be told apart."""
    if ends:
        spare = _SPARE * (max(ends) - min(ends)) or 1.0
        axis.set_ylim(min(ends) - spare, max(ends) + spare)
    floor = axis.get_ylim()[0] if ends else -math.inf
    for row in rows:
        cell = style.score(row, panel)
        if cell is None or row.method not in (UNPRUNED, *RATELESS):
            continue
        line = "-" if row.method == UNPRUNED else ":"
        if cell.value >= floor:
            axis.axhline(cell.value, color=style.MUTED, linestyle=line, linewidth=1, label=style.visible(row.label))
        else:
            note = f"↓ {row.label} {text.number(cell.value)}"
            axis.annotate(note, (0.02, 0.02), xycoords="axes fraction", color=style.MUTED, fontsize="small")
