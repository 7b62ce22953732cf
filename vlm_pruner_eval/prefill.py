"""One prefill, row by row: what a pruner gets to see at each stage, what it chose, and the proof that it was done.

Where tokens are is kept in the memory of the host, and sent to the device when something there is gathered: on a GPU only the
methods' answers are waited for.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vlm_pruner_eval.cut import Cut, CutState, take
from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.probe import Probe
from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.pruners.checks import check_selection
from vlm_pruner_eval.timing import Span
from vlm_pruner_eval.types import Selection, Stage, TextTokens, VisualTokens
from vlm_pruner_eval.vlms.base import Family, Scope, joined


@dataclass
class Alive:
    """What is left of one scope after the stages so far.

    Attributes
    ----------
    local : Tensor [n] int64
        Ascending indices into the scope's tokens.
    order : Tensor [n] int64
        The same in selection order.
    """

    scope: Scope
    local: Tensor
    order: Tensor
    asked: int


@dataclass
class Row:
    """One row of the batch. `present` [n]: attended positions; `text`: those that are not visual; `layouts`: one per image."""

    sample_id: str
    present: Tensor
    text: Tensor
    layouts: list[list[int]]
    scopes: list[Alive]
    quirks: set[str] = field(default_factory=set)
    spans: list[Span] = field(default_factory=list)

    @property
    def padding(self) -> int:
        """Padding before the first attended token."""
        return int(self.present[0])

    def positions(self) -> Tensor:
        """Ascending positions [n] in the row of input_ids that are still there."""
        kept = [alive.scope.positions[alive.local] for alive in self.scopes]
        return torch.cat([self.text, *kept]).sort().values


class Prefill:
    """The state of one prefill between the language model's first layer and its last.

    Parameters
    ----------
    input_ids : Tensor [B, L]
        In the memory of the host, as the next one and the positions of `scopes`.
    attended : Tensor [B, L] bool
        False = padding.
    scopes
        Images of every row, in prompt order.
    sample_ids
        One per prompt; beams and returned sequences share their prompt's. None: a digest of each prompt.
    """

    def __init__(
        self,
        *,
        pruner: Pruner,
        family: Family,
        text: nn.Module,
        stages: Sequence[Stage],
        probes: Mapping[int, Probe],
        input_ids: Tensor,
        attended: Tensor,
        scopes: list[list[Scope]],
        sample_ids: Sequence[str] | None,
        contiguous: bool,
    ):
        self.pruner, self.family, self.text, self.probes, self.contiguous = pruner, family, text, probes, contiguous
        self.stages = {stage.layer: stage for stage in stages}
        self.length, self.n_layers = input_ids.shape[1], len(text.layers)
        self.cache: object | None = None
        self.seen: dict[int, int] = {}
        self.rows = _rows(input_ids, attended, scopes, sample_ids, per_sample=pruner.scope == "per_sample")

    # ---- cutting
    def enter_layer(self, i: int, hidden: Tensor, state: CutState) -> Tensor:
        """Cut `hidden` [B, L, D] if a stage begins at layer `i`; note how long the layer's input really is."""
        if i in self.stages:
            hidden = self._cut(self.stages[i], hidden, state)
        self.seen[i] = hidden.shape[1]
        return hidden

    def _cut(self, stage: Stage, hidden: Tensor, state: CutState) -> Tensor:
        before, probe = state.at(stage.layer), self.probes.get(stage.layer)
        lengths = [sum(len(alive.local) for alive in row.scopes) for row in self.rows]
        with torch.no_grad():  # a choice has no gradient; the gather below has one
            merged = self._select_all(stage, hidden, before, probe)
        if probe is not None:
            probe.clear()
        if lengths == [sum(len(alive.local) for alive in row.scopes) for row in self.rows]:
            return hidden  # nothing was dropped: leave the model exactly as it was
        if merged:
            hidden = hidden.clone()
            for b, slots, states in merged:
                hidden[b, slots] = states
        rows = [row.positions() for row in self.rows]
        cut = Cut.of_rows(rows, layer=stage.layer, length=self.length, contiguous=self.contiguous)
        state.cuts.append(cut)
        index = cut.on(hidden.device)[0] if before is None else before.gather_index(cut)
        return take(hidden, index)

    def _select_all(self, stage: Stage, hidden: Tensor, before: Cut | None, probe: Probe | None) -> list[tuple[int, Tensor, Tensor]]:
        """Run the method on every scope; returns (row, slots, new states) where it merged."""
        merged = []
        for b, row in enumerate(self.rows):
            view = _RowView(self, b, row, hidden, before, probe)
            for s, alive in enumerate(row.scopes):
                states = self._select(stage, view, s, alive)
                if states is not None:
                    merged.append((b, view.slots(alive.scope.positions[alive.local]), states))
        return merged

    def _select(self, stage: Stage, view: _RowView, s: int, alive: Alive) -> Tensor | None:
        """Run the method on one scope; returns new states [n, D] of what is left, or None."""
        row, n_now = view.row, len(alive.local)
        alive.asked = min(n_now, self.family.keep(self.pruner, stage, len(alive.scope.positions), s))
        if alive.asked == n_now:
            return None
        sample_id = f"{row.sample_id}/{s}"
        tokens = view.tokens(alive, sample_id)
        span = Span(tokens.hidden_states.device)
        selection = self.pruner.select(tokens, alive.asked)
        row.spans.append(span.stop())
        replaced = type(self.pruner).select is not Pruner.select
        order = self._check(selection, tokens, alive.asked, sample_id) if replaced else selection.host_order
        row.quirks |= selection.quirks
        alive.order = alive.local[order]
        alive.local = alive.order.sort().values
        return selection.hidden_states

    def _check(self, selection: Selection, tokens: VisualTokens, asked: int, sample_id: str) -> Tensor:
        """The order [R] of a method that replaced `select`, and its check with it, in the memory of the host."""
        where = f"method {self.pruner.name}, sample {sample_id!r}"
        if not isinstance(selection, Selection):
            raise PruningError(f"{where}: select returned {type(selection).__name__}, expected a Selection.")
        return check_selection(selection, tokens, asked, where=where, exact=self._exact)

    @property
    def _exact(self) -> bool:
        return not (self.pruner.official_quirks and self.pruner.quirks_change_count)

    # ---- proving
    def lengths(self, state: CutState) -> list[int]:
        """Tokens that each decoder layer holds, read from the cache (without one: from the layers' inputs)."""
        layers = getattr(self.cache, "layers", None)
        if layers is not None and len(layers) == self.n_layers:
            return [layer.get_seq_length() for layer in layers]
        return [self.seen.get(i, self.length) for i in range(self.n_layers)]

    def cache_bytes(self) -> int | None:
        """Bytes of the keys and values that the cache holds, all rows and layers; None without a cache."""
        layers = getattr(self.cache, "layers", None)
        held = [getattr(layer, name, None) for layer in layers or () for name in ("keys", "values")]
        return sum(tensor.nbytes for tensor in held if tensor is not None) if held else None

    def verify(self, state: CutState) -> None:
        """Compare what the tensors hold with what was asked.

        Raises
        ------
        PruningError
            A layer holds another number of tokens than it should, or a row kept another number than was asked.
        """
        self.measured = self.lengths(state)
        self.measured_bytes = self.cache_bytes()
        for i, length in enumerate(self.measured):
            cut = state.at(i)
            expected = cut.width if cut else self.length
            if length != expected or self.seen.get(i, expected) != expected:
                raise PruningError(
                    f"prune: decoder layer {i} holds {length} tokens after prefill (its input had {self.seen.get(i, 'not been seen')}), "
                    f"expected {expected}: something else changed the sequence or the cache, so this prompt was not pruned as asked."
                )
        for b, row in enumerate(self.rows):
            kept, asked = sum(len(alive.local) for alive in row.scopes), sum(alive.asked for alive in row.scopes)
            if kept != asked and self._exact:
                raise PruningError(f"prune: row {b} (sample {row.sample_id!r}) kept {kept} visual tokens, expected {asked}.")

    def records(self, state: CutState) -> list[SampleRecord]:
        """One record per row."""
        return [self._record(b, row, state) for b, row in enumerate(self.rows)]

    def _record(self, b: int, row: Row, state: CutState) -> SampleRecord:
        visual = torch.cat([alive.scope.positions for alive in row.scopes]) if row.scopes else row.text[:0]
        held = [visual if (cut := state.at(i)) is None else _common(cut.positions_of(b), visual) for i in range(self.n_layers)]
        n_row = len(row.text) + len(visual)
        valid = [n_row if (cut := state.at(i)) is None else len(cut.positions_of(b)) for i in range(self.n_layers)]
        widths = [self.length if (cut := state.at(i)) is None else cut.width for i in range(self.n_layers)]
        offsets = torch.tensor([0, *(len(alive.scope.positions) for alive in row.scopes)]).cumsum(0).tolist()
        return SampleRecord(
            row=b,
            n_visual=len(visual),
            n_asked=sum(alive.asked for alive in row.scopes),
            n_kept=len(held[-1]),
            n_images=len(row.layouts),
            layer=min(self.stages) if self.stages else None,
            kept_positions=held[-1].tolist(),
            order=[offset + i for offset, alive in zip(offsets, row.scopes, strict=False) for i in alive.order.tolist()],
            kv_lengths=[length - (width - n) for length, width, n in zip(self.measured, widths, valid, strict=True)],
            visual_lengths=[len(positions) for positions in held],
            quirks=frozenset(row.quirks),
            selection_ms=sum(span.ms for span in row.spans),
            sample_id=row.sample_id,
            scope=self.pruner.scope,
            layouts=row.layouts,
            kv_bytes=None if self.measured_bytes is None else self.measured_bytes // len(self.rows),
        )


@dataclass
class _RowView:
    """One row as the methods see it at one stage."""

    prefill: Prefill
    b: int
    row: Row
    hidden: Tensor
    before: Cut | None
    probe: Probe | None

    def slots(self, positions: Tensor) -> Tensor:
        """Where ascending `positions` [n] of the row stand in the current sequence, on the device of this layer."""
        return self._there(positions if self.before is None else self.before.slots_of(self.b, positions))

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.hidden.device, non_blocking=True)

    def tokens(self, alive: Alive, sample_id: str) -> VisualTokens:
        """The VisualTokens of one scope, with the fields that the method needs and no others."""
        needs, positions = self.prefill.pruner.needs, alive.scope.positions[alive.local]
        slots = self.slots(positions)
        hidden, layout = self.hidden[self.b, slots], alive.scope.layout
        if self.prefill.pruner.official_quirks:
            layout = self.prefill.family.release_layout(layout)
        return VisualTokens(
            hidden,
            grid=layout.grid,
            coords=self._there(layout.coords[alive.local]),
            keys=self._keys(slots) if "keys" in needs else None,
            attention=self._attention[slots] if "attention" in needs else None,
            normed_hidden_states=self._normed(hidden) if "normed_hidden_states" in needs else None,
            positions=self._there(positions - self.row.padding),
            text=self._text(int(alive.scope.positions[-1])) if "text" in needs else None,
            sample_id=sample_id,
        )

    def _text(self, end: int) -> TextTokens:
        positions = self.row.text[self.row.text > end]
        slots, needs = self.slots(positions), self.prefill.pruner.needs
        return TextTokens(
            normed_hidden_states=self._normed(self.hidden[self.b, slots]) if "normed_hidden_states" in needs else None,
            keys=self._keys(slots) if "keys" in needs else None,
            positions=self._there(positions - self.row.padding),
        )

    def _keys(self, slots: Tensor) -> Tensor:
        return self.probe.keys()[self.b, :, slots].transpose(0, 1)

    def _normed(self, hidden: Tensor) -> Tensor:
        return self.prefill.text.norm.forward(hidden)  # not called as a module: our own hook sits on it

    @functools.cached_property
    def _attention(self) -> Tensor:
        present = self.row.present if self.before is None else self.before.positions_of(self.b)
        last = int(present[-1]) if self.before is None else self.before.width - 1  # cuts are right-aligned
        return self.probe.attention_row(self.b, last, self.slots(present))


def _common(positions: Tensor, visual: Tensor) -> Tensor:
    return positions[torch.isin(positions, visual)]


def _rows(
    input_ids: Tensor, attended: Tensor, scopes: list[list[Scope]], sample_ids: Sequence[str] | None, *, per_sample: bool
) -> list[Row]:
    if sample_ids is not None and (not sample_ids or len(input_ids) % len(sample_ids)):
        raise PruningError(f"prune: got {len(sample_ids)} sample_ids for a batch of {len(input_ids)} rows, expected one per prompt.")
    rows = []
    for b, found in enumerate(scopes):
        present = attended[b].nonzero()[:, 0]
        is_text = attended[b].clone()
        for scope in found:
            is_text[scope.positions] = False
        if sample_ids is None:
            sample_id = "prompt:" + hashlib.sha256(str(input_ids[b, present].tolist()).encode()).hexdigest()[:16]
        else:
            sample_id = sample_ids[b // (len(input_ids) // len(sample_ids))]
        budgets = [joined(found)] if per_sample and len(found) > 1 else found
        layouts = [list(scope.layout.shape) for scope in found]
        rows.append(Row(sample_id, present, is_text.nonzero()[:, 0], layouts, [_untouched(scope) for scope in budgets]))
    return rows


def _untouched(scope: Scope) -> Alive:
    everything = torch.arange(len(scope.positions), device=scope.positions.device)
    return Alive(scope, everything, everything, len(scope.positions))
