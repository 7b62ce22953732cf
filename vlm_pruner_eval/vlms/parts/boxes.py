"""Rectangles of tokens in pixels of an image, and how an image lies in what the vision tower sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlm_pruner_eval.errors import ConfigError

Box = tuple[float, float, float, float]  # left, top, right, bottom
Shape = Sequence[int]  # (n_tokens, rows, cols, frames), as `Layout.shape` and SampleRecord.layouts have it
Picture = tuple[str, int, Box, dict[int, Box]]  # title, frame, canvas, boxes by token of the medium


@dataclass(frozen=True)
class Medium:
    """An image of a prompt, or a video of which `n_frames` frames were sampled; sizes in pixels."""

    width: int
    height: int
    n_frames: int = 1
    is_video: bool = False


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


def even_boxes(medium: Medium, rows: int, cols: int) -> dict[int, Box]:
    """The image in equal parts."""
    unit = {"side": max(rows, cols), "patch": 1, "tile": 0}
    return grid_boxes(Fit.stretched(medium, cols, rows), edges(rows, **unit), edges(cols, **unit), cols)


def whole_box(medium: Medium) -> Box:
    """The image itself."""
    return 0.0, 0.0, float(medium.width), float(medium.height)


def box_around(medium: Medium, boxes: Mapping[int, Box]) -> Box:
    """The image and all rectangles."""
    sides = list(zip(whole_box(medium), *boxes.values(), strict=True))
    return min(sides[0]), min(sides[1]), max(sides[2]), max(sides[3])


def frame_of(medium: Medium, index: int, boxes: dict[int, Box]) -> Picture:
    """The sampled frame number `index` (from 0) of a video, with its tokens' rectangles."""
    return f"frame {index + 1} of {medium.n_frames}", index, whole_box(medium), boxes


def expect_tokens(layout: Shape, n_tokens: int, what: str) -> None:
    """Hold a logged layout against the number of tokens that a rule gives it.

    Raises
    ------
    ConfigError
        Another number: rectangles would lie on other parts of the image than the tokens show.
    """
    if layout[0] != n_tokens:
        raise ConfigError(
            f"geometry: {what} makes {n_tokens} tokens, but the record has {layout[0]} ({layout[1]} x {layout[2]}, {layout[3]} frames); "
            "the image was changed before the processor had it, or another one was kept."
        )
