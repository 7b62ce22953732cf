"""MustDrop: uniform windows are merged inside the vision tower, then weakly attended tokens are dropped at four depths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.budget import keep_share, parse_rate
from vlm_pruner_eval.pruners.base import unit_rows
from vlm_pruner_eval.pruners.in_stages import PUBLISHED_TOKENS, StagedPruner, numbers_in, scaled_layers
from vlm_pruner_eval.pruners.token_groups import group_size, group_sums, rank_in_group
from vlm_pruner_eval.redact import short
from vlm_pruner_eval.types import Selection, Stage, VisualTokens

DEPTHS = tuple(Fraction(layer, 32) for layer in (3, 7, 11, 15))  # behind layers 2, 6, 10 and 14 of 32
# (global, individual) thresholds by the tokens out of 576 after which the authors call the setting
PUBLISHED = {192: (0.001, 0.001), 128: (0.0012, 0.001), 64: (0.011, 0.01)}
WINDOW = 3  # patches along a side


@dataclass(frozen=True, kw_only=True)
class MustDrop(StagedPruner):
    """Key tokens by CLS attention are never dropped; others are where the text attends to them little, in sum and one by one.

    The method decides its count; the rate only chooses thresholds. It acts in two places: `inside_tower` says which patches become one
    token behind the tower's first layer, and the stages drop tokens in the language model. After prefill the release
    (liuting20/MustDrop 909afa5) shortens the caches of the layers `cached_as_last` to what the last stage left.

    Parameters
    ----------
    thresholds
        "published": the authors' for the rate, 2/3, 7/9 or 8/9 (192, 128 or 64 of 576 tokens by name, the count is not exact). Or two
        numbers "global/individual" whatever the rate is, such as "0.005/0.001" (the authors' for VizWiz at 64): a token is dropped if
        it receives less than global times all attention of text to image, and from no text as much as individual.
    window_threshold
        Mean cosine between the 9 patches of a window from which on they are merged.
    key_share
        Share of each view's tokens that are key tokens, in (0, 1].
    budget
        Without effect.

    Paper: arXiv 2411.10803, sections 3.2 (windows, key set) to 3.4 (dual attention filter, caches).
    """

    name: ClassVar[str] = "mustdrop"
    acts_in_tower: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"text_attention", "vision.cls_attention"})
    without_effect: ClassVar[frozenset[str]] = frozenset({"layer", "budget"})
    checks_late: ClassVar[bool] = True

    thresholds: str = "published"
    window_threshold: float = 0.8
    key_share: float = 0.08

    def problems(self) -> list[str]:
        """The base's, a rate without thresholds, and ranges."""
        found = super().problems()
        if self.thresholds == "published":
            if self._nominal() not in {*PUBLISHED, PUBLISHED_TOKENS}:
                found.append(
                    f"pruning_rate: got {short(self.pruning_rate)}, expected 2/3, 7/9 or 8/9, for which the authors published thresholds, "
                    "or 0; for another budget state them, such as thresholds=0.005/0.001 (global/individual)."
                )
        elif len(numbers_in(self.thresholds) or ()) != 2:
            found.append(
                f"thresholds: got {short(self.thresholds)}, expected published, or two numbers global/individual such as 0.005/0.001."
            )
        if not self.window_threshold >= -1:
            found.append(f"window_threshold: got {self.window_threshold}, expected a cosine, -1 or more; above 1 nothing is merged.")
        if not 0 < self.key_share <= 1:
            found.append(f"key_share: got {self.key_share}, expected a share above 0, up to 1.")
        return found

    def tower_layers(self) -> tuple[int, ...]:
        """The last layer, whose CLS attention makes the key set."""
        return (-1,)

    def decides_count(self) -> bool:
        """Always: thresholds decide."""
        return True

    def needs_now(self, stage: int, memory: Mapping[str, Any]) -> frozenset[str]:
        """The tower's attention at the first stage, in front of the model, which leaves the key set; that of text behind it."""
        first, later = frozenset({"vision.cls_attention"}), frozenset({"text_attention"})
        if "key_set" in memory:
            return later
        return first if stage == 0 else first | later

    def stages(self, n_layers: int) -> tuple[Stage, ...]:
        """One in front of the model, where each merged window leaves one token, and the four cuts; fewer in a model of few layers.

        All have the rate's share, which is nominal.
        """
        share = 1 - parse_rate(self.pruning_rate)
        return tuple(Stage(layer, share) for layer in (0, *scaled_layers(DEPTHS, n_layers)))

    def cached_as_last(self, n_layers: int) -> range:
        """Decoder layers whose caches hold, after prefill, only what the last stage left, though more tokens went through them.

        Of the published model's 32 these are 2 to 14; layers 0 and 1 keep all tokens.
        """
        stages = self.stages(n_layers)
        return range(stages[1].layer - 1, stages[-1].layer)

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Every token that is in the key set or attended to enough, ascending; found by the host from what one copy brings."""
        if self._nominal() == PUBLISHED_TOKENS:
            return [Selection(torch.arange(given.n_visual)) for given in tokens]
        read = [self._read_of_tower(given) if is_merged(given) else self._read_of_text(given) for given in tokens]
        arrived = iter(tokens[0].on_host(*(part for parts in read for part in parts)))
        answers = []
        for given, parts in zip(tokens, read, strict=True):
            here = [next(arrived) for _ in parts]
            answers.append(self._one_of_each(given, *here) if is_merged(given) else self._left(given, *here))
        return answers

    # ---- inside the vision tower
    def inside_tower(self, layer0_states: Tensor, grid: tuple[int, int]) -> Tensor:
        """Number the tokens [B, N] int64 that patches become: the merged windows by descending similarity, then the rest ascending.

        Every view merges as many windows as the view with the fewest similar ones, so all have the same number M of tokens.

        Parameters
        ----------
        layer0_states : Tensor [B, 1 + N, C]
            Output of the tower's first layer for the views of one image, CLS token first if there is one.
        grid : (rows, cols)
            Of a view, rows * cols = N. Rows and columns behind the last whole window are left as they are.

        Paper: arXiv 2411.10803, section 3.2 (local spatial merging).
        """
        rows, cols = grid
        states = layer0_states[:, layer0_states.shape[1] - rows * cols :].to(self._dtype(layer0_states.dtype))
        members = window_members(grid).to(states.device, non_blocking=True)
        similarity = torch.stack([similarities(view, members) for view in states])
        n_merged = int((similarity >= self.window_threshold).sum(1).amin()) if self._nominal() < PUBLISHED_TOKENS else 0
        best = similarity.sort(dim=1, descending=True, stable=True).indices[:, :n_merged]
        return torch.stack([numbered(members[chosen], rows * cols) for chosen in best])

    def merged_inside(self, states: Tensor, groups: Tensor) -> Tensor:
        """States [B, 1 + M, C] of the tokens that `inside_tower` made of patches [B, N]: plain means, after the CLS token if there is one.

        Parameters
        ----------
        states : Tensor [B, 1 + N, C]
            Output of the tower's first layer.
        """
        n_before, count = states.shape[1] - groups.shape[1], int(groups.max()) + 1
        merged = []
        for view, group in zip(states, groups, strict=True):
            sums, sizes = group_sums(view[n_before:], group, count)
            merged.append(torch.cat([view[:n_before], (sums / sizes).to(view)]))
        return torch.stack(merged)

    # ---- private
    def _read_of_text(self, tokens: VisualTokens) -> list[Tensor]:
        """Which tokens [V] bool the text attends to too little, their numbers, and what makes the key set if there is none yet."""
        overall, individual = self._thresholds()
        attention = tokens.text_attention(None).to(tokens.hidden_states)
        received = attention.sum(0)
        strongest = attention.amax(0) if len(attention) else torch.zeros_like(received)
        weak = (received < overall * received.sum()) & (strongest < individual)
        if "key_set" in tokens.memory:
            return [weak, tokens.ids]
        return [weak, tokens.ids, tokens.vision.cls_attention[-1].mean(0), tokens.coords]

    def _left(self, tokens: VisualTokens, weak: Tensor, ids: Tensor, *of_tower: Tensor) -> Selection:
        """The tokens that are not weak or in the key set, which is found at the first such stage."""
        if "key_set" not in tokens.memory:
            attention, coords = of_tower
            tokens.memory["key_set"] = ids[key_tokens(attention, coords, float(self.key_share))]
        is_key = torch.isin(ids, tokens.memory["key_set"])
        return Selection((~weak | is_key).nonzero()[:, 0])

    def _read_of_tower(self, tokens: VisualTokens) -> list[Tensor]:
        vision = tokens.vision
        return [tokens.ids, vision.cls_attention[-1].mean(0), vision.groups, vision.views]

    def _one_of_each(self, tokens: VisualTokens, ids: Tensor, attention: Tensor, groups: Tensor, views: Tensor) -> Selection:
        """One place for each token that patches became, whose rows stand in the tower's order; newline tokens go."""
        # the first place of each, and the tokens in their order
        places = torch.arange(tokens.n_visual)
        count = int(groups.max()) + 1
        is_cell = groups >= 0
        firsts = places.new_full((count,), tokens.n_visual)
        firsts = firsts.scatter_reduce(0, groups[is_cell], places[is_cell], "amin")
        firsts = firsts[firsts < tokens.n_visual]  # all patches of a token may be unpadded
        sizes = groups[is_cell].bincount(minlength=count)[groups[firsts]]
        # key tokens, by the places at which they will stand
        view = views[firsts]
        is_key = rank_in_group(attention[firsts], view) < (group_size(view).double() * float(self.key_share)).ceil()
        tokens.memory["key_set"] = ids[firsts.sort().values[is_key]]
        rows = tokens.hidden_states[firsts.to(tokens.hidden_states.device, non_blocking=True)]
        return Selection(firsts, rows, merged=firsts[sizes > 1], amplification=1.0)

    def _nominal(self) -> int:
        """Tokens out of 576 that the rate leaves."""
        return keep_share(PUBLISHED_TOKENS, 1 - parse_rate(self.pruning_rate))

    def _thresholds(self) -> tuple[float, float]:
        stated = numbers_in(self.thresholds)
        if stated is None:
            return PUBLISHED[self._nominal()]
        overall, individual = map(float, stated)
        return overall, individual


def is_merged(tokens: VisualTokens) -> bool:
    """Tell if these are patches, in front of the model, some of which became one token inside the vision tower."""
    return tokens.stage == 0 and tokens.vision.groups is not None


def key_tokens(attention: Tensor, coords: Tensor, share: float) -> Tensor:
    """Local indices [k] of the key tokens, the top ``ceil(share * M)`` of a view's M by CLS attention; descending, view after view.

    Parameters
    ----------
    attention, coords : Tensor [V] and [V, 3]
        In the memory of the host.

    Paper: arXiv 2411.10803, section 3.2 (key tokens).
    """
    view = coords[:, 0].round().long().masked_fill(coords[:, 1] < 0, -1)
    rank = rank_in_group(attention, view)
    size = group_size(view)
    is_key = (rank < (size.double() * share).ceil()) & (view >= 0)
    in_turn = rank.argsort(stable=True)
    in_turn = in_turn[view[in_turn].argsort(stable=True)]
    return in_turn[is_key[in_turn]]


def window_members(grid: tuple[int, int]) -> Tensor:
    """Patches [W, 9] of each whole window of 3 x 3, row-major."""
    rows, cols = grid
    down, across = rows // WINDOW, cols // WINDOW
    patch = torch.arange(rows * cols).view(rows, cols)[: down * WINDOW, : across * WINDOW]
    return patch.reshape(down, WINDOW, across, WINDOW).transpose(1, 2).reshape(down * across, WINDOW * WINDOW)


def similarities(states: Tensor, members: Tensor) -> Tensor:
    """Mean cosines [W] between two different patches of a window, of states [N, C] and windows [W, n]."""
    unit = unit_rows(states)[members]
    cosines = unit @ unit.transpose(1, 2)
    n = members.shape[1]
    return (cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(-1)) / (n * (n - 1))


def numbered(merged: Tensor, n_patches: int) -> Tensor:
    """Numbers [N] of the tokens that patches become when those of each row of `merged` [r, n] become one; the others follow."""
    is_free = torch.ones(n_patches, dtype=torch.bool, device=merged.device).index_fill(0, merged.flatten(), False)
    numbers = is_free.cumsum(0) - 1 + len(merged)
    own = torch.arange(len(merged), device=merged.device).repeat_interleave(merged.shape[1])
    return numbers.scatter(0, merged.flatten(), own)
