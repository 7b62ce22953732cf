"""The papers whose printed numbers are there: how each counts tokens and asks its models. results/paper/README.md says the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_pruner_eval.sweep.config import PAPERS as NAMES

DEFAULT = NAMES[0]
_BEFORE = "methods that act before the language model keep it in every layer"
_AVERAGED: Mapping[str, Mapping[str, Any]] = {"fastv": {"budget": "layer_average"}}


@dataclass(frozen=True)
class Paper:
    """A source of printed numbers.

    Attributes
    ----------
    name
        Beginning of the column `paper` of its file.
    reference
        The place where it was published.
    tokens
        Meaning of its token counts, a sentence.
    by_lmms_eval
        True if the models were asked by lmms-eval, False if by LLaVA's own scripts.
    settings
        By method: parameters that differ from our defaults in the rows that it prints.
    notes
        Other differences to what a sweep of ours does, a sentence each.
    """

    name: str
    reference: str
    tokens: str
    by_lmms_eval: bool = False
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name and reference."""
        return f"{self.name} ({self.reference})"


_LISTED = (
    Paper("VLM-Pruner", "arXiv 2512.02700, CVPR 2026", f"64 tokens are kept from decoder layer 2 on; {_BEFORE}."),
    Paper(
        "DART",
        "arXiv 2502.11494, EMNLP 2025",
        "64 tokens are kept from decoder layer 2 on; rows taken from SparseVLM's table have them on average over the layers.",
        settings=_AVERAGED,
        notes=("The average has VQAv2 and VizWiz, which a server scores, so ours is not held against it.",),
    ),
    Paper(
        "SparseVLM",
        "arXiv 2410.04417, ICML 2025",
        "64 tokens are the average over the decoder layers.",
        settings=_AVERAGED,
        notes=("SEED is the accuracy over images and videos; ours over images, so the two are not held against each other.",),
    ),
    Paper(
        "DivPrune",
        "arXiv 2503.02175, CVPR 2025",
        "FLOPs are printed instead of counts, and FastV was matched to them; DivPrune keeps 9.8 % of LLaVA-1.5-7B's tokens in every layer.",
        by_lmms_eval=True,
        notes=("MME is perception alone; ours is perception + cognition, so the two are not held against each other.",),
    ),
    Paper(
        "CDPruner",
        "arXiv 2506.10967, NeurIPS 2025",
        f"64 tokens: {_BEFORE}; the scripts of the others were not released, so their counts may be averages over the layers.",
        notes=("MME is perception alone; ours is perception + cognition, so the two are not held against each other.",),
    ),
    Paper(
        "ZOO-Prune",
        "arXiv 2509.24837, CVPR 2026",
        f"64 tokens: {_BEFORE}; FastV's rows are DART's. LLaVA-NeXT has 2,880 tokens in five views, of which 640 or 320 are kept.",
        by_lmms_eval=True,
        settings=_AVERAGED,
        notes=(
            "The unpruned row of LLaVA-1.5-7B is a copy of DART's, which LLaVA's scripts made; the script of this paper runs lmms-eval.",
        ),
    ),
    Paper(
        "FastV",
        "lmms-eval table in the repository of arXiv 2403.06764",
        "K=3 and R=50% keep 288 of 576 tokens from decoder layer 3 on.",
        by_lmms_eval=True,
        settings={"fastv": {"layer": 3}},
        notes=("MME stands there in two parts, which are not held against our sum; SEED seems to be over images and videos.",),
    ),
)
PAPERS = dict(zip(NAMES, _LISTED, strict=True))
