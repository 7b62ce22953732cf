"""Greedy maximum of a weighted determinant on the CPU, where a loop over small steps is at home."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NOISE = 1e-5  # what float32 cosines leave of a token's own 1 when it lies in the span of others
ROUNDING = 1e-5  # a token's product with itself that is as near to 1 is 1, so that it decides nothing
_AHEAD = 64  # tokens whose rows are prepared together

Floats = NDArray[Any]


@dataclass(frozen=True)
class Cosines:
    """Products between tokens, of which a greedy choice reads some rows only.

    Attributes
    ----------
    rows : callable
        ``tokens [n] int64 -> Tensor [n, V]`` float32, on the CPU.
    own : Tensor [V] float32
        The product of each token with itself.
    """

    rows: Callable[[Tensor], Tensor]
    own: Tensor


def cosines_of(features: Tensor) -> Cosines:
    """Products of the rows [V, D] of `features` on the CPU; a row of them is worked out when it is first read."""
    n_tokens = len(features)
    found = features.new_empty(n_tokens, n_tokens)
    is_known = torch.zeros(n_tokens, dtype=torch.bool)

    def rows(tokens: Tensor) -> Tensor:
        new = tokens[~is_known[tokens]]
        found[new] = features.index_select(0, new) @ features.T
        is_known[new] = True
        return found.index_select(0, tokens)

    return Cosines(rows, _ones(features.norm(dim=1).square()))


def cosines_in(similarity: Tensor) -> Cosines:
    """Cosines that are all known: Tensor [V, V] on the CPU."""
    return Cosines(lambda tokens: similarity.index_select(0, tokens), _ones(similarity.diagonal()))


def _ones(own: Tensor) -> Tensor:
    return torch.where((own - 1).abs() <= ROUNDING, 1.0, own)


def by_steps(cosines: Cosines, relevance: Tensor, keep: int) -> tuple[Tensor, int]:
    """Greedy choice [keep] by what each token adds to the logarithm of the determinant of ``diag(r) S diag(r)``.

    Parameters
    ----------
    cosines
        S [V, V].
    relevance : Tensor [V] float32
        r, above 0.
    keep
        R, at most V.

    Returns
    -------
    Tensor [R] int64, and how many of them, from the first on, no rounding noise has chosen. Behind these the order is by descending
    relevance.

    Paper: arXiv 2506.10967, section 3.
    """
    order, left = greedy_steps(cosines, relevance.double().square(), keep)
    noisy = (left <= NOISE).nonzero()
    clear = int(noisy[0]) if len(noisy) else keep
    # the rest by relevance
    by_relevance = relevance.index_fill(0, order[:clear], -math.inf).sort(descending=True, stable=True).indices
    return torch.cat([order[:clear], by_relevance[: keep - clear]]), clear


def greedy_steps(kernel: Cosines, weight: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Choice [keep] int64, and the Schur complement of each chosen token at its step [keep] float64.

    The kernel [V, V] is factored without its weights [V] float64, which scale the complements that are compared: these are in
    float64 and rounded to float32, so that tokens that are worth the same tie, and the lowest index wins. A row of the factor is
    the kernel's less what earlier rows explain. That is worked out ahead for the tokens that are worth the most now, which is one
    product of matrices in place of one with a vector at each step.

    Paper: arXiv 1709.05135, algorithm 1.
    """
    n_tokens = len(weight)
    left = kernel.own.double().numpy().copy()
    weights = weight.numpy()
    worth = np.empty(n_tokens, dtype=np.float32)
    factor = torch.empty(keep, n_tokens, dtype=torch.float64)
    rows = factor.numpy()
    slot = np.full(n_tokens, -1)  # of a token among those whose rows are prepared
    prepared = rows[:0]
    since = 0  # rows of the factor that the prepared ones know
    order = []
    lefts = []
    with np.errstate(all="ignore"):  # noise may be negative, and its root NaN
        for step in range(keep):
            np.multiply(left, weights, out=worth, casting="same_kind")
            best = int(worth.argmax())
            if slot[best] < 0:
                ahead = _most(worth, best)
                prepared = _unexplained(kernel, factor[:step], torch.from_numpy(ahead))
                slot.fill(-1)
                slot[ahead] = np.arange(len(ahead))
                since = step
            # the row of the factor
            row = prepared[slot[best]]
            if step > since:
                row = row - rows[since:step, best] @ rows[since:step]
            row = np.divide(row, np.sqrt(left[best]), out=rows[step])
            order.append(best)
            lefts.append(left[best])
            left -= row * row
            left[best] = -math.inf
    return torch.tensor(order, dtype=torch.int64), torch.tensor(lefts, dtype=torch.float64)


def _most(worth: Floats, best: int) -> NDArray[np.int64]:
    """The token `best`, and some that are worth the most."""
    if len(worth) <= _AHEAD:
        return np.arange(len(worth))
    return np.append(best, np.argpartition(worth, -_AHEAD)[-_AHEAD:])


def _unexplained(kernel: Cosines, factor: Tensor, tokens: Tensor) -> Floats:
    """Rows [n, V] of the kernel at `tokens` [n], less what the factor [t, V] explains of them."""
    own = kernel.rows(tokens).double()
    if len(factor):
        own.addmm_(factor.index_select(1, tokens).T, factor, alpha=-1)
    found: Floats = own.numpy()
    return found
