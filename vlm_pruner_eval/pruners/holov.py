"""HoloV: share the budget out among crops of an image by their attention, and keep the best patches of each crop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vlm_pruner_eval.pruners.at_embeddings import EmbeddingPruner
from vlm_pruner_eval.pruners.tower_scores import PROJECTED, cls_row, descending
from vlm_pruner_eval.types import Selection, VisualTokens

ATTENTION_SCALE = 1000
FLOOR = 1e-6
PATCHES_PER_CROP = 1024 / 576  # times the pruning factor V / R: the number of crops in the port to Qwen2.5-VL


class Chosen(NamedTuple):
    """An image's choice before the host knows it.

    Attributes
    ----------
    order : Tensor [R] int64
        Patches crop by crop, then newline tokens.
    n_patches
        How many of them are patches.
    n_filled, is_over : Tensor []
        How many of those the crops have, and if one is given more than it has, as in the release.
    has_singles
        Some crops are of one patch, others of two.
    """

    order: Tensor
    n_patches: int
    n_filled: Tensor
    is_over: Tensor
    has_singles: bool


@dataclass(frozen=True, kw_only=True)
class HoloV(EmbeddingPruner):
    """The top of every crop by attention of the CLS token; no text is looked at.

    An image's tokens are cut one after the other into crops of nearly one size. A crop's score is the mean over its patches of
    1000 times the attention and `alpha` times the variance of the cosines to the rest of the crop, scaled to the mean of the former; so
    features and `alpha` hardly change a crop's share of the budget. Rows stand crop by crop, in descending order of attention; a crop
    that is kept whole, in its own order. With `positions` "original", where a row has the position of its place, they stand in prompt
    order instead. Newline tokens are kept only where there are not enough patches.

    Quirks of the release (obananas/HoloV 1d2e65e), counted in both modes and brought back by `official_quirks`: "overflow" (a crop is
    given more than it holds, and the surplus becomes rows of zeros at the end; by default it goes to the crops of the next largest
    shares) and "single_patch_crops" (a crop of one patch scores a thousandth where others have two).

    Parameters
    ----------
    crops
        Number of crops, at most one for each token; 0: ``16 / 9 * V / R`` as in the release's port to Qwen2.5-VL.
    alpha
        Weight of the variance, 0 or more.

    Paper: arXiv 2510.02912 (NeurIPS 2025), section 3.
    """

    name: ClassVar[str] = "holov"
    needs: ClassVar[frozenset[str]] = frozenset({"vision.cls_attention"})
    checks_late: ClassVar[bool] = True

    crops: int = 16
    alpha: float = 0.09

    def problems(self) -> list[str]:
        """The base's, and the ranges of the number of crops and of the weight."""
        found = super().problems()
        if self.crops < 0:
            found.append(f"crops: got {self.crops}, expected a whole number, 0 or more.")
        if self.alpha < 0:
            found.append(f"alpha: got {self.alpha}, expected a weight of 0 or more.")
        return found

    def tower_layers(self) -> tuple[int, ...]:
        """The layer whose output the projector reads."""
        return (PROJECTED,)

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Local indices [R] of each image crop by crop, and the states in that order."""
        rows = tokens[0].on_host(*(given.coords[:, 1] for given in tokens))
        cuts = [self._cut(*one) for one in zip(tokens, keeps, rows, strict=True)]
        arrived = tokens[0].on_host(*(part for cut in cuts for part in (cut.order, cut.n_filled, cut.is_over)))
        return [self._answer(given, cut, *arrived[3 * i : 3 * i + 3]) for i, (given, cut) in enumerate(zip(tokens, cuts, strict=True))]

    def _cut(self, tokens: VisualTokens, keep: int, rows: Tensor) -> Chosen:
        """Choose for one image, whose tokens are in these `rows` [V] of its grid."""
        # patches, and newline tokens where these are not enough
        there = tokens.hidden_states.device
        patches, newlines = (at.to(there, non_blocking=True) for at in ((rows >= 0).nonzero()[:, 0], (rows < 0).nonzero()[:, 0]))
        n_chosen = min(keep, len(patches))
        newlines = newlines[: keep - n_chosen]
        if n_chosen == 0:
            return Chosen(newlines, 0, newlines.new_zeros(()), newlines.new_zeros(()), False)
        # how many of each crop, and which
        attention = cls_row(tokens)[patches]
        crops = cut_into_crops(len(patches), self._n_crops(len(patches), n_chosen), there)
        exact, as_released = crop_scores(tokens.hidden_states[patches], attention, crops, self.alpha)
        released = given_once(*quotas(as_released, n_chosen), n_chosen)
        count = released.minimum(crops.size) if self.official_quirks else handed_on(*quotas(exact, n_chosen), crops, n_chosen)
        order = torch.cat([patches[in_crop_order(attention, crops, count, n_chosen)], newlines])
        has_singles = len(crops.size) < len(patches) < 2 * len(crops.size)
        return Chosen(order, n_chosen, count.sum(), (released > crops.size).any(), has_singles)

    def _answer(self, tokens: VisualTokens, cut: Chosen, order: Tensor, n_filled: Tensor, is_over: Tensor) -> Selection:
        """Rows in the order that has come to the host; in place of those that the release loses zeros."""
        if cut.n_patches == 0:
            return Selection(order)
        lost = slice(int(n_filled), cut.n_patches)
        is_lost = torch.zeros(len(order), dtype=torch.bool, device=cut.order.device)
        is_lost[lost] = True
        states = tokens.hidden_states[cut.order].masked_fill(is_lost[:, None], 0)
        if not tokens.contiguous:
            states = states[cut.order.argsort()]
        fired = {"overflow": bool(is_over), "single_patch_crops": cut.has_singles}
        quirks = frozenset(quirk for quirk, did in fired.items() if did)
        return Selection(order, states, quirks, amplification=1.0, merged=order[lost])

    def _n_crops(self, n_patches: int, keep: int) -> int:
        """Count the crops of so many patches of which `keep` are kept."""
        return min(n_patches, self.crops or max(1, int(PATCHES_PER_CROP * n_patches / keep)))


class Crops(NamedTuple):
    """Patches cut into crops: tables of one row for each crop.

    Attributes
    ----------
    patch : Tensor [P, n] int64
        Patches of each crop; 0 behind the last of a shorter one.
    is_there : Tensor [P, n] bool
        False behind the last.
    size : Tensor [P] int64
        Patches of each crop.
    """

    patch: Tensor
    is_there: Tensor
    size: Tensor


def cut_into_crops(n_patches: int, count: int, device: torch.device) -> Crops:
    """Cut `n_patches` one after the other into `count` crops, 1 to n_patches; the first ones have one more.

    Paper: arXiv 2510.02912, section 3 (crops).
    """
    number = torch.arange(count, device=device)
    size = n_patches // count + (number < n_patches % count).long()
    lane = torch.arange(-(-n_patches // count), device=device)
    is_there = lane < size[:, None]
    start = size.cumsum(0) - size
    return Crops(torch.where(is_there, start[:, None] + lane, 0), is_there, size)


def crop_scores(features: Tensor, attention: Tensor, crops: Crops, alpha: float) -> tuple[Tensor, Tensor]:
    """Scores [P] of the crops: means of 1000 times the attention and of the scaled variance of cosines.

    The second answer is the release's, in which a crop of one patch scores its attention, and not 1000 times that and its variance.

    Parameters
    ----------
    features : Tensor [n, C]
        Embeddings after the projector.
    attention : Tensor [n]
        Of the CLS token.

    Paper: arXiv 2510.02912, section 3 (holistic scores), as released: the zero diagonal counts as a cosine.
    """
    there, size = crops.is_there, crops.size[:, None]
    rest = (size - 1).clamp(min=1)
    # cosines inside each crop, 0 to itself and to what is not there
    unit = (features / (features.norm(dim=-1, keepdim=True) + FLOOR))[crops.patch] * there[..., None]
    cosine = unit @ unit.transpose(1, 2)
    cosine.diagonal(dim1=1, dim2=2).zero_()
    mean = cosine.sum(2) / rest
    variance = ((cosine - mean[..., None]).square() * there[:, None]).sum(2) / rest * there
    # scores
    attended = attention[crops.patch] * there * ATTENTION_SCALE
    level = attended.sum(1) / crops.size
    scale = level / (variance.sum(1) / crops.size + FLOOR)
    scores = (attended + alpha * variance * scale[:, None]).sum(1) / crops.size
    is_single = crops.size == 1
    return torch.where(is_single, level * (1 + alpha), scores), torch.where(is_single, level / ATTENTION_SCALE, scores)


def quotas(score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Shares of `keep` patches that the crops have by their scores [P], rounded down: [P] int64, and ranks [P] by share.

    Paper: arXiv 2510.02912, section 3 (adaptive allocation).
    """
    share = score / (score.sum() + FLOOR)
    return (share * keep).floor().long(), descending(share).argsort()


def given_once(quota: Tensor, rank: Tensor, keep: int) -> Tensor:
    """Counts [P] as released: what the quotas leave goes one each to the largest shares, even of crops that have no more patches."""
    return quota + (rank < keep - quota.sum())


def handed_on(quota: Tensor, rank: Tensor, crops: Crops, keep: int) -> Tensor:
    """Counts [P] that sum to `keep`: what the quotas leave goes to the largest shares of crops that have patches left, round by round."""
    lane = torch.arange(crops.patch.shape[1], device=quota.device)
    # the turn of every patch: within its crop's quota, then by the round and the crop's rank
    turn = torch.where(lane < quota[:, None], -1, (lane - quota[:, None]) * len(quota) + rank[:, None])
    turn = turn.masked_fill(~crops.is_there, crops.patch.numel() + len(quota))
    crop = turn.flatten().sort(stable=True).indices[:keep] // crops.patch.shape[1]
    return torch.zeros_like(quota).scatter_add_(0, crop, torch.ones_like(crop))


def in_crop_order(attention: Tensor, crops: Crops, count: Tensor, keep: int) -> Tensor:
    """Patches [keep]: of each crop the first `count` [P] by descending attention, or the whole crop; then others to make up the number."""
    by_attention = attention[crops.patch].masked_fill(~crops.is_there, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    is_whole = (count >= crops.size)[:, None]
    patch = torch.where(is_whole, crops.patch, crops.patch.gather(1, by_attention))
    lane = torch.arange(crops.patch.shape[1], device=attention.device)
    kind = torch.where(lane < count[:, None], 0, 1).masked_fill(~crops.is_there, 2)
    return patch.flatten()[kind.flatten().sort(stable=True).indices[:keep]]
