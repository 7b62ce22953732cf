"""The shortened sequence: which positions its slots hold, and the positions, masks and cache lengths that follow from it.

Rows that keep fewer tokens than others are right-aligned behind masked filler slots, and the prompt's own padding is
dropped: to Hugging Face the shortened batch is a left-padded batch again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vlm_pruner_eval import hf_compat
from vlm_pruner_eval.errors import PruningError

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

    def select_rows(self, rows: Tensor) -> Cut:
        """Return the cut of other rows [B'] of the batch, for the tokens that follow the prompt."""
        return dataclasses.replace(self, index=self.index[rows], valid=self.valid[rows], _copies={})

    def shortened(self, length: int) -> Cut | None:
        """Return the cut of a prompt that ends at `length`; None unless all rows held every token from there on."""
        n_gone = self.length - length
        tail = self.index[:, -n_gone:]
        if n_gone >= self.width or not torch.equal(tail, torch.arange(length, self.length).expand_as(tail)):
            return None
        index, valid = self.index[:, :-n_gone], self.valid[:, :-n_gone]
        return dataclasses.replace(self, index=index, valid=valid, length=length, _copies={})

    def position_ids(self, past: int, n_new: int) -> Tensor:
        """Contiguous position ids [B, n_new] of the tokens after `past` cached ones, on the CPU; [1, n_new] if all rows are alike."""
        if past == 0:
            return (self.valid.cumsum(-1) - 1).clamp(min=0)
        n_held = torch.tensor([[self.width]]) if self.full else self.valid.sum(-1, keepdim=True)
        return n_held + (past - self.width) + torch.arange(n_new)

    def mask(self, text: nn.Module, hidden: Tensor, cache_layer: LayerLength, prompt_mask: Tensor | None) -> Tensor | None:
        """The attention mask of the layers that see this cut, in the form that the model's attention backend wants.

        Parameters
        ----------
        hidden : Tensor [B, n_new, D]
            Input of the layer, already cut.
        prompt_mask : Tensor [B, L + generated] or None
            The model's own 2-D mask; after prefill it may mask generated tokens too.
        """
        past = cache_layer.length
        n_rows, n_new = hidden.shape[:2]
        if not self.full and n_rows != len(self.valid):
            raise PruningError(
                f"prune: got {n_rows} rows behind a cache of {len(self.valid)}, expected the cache's own methods to change rows."
            )
        mask = None  # no filler, no padding: as Hugging Face does, so that SDPA and flash attention take their fast paths
        masks_new = past > 0 and prompt_mask is not None
        if not self.full or masks_new:
            mask = torch.ones(n_rows, past + n_new, dtype=torch.bool, device=hidden.device)
            if not self.full:
                mask[:, : self.width] = self.on(hidden.device)[1]
            if masks_new:
                mask[:, self.width :] = prompt_mask[:, self.length :].to(mask)
        return hf_compat.causal_mask(text.config, hidden, mask, cache_layer)


@dataclass(eq=False)
class Context:
    """The pruning context that a prompt was read in; its cache can be used as long as one of the same model is open."""

    text: nn.Module
    is_open: bool = True

    def __deepcopy__(self, memo: dict) -> Context:
        return self  # of a copied cache, too


@dataclass
class CutState:
    """All cuts of one prompt, in ascending order of layer; lives on its cache, so prompts may be interleaved."""

    length: int
    cuts: list[Cut] = field(default_factory=list)
    context: Context | None = None

    def at(self, layer: int) -> Cut | None:
        """The cut that decoder layer `layer` sees; None before the first."""
        seen = [cut for cut in self.cuts if cut.layer <= layer]
        return seen[-1] if seen else None

    def shortened(self, length: int) -> CutState | None:
        """Return the state of a prompt that ends at `length`; None if a token from there on was dropped."""
        cuts = [cut.shortened(length) for cut in self.cuts]
        return None if any(cut is None for cut in cuts) else CutState(length, cuts, self.context)

    def select_rows(self, select: Callable[[Tensor], Tensor]) -> CutState:
        """Return the state of other rows of the batch; `select` picks from the numbers [B] of the present ones."""
        if all(cut.full for cut in self.cuts):
            return self  # rows without fillers need no mask of their own
        rows = select(torch.arange(len(self.cuts[0].index)))
        return CutState(self.length, [cut.select_rows(rows) for cut in self.cuts], self.context)


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
    """Attach `state` to a cache; of a prompt that was cut, the cache's operations follow the cut from now on, see `CutCache`."""
    setattr(cache, STATE, state)
    if state.cuts and not isinstance(cache, CutCache):
        cache.__class__ = _cut_class(type(cache))


def recall(cache: object) -> CutState | None:
    """The state that `remember` attached, if any."""
    return getattr(cache, STATE, None)


class CutCache:
    """Operations of a cache whose layers hold different lengths: mixed into the class of the cache of a pruned prompt."""

    def update(self, *args: object, **kwargs: object) -> object:
        """Add keys and values of new tokens.

        Raises
        ------
        PruningError
            Outside of the pruning context, where the model would use other masks and positions.
        """
        context = recall(self).context
        if context is not None and not context.is_open:
            raise PruningError(
                "prune: got the cache of a pruned prompt outside of a pruning context, where the model would answer from other masks and "
                "positions; go on inside `with prune(...)`, or read the prompt again."
            )
        return super().update(*args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens of a layer; of layer 0, which position logic asks, those of the prompt before the cut and all new ones."""
        length = super().get_seq_length(layer_idx)
        state = recall(self)
        cut = state.at(0) if state is not None else None
        return length + cut.length - cut.width if cut is not None and layer_idx == 0 and length else length

    def crop(self, tokens: int, *args: object, **kwargs: object) -> None:
        """Take back the last tokens: -n of them; older versions of transformers also say a positive length that is to be left.

        Raises
        ------
        PruningError
            So many that tokens which some layers dropped would be among them.
        """
        total = self.get_seq_length()
        n_removed = total - tokens if tokens > 0 else -tokens
        n_left = total - n_removed
        state = recall(self)
        if n_left < state.length:
            state = state.shortened(n_left)
        if state is None:
            raise PruningError(
                f"prune: got crop to {n_left} tokens of a pruned prompt, of whose later tokens some layers dropped some, expected to keep "
                "all images whole. Read a shorter prompt anew."
            )
        remember(self, state)
        for layer in self.layers if n_removed > 0 else ():
            layer.crop(-n_removed)

    def reset(self) -> None:
        """Forget the prompt."""
        super().reset()
        delattr(self, STATE)
        self.__class__ = type(self).__mro__[2]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the batch."""
        super().reorder_cache(beam_idx)
        remember(self, recall(self).select_rows(lambda rows: rows[beam_idx.to(rows.device)]))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows of the batch, by their numbers or by a boolean mask."""
        super().batch_select_indices(indices)
        remember(self, recall(self).select_rows(lambda rows: rows[torch.as_tensor(indices).to(rows.device)]))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)
        remember(self, recall(self).select_rows(lambda rows: rows.repeat_interleave(repeats)))


@functools.cache
def _cut_class(cls: type) -> type:
    """The class of a cache with the operations of a cut one."""
    return type(cls.__name__, (CutCache, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
