"""Pictures of documents: every mode is shown as a browser shows it, and a file that is not whole is a failed sample."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
from lmms_requests import fresh_model, picture, request, texts
from picture_modes import KINDS, quarters
from PIL import Image, ImageFile

from vlm_pruner_eval.lmms.pictures import as_rgb, whole_files
from vlm_pruner_eval.lmms.prompts import image_digest

HEIGHT, WIDTH = 32, 48
ROUNDING = 2  # levels: of a JPEG, and of colours that are stored as hues


@pytest.fixture(autouse=True)
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As importing lmms_eval leaves Pillow."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def photo() -> Image.Image:
    y, x = np.mgrid[0:60, 0:80]
    return Image.fromarray(np.stack([x * 3, y * 4, (x * 7 + y * 13) % 256], -1).astype(np.uint8))


# ---- modes


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.seen])
def test_a_mode_is_shown_as_a_browser_shows_it(name: str) -> None:
    shown = as_rgb(KINDS[name].make(HEIGHT, WIDTH))
    expected = KINDS[name].seen(HEIGHT, WIDTH)
    assert shown.mode == "RGB"
    assert shown.size == (WIDTH, HEIGHT)
    assert np.abs(np.asarray(shown).astype(int) - expected).max() <= ROUNDING
    assert as_rgb(shown) is shown, "what is shown is shown as it is"


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.seen])
def test_numbers_that_do_not_say_what_is_white_are_a_sentence(name: str) -> None:
    image = KINDS[name].make(HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=f"got mode {image.mode} that can't be shown .* convert it to RGB in the task"):
        as_rgb(image)


def test_a_plain_image_is_left_alone_and_keeps_its_digest() -> None:
    image = Image.fromarray(quarters(HEIGHT, WIDTH, ((1, 2, 3), (4, 5, 6), (7, 8, 9), (250, 251, 252))))
    assert as_rgb(image) is image
    assert image_digest(as_rgb(image)) == "e2144a87744c0c21"


def test_the_transparent_colour_of_a_png_with_16_bits_a_channel() -> None:
    image = photo().convert("RGB")
    image.putpixel((0, 0), (18, 0, 255))
    image.info["transparency"] = (0x1234, 0, 0xFFFF)  # as Pillow reads it, with pixels of 8 bits
    assert as_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    assert image.info["transparency"] == (0x1234, 0, 0xFFFF), "the task's own image is left alone"


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_pictures_in_a_file_the_first_is_shown(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    first, second = (Image.new("RGB", (20, 10), colour) for colour in ((200, 0, 0), (0, 0, 200)))
    content = encoded(first, form, save_all=True, append_images=[second], **options)
    assert np.array_equal(np.asarray(as_rgb(content)), np.asarray(first))


# ---- orientation
UPRIGHT = {  # (which way rows run, which way columns run, transposed) of the stored pixels, by EXIF orientation
    1: (1, 1, False),
    2: (1, -1, False),
    3: (-1, -1, False),
    4: (-1, 1, False),
    5: (1, 1, True),
    6: (1, -1, True),
    7: (-1, -1, True),
    8: (-1, 1, True),
}


@pytest.mark.parametrize("orientation", [*UPRIGHT, 0, 9])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_an_image_stands_as_its_exif_orientation_says(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photo(), form, exif=exif.tobytes())
    stored = np.asarray(Image.open(io.BytesIO(content)))
    rows, columns, is_transposed = UPRIGHT.get(orientation, UPRIGHT[1])
    expected = (stored.transpose(1, 0, 2) if is_transposed else stored)[::rows, ::columns]
    shown = as_rgb(Image.open(io.BytesIO(content)))
    assert np.array_equal(np.asarray(shown), expected)
    assert as_rgb(shown) is shown, "it is turned once"


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!!", b"garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03", b"Exif\0\0"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_say_nothing(exif: bytes) -> None:
    image = photo()
    image.info["exif"] = exif
    assert as_rgb(image) is image


# ---- whole files
FORMATS: dict[str, dict] = {
    "JPEG": {},
    "JPEG, progressive": {"progressive": True},
    "PNG": {},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "TIFF, LZW": {"compression": "tiff_lzw"},
    "WEBP": {},
    "JPEG2000": {},
    "AVIF": {},
    "PPM": {},
    "TGA": {},
    "SGI": {},
}
FORMS: dict[str, Callable[[Path], object]] = {
    "path": str,
    "bytes": Path.read_bytes,
    "PIL image": Image.open,
    "undecoded": lambda path: {"bytes": None, "path": str(path)},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
def test_a_file_cut_anywhere_is_a_sentence_or_shows_every_pixel(tmp_path: Path, name: str, form: str) -> None:
    content = encoded(photo(), name.partition(",")[0], **FORMATS[name])
    whole, path, n_refused = np.asarray(as_rgb(content)), tmp_path / "picture", 0
    cuts = [len(content) * k // 8 for k in range(1, 8)] + [len(content) - n for n in (1, 2, 3, 10, 30)] + [0, 5, 20]
    for cut in cuts:
        path.write_bytes(content[:cut])
        try:
            source = FORMS[form](path)
        except (OSError, SyntaxError, ValueError):  # Pillow itself, before anything is handed over
            n_refused += 1
            continue
        for _ in range(2):  # asked again, it is no better
            try:
                assert np.array_equal(np.asarray(as_rgb(source)), whole), f"cut at {cut} of {len(content)}"
            except ValueError as error:
                assert "can't be read whole" in str(error)
                n_refused += 1
    assert n_refused >= len(cuts) // 2
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True, "left as it was"


def test_a_task_may_set_the_switch_at_any_time() -> None:
    half = encoded(photo(), "JPEG")[:600]
    with whole_files():
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        with pytest.raises(OSError, match=r"[Tt]runcated"):
            Image.open(io.BytesIO(half)).load()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    with whole_files():
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False, "what it was set to meanwhile is not lost"


def test_the_switch_holds_in_all_threads_until_the_last_has_left() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with whole_files():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    with whole_files():
        pass
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    leave.set()
    thread.join()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_many_threads_never_take_a_half_for_a_whole() -> None:
    half = encoded(photo(), "PNG")[:300]

    def reads(_: int) -> bool:
        with pytest.raises(ValueError, match="can't be read whole"):
            as_rgb(half)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(reads, range(200)))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


# ---- what a task may hand over


@pytest.mark.parametrize(
    "form",
    {
        "path": lambda path: path,
        "file URL": lambda path: f"file://{path}",
        "data URL": lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        "bytes": lambda path: bytearray(path.read_bytes()),
        "undecoded": lambda path: {"bytes": path.read_bytes(), "path": None},
        "array": lambda path: np.asarray(Image.open(path)),
    }.items(),
    ids=lambda item: item[0],
)
def test_an_image_may_come_in_many_forms(tmp_path: Path, form: tuple[str, Callable]) -> None:
    photo().save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(as_rgb(form[1](tmp_path / "a.png"))), np.asarray(photo()))


def _text(folder: Path) -> Path:
    (folder / "a.png").write_text("404 not found " * 99)
    return folder / "a.png"


NO_PICTURES = {
    "missing": (lambda folder: folder / "none.png", "none.png.*there is no such file; download"),
    "folder": (str, "there is no such file; download"),
    "web": (lambda folder: "https://a.b/c.png", "web addresses are not read"),
    "text": (_text, "a.png.*can't be read whole .*expected a whole file in a format that Pillow reads"),
    "nothing": (lambda folder: b"", "can't be read whole"),
    "empty": (lambda folder: Image.new("RGB", (0, 5)), "got 0 x 5 pixels, expected at least one"),
    "number": (lambda folder: 7, "got a int, expected a PIL image, a path"),
    "none": (lambda folder: {"bytes": None, "path": None}, "got a dict, expected a PIL image, a path"),
    "floats": (lambda folder: np.zeros((2, 3, 3)), r"got an array \[2, 3, 3\] of float64, expected \[height, width, 3\] of uint8"),
    "URL": (lambda folder: "data:image/png,%89PNG", "expected base64"),
    "base64": (lambda folder: "data:image/png;base64,abcde", "expected base64"),
}


@pytest.mark.parametrize("case", NO_PICTURES)
def test_what_is_no_picture_is_a_sentence(tmp_path: Path, case: str) -> None:
    make, sentence = NO_PICTURES[case]
    with pytest.raises(ValueError, match=sentence):
        as_rgb(make(tmp_path))


def test_a_picture_too_large_to_be_meant_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="DecompressionBombError"):
        as_rgb(encoded(photo(), "PNG"))


# ---- from the document to the answer


def _chat(document: dict) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "url": document["image"]}, {"type": "text", "text": "Q"}]}]


def _convert(document: dict) -> list[dict]:
    return _chat({"image": document["image"].convert("RGB")})


def _documents(form: str, contents: list[bytes], folder: Path) -> Iterator[object]:
    for i, content in enumerate(contents):
        path = folder / f"{i}.png"
        path.write_bytes(content)
        yield {"path": str(path), "lazy": Image.open(path) if form == "lazy" else None}[form]


HANDED_OVER = [("path", _chat), ("lazy", _chat), ("lazy", _convert), ("column", _chat), ("column", _convert)]


@pytest.mark.parametrize(("form", "messages"), HANDED_OVER)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_half_file_is_a_failed_sample_and_costs_no_other(tmp_path: Path, form: str, messages: Callable, workers: int) -> None:
    """Also of a column of `datasets`, which decodes it when the document is looked up."""
    contents = [encoded(picture(i), "PNG") for i in range(4)]
    contents[2] = contents[2][: len(contents[2]) // 2]
    if form == "column":
        rows = [{"image": {"bytes": content, "path": None}} for content in contents]
        asked = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    else:
        asked = [{"image": image} for image in _documents(form, contents, tmp_path)]
    model = fresh_model()
    model.settings = type(model.settings)(**vars(model.settings) | {"workers": workers})
    model.task_dict = {"t": {"test": asked}}
    found = texts(model, [request("t", i, messages=messages) for i in range(4)])
    assert [bool(text) for text in found] == [True, True, False, True]
    assert "can't be read whole" in model.answers[2].error
    assert "truncated" in model.answers[2].error
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_the_model_is_shown_what_is_transparent_on_white() -> None:
    seen, model = [], fresh_model()
    model.context.on_prompt = seen.append
    try:
        model.task_dict = {"t": {"test": [{"image": KINDS["RGBA"].make(HEIGHT, WIDTH)}]}}
        model.generate_until([request("t", 0, messages=_chat)])
    finally:
        model.context.on_prompt = None
    assert np.array_equal(np.asarray(seen[0].originals[0]), KINDS["RGBA"].seen(HEIGHT, WIDTH))
    assert np.asarray(seen[0].images[0]).mean() == pytest.approx(KINDS["RGBA"].seen(HEIGHT, WIDTH).mean())
