"""Rows of a batch while it is pruned: which visual tokens of each image are left, and which positions that makes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.timing import Span
from vlm_pruner_eval.types import Stage
from vlm_pruner_eval.vlms.parts.image_views import views_of
from vlm_pruner_eval.vlms.parts.layout import Layout, Scope
from vlm_pruner_eval.vlms.parts.scopes import joined


@dataclass
class Alive:
    """Tokens of one scope that are left after the stages so far.

    Attributes
    ----------
    local : Tensor [n] int64
        Ascending indices into the scope's tokens.
    order : Tensor [n] int64
        The same in selection order.
    asked
        Tokens that the stage that ran last was to keep; None as long as none has run.
    n_stages
        Stages that have run.
    merged : Tensor [m] int64
        Those of `local` that hold no token of the image any more, but a sum of several or a CLS token.
    memory
        What the method left for its next stage.
    is_between
        True of newline tokens that are in no view: they go when the first view is cut.
    """

    scope: Scope
    local: Tensor
    order: Tensor
    asked: int | None
    n_stages: int = 0
    merged: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    memory: dict[str, Any] = field(default_factory=dict)
    is_between: bool = False

    def follow(self, *, is_cut: bool) -> None:
        """Drop newline tokens if a view of the row is cut."""
        if is_cut:
            self.local = self.order = self.local[:0]
        self.asked = len(self.local)


@dataclass
class Row:
    """One row of the batch.

    Attributes
    ----------
    stages
        Cuts of the row's method, by layer.
    present, text : Tensor [n] int64
        Attended positions, and those of them that are not visual.
    end
        Position of the prompt's last token; -1 of a row of padding alone. What follows in the same forward was generated, or is a
        guess of assisted decoding, and methods don't see it.
    layouts
        One per image.
    question
        Of a person, without template, if it is known.
    spans
        Times of the choices for the whole batch, and the share of each that one scope of this row has in it.
    """

    sample_id: str
    pruner: Pruner
    stages: Mapping[int, Stage]
    present: Tensor
    text: Tensor
    end: int
    layouts: list[list[int]]
    scopes: list[Alive]
    question: str | None = None
    quirks: set[str] = field(default_factory=set)
    spans: list[tuple[Span, float]] = field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        """True if the method keeps as many tokens as it is asked for."""
        return not self.pruner.decides_count()

    @property
    def n_asked(self) -> int:
        """Visual tokens that were to be kept: all of them if no stage is asked for."""
        return sum(alive.asked if self.stages else len(alive.local) for alive in self.scopes)

    @property
    def padding(self) -> int:
        """Padding before the first attended token."""
        return int(self.present[0])

    def positions(self) -> Tensor:
        """Ascending positions [n] in the row of input_ids that are still there."""
        kept = [alive.scope.positions[alive.local] for alive in self.scopes]
        return torch.cat([self.text, *kept]).sort().values


def batch_rows(
    input_ids: Tensor,
    attended: Tensor,
    scopes: list[list[Scope]],
    sample_ids: Sequence[str] | None,
    *,
    methods: Sequence[tuple[Pruner, Sequence[Stage]]],
    n_prompt: int,
    side: int | None = None,
    questions: Sequence[str] | None = None,
) -> list[Row]:
    """Return the rows of a prompt batch before any stage.

    Parameters
    ----------
    input_ids : Tensor [B, L]
        On the CPU, as all positions here are.
    attended : Tensor [B, L] bool
        False = padding.
    scopes
        Images of every row, in prompt order.
    sample_ids
        One per prompt; None: a digest of each prompt.
    methods
        Pruners with their stages; of several, the batch holds the same prompts once for each.
    n_prompt
        Length of the prompt, at most L.
    side
        Tokens along a tile of the vision tower, for methods with a budget a view.
    questions
        One per prompt, as `sample_ids`.

    Raises
    ------
    PruningError
        Names or methods that do not fit the batch.
    """
    if len(input_ids) % len(methods):
        raise PruningError(f"prune: got {len(methods)} methods for a batch of {len(input_ids)} rows, expected the same prompts for each.")
    for name, given in (("sample_ids", sample_ids), ("questions", questions)):
        if given is not None and (not given or len(input_ids) % len(given)):
            raise PruningError(f"prune: got {len(given)} {name} for a batch of {len(input_ids)} rows, expected one per prompt.")
    rows = []
    for b, found in enumerate(scopes):
        present = attended[b].nonzero()[:, 0]
        asked = present[present < n_prompt]
        is_text = attended[b].clone()
        for scope in found:
            is_text[scope.positions] = False
        if sample_ids is None:
            sample_id = "prompt:" + hashlib.sha256(str(input_ids[b, asked].tolist()).encode()).hexdigest()[:16]
        else:
            sample_id = sample_ids[b // (len(input_ids) // len(sample_ids))]
        pruner, stages = methods[b // (len(input_ids) // len(methods))]
        budgets = [_untouched(scope) for scope in ([joined(found)] if pruner.scope == "per_sample" and len(found) > 1 else found)]
        if pruner.scope == "per_view":
            budgets = [alive for scope in found for alive in _views(scope, side)]
        layouts = [list(scope.layout.shape) for scope in found]
        rows.append(
            Row(
                sample_id,
                pruner,
                {stage.layer: stage for stage in stages},
                present,
                is_text.nonzero()[:, 0],
                int(asked[-1]) if len(asked) else -1,
                layouts,
                budgets,
                question=None if questions is None else questions[b // (len(input_ids) // len(questions))],
            )
        )
    return rows


def _untouched(scope: Scope, *, is_between: bool = False) -> Alive:
    everything = torch.arange(len(scope.positions), device=scope.positions.device)
    return Alive(scope, everything, everything, None, is_between=is_between)


def _views(scope: Scope, side: int | None) -> list[Alive]:
    """The views of an image, and behind them its newline tokens."""
    between = (scope.layout.coords[:, 1] < 0).nonzero()[:, 0]
    newlines = Scope(scope.positions[between], Layout(scope.layout.coords[between], scope.layout.grid))
    views = [_untouched(view) for view in views_of(scope, side=side)]
    return [*views, _untouched(newlines, is_between=True)] if len(between) else views
