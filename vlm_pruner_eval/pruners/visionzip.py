"""VisionZip: keep the patches that the CLS token attends to, and merge the others into a few contextual rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vlm_pruner_eval.pruners.at_embeddings import EmbeddingPruner
from vlm_pruner_eval.pruners.base import unit_rows
from vlm_pruner_eval.pruners.token_groups import group_sums
from vlm_pruner_eval.pruners.tower_scores import PROJECTED, descending, images_of, left_over
from vlm_pruner_eval.types import Selection, VisionTokens, VisualTokens


@dataclass(frozen=True, kw_only=True)
class VisionZip(EmbeddingPruner):
    """Rows of a view: the CLS token, dominant patches in ascending order, contextual rows; no text is looked at.

    Dominant patches have the largest CLS attention, summed over heads. Every step-th of the others is a target; the rest joins the
    target of largest cosine between head-averaged keys, and a target's state becomes itself plus the mean of those that joined it,
    before the projector. Without a CLS token its row is one more dominant patch. Of an image of several views the rows of the first
    (the base view) come first, then, as in the release (dvlab-research/VisionZip 3151f6d), the dominant patches of all tiles in prompt
    order, the CLS rows of the tiles, and their contextual rows. The release's selection has no misbehaviour to bring back.

    Parameters
    ----------
    contextual_share
        Share of the R rows that are contextual, in [0, 1), rounded: 5/32 makes 162 + 30, 108 + 20, 54 + 10 and 27 + 5 rows.

    Paper: arXiv 2412.04467, section 3.
    """

    name: ClassVar[str] = "visionzip"
    needs: ClassVar[frozenset[str]] = frozenset({"vision.states", "vision.cls_attention", "vision.keys", "positions"})
    joint_views: ClassVar[bool] = True
    checks_late: ClassVar[bool] = True

    scope: str = "per_view"
    contextual_share: float = 0.15625

    def problems(self) -> list[str]:
        """The base's, and the range of the share."""
        found = super().problems()
        if not 0 <= self.contextual_share < 1:
            found.append(f"contextual_share: got {self.contextual_share}, expected a share of the rows in [0, 1).")
        return found

    def tower_layers(self) -> tuple[int, ...]:
        """The layer whose output the projector reads."""
        return (PROJECTED,)

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Zip every view, then put the tiles of each image in the release's order."""
        views = [zipped_view(given, keep, self._contextual(keep)) for given, keep in zip(tokens, keeps, strict=True)]
        if not tokens[0].contiguous:
            return [view.selection(view.in_place) for view in views]
        if any(given.is_video for given in tokens):  # frames are no tiles
            return [view.selection(view.rows) for view in views]
        return [
            selection
            for image in images_of(tokens)
            for selection in tiles_in_order(views[image], [given.positions for given in tokens[image]])
        ]

    def _contextual(self, keep: int) -> int:
        """Contextual rows of `keep`; the CLS row always stays."""
        return min(round(keep * self.contextual_share), max(keep - 1, 0))


class ZippedView(NamedTuple):
    """One view's answer before its rows have an order among those of other views.

    Attributes
    ----------
    order : Tensor [R] int64
        A free place for the CLS row, dominant patches by descending attention, targets.
    rows : Tensor [R, D]
        The CLS row, dominant patches ascending, contextual rows.
    n_cls, n_dominant
        Rows of the first two kinds.
    """

    order: Tensor
    rows: Tensor
    n_cls: int
    n_dominant: int

    @property
    def places(self) -> Tensor:
        """Tensor [R] int64: the places of `order`, ascending."""
        return self.order.sort().values

    @property
    def dominant(self) -> Tensor:
        """Tensor [n_dominant] int64: the dominant patches, ascending."""
        return self.order[self.n_cls : self.n_cls + self.n_dominant].sort().values

    @property
    def in_place(self) -> Tensor:
        """Tensor [R, D]: each row at the place that it comes from."""
        own = torch.cat([self.order[: self.n_cls], self.dominant, self.order[self.n_cls + self.n_dominant :]])
        return self.rows[own.argsort()]

    def selection(self, rows: Tensor) -> Selection:
        """Return the answer with these rows [R, D] at `places`."""
        return Selection(self.order, rows, merged=self.order[: self.n_cls])


def zipped_view(tokens: VisualTokens, keep: int, n_contextual: int) -> ZippedView:
    """Choose and merge the rows of one view.

    Parameters
    ----------
    keep, n_contextual
        Rows in all, the CLS row among them, and contextual ones.

    Paper: arXiv 2412.04467, section 3 (dominant token selection, contextual tokens merging).
    """
    vision, n_visual = tokens.vision, tokens.n_visual
    n_cls = int(vision.cls_state is not None and keep > 0)
    n_dominant = keep - n_contextual - n_cls
    # dominant patches, and targets evenly among the others
    dominant = descending(vision.cls_attention[PROJECTED].sum(0))[:n_dominant]
    others = left_over(dominant, n_visual)
    step = max(1, len(others) // max(1, n_contextual))
    is_target = torch.zeros(len(others), dtype=torch.bool)
    is_target[: step * n_contextual : step] = True
    by_kind = (~is_target).sort(stable=True).indices.to(others.device, non_blocking=True)
    targets, members = others[by_kind].split([n_contextual, len(others) - n_contextual])
    # the rows, of which only the new ones go through the projector
    merged = contextual_states(vision, targets, members)
    new = merged if vision.cls_state is None or n_cls == 0 else torch.cat([vision.cls_state[None], merged])
    projected = vision.project(new).to(tokens.hidden_states.dtype) if len(new) else tokens.hidden_states[:0]
    rows = torch.cat([projected[:n_cls], tokens.hidden_states[dominant.sort().values], projected[n_cls:]])
    return ZippedView(torch.cat([members[:n_cls], dominant, targets]), rows, n_cls, n_dominant)


def contextual_states(vision: VisionTokens, targets: Tensor, members: Tensor) -> Tensor:
    """States [t, C] of `targets` [t] plus the mean of the `members` [m] that resemble each most.

    Paper: arXiv 2412.04467, section 3 (contextual tokens merging), as released: target + mean, not a mean of all.
    """
    if len(targets) == 0:
        return vision.states[:0]
    metric = unit_rows(vision.keys[PROJECTED].mean(1))
    joined = (metric[members] @ metric[targets].T).argmax(1)
    sums, sizes = group_sums(vision.states[members], joined, len(targets))
    return vision.states[targets] + sums / sizes.clamp(min=1)


def tiles_in_order(views: Sequence[ZippedView], positions: Sequence[Tensor]) -> list[Selection]:
    """Return the answers of an image's views: the first as it is, the rows of the others put in order among each other.

    Parameters
    ----------
    positions
        Of each view the positions [V] of its tokens in the prompt.
    """
    base, tiles, there = views[0], views[1:], positions[1:]
    answers = [base.selection(base.rows)]
    if not tiles:
        return answers
    # rows by kind: dominant patches as they stand in the prompt, then the rows that belong to no place
    dominant = torch.cat([tile.rows[tile.n_cls : tile.n_cls + tile.n_dominant] for tile in tiles])
    stand = torch.cat([at[tile.dominant] for tile, at in zip(tiles, there, strict=True)])
    cls = [tile.rows[: tile.n_cls] for tile in tiles]
    contextual = [tile.rows[tile.n_cls + tile.n_dominant :] for tile in tiles]
    rows = torch.cat([dominant[stand.argsort()], *cls, *contextual])
    # the n-th row goes to the n-th of the places that the tiles hold together
    rank = torch.cat([at[tile.places] for tile, at in zip(tiles, there, strict=True)]).argsort().argsort()
    parts = rows[rank].split([len(tile.rows) for tile in tiles])
    return answers + [tile.selection(part) for tile, part in zip(tiles, parts, strict=True)]
