"""What a table is made of: plain data that report.html, report.md and tables/*.tex lay out, each in its way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.rows import Row


@dataclass(frozen=True)
class Entry:
    """A table cell.

    Attributes
    ----------
    text, small
        Its content, and the lines under it in small print.
    kind
        Class of the style sheet: "missing", "good", "bad", "words", or none.
    best
        Whether it is printed bold.
    """

    text: str
    small: tuple[str, ...] = ()
    kind: str = ""
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A row of a table: its row header and its cells."""

    head: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Group:
    """Rows under a common heading; an empty heading is not shown."""

    heading: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Table:
    """A table: `words` names the columns that hold text instead of numbers."""

    id: str
    caption: str
    columns: tuple[str, ...]
    groups: tuple[Group, ...]
    legend: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


NO_NUMBER = Entry(text.NOTHING, kind="missing")


def of_facts(lines: Sequence[Sequence[str]], *, id: str, caption: str) -> Table:
    """A table from lines of text, the first of which is its head."""
    head, *body = lines
    rows = tuple(Line(first, tuple(Entry(value, kind="words") for value in rest)) for first, *rest in body)
    return Table(id, caption, tuple(head), (Group("", rows),), words=tuple(head[1:]))


def grouped(rows: Sequence[Row], entries: Callable[[Row], Iterator[Entry]]) -> tuple[Group, ...]:
    """Rows under the headings of their rates."""
    groups = groupby(rows, key=lambda row: row.heading)
    return tuple(Group(heading, tuple(Line(row.label, tuple(entries(row))) for row in group)) for heading, group in groups)


def without_empty_columns(table: Table) -> Table:
    """A table without the columns that hold no number in any row; the legend names them."""
    lines = [line for group in table.groups for line in group.lines]
    kept = [i for i in range(len(table.columns) - 1) if any(line.entries[i] != NO_NUMBER for line in lines)]
    dropped = [name for i, name in enumerate(table.columns[1:]) if i not in kept]
    if not dropped:
        return table
    groups = tuple(
        Group(group.heading, tuple(Line(line.head, tuple(line.entries[i] for i in kept)) for line in group.lines)) for group in table.groups
    )
    columns = (table.columns[0], *(table.columns[i + 1] for i in kept))
    return replace(table, columns=columns, groups=groups, legend=(*table.legend, f"Not measured here: {'; '.join(dropped)}."))


def interval(low: float | None, high: float | None) -> str:
    """Both ends; "to" where a dash would run into a minus sign."""
    if low is None or high is None:
        return ""
    between = " to " if min(low, high) < 0 else "–"
    return f"{text.number(low)}{between}{text.number(high)}"
