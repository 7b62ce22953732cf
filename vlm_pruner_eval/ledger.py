"""What was really kept, sample by sample: measured from the tensors after each prefill, not copied from the config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_pruner_eval.budget import layer_average


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """One row of one prefill.

    Attributes
    ----------
    row
        Row in its batch (beams and returned sequences are rows of their own); of several methods in one batch, among those of its own.
    n_visual, n_asked, n_kept
        Visual tokens of the prompt; the sum over scopes of what the method was asked to keep after its last stage;
        what the last layer's input really held.
    n_images
        Images (a video is one; of families that do not tell how tiles make up an image, a tile is one).
    scope
        Whether the budget is "per_image" or "per_sample" (one over all images of the prompt).
    layer
        K of the first cut; None when the method makes none.
    kept_positions
        Ascending positions of the kept visual tokens in the row of input_ids as passed, padding included.
    order
        The same tokens in selection order, as indices into the row's visual tokens.
    kv_lengths
        Per decoder layer: this row's valid length after prefill, without padding and fillers.
    visual_lengths
        Per decoder layer: visual tokens of this row that the layer saw.
    quirks
        Release misbehaviours that fired or would have fired, over all scopes.
    selection_ms
        Time in the method's `select`, all scopes and stages of this row; None where times would mislead (runs that shared a prefix).
    layouts
        Of each image (one to `n_images`), in prompt order: tokens with newlines, rows and columns of the finest view, views or frames.
    kv_bytes
        This row's share of the keys and values that the cache held after prefill, measured from its tensors, so with the padding of
        the batch; None without a cache.
    n_merged
        Kept ones that hold no token of the image, but a sum of several or a CLS token; they stand at the places that are named.
    n_full
        Visual tokens that the images would have made at full size; None where they were not made smaller before the model.
    """

    row: int
    n_visual: int
    n_asked: int
    n_kept: int
    n_images: int
    layer: int | None
    kept_positions: list[int]
    order: list[int]
    kv_lengths: list[int]
    visual_lengths: list[int]
    quirks: frozenset[str] = frozenset()
    selection_ms: float | None = 0.0
    sample_id: str | None = None
    scope: str = "per_image"
    layouts: list[list[int]] = field(default_factory=list)
    kv_bytes: int | None = None
    n_full: int | None = None
    n_merged: int = 0

    @property
    def layer_averaged(self) -> float:
        """Visual tokens averaged over the decoder layers: the other meaning of "budget" in the literature."""
        return layer_average(self.visual_lengths)

    def as_json(self) -> dict[str, Any]:
        """Plain types only, quirks sorted."""
        # not dataclasses.asdict, which takes milliseconds to copy hundreds of positions one by one
        return vars(self) | {"quirks": sorted(self.quirks), "layer_averaged": self.layer_averaged}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> SampleRecord:
        """The inverse of `as_json`."""
        fields = {name: value for name, value in plain.items() if name != "layer_averaged"}
        return cls(**fields | {"quirks": frozenset(plain["quirks"])})


@dataclass
class Ledger:
    """Records in order, one per row and prefill.

    On a GPU, times are known only when the device has caught up, so records are completed when they are read.
    """

    _pending: list[Callable[[], list[SampleRecord]]] = field(default_factory=list, repr=False)
    _records: list[SampleRecord] = field(default_factory=list)

    @property
    def records(self) -> list[SampleRecord]:
        """All records so far; reading them waits for the device."""
        pending, self._pending = self._pending, []
        for complete in pending:
            self._records.extend(complete())
        return self._records

    def add(self, complete: Callable[[], list[SampleRecord]]) -> None:
        """Append the records of one prefill, to be completed on first read."""
        self._pending.append(complete)
