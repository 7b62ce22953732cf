"""The pictures of a sweep's first documents, kept small beside its records, so that a report can show what was pruned.

A picture is named by the hash that stands with the answers. Its own size, which the rectangles of tokens refer to, and which
frames of a video are there, stand in the file's comment.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.redact import short
from vlm_pruner_eval.store.files import write_atomic

if TYPE_CHECKING:
    import numpy as np

    from vlm_pruner_eval.lmms.prompts import Prompt

FOLDER = "images"
LONGEST_PX, LONGEST_FRAME_PX, QUALITY = 768, 256, 85
_DIGEST = re.compile(r"[A-Za-z0-9_-]{1,128}")
MOST_FRAMES = 8  # of a video


@dataclass(frozen=True)
class Picture:
    """A kept image, or some frames of a video.

    Attributes
    ----------
    width, height
        In pixels, as the task gave it; the kept images may be smaller.
    n_frames
        Frames that the model saw; None of an image.
    frames
        Which of them were kept; (0,) of an image.
    images
        One for each of `frames`.
    """

    width: int
    height: int
    n_frames: int | None
    frames: tuple[int, ...]
    images: tuple[Image.Image, ...]


@dataclass(frozen=True)
class ImageStore:
    """The folder of pictures of one results directory."""

    root: Path

    def path(self, digest: str) -> Path:
        """Where a picture is, if it was kept.

        Raises
        ------
        ConfigError
            Text that is no digest: it would lead out of the folder.
        """
        if not _DIGEST.fullmatch(digest):
            raise ConfigError(f"images: got {short(digest)}, expected the digest of a picture; run the sweep again.")
        return self.root / FOLDER / f"{digest}.jpg"

    def has(self, digest: str) -> bool:
        """Tell if a picture was kept."""
        return self.path(digest).is_file()

    def save_image(self, digest: str, image: Image.Image) -> None:
        """Keep an image, unless it is there already."""
        if not self.has(digest):
            self._write(digest, _small(image.convert("RGB"), LONGEST_PX), {"width": image.width, "height": image.height})

    def save_video(self, digest: str, frames: np.ndarray) -> None:
        """Keep a few of the frames [n_frames, height, width, 3] of a video, side by side, unless they are there already."""
        if self.has(digest):
            return
        n, shown = len(frames), min(len(frames), MOST_FRAMES)
        picked = [round(i * (n - 1) / max(1, shown - 1)) for i in range(shown)]
        small = [_small(Image.fromarray(frames[i]), LONGEST_FRAME_PX) for i in picked]
        strip = Image.new("RGB", (small[0].width * len(small), small[0].height))
        for i, image in enumerate(small):
            strip.paste(image, (i * image.width, 0))
        height, width = frames.shape[1:3]
        self._write(digest, strip, {"width": width, "height": height, "n_frames": n, "frames": picked})

    def _write(self, digest: str, image: Image.Image, facts: dict[str, object]) -> None:
        """In one step: another process never reads half a file."""
        content = io.BytesIO()
        image.save(content, "JPEG", quality=QUALITY, comment=json.dumps(facts).encode())
        write_atomic(self.path(digest), content.getvalue())

    def read(self, digest: str) -> Picture:
        """A kept picture.

        Raises
        ------
        ConfigError
            It was not kept, or the file is not one of ours.
        """
        path = self.path(digest)
        try:
            with Image.open(path) as file:
                image, facts = file.convert("RGB"), json.loads(file.info["comment"])
            frames = tuple(facts.get("frames", [0]))
            width = image.width // len(frames)
            cuts = tuple(image.crop((i * width, 0, (i + 1) * width, image.height)) for i in range(len(frames)))
            return Picture(facts["width"], facts["height"], facts.get("n_frames"), frames, cuts)
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: the picture was not kept; a sweep keeps those of its first documents (`gallery: 24` in the sweep file)."
            ) from None
        except (OSError, KeyError, ValueError) as error:
            raise ConfigError(f"{path}: can't be read as a kept picture ({error}); delete it and run the sweep again.") from error


def _small(image: Image.Image, longest: int) -> Image.Image:
    scale = min(1.0, longest / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Keeper:
    """Keeps the pictures of the first `n_documents` documents of every task while a model answers them."""

    store: ImageStore
    n_documents: int

    def __call__(self, prompt: Prompt) -> None:
        """Look at a prompt on its way to the model."""
        if prompt.request.doc_id >= self.n_documents:
            return
        for digest, image in zip(prompt.image_digests, prompt.originals, strict=True):
            self.store.save_image(digest, image)
        for video in prompt.videos:
            if not self.store.has(video.digest):
                self.store.save_video(video.digest, video.frames())


def all_kept(store: ImageStore, digests: Sequence[str]) -> bool:
    """Tell if a document has pictures, and all of them were kept."""
    return bool(digests) and all(store.has(digest) for digest in digests)
