"""Tokens of a prompt laid on its images and videos by the rule of their family: arithmetic, no model.

Rectangles are in pixels of the image as the task gave it, so that they hold whatever the checkpoint's processor did
to it. They show the place that a token's patch was cut out of; what a vision tower mixes into it is not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.vlms import families
from vlm_pruner_eval.vlms.parts.boxes import Box, Medium, Shape


@dataclass(frozen=True)
class View:
    """One picture that tokens lie on: an image, the base view or the tiles of an image, or a frame of a video.

    Attributes
    ----------
    title
        Of the view; empty if an image has one only.
    medium
        Index among the images and videos of the prompt.
    frame
        Number of the sampled frame (the first, if tokens hold several); 0 of an image.
    canvas
        What there is to see: the image, and the border that the processor puts around it.
    boxes
        Index of a token among the prompt's visual tokens -> its rectangle.
    """

    title: str
    medium: int
    frame: int
    canvas: Box
    boxes: dict[int, Box]


def views(geometry: Mapping[str, Any], media: Sequence[Medium], layouts: Sequence[Shape]) -> list[View]:
    """Lay every visual token of a prompt on its image.

    Parameters
    ----------
    geometry
        ``run.json["provenance"]["model"]["geometry"]``.
    media
        Images and videos in the order of the prompt.
    layouts
        ``SampleRecord.layouts``.

    Returns
    -------
    list of View
        In the order of the tokens; newline tokens have no rectangle.

    Raises
    ------
    ConfigError
        A family without rules here, or layouts that these images can't have had.
    """
    family = families().get(geometry.get("family"))
    if family is None:
        raise ConfigError(f"geometry: got the family {geometry.get('family')!r}, expected one of {', '.join(sorted(families()))}.")
    found, left, first = [], [tuple(layout) for layout in layouts], 0
    for index, medium in enumerate(media):
        if not left:
            raise ConfigError(f"geometry: got layouts of {index} images and videos, expected {len(media)}.")
        n_layouts, pictures = family.pictures(geometry, medium, left)
        for title, frame, canvas, boxes in pictures:
            found.append(View(title, index, frame, canvas, {first + token: box for token, box in boxes.items()}))
        first += sum(layout[0] for layout in left[:n_layouts])
        left = left[n_layouts:]
    if left:
        raise ConfigError(f"geometry: {len(left)} layouts are left over after {len(media)} images and videos.")
    return found
