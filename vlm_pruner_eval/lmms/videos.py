"""From the video of a document to frames: files through PyAV, folders and lists of frames as they are.

Frames are picked uniformly, the first and the last among them, as LLaVA-Video (arXiv 2410.02713) samples long videos. Which
ones is known as soon as a video is opened; pixels are decoded when its batch is due, so that a batch is all that is in memory.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from loguru import logger

from vlm_pruner_eval.lmms.images import as_rgb

LOOSE_FRAMES_FPS = 3.0  # frames without a file state no times; MVBench's folders, which lmms-eval has, hold 3 a second
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
TAIL_S = 1.0  # a file cut without regard to its pictures may end with some that nothing can decode


@dataclass(frozen=True)
class Video:
    """Frames picked from one video.

    Attributes
    ----------
    name
        For messages.
    n_total
        Frames that the video has.
    fps
        Frames per second of the video, before any was picked.
    indices
        Which frames were picked, ascending.
    """

    name: str
    n_total: int
    fps: float
    indices: tuple[int, ...]
    _read: Callable[[Sequence[int]], Sequence[np.ndarray]]
    _seen: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # shared by copies: decoding is dear

    @property
    def n_frames(self) -> int:
        """Frames that were picked."""
        return len(self.indices)

    @property
    def sampled_fps(self) -> float:
        """Picked frames per second, as transformers and Qwen's own tools define it."""
        return self.n_frames / self.n_total * self.fps

    def frames(self) -> np.ndarray:
        """Decode the picked frames.

        Returns
        -------
        Array [n_frames, height, width, 3] of uint8, RGB.

        Raises
        ------
        ValueError
            A file that breaks off or can't be decoded, or frames of different sizes.
        """
        frames = self._read(self.indices)
        sizes = sorted({frame.shape for frame in frames})
        if len(sizes) > 1:
            raise ValueError(f"{self.name}: got frames of different shapes ({sizes[0]} and {sizes[-1]}), expected one size for all.")
        stacked = np.stack(frames)
        digest = hashlib.sha256(f"{stacked.shape} ".encode())
        digest.update(stacked)
        self._seen["digest"] = digest.hexdigest()[:16]
        return stacked

    @property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the picked frames, as they were read last."""
        if not self._seen:
            self.frames()
        return self._seen["digest"]

    def metadata(self) -> dict[str, object]:
        """What transformers' processors want to know of a video whose frames are already picked."""
        return {
            "total_num_frames": self.n_total,
            "fps": self.fps,
            "duration": self.n_total / self.fps,
            "frames_indices": list(self.indices),
        }


def open_video(source: object, max_frames: int, start_s: float | None = None, end_s: float | None = None) -> Video:
    """Open a video and pick at most `max_frames` frames of it.

    Parameters
    ----------
    source
        A file, a folder of images (in the order of the numbers in their names), a list of images, or an array
        [n, height, width, 3] of uint8.
    start_s, end_s
        The part of the video that the question is about, in seconds; None: from its start, to its end.

    Raises
    ------
    ValueError
        No such file, nothing that shows a picture, or a part that lies outside.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.exists():
            raise ValueError(f"video {source}: there is no such file or folder; download the data of the task first (URLs are not read).")
        name, n_total, fps, read = _of_folder(path) if path.is_dir() else _of_file(path)
    else:
        name, n_total, fps, read = _of_frames(source)
    if not n_total:
        raise ValueError(f"{name}: got no frame, expected one or more.")
    first = 0 if start_s is None else max(0, round(start_s * fps))
    last = n_total - 1 if end_s is None else min(n_total - 1, round(end_s * fps))
    if first > last:
        raise ValueError(f"{name}: got the part from {start_s} s to {end_s} s, expected one within its {n_total / fps:.1f} s.")
    return Video(name, n_total, fps, uniform(first, last, max_frames), read)


def uniform(first: int, last: int, max_frames: int) -> tuple[int, ...]:
    """At most `max_frames` indices spread evenly from `first` to `last`, both among them; a short video gives each frame once."""
    return tuple(np.linspace(first, last, min(max_frames, last - first + 1), dtype=int).tolist())


# ---- frames without a file
_Source = tuple[str, int, float, Callable[[Sequence[int]], Sequence[np.ndarray]]]


def _of_folder(path: Path) -> _Source:
    images = sorted((file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES), key=_by_number)
    return _of_images(f"video {path}", images)


def _by_number(file: Path) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"\d+", file.stem)], file.name


def _of_frames(source: object) -> _Source:
    if not isinstance(source, (list, tuple, np.ndarray)):
        raise ValueError(f"video: got a {type(source).__name__}, expected a file, a folder of images, or a list or array of frames.")
    return _of_images(f"video of {len(source)} frame(s)", source)


def _of_images(name: str, images: Sequence) -> _Source:
    return name, len(images), LOOSE_FRAMES_FPS, lambda indices: [_pixels(name, images[i]) for i in indices]


def _pixels(name: str, image: object) -> np.ndarray:
    try:
        return np.asarray(as_rgb(image))
    except ValueError as error:
        raise ValueError(f"{name}: a frame can't be used ({error})") from error


# ---- files
@contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file's first video stream; what ffmpeg has to say against the file becomes a sentence."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"video {path}: the file has no video stream, expected pictures that move.")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        raise ValueError(f"video {path}: can't be decoded ({error}); expected a whole file in a format that ffmpeg reads.") from error


def _of_file(path: Path) -> _Source:
    """Read the times of all pictures, which takes no decoding, so that the picked ones can be jumped to."""
    with _opened(path) as (container, stream):
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size and not packet.is_discard]
        rate = stream.average_rate or stream.guessed_rate
        can_jump = stream.codec_context.name != "gif"  # a picture of a GIF may be drawn over all earlier ones
        tail = round(TAIL_S / stream.time_base)
    if packets and not rate:
        raise ValueError(f"video {path}: the file states no frame rate, so the times of its frames are not known; convert it to mp4.")
    is_timed = all(pts is not None for pts, _ in packets)
    times = sorted(pts for pts, _ in packets) if is_timed else list(range(len(packets)))
    keys = sorted(pts for pts, is_key in packets if is_key) if is_timed and can_jump else []

    def read(indices: Sequence[int]) -> list[np.ndarray]:
        return _decode(path, [times[i] for i in indices], keys, is_timed, tail if is_timed else 0)

    return f"video {path}", len(times), float(rate or 0), read


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
        yield (frame.pts if is_timed else count), functools.cache(functools.partial(frame.to_ndarray, format="rgb24"))
