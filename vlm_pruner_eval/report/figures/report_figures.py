"""All figures of a report, and the words that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_pruner_eval.report.figures import pareto, rates
from vlm_pruner_eval.report.figures.pareto import Cost
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.rows import Row, has_one_condition
from vlm_pruner_eval.report.stats.comparisons import AVERAGE, Comparisons


@dataclass(frozen=True)
class Words:
    """A figure's title, its description for those who can't see it, and how to read it."""

    title: str
    description: str
    legend: str


WORDS = {
    "accuracy_vs_rate": Words(
        "Score against pruning rate",
        "One panel for the relative average and one for each benchmark: share of visual tokens removed on the horizontal axis, score on "
        "the vertical axis, one line a method. The same numbers are in the table of scores.",
        "Bands and bars: 95 % intervals; over several seeds, one standard deviation to each side. Grey line: the unpruned model; dotted: "
        "without any visual token (named at the lower edge where it lies below the panel). Points at one rate are set apart sideways.",
    ),
    "pareto": Words(
        "Relative average against cost",
        "One panel a cost: cost on the horizontal axis, relative average on the vertical axis, one marker for each method and rate, the "
        "rates of a method joined by a line. The same numbers are in the tables of scores and of efficiency.",
        "Rings: rows that no other row beats in cost and score together, labelled with the share of tokens removed. The row without "
        "visual tokens is left out: nothing is cheaper, so it would always stand on the front.",
    ),
}


def draw_all(rows: Sequence[Row], results: Results, folder: Path, comparisons: Comparisons | None = None) -> dict[str, list[Path]]:
    """Draw every figure that the results allow.

    Parameters
    ----------
    comparisons
        Of `stats.compare.compare`: the intervals of relative averages are taken from there.

    Returns
    -------
    dict
        Name of the figure (a key of `WORDS`) -> its .png and .svg. A figure with nothing to show is absent, and its files of an
        earlier report are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks = results.tasks
    rows = [_with_interval(row, comparisons) for row in rows]
    drawn = {
        "accuracy_vs_rate": rates.draw(rows, tasks, folder / "accuracy_vs_rate"),
        "pareto": pareto.draw(rows, costs(rows, results), tasks, folder / "pareto"),
    }
    for name, paths in drawn.items():
        if not paths:
            for suffix in ("png", "svg"):
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    return {name: paths for name, paths in drawn.items() if paths}


def costs(rows: Sequence[Row], results: Results) -> list[Cost]:
    """Prefill time and FLOPs of every row; times of different processors or batch sizes are no common axis, and left out."""
    times = {row.key: row.prefill_ms["median"] for row in rows if row.prefill_ms is not None}
    flops = {row.key: row.costs.flops / 1e9 for row in rows if row.costs is not None and row.costs.flops is not None}
    comparable = has_one_condition([run for run in results.runs if run.finished])
    axes = [Cost("prefill of a batch, ms (median)", times)] if comparable else []
    return [*axes, Cost("prefill of a prompt, GFLOPs (mean)", flops)]


def _with_interval(row: Row, comparisons: Comparisons | None) -> Row:
    compared = comparisons.of(row.label, row.pruning_rate, AVERAGE) if comparisons is not None else None
    if compared is None or compared.score is None or row.relative.sd is not None:
        return row
    return replace(row, relative=replace(row.relative, low=compared.score.low, high=compared.score.high))
