"""From the video of a document to frames: files through PyAV, folders and lists of frames as they are.

Frames are picked uniformly, the first and the last among them, as LLaVA-Video (arXiv 2410.02713) samples long videos. Which
ones is known as soon as a video is opened; pixels are decoded when its batch is due, so that a batch is all that is in memory.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlm_pruner_eval.lmms.pictures import as_rgb
from vlm_pruner_eval.lmms.video_files import Source, of_file

LOOSE_FRAMES_FPS = 3.0  # frames without a file state no times; MVBench's folders, which lmms-eval has, hold 3 a second
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


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
        path = Path(str(source).removeprefix("file://"))
        if not path.exists():
            raise ValueError(f"video {source}: there is no such file or folder; download the data of the task first (URLs are not read).")
        name, n_total, fps, read = _of_folder(path) if path.is_dir() else of_file(path)
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


def _of_folder(path: Path) -> Source:
    files = (file for file in path.iterdir() if not file.name.startswith("."))  # macOS leaves a "._1.jpg" beside every 1.jpg
    images = sorted((file for file in files if file.suffix.lower() in IMAGE_SUFFIXES), key=_by_number)
    return _of_images(f"video {path}", images)


def _by_number(file: Path) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"\d+", file.stem)], file.name


def _of_frames(source: object) -> Source:
    if not isinstance(source, (list, tuple, np.ndarray)):
        raise ValueError(f"video: got a {type(source).__name__}, expected a file, a folder of images, or a list or array of frames.")
    return _of_images(f"video of {len(source)} frame(s)", source)


def _of_images(name: str, images: Sequence) -> Source:
    return name, len(images), LOOSE_FRAMES_FPS, lambda indices: [_pixels(name, images[i]) for i in indices]


def _pixels(name: str, image: object) -> np.ndarray:
    try:
        return np.asarray(as_rgb(image))
    except ValueError as error:
        raise ValueError(f"{name}: a frame can't be used ({error})") from error
