"""Which part of an image each visual token shows: arithmetic on logged layouts, sizes and processor settings, no model.

Rectangles are in pixels of the image as the task gave it, so that they hold whatever the checkpoint's processor did to it.
They show where a token's patch was cut out; what a vision tower mixes into it from elsewhere is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_pruner_eval.errors import ConfigError

Box = tuple[float, float, float, float]  # left, top, right, bottom
Layout = Sequence[int]  # (n_tokens, rows, cols, frames), as SampleRecord.layouts has it


@dataclass(frozen=True)
class Medium:
    """An image of a prompt, or a video of which `n_frames` frames were sampled; sizes in pixels."""

    width: int
    height: int
    n_frames: int = 1
    is_video: bool = False


@dataclass(frozen=True)
class View:
    """One picture that tokens lie on: an image, the base view or the tiles of an image, or a frame of a video.

    Attributes
    ----------
    title
        Which view of its image it is; empty where there is one only.
    medium
        Index among the images and videos of the prompt.
    frame
        Which sampled frame (the first, where tokens hold several); 0 of an image.
    canvas
        What there is to see: the image, and the border that the processor puts around it.
    boxes
        Index of a token among the prompt's visual tokens -> its rectangle.
    """

    title: str
    medium: int
    frame: int
    canvas: Box
    boxes: dict[int, Box]


def views(geometry: Mapping[str, Any], media: Sequence[Medium], layouts: Sequence[Layout]) -> list[View]:
    """Lay every visual token of a prompt on its image.

    Parameters
    ----------
    geometry
        ``run.json["provenance"]["model"]["geometry"]``.
    media
        Images and videos in the order of the prompt.
    layouts
        ``SampleRecord.layouts``.

    Returns
    -------
    list of View
        In the order of the tokens; newline tokens have no rectangle.

    Raises
    ------
    ConfigError
        A family without rules here, or layouts that these images can't have had.
    """
    rule = _RULES.get(geometry.get("family"))
    if rule is None:
        raise ConfigError(f"geometry: got the family {geometry.get('family')!r}, expected one of {', '.join(sorted(_RULES))}.")
    found, left, first = [], [tuple(layout) for layout in layouts], 0
    for index, medium in enumerate(media):
        if not left:
            raise ConfigError(f"geometry: got layouts of {index} images and videos, expected {len(media)}.")
        n_layouts, pictures = rule(geometry, medium, left)
        for title, frame, canvas, boxes in pictures:
            found.append(View(title, index, frame, canvas, {first + token: box for token, box in boxes.items()}))
        first += sum(layout[0] for layout in left[:n_layouts])
        left = left[n_layouts:]
    if left:
        raise ConfigError(f"geometry: {len(left)} layouts are left over after {len(media)} images and videos.")
    return found


Picture = tuple[str, int, Box, dict[int, Box]]  # title, frame, canvas, boxes by token of the medium
Rule = Callable[[Mapping[str, Any], Medium, list[Layout]], tuple[int, list[Picture]]]  # how many layouts the medium has, and its pictures


# ---- where an image lies in what the vision tower sees
@dataclass(frozen=True)
class Fit:
    """The vision tower's x is the image's x times `scale` plus `offset`; both are (horizontal, vertical)."""

    scale: tuple[float, float]
    offset: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def stretched(cls, medium: Medium, width: float, height: float) -> Fit:
        """The whole image, its sides made `width` and `height`."""
        return cls((width / medium.width, height / medium.height))

    @classmethod
    def padded(cls, medium: Medium, side: float) -> Fit:
        """The image in the middle of a square, which is then resized to `side`."""
        longest = max(medium.width, medium.height)
        scale = side / longest
        return cls((scale, scale), ((longest - medium.width) // 2 * scale, (longest - medium.height) // 2 * scale))

    def image_box(self, box: Box) -> Box:
        """A rectangle of the vision tower's input in pixels of the image."""
        (x, y), (dx, dy) = self.scale, self.offset
        return (box[0] - dx) / x, (box[1] - dy) / y, (box[2] - dx) / x, (box[3] - dy) / y


def grid_boxes(fit: Fit, rows: Sequence[tuple[float, float]], cols: Sequence[tuple[float, float]], stride: int) -> dict[int, Box]:
    """Rectangles of tokens in row-major order; `rows` and `cols` are their edges, `stride` the tokens of a row, newline included."""
    return {
        r * stride + c: fit.image_box((left, top, right, bottom))
        for r, (top, bottom) in enumerate(rows)
        for c, (left, right) in enumerate(cols)
    }


def edges(n: int, *, side: int, patch: float, tile: float, first: int = 0, span: int | None = None) -> list[tuple[float, float]]:
    """Edges, along one direction, of `n` tokens that share the patches `first` to ``first + span`` evenly (default: one each).

    A tile holds `side` patches, and may be wider than they are together: SigLIP's 27 patches of 14 pixels leave 6 of 384 unseen.
    """
    each = (n if span is None else span) / n

    def at(patches: float, tile_index: int) -> float:
        return tile_index * tile + (patches - tile_index * side) * patch

    found = []
    for i in range(n):
        start, end = round(first + i * each, 6), round(first + (i + 1) * each, 6)  # 27.000000001 would be in the next tile
        found.append((at(start, int(start // side)), at(end, math.ceil(end / side) - 1)))
    return found


def _whole(medium: Medium) -> Box:
    return 0.0, 0.0, float(medium.width), float(medium.height)


def _around(medium: Medium, boxes: Mapping[int, Box]) -> Box:
    """The image and all rectangles."""
    sides = list(zip(_whole(medium), *boxes.values(), strict=True))
    return min(sides[0]), min(sides[1]), max(sides[2]), max(sides[3])


def _expect(layout: Layout, n_tokens: int, what: str) -> None:
    if layout[0] != n_tokens:
        raise ConfigError(
            f"geometry: {what} makes {n_tokens} tokens, but the record has {layout[0]} ({layout[1]} x {layout[2]}, {layout[3]} frames); "
            "the image was changed before the processor had it, or another one was kept."
        )


# ---- families
def _llava(geometry: Mapping[str, Any], medium: Medium, layouts: list[Layout]) -> tuple[int, list[Picture]]:
    """One square grid of an image that is padded, resized, cropped, or all of it; a CLS token may stand before it."""
    n_tokens, rows, cols, _ = layouts[0]
    patch, size, crop = geometry["patch"], geometry["resize"], geometry["crop"]
    is_cls = n_tokens == rows * cols + 1
    _expect(layouts[0], rows * cols + is_cls, "an image of LLaVA")
    width, height, border = medium.width, medium.height, (0, 0)
    if geometry["pad"]:
        width = height = max(medium.width, medium.height)
        border = (width - medium.width) // 2, (height - medium.height) // 2
    target = (width, height)
    if size is not None and "shortest_edge" in size:
        short = size["shortest_edge"]
        target = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    elif size is not None:
        target = size["width"], size["height"]
    cut = (0, 0) if crop is None else (int((target[0] - crop[1]) / 2), int((target[1] - crop[0]) / 2))
    scale = target[0] / width, target[1] / height
    fit = Fit(scale, (border[0] * scale[0] - cut[0], border[1] * scale[1] - cut[1]))
    along = {"patch": patch, "tile": 0, "side": max(rows, cols)}
    boxes = {i + is_cls: box for i, box in grid_boxes(fit, edges(rows, **along), edges(cols, **along), cols).items()}
    return 1, [("", 0, _around(medium, boxes), boxes)]


def _anyres(geometry: Mapping[str, Any], medium: Medium, layouts: list[Layout]) -> tuple[int, list[Picture]]:
    """A base view, then tiles whose rows end in a newline token; or the base view alone, padded, with one newline token."""
    if medium.is_video:
        return 1, _pooled_frames(geometry, medium, layouts[0])
    _, rows, cols, n_views = layouts[0]
    tile, patch = geometry["tile"], geometry["patch"]
    side = tile // patch
    square = edges(side, side=side, patch=patch, tile=tile)
    if n_views == 1:
        _expect(layouts[0], side * side + 1, "one of several images")
        boxes = grid_boxes(Fit.padded(medium, tile), square, square, side)
        return 1, [("", 0, _around(medium, boxes), boxes)]
    base = grid_boxes(Fit.stretched(medium, tile, tile), square, square, side)
    fit, (top, n_rows), (left, n_cols) = _tiled(geometry, medium)
    expected = _shrunk(geometry, n_rows, n_cols, side)
    if (rows, cols) != expected:
        _expect(layouts[0], side * side + expected[0] * (expected[1] + 1), f"an image of {medium.width} x {medium.height} pixels")
    _expect(layouts[0], side * side + rows * (cols + 1), "its grid")
    along = {"side": side, "patch": patch, "tile": tile}
    fine = grid_boxes(fit, edges(rows, **along, first=top, span=n_rows), edges(cols, **along, first=left, span=n_cols), cols + 1)
    tiles = {side * side + token: box for token, box in fine.items()}
    return 1, [("base view", 0, _whole(medium), base), ("tiles", 0, _around(medium, tiles), tiles)]


def _tiled(geometry: Mapping[str, Any], medium: Medium) -> tuple[Fit, tuple[int, int], tuple[int, int]]:
    """How the image lies on its tiles, and (first, number) of the rows and columns of patches that are not border.

    Paper: arXiv 2310.03744 (LLaVA-1.5-HD), as LLaVA-NeXT's and LLaVA-OneVision's processors do it.
    """
    tile = geometry["tile"]
    side = tile // geometry["patch"]
    height, width = best_pinpoint((medium.height, medium.width), geometry["pinpoints"])
    across, down = width / medium.width, height / medium.height
    size = (
        (width, min(math.ceil(medium.height * across), height)) if across < down else (min(math.ceil(medium.width * down), width), height)
    )
    fit = Fit((size[0] / medium.width, size[1] / medium.height), ((width - size[0]) // 2, (height - size[1]) // 2))
    rows, cols = height // tile * side, width // tile * side
    top = left = 0
    if medium.width / medium.height > cols / rows:
        top = (rows - int(round(medium.height * (cols / medium.width), 7))) // 2
    else:
        left = (cols - int(round(medium.width * (rows / medium.height), 7))) // 2
    return fit, (top, rows - 2 * top), (left, cols - 2 * left)


def best_pinpoint(size: tuple[int, int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The shape (height, width), in pixels, that keeps most of an image of `size` (height, width) and, of those, wastes least."""

    def merit(shape: Sequence[int]) -> tuple[int, int]:
        scale = min(shape[1] / size[1], shape[0] / size[0])
        used = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return used, used - shape[0] * shape[1]

    height, width = max(pinpoints, key=merit)
    return height, width


def _shrunk(geometry: Mapping[str, Any], rows: int, cols: int, side: int) -> tuple[int, int]:
    """(rows, cols) of tokens: LLaVA-OneVision shrinks more than `max_tiles` tiles' worth of patches to about that many.

    Paper: arXiv 2408.03326 (Higher AnyRes).
    """
    if geometry["max_tiles"] is None:
        return rows, cols
    ratio = math.sqrt(rows * cols / (geometry["max_tiles"] * side**2))
    return (int(rows // ratio), int(cols // ratio)) if ratio > 1.1 else (rows, cols)


def _pooled_frames(geometry: Mapping[str, Any], medium: Medium, layout: Layout) -> list[Picture]:
    """Frames that are stretched to a tile and pooled; one newline token behind the video, or one behind every row."""
    n_tokens, rows, cols, frames = layout
    tile, patch = geometry["tile"], geometry["patch"]
    stride = cols + 1 if n_tokens == frames * rows * (cols + 1) else cols
    _expect(layout, frames * rows * stride + (stride == cols), f"a video of {frames} frames")
    if frames != medium.n_frames:
        raise ConfigError(f"geometry: the record has {frames} frames, but the video {medium.n_frames}.")
    side = tile // patch
    along = {"side": side, "patch": patch, "tile": tile, "span": side}
    boxes = grid_boxes(Fit.stretched(medium, tile, tile), edges(rows, **along), edges(cols, **along), stride)
    return [_frame(medium, t, {t * rows * stride + i: box for i, box in boxes.items()}) for t in range(frames)]


def _qwen(geometry: Mapping[str, Any], medium: Medium, layouts: list[Layout]) -> tuple[int, list[Picture]]:
    """The image is stretched to whole tokens; a token of a video holds several frames."""
    _, rows, cols, frames = layouts[0]
    _expect(layouts[0], frames * rows * cols, "its grid")
    boxes = _even(medium, rows, cols)
    if not medium.is_video:
        _expect(layouts[0], rows * cols, "an image")
        return 1, [("", 0, _whole(medium), boxes)]
    step = geometry["temporal_patch"]
    if frames != math.ceil(medium.n_frames / step):
        raise ConfigError(f"geometry: the record has {frames} x {step} frames, but the video {medium.n_frames}.")
    moved = [{t * rows * cols + i: box for i, box in boxes.items()} for t in range(frames)]
    return 1, [_frame(medium, t * step, of_frame) for t, of_frame in enumerate(moved)]


def _internvl(geometry: Mapping[str, Any], medium: Medium, layouts: list[Layout]) -> tuple[int, list[Picture]]:
    """Tiles of a stretched image in row-major order, then a thumbnail where there are several; every tile is a layout of its own."""
    n_tokens, rows, cols, _ = layouts[0]
    _expect(layouts[0], rows * cols, "a tile")
    if medium.is_video:
        _expect_layouts(layouts, medium.n_frames, f"a video of {medium.n_frames} frames")
        each = _even(medium, rows, cols)
        moved = [{t * n_tokens + i: box for i, box in each.items()} for t in range(medium.n_frames)]
        return medium.n_frames, [_frame(medium, t, boxes) for t, boxes in enumerate(moved)]
    down, across = tile_arrangement((medium.height, medium.width), geometry["tile"], geometry["min_tiles"], geometry["max_tiles"])
    n_tiles = down * across + (down * across > 1)
    _expect_layouts(layouts, n_tiles, f"an image of {medium.width} x {medium.height} pixels")
    fine = _even(medium, down * rows, across * cols)
    tiles = {}
    for cell, box in fine.items():
        row, col = divmod(cell, across * cols)
        tile = row // rows * across + col // cols
        tiles[tile * n_tokens + row % rows * cols + col % cols] = box
    if n_tiles == 1:
        return 1, [("", 0, _whole(medium), tiles)]
    thumbnail = {(n_tiles - 1) * n_tokens + i: box for i, box in _even(medium, rows, cols).items()}
    return n_tiles, [("tiles", 0, _whole(medium), tiles), ("thumbnail", 0, _whole(medium), thumbnail)]


def tile_arrangement(size: tuple[int, int], tile: int, least: int, most: int) -> tuple[int, int]:
    """(rows, cols) of InternVL's tiles for an image of `size` (height, width): the closest shape, larger ones for larger images.

    Paper: arXiv 2404.16821 (dynamic high resolution), with the tie rule of its processor.
    """
    shapes = [(rows, cols) for cols in range(1, most + 1) for rows in range(1, most + 1) if least <= rows * cols <= most]
    best, best_gap = (1, 1), math.inf
    for rows, cols in sorted(shapes, key=math.prod):
        gap = abs(size[1] / size[0] - cols / rows)
        if gap < best_gap or (gap == best_gap and size[0] * size[1] > 0.5 * tile**2 * rows * cols):
            best, best_gap = (rows, cols), gap
    return best


def _even(medium: Medium, rows: int, cols: int) -> dict[int, Box]:
    """The image in equal parts."""
    unit = {"side": max(rows, cols), "patch": 1, "tile": 0}
    return grid_boxes(Fit.stretched(medium, cols, rows), edges(rows, **unit), edges(cols, **unit), cols)


def _frame(medium: Medium, frame: int, boxes: dict[int, Box]) -> Picture:
    return f"frame {frame + 1} of {medium.n_frames}", frame, _whole(medium), boxes


def _expect_layouts(layouts: list[Layout], n: int, what: str) -> None:
    alike = sum(tuple(layout) == tuple(layouts[0]) for layout in layouts[:n])
    if alike != n:
        raise ConfigError(f"geometry: {what} makes {n} tiles, but the record has {alike} that fit; the image was changed before.")


_RULES: dict[str, Rule] = {
    "llava": _llava,
    "llava_next": _anyres,
    "llava_onevision": _anyres,
    "llava_video": _anyres,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "internvl": _internvl,
}
