"""The growth of VLM-Pruner's choice by the BSS criterion, on the host: every block depends on the one before."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlm_pruner_eval.errors import PruningError


class BssScores:
    """Scores of the candidates against the chosen tokens, kept up to date at O(V) per added token.

    score(c) = max cosine(c, chosen) * (1 + weight * min distance(c, chosen) / diagonal of the grid). The factor is one
    positive number per candidate, so a running maximum and a running minimum are all that is needed. Distances count
    within one image or frame; with no chosen token there, and for newline tokens, the factor is 1.

    Parameters
    ----------
    similarity : Tensor [V, V]
        Cosines between the tokens, in the memory of the host.
    coords : Tensor [V, 3]
        (image or frame, row, col) of the tokens, in the memory of the host.
    grid
        (rows, cols), which set the diagonal.
    weight
        lambda, the weight of the distance.

    Paper: arXiv 2512.02700 (BSS criterion).
    """

    def __init__(self, similarity: Tensor, coords: Tensor, grid: tuple[int, int], weight: float):
        n_visual = len(similarity)
        self._similarity = similarity
        self._frame, self._row, self._col = places(coords)
        self._one_frame = bool((self._frame == self._frame[0]).all())
        self.weight = weight
        self._per_cell = weight / math.hypot(*grid)
        self._cosine = torch.full((n_visual,), -math.inf)
        self._squared_distance = torch.full((n_visual,), math.inf)
        self._chosen = torch.zeros(n_visual, dtype=torch.bool)

    def add(self, chosen: Tensor) -> None:
        """Mark local indices [A] as chosen."""
        if len(chosen) == 0:
            return
        self._chosen[chosen] = True
        torch.maximum(self._cosine, self._similarity.index_select(0, chosen).amax(0), out=self._cosine)
        # squares of whole numbers are exact, so the smallest square is that of the smallest distance
        squared = (self._row[chosen, None] - self._row).square_()
        across = self._col[chosen, None] - self._col
        squared.addcmul_(across, across)
        if not self._one_frame:
            squared.masked_fill_(self._frame[chosen, None] != self._frame, math.inf)
        torch.minimum(self._squared_distance, squared.amin(0), out=self._squared_distance)

    def of(self, candidates: Tensor) -> Tensor:
        """Scores [C] of local indices [C]."""
        distance = self._squared_distance[candidates].sqrt_()
        distance.masked_fill_(distance == math.inf, 0)  # nothing chosen in this frame: a factor of 1
        return distance.mul_(self._per_cell).add_(1).mul_(self._cosine[candidates])

    def ranked(self) -> tuple[Tensor, float]:
        """All candidates not chosen yet, by ascending score, and the lowest score."""
        candidates = (~self._chosen).nonzero().flatten()
        scores, rank = self.of(candidates).sort(stable=True)
        return candidates[rank], scores[0].item()


def places(coords: Tensor) -> Tensor:
    """Frame, row and column [3, V] float32 of coordinates [V, 3]; a newline token has a frame of its own: no distance to anything else."""
    frame, row, col = coords.T.float().contiguous().unbind()
    alone = -1.0 - torch.arange(len(coords), device=coords.device)
    return torch.stack([torch.where(row < 0, alone, frame), row, col])


def no_threshold_above(lowest: float, weight: float) -> PruningError:
    """The error of a growth that can't go on: the best score of a candidate is not finite."""
    return PruningError(f"vlmpruner: the best score of a candidate is {lowest}; lower spatial_weight (got {weight}).")


class Growth:
    """Adds tokens pass by pass, each with a higher threshold than the one before.

    Parameters
    ----------
    threshold, step
        A candidate joins while its score is below the threshold, which grows by the step from pass to pass.
    block
        Candidates scored together; tokens of one block do not see each other.
    stop_on_stall
        Stop at a pass that adds nothing, as the release does, instead of loosening the threshold.

    Paper: arXiv 2512.02700 (BSS criterion, passes).
    """

    def __init__(self, *, threshold: float, step: float, block: int, stop_on_stall: bool):
        self._threshold = threshold
        self._step = step
        self._block = block
        self._stop_on_stall = stop_on_stall

    def order(self, scores: BssScores, start: Tensor, keep: int) -> tuple[Tensor, bool]:
        """Local indices [R] in the order of selection, from `start` [S] until `keep` are chosen; whether a pass stalled.

        Raises
        ------
        PruningError
            A score is not finite, so that no threshold is above it.
        """
        parts, missing, stalled, threshold = [start], keep - len(start), False, self._threshold
        scores.add(start)
        while missing > 0:
            candidates, lowest = scores.ranked()
            added = self._one_pass(scores, candidates, missing, threshold)
            if added:
                parts += added
                missing -= sum(map(len, added))
                threshold += self._step
                continue
            stalled = True
            if self._stop_on_stall:
                break
            if not math.isfinite(lowest):
                raise no_threshold_above(lowest, scores.weight)
            threshold = self._loosened(threshold, lowest)
        return torch.cat(parts), stalled

    def _one_pass(self, scores: BssScores, candidates: Tensor, room: int, threshold: float) -> list[Tensor]:
        """Walk the ranked candidates in blocks, each scored against the tokens chosen so far; the blocks' additions."""
        added: list[Tensor] = []
        for block in candidates.split(self._block):
            score = scores.of(block)
            accepted = block[score < threshold]
            if len(accepted) > room:
                accepted = block[score.argsort(stable=True)[:room]]
            if len(accepted):
                scores.add(accepted)
                added.append(accepted)
                room -= len(accepted)
            if room == 0 or not added:  # a first block that adds nothing ends the pass
                break
        return added

    def _loosened(self, threshold: float, lowest: float) -> float:
        """The first threshold of the ladder above the `lowest` score, reached in one jump however small the step is."""
        rungs = (lowest - threshold) / self._step
        # a step below float spacing can't be climbed: the next float32 above the score is then the first threshold
        rung = threshold + self._step * (math.floor(rungs) + 1) if rungs < 2**52 else lowest
        above: float = torch.nextafter(torch.tensor(lowest), torch.tensor(math.inf)).item()
        return max(rung, above)
