"""pareto: relative Avg against what it costs, one panel a cost, the non-dominated front marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

from vlm_pruner_eval.report.figures import style
from vlm_pruner_eval.report.rows import Key, Row
from vlm_pruner_eval.sweep.grid import RATELESS, UNPRUNED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRONT = "non-dominated front"
_PANEL = (5.2, 3.8)


@dataclass(frozen=True)
class Cost:
    """One horizontal axis: its label, and the cost of rows by their key (label and rate); rows without one are left out."""

    label: str
    values: dict[Key, float]


@dataclass(frozen=True)
class Point:
    """A row as (cost, score)."""

    row: Row
    cost: float
    score: float


def draw(rows: Sequence[Row], costs: Sequence[Cost], tasks: Sequence[str], stem: Path) -> list[Path]:
    """Write the figure as .png and .svg next to `stem`; returns the two paths, or none where no row has a score and a cost."""
    drawable = [(cost, points_of(rows, cost)) for cost in costs]
    shown = [(cost, points) for cost, points in drawable if any(point.row.percent is not None for point in points)]
    if not shown:
        return []
    with matplotlib.rc_context(style.SETTINGS):
        figure = style.new_figure(len(shown), 1, panel=_PANEL)
        axes = figure.subplots(1, len(shown), squeeze=False)
        for axis, (cost, points) in zip(axes.flat, shown, strict=True):
            _panel(axis, points, style.looks(rows))
            axis.set_xlabel(cost.label)
            axis.set_ylabel(style.AVERAGE)
        style.add_legend(figure)
        if note := style.plumbing_note(tasks):
            figure.supxlabel(note.strip(), fontsize="small")
        return style.save(figure, stem)


def points_of(rows: Sequence[Row], cost: Cost) -> list[Point]:
    """Rows that have both a relative average and a cost; the blind row is no method and stays out."""
    found = []
    for row in rows:
        value, score = cost.values.get(row.key), style.score(row, style.AVERAGE)
        if value is not None and value > 0 and score is not None and row.method not in RATELESS:
            found.append(Point(row, value, score.value))
    return found


def front(points: Sequence[Point]) -> list[Point]:
    """Points that no other one beats: none is at most as dear and at least as good, and better in one of the two.

    Returns
    -------
    list of Point
        By rising cost. Points that tie in both are all on the front.
    """

    def beaten(point: Point) -> bool:
        return any(
            other.cost <= point.cost and other.score >= point.score and (other.cost, other.score) != (point.cost, point.score)
            for other in points
        )

    return sorted((point for point in points if not beaten(point)), key=lambda point: (point.cost, point.score))


def _panel(axis: Axes, points: Sequence[Point], looks: dict[str, style.Look]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for label, look in looks.items():
        line = [point for point in points if point.row.label == label]
        if line:
            x, y = [point.cost for point in line], [point.score for point in line]
            axis.plot(x, y, color=look.colour, marker=look.marker, markersize=5, linewidth=0.6, alpha=0.9, label=style.visible(label))
    for point in points:
        if point.row.method == UNPRUNED:
            axis.plot(point.cost, point.score, color=style.MUTED, marker="H", markersize=7, linestyle="none", label=point.row.label)
    best = front(points)
    x, y = [point.cost for point in best], [point.score for point in best]
    axis.plot(x, y, drawstyle="steps-post", color=style.MUTED, linestyle="--", linewidth=0.9, zorder=1)
    ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgecolor": style.INK, "markeredgewidth": 1.0}
    axis.plot(x, y, linestyle="none", label=FRONT, **ring)
    for point in best:
        if point.row.percent is not None:
            note = f"{point.row.percent:.1f} %"
            at = {"textcoords": "offset points", "xytext": (-4, 7), "ha": "right", "fontsize": "x-small"}
            axis.annotate(note, (point.cost, point.score), **at)
    axis.set_xscale("log")  # costs are ratios: half the time is the same step everywhere
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(plain)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(0.10, 0.12)
    axis.grid()
