"""One image with the patches that a method kept: bright, framed in the colour of their turn, and numbered where there is room."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm_pruner_eval.report.geometry.views import Box, View

Colour = tuple[int, int, int]

BORDER: Colour = (96, 96, 96)  # what a processor puts around an image
SEEN: Colour = (235, 235, 235)
DIMMED = 0.28  # brightness of what was dropped
_UNSEEN = 0.02  # of a panel's width: less is rounding, or the few pixels that a tower leaves over
_FIRST, _LAST = 0.97, 0.3  # of matplotlib's "plasma": from yellow to purple, all brighter than what is dimmed
_FEWEST_PX = 15  # of a cell that holds a number


@functools.cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: Latin, Greek and Cyrillic letters."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


@functools.cache
def turn_colour(rank: int, n: int) -> Colour:
    """The colour of the token that was chosen as number `rank` (from 0) of `n`."""
    import matplotlib

    share = rank / max(1, n - 1)
    red, green, blue, _ = matplotlib.colormaps["plasma"](_FIRST + share * (_LAST - _FIRST))
    return round(red * 255), round(green * 255), round(blue * 255)


def panel(image: Image.Image, size: tuple[int, int], view: View, ranks: Mapping[int, int] | None, n_kept: int, width: int) -> Image.Image:
    """Draw one view.

    Parameters
    ----------
    image
        The picture, of any size.
    size
        (width, height) of the picture in the pixels that the view's rectangles are in.
    ranks
        Kept token -> its turn, from 0; None: nothing was dropped, so there is nothing to mark.
    n_kept
        Tokens kept over all views.
    width
        Of the panel, in pixels.
    """
    left, top, right, bottom = view.canvas
    scale = width / (right - left)
    canvas = Image.new("RGB", (width, max(1, round((bottom - top) * scale))), BORDER)
    bright = image.resize((max(1, round(size[0] * scale)), max(1, round(size[1] * scale))), Image.Resampling.LANCZOS)
    canvas.paste(bright, (round(-left * scale), round(-top * scale)))
    seen = _pixels(_union(list(view.boxes.values())), (left, top), scale)
    if ranks is None:
        return _framed(canvas, seen)
    cells = {token: _pixels(view.boxes[token], (left, top), scale) for token in ranks if token in view.boxes}
    drawn = canvas.point(lambda value: int(value * DIMMED))
    for cell in cells.values():
        drawn.paste(canvas.crop(cell), cell[:2])
    pen = ImageDraw.Draw(drawn)
    for token in sorted(cells, key=ranks.__getitem__, reverse=True):  # the first chosen lies on top
        _mark(pen, cells[token], ranks[token], n_kept)
    return _framed(drawn, seen)


def _union(boxes: Sequence[Box]) -> Box:
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def _framed(image: Image.Image, seen: tuple[int, int, int, int]) -> Image.Image:
    """A thin frame around what the model sees; on the edge of the panel, where it would say nothing, there is none."""
    left, top, right, bottom = seen
    pen, margin = ImageDraw.Draw(image), _UNSEEN * image.width
    lines = [
        (left > margin, (left, top, left, bottom - 1)),
        (top > margin, (left, top, right - 1, top)),
        (image.width - right > margin, (right - 1, top, right - 1, bottom - 1)),
        (image.height - bottom > margin, (left, bottom - 1, right - 1, bottom - 1)),
    ]
    for is_inside, line in lines:
        if is_inside:
            pen.line(line, fill=SEEN)
    return image


def cell_width(view: View, width: int) -> float:
    """Pixels of a token in a panel of `width` pixels."""
    left, _, right, _ = view.canvas
    boxes = list(view.boxes.values())
    return 0.0 if not boxes else (boxes[0][2] - boxes[0][0]) * width / (right - left)


def _pixels(box: Box, origin: tuple[float, float], scale: float) -> tuple[int, int, int, int]:
    left, top, right, bottom = ((value - origin[i % 2]) * scale for i, value in enumerate(box))
    return round(left), round(top), max(round(left) + 1, round(right)), max(round(top) + 1, round(bottom))


def _mark(pen: ImageDraw.ImageDraw, cell: tuple[int, int, int, int], rank: int, n: int) -> None:
    left, top, right, bottom = cell
    side = min(right - left, bottom - top)
    pen.rectangle((left, top, right - 1, bottom - 1), outline=turn_colour(rank, n), width=2 if side >= _FEWEST_PX else 1)
    text = str(rank + 1)
    room = (right - left - 4) / max(2, len(str(n)))  # one size of digits in a panel
    if side < _FEWEST_PX or room < 4:
        return
    letters = font(max(7, min(16, int(room / 0.64))))
    pen.text(((left + right) / 2, (top + bottom) / 2), text, font=letters, fill="white", stroke_width=1, stroke_fill="black", anchor="mm")


def colour_bar(n: int, size: tuple[int, int]) -> Image.Image:
    """The colours of `n` turns from left to right."""
    bar = Image.new("RGB", size)
    pen = ImageDraw.Draw(bar)
    for x in range(size[0]):
        pen.line((x, 0, x, size[1]), fill=turn_colour(min(n - 1, x * n // size[0]), n))
    return bar


def wrapped(text: str, letters: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Lines of at most `width` pixels; at most `most` of them, the last with dots where something is left out."""
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            for part in _pieces(word, letters, width):
                longer = f"{line} {part}" if line else part
                if letters.getlength(longer) <= width:
                    line = longer
                else:
                    lines.append(line)
                    line = part
        lines.append(line)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and letters.getlength(last + " …") > width:
        last = last[:-1]
    return [*lines[: most - 1], last + " …"]


def _pieces(word: str, letters: ImageFont.FreeTypeFont, width: int) -> Sequence[str]:
    """A word that is wider than a line, in parts; languages without spaces have such words."""
    pieces = [word[:1]]
    for letter in word[1:]:
        if letters.getlength(pieces[-1] + letter) > width:
            pieces.append(letter)
        else:
            pieces[-1] += letter
    return pieces
