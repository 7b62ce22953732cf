"""A document on one sheet: the question, the expected answer, and for every method its answer and the patches that it kept."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.geometry.views import Medium, View, views
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.show.documents_shown import Document, Reply
from vlm_pruner_eval.report.show.panel import cell_width, colour_bar, font, panel, wrapped
from vlm_pruner_eval.sweep.images import ImageStore, Picture

PAPER, INK, MUTED, RIGHT, WRONG = "#ffffff", "#1f2328", "#59636e", "#1a7f37", "#b3261e"
_GAP, _MOST_LINES = 14, 6


@dataclass(frozen=True)
class Sheet:
    """Sizes of a sheet, in pixels.

    Attributes
    ----------
    panel, widest
        Width of a panel, and of one that is made larger so that its cells hold numbers.
    cell
        Width that a cell should have; 0: panels stay as they are.
    across
        Width of the sheet beyond which panels begin a new line.
    text
        Height of letters.
    is_alone
        Whether the sheet has to say what was asked and answered; a report says so beside it, and has less room for bytes.
    """

    panel: int
    widest: int
    cell: int
    across: int
    text: int
    is_alone: bool


LARGE = Sheet(panel=480, widest=1056, cell=22, across=1700, text=15, is_alone=True)
SMALL = Sheet(panel=240, widest=240, cell=0, across=800, text=13, is_alone=False)  # of a gallery


def draw(results: Results, document: Document, sheet: Sheet = LARGE) -> bytes:
    """Draw a document.

    Returns
    -------
    bytes
        A PNG.

    Raises
    ------
    ConfigError
        Its pictures were not kept, or the records say nothing of the geometry.
    """
    geometry = geometry_of(results)
    if not document.images:
        raise ConfigError(f"{document.place}: names no image; text-only documents and records of older versions can't be drawn.")
    store = ImageStore(results.store.root)
    pictures = [store.read(digest) for digest in document.images]
    blocks = [_block(reply, geometry, pictures, sheet) for reply in document.replies.values() if reply.order]
    silent = [reply for reply in document.replies.values() if not reply.order]
    body = _strip(blocks, sheet.across, _GAP) if blocks else Image.new("RGB", (sheet.panel, 1), PAPER)
    cropped = geometry.get("crop") and not geometry["pad"] and any(picture.width != picture.height for picture in pictures)
    header = _header(document, silent, body.width, sheet, "outside the white lines: not shown to the model" if cropped else "")
    page = Image.new("RGB", (body.width + 2 * _GAP, header.height + body.height + 3 * _GAP), PAPER)
    page.paste(header, (_GAP, _GAP))
    page.paste(body, (_GAP, header.height + 2 * _GAP))
    content = io.BytesIO()
    if not sheet.is_alone:
        page = page.quantize(256, method=Image.Quantize.MAXCOVERAGE)  # a third of the bytes, and no colour of the legend is lost
    page.save(content, "PNG", optimize=True)
    return content.getvalue()


def geometry_of(results: Results) -> Mapping[str, Any]:
    """How the sweep's processor laid images out.

    Raises
    ------
    ConfigError
        The records don't say: they are of an older version.
    """
    for record in results.records:
        found = record.provenance.model.get("geometry")
        if found:
            return found
    raise ConfigError(f"{results.store.root}: the records do not say how images became tokens; run the sweep again with this version.")


def _in_lines(blocks: Sequence[Image.Image], across: int, gap: int) -> list[list[Image.Image]]:
    lines: list[list[Image.Image]] = []
    used = 0
    for block in blocks:
        if not lines or used + block.width > across:
            lines.append([])
            used = 0
        lines[-1].append(block)
        used += block.width + gap
    return lines


# ---- one method
def _block(reply: Reply, geometry: Mapping[str, Any], pictures: Sequence[Picture], sheet: Sheet) -> Image.Image:
    """A method's name and answer over its panels."""
    is_pruned = len(reply.order) < reply.n_visual
    ranks = {token: turn for turn, token in enumerate(reply.order)} if is_pruned else None
    try:
        panels = [
            _titled(view, _drawn(view, pictures[view.medium], ranks, len(reply.order), sheet), sheet)
            for view in _shown(views(geometry, _media(pictures), reply.layouts), pictures)
        ]
    except ConfigError as error:  # of this method alone; it stands where its picture would
        panels = [_text_image([(str(error), MUTED, False)], sheet.panel, sheet.text, 8)]
    body = _strip(panels, sheet.across, _GAP // 2)
    colour = {True: RIGHT, False: WRONG, None: INK}[reply.is_right]
    counted = f"{len(reply.order)} of {reply.n_visual} tokens"
    caption = [
        (reply.label, INK, True),
        (counted if is_pruned else f"all {reply.n_visual} tokens", MUTED, False),
        (reply.verdict, colour, False),
    ]
    head = _text_image(caption, body.width, sheet.text, 2)
    return _over(head, body)


def _media(pictures: Sequence[Picture]) -> list[Medium]:
    return [Medium(picture.width, picture.height, picture.n_frames or 1, picture.n_frames is not None) for picture in pictures]


def _shown(found: Sequence[View], pictures: Sequence[Picture]) -> list[View]:
    """All views of images; of videos those of the frames that were kept (a token may hold several frames, and begin before)."""
    shown: list[View] = []
    for medium, picture in enumerate(pictures):
        own = [view for view in found if view.medium == medium]
        if picture.n_frames is not None:
            own = list({view.frame: view for frame in picture.frames for view in [_at(own, frame)]}.values())
        shown += own
    return shown


def _at(frames: Sequence[View], frame: int) -> View:
    """The view that shows a frame."""
    return max((view for view in frames if view.frame <= frame), key=lambda view: view.frame)


def _drawn(view: View, picture: Picture, ranks: Mapping[int, int] | None, n_kept: int, sheet: Sheet) -> Image.Image:
    width = sheet.panel
    if sheet.cell and 0 < (cell := cell_width(view, width)) < sheet.cell:
        width = min(sheet.widest, round(width * sheet.cell / cell))
    if picture.n_frames is not None:
        width = max(120, width // 2)
    nearest = min(range(len(picture.frames)), key=lambda i: (picture.frames[i] < view.frame, abs(picture.frames[i] - view.frame)))
    return panel(picture.images[nearest], (picture.width, picture.height), view, ranks, n_kept, width)


def _titled(view: View, image: Image.Image, sheet: Sheet) -> Image.Image:
    if not view.title:
        return image
    head = _text_image([(view.title, MUTED, False)], image.width, sheet.text - 2, 1)
    return _over(head, image)


def _over(head: Image.Image, body: Image.Image) -> Image.Image:
    """One on top of the other, as wide as `body`."""
    both = Image.new("RGB", (body.width, head.height + body.height), PAPER)
    both.paste(head, (0, 0))
    both.paste(body, (0, head.height))
    return both


def _strip(images: Sequence[Image.Image], across: int, gap: int) -> Image.Image:
    """Side by side, in as many lines as are needed."""
    lines = _in_lines(images, across, gap)
    width = max(sum(image.width for image in line) + gap * (len(line) - 1) for line in lines)
    strip = Image.new("RGB", (width, sum(max(image.height for image in line) + gap for line in lines) - gap), PAPER)
    top = 0
    for line in lines:
        left = 0
        for image in line:
            strip.paste(image, (left, top))
            left += image.width + gap
        top += max(image.height for image in line) + gap
    return strip


# ---- text
def _header(document: Document, silent: Sequence[Reply], width: int, sheet: Sheet, more: str) -> Image.Image:
    """The question, what was expected, answers that have no picture, and the legend of colours; `more` is added to it."""
    lines = [
        (str(document.place), MUTED, False),
        (document.question or "(the question is not in the records)", INK, True),
        (f"expected: {document.gold}", INK, False),
        *((f"{reply.label}{' (no visual token)' if reply.n_visual else ''}: {reply.verdict}", INK, False) for reply in silent),
    ]
    text = _text_image(lines if sheet.is_alone else [], width, sheet.text, _MOST_LINES)
    n = max((len(reply.order) for reply in document.replies.values() if len(reply.order) < reply.n_visual), default=0)
    if not n:
        return text
    note = _text_image([(more, MUTED, False)] if more else [], width, sheet.text - 2, 2)
    whole = Image.new("RGB", (width, text.height + sheet.text + 8 + note.height), PAPER)
    whole.paste(text, (0, 0))
    _legend(whole, text.height, n, sheet.text - 2)
    whole.paste(note, (0, whole.height - note.height))
    return whole


def _legend(image: Image.Image, top: int, n: int, size: int) -> None:
    """The colours of the turns, with words, at the left edge."""
    pen, letters, before = ImageDraw.Draw(image), font(size), "chosen first "
    bar = colour_bar(n, (min(220, image.width // 3), size - 1))
    left = round(letters.getlength(before))
    pen.text((0, top), before, font=letters, fill=MUTED)
    image.paste(bar, (left, top + 2))
    pen.text((left + bar.width + 6, top), "last; dark: dropped", font=letters, fill=MUTED)


def _text_image(paragraphs: Sequence[tuple[str, str, bool]], width: int, size: int, most: int) -> Image.Image:
    """Paragraphs of (text, colour, whether bold), each of at most `most` lines."""
    lines = [(line, colour, bold) for text, colour, bold in paragraphs for line in wrapped(text, font(size, bold=bold), width, most)]
    step = round(size * 1.35)
    image = Image.new("RGB", (width, step * len(lines) + 4), PAPER)
    pen = ImageDraw.Draw(image)
    for row, (line, colour, bold) in enumerate(lines):
        pen.text((0, row * step), line, font=font(size, bold=bold), fill=colour)
    return image
