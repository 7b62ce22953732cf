"""The content of a report, before it is written in any format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.paper.paper_comparison import PaperTable, paper_for
from vlm_pruner_eval.report.rows import PLUMBING, Row, is_plumbing, rows_of
from vlm_pruner_eval.report.stats.compare import compare
from vlm_pruner_eval.report.stats.comparisons import Comparisons
from vlm_pruner_eval.report.stats.strata import Stratum, strata
from vlm_pruner_eval.report.tables.table import Table
from vlm_pruner_eval.report.tables.table_layout import tables_of


@dataclass(frozen=True)
class Report:
    """Rows, and everything that is computed from them."""

    results: Results
    rows: list[Row]
    comparisons: Comparisons
    paper: PaperTable | None
    strata: list[Stratum]

    @cached_property
    def tables(self) -> list[Table]:
        """All tables, see `tables_of`."""
        return tables_of(self.results, self.rows, self.comparisons, self.paper, self.strata)

    @property
    def plumbing(self) -> str | None:
        """A sentence if the numbers are of the embedded benchmark."""
        return PLUMBING if is_plumbing(self.results.tasks) else None

    @property
    def problems(self) -> list[str]:
        """Reasons of runs that failed."""
        return [problem for row in self.rows for problem in row.problems]

    def remarks(self) -> Iterator[tuple[str, bool]]:
        """Sentences about the numbers as a whole, each with True if it takes something away from them."""
        results, paper = self.results, self.paper
        if self.plumbing:
            yield self.plumbing, False
        if results.not_run:
            yield f"Not run yet: {', '.join(results.not_run)}.", True
        for problem in self.problems:
            yield f"Failed, and in no average: {problem}", True
        for note in results.notes:
            yield f"Note: {note}", False
        if paper is None:
            yield "No numbers are printed for this checkpoint, so nothing is held against the paper.", False
        else:
            yield f"{paper.verdict} {paper.setting}", paper.gate.stops


def report_of(results: Results) -> Report:
    """Compute a report.

    Raises
    ------
    ConfigError
        Printed numbers, or a noise floor, that can't be read.
    """
    rows = rows_of(results)
    return Report(results, rows, compare(results, rows), paper_for(results, rows), strata(results, rows))
