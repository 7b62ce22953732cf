"""The table that holds the paper's numbers beside ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.paper.beside import EQUIVALENT, OUTSIDE, Compared, PaperRow, PaperTable, said
from vlm_pruner_eval.report.paper.gate import INSIDE, TaskVerdict
from vlm_pruner_eval.report.paper.gate import OUTSIDE as GATE_OUTSIDE
from vlm_pruner_eval.report.rows import Row
from vlm_pruner_eval.report.sheets.table import Entry, Table, grouped, interval
from vlm_pruner_eval.sweep.grid import UNPRUNED

_KINDS = {EQUIVALENT: "good", OUTSIDE: "bad", INSIDE: "good", GATE_OUTSIDE: "bad"}


def beside_the_paper(paper: PaperTable, tasks: Sequence[str]) -> Table | None:
    """Ours with its interval, the printed number, the difference and the verdict; None where nothing is printed for any row."""
    names = text.short_names(list(tasks))
    shown = [item for item in paper.rows if _is_printed(item)]
    if not shown:
        return None
    of_row = {item.row.runs: item for item in shown}
    gate = {verdict.task: verdict for verdict in paper.gate.tasks}

    def entries(row: Row) -> Iterator[Entry]:
        item = of_row[row.runs]
        for task in tasks:
            yield _entry(item.cells[task], gate.get(task) if row.method == UNPRUNED else None)
        yield _entry(item.average, None)

    columns = ("method", *(names[task] for task in tasks), "relative Avg, %")
    legend = (
        "Ours with its 95 % interval (± over seeds); under it the printed number, in brackets ours minus printed, in the unit of the "
        "benchmark; then the verdict; [n] is a note on the printed number. Only rows that run as the release does (official_quirks) get a "
        "verdict; on the unpruned row it is the gate's.",
        paper.rule,
        paper.noise,
    )
    caption = f"Our scores beside the paper's for {paper.vlm}"
    return Table("table-paper", caption, columns, grouped([item.row for item in shown], entries), legend)


def _is_printed(item: PaperRow) -> bool:
    return any(cell.printed is not None or cell.verdict is not None for cell in (*item.cells.values(), item.average))


def _entry(compared: Compared, gate: TaskVerdict | None) -> Entry:
    cell = compared.cell
    ours = "" if cell.value is None else f"± {text.number(cell.sd)}" if cell.sd is not None else interval(cell.low, cell.high)
    verdict, said_so = (compared.verdict, said(compared)) if gate is None else (gate.verdict, gate.verdict)
    kind = _KINDS.get(verdict, "missing" if cell.value is None else "")
    return Entry(text.number(cell.value), tuple(filter(None, [ours, _printed(compared), said_so])), kind=kind)


def _printed(compared: Compared) -> str:
    if compared.printed is None:
        return ""
    notes = "".join(f" [{number}]" for number in compared.errata)
    difference = "" if compared.difference is None else f" ({compared.difference:+.2f})"
    return f"paper {compared.printed.value:g}{difference}{notes}"
