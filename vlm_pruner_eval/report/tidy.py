"""report.csv and tables/*.csv: one number a line, for spreadsheets and programs."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from vlm_pruner_eval.report.paper.beside import Compared, PaperTable
from vlm_pruner_eval.report.rows import Row
from vlm_pruner_eval.report.stats.comparisons import AVERAGE, Comparison, Comparisons
from vlm_pruner_eval.report.stats.paired import Estimate

_FORMULA = re.compile(r"\s*(?:[=+@]|-(?![\d.]))")
_ROW = ("method", "label", "pruning_rate", "asked_rate", "removed_percent", "status")
_SCORE = ("task", "score", "low_95", "high_95", "sd_over_seeds", "seeds", "n_documents", "relative_avg")
_COST = ("tokens_asked", "tokens_kept", "tokens_layer_averaged", "prefill_ms", "selection_ms", "quirks")
_TESTS = ("p", "p_holm", "mcnemar_p", "flip_rate")
_DIFFERENCE = ("task", "difference", "low_95", "high_95", *_TESTS, "gain_kept", "gain_low_95", "gain_high_95")
_PAPER = ("release", "task", "score", "printed", "difference", "tolerance", "verdict", "reason", "table", "read_from", "errata")


def scores(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """One line a row and task; empty fields where there is no number."""
    return _text([*_ROW, *_SCORE, *_COST], (_score(row, task) for row in rows for task in tasks))


def scores_and_differences(rows: Sequence[Row], tasks: Sequence[str], comparisons: Comparisons) -> str:
    """The lines of `scores`, each with its difference to the unpruned row: one table for programs that read only one."""
    head = [*_ROW, *_SCORE, *_COST, "difference", "difference_low_95", "difference_high_95", *_TESTS]
    return _text(head, ([*_score(row, task), *_tests(comparisons.of(row.label, row.pruning_rate, task))] for row in rows for task in tasks))


def _tests(found: Comparison | None) -> list[Any]:
    if found is None or found.difference is None:
        return [None] * (3 + len(_TESTS))
    return [*_ends(found.difference), found.p, found.p_holm, found.mcnemar_p, found.flip_rate]


def _score(row: Row, task: str) -> list[Any]:
    cell = row.cells.get(task)
    score = [cell.value, cell.low, cell.high, cell.sd, cell.seeds, cell.n] if cell else [None] * 6
    tokens = [(row.asked or {}).get("mean"), (row.kept or {}).get("mean"), row.layer_averaged]
    times = [(row.prefill_ms or {}).get("median"), (row.selection_ms or {}).get("median")]
    quirks = ";".join(f"{name}={count}" for name, count in sorted(row.quirks.items()))
    return [*_head(row), task, *score, row.relative.value, *tokens, *times, quirks]


def differences(rows: Sequence[Row], tasks: Sequence[str], comparisons: Comparisons) -> str:
    """One line a row and task (or average) that was compared with the unpruned row."""
    lines = []
    for row in rows:
        for task in (*tasks, AVERAGE):
            found = comparisons.of(row.label, row.pruning_rate, task)
            if found is not None and found.difference is not None:
                lines.append([*_head(row), task, *_tests(found), *_ends(found.gain_kept)])
    return _text([*_ROW, *_DIFFERENCE], lines)


def paper(table: PaperTable) -> str:
    """One line a cell of the table beside the paper, printed or not."""
    lines = [
        [*_head(item.row), item.release, *_compared(task, compared)]
        for item in table.rows
        for task, compared in [*item.cells.items(), (AVERAGE, item.average)]
    ]
    return _text([*_ROW, *_PAPER], lines)


def records(items: Iterable[Any]) -> str:
    """Any sequence of one kind of dataclass: a line each, nested fields as name_part."""
    listed = [_flat(dataclasses.asdict(item)) for item in items]
    nested = {name.rpartition("_")[0] for item in listed for name in item}
    columns = dict.fromkeys(name for item in listed for name in item if item[name] is not None or name not in nested)
    return _text(list(columns), ([item.get(name) for name in columns] for item in listed))


def _flat(item: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in item.items():
        if isinstance(value, dict):
            flat |= {f"{name}_{part}": held for part, held in value.items()}
        else:
            flat[name] = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
    return flat


def _head(row: Row) -> list[Any]:
    return [row.method, row.label, row.pruning_rate, row.asked_rate, row.removed_percent, row.status]


def _compared(task: str, compared: Compared) -> list[Any]:
    printed = compared.printed
    number = [None if printed is None else printed.value, compared.difference, compared.tolerance, compared.verdict, compared.reason]
    where = [None, None] if printed is None else [printed.table, printed.read_from]
    return [task, compared.cell.value, *number, *where, " ".join(map(str, compared.errata))]


def _ends(estimate: Estimate | None) -> list[float | None]:
    return [None, None, None] if estimate is None else [estimate.value, estimate.low, estimate.high]


def _inert(value: Any) -> Any:
    """A spreadsheet takes text that begins like a formula for one, and carries it out."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def _text(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_inert(value) for value in line] for line in lines)
    return out.getvalue()
