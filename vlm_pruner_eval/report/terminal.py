"""The table on the screen: the content of report.md in 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_pruner_eval.redact import spelled_out
from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.efficiency import EfficiencyRow
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.paper.beside import PaperRow, PaperTable, said
from vlm_pruner_eval.report.rows import PLUMBING, Key, Row, is_plumbing

WIDTH = 100
_TASKS_A_TABLE = 6
_ROOMY = 3  # up to so many tasks leave room for long labels


def print_tables(console: Console, results: Results, rows: list[Row], costs: Sequence[EfficiencyRow] = ()) -> None:
    """Print scores, tokens and times; wide sweeps are split into several tables.

    Where rows have no times, as they shared work, the arithmetic in `costs` takes their place.
    """
    tasks, flops = results.tasks, _flops(rows, costs)
    chunks = [tasks[start : start + _TASKS_A_TABLE] for start in range(0, len(tasks), _TASKS_A_TABLE)]
    for chunk in chunks:
        console.print(_table(results, rows, chunk, text.short_names(tasks), flops, last=chunk is chunks[-1]), width=WIDTH)
    _print_quirks(console, rows)
    for problem in (problem for row in rows for problem in row.problems):
        console.print(Text(f"failed: {spelled_out(problem)}", style="red"), width=WIDTH)
    for note in results.notes:
        console.print(Text(spelled_out(note)), width=WIDTH)
    if is_plumbing(tasks):
        console.print(Text(PLUMBING, style="bold"), width=WIDTH)


def _print_quirks(console: Console, rows: Sequence[Row]) -> None:
    """Print what the authors' releases do wrong and where it was met: it acted under official_quirks, and was mended elsewhere."""
    counted = [row for row in rows if row.quirks]
    if not counted:
        return
    console.print(Text("Misbehaviours of the authors' releases, on so many samples (they act under official_quirks only):"), width=WIDTH)
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
            ours, printed = text.exact(compared.cell.value), text.exact(None if compared.printed is None else compared.printed.value)
            line = f"{item.row.label}, {item.row.heading}, {name}: {ours}, printed {printed}: {said(compared)}"
            console.print(Text(line), width=WIDTH)


def _flops(rows: Sequence[Row], costs: Sequence[EfficiencyRow]) -> dict[Key, float]:
    """Arithmetic of a prefill by row; empty if every row has its time."""
    if all(row.prefill_ms is not None for row in rows if row.cells):
        return {}
    return {cost.key: cost.flops for cost in costs if cost.flops is not None}


def _table(results: Results, rows: list[Row], tasks: list[str], names: dict[str, str], flops: Mapping[Key, float], *, last: bool) -> Table:
    model = results.config["model"]
    title = f"{results.name}: {model['pretrained']}, protocol {model['protocol']}"
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, pad_edge=False, padding=0, title_justify="left", caption_justify="left")
    table.add_column("removed", overflow="fold", max_width=8)
    table.add_column("method", overflow="fold", max_width=16 if len(tasks) > _ROOMY else 26)
    for name in (names[task] for task in tasks):
        table.add_column(name, justify="right", overflow="fold", max_width=10 if len(tasks) > _ROOMY else 18)
    for name in ("Avg", "kept", "layers", "GFLOPs" if flops else "ms") if last else ():
        table.add_column(name, justify="right", overflow="fold", max_width=9)
    for _, group in groupby(rows, key=lambda row: row.heading):
        listed = list(group)
        for row in listed:
            table.add_row(
                _removed(row) if row is listed[0] else Text(""), *_cells(row, tasks, flops, last=last), end_section=row is listed[-1]
            )
    if last:
        cost = "GFLOPs: exact, of one prompt's prefill in the language model." if flops else "ms: prefill of a batch."
        table.caption = Text(
            "Scores with their 95 % interval, ± half of it where both sides are alike (sd: over seeds). Avg: % of unpruned. kept: tokens "
            f"measured (and asked, where it differs). layers: kept, averaged over layers. {cost}"
        )
    return table


def _removed(row: Row) -> Text:
    if row.percent is None:
        return Text("none" if row.group[0] == 0 else "all", style="italic")
    return Text(f"{row.percent:.1f} %", style="italic")


def _cells(row: Row, tasks: list[str], flops: Mapping[Key, float], *, last: bool) -> Iterator[Text]:
    yield Text(row.label) if row.status == "finished" else Text.assemble(row.label, (f" {row.status}", "red"))
    for task in tasks:
        yield Text.assemble(*text.cell_short(row, row.cells.get(task)))
    if last:
        relative = row.relative
        yield Text(text.number(relative.value) + ("" if relative.sd is None else f" sd {relative.sd:.1f}"))
        asked, kept = text.spread(row.asked), text.spread(row.kept)
        yield Text(kept if asked == kept else f"{kept} of {asked} asked")
        yield Text(text.number(row.layer_averaged))
        yield Text(_cost(row, flops))


def _cost(row: Row, flops: Mapping[Key, float]) -> str:
    """The last cell of a row: GFLOPs where some row has no time, else milliseconds."""
    if flops:
        return text.significant(flops[row.key] / 1e9) if row.key in flops else ""
    return "" if row.prefill_ms is None else f"{row.prefill_ms['median']:.0f}"
