"""All tables of a report in reading order: report.md and tables/*.tex show the parts of which report.html is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.efficiency import EfficiencyRow
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.paper.beside import PaperTable
from vlm_pruner_eval.report.rows import Row
from vlm_pruner_eval.report.sheets import scores as score_tables
from vlm_pruner_eval.report.sheets.costs import costs, tokens
from vlm_pruner_eval.report.sheets.paper import beside_the_paper
from vlm_pruner_eval.report.sheets.strata import capabilities, hard_subsets
from vlm_pruner_eval.report.sheets.table import Entry, Group, Line, Table
from vlm_pruner_eval.report.stats.comparisons import Comparisons
from vlm_pruner_eval.report.stats.strata import Stratum
from vlm_pruner_eval.sweep.grid import rate_percent


def sheets(
    results: Results,
    rows: Sequence[Row],
    comparisons: Comparisons,
    paper: PaperTable | None,
    *,
    efficiency: Sequence[EfficiencyRow] = (),
    strata: Sequence[Stratum] = (),
) -> list[Table]:
    """Scores, the paper beside them, differences, power, tokens, costs, capabilities; what can't be computed is left out.

    Every table's id is the name of its file.
    """
    found = [
        scores(results, rows, comparisons),
        None if paper is None else _with_notes(beside_the_paper(paper, results.tasks), paper),
        score_tables.differences(rows, results, comparisons),
        score_tables.contests(results, comparisons),
        score_tables.power(results, comparisons),
        tokens(rows),
        costs(rows, efficiency),
        capabilities(rows, strata),
        hard_subsets(strata),
    ]
    return [dataclasses.replace(table, id=table.id.removeprefix("table-")) for table in found if table is not None]


def scores(results: Results, rows: Sequence[Row], comparisons: Comparisons) -> Table:
    """Scores with intervals, relative average, flips, kept gain, and the tokens that they cost."""
    table = score_tables.scores(rows, results, comparisons)
    counts = [(Entry(text.spread(row.kept)), Entry(text.number(row.layer_averaged))) for row in rows]
    legend = ("Tokens: visual tokens a prompt that were kept, and their count averaged over all decoder layers.", *_iso(rows))
    return _widened(table, ("tokens kept", "layer-averaged"), counts, legend)


def _iso(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.iso_layer is not None:
            yield (
                f"{row.label}, listed under {rate_percent(row.asked_rate):.1f} %: removes {row.percent:.1f} %, so that it keeps in every "
                f"layer what a method that prunes at layer {row.iso_layer} keeps on average; it does not compete for the best of its rate."
            )


def _widened(table: Table, columns: tuple[str, ...], entries: Sequence[tuple[Entry, ...]], legend: tuple[str, ...]) -> Table:
    """A table with more columns on the right; `entries` line by line."""
    more = iter(entries)
    groups = tuple(
        Group(group.heading, tuple(Line(line.head, (*line.entries, *next(more))) for line in group.lines)) for group in table.groups
    )
    return dataclasses.replace(table, columns=(*table.columns, *columns), groups=groups, legend=(*table.legend, *legend))


def _with_notes(table: Table | None, paper: PaperTable) -> Table | None:
    """The errata as the last lines of the legend."""
    if table is None:
        return None
    return dataclasses.replace(table, legend=(*table.legend, *map(str, paper.footnotes)))
