"""Least time of a prefill on this machine: arithmetic at the rate of its matrix products, weights at its bandwidth.

Paper: roofline model, Williams et al., CACM 2009, doi 10.1145/1498765.1498785.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from vlm_pruner_eval.cost import DecoderShape, layer_flops
from vlm_pruner_eval.speed.measuring import call_ms

COPIED_BYTES = {"cpu": 256_000_000, "cuda": 2_000_000_000}  # beyond every cache
SQUARE = {"cpu": 1024, "cuda": 8192}
_CALLS = 5  # the fastest counts, and the first is not the fastest


@dataclass
class Limits:
    """Rates of the machine, measured again and again while something else is measured; the medians count.

    Attributes
    ----------
    shape
        The decoder whose feed-forward product is tried beside a square one; the faster of the two counts.
    n_rows
        Tokens of a batch: rows of that product.
    flops_per_s, bytes_per_s
        One measurement a call of `measure`: FLOPs of matrix products, and bytes of memory read or written.
    """

    shape: DecoderShape
    n_rows: int
    device: torch.device
    dtype: torch.dtype
    flops_per_s: list[float] = field(default_factory=list)
    bytes_per_s: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """Measure both once more."""
        side = SQUARE[self.device.type]
        sizes = [(self.n_rows, self.shape.hidden, self.shape.intermediate), (side, side, side)]
        self.flops_per_s.append(max(self._matmul_rate(*size) for size in sizes))
        n_bytes = COPIED_BYTES[self.device.type]
        source = torch.ones(n_bytes, dtype=torch.uint8, device=self.device)
        target = torch.ones_like(source)
        ms = min(call_ms(lambda: target.copy_(source)) for _ in range(_CALLS))
        self.bytes_per_s.append(2 * n_bytes / ms * 1e3)  # read once, written once

    def _matmul_rate(self, rows: int, inner: int, cols: int) -> float:
        a = torch.randn(rows, inner, device=self.device, dtype=self.dtype)
        b = torch.randn(cols, inner, device=self.device, dtype=self.dtype)
        return 2 * rows * inner * cols / min(call_ms(lambda: a @ b.T) for _ in range(_CALLS)) * 1e3

    def bound_ms(self, lengths: Sequence[int], batch: int) -> float:
        """Least milliseconds of a prefill of `batch` rows whose layer i holds ``lengths[i]`` tokens.

        ``sum_i max(FLOPs_i / rate, weight bytes / bandwidth)``. Norms, rotary positions, activations, selection and the
        moving of tokens are free in it, and attention runs at the rate of large products: a bound and no forecast.
        """
        rate = median(self.flops_per_s)
        weights_s = layer_weight_bytes(self.shape, self.dtype.itemsize) / median(self.bytes_per_s)
        return 1e3 * sum(max(batch * causal_layer_flops(self.shape, n) / rate, weights_s) for n in lengths)


def causal_layer_flops(shape: DecoderShape, length: int) -> int:
    """FLOPs that one decoder layer can't do without: `layer_flops` with the causal half of attention only."""
    return layer_flops(shape, length) - 2 * length**2 * shape.n_heads * shape.head_dim


def layer_weight_bytes(shape: DecoderShape, bytes_per_value: int) -> int:
    """Bytes of the matrices of one decoder layer, read once per forward."""
    queries = shape.n_heads * shape.head_dim
    keys = shape.n_kv_heads * shape.head_dim
    return bytes_per_value * shape.hidden * (2 * (queries + keys) + 3 * shape.intermediate)
