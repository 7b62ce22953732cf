"""VScan: tokens by CLS attention of an early and a late layer of the tower, the others merged into them; a second cut in mid-depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.budget import parse_rate, share_for_layer_average
from vlm_pruner_eval.pruners.base import unit_rows
from vlm_pruner_eval.pruners.in_stages import StagedPruner, scaled_layers
from vlm_pruner_eval.pruners.token_groups import group_sums, rank_in_group
from vlm_pruner_eval.types import Selection, Stage, VisualTokens

DEPTHS = (Fraction(1, 2),)  # of the second cut
FIRST_TO_SECOND = 3  # tokens kept by the first cut for each that the second one leaves, as published (96 and 32)
CLIP_GRID = (24, 24)
CLIP_WINDOWS = 4  # along a side of that grid
SIDE = 4  # of a window in tokens, on other grids


@dataclass(frozen=True, kw_only=True)
class VScan(StagedPruner):
    """Half of the tokens from windows by local attention, half by global attention; then the top ones by the last prompt token.

    In front of layer 0 every dropped token is merged into the kept one of largest cosine (their mean); in mid-depth tokens are ranked
    as PDrop does. On CLIP's grid of 24 x 24 each of 16 windows gives as many tokens; on other grids tokens are walked by descending
    attention, up to a number in each window of 4 x 4 tokens. Quirks of the release (Tencent/SelfEvolvingAgent a82450e), counted in both
    modes and, but for the last, brought back by `official_quirks`: "count" (what 16 windows can't share is lost: 99 tokens of 101),
    "chosen_twice" (tokens without any global attention let one of the windows be taken again), and "small_grid" (fewer than 4 rows or
    columns, which the release refuses; one window takes them all here).

    Parameters
    ----------
    budget
        "layer_average" (default): ``1 - pruning_rate`` of the tokens on average over layers, three times as many behind the first cut
        as behind the second, as published (96 and 32 of 576 are 64 on average); "kept": that share is left behind the second cut.
    scope
        "per_view" (default): every view or frame has a budget of its own.
    second_stage
        False: the first cut alone, which keeps ``1 - pruning_rate``.
    local_layer, global_layer
        Layers of the vision tower whose attention is looked at, 0-based or negative from the end.

    Paper: arXiv 2505.22654, sections 3.2 (global and local scans, merging) and 3.3 (pruning in mid-depth).
    """

    name: ClassVar[str] = "vscan"
    needs: ClassVar[frozenset[str]] = frozenset({"vision.cls_attention", "own_attention"})
    quirks_change_count: ClassVar[bool] = True
    checks_late: ClassVar[bool] = True

    layer: int = 0
    budget: str = "layer_average"
    scope: str = "per_view"
    second_stage: bool = True
    local_layer: int = 5
    global_layer: int = -2

    def tower_layers(self) -> tuple[int, ...]:
        """The layers of local and of global attention."""
        return (self.local_layer, self.global_layer)

    def needs_now(self, stage: int, memory: Mapping[str, Any]) -> frozenset[str]:
        """The tower's attention at the first stage, the language model's at the second."""
        return frozenset({"own_attention" if stage else "vision.cls_attention"})

    def stages(self, n_layers: int) -> tuple[Stage, ...]:
        """In front of layer 0, and in mid-depth; the first alone without `second_stage`, or in a model of one layer."""
        share = 1 - parse_rate(self.pruning_rate)
        if not self.second_stage or n_layers == 1:
            return (Stage(0, share),)
        (second,) = scaled_layers(DEPTHS, n_layers)
        left: Fraction | float = share
        if self.budget == "layer_average":
            left = share * n_layers / (n_layers + (FIRST_TO_SECOND - 1) * second)
        first = FIRST_TO_SECOND * left
        if first >= 1:  # the first cut can't give what the second one is to take
            first = 1
            left = share_for_layer_average(share, second, n_layers) if self.budget == "layer_average" else share
        return (Stage(0, first), Stage(second, left))

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """At the first stage the tokens of the windows, then those by global attention; at the second, those by own attention."""
        first = [given for given in tokens if given.stage == 0]
        attention = [given.vision.cls_attention[layer].mean(0) for given in first for layer in self.tower_layers()]
        arrived = iter(tokens[0].on_host(*attention, *(given.coords for given in first)) if first else ())
        weights = [(next(arrived), next(arrived)) for _ in first]
        known = iter(zip(weights, arrived, strict=True))
        answers = []
        for given, keep in zip(tokens, keeps, strict=True):
            if given.stage:
                answers.append(Selection(given.own_attention.sort(descending=True, stable=True).indices[:keep]))
            else:
                answers.append(self._scanned(given, keep, *next(known)))
        return answers

    def _scanned(self, tokens: VisualTokens, keep: int, attention: tuple[Tensor, Tensor], coords: Tensor) -> Selection:
        """The first cut, by local and global attention [V] and coordinates [V, 3] in the memory of the host; merged on the device."""
        local_weights, weights = attention
        local = local_choice(local_weights, coords, tokens.grid, keep)
        # the rest by global attention, and what the release would take
        n_lost = keep // 2 - len(local)
        sane = weights.index_fill(0, local, -math.inf).sort(descending=True, stable=True).indices[: keep - len(local)]
        released = weights.index_fill(0, local, 0).sort(descending=True, stable=True).indices[: keep - keep // 2]
        repeats = torch.isin(released, local)
        # the answer
        order = torch.cat([local, released[~repeats] if self.official_quirks else sane])
        fired = {"count": n_lost > 0, "chosen_twice": bool(repeats.any()), "small_grid": min(tokens.grid) < SIDE}
        quirks = frozenset(quirk for quirk, did in fired.items() if did)
        there = order.to(tokens.hidden_states.device, non_blocking=True)
        return Selection(order, merged_into(tokens.hidden_states, there), quirks, amplification=1.0)


def local_choice(weights: Tensor, coords: Tensor, grid: tuple[int, int], keep: int) -> Tensor:
    """Tokens [about keep / 2] by local attention [V], so many in each window.

    Paper: arXiv 2505.22654, section 3.2 (local scan).
    """
    window, n_windows = windows(coords, grid)
    rank = rank_in_group(weights, window)
    if is_clip_grid(len(weights), grid):
        each = keep // 2 // n_windows
        in_turn = (window * len(weights) + rank).argsort(stable=True)
    else:
        each = math.ceil(keep // 2 / n_windows)
        in_turn = weights.sort(descending=True, stable=True).indices
    allowed = in_turn[rank[in_turn] < each]
    return allowed[: keep // 2]


def is_clip_grid(n_visual: int, grid: tuple[int, int]) -> bool:
    """Tell if so many tokens are one view of 24 x 24."""
    return grid == CLIP_GRID and n_visual == CLIP_GRID[0] * CLIP_GRID[1]


def windows(coords: Tensor, grid: tuple[int, int]) -> tuple[Tensor, int]:
    """Number of the window [V] that each token is in, and how many windows there are: 16 on CLIP's grid, else one per 4 x 4 tokens.

    The last windows of rows and columns take what is left over; frames have windows of their own.

    Parameters
    ----------
    coords : Tensor [V, 3]
        In the memory of the host.

    Paper: arXiv 2505.22654, section 3.2; the rule for other grids is the release's for Qwen2.5-VL.
    """
    side = CLIP_GRID[0] // CLIP_WINDOWS if is_clip_grid(len(coords), grid) else SIDE
    down, across = (max(1, length // side) for length in grid)
    frame, row, col = coords.round().long().clamp(min=0).unbind(-1)
    frames = 1 if len(coords) <= grid[0] * grid[1] else int(frame.max()) + 1
    place = (row // side).clamp(max=down - 1) * across + (col // side).clamp(max=across - 1)
    return frame.clamp(max=frames - 1) * down * across + place, frames * down * across


def merged_into(states: Tensor, order: Tensor) -> Tensor:
    """States [R, D] of the kept tokens `order` [R], ascending: means of each and of the dropped ones that resemble it most.

    Parameters
    ----------
    states : Tensor [V, D]
        Of all tokens.

    Paper: arXiv 2505.22654, section 3.2 (token merging).
    """
    if not len(order):
        return states[:0]
    kept = order.sort().values
    unit = unit_rows(states)
    receiver = (unit @ unit[kept].T).argmax(1)
    receiver = receiver.scatter(0, kept, torch.arange(len(kept), device=kept.device))
    sums, sizes = group_sums(states, receiver, len(kept))
    return sums / sizes
