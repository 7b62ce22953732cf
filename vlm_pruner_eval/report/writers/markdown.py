"""report.md: the tables and everything needed to read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from vlm_pruner_eval.report.contents import Report
from vlm_pruner_eval.report.figures.report_figures import WORDS
from vlm_pruner_eval.report.tables.table import Entry, Table
from vlm_pruner_eval.report.tables.table_layout import facts

_TAG = re.compile(r"<(?=[A-Za-z/!?])")


def markdown(report: Report, figures: Mapping[str, Sequence[Path]]) -> str:
    """Write the whole report as Markdown.

    Parameters
    ----------
    figures
        Of `draw_all`, in the folder of the report.
    """
    parts = [
        f"# {report.results.name}",
        *(f"**{_one_line(said)}**" if bad else _one_line(said) for said, bad in report.remarks()),
    ]
    if report.paper is not None and report.paper.differences:
        parts += [
            "Known differences to what the authors ran:",
            "\n".join(f"- {line}" for line in report.paper.differences),
        ]
    for shown in report.tables:
        if shown.on_pages:
            parts += [f"## {shown.caption}", table(lines(shown)), *shown.legend]
        if shown.id == "scores":
            parts += report.comparisons.notes
    origin = ["## Where these numbers come from", inert(table(lines(facts(report.results))))]
    return "\n\n".join([*map(inert, parts), *_drawn(figures), *origin]) + "\n"


def _drawn(figures: Mapping[str, Sequence[Path]]) -> Iterator[str]:
    for name, paths in figures.items():
        yield from (f"![{WORDS[name].title}]({path.name})" for path in paths if path.suffix == ".png")
        yield WORDS[name].legend


def lines(shown: Table) -> Iterator[list[str]]:
    """Fields of a table, line by line; the headings of its groups are lines of their own."""
    heads = [head for head, _ in shown.heads]
    yield heads
    for group in shown.groups:
        if group.heading:
            yield [f"*{group.heading}*", *[""] * (len(heads) - 1)]
        for line in group.lines:
            yield [line.head, *map(_entry, shown.cells(line))]


def _entry(entry: Entry) -> str:
    shown = f"**{entry.text}**" if entry.best else entry.text
    small = "; ".join(entry.small)
    if not small:
        return shown
    return f"{shown} {small}" if small.startswith("±") else f"{shown} [{small}]"


def table(lines: Iterable[list[str]]) -> str:
    """A Markdown table; the first line is its head."""
    head, *body = [[_one_line(value).replace("\\", "\\\\").replace("|", "\\|") for value in line] for line in lines]
    rule = ["---"] + ["---:" if len(head) > 2 else "---"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def inert(text: str) -> str:
    """Markdown in which no label, question or answer is HTML, a link or a picture: a page that shows it may carry those out."""
    return _TAG.sub("&lt;", text).replace("](", "]&#40;")


def _one_line(value: str) -> str:
    return " ".join(value.split())
