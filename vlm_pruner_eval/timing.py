"""Timers that are right on both kinds of device: the host clock on CPU, device events on a GPU; and a GPU's peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn


class Span:
    """A stretch of device time; `ms` waits for the device only when it is read."""

    def __init__(self, device: torch.device):
        self._events = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record(torch.cuda.current_stream(device))
            self._stream = torch.cuda.current_stream(device)
        self._start, self._stop = time.perf_counter(), None

    def stop(self) -> Span:
        """Mark the end; returns itself."""
        if self._events is not None:
            self._events[1].record(self._stream)
        self._stop = time.perf_counter()
        return self

    @property
    def ms(self) -> float:
        """Milliseconds between start and stop on the device."""
        if self._stop is None:
            raise RuntimeError("This span was started and never stopped; call stop() before reading its time.")
        if self._events is None:
            return (self._stop - self._start) * 1e3
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1])


@dataclass
class ForwardTimes:
    """Times of a model's forward passes; prefill = more than one token per row.

    `peak_bytes`: the most that tensors took on the GPU at a time, weights included. None on a CPU, where only the peak of the
    process's whole life is known, which says nothing of one batch.
    """

    prefill: list[Span] = field(default_factory=list)
    decode: list[Span] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def prefill_ms(self) -> list[float]:
        """One number per prefill of the language model, selection included; without vision tower, lm_head and preprocessing."""
        return [span.ms for span in self.prefill]

    @property
    def decode_ms(self) -> list[float]:
        """One number per decoding step."""
        return [span.ms for span in self.decode]


@contextmanager
def time_forwards(core: nn.Module) -> Iterator[ForwardTimes]:
    """Time every forward of the language model of a VLM (``core = model.model``) while the context is open; measure a GPU's memory.

    generate() encodes images before this forward in some transformers versions and inside it in others, so the language
    model is what is timed in all of them.
    """
    times, running = ForwardTimes(), []

    def start(module: nn.Module, args: tuple, kwargs: dict) -> None:
        embeds = kwargs["inputs_embeds"]
        running.append((Span(embeds.device), embeds.shape[1] > 1))

    def stop(module: nn.Module, args: tuple, output: object) -> None:
        span, is_prefill = running.pop()
        (times.prefill if is_prefill else times.decode).append(span.stop())

    text, device = core.language_model, next(core.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    handles = [text.register_forward_pre_hook(start, with_kwargs=True), text.register_forward_hook(stop)]
    try:
        yield times
    finally:
        for handle in handles:
            handle.remove()
        if device.type == "cuda":
            times.peak_bytes = torch.cuda.max_memory_allocated(device)


def median_iqr(values: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range; (nan, nan) of nothing."""
    if not values:
        return float("nan"), float("nan")
    if len(values) == 1:
        return float(values[0]), 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, high - low
