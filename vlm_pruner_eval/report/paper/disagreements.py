"""Numbers that papers print differently for the same method, model and setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlm_pruner_eval.report.paper.gate import tolerance, within
from vlm_pruner_eval.report.paper.printed import BENCHMARKS, METHODS, Number, PrintedNumbers, full_score
from vlm_pruner_eval.report.rows import Row


@dataclass(frozen=True)
class Disagreement:
    """A cell that papers print differently.

    Attributes
    ----------
    method
        Its name as printed.
    percent
        Percentage of tokens removed, 0 for the unpruned model.
    numbers
        By name of the paper, in the benchmark's own unit.
    """

    method: str
    percent: float
    benchmark: str
    numbers: dict[str, Number]

    @property
    def spread(self) -> float:
        """Largest minus smallest number."""
        values = [number.value for number in self.numbers.values()]
        return round(max(values) - min(values), 2)


def disagreements(papers: Mapping[str, PrintedNumbers], vlm: str, rows: Sequence[Row], tasks: Sequence[str]) -> tuple[Disagreement, ...]:
    """Cells of a sweep's methods, rates and benchmarks of which two numbers are further apart than the gate's half point.

    Parameters
    ----------
    papers
        By name, all printed numbers.
    vlm
        The model's name in the tables.
    """
    cells = dict.fromkeys((round(row.percent or 0.0, 1), METHODS[row.method]) for row in rows if row.method in METHODS)
    benchmarks = dict.fromkeys(BENCHMARKS[task] for task in tasks if task in BENCHMARKS)
    found = []
    for percent, method in sorted(cells, key=lambda cell: cell[0]):
        for benchmark in benchmarks:
            key = vlm, method, percent, benchmark
            numbers = {name: printed.numbers[key] for name, printed in papers.items() if key in printed.numbers}
            item = Disagreement(method, percent, benchmark, numbers)
            if len(numbers) > 1 and not within(item.spread, tolerance(full_score(benchmark), None)):
                found.append(item)
    return tuple(found)
