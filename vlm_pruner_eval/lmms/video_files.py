"""Frames of video files through PyAV, as a browser shows them: whole, upright, in the file's own colours, on white.

What lmms-eval's stock wrappers read videos with (decord, which turns pictures and converts colours as ffmpeg does) shows the same,
but for three things: a file that breaks off is an error here, a mirrored picture is mirrored rather than turned, and what is
transparent is white. As there, pixels that are not square are left as they are coded, frames are counted rather than timed where
their rate varies, and of several streams the one that ffmpeg calls the best is read.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from loguru import logger
from PIL import Image

from vlm_pruner_eval.lmms.containers import promised_bytes
from vlm_pruner_eval.lmms.pictures import as_rgb

TAIL_S = 1.0  # a file cut without regard to its pictures may end with some that nothing can decode
BT_709, BT_601 = 1, 5  # colour spaces, by ffmpeg's numbers
BT_601_BY_DEFAULT = {0, 2, 5, 6}  # what swscale converts so by itself: RGB, unspecified, and BT.601 by two names
FULL_RANGE = 2
MATRIX = "DISPLAYMATRIX"

Source = tuple[str, int, float, Callable[[Sequence[int]], Sequence[np.ndarray]]]  # name, number of frames, their rate, reads some


@contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file's video stream; what ffmpeg has to say against the file becomes a sentence."""
    try:
        with av.open(str(path)) as container:
            yield container, _stream(path, container)
    except av.FFmpegError as error:
        raise ValueError(f"video {path}: can't be decoded ({error}); expected a whole file in a format that ffmpeg reads.") from error


def _stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    """The stream that ffmpeg's tools would show; a cover beside the sound is none."""
    moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not moving:
        _check_whole(path, has_all=False)  # what is cut inside its header has none either
        raise ValueError(f"video {path}: the file has no video stream, expected pictures that move.")
    best = container.streams.best("video")
    return best if best in moving else moving[0]


def of_file(path: Path) -> Source:
    """Read the times of all pictures, which takes no decoding, so that the picked ones can be jumped to.

    Raises
    ------
    ValueError
        A file that can't be read, shows no pictures, breaks off, or states no frame rate.
    """
    with _opened(path) as (container, stream):
        filled = (packet for packet in container.demux(stream) if packet.size)
        found = [(packet.pts, packet.is_keyframe, packet.is_discard, packet.is_corrupt) for packet in filled]
        # ffmpeg counts the pictures of a GIF itself
        n_stated = 0 if container.format.name == "gif" else stream.frames
        rate = stream.average_rate or stream.guessed_rate
        can_jump = stream.codec_context.name != "gif"  # a picture of a GIF may be drawn over all earlier ones
        tail = round(TAIL_S / stream.time_base)
    _check_whole(path, has_all=0 < n_stated <= len(found) and not any(is_corrupt for *_, is_corrupt in found))
    packets = [(pts, is_key) for pts, is_key, is_discard, _ in found if not is_discard]
    if packets and not rate:
        raise ValueError(f"video {path}: the file states no frame rate, so the times of its frames are not known; convert it to mp4.")
    is_timed = all(pts is not None for pts, _ in packets)
    times = sorted(pts for pts, _ in packets) if is_timed else list(range(len(packets)))
    keys = sorted(pts for pts, is_key in packets if is_key) if is_timed and can_jump else []

    def read(indices: Sequence[int]) -> list[np.ndarray]:
        return _decode(path, [times[i] for i in indices], keys, is_timed, tail if is_timed else 0)

    return f"video {path}", len(times), float(rate or 0), read


def _check_whole(path: Path, *, has_all: bool) -> None:
    """Refuse a file that is shorter than its header says, unless it holds all pictures that the header speaks of."""
    size, promised = path.stat().st_size, promised_bytes(path)
    if promised > size and not has_all:
        raise ValueError(f"video {path}: breaks off, got {size} bytes of {promised}; expected a whole file; fetch the task's data again.")


def _decode(path: Path, wanted: Sequence[int], keys: Sequence[int], is_timed: bool, tail: int) -> list[np.ndarray]:
    """The pictures shown at the ascending times `wanted`, jumping to the last key picture before each where that saves decoding."""
    found: list[np.ndarray] = []
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        shown, at, frame = _shown(container, stream, is_timed), None, None
        for time in wanted:
            nearest = bisect.bisect_right(keys, time) - 1
            jumps = nearest > 0 and (at is None or at < keys[nearest])
            if jumps:
                container.seek(keys[nearest], stream=stream)
                shown, at = _shown(container, stream, is_timed), None
            while at is None or at < time:
                following = next(shown, None)
                if following is None:
                    break
                if jumps and at is None and following[0] > time:  # a format whose index is not exact
                    return _decode(path, wanted, [], is_timed, tail)
                at, frame = following
            if frame is None or at is None or time - at > tail:
                raise ValueError(
                    f"video {path}: breaks off after {len(found)} of the {len(wanted)} frames to be read; expected a whole file."
                )
            if at < time:
                logger.warning("video {}: its last pictures can't be decoded, so the last one that can be stands for them.", path)
            found.append(frame())
    return found


def _shown(container: av.container.InputContainer, stream: av.VideoStream, is_timed: bool) -> Iterator[tuple[int, Callable]]:
    """(time, pixels) of the pictures from here on; files without times count their pictures."""
    for count, frame in enumerate(container.decode(stream)):
        yield (frame.pts if is_timed else count), functools.cache(functools.partial(_pixels, frame))


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    """Convert a decoded frame to what is seen of it: [height, width, 3] of uint8, RGB."""
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    pixels = frame.to_ndarray(format="rgba" if has_alpha else "rgb24", **_colours(frame))
    if has_alpha:
        pixels = np.asarray(as_rgb(Image.fromarray(pixels)))
    return _upright(pixels, frame)


def _colours(frame: av.VideoFrame) -> dict[str, int]:
    """Tell PyAV of the colours of a frame: by itself it takes all for BT.601, and most for the limited range.

    It listens only if the two spaces differ; the second one is of no account, as what is asked for is RGB.
    """
    is_default = frame.colorspace in BT_601_BY_DEFAULT
    if is_default and frame.color_range != FULL_RANGE:
        return {}
    space = BT_601 if is_default else frame.colorspace
    other = BT_709 if space == BT_601 else BT_601
    return {"src_colorspace": space, "dst_colorspace": other, "src_color_range": frame.color_range, "dst_color_range": FULL_RANGE}


def _upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turn or mirror a picture as the file's display matrix says; matrices of angles that are no quarter turns are left alone."""
    matrix = next((np.frombuffer(data, np.int32) for data in frame.side_data if data.type.name == MATRIX), None)
    if matrix is None:
        return pixels
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))  # a pixel at (x, y) goes to (a x + c y, b x + d y)
    if a == d == 0 and b and c:
        pixels = pixels.transpose(1, 0, 2)
        right = c
        down = b
    elif b == c == 0:
        right = a
        down = d
    else:
        return pixels
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1])
