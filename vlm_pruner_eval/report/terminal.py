"""The table on the screen: the content of report.md in 100 columns."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.tables import PLUMBING, Row, is_plumbing

WIDTH = 100
_TASKS_A_TABLE = 6


def print_tables(console: Console, results: Results, rows: list[Row]) -> None:
    """Print scores, tokens and times; wide sweeps are split into several tables."""
    tasks = results.tasks
    chunks = [tasks[start : start + _TASKS_A_TABLE] for start in range(0, len(tasks), _TASKS_A_TABLE)]
    for chunk in chunks:
        console.print(_table(results, rows, chunk, text.short_names(tasks), last=chunk is chunks[-1]), width=WIDTH)
    for row in rows:
        if row.quirks:
            console.print(Text(f"quirks counted, {row.label}, {row.heading}: {text.quirks(row.quirks)}"), width=WIDTH)
    for problem in (problem for row in rows for problem in row.problems):
        console.print(Text(f"failed: {problem}", style="red"), width=WIDTH)
    for note in results.notes:
        console.print(Text(note), width=WIDTH)
    if is_plumbing(tasks):
        console.print(Text(PLUMBING, style="bold"), width=WIDTH)


def _table(results: Results, rows: list[Row], tasks: list[str], names: dict[str, str], *, last: bool) -> Table:
    model = results.config["model"]
    title = f"{results.name}: {model['pretrained']}, protocol {model['protocol']}"
    table = Table(
        title=Text(title), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left", caption_justify="left"
    )
    table.add_column("method", overflow="fold", max_width=22)
    for name in (names[task] for task in tasks):
        table.add_column(name, justify="right", overflow="fold", max_width=11)
    for name in ("Avg", "kept", "layers", "ms") if last else ():
        table.add_column(name, justify="right", overflow="fold", max_width=9)
    for heading, group in groupby(rows, key=lambda row: row.heading):
        table.add_row(Text(heading, style="italic dim"))
        for row in group:
            table.add_row(*_cells(row, tasks, last=last))
    if last:
        table.caption = Text("Avg: % of unpruned. kept: tokens asked/measured. layers: kept, averaged over layers. ms: prefill of a batch.")
    return table


def _cells(row: Row, tasks: list[str], *, last: bool) -> Iterator[Text]:
    yield Text(row.label) if row.status == "finished" else Text.assemble(row.label, (f"\n{row.status}", "red"))
    for task in tasks:
        yield _two(*text.cell_lines(row, row.cells.get(task)))
    if last:
        relative = row.relative
        yield _two(text.number(relative.value), "" if relative.sd is None else f"± {relative.sd:.1f}")
        yield _two(text.spread(row.asked), text.spread(row.kept))
        yield Text(text.number(row.layer_averaged))
        yield Text(text.time_ms(row.prefill_ms, iqr=False))


def _two(first: str, second: str) -> Text:
    return Text.assemble(first, (f"\n{second}", "dim")) if second else Text(first)
