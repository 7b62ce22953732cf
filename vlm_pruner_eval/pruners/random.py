"""Random selection: the control without which a table of pruning methods proves nothing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Random(Pruner):
    """R tokens drawn uniformly without replacement.

    The draw depends on `seed`, the sample's identity and V only: not on the batch, the process or the device, and it
    leaves the global random state alone. Samples without a `sample_id` share one draw.

    Parameters
    ----------
    seed
        Any whole number; paper tables take five.
    """

    name: ClassVar[str] = "random"
    checks_late: ClassVar[bool] = True

    seed: int = 0

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        """The first R of a seeded permutation."""
        generator = torch.Generator(device="cpu").manual_seed(stable_seed(self.seed, tokens.sample_id))
        return torch.randperm(tokens.n_visual, generator=generator)[:keep]


def stable_seed(seed: int, sample_id: str | None) -> int:
    """63 bits of SHA-256 over (seed, sample_id): the same in every process, unlike Python's own hash."""
    digest = hashlib.sha256(repr((seed, sample_id)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
