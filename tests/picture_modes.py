"""One small picture in every mode that image files have, and the RGB pixels that a browser shows of each."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

HIDDEN, DARK, LIGHT = 10, 60, 200  # grey levels: of what is transparent, and of what is not
COLOURS = ((200, 60, 20), (40, 120, 220))
TRANSPOSED = 6  # an EXIF orientation: turn clockwise by 90 degrees


@dataclass(frozen=True)
class Kind:
    """A picture of [height, width], and what is to be seen of it, uint8 [height, width, 3]; None: it is refused."""

    make: Callable[[int, int], Image.Image]
    seen: Callable[[int, int], np.ndarray] | None


def quarters(height: int, width: int, values: tuple, dtype: type = np.uint8) -> np.ndarray:
    """An array whose quarters, row by row, hold four values or four tuples of channels."""
    small = np.array(values, dtype).reshape(2, 2, *np.shape(values[0]))
    return small.repeat(height // 2, 0).repeat(width // 2, 1)


def _rgb(*greys: object) -> Callable[[int, int], np.ndarray]:
    """Four grey levels or colours as they are seen."""
    colours = tuple(grey if isinstance(grey, tuple) else (grey,) * 3 for grey in greys)
    return lambda height, width: quarters(height, width, colours)


def _raw(mode: str, values: tuple, dtype: type = np.uint8, **info: object) -> Callable[[int, int], Image.Image]:
    """Pixels of a mode, as they are stored."""

    def make(height: int, width: int) -> Image.Image:
        image = Image.frombytes(mode, (width, height), quarters(height, width, values, dtype).tobytes())
        image.info.update(info)
        return image

    return make


def _filed(make: Callable[[int, int], Image.Image], form: str, **options: object) -> Callable[[int, int], Image.Image]:
    """The same read from a file, not decoded yet."""

    def read(height: int, width: int) -> Image.Image:
        content = io.BytesIO()
        make(height, width).save(content, form, **options)
        return Image.open(content)

    return read


def _palette(colours: tuple, mode: str = "RGB", **info: object) -> Callable[[int, int], Image.Image]:
    def make(height: int, width: int) -> Image.Image:
        image = Image.frombytes("P", (width, height), quarters(height, width, (0, 1, 2, 3)).tobytes())
        image.putpalette(np.array(colours, np.uint8).tobytes(), mode)
        image.info.update(info)
        return image

    return make


def _converted(mode: str, values: tuple) -> Callable[[int, int], Image.Image]:
    return lambda height, width: _raw("RGB", values)(height, width).convert(mode)


def _bits(height: int, width: int) -> Image.Image:
    return _raw("L", (0, 255, 255, 0))(height, width).convert("1")


def _premultiplied(mode: str, straight: str, values: tuple) -> Callable[[int, int], Image.Image]:
    return lambda height, width: _raw(straight, values)(height, width).convert(mode)


def _palette_alpha(height: int, width: int) -> Image.Image:
    image = _palette(PALETTE)(height, width).convert("PA")
    image.putalpha(Image.fromarray(quarters(height, width, (255, 255, 0, 255))))
    return image


def _turned(height: int, width: int) -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = TRANSPOSED
    lying = _raw("RGB", (RGB[1], RGB[3], RGB[0], RGB[2]))(width, height)
    return _filed(lambda *_: lying, "PNG", exif=exif.tobytes())(height, width)


RGB = (COLOURS[0], (DARK,) * 3, COLOURS[1], (LIGHT,) * 3)
GREYS = (DARK, LIGHT, HIDDEN, 120)
PALETTE = (COLOURS[0], (DARK,) * 3, (HIDDEN,) * 3, (LIGHT,) * 3)
RGBA = ((*COLOURS[0], 255), (DARK, DARK, DARK, 255), (HIDDEN, HIDDEN, HIDDEN, 0), (LIGHT, LIGHT, LIGHT, 255))
LA = ((DARK, 255), (LIGHT, 255), (HIDDEN, 0), (120, 255))
HALF = ((DARK, DARK, DARK, 255), (0, 0, 0, 128), (0, 0, 0, 0), (LIGHT, LIGHT, LIGHT, 255))
ON_WHITE, GREY_ON_WHITE, HALF_ON_WHITE = _rgb(*PALETTE[:2], 255, LIGHT), _rgb(DARK, LIGHT, 255, 120), _rgb(DARK, 127, 255, LIGHT)
SIXTEEN = tuple(grey * 257 for grey in GREYS)
CMYK = ((0, 0, 0, 255 - DARK), (0, 0, 0, 255 - LIGHT), (0, 0, 0, 245), (0, 0, 0, 135))
_16, _SEEN = "<u2", _rgb(*GREYS)

KINDS = {
    "RGB": Kind(_raw("RGB", RGB), _rgb(*RGB)),
    "L": Kind(_raw("L", GREYS), _SEEN),
    "1": Kind(_bits, _rgb(0, 255, 255, 0)),
    "P": Kind(_palette(PALETTE), _rgb(*PALETTE)),
    "RGBA": Kind(_raw("RGBA", RGBA), ON_WHITE),
    "RGBA, half": Kind(_raw("RGBA", HALF), HALF_ON_WHITE),
    "LA": Kind(_raw("LA", LA), GREY_ON_WHITE),
    "PA": Kind(_palette_alpha, ON_WHITE),
    "P, tRNS byte": Kind(_palette(PALETTE, transparency=2), ON_WHITE),
    "P, tRNS bytes": Kind(_palette(PALETTE, transparency=bytes((255, 255, 0, 255))), ON_WHITE),
    "P, RGBA palette": Kind(_palette(RGBA, "RGBA"), ON_WHITE),
    "P, tRNS of a GIF": Kind(_filed(_palette(PALETTE), "GIF", transparency=2), ON_WHITE),
    "RGB, tRNS": Kind(_filed(_raw("RGB", PALETTE), "PNG", transparency=(HIDDEN,) * 3), ON_WHITE),
    "L, tRNS": Kind(_filed(_raw("L", GREYS), "PNG", transparency=HIDDEN), GREY_ON_WHITE),
    "La": Kind(_premultiplied("La", "LA", LA), GREY_ON_WHITE),
    "RGBa": Kind(_premultiplied("RGBa", "RGBA", RGBA), ON_WHITE),
    "RGBX": Kind(_raw("RGBX", tuple((*colour, 0) for colour in RGB)), _rgb(*RGB)),
    "CMYK": Kind(_raw("CMYK", CMYK), _SEEN),
    "CMYK, Adobe JPEG": Kind(_filed(_raw("CMYK", CMYK), "JPEG", quality=100), _SEEN),
    "YCbCr": Kind(_converted("YCbCr", RGB), _rgb(*RGB)),
    "HSV": Kind(_converted("HSV", RGB), _rgb(*RGB)),
    "I;16": Kind(_raw("I;16", SIXTEEN, _16), _SEEN),
    "I;16B": Kind(_raw("I;16B", SIXTEEN, ">u2"), _SEEN),
    "16 bit PNG": Kind(_filed(_raw("I;16", SIXTEEN, _16), "PNG"), _SEEN),
    "16 bit TIFF": Kind(_filed(_raw("I;16", SIXTEEN, _16), "TIFF"), _SEEN),
    "16 bit, tRNS": Kind(_raw("I;16", SIXTEEN, _16, transparency=HIDDEN * 257), GREY_ON_WHITE),
    "I of 16 bits": Kind(_raw("I", SIXTEEN, np.int32), _SEEN),
    "I of 8 bits": Kind(_raw("I", GREYS, np.int32), _SEEN),
    "F of 8 bits": Kind(_raw("F", GREYS, np.float32), _SEEN),
    "EXIF orientation": Kind(_turned, _rgb(*RGB)),
    "I of 32 bits": Kind(_raw("I", (0, 1, 65536, 2), np.int32), None),
    "I below 0": Kind(_raw("I", (0, 1, -1, 2), np.int32), None),
    "F of 0 to 1": Kind(_raw("F", (0, 0.5, 1, 0.2), np.float32), None),
    "F above 255": Kind(_raw("F", (0, 300, 1, 2), np.float32), None),
    "F, not a number": Kind(_raw("F", (0, np.nan, 99, 2), np.float32), None),
    "LAB": Kind(_raw("LAB", RGB), None),
}
