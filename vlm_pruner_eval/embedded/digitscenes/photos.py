"""Background photos that scikit-image and scikit-learn install, each free to redistribute (credits: README.md)."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

SIDE_PIXELS = 336
_LONGEST_PIXELS = 700

FROM_SKIMAGE = ("coffee", "astronaut", "chelsea", "rocket", "gravel", "brick", "grass", "camera", "hubble_deep_field", "retina")
FROM_SKLEARN = ("china.jpg",)
PHOTOS = FROM_SKLEARN + FROM_SKIMAGE


def _fitted(photo: Image.Image) -> Image.Image:
    """At most 700 pixels on the long side, and never smaller than a scene."""
    longest = max(photo.size)
    if longest > _LONGEST_PIXELS:
        photo = photo.resize([int(side * _LONGEST_PIXELS / longest) for side in photo.size], Image.Resampling.BICUBIC)
    shortest = min(photo.size)
    if shortest < SIDE_PIXELS:
        scale = SIDE_PIXELS / shortest + 0.01
        photo = photo.resize([int(side * scale) + 1 for side in photo.size], Image.Resampling.BICUBIC)
    return photo


@functools.cache
def photo(name: str) -> np.ndarray:
    """One of `PHOTOS` as float32 [height, width, 3] in 0..255, both sides at least 336 pixels."""
    if name in FROM_SKLEARN:
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(name)
    else:
        import skimage.data

        pixels = getattr(skimage.data, name)()
    return np.asarray(_fitted(Image.fromarray(pixels).convert("RGB")), "float32")


def background(rng: np.random.RandomState) -> np.ndarray:
    """A random crop [336, 336, 3], mirrored half the time, half desaturated, darkened so that every colour stands out."""
    pixels = photo(PHOTOS[rng.randint(len(PHOTOS))])
    top = rng.randint(pixels.shape[0] - SIDE_PIXELS + 1)
    left = rng.randint(pixels.shape[1] - SIDE_PIXELS + 1)
    crop = pixels[top : top + SIDE_PIXELS, left : left + SIDE_PIXELS]
    if rng.rand() < 0.5:
        crop = crop[:, ::-1]
    grey = crop.mean(axis=2, keepdims=True)
    muted = grey + (crop - grey) * 0.5
    return muted * rng.uniform(0.3, 0.5) + rng.uniform(0, 25)
