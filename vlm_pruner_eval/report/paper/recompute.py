"""`report --recompute-paper`: every printed average from its own cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vlm_pruner_eval.report.paper.gate import within
from vlm_pruner_eval.report.paper.printed import AVERAGE, METHODS, PRINTED_TABLE, Key, PrintedNumbers
from vlm_pruner_eval.report.rows import relative_average
from vlm_pruner_eval.sweep.grid import UNPRUNED

ROUNDING = 0.01  # averages are printed with two decimals, from cells that were rounded as well


@dataclass(frozen=True)
class Recomputed:
    """A printed average beside what the cells of its row give.

    Attributes
    ----------
    derived
        From the printed cells; None when one of them is missing.
    corrected
        The same with the errata's corrections of the upper bound, where there are any.
    missing
        Benchmarks without a printed number.
    """

    vlm: str
    method: str
    percent: float
    printed: float
    derived: float | None
    corrected: float | None
    missing: tuple[str, ...]

    @property
    def matches(self) -> bool:
        """True if the printed average is that of its cells."""
        return self.derived is not None and within(round(self.derived, 2) - self.printed, ROUNDING)


def recompute_averages(printed: PrintedNumbers) -> list[Recomputed]:
    """Every average of a printed table, pruned rows only: ``100 x mean over benchmarks of score / upper bound``.

    Paper: arXiv 2512.02700, tables 1 and 2.
    """
    cells = {key: number.value for key, number in printed.numbers.items() if number.read_from == PRINTED_TABLE}
    corrections = {key: value for item in printed.errata for key, value in item.corrected.items()}
    rows = [key for key in cells if key[3] == AVERAGE and key[1] != METHODS[UNPRUNED]]
    return [_recomputed(key, cells, corrections) for key in sorted(rows, key=lambda key: (key[0], key[2], key[1]))]


def _recomputed(row: Key, cells: dict[Key, float], corrections: dict[Key, float]) -> Recomputed:
    vlm, method, percent, _ = row
    bound = {key[3]: value for key, value in cells.items() if key[:2] == (vlm, METHODS[UNPRUNED]) and key[3] != AVERAGE}
    scores = {key[3]: value for key, value in cells.items() if key[:3] == row[:3] and key[3] != AVERAGE}
    # a column that any row of the model has belongs to its average
    columns = {key[3] for key in cells if key[0] == vlm and key[3] != AVERAGE}
    missing = tuple(sorted(columns - (bound.keys() & scores.keys())))
    right = bound | {key[3]: value for key, value in corrections.items() if key[:2] == (vlm, METHODS[UNPRUNED])}
    return Recomputed(
        vlm=vlm,
        method=method,
        percent=percent,
        printed=cells[row],
        derived=None if missing else relative_average(scores, bound),
        corrected=None if missing or right == bound else relative_average(scores, right),
        missing=missing,
    )


def recompute_lines(printed: PrintedNumbers) -> Iterator[str]:
    """The result for a reader: the count, every row that does not match, and what the errata change."""
    rows = recompute_averages(printed)
    yield f"{sum(row.matches for row in rows)} of {len(rows)} printed averages match those of their own cells to {ROUNDING}."
    for row in rows:
        if row.missing:
            yield f"{_name(row)}: printed {row.printed:.2f}, can't be derived again: {', '.join(row.missing)} is missing."
        elif not row.matches:
            yield f"{_name(row)}: printed {row.printed:.2f}, its own cells give {row.derived:.2f}."
    for row in rows:
        if row.corrected is not None:
            yield f"{_name(row)}: {row.derived:.2f} from the printed cells, {row.corrected:.2f} with the corrected upper bound."
    for item in printed.errata:
        yield f"Erratum {item.number}: {item.text}"


def _name(row: Recomputed) -> str:
    return f"{row.vlm}, {row.method}, {row.percent:g} % removed"
