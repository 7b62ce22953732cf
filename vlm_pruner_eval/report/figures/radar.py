"""radar: benchmarks as axes, methods as outlines, scores in percent of the unpruned model; one panel a rate.

Paper: arXiv 2512.02700, Figure 1.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.figures import style
from vlm_pruner_eval.report.rows import Row
from vlm_pruner_eval.sweep.grid import UNPRUNED

if TYPE_CHECKING:
    from matplotlib.projections.polar import PolarAxes

_LEAST_AXES = 3
_PANEL = (4.2, 3.7)
_COLUMNS = 3
_LETTERS = 55  # in a line below a figure of one panel
_STEPS = (5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000)  # percent between rings
_MOST_RINGS = 6  # more of their labels would overlap


def draw(rows: Sequence[Row], tasks: Sequence[str], stem: Path) -> list[Path]:
    """Write the figure as .png and .svg next to `stem`.

    Returns
    -------
    list of Path
        Empty where there is nothing to draw: fewer than three benchmarks with an unpruned score, or no pruned row that has
        a score on each of them.
    """
    unpruned = next((row for row in rows if row.method == UNPRUNED), None)
    axes_of = [task for task in tasks if unpruned is not None and has_axis(unpruned, task)]
    pruned = [row for row in rows if row.percent is not None and _is_whole(row, axes_of)]
    if len(axes_of) < _LEAST_AXES or not pruned:
        return []
    panels: dict[str, dict[str, list[float]]] = {}
    for row in pruned:
        panels.setdefault(row.heading, {})[row.label] = relative_scores(row, unpruned, axes_of)
    rings = _rings([score for panel in panels.values() for scores in panel.values() for score in scores])
    columns = min(_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(style.settings()):
        figure = style.new_figure(columns, lines, panel=_PANEL)
        axes = figure.subplots(lines, columns, squeeze=False, subplot_kw={"projection": "polar"})
        for axis, (heading, outlines) in zip(axes.flat, panels.items(), strict=False):
            _panel(axis, outlines, style.looks(rows), unpruned.label)
            _scales(axis, axes_of, rings)
            axis.set_title(heading)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        style.add_legend(figure)
        figure.supxlabel("% of the unpruned score" + _left_out(tasks, axes_of) + style.plumbing_note(tasks), fontsize="medium")
        return style.save(figure, stem)


def has_axis(unpruned: Row, task: str) -> bool:
    """Whether there is an unpruned score above 0 that others can be a share of."""
    cell = style.score(unpruned, task)
    return cell is not None and cell.value > 0


def _left_out(tasks: Sequence[str], axes_of: Sequence[str]) -> str:
    """Names of the benchmarks that have no axis, on lines of their own."""
    names = [text.short_names(list(tasks))[task] for task in tasks if task not in axes_of]
    if not names:
        return ""
    return "\n" + textwrap.fill(f"Without an axis, as the unpruned model has no score above 0 there: {', '.join(names)}.", _LETTERS)


def relative_scores(row: Row, unpruned: Row, tasks: Sequence[str]) -> list[float]:
    """Scores of a row in percent of the unpruned model's, one a task."""
    return [100.0 * row.cells[task].value / unpruned.cells[task].value for task in tasks]


def _is_whole(row: Row, tasks: Sequence[str]) -> bool:
    return all(style.score(row, task) is not None for task in tasks)


def _rings(scores: Sequence[float]) -> list[int]:
    """Round values that hold all scores and 100 between the first and the last: the same for every panel."""
    low, high = min(scores), max(100.0, *scores)
    step = next((step for step in _STEPS if high - low < _MOST_RINGS * step), _STEPS[-1])
    first = max(0, math.floor((low - 1) / step) * step)
    return list(range(first, math.ceil(high / step) * step + 1, step))


def _panel(axis: PolarAxes, outlines: dict[str, list[float]], looks: dict[str, style.Look], unpruned: str) -> None:
    n = len(next(iter(outlines.values())))
    angles = [2 * math.pi * i / n for i in range(n + 1)]
    axis.plot(angles, [100.0] * (n + 1), color=style.MUTED, linewidth=1, linestyle="--", label=style.visible(unpruned))
    for label, scores in outlines.items():
        look = looks[label]
        line = {"color": look.colour, "marker": look.marker, "markersize": 3.5, "linewidth": 1.2, "clip_on": False}
        axis.plot(angles, [*scores, scores[0]], label=style.visible(label), **line)


def _scales(axis: PolarAxes, tasks: Sequence[str], rings: list[int]) -> None:
    names = text.short_names(list(tasks))
    angles = [2 * math.pi * i / len(tasks) for i in range(len(tasks))]
    axis.set_theta_zero_location("N")
    axis.set_theta_direction(-1)
    axis.set_ylim(rings[0], rings[-1])
    axis.set_yticks(rings, [f"{ring}" for ring in rings], fontsize="x-small")
    axis.set_rlabel_position(180 / len(tasks))  # between two axes, clear of their names
    axis.set_xticks(angles, [names[task] for task in tasks])
    axis.tick_params(axis="x", pad=2)
    for angle, name in zip(angles, axis.get_xticklabels(), strict=True):
        side = round(math.sin(angle), 6)
        name.set_horizontalalignment("center" if side == 0 else "left" if side > 0 else "right")
    axis.spines["polar"].set_color(style.GRID)
