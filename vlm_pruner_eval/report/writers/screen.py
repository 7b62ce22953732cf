"""The table of scores on the screen, in 100 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from vlm_pruner_eval.redact import spelled_out
from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.paper.paper_comparison import PaperRow, PaperTable, said
from vlm_pruner_eval.report.rows import PLUMBING, Row, is_plumbing
from vlm_pruner_eval.report.stats.comparisons import Comparisons
from vlm_pruner_eval.report.tables.table import Column, Line, Table
from vlm_pruner_eval.report.tables.table_layout import scores

WIDTH = 100
_TASKS_A_TABLE = 6
_ROOMY = 3  # up to so many tasks leave room for long labels
_LEGEND = (
    "Scores with their 95 % interval, ± half of it where both sides are alike (sd: over seeds). Avg: % of unpruned. kept: tokens "
    "measured (and asked, where it differs). layers: kept, averaged over layers. "
)
_COSTS = {"ms": "ms: prefill of a batch.", "GFLOPs": "GFLOPs: exact, of one prompt's prefill in the language model."}


def print_tables(console: Console, results: Results, rows: Sequence[Row]) -> None:
    """Print scores, tokens and times; wide sweeps are split into several tables.

    If rows have no times, as they shared work, their arithmetic takes the place of times.
    """
    table, tasks = scores(rows, results.tasks, Comparisons()), results.tasks
    model = results.config["model"]
    title = f"{results.name}: {model['pretrained']}, protocol {model['protocol']}"
    has_times = all(row.prefill_ms is not None for row in rows if row.cells)
    cost = "ms" if has_times or not any(row.costs and row.costs.flops for row in rows) else "GFLOPs"
    columns = [column for column in table.columns if column.screen and column.screen not in _COSTS.keys() - {cost}]
    for start in range(0, len(tasks), _TASKS_A_TABLE):
        part = replace(table, across={task: table.across[task] for task in tasks[start : start + _TASKS_A_TABLE]})
        is_last = start + _TASKS_A_TABLE >= len(tasks)
        legend = Text(_LEGEND + _COSTS[cost]) if is_last else None
        console.print(_grid(part, columns if is_last else [], title, legend), width=WIDTH)
    _print_quirks(console, rows)
    for problem in (problem for row in rows for problem in row.problems):
        console.print(Text(f"failed: {spelled_out(problem)}", style="red"), width=WIDTH)
    for note in results.notes:
        console.print(Text(spelled_out(note)), width=WIDTH)
    if is_plumbing(tasks):
        console.print(Text(PLUMBING, style="bold"), width=WIDTH)


def _grid(table: Table, columns: Sequence[Column], title: str, legend: Text | None) -> Grid:
    """Headings of groups, row headers, the keys of `across`, and `columns`."""
    grid = Grid(title=Text(title), box=box.SIMPLE_HEAD, pad_edge=False, padding=0, title_justify="left", caption_justify="left")
    grid.caption = legend
    wide = len(table.across) <= _ROOMY
    grid.add_column("removed", overflow="fold", max_width=8)
    grid.add_column(table.head, overflow="fold", max_width=26 if wide else 16)
    for head in table.across.values():
        grid.add_column(head, justify="right", overflow="fold", max_width=18 if wide else 10)
    for column in columns:
        grid.add_column(column.screen, justify="right", overflow="fold", max_width=9)
    (spread,) = (column for column in table.columns if column.across)
    for group in table.groups:
        for line in group.lines:
            heading = Text(group.brief if line is group.lines[0] else "", style="italic")
            head = Text.assemble(line.head, (f" {line.note}" if line.note else "", "red"))
            grid.add_row(heading, head, *_cells(table, line, spread, columns), end_section=line is group.lines[-1])
    return grid


def _cells(table: Table, line: Line, spread: Column, columns: Sequence[Column]) -> list[Text]:
    of_key = {item.key: item for item in line.items}
    shown = [spread.on_screen(of_key[key]) for key in table.across]
    shown += [column.on_screen(line.items[0]) for column in columns]
    return [Text.assemble(plain, (dimmed, "dim")) for plain, dimmed in shown]


def _print_quirks(console: Console, rows: Sequence[Row]) -> None:
    """Print what the authors' releases do wrong and where it was met: it acted under official_quirks, and was mended elsewhere."""
    for sentence in text.adaptations(rows):
        console.print(Text(sentence), width=WIDTH)
    counted = [row for row in rows if row.tokens.quirks]
    if not counted:
        return
    console.print(
        Text("Misbehaviours of the authors' releases, on so many samples (they act under official_quirks only):"),
        width=WIDTH,
    )
    for row in counted:
        console.print(Text(f"  {row.label}, {row.heading}: {text.quirks(row)}"), width=WIDTH)
    for sentence in text.quirk_names(counted):
        console.print(Text(f"  {sentence}"), width=WIDTH)


def print_paper(console: Console, paper: PaperTable | None) -> None:
    """Print the verdicts of the release rows, and whether the unpruned row reproduces the paper."""
    if paper is None:
        return
    for item in paper.rows:
        print_verdicts(console, item)
    sentence = f"{paper.verdict} {paper.setting} {paper.noise}"
    console.print(Text(sentence, style="bold red" if paper.gate.stops else "bold"), width=WIDTH)


def print_verdicts(console: Console, item: PaperRow) -> None:
    """Print a line for every cell of a row that has a verdict."""
    for name, compared in [*item.cells.items(), ("relative Avg", item.average)]:
        if compared.verdict is not None:
            ours, printed = (
                text.exact(compared.cell.value),
                text.exact(None if compared.printed is None else compared.printed.value),
            )
            line = f"{item.row.label}, {item.row.heading}, {name}: {ours}, printed {printed}: {said(compared)}"
            console.print(Text(line), width=WIDTH)
