"""Video files as cameras, editors and broken downloads leave them: the frames are a browser's, or there is a sentence."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from picture_modes import quarters
from PIL import Image
from tiny_videos import all_frames, pictures, write_video

from vlm_pruner_eval.lmms.containers import promised_bytes
from vlm_pruner_eval.lmms.videos import open_video

HEIGHT, WIDTH, N = 48, 64, 12
COLOURS = ((200, 60, 20), (40, 120, 220), (10, 10, 10), (200, 200, 200))
CLEAR = ((*COLOURS[0], 255), (*COLOURS[1], 255), (*COLOURS[2], 0), (*COLOURS[3], 255))  # the third quarter is transparent
ON_WHITE = (*COLOURS[:2], (255, 255, 255), COLOURS[3])
ROUNDING = 4  # levels, of YUV


def frames_of(source: object, at_most: int = 4) -> np.ndarray:
    return open_video(source, at_most).frames()


def seen(frame: np.ndarray) -> list[tuple[int, ...]]:
    """The colours in the middle of a frame's quarters."""
    height, width = frame.shape[:2]
    return [tuple(frame[y, x].tolist()) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]


def box(kind: bytes, content: bytes) -> bytes:
    """A box of an MP4 file."""
    return struct.pack(">I", 8 + len(content)) + kind + content


# ---- turned and mirrored
ONE = 1 << 16
MATRICES: dict[str, tuple[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]]] = {
    "as it is": ((ONE, 0, 0, ONE), lambda frame: frame),
    "90": ((0, ONE, -ONE, 0), lambda frame: np.rot90(frame, -1)),
    "180": ((-ONE, 0, 0, -ONE), lambda frame: frame[::-1, ::-1]),
    "270": ((0, -ONE, ONE, 0), np.rot90),
    "left to right": ((-ONE, 0, 0, ONE), lambda frame: frame[:, ::-1]),
    "top to bottom": ((ONE, 0, 0, -ONE), lambda frame: frame[::-1]),
    "transposed": ((0, ONE, ONE, 0), lambda frame: frame.transpose(1, 0, 2)),
    "transversed": ((0, -ONE, -ONE, 0), lambda frame: frame.transpose(1, 0, 2)[::-1, ::-1]),
    "nothing": ((0, 0, 0, 0), lambda frame: frame),
    "45": ((46341, 46341, -46341, 46341), lambda frame: frame),  # no browser turns by less than a quarter
}
STOCK_TOO = ("as it is", "90", "180", "270")


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write a display matrix into the header of the only track of an MP4 file."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # behind version, times and ids, reserved, layer to volume
    a, b, c, d = matrix
    struct.pack_into(">9i", content, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", MATRICES)
def test_a_video_is_shown_as_its_display_matrix_says(tmp_path: Path, name: str) -> None:
    matrix, turn = MATRICES[name]
    path = write_video(tmp_path / "phone.mp4", pictures(N))
    expected = np.stack([turn(frame) for frame in all_frames(path)])
    assert np.array_equal(frames_of(with_matrix(path, matrix), N), expected)


@pytest.mark.parametrize("name", STOCK_TOO)
def test_the_stock_reader_turns_a_video_likewise(tmp_path: Path, name: str) -> None:
    """It reports a turned frame with four channels of the other shape, so pixels are compared in the order of the memory."""
    decord = pytest.importorskip("decord", reason="lmms-eval's stock wrappers read videos with it")
    path = with_matrix(write_video(tmp_path / "phone.mp4", pictures(2)), MATRICES[name][0])
    stock, ours = decord.VideoReader(str(path))[0].asnumpy(), frames_of(path)[0]
    assert stock.shape[:2] == ours.shape[:2]
    if stock.shape[2] == 3:
        assert np.abs(stock.astype(int) - ours).max() <= ROUNDING


# ---- colours


def write_colours(path: Path, form: str, space: int | None = None, span: int | None = None) -> Path:
    """Four quarters of `COLOURS`, one transparent, losslessly in a pixel format, tagged with a colour space and a range."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, form
        if space is not None:
            stream.codec_context.colorspace, stream.codec_context.color_range = space, span
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(quarters(HEIGHT, WIDTH, CLEAR), format="rgba")
            container.mux(stream.encode(frame.reformat(format=form, dst_colorspace=space, dst_color_range=span)))
        container.mux(stream.encode())
    return path


def write_palette(path: Path) -> Path:
    """The same in a palette, which PNG pictures in a QuickTime file have."""
    image = Image.frombytes("P", (WIDTH, HEIGHT), quarters(HEIGHT, WIDTH, (0, 1, 2, 3)).tobytes())
    image.putpalette(np.array(COLOURS, np.uint8).tobytes())
    content = io.BytesIO()
    image.save(content, "PNG", transparency=2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "rgb24"
        for i in range(3):
            packet = av.Packet(content.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 10)
            container.mux(packet)
    return path


GREYS = tuple((round(0.299 * red + 0.587 * green + 0.114 * blue),) * 3 for red, green, blue in COLOURS)
FORMATS = {
    "yuv420p": (COLOURS, {}),
    "yuv444p": (COLOURS, {}),
    "yuv422p10le": (COLOURS, {}),
    "gbrp10le": (COLOURS, {}),
    "bgr0": (COLOURS, {}),
    "gray": (GREYS, {}),
    "gray16le": (GREYS, {}),
    "bgra": (ON_WHITE, {}),
    "yuva420p": (ON_WHITE, {}),
    "yuva444p10le": (ON_WHITE, {}),
    "yuv420p, BT.709": (COLOURS, {"space": 1, "span": 1}),
    "yuv444p, BT.709, full range": (COLOURS, {"space": 1, "span": 2}),
    "yuv420p, BT.601": (COLOURS, {"space": 5, "span": 1}),
    "yuv444p, BT.601, full range": (COLOURS, {"space": 5, "span": 2}),
    "yuv420p, SMPTE 240": (COLOURS, {"space": 7, "span": 1}),
    "yuv422p10le, BT.2020": (COLOURS, {"space": 9, "span": 1}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_colours_are_those_that_the_file_says(tmp_path: Path, name: str) -> None:
    """HD video is BT.709 nearly always, of which 20 levels are lost where it is taken for BT.601."""
    expected, tags = FORMATS[name]
    path = write_colours(tmp_path / "a.mkv", name.partition(",")[0], **tags)
    frames = frames_of(path)
    assert frames.shape == (3, HEIGHT, WIDTH, 3)
    assert np.abs(np.array(seen(frames[0])).astype(int) - expected).max() <= ROUNDING
    if expected is COLOURS:
        decord = pytest.importorskip("decord", reason="lmms-eval's stock wrappers read videos with it")
        assert np.abs(decord.VideoReader(str(path))[0].asnumpy().astype(int) - frames[0]).max() <= ROUNDING


def test_a_transparent_palette_is_on_white(tmp_path: Path) -> None:
    assert seen(frames_of(write_palette(tmp_path / "a.mov"))[0]) == list(ON_WHITE)


# ---- which stream


def with_cover(path: Path) -> Path:
    """Add a green square of 32 x 32 as the cover of an MP4 file whose header stands last."""
    cover, content = io.BytesIO(), path.read_bytes()
    Image.new("RGB", (32, 32), (0, 255, 0)).save(cover, "PNG")
    at = content.rindex(b"moov") - 4
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    items = box(b"ilst", box(b"covr", box(b"data", struct.pack(">II", 14, 0) + cover.getvalue())))
    meta = box(b"udta", box(b"meta", bytes(4) + handler + items))
    path.write_bytes(content[:at] + box(b"moov", content[at + 8 :] + meta))
    return path


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        stream.layout = "mono"
        for i in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_two(path: Path, sizes: tuple[tuple[int, int], ...] = ((32, 32), (HEIGHT, WIDTH))) -> Path:
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=10) for _ in sizes]
        for stream, (height, width) in zip(streams, sizes, strict=True):
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for _ in range(N):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(np.full((stream.height, stream.width, 3), 200, np.uint8), format="rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p")))
        for stream in streams:
            container.mux(stream.encode())
    return path


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", pictures(N))
    expected = frames_of(path)
    with av.open(str(with_cover(path))) as container:
        assert len(container.streams.video) == 2
    assert np.array_equal(frames_of(path), expected)
    with pytest.raises(ValueError, match="has no video stream"):
        open_video(with_cover(write_sound(tmp_path / "song.mp4")), 4)


def test_a_cover_that_comes_first_is_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = with_cover(write_video(tmp_path / "a.mp4", pictures(N)))
    expected = frames_of(path)
    monkeypatch.setattr("vlm_pruner_eval.lmms.video_files.av.open", lambda name: _CoverFirst(av.container.open(name)))
    assert np.array_equal(frames_of(path), expected)


class _CoverFirst:
    """An opened file whose streams of pictures are listed, and recommended, the other way round."""

    def __init__(self, container: av.container.InputContainer):
        self._container = container
        self.video = container.streams.video[::-1]

    def __enter__(self) -> _CoverFirst:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self._container, name)

    @property
    def streams(self) -> _CoverFirst:
        return self

    def best(self, kind: str) -> av.VideoStream:
        return self.video[0]


@pytest.mark.parametrize("name", ["two.mkv", "two.mp4"])
def test_of_two_videos_the_default_one_is_read(tmp_path: Path, name: str) -> None:
    assert frames_of(write_two(tmp_path / name)).shape == (4, 32, 32, 3)


# ---- whole files


def write_options(path: Path, options: dict[str, str]) -> Path:
    """An MP4 file as `options` of its muxer ask."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.gop_size = 4
        for pixels in pictures(N):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    return path


WHOLE: dict[str, Callable[[Path], Path]] = {
    "mp4": lambda folder: write_video(folder / "a.mp4", pictures(N)),
    "mp4 to be streamed": lambda folder: write_options(folder / "a.mp4", {"movflags": "faststart"}),
    "mov": lambda folder: write_video(folder / "a.mov", pictures(N)),
    "mkv": lambda folder: write_video(folder / "a.mkv", pictures(N)),
    "webm": lambda folder: write_video(folder / "a.webm", pictures(N), codec="libvpx"),
    "avi": lambda folder: write_video(folder / "a.avi", pictures(N)),
    "gif": lambda folder: write_video(folder / "a.gif", pictures(N), codec="gif"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_video_cut_anywhere_is_a_sentence_or_shows_every_frame(tmp_path: Path, name: str) -> None:
    """ffmpeg, and the stock wrappers with it, take the first half of most formats for a shorter video."""
    path = WHOLE[name](tmp_path)
    content, expected, n_refused = path.read_bytes(), frames_of(path, N), 0
    cuts = [len(content) * k // 8 for k in range(8)] + [len(content) - n for n in (1, 2, 10, 200)]
    for cut in cuts:
        path.write_bytes(content[:cut])
        try:
            assert np.array_equal(frames_of(path, N), expected), f"cut at {cut} of {len(content)}"
        except ValueError as error:
            assert "expected a whole file" in str(error)
            n_refused += 1
    assert n_refused >= 8


def test_a_video_in_fragments_breaks_off_where_one_does(tmp_path: Path) -> None:
    path = write_options(tmp_path / "a.mp4", {"movflags": "frag_keyframe+empty_moov"})
    assert len(frames_of(path, N)) == N
    content = path.read_bytes()
    last = content.rindex(b"mdat")
    path.write_bytes(content[: last + 20])
    with pytest.raises(ValueError, match=r"breaks off, got \d+ bytes of \d+; expected a whole file"):
        open_video(path, 4)


def _longer_avi(content: bytes) -> bytes:
    return content[:4] + struct.pack("<I", len(content) + 1000) + content[8:]


def _endless_mkv(content: bytes) -> bytes:
    at = content.index(b"\x18\x53\x80\x67") + 4
    return content[:at] + b"\x01" + b"\xff" * 7 + content[at + 8 :]


SLOPPY: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "mp4 with more behind it": ("mp4", lambda content: content + b"\0\0\1\0junk" + b"more" * 9),
    "mp4 in two boxes more": ("mp4", lambda content: content + box(b"free", b"12345") + box(b"wxyz", b"12")),
    "avi that says it is longer": ("avi", _longer_avi),
    "mkv that does not say how long it is": ("mkv", _endless_mkv),
    "gif with padding": ("gif", lambda content: content + bytes(5)),
}


@pytest.mark.parametrize("name", SLOPPY)
def test_a_file_that_holds_every_frame_is_read_whatever_its_header_says(tmp_path: Path, name: str) -> None:
    form, change = SLOPPY[name]
    path = WHOLE[form](tmp_path)
    expected = frames_of(path, N)
    path.write_bytes(change(path.read_bytes()))
    assert np.array_equal(frames_of(path, N), expected)


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\x1a\x45\xdf\xa3", b"\x1a\x45\xdf\xa3\0", b"RIFF", b"GIF89a", b"\0\0\0\x20ftyp", b"\0\0\0\1mdat"]
)
def test_headers_without_anything_behind_them_are_no_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    assert promised_bytes(tmp_path / "a") >= 0


# ---- times and shapes


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "mpeg4"), ("a.mkv", "mpeg4"), ("a.avi", "mpeg4"), ("a.gif", "gif"), ("a.ts", "mpeg2video")]
)
def test_a_video_of_one_frame(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, pictures(1), codec=codec)
    video = open_video(path, 8)
    assert (video.n_total, video.indices) == (1, (0,))
    assert np.array_equal(video.frames(), all_frames(path))


def test_frames_are_counted_where_their_rate_varies(tmp_path: Path) -> None:
    path, times = tmp_path / "a.mp4", (0, 1, 2, 10, 30, 31, 32, 60)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), 30 * i, np.uint8), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert [round(frame.mean() / 30) for frame in frames_of(path, 3)] == [0, 3, 7]


@pytest.mark.parametrize(("name", "form", "codec"), [("a.m4v", "m4v", "mpeg4"), ("a.m2v", "mpeg2video", "mpeg2video")])
def test_streams_without_times(tmp_path: Path, name: str, form: str, codec: str) -> None:
    path = tmp_path / name
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for i in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), 30 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    assert [round(frame.mean() / 30) for frame in frames_of(path, 3)] == [0, 3, 7]


def test_pixels_that_are_not_square_are_left_as_they_are_coded(tmp_path: Path) -> None:
    """As decord and all other readers of frames leave them; a browser would stretch them."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for pixels in pictures(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        assert container.streams.video[0].sample_aspect_ratio == 2
    assert frames_of(path).shape == (3, HEIGHT, WIDTH, 3)


# ---- loose frames


def test_loose_frames_are_shown_as_images_are(tmp_path: Path) -> None:
    clear = Image.frombytes("RGBA", (WIDTH, HEIGHT), quarters(HEIGHT, WIDTH, CLEAR).tobytes())
    lying, exif = Image.fromarray(np.rot90(quarters(HEIGHT, WIDTH, COLOURS)).copy()), Image.Exif()
    exif[0x0112] = 6
    clear.save(tmp_path / "1.png")
    lying.save(tmp_path / "2.PNG", exif=exif.tobytes())
    Image.fromarray(quarters(HEIGHT, WIDTH, (60, 200, 10, 120)).astype(np.uint16) * 257).save(tmp_path / "3.tiff")
    (tmp_path / "._1.png").write_bytes(b"what macOS keeps beside a file")
    expected = [list(ON_WHITE), list(COLOURS), [(grey,) * 3 for grey in (60, 200, 10, 120)]]
    assert [seen(frame) for frame in frames_of(tmp_path)] == expected
    assert [seen(frame) for frame in frames_of([clear, clear.convert("RGB")])] == [list(ON_WHITE), list(COLOURS)]
    with Image.open(tmp_path / "1.png") as lazy:
        assert seen(frames_of([lazy])[0]) == list(ON_WHITE)


def test_a_loose_frame_that_breaks_off_is_a_sentence(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(pictures(1)[0]).save(tmp_path / f"{i}.jpg")
    content = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(ValueError, match=r"a frame can't be used \(image .*1\.jpg.*can't be read whole"):
        frames_of(tmp_path)
