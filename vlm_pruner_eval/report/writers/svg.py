"""An .svg file as part of a page: its ids unlike any other's, its colours those of the page, its content named."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

from vlm_pruner_eval.report.figures import style

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_PX_A_POINT, _LEGIBLE = 4 / 3, 760  # CSS pixels; a narrow screen scrolls a figure rather than shrink it below this
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
# matplotlib writes colours as hexadecimal digits into style attributes; the page says what they are in light and dark
_PAGE_COLOURS = {style.INK: "var(--ink)", style.MUTED: "var(--muted)", style.GRID: "var(--rule)", style.PAPER: "var(--paper)"}


def inline(path: Path, *, name: str, title: str, description: str) -> str:
    """The <svg> element of a file that matplotlib wrote, ready to stand in an HTML page.

    Parameters
    ----------
    path
        The .svg file.
    name
        Unique in the page: it is put before every id of the drawing.
    title, description
        What assistive technology reads instead of the drawing.
    """
    root = ET.parse(path).getroot()
    for child in list(root):
        if child.tag == f"{_SVG}metadata":
            root.remove(child)
    for element in root.iter():
        _rewrite(element, name)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    _, _, width, _ = (float(part) for part in root.attrib["viewBox"].split())
    root.attrib |= {
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
        "style": f"min-width: {min(width, _LEGIBLE):.0f}px; max-width: {_PX_A_POINT * width:.0f}px",
    }
    for index, (tag, content) in enumerate((("title", title), ("desc", description))):
        label = ET.Element(tag, {"id": f"{name}-{tag}"})
        label.text = content
        root.insert(index, label)
    return ET.tostring(root, encoding="unicode", short_empty_elements=False)


def _rewrite(element: ET.Element, name: str) -> None:
    """Without namespaces (an HTML page has none), with the page's colours, and with `name` before ids and what refers to them."""
    element.tag = element.tag.removeprefix(_SVG)
    found = {key.removeprefix(_XLINK): value for key, value in element.attrib.items()}
    element.attrib.clear()
    element.attrib.update({key: _value(key, value, name) for key, value in found.items() if not key.startswith("{")})


def _value(key: str, value: str, name: str) -> str:
    """An attribute's value as it stands in the page."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return re.sub(r"^#", f"#{name}-", value)
    if key == "style":
        for colour, variable in _PAGE_COLOURS.items():
            value = value.replace(colour, variable)
    return _REFERENCE.sub(rf"url(#{name}-\1)", value)
