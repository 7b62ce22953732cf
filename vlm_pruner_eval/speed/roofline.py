"""The least time that a prefill can take on this machine: arithmetic at the rate of its matrix products, weights at its bandwidth.

Paper: roofline model, Williams et al., CACM 2009, doi 10.1145/1498765.1498785.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from vlm_pruner_eval.cost import DecoderShape, layer_flops
from vlm_pruner_eval.speed.machine import wait_for

COPIED_BYTES = {"cpu": 256_000_000, "cuda": 2_000_000_000}  # beyond every cache
SQUARE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Limits:
    """What the machine does at best: FLOPs of matrix products, and bytes of memory, per second."""

    flops_per_s: float
    bytes_per_s: float


@dataclass
class Probe:
    """Measures the machine's limits, again and again while something else is measured.

    Parameters
    ----------
    shape
        The decoder whose feed-forward product is tried beside a square one; the faster of the two counts.
    n_rows
        Tokens of a batch: rows of that product.
    """

    shape: DecoderShape
    n_rows: int
    device: torch.device
    dtype: torch.dtype
    rates: list[float] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """One more measurement of both."""
        side, like = SQUARE[self.device.type], {"device": self.device, "dtype": self.dtype}
        sizes = [(self.n_rows, self.shape.hidden, self.shape.intermediate), (side, side, side)]
        self.rates.append(max(_matmul_rate(*size, like) for size in sizes))
        n_bytes = COPIED_BYTES[self.device.type]
        source, target = (torch.ones(n_bytes, dtype=torch.uint8, device=self.device) for _ in range(2))
        seconds = _best_of(lambda: target.copy_(source), self.device)
        self.bandwidths.append(2 * n_bytes / seconds)  # read once, written once

    @property
    def limits(self) -> Limits:
        """Medians of what was measured so far."""
        return Limits(median(self.rates), median(self.bandwidths))


def _matmul_rate(rows: int, inner: int, cols: int, like: dict[str, object]) -> float:
    a, b = torch.randn(rows, inner, **like), torch.randn(cols, inner, **like)
    return 2 * rows * inner * cols / _best_of(lambda: a @ b.T, a.device)


def _best_of(call: Callable[[], object], device: torch.device, n: int = 4) -> float:
    """Seconds of the fastest of `n` calls, after one that is not counted."""
    call()
    seconds = []
    for _ in range(n):
        wait_for(device)
        start = time.perf_counter()
        call()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def causal_layer_flops(shape: DecoderShape, length: int) -> int:
    """FLOPs that one decoder layer can't do without: as `layer_flops`, with the causal half of the attention matrix only."""
    return layer_flops(shape, length) - 2 * length**2 * shape.n_heads * shape.head_dim


def layer_weight_bytes(shape: DecoderShape, bytes_per_value: int) -> int:
    """Bytes of the matrices of one decoder layer, read once per forward."""
    queries, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    return bytes_per_value * shape.hidden * (2 * (queries + keys) + 3 * shape.intermediate)


def prefill_bound_ms(shape: DecoderShape, lengths: Sequence[int], batch: int, limits: Limits, bytes_per_value: int) -> float:
    """The least milliseconds of a prefill of `batch` rows whose layer i holds ``lengths[i]`` tokens.

    ``sum_i max(FLOPs_i / rate, weight bytes / bandwidth)``. Norms, rotary positions, activations, selection and the moving of
    tokens are free in it, and attention runs at the rate of large products, so it is a bound and no forecast.
    """
    weights_s = layer_weight_bytes(shape, bytes_per_value) / limits.bytes_per_s
    return 1e3 * sum(max(batch * causal_layer_flops(shape, n) / limits.flops_per_s, weights_s) for n in lengths)
