"""Reads an HTML page as strictly as XML would be: what the tests know about a page, they know from here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser

VOID = {"wbr", "meta", "link", "img", "br", "hr", "input"}


@dataclass
class Element:
    """A start tag with its attributes, the names of the elements around it, and the text inside."""

    tag: str
    attributes: dict[str, str]
    inside: tuple[str, ...]
    text: str = ""


class Reader(HTMLParser):
    """Reads a page and holds it to the rules that browsers forgive: every tag closed in its turn, no attribute given twice."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(page)
        self.close()
        assert not self.open, f"left open: {[element.tag for element in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert max(Counter(name for name, _ in attrs).values(), default=1) == 1, f"{tag}: an attribute twice"
        element = Element(tag, {name: value or "" for name, value in attrs}, tuple(outer.tag for outer in self.open))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1].tag == tag, f"</{tag}> where {self.open[-1].tag} is open"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]

    def table(self, name: str) -> dict[str, list[str]]:
        """Texts of a table's cells by row header, rows of one name one after the other."""
        start = next(i for i, element in enumerate(self.elements) if element.tag == "table" and element.attributes["id"] == name)
        rows: dict[str, list[str]] = {}
        for element in self.elements[start + 1 :]:
            if element.tag == "table":
                break
            if element.tag == "th" and element.attributes["scope"] == "row":
                head = element.text
            if element.tag == "td" and "colspan" not in element.attributes:
                rows.setdefault(head, []).append(element.text)
        return rows
