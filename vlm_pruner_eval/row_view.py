"""One row of a batch as a method sees it at one stage."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from vlm_pruner_eval.batch_rows import Alive, Row
from vlm_pruner_eval.clip_text import embedded
from vlm_pruner_eval.cut import Cut
from vlm_pruner_eval.probe import Probe, own_attention
from vlm_pruner_eval.types import QuestionTokens, TextTokens, VisionTokens, VisualTokens
from vlm_pruner_eval.vision_probe import VisionProbe, looks_at_vision
from vlm_pruner_eval.vlms.family import Family

Rope = tuple[Tensor, Tensor]  # cos and sin of the present sequence


@dataclass
class RowView:
    """One row as the methods see it at one stage."""

    family: Family
    text: nn.Module
    embeds: Tensor | None
    vision: VisionProbe | None
    b: int
    row: Row
    layer: int
    hidden: Tensor
    before: Cut | None
    probe: Probe | None
    rope: Rope
    contiguous: bool

    def slots(self, positions: Tensor) -> Tensor:
        """Where ascending `positions` [n] of the row stand in the current sequence, on the device of this layer."""
        return self._there(positions if self.before is None else self.before.slots_of(self.b, positions))

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.hidden.device, non_blocking=True)

    def tokens(self, alive: Alive, sample_id: str) -> VisualTokens:
        """The VisualTokens of one scope, with the fields that the method needs and no others."""
        needs = self.row.pruner.needs_now(alive.n_stages, alive.memory)
        positions = alive.scope.positions[alive.local]
        end = int(alive.scope.positions[-1])
        slots = self.slots(positions)
        hidden, layout = self.hidden[self.b, slots], alive.scope.layout
        if self.row.pruner.official_quirks:
            layout = self.family.release_layout(layout)
        return VisualTokens(
            hidden,
            grid=layout.grid,
            coords=self._there(layout.coords[alive.local]),
            keys=self._keys(slots) if "keys" in needs else None,
            attention=self._attention[slots] if "attention" in needs else None,
            normed_hidden_states=self._normed(hidden) if "normed_hidden_states" in needs else None,
            positions=self._there(positions - self.row.padding),
            text=self._text(end, needs) if "text" in needs else None,
            vision=self._of_tower(alive, hidden) if looks_at_vision(needs) else None,
            question=self._question(alive, positions, end, needs),
            own_attention=self._own_attention[slots] if "own_attention" in needs else None,
            text_attention=self._text_attention(slots, end) if "text_attention" in needs else None,
            ids=self._there(alive.local),
            n_original=len(alive.scope.positions),
            stage=alive.n_stages,
            memory=alive.memory,
            sample_id=sample_id,
            contiguous=self.contiguous,
            is_video=any(part.kind == "video" for part in alive.scope.parts),
            image=f"{self.b}/{[(part.kind, part.number) for part in alive.scope.parts]}",
        )

    def _of_tower(self, alive: Alive, hidden: Tensor) -> VisionTokens:
        of_all = self.vision.tokens(alive.scope.parts, hidden)
        return of_all if len(alive.local) == len(alive.scope.positions) else _of_tokens(of_all, self._there(alive.local))

    def _question(self, alive: Alive, positions: Tensor, end: int, needs: frozenset[str]) -> QuestionTokens | None:
        if "question.clip" in needs:
            states = self._of_tower(alive, self.hidden).states
            return embedded(states, self.row.question, self.row.pruner.text_tower, whole=self.row.pruner.reads_whole_prompt)
        if "question.embeddings" not in needs:
            return None
        embeds = self.embeds[self.b]
        image, text = (of.to(embeds.device, non_blocking=True) for of in (positions, self._text_positions(end)))
        return QuestionTokens(embeds[image], embeds[text])

    def _text_positions(self, end: int) -> Tensor:
        """Positions of the text behind the image that ends at `end`."""
        return self.row.text[(self.row.text > end) & (self.row.text <= self.row.end)]

    def _text(self, end: int, needs: frozenset[str]) -> TextTokens:
        positions = self._text_positions(end)
        slots = self.slots(positions)
        return TextTokens(
            normed_hidden_states=self._normed(self.hidden[self.b, slots]) if "normed_hidden_states" in needs else None,
            keys=self._keys(slots) if "keys" in needs else None,
            positions=self._there(positions - self.row.padding),
        )

    def _keys(self, slots: Tensor) -> Tensor:
        return self.probe.keys()[self._probed, :, slots].transpose(0, 1)

    @property
    def _probed(self) -> int:
        """Row of the probe: under a shared prefix it saw the prompts once, whatever the number of methods."""
        return self.b % self.probe.n_rows

    def _normed(self, hidden: Tensor) -> Tensor:
        return self.text.norm.forward(hidden)  # not called as a module: our own hook sits on it

    @functools.cached_property
    def _seen(self) -> Tensor:
        """Slots [n] that the last prompt token may look at, which is the last of them, on the CPU."""
        present = self.row.present if self.before is None else self.before.positions_of(self.b)
        asked = present[present <= self.row.end]
        return asked if self.before is None else self.before.slots_of(self.b, asked)

    @functools.cached_property
    def _attention(self) -> Tensor:
        return self.probe.attention_row(self._probed, int(self._seen[-1]), self._there(self._seen))

    @functools.cached_property
    def _own_attention(self) -> Tensor:
        rope = tuple(x if x.shape[-3] == 1 else x[..., self.b : self.b + 1, :, :] for x in self.rope)
        seen = self._there(self._seen)
        weights = own_attention(self.text.layers[self.layer], self.hidden[self.b, seen], *(x[..., seen, :] for x in rope))
        return weights.new_zeros(self.hidden.shape[1]).index_copy(0, seen, weights)

    def _text_attention(self, slots: Tensor, end: int) -> Callable[[Tensor | None], Tensor]:
        of_text = self.slots(self._text_positions(end))

        def rows(numbers: Tensor | None = None) -> Tensor:
            queries = of_text if numbers is None else of_text[numbers.to(of_text.device)]
            return self.probe.attention_rows(self._probed, queries, self._there(self._seen))[:, slots]

        return rows


def _of_tokens(vision: VisionTokens, local: Tensor) -> VisionTokens:
    """The same of some tokens [n] of the scope only."""

    def of(values: Mapping[int, Tensor], axis: int = 0) -> dict[int, Tensor]:
        return {layer: value.index_select(axis, local) for layer, value in values.items()}

    return dataclasses.replace(
        vision,
        states=None if vision.states is None else vision.states[local],
        cls_attention=of(vision.cls_attention, 1),
        received_attention=of(vision.received_attention),
        keys=of(vision.keys),
    )
