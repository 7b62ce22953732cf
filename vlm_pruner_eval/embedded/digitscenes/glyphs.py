"""Real handwritten digits as alpha masks; every 5th digit of scikit-learn's set is held out for the test split."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlm_pruner_eval.errors import ConfigError

HELD_OUT_EVERY = 5
_SEEDS = {"train": 0, "test": 1}
_VARIANTS = {"train": 6, "test": 2}
_SIDE_PIXELS = 60  # of the enlarged 8x8 digit with a margin of 1, before cropping
_MIN_ROWS = 30  # of ink: below this a shape is a fragment


@dataclass(frozen=True)
class Glyph:
    """One drawing of a digit.

    Attributes
    ----------
    digit
        0 to 9.
    source
        Index of the drawing in ``sklearn.datasets.load_digits()``.
    mask
        8-bit grey image cropped to the ink: 255 is opaque.
    """

    digit: int
    source: int
    mask: Image.Image

    def width(self, height: int) -> int:
        """Width in pixels when drawn `height` pixels high: in proportion, at least 8 and at most `height`."""
        proportional = max(8, round(self.mask.width * height / self.mask.height))
        return min(proportional, height)

    def alpha(self, height: int) -> np.ndarray:
        """Opacity [height, width] in [0, 1], float32."""
        resized = self.mask.resize((self.width(height), height), Image.Resampling.BILINEAR)
        return np.asarray(resized, "float32") / 255


def held_out(source: int) -> bool:
    """True for a drawing of ``load_digits()`` that belongs to the test split."""
    return source % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def _warp(rng: np.random.RandomState | None) -> np.ndarray:
    """Map [2, 2] from output to input pixels: the identity, or a random rotation, shear and stretch."""
    angle = shear = 0.0
    stretch_x = stretch_y = 1.0
    if rng is not None:
        angle = np.deg2rad(rng.uniform(-10, 10))
        shear = rng.uniform(-0.15, 0.15)
        stretch_x, stretch_y = rng.uniform(0.9, 1.1, 2)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos / stretch_y, -sin], [sin + shear, cos / stretch_x]])


def _mask(drawing: np.ndarray, warp: np.ndarray) -> Image.Image | None:
    """The ink of one 8x8 drawing, enlarged smoothly and made nearly binary; None when hardly any is left."""
    from scipy import ndimage

    padded = np.pad(drawing / 16.0, 1)
    matrix = warp * len(padded) / _SIDE_PIXELS
    centre = len(padded) / 2 - 0.5 - matrix @ np.full(2, _SIDE_PIXELS / 2 - 0.5)
    smooth = ndimage.affine_transform(padded, matrix, centre, output_shape=(_SIDE_PIXELS, _SIDE_PIXELS), order=3)
    ink = np.clip((smooth - 0.30) / 0.25, 0, 1)
    rows, cols = np.where(ink > 0.5)
    if len(rows) < _MIN_ROWS:
        return None
    cropped = ink[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
    return Image.fromarray((cropped * 255).astype("uint8"))


@functools.cache
def glyph_bank(split: str) -> tuple[tuple[Glyph, ...], ...]:
    """Glyphs of a split, by digit: ``glyph_bank("test")[7]`` are the held-out sevens, as drawn and warped.

    Raises
    ------
    ConfigError
        The split is neither "train" nor "test".
    """
    if split not in _SEEDS:
        raise ConfigError(f"split: got {split!r}, expected train or test.")
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.RandomState(_SEEDS[split])
    bank: list[list[Glyph]] = [[] for _ in range(10)]
    for source, (drawing, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        if held_out(source) != (split == "test"):
            continue
        for variant in range(_VARIANTS[split]):
            mask = _mask(drawing, _warp(rng if variant else None))
            if mask is not None:
                bank[digit].append(Glyph(int(digit), source, mask))
    return tuple(tuple(glyphs) for glyphs in bank)
