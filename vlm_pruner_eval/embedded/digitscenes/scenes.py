"""Scenes: what stands where (`lay_out`), and the picture of it (`render`). Two random streams, so that facts need no pixels."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from vlm_pruner_eval.embedded.digitscenes.glyphs import Glyph, glyph_bank
from vlm_pruner_eval.embedded.digitscenes.photos import SIDE_PIXELS, background
from vlm_pruner_eval.errors import ConfigError

COLOURS = {
    "red": (235, 45, 40),
    "green": (40, 205, 60),
    "blue": (60, 100, 255),
    "yellow": (245, 225, 40),
    "white": (245, 245, 245),
    "pink": (240, 70, 225),
}
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")

_INK = (20, 20, 25)
_PAPER = (225, 225, 215)
_GAP_PIXELS = 8  # free space around every object
_BORDER_PIXELS = 2
_TRIES = 40

Box = tuple[int, int, int, int]  # left, top, width, height, in pixels


@dataclass(frozen=True)
class Digit:
    """A digit in the picture: its value, colour, cell of the 3x3 grid, box, and which glyph of the bank draws it.

    `colour` and `cell` are None for digits of a number plate.
    """

    digit: int
    colour: str | None
    cell: str | None
    box: Box
    source: int
    glyph: int


@dataclass(frozen=True)
class Scene:
    """The facts of one picture.

    Attributes
    ----------
    objects
        Coloured digits.
    plate
        Digits of the number plate from left to right; empty when there is none.
    plate_box
        Left, top, width, height in pixels, or None.
    """

    objects: tuple[Digit, ...]
    plate: tuple[Digit, ...] = ()
    plate_box: Box | None = None

    @property
    def number(self) -> str:
        """Text of the plate."""
        return "".join(str(digit.digit) for digit in self.plate)

    def as_json(self) -> dict:
        """Plain types only."""
        return asdict(self)


def cell_of(box: Box) -> str:
    """The cell of the 3x3 grid that holds the centre of a box."""
    left, top, width, height = box
    third = SIDE_PIXELS // 3
    return CELLS[int((top + height / 2) // third) * 3 + int((left + width / 2) // third)]


def _apart(one: Box, other: Box) -> bool:
    def beside(start: int, length: int, other_start: int, other_length: int) -> bool:
        return start + length + _GAP_PIXELS < other_start or other_start + other_length + _GAP_PIXELS < start

    return beside(one[0], one[2], other[0], other[2]) or beside(one[1], one[3], other[1], other[3])


def _corner(rng: np.random.RandomState, width: int, height: int) -> tuple[int, int]:
    left = rng.randint(_BORDER_PIXELS, SIDE_PIXELS - width - _BORDER_PIXELS)
    return int(left), int(rng.randint(_BORDER_PIXELS, SIDE_PIXELS - height - _BORDER_PIXELS))


def _lay_out_plate(rng: np.random.RandomState, length: int, bank: tuple[tuple[Glyph, ...], ...]) -> tuple[tuple[Digit, ...], Box]:
    height = int(rng.randint(28, 37))
    values = [int(value) for value in rng.randint(0, 10, length)]
    chosen = [int(rng.randint(len(bank[value]))) for value in values]
    glyphs = [bank[value][index] for value, index in zip(values, chosen, strict=True)]
    pitches = [max(glyph.width(height), 18) + int(rng.randint(5, 9)) for glyph in glyphs]
    box = *_corner(rng, sum(pitches) + 10, height + 14), sum(pitches) + 10, height + 14
    left, digits = box[0] + 6, []
    for glyph, index, pitch in zip(glyphs, chosen, pitches, strict=True):
        width = glyph.width(height)
        digit_box = (left + (pitch - width) // 2, box[1] + 7, width, height)
        digits.append(Digit(glyph.digit, None, None, digit_box, glyph.source, index))
        left += pitch
    return tuple(digits), box


def lay_out(rng: np.random.RandomState, n_objects: int, plate_length: int = 0, split: str = "test") -> Scene:
    """Draw the facts of a scene.

    Parameters
    ----------
    rng
        Source of every choice.
    n_objects
        Coloured digits; all different in about 4 of 5 scenes.
    plate_length
        Digits on a number plate, 0 for no plate.
    split
        Whose glyphs are drawn: "train" or "test".

    Raises
    ------
    ConfigError
        More digits than 40 x 40 attempts can place side by side.
    """
    for _ in range(_TRIES):
        bank = glyph_bank(split)
        plate, plate_box = _lay_out_plate(rng, plate_length, bank) if plate_length else ((), None)
        values = rng.permutation(10)[:n_objects] if rng.rand() < 0.8 and n_objects <= 10 else rng.randint(0, 10, n_objects)
        taken = [plate_box] if plate_box else []
        objects = []
        for value in values:
            placed = _place(rng, int(value), bank[value], taken)
            if placed is None:
                break
            objects.append(placed)
            taken.append(placed.box)
        if len(objects) == n_objects:
            return Scene(tuple(objects), plate, plate_box)
    raise ConfigError(f"n_objects: got {n_objects}, which do not fit side by side into {SIDE_PIXELS} pixels; ask for fewer, 3 to 6.")


def _place(rng: np.random.RandomState, value: int, glyphs: tuple[Glyph, ...], taken: list[Box]) -> Digit | None:
    height, index = int(rng.randint(34, 63)), int(rng.randint(len(glyphs)))
    width = glyphs[index].width(height)
    for _ in range(_TRIES):
        box = *_corner(rng, width, height), width, height
        if all(_apart(box, other) for other in taken):
            colour = [*COLOURS][rng.randint(len(COLOURS))]
            return Digit(value, colour, cell_of(box), box, glyphs[index].source, index)
    return None


def render(scene: Scene, rng: np.random.RandomState, split: str = "test") -> np.ndarray:
    """The picture of a scene.

    Parameters
    ----------
    scene
        Facts, from `lay_out` with the same split.
    rng
        Source of the photo, the crop, brightness and sensor noise.
    split
        Whose glyphs are drawn.

    Returns
    -------
    Array [336, 336, 3], uint8 RGB.
    """
    picture = np.ascontiguousarray(background(rng))
    if scene.plate_box:
        left, top, width, height = scene.plate_box
        grain = rng.randn(height, width, 1) * 4
        picture[top : top + height, left : left + width] = np.array(_PAPER) * rng.uniform(0.85, 1.1) + grain
    for digit in (*scene.plate, *scene.objects):
        left, top, width, height = digit.box
        alpha = glyph_bank(split)[digit.digit][digit.glyph].alpha(height)[..., None]
        colour = np.asarray(COLOURS[digit.colour] if digit.colour else _INK, "float32") * rng.uniform(0.9, 1.04)
        region = picture[top : top + height, left : left + width]
        region[:] = region * (1 - alpha) + colour * alpha
    noisy = picture + rng.randn(SIDE_PIXELS, SIDE_PIXELS, 1) * 3
    return np.clip(noisy, 0, 255).astype("uint8")
