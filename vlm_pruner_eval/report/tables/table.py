"""The form of a table: lines of items, and columns that say what a writer shows of an item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_pruner_eval.report import text


@dataclass(frozen=True)
class Entry:
    """A cell of a page.

    Attributes
    ----------
    text, small
        Its content, and the lines under it in small print.
    kind
        Class of the style sheet: "missing", "good", "bad", "words", or none.
    best
        True if it is printed bold.
    """

    text: str
    small: tuple[str, ...] = ()
    kind: str = ""
    best: bool = False


NO_NUMBER = Entry(text.NOTHING, kind="missing")


@dataclass(frozen=True)
class Column:
    """A column, declared once for all writers.

    Attributes
    ----------
    name
        Its header in the CSV file.
    value
        Path from an item to the column's value ("row.tokens.kept": attributes, or keys of a mapping; None if one of them is None), or a
        function of the item.
    header
        On pages (HTML, Markdown, LaTeX), which leave the column out if it is empty.
    show
        Function of value and item for the cell of a page; by default text as it is, and a number with one decimal.
    parts
        Of a value that fills several columns of the CSV file: header -> path from the value.
    screen
        Header on the screen, which leaves the column out if it is empty.
    brief
        Function of value and item for the screen: text, and text that is dimmed; by default the text of the cell of a page.
    across
        True if pages and screen repeat it for every key of the table (a task, say) under that key's header.
    words
        True if pages show text instead of numbers in it.
    """

    name: str
    value: str | Callable[[Any], Any]
    header: str = ""
    show: Callable[[Any, Any], Entry] | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    screen: str = ""
    brief: Callable[[Any, Any], tuple[str, str]] | None = None
    across: bool = False
    words: bool = False

    def of(self, item: object) -> Any:
        """Return the value that an item has here."""
        return self.value(item) if callable(self.value) else _at(item, self.value)

    def fields(self, item: object) -> dict[str, Any]:
        """Return the fields of the CSV file."""
        value = self.of(item)
        return {name: _at(value, path) for name, path in self.parts.items()} if self.parts else {self.name: value}

    def entry(self, item: object) -> Entry:
        """Return the cell of a page."""
        value = self.of(item)
        if value is None:
            return NO_NUMBER
        if self.show is not None:
            return self.show(value, item)
        if isinstance(value, str):
            return Entry(value, kind="words")
        return Entry(str(value) if isinstance(value, int) else text.number(value))

    def on_screen(self, item: object) -> tuple[str, str]:
        """Return the cell of the screen: text, and text that is dimmed."""
        value = self.of(item)
        return (self.entry(item).text, "") if value is None or self.brief is None else self.brief(value, item)


@dataclass(frozen=True)
class Line:
    """A line of a page: its row header, its items (one for each key of a table with `across`), and a note shown on the screen in red."""

    head: str
    items: tuple[Any, ...]
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Lines under a common heading; an empty heading is not shown. `brief` stands for the heading on the screen."""

    heading: str
    lines: tuple[Line, ...]
    brief: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes
    ----------
    id
        Name of its files.
    legend
        Paragraphs under it.
    head
        Header of the row headers.
    across
        Key of an item (its attribute `key`) -> header, in order; empty if a line is one item.
    """

    id: str
    caption: str
    columns: tuple[Column, ...]
    groups: tuple[Group, ...]
    legend: tuple[str, ...] = ()
    head: str = "method"
    across: Mapping[str, str] = field(default_factory=dict)

    @property
    def lines(self) -> list[Line]:
        """Lines of all groups."""
        return [line for group in self.groups for line in group.lines]

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """Headers of a page from the left, that of the row headers first; True if the column holds words."""
        heads = [(self.head, False)]
        for column in self.columns:
            headers = self.across.values() if column.across else filter(None, [column.header])
            heads += [(header, column.words) for header in headers]
        return heads

    @property
    def on_pages(self) -> bool:
        """True if pages show it; else it is a CSV file only."""
        return len(self.heads) > 1

    def cells(self, line: Line) -> Iterator[Entry]:
        """Cells of a line of a page, without the row header."""
        for column in self.columns:
            if column.across:
                of_key = {item.key: column.entry(item) for item in line.items}
                yield from (of_key.get(key, NO_NUMBER) for key in self.across)
            elif column.header:
                yield column.entry(line.items[0])

    def records(self) -> list[dict[str, Any]]:
        """Lines of the CSV file, one for each item: header -> number, text or None."""
        items = [item for line in self.lines for item in line.items]
        return [{name: value for column in self.columns for name, value in column.fields(item).items()} for item in items]


def _at(item: object, path: str) -> Any:
    """Follow a path of attributes and keys; None if one of them is None."""
    for name in path.split("."):
        if item is None:
            return None
        item = item[name] if isinstance(item, Mapping) else getattr(item, name)
    return item
