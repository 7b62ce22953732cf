"""From the image of a document to the RGB picture that a model sees: whole, upright, on white, 8 bits a channel.

The picture is the one that lmms-eval's stock wrapper of the family shows its model; where that is wrong, it is the one that a web
browser shows. Four things differ from the stock wrappers, all on purpose:

- What is transparent is white in every family, though the stock Qwen2-VL makes it black, and the other Qwen wrappers all of it
  that is not stored as RGBA.
- 16-bit greyscale keeps its upper 8 bits; Pillow's own conversion, which the stock wrappers leave it to, turns all but the darkest
  of it white.
- An EXIF orientation is obeyed, as the images of Hugging Face's `datasets` obey it already when they are decoded. A task that turns
  an image itself must drop the tag, as Pillow's own `exif_transpose` does.
- A file that breaks off is an error. Importing lmms_eval has Pillow fill up what is missing with grey.

Left as the stock wrappers have it: ICC profiles are not applied, CMYK is converted without one, and of several pictures in a file
(GIF, APNG, WebP, TIFF, MPO) the one that the file was opened at is shown, by default the first.
"""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import ModuleType
from urllib.parse import unquote

import numpy as np
from PIL import ExifTags, Image, ImageFile

from vlm_pruner_eval.redact import short

SWITCH = "LOAD_TRUNCATED_IMAGES"
EXPECTED = "expected a whole file in a format that Pillow reads; fetch the task's data again."
NAMES_SIXTEEN_BITS = {"PNG", "PPM"}  # formats in which greyscale of mode I, Pillow's 32 bits, is of 16 bits
WHITE = (255, 255, 255, 255)
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MOST_16_BIT = 65535
MOST_8_BIT = 255


# ---- whole files only
class _Guarded(ModuleType):
    """The class of `PIL.ImageFile` while files must be whole: what its switch is set to is kept for later."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == SWITCH:
            _guard.outside = value
        else:
            super().__setattr__(name, value)


class _Guard:
    """The number of open contexts of all threads, and the switch as it is to be left behind the last of them."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.n_open = 0
        self.outside: object = False

    def enter(self) -> None:
        with self.lock:
            if not self.n_open:
                self.outside = getattr(ImageFile, SWITCH)
                setattr(ImageFile, SWITCH, False)
                ImageFile.__class__ = _Guarded
            self.n_open += 1

    def leave(self) -> None:
        with self.lock:
            self.n_open -= 1
            if not self.n_open:
                ImageFile.__class__ = ModuleType
                setattr(ImageFile, SWITCH, self.outside)


_guard = _Guard()


@contextmanager
def whole_files() -> Iterator[None]:
    """Have Pillow refuse files that break off, whatever else sets `PIL.ImageFile.LOAD_TRUNCATED_IMAGES`, in any thread.

    Contexts may overlap. Behind the last one the switch is as it was before the first, or as it was set meanwhile.
    """
    _guard.enter()
    try:
        yield
    finally:
        _guard.leave()


# ---- one picture
def as_rgb(source: object) -> Image.Image:
    """Make the RGB picture that a model is shown.

    Parameters
    ----------
    source
        A PIL image, a path, a ``file://`` or ``data:`` URL, the bytes of a file, the undecoded form of `datasets`
        (a mapping with "bytes" or "path"), or an array [height, width] or [height, width, channels].

    Returns
    -------
    An image of mode RGB; the very object that was given where there is nothing to change.

    Raises
    ------
    ValueError
        A file that is missing, no image, or not whole, or pixels that have no colour that all would agree on.
    """
    image = loaded(source)
    if not (image.width and image.height):
        raise ValueError(f"{_name(source)}: got {image.width} x {image.height} pixels, expected at least one; mend the task's data.")
    try:
        return _turned(_shown(image), _orientation(image))
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{_name(source)}: got mode {image.mode} that can't be shown ({error}); convert it to RGB in the task.") from error


def loaded(source: object) -> Image.Image:
    """Open and decode a picture, all of it.

    Raises
    ------
    ValueError
        A file that is missing, no image, or not whole.
    """
    if isinstance(source, np.ndarray):
        return _of_array(source)
    file = source if isinstance(source, Image.Image) else _file(source)
    try:
        with whole_files():
            return _decoded(file)
    except MemoryError:
        raise
    except Exception as error:  # a broken file can make a decoder raise anything
        if file is source:
            file.close()  # some decoders take what there is for all of it when they are asked again
        raise ValueError(f"{_name(source)}: can't be read whole ({type(error).__name__}: {error}); {EXPECTED}") from error


def _decoded(file: Image.Image | Path | io.BytesIO) -> Image.Image:
    if isinstance(file, Image.Image):
        file.load()  # nothing, of a picture that was read before
        return file
    with Image.open(file) as image:
        image.load()
        return image


def _of_array(array: np.ndarray) -> Image.Image:
    try:
        return Image.fromarray(array)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"image: got an array {list(array.shape)} of {array.dtype}, expected [height, width, 3] of uint8; convert it in the task."
        ) from error


def _file(source: object) -> Path | io.BytesIO:
    """Return what `Image.open` takes for a path, an address, bytes, or a mapping with one of them."""
    if isinstance(source, Mapping) and (source.get("bytes") or source.get("path")):
        source = source.get("bytes") or source["path"]
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if not isinstance(source, (str, Path)):
        raise ValueError(f"image: got a {type(source).__name__}, expected a PIL image, a path, the bytes of a file, or an array.")
    text = str(source)
    if text.startswith("data:"):
        return _of_data_url(text)
    path = Path(unquote(text.removeprefix("file://")) if text.startswith("file://") else text)
    if not path.is_file():
        raise ValueError(f"{_name(source)}: there is no such file; download the data of the task first (web addresses are not read).")
    return path


def _of_data_url(text: str) -> io.BytesIO:
    """Return the bytes of a ``data:`` URL in base64."""
    _, found, content = text.partition("base64,")
    try:
        if found:
            return io.BytesIO(base64.b64decode(content))
    except ValueError as error:
        raise ValueError(f"{_name(text)}: can't be read ({error}); expected base64; fetch the task's data again.") from error
    raise ValueError(f"{_name(text)}: got a data: URL of another encoding, expected base64; convert it in the task.")


def _name(source: object) -> str:
    """Name a picture in messages."""
    if isinstance(source, (str, Path)):
        return f"image {short(str(source))}"
    file = getattr(source, "filename", "")
    return f"image {short(str(file))}" if file else "image"


def _orientation(image: Image.Image) -> int:
    """Read the EXIF orientation, 1 where there is none; EXIF data that can't be read says nothing, as in a browser."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, OSError, LookupError, struct.error):
        return 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """Turn a picture as its EXIF orientation says, and forget that it had one."""
    if orientation not in TURNS:
        return image
    turned = image.transpose(TURNS[orientation])
    turned.info = {}
    return turned


# ---- colours
def _shown(image: Image.Image) -> Image.Image:
    """Convert a decoded picture to RGB."""
    if image.mode == "I" or image.mode.startswith("I;"):
        return _of_whole_numbers(image)
    if image.mode == "F":
        _check_floats(image)
    if image.mode == "LAB":
        raise ValueError("its colours need a colour-managed conversion")
    if not _has_alpha(image):
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "La":  # Pillow has no way from here to RGBA
        image = image.convert("LA")
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and max(colour) > MOST_8_BIT:  # of a PNG with 16 bits a channel, of which Pillow keeps 8
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")


def _has_alpha(image: Image.Image) -> bool:
    """Report if some of a picture may be transparent: by a channel, by its palette, or by a colour that stands for it."""
    in_palette = image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")
    return image.getbands()[-1] in "Aa" or in_palette or image.info.get("transparency") is not None


def _of_whole_numbers(image: Image.Image) -> Image.Image:
    """Show greyscale of more than 8 bits: the upper 8 of 16; of mode I also what lies within 8 bits, as it is."""
    values = np.asarray(image)
    least, most = int(values.min()), int(values.max())
    if least < 0 or most > MOST_16_BIT:
        raise ValueError(f"got values from {least} to {most}, expected 0 to {MOST_8_BIT} or {MOST_16_BIT}")
    is_8_bit = image.mode == "I" and image.format not in NAMES_SIXTEEN_BITS and most <= MOST_8_BIT
    grey = (values if is_8_bit else values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[values == transparent] = MOST_8_BIT
    return Image.fromarray(grey).convert("RGB")


def _check_floats(image: Image.Image) -> None:
    """Refuse numbers that do not say what is white: those of an image from 0 to 1 would be shown as black."""
    values = np.asarray(image)
    least, most = float(values.min()), float(values.max())
    if not (least >= 0 and most <= MOST_8_BIT) or 0 < most <= 1:
        raise ValueError(f"got values from {least:g} to {most:g}, expected 0 to {MOST_8_BIT}")
