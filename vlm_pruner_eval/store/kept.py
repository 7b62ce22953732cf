"""Kept sets in a compact form: a row that cut nothing takes no list, and positions follow from the order."""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm_pruner_eval.ledger import SampleRecord

Runs = tuple[tuple[int, int], ...]  # (value, how often in a row)
_SHORT, _LONG = np.dtype("<u2"), np.dtype("<u4")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A `SampleRecord` without its lists; the same names give them back.

    Attributes
    ----------
    order_bytes
        Indices in selection order, little-endian, of 2 bytes each (4 if there are more than 65,535 tokens); None if all are
        kept in their own order.
    offsets
        Of the kept tokens in ascending order, position minus index, in runs: one run unless text or images lie between.
    lengths, visual
        `SampleRecord.kv_lengths` and `.visual_lengths`, in runs of equal layers.
    """

    row: int
    n_visual: int
    n_asked: int
    n_kept: int
    n_images: int
    layer: int | None
    order_bytes: bytes | None
    offsets: Runs
    lengths: Runs
    visual: Runs
    quirks: frozenset[str] = frozenset()
    selection_ms: float | None = 0.0
    scope: str = "per_image"
    layouts: tuple[tuple[int, ...], ...] = ()
    kv_bytes: int | None = None
    n_full: int | None = None
    n_merged: int = 0
    sample_id: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, record: SampleRecord) -> Kept:
        """Pack a record."""
        order = np.asarray(record.order, dtype=np.int64)
        is_all = len(order) == record.n_visual and bool((order == np.arange(record.n_visual)).all())
        indices = order if is_all else np.sort(order)
        offsets = np.asarray(record.kept_positions, dtype=np.int64) - indices
        counts = ("row", "n_visual", "n_asked", "n_kept", "n_images", "n_full", "n_merged")
        names = (*counts, "layer", "quirks", "selection_ms", "scope", "kv_bytes")
        return cls(
            **{name: getattr(record, name) for name in (*names, "sample_id")},
            order_bytes=None if is_all else order.astype(_dtype(record.n_visual)).tobytes(),
            offsets=_runs(offsets.tolist()),
            lengths=_runs(record.kv_lengths),
            visual=_runs(record.visual_lengths),
            layouts=tuple(tuple(layout) for layout in record.layouts),
        )

    @property
    def order(self) -> list[int]:
        """See `SampleRecord`."""
        return list(self._order.tolist())

    @property
    def kept_positions(self) -> list[int]:
        """See `SampleRecord`."""
        return list((np.sort(self._order) + np.asarray(_spelled(self.offsets), dtype=np.int64)).tolist())

    @property
    def _order(self) -> np.ndarray:
        if self.order_bytes is None:
            return np.arange(self.n_visual)
        return np.frombuffer(self.order_bytes, _dtype(self.n_visual)).astype(np.int64)

    @property
    def kv_lengths(self) -> list[int]:
        """See `SampleRecord`."""
        return _spelled(self.lengths)

    @property
    def visual_lengths(self) -> list[int]:
        """See `SampleRecord`."""
        return _spelled(self.visual)

    @property
    def layer_averaged(self) -> float:
        """See `SampleRecord`."""
        return sum(value * times for value, times in self.visual) / sum(times for _, times in self.visual)

    @property
    def digest(self) -> str:
        """SHA-256 of WHICH visual tokens were kept.

        The set, never the order: another processor changes the order in about 1 of 12 images and the set in none. Positions are
        taken relative to the first kept one, because left padding shifts a whole row with the composition of its batch.
        """
        first = self.offsets[0][0] if self.offsets else 0
        return _digest(self.n_visual, self.order_bytes, tuple((value - first, times) for value, times in self.offsets))

    def as_json(self) -> dict[str, Any]:
        """Plain types; what has its default is left out."""
        held: dict[str, Any] = {name: getattr(self, name) for name in ("n_visual", "n_asked", "n_kept", "n_images", "layer")}
        held |= {"offsets": self.offsets, "kv_lengths": self.lengths, "visual_lengths": self.visual}
        if self.order_bytes is not None:
            held["order"] = base64.b64encode(self.order_bytes).decode()
        held |= {"quirks": sorted(self.quirks)} if self.quirks else {}
        held |= {"layouts": self.layouts} if self.layouts else {}
        held |= {"selection_ms": self.selection_ms} if self.selection_ms != 0.0 else {}
        defaults = {"row": 0, "scope": "per_image", "kv_bytes": None, "n_full": None, "n_merged": 0}
        return held | {name: value for name, default in defaults.items() if (value := getattr(self, name)) != default}

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> Kept:
        """Read what `as_json` made."""
        fields = {"row": 0} | dict(held)
        order = fields.pop("order", None)
        lengths = {"lengths": fields.pop("kv_lengths"), "visual": fields.pop("visual_lengths"), "offsets": fields.pop("offsets")}
        fields |= {name: tuple((value, times) for value, times in runs) for name, runs in lengths.items()}
        fields["order_bytes"] = None if order is None else base64.b64decode(order)
        fields["quirks"] = frozenset(fields.get("quirks", ()))
        fields["layouts"] = tuple(tuple(layout) for layout in fields.get("layouts", ()))
        return cls(**fields)


@functools.lru_cache(maxsize=64)
def _digest(n_visual: int, order_bytes: bytes | None, offsets: Runs) -> str:
    """Hash a kept set; unpruned rows of a batch share one."""
    indices = list(range(n_visual)) if order_bytes is None else sorted(np.frombuffer(order_bytes, _dtype(n_visual)).tolist())
    positions = [index + offset for index, offset in zip(indices, _spelled(offsets), strict=True)]
    relative = [position - positions[0] for position in positions]
    return hashlib.sha256(json.dumps([indices, relative]).encode()).hexdigest()


def _dtype(n_visual: int) -> np.dtype:
    return _SHORT if n_visual <= 2**16 else _LONG


def _runs(values: Iterable[int]) -> Runs:
    return tuple((value, len(list(group))) for value, group in itertools.groupby(values))


def _spelled(runs: Runs) -> list[int]:
    return [value for value, times in runs for _ in range(times)]
