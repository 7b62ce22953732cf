"""One prefill, row by row: what a pruner gets to see at each stage, what it chose, and the proof that it was done.

Where tokens are is kept in the memory of the host, and sent to the device when something there is gathered: on a GPU only the
methods' answers are waited for.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vlm_pruner_eval.batch_rows import Alive, Row, batch_rows
from vlm_pruner_eval.cut import Cut, CutState, take
from vlm_pruner_eval.device_copy import to_host
from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.probe import Probe
from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.pruners.token_checks import check_selection
from vlm_pruner_eval.refusals import refuse_read_positions
from vlm_pruner_eval.row_view import Rope, RowView
from vlm_pruner_eval.timing import Span
from vlm_pruner_eval.types import Selection, Stage, VisualTokens
from vlm_pruner_eval.vision_probe import VisionProbe
from vlm_pruner_eval.vlms.family import Family, Scope


class Prefill:
    """The state of one prefill between the language model's first layer and its last.

    Parameters
    ----------
    methods
        Pruners with their stages; of several, the batch holds the same prompts once for each.
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
    embeds : Tensor [B, L, D] or None
        Input of the language model.
    vision
        What the vision tower was seen to do, for methods that look at it.
    questions
        One per prompt, for methods with a text tower.
    side
        Tokens along a tile of the vision tower.
    """

    def __init__(
        self,
        *,
        methods: Sequence[tuple[Pruner, Sequence[Stage]]],
        family: Family,
        text: nn.Module,
        probes: Mapping[int, Probe],
        input_ids: Tensor,
        attended: Tensor,
        scopes: list[list[Scope]],
        sample_ids: Sequence[str] | None,
        contiguous: bool,
        labels: Tensor | None = None,
        n_prompt: int | None = None,
        embeds: Tensor | None = None,
        vision: VisionProbe | None = None,
        questions: Sequence[str] | None = None,
        side: int | None = None,
    ):
        self.family, self.text, self.probes, self.contiguous = family, text, probes, contiguous
        self.n_methods = len(methods)
        self.stages = sorted({stage.layer for _, stages in methods for stage in stages})  # layers
        self.length, self.n_layers = input_ids.shape[1], len(text.layers)
        self.cache: object | None = None
        self.seen: dict[int, int] = {}
        self.ran: set[int] = set()  # layers of the stages that have run
        self.labels, self.embeds, self.vision = labels, embeds, vision
        n_prompt = n_prompt or self.length
        self.rows = batch_rows(input_ids, attended, scopes, sample_ids, methods=methods, n_prompt=n_prompt, side=side, questions=questions)

    # ---- cutting
    def enter_layer(self, i: int, hidden: Tensor, state: CutState, rope: Rope) -> Tensor:
        """Cut `hidden` [B, L, D] if a stage begins at layer `i`; note how long the layer's input really is."""
        if i in self.stages:
            hidden = self._cut(i, hidden, state, rope)
        self.seen[i] = hidden.shape[1]
        return hidden

    def _cut(self, layer: int, hidden: Tensor, state: CutState, rope: Rope) -> Tensor:
        before, probe = state.at(layer), self.probes.get(layer)
        lengths = [sum(len(alive.local) for alive in row.scopes) for row in self.rows]
        with torch.no_grad():  # a choice has no gradient; the gather below has one
            merged = self._select_all(layer, hidden, before, probe, rope)
        if probe is not None:
            probe.clear()
        self.ran.add(layer)
        if merged:
            hidden = hidden.clone()
            for b, slots, states in merged:
                hidden[b, slots] = states
        if lengths == [sum(len(alive.local) for alive in row.scopes) for row in self.rows]:
            return hidden  # nothing was dropped, in any row
        rows = [row.positions() for row in self.rows]
        cut = Cut.of_rows(rows, layer=layer, length=self.length, contiguous=self.contiguous)
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

    def _select_all(
        self, layer: int, hidden: Tensor, before: Cut | None, probe: Probe | None, rope: Rope
    ) -> list[tuple[int, Tensor, Tensor]]:
        """Run each method on its rows; returns (row, slots, new states) where it merged."""
        merged = []
        for _, rows in itertools.groupby(enumerate(self.rows), key=lambda item: id(item[1].pruner)):
            views = [
                RowView(self.family, self.text, self.embeds, self.vision, b, row, layer, hidden, before, probe, rope, self.contiguous)
                for b, row in rows
            ]
            if layer in views[0].row.stages:
                merged += self._select(layer, views)
        return merged

    def _select(self, layer: int, views: Sequence[RowView]) -> list[tuple[int, Tensor, Tensor]]:
        """Run the method of these rows on all their scopes at once."""
        # what there is to choose from
        pruner = views[0].row.pruner
        asked: list[tuple[RowView, Alive]] = []
        tokens = []
        for view in views:
            chosen = [(s, alive) for s, alive in enumerate(view.row.scopes) if not alive.is_between]
            n_before = len(asked)
            for s, alive in chosen:
                n_scope = len(alive.scope.positions)
                stage = view.row.stages[layer]
                alive.asked = self.family.keep(pruner, stage, n_scope, s)
                if not pruner.decides_count():
                    alive.asked = min(len(alive.local), alive.asked)
                if alive.asked < len(alive.local) or (stage.share != 1 and len(alive.local) and pruner.decides_count()):
                    asked.append((view, alive))
                    tokens.append(view.tokens(alive, f"{view.row.sample_id}/{s}"))
                alive.n_stages += 1
            for alive in view.row.scopes:
                if alive.is_between:
                    alive.follow(is_cut=len(asked) > n_before)
        if not asked:
            return []
        # the choice
        span = Span(views[0].hidden.device)
        selections = pruner.select_batch(tokens, [min(len(alive.local), alive.asked) for _, alive in asked])
        span.stop()
        # what it means for each row
        merged = []
        for (view, alive), given, selection in zip(asked, tokens, selections, strict=True):
            order = _checked_order(view.row, selection, given, alive.asked) if _replaces_select(pruner) else selection.host_order
            view.row.spans.append((span, 1 / len(asked)))
            view.row.quirks |= selection.quirks
            if selection.merged is not None:
                alive.merged = torch.cat([alive.merged, alive.local[to_host(selection.merged)[0]]]).unique()
            alive.order = alive.local[order]
            alive.local = alive.order.sort().values
            alive.merged = _common(alive.merged, alive.local)
            if selection.hidden_states is not None:
                merged.append((view.b, view.slots(alive.scope.positions[alive.local]), selection.hidden_states))
        return merged

    # ---- proving
    def lengths(self, state: CutState) -> list[int]:
        """Tokens that each decoder layer holds, read from the cache (without one: from the layers' inputs)."""
        layers = getattr(self.cache, "layers", None)
        if layers is not None and len(layers) == self.n_layers:
            return [layer.get_seq_length() for layer in layers]
        return [self.seen.get(i, self.length) for i in range(self.n_layers)]

    def slot_bytes(self) -> list[int] | None:
        """Bytes of a slot's keys and values in each layer's cache; None without one, or if it does not hold plain tensors."""
        layers = getattr(self.cache, "layers", None)
        if not layers or not all(_is_plain(layer) for layer in layers):
            return None
        return [(layer.keys[:1, :, :1].nbytes + layer.values[:1, :, :1].nbytes) for layer in layers]

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
        self.measured_bytes = self.slot_bytes()
        first = min(self.stages, default=self.n_layers)
        for i, length in enumerate(self.measured):
            cut = state.at(i)
            expected = cut.width if cut else self.length
            entered = self.seen.get(i, expected if i < first or self.cache is not None else None)
            if length != expected or entered != expected:
                raise PruningError(
                    f"prune: decoder layer {i} holds {length} tokens after prefill (its input had {self.seen.get(i, 'not been seen')}), "
                    f"expected {expected}: something else changed the sequence or the cache, so this prompt was not pruned as asked."
                )
        for b, row in enumerate(self.rows):
            kept = sum(len(alive.local) for alive in row.scopes)
            if kept != row.n_asked and row.is_exact:
                raise PruningError(f"prune: row {b} (sample {row.sample_id!r}) kept {kept} visual tokens, expected {row.n_asked}.")

    def records(self, state: CutState) -> list[SampleRecord]:
        """One record per row."""
        return [self._record(b, row, state) for b, row in enumerate(self.rows)]

    def _record(self, b: int, row: Row, state: CutState) -> SampleRecord:
        visual = torch.cat([alive.scope.positions for alive in row.scopes]).sort().values if row.scopes else row.text[:0]
        ordered = [torch.searchsorted(visual, alive.scope.positions[alive.order]) for alive in row.scopes]
        held = [visual if (cut := state.at(i)) is None else _common(cut.positions_of(b), visual) for i in range(self.n_layers)]
        n_row = len(row.text) + len(visual)
        valid = [n_row if (cut := state.at(i)) is None else len(cut.positions_of(b)) for i in range(self.n_layers)]
        widths = [self.length if (cut := state.at(i)) is None else cut.width for i in range(self.n_layers)]
        return SampleRecord(
            row=b % (len(self.rows) // self.n_methods),
            n_visual=len(visual),
            n_asked=row.n_asked,
            n_kept=len(held[-1]),
            n_images=len(row.layouts),
            layer=min(row.stages, default=None),
            kept_positions=held[-1].tolist(),
            order=torch.cat(ordered).tolist() if ordered else [],
            n_merged=sum(len(alive.merged) for alive in row.scopes),
            kv_lengths=[length - (width - n) for length, width, n in zip(self.measured, widths, valid, strict=True)],
            visual_lengths=[len(positions) for positions in held],
            quirks=frozenset(row.quirks),
            selection_ms=sum(span.ms * share for span, share in row.spans),
            sample_id=row.sample_id,
            scope=row.pruner.scope,
            layouts=row.layouts,
            kv_bytes=self._bytes_of(b, state),
        )

    def _bytes_of(self, b: int, state: CutState) -> int | None:
        """Bytes of row `b` in the cache, with the fillers that the prompts of its method make."""
        if self.measured_bytes is None:
            return None
        n = len(self.rows) // self.n_methods
        start = b // n * n
        cuts = [state.at(i) for i in range(self.n_layers)]
        widths = [self.length if cut is None else int(cut.valid[start : start + n].sum(1).max()) for cut in cuts]
        return sum(size * width for size, width in zip(self.measured_bytes, widths, strict=True))


def _replaces_select(pruner: Pruner) -> bool:
    """Return True for a method that has a `select` of its own, which checks nothing."""
    own = type(pruner)
    return own.select is not Pruner.select or own.select_batch is not Pruner.select_batch


def _checked_order(row: Row, selection: Selection, tokens: VisualTokens, asked: int) -> Tensor:
    """Order [R] of a method that replaced `select`, and its check with it, on the CPU."""
    where = f"method {row.pruner.name}, sample {tokens.sample_id!r}"
    if not isinstance(selection, Selection):
        raise PruningError(f"{where}: select returned {type(selection).__name__}, expected a Selection.")
    return check_selection(selection, tokens, asked, where=where, exact=row.is_exact)


def _common(positions: Tensor, visual: Tensor) -> Tensor:
    return positions[torch.isin(positions, visual)]


def _is_plain(layer: object) -> bool:
    """Return True for a layer of a cache whose tensors are its keys and values [B, H_kv, n, d], all of them and nothing else."""
    keys = getattr(layer, "keys", None)
    return isinstance(keys, Tensor) and keys.dim() == 4 and keys.shape[-2] == layer.get_seq_length()
