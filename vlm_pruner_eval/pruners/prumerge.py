"""LLaVA-PruMerge and PruMerge+: keep outliers of the CLS token's attention, and add to each the patches whose keys resemble its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vlm_pruner_eval.pruners.at_embeddings import EmbeddingPruner
from vlm_pruner_eval.pruners.base import unit_rows
from vlm_pruner_eval.pruners.tower_scores import LAST, descending, images_of, left_over
from vlm_pruner_eval.types import Selection, VisionTokens, VisualTokens


class Counts(NamedTuple):
    """Patches of one view that attention keeps, and the step of the grid between them (0: no grid)."""

    n_top: int
    step: int = 0
    quirks: frozenset[str] = frozenset()


class Kept(NamedTuple):
    """The patches [n] int64 of a view's rows but the extra one, and which rows [n] bool are copies of earlier ones (None: none)."""

    patches: Tensor
    is_copy: Tensor | None = None
    quirks: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class PruMerge(EmbeddingPruner):
    """Patches of outlying CLS attention, each with the sum of similar ones, and one row for all that was dropped; no text is looked at.

    Attention is a softmax over the products of the CLS query and all keys of the tower's last layer, taken as one head. Outliers are
    above Q3 + 1.5 (Q3 - Q1) of all views of an image, which have one share of outliers. A kept state becomes F_i + sum of a_j F_j
    over the `neighbours` other patches of most similar keys; the extra row is the sum of a_j F_j over the dropped ones. Rows are in
    descending order of attention, the extra row last, all merged before the projector.

    Quirks of the release (42Shawn/LLaVA-PruMerge 097c041), counted in both modes; `official_quirks` brings the first two back:
    "extra_row" (with `fixed`, R patches and the extra row are R + 1 rows), "rounding" (a count that goes through a float share is one
    too low), "no_outliers" (the extra row is all there is), "no_place" (nothing is dropped, so that the extra row would be zeros and
    no place is left for it).

    Parameters
    ----------
    fixed
        Keep exactly the R rows that are asked for, R - 1 by attention and the extra one; otherwise the method decides the count.
    neighbours
        Patches that are added to each kept one, 0 or more.

    Paper: arXiv 2403.15388, section 3.
    """

    name: ClassVar[str] = "prumerge"
    needs: ClassVar[frozenset[str]] = frozenset({"vision.states", "vision.keys", "vision.cls_query"})
    joint_views: ClassVar[bool] = True
    checks_late: ClassVar[bool] = True
    quirks_change_count: ClassVar[bool] = True

    scope: str = "per_view"
    fixed: bool = False
    neighbours: int = 32

    def problems(self) -> list[str]:
        """The base's, and the range of the number of neighbours."""
        found = super().problems()
        if self.neighbours < 0:
            found.append(f"neighbours: got {self.neighbours}, expected a whole number, 0 or more.")
        return found

    def tower_layers(self) -> tuple[int, ...]:
        """The last layer."""
        return (LAST,)

    def decides_count(self) -> bool:
        """Tell if the number of rows is the method's own, or one that a misbehaviour of the release changes."""
        return not self.fixed or super().decides_count()

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Rows of each view, after one share of outliers for all views of an image."""
        attention = [cls_softmax(given.vision) for given in tokens]
        images = [] if self.fixed else images_of(tokens)
        arrived = tokens[0].on_host(*map(descending, attention), *(n_outliers(torch.cat(attention[image])) for image in images))
        ranked, outliers = arrived[: len(tokens)], arrived[len(tokens) :]
        if self.fixed:
            counts = [self._fixed(given.n_visual, max(keep, 1)) for given, keep in zip(tokens, keeps, strict=True)]
        else:
            sizes = [[given.n_visual for given in tokens[image]] for image in images]
            counts = [one for views, n in zip(sizes, outliers, strict=True) for one in self._adaptive(views, int(n))]
        kept = [self._kept(one, count) for one, count in zip(ranked, counts, strict=True)]
        rows = zip(tokens, keeps, attention, kept, counts, strict=True)
        return [
            self._rows(given, row, one, count.quirks) if keep or not self.fixed else no_rows(given) for given, keep, row, one, count in rows
        ]

    def _fixed(self, n_visual: int, keep: int) -> Counts:
        """Count the patches where the number of rows is given."""
        released = int(n_visual * (keep / n_visual))
        quirks = {"extra_row"} if released == keep else {"extra_row", "rounding"}
        return Counts(released if self.official_quirks else keep - 1, 0, frozenset(quirks))

    def _adaptive(self, views: Sequence[int], n: int) -> list[Counts]:
        """Count the patches of views of so many tokens each of which `n` together are outliers."""
        total, share = sum(views), n / sum(views)
        exact = [(size * n // total, total // n // 3 if n else 0) for size in views]
        released = [(int(size * share), int(int(1 / share) / 3) if n else 0) for size in views]
        quirks = {"rounding"} if exact != released else set()
        quirks |= set() if n else {"no_outliers"}
        return [Counts(*count, frozenset(quirks)) for count in (released if self.official_quirks else exact)]

    def _kept(self, ranked: Tensor, counts: Counts) -> Kept:
        """Patches of the rows, given all [V] by descending attention, in the memory of the host."""
        return Kept(ranked[: counts.n_top])

    def _rows(self, tokens: VisualTokens, attention: Tensor, kept: Kept, quirks: frozenset[str]) -> Selection:
        """Find places for the rows of one view, on the host, and merge them on the device."""
        quirks |= kept.quirks
        # places: a patch's own, and those of dropped patches for copies and for the extra row
        n_copies = 0 if kept.is_copy is None else int(kept.is_copy.sum())
        distinct = kept.patches if kept.is_copy is None else kept.patches[~kept.is_copy]
        free = left_over(distinct, tokens.n_visual)
        order, dropped = kept.patches, free[n_copies:]
        if kept.is_copy is not None:
            order = order.masked_scatter(kept.is_copy, free[:n_copies])
        # rows; as many dropped patches as there are copies get lost
        patches, lost = (part.to(attention.device, non_blocking=True) for part in (kept.patches, dropped))
        rows = with_neighbours(tokens.vision, attention, patches, lost, self.neighbours)
        if len(dropped) == 0:
            return Selection(order, tokens.vision.project(rows), quirks | {"no_place"}, merged=free[:n_copies])
        extra = attention[lost] @ tokens.vision.states[lost]
        projected = tokens.vision.project(torch.cat([rows, extra[None]]))
        return Selection(torch.cat([order, dropped[:1]]), projected, quirks, merged=free[: n_copies + 1])


@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """PruMerge with patches of a regular grid besides, one in every third part of what an outlier stands for.

    The step of the grid is ``int(1 / share of outliers) / 3``, from patch 0 to the last but one. With `fixed` half of the R - 1 patches
    have the most attention and half are spread evenly over the rest. The quirks are those of PruMerge, and with `fixed`, where the
    release has its training path only (R by attention and a grid of every (N / R)-th): "repeats" (the grid repeats patches, and the
    first dropped ones get lost; `official_quirks` brings it back) and "wrong_count" (the grid has not R patches, where it raises).

    Paper: arXiv 2403.15388, section 3 (PruMerge+).
    """

    name: ClassVar[str] = "prumerge_plus"

    def _fixed(self, n_visual: int, keep: int) -> Counts:
        """Count the patches where the number of rows is given; a step of 0 where the release's training path raises."""
        counts, step = super()._fixed(n_visual, keep), int(1 / (keep / n_visual))
        if 2 * keep > n_visual or len(range(step // 2, n_visual, step)) != keep:
            return Counts(keep, 0, counts.quirks | {"wrong_count"})
        return Counts(counts.n_top if self.official_quirks else keep, step, counts.quirks)

    def _kept(self, ranked: Tensor, counts: Counts) -> Kept:
        """The patches of most attention, then those of the grid in ascending order."""
        n_top, step = counts.n_top, counts.step
        if not self.fixed:
            grid, is_top = on_grid(ranked[:n_top], range(0, len(ranked) - 1, step) if step else range(0), len(ranked))
            return Kept(torch.cat([ranked[:n_top], grid[~is_top]]))
        spread = half_spread(ranked, n_top - 1)
        if step == 0:
            return Kept(spread)
        grid, is_top = on_grid(ranked[:n_top], range(step // 2, len(ranked), step), len(ranked))
        quirks = frozenset({"repeats"} if bool(is_top.any()) else ())
        if not self.official_quirks:
            return Kept(spread, quirks=quirks)
        return Kept(torch.cat([ranked[:n_top], grid]), torch.cat([is_top.new_zeros(n_top), is_top]), quirks)


def on_grid(top: Tensor, cells: range, n_visual: int) -> tuple[Tensor, Tensor]:
    """Return the patches `cells` as a tensor [g] on the device of `top` [k], and which of them are in `top`: [g] bool."""
    is_top = torch.zeros(n_visual, dtype=torch.bool, device=top.device).index_fill_(0, top, True)
    grid = torch.arange(cells.start, cells.stop, cells.step, device=top.device)
    return grid, is_top[grid]


def half_spread(ranked: Tensor, count: int) -> Tensor:
    """Choose `count` patches of all [V] by descending attention: the first of them, and as many, or one less, evenly among the rest."""
    n_spread = count // 2
    top = ranked[: count - n_spread]
    rest = left_over(top, len(ranked))
    middle = (2 * torch.arange(n_spread, device=ranked.device) + 1) * len(rest) // max(1, 2 * n_spread)
    return torch.cat([top, rest[middle]])


def no_rows(tokens: VisualTokens) -> Selection:
    """Return the answer that keeps nothing."""
    return Selection(torch.zeros(0, dtype=torch.int64, device=tokens.hidden_states.device), tokens.hidden_states[:0])


def cls_softmax(vision: VisionTokens) -> Tensor:
    """Attention [V] of the CLS token at the last layer, taken as one head of full width; its own column is left out.

    Paper: arXiv 2403.15388, section 3.2.
    """
    query, keys = vision.cls_query[LAST].flatten(), vision.keys[LAST].flatten(1)
    own = vision.cls_key[LAST].flatten()[None]
    return ((torch.cat([own, keys]) @ query) / math.sqrt(len(query))).softmax(0)[1:]


def n_outliers(attention: Tensor) -> Tensor:
    """Count [] the values of `attention` [n] above Q3 + 1.5 (Q3 - Q1), with linearly interpolated quartiles.

    Paper: arXiv 2403.15388, section 3.2 (interquartile range).
    """
    values = attention.float()
    low, high = values.quantile(0.25), values.quantile(0.75)
    return (values > high + 1.5 * (high - low)).sum()


def with_neighbours(vision: VisionTokens, attention: Tensor, kept: Tensor, dropped: Tensor, count: int) -> Tensor:
    """States [n, C] of the patches `kept` [n], each plus the attention-weighted sum of the `count` others of most similar keys.

    Paper: arXiv 2403.15388, section 3.3 (token supplement); the sum is not divided by the weights, as released.
    """
    keys = unit_rows(vision.keys[LAST].flatten(1))
    pool, came_from = torch.cat([kept, dropped]).sort(stable=True)
    itself = came_from.argsort()[: len(kept), None]
    cosine = (keys[kept] @ keys[pool].T).scatter_(1, itself, -math.inf)
    nearest = cosine.sort(descending=True, stable=True).indices[:, : min(count, len(pool) - 1)]
    weight = torch.zeros_like(cosine).scatter_(1, nearest, attention[pool][nearest])
    return vision.states[kept] + weight @ vision.states[pool]
