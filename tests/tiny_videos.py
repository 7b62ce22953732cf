"""Small video files made with PyAV, and what is in them."""

from __future__ import annotations

import functools
from pathlib import Path

import av
import numpy as np


@functools.cache
def pictures(n: int, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Frames [n, height, width, 3] of uint8 that differ from each other: large squares of random colours."""
    squares = np.random.default_rng(seed).integers(0, 256, (n, height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    return squares.repeat(16, 1).repeat(16, 2)[:, :height, :width]


def write_video(path: Path, frames: np.ndarray, *, fps: int = 10, codec: str = "mpeg4") -> Path:
    """A file with a key picture every 12 pictures, and pictures that are stored out of order."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if codec != "gif":
            stream.bit_rate, stream.codec_context.gop_size, stream.codec_context.max_b_frames = 4_000_000, 12, 2
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())
    return path


def all_frames(path: Path) -> np.ndarray:
    """Every picture of a file, decoded one after the other."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
