"""The shortened sequence: which positions its slots hold, and the positions, masks and cache lengths that follow from it.

Rows that keep fewer tokens than others are right-aligned behind masked filler slots, and the prompt's own padding is
dropped: to Hugging Face the shortened batch is a left-padded batch again.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vlm_pruner_eval import hf_compat

STATE = "_vlm_pruner_eval_cut"  # attribute of a cache: the CutState of the prompt that it holds


@dataclass
class Cut:
    """The sequence that decoder layers from `layer` on see, until the next cut.

    Attributes
    ----------
    index : Tensor [B, L'] int64
        Position in the row of input_ids as passed; fillers hold 0. In the memory of the host, as the next one.
    valid : Tensor [B, L'] bool
        False = filler.
    length
        L, the length of the prompt as passed.
    contiguous
        Whether kept tokens are renumbered 0..n'-1.
    full
        Whether there is no filler.
    """

    layer: int
    index: Tensor
    valid: Tensor
    length: int
    contiguous: bool
    full: bool
    _copies: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_rows(cls, rows: list[Tensor], *, layer: int, length: int, contiguous: bool) -> Cut:
        """Right-align `rows` of ascending positions [n_b], which are in the memory of the host."""
        width = max(map(len, rows))
        index = torch.zeros(len(rows), width, dtype=torch.long)
        valid = torch.zeros(len(rows), width, dtype=torch.bool)
        for b, row in enumerate(rows):
            index[b, width - len(row) :] = row
            valid[b, width - len(row) :] = True
        return cls(layer, index, valid, length, contiguous, full=all(len(row) == width for row in rows))

    @property
    def width(self) -> int:
        """L', fillers included."""
        return self.index.shape[1]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`index` and `valid` on a device, copied there once, without a wait for it."""
        if device not in self._copies:
            self._copies[device] = self.index.to(device, non_blocking=True), self.valid.to(device, non_blocking=True)
        return self._copies[device]

    def positions_of(self, row: int) -> Tensor:
        """Ascending positions [n] that `row` still holds."""
        return self.index[row][self.valid[row]]

    def slots_of(self, row: int, positions: Tensor) -> Tensor:
        """Slots [n] of ascending `positions` [n] that are known to be held by `row`."""
        held = self.positions_of(row)
        return torch.searchsorted(held, positions) + (self.width - len(held))

    def gather_index(self, later: Cut) -> Tensor:
        """Slots [B, L''] of this cut that hold the tokens of a `later` one."""
        index = torch.zeros_like(later.index)
        for b in range(len(index)):
            index[b, later.valid[b]] = self.slots_of(b, later.positions_of(b))
        return index

    def position_ids(self, past: int, n_new: int) -> Tensor:
        """Contiguous position ids [B, n_new] of the tokens after `past` cached ones, in the memory of the host."""
        if past == 0:
            return (self.valid.cumsum(-1) - 1).clamp(min=0)
        first = self.valid.sum(-1, keepdim=True) + (past - self.width)
        return first + torch.arange(n_new)

    def mask(self, text: nn.Module, hidden: Tensor, cache_layer: LayerLength, prompt_mask: Tensor | None) -> Tensor | None:
        """The attention mask of the layers that see this cut, in the form that the model's attention backend wants.

        Parameters
        ----------
        hidden : Tensor [B, n_new, D]
            Input of the layer, already cut.
        prompt_mask : Tensor [B, L + generated] or None
            The model's own 2-D mask; after prefill it may mask generated tokens too.
        """
        past, n_new = cache_layer.length, hidden.shape[1]
        mask = None  # no filler, no padding: as Hugging Face does, so that SDPA and flash attention take their fast paths
        masks_new = past > 0 and prompt_mask is not None
        if not self.full or masks_new:
            mask = torch.ones(hidden.shape[0], past + n_new, dtype=torch.bool, device=hidden.device)
            mask[:, : self.width] = self.on(hidden.device)[1]
            if masks_new:
                mask[:, self.width :] = prompt_mask[:, self.length :].to(mask)
        return hf_compat.causal_mask(text.config, hidden, mask, cache_layer)


@dataclass
class CutState:
    """All cuts of one prompt, in ascending order of layer; lives on its cache, so prompts may be interleaved."""

    length: int
    cuts: list[Cut] = field(default_factory=list)

    def at(self, layer: int) -> Cut | None:
        """The cut that decoder layer `layer` sees; None before the first."""
        seen = [cut for cut in self.cuts if cut.layer <= layer]
        return seen[-1] if seen else None


class LayerLength:
    """What `create_causal_mask` asks of a cache, answered for the layer at hand instead of layer 0."""

    is_compileable = False
    is_sliding = (False,)

    def __init__(self, cache: object, layer: int):
        self.length = cache.layers[layer].get_seq_length() if cache is not None and layer < len(cache.layers) else 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached tokens of the layer at hand."""
        return self.length

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """(kv length, offset) for new tokens: their number, or their positions."""
        return self.length + hf_compat.query_length(query), 0


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, L'] of `x` [..., b, L, d], b in {1, B}: [..., B, L', d]."""
    x = x.expand(*x.shape[:-3], index.shape[0], *x.shape[-2:])
    return x.gather(-2, index.to(x.device, non_blocking=True)[..., None].expand(*x.shape[:-3], *index.shape, x.shape[-1]))


def remember(cache: object, state: CutState) -> None:
    """Attach `state` to a cache, and let position logic that asks layer 0 keep seeing the original length."""
    setattr(cache, STATE, state)
    if state.cuts and state.cuts[0].layer == 0:
        cache.get_seq_length = types.MethodType(_original_length, cache)


def recall(cache: object) -> CutState | None:
    """The state that `remember` attached, if any."""
    return getattr(cache, STATE, None)


def _original_length(self: object, layer_idx: int = 0) -> int:
    """``Cache.get_seq_length`` of a cache whose layer 0 was cut."""
    length, cut = type(self).get_seq_length(self, layer_idx), recall(self).cuts[0]
    return length + cut.length - cut.width if layer_idx == 0 and length else length
