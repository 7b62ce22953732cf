"""Images and videos of a batch of prompts: which tokens of input_ids belong to which."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_pruner_eval import hf_compat
from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.vlms.parts.layout import Layout, Part, Scope

SINGLY = (
    "Under beams or returned sequences, this version of transformers repeats the images of a batch one by one, so that rows with "
    "several images read each other's, pruned or not; install transformers 5.18 or newer, or answer with one sequence a prompt."
)


def joined(scopes: Sequence[Scope]) -> Scope:
    """Join all images of a row into one scope: frames are numbered through, and the diagonal is that of the largest sides."""
    coords, first = [], 0
    for scope in scopes:
        own = scope.layout.coords.clone()
        own[:, 0] = torch.where(own[:, 1] < 0, own[:, 0], own[:, 0] + first)
        first = int(own[:, 0].max()) + 1
        coords.append(own)
    rows, cols = (max(sides) for sides in zip(*(scope.layout.grid for scope in scopes), strict=True))
    parts = tuple(part for scope in scopes for part in scope.parts)
    return Scope(torch.cat([scope.positions for scope in scopes]), Layout(torch.cat(coords), (rows, cols)), parts)


def assign(is_token: Tensor, layouts: Sequence[Layout], kind: str) -> list[list[Scope]]:
    """Give the placeholder tokens of a batch to its images (or videos), row by row, by count.

    Parameters
    ----------
    is_token : Tensor [B, L] bool
        On the CPU.

    Raises
    ------
    PruningError
        Placeholder tokens that do not match the encoded images.
    """
    n_tokens, n_features = int(is_token.sum()), sum(layout.n_tokens for layout in layouts)
    copies, rest = divmod(n_tokens, max(1, n_features))
    if rest or not copies or len(is_token) % copies:
        raise PruningError(
            f"The prompt holds {n_tokens} {kind} tokens, but the encoded {kind}s make {n_features} "
            f"({len(layouts)} {kind}s); build the prompt with the checkpoint's own processor."
        )
    rows: list[list[Scope]] = []
    queue = iter(enumerate(layouts))
    for first in range(0, len(is_token), copies):
        left = is_token[first].nonzero()[:, 0]
        found: list[Scope] = []
        while len(left):
            number, layout = next(queue, (0, None))
            if layout is None or layout.n_tokens > len(left):
                raise PruningError(
                    f"The {kind} tokens of row {first} do not line up with whole {kind}s: {len(left)} tokens are left over."
                    + (f" {SINGLY}" if hf_compat.REPEATS_IMAGES_SINGLY else "")
                )
            found.append(Scope(left[: layout.n_tokens], layout, (Part(kind, number),)))
            left = left[layout.n_tokens :]
        rows.extend([found] * copies)
    return rows
