"""One prefill, row by row: what a pruner gets to see at each stage, what it chose, and the proof that it was done.

Where tokens are is kept in the memory of the host, and sent to the device when something there is gathered: on a GPU only the
methods' answers are waited for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm_pruner_eval.batch_rows import Alive, Row, batch_rows
from vlm_pruner_eval.cut import Cut, CutState, take
from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.probe import Probe
from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.pruners.token_checks import check_selection
from vlm_pruner_eval.refusals import refuse_read_positions
from vlm_pruner_eval.timing import Span
from vlm_pruner_eval.types import Selection, Stage, TextTokens, VisualTokens
from vlm_pruner_eval.vlms.family import Family, Scope


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
    labels : Tensor [B, L] or None
        Of a loss: it is read off the positions before them.
    n_prompt
        Length of the prompt; None: L. Methods don't see what follows in the same forward (without a cache, or in assisted decoding).
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
        labels: Tensor | None = None,
        n_prompt: int | None = None,
    ):
        self.pruner, self.family, self.text, self.probes, self.contiguous = pruner, family, text, probes, contiguous
        self.stages = {stage.layer: stage for stage in stages}
        self.length, self.n_layers = input_ids.shape[1], len(text.layers)
        self.cache: object | None = None
        self.seen: dict[int, int] = {}
        self.ran: set[int] = set()  # layers of the stages that have run
        self.labels = labels
        per_sample = pruner.scope == "per_sample"
        self.rows = batch_rows(input_ids, attended, scopes, sample_ids, per_sample=per_sample, n_prompt=n_prompt or self.length)

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
        self.ran.add(stage.layer)
        if lengths == [sum(len(alive.local) for alive in row.scopes) for row in self.rows]:
            return hidden  # nothing was dropped: leave the model exactly as it was
        if merged:
            hidden = hidden.clone()
            for b, slots, states in merged:
                hidden[b, slots] = states
        rows = [row.positions() for row in self.rows]
        cut = Cut.of_rows(rows, layer=stage.layer, length=self.length, contiguous=self.contiguous)
        self._refuse_read_positions(cut)
        state.cuts.append(cut)
        index = cut.on(hidden.device)[0] if before is None else before.gather_index(cut)
        return take(hidden, index)

    def _refuse_read_positions(self, cut: Cut) -> None:
        is_visual = torch.zeros(len(self.rows), self.length, dtype=torch.bool)
        for b, row in enumerate(self.rows):
            for alive in row.scopes:
                is_visual[b, alive.scope.positions] = True
        read = [(row.end, int(row.present[-1])) if len(row.present) else () for row in self.rows]
        refuse_read_positions(cut, read, self.labels, is_visual, [row.sample_id for row in self.rows])

    def _select_all(self, stage: Stage, hidden: Tensor, before: Cut | None, probe: Probe | None) -> list[tuple[int, Tensor, Tensor]]:
        """Run the method on all scopes at once; returns (row, slots, new states) where it merged."""
        # what there is to choose from
        asked: list[tuple[_RowView, Alive]] = []
        tokens = []
        for b, row in enumerate(self.rows):
            view = _RowView(self, b, row, hidden, before, probe)
            for s, alive in enumerate(row.scopes):
                alive.asked = min(len(alive.local), self.family.keep(self.pruner, stage, len(alive.scope.positions), s))
                if alive.asked < len(alive.local):
                    asked.append((view, alive))
                    tokens.append(view.tokens(alive, f"{row.sample_id}/{s}"))
        if not asked:
            return []
        # the choice
        span = Span(hidden.device)
        selections = self.pruner.select_batch(tokens, [alive.asked for _, alive in asked])
        span.stop()
        # what it means for each row
        merged = []
        for (view, alive), given, selection in zip(asked, tokens, selections, strict=True):
            order = self._check(selection, given, alive.asked) if self._replaced else selection.host_order
            view.row.spans.append((span, 1 / len(asked)))
            view.row.quirks |= selection.quirks
            alive.order = alive.local[order]
            alive.local = alive.order.sort().values
            if selection.hidden_states is not None:
                merged.append((view.b, view.slots(alive.scope.positions[alive.local]), selection.hidden_states))
        return merged

    @property
    def _replaced(self) -> bool:
        """True of a method that has a `select` of its own, which checks nothing."""
        own = type(self.pruner)
        return own.select is not Pruner.select or own.select_batch is not Pruner.select_batch

    def _check(self, selection: Selection, tokens: VisualTokens, asked: int) -> Tensor:
        """The order [R] of a method that replaced `select`, and its check with it, in the memory of the host."""
        where = f"method {self.pruner.name}, sample {tokens.sample_id!r}"
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
        """Bytes of the keys and values in the cache, all rows and layers; None without one, or if it does not hold plain tensors."""
        layers = getattr(self.cache, "layers", None)
        if not layers or not all(_is_plain(layer) for layer in layers):
            return None
        return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))

    def verify(self, state: CutState) -> None:
        """Compare what the tensors hold with what was asked.

        Raises
        ------
        PruningError
            A layer holds another number of tokens than it should, or a row kept another number than was asked.
        """
        if missed := sorted(set(self.stages) - self.ran):
            raise PruningError(
                f"prune: the stage in front of decoder layer {missed[0]} never ran, expected it in every prefill: something runs this "
                "layer past its hooks (replaced, traced or compiled code), so this prompt was not pruned."
            )
        self.measured = self.lengths(state)
        self.measured_bytes = self.cache_bytes()
        first = min(self.stages, default=self.n_layers)
        for i, length in enumerate(self.measured):
            cut = state.at(i)
            expected = cut.width if cut else self.length
            entered = self.seen.get(i, None if i >= first else expected)
            if length != expected or entered != expected:
                raise PruningError(
                    f"prune: decoder layer {i} holds {length} tokens after prefill (its input had {self.seen.get(i, 'not been seen')}), "
                    f"expected {expected}: something else changed the sequence or the cache, so this prompt was not pruned as asked."
                )
        for b, row in enumerate(self.rows):
            kept = sum(len(alive.local) for alive in row.scopes)
            asked = self._asked(row)
            if kept != asked and self._exact:
                raise PruningError(f"prune: row {b} (sample {row.sample_id!r}) kept {kept} visual tokens, expected {asked}.")

    def _asked(self, row: Row) -> int:
        """Visual tokens that a row was to keep: all of them where no stage is asked for."""
        return sum(alive.asked if self.stages else len(alive.local) for alive in row.scopes)

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
            n_asked=self._asked(row),
            n_kept=len(held[-1]),
            n_images=len(row.layouts),
            layer=min(self.stages) if self.stages else None,
            kept_positions=held[-1].tolist(),
            order=[offset + i for offset, alive in zip(offsets, row.scopes, strict=False) for i in alive.order.tolist()],
            kv_lengths=[length - (width - n) for length, width, n in zip(self.measured, widths, valid, strict=True)],
            visual_lengths=[len(positions) for positions in held],
            quirks=frozenset(row.quirks),
            selection_ms=sum(span.ms * share for span, share in row.spans),
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
        positions = self.row.text[(self.row.text > end) & (self.row.text <= self.row.end)]
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
        slots = self.slots(present[present <= self.row.end])
        last = self.row.end if self.before is None else int(self.before.slots_of(self.b, torch.tensor([self.row.end])))
        return self.probe.attention_row(self.b, last, slots)


def _common(positions: Tensor, visual: Tensor) -> Tensor:
    return positions[torch.isin(positions, visual)]


def _is_plain(layer: object) -> bool:
    """Return True for a layer of a cache whose tensors are its keys and values [B, H_kv, n, d], all of them and nothing else."""
    keys = getattr(layer, "keys", None)
    return isinstance(keys, Tensor) and keys.dim() == 4 and keys.shape[-2] == layer.get_seq_length()
