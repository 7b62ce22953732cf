"""Summaries in the records: scores, visual tokens, times, costs; those of several units add up to a run's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Model(BaseModel):
    """Base of all records."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# ---- scores
class Score(Model):
    """One metric: its value with the 95 % interval over `n` documents; `note` says why there is no interval."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int
    metric: str | None = None
    note: str | None = None


class ClusterCount(Model):
    """Number of clusters of a task's documents, and a digest of which document is in which."""

    n: int
    digest: str


class TaskScore(Model):
    """One benchmark of one run.

    Attributes
    ----------
    metrics
        By name in lmms-eval; of a group of tasks, the main metric by task.
    main
        The metric that stands for the benchmark, in the unit of papers; None if it has no score, and `note` says why.
    remark
        Documents that the score leaves out, in words.
    """

    metrics: dict[str, Score]
    main: Score | None
    clusters: ClusterCount | None = None
    note: str | None = None
    remark: str | None = None


# ---- what the samples came to
class Spread(Model):
    """Mean, smallest and largest of `n` numbers."""

    mean: float
    min: float
    max: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Summarise numbers; None if there are none."""
        listed = list(values)
        if not listed:
            return None
        return cls(mean=sum(listed) / len(listed), min=min(listed), max=max(listed), n=len(listed))

    @classmethod
    def merged(cls, spreads: Iterable[Spread | None]) -> Spread | None:
        """Summarise several units as if their numbers were one list."""
        known = [spread for spread in spreads if spread is not None]
        if not known:
            return None
        n = sum(spread.n for spread in known)
        mean = math.fsum(spread.mean * spread.n for spread in known) / n
        return cls(mean=mean, min=min(spread.min for spread in known), max=max(spread.max for spread in known), n=n)


class Median(Model):
    """Median and interquartile range of `n` times."""

    median: float
    iqr: float
    n: int

    @classmethod
    def merged(cls, medians: Iterable[Median | None]) -> Median | None:
        """Average the medians and ranges of several units, each weighted by its `n`."""
        known = [median for median in medians if median is not None]
        if not known:
            return None
        n = sum(found.n for found in known)
        weighted = {name: math.fsum(getattr(found, name) * found.n for found in known) / n for name in ("median", "iqr")}
        return cls(**weighted, n=n)


class Tokens(Model):
    """Visual tokens over the samples with images: there, asked for, kept in the last layer, and averaged over layers."""

    samples_with_images: int = 0
    n_visual: Spread | None = None
    asked: Spread | None = None
    kept: Spread | None = None
    layer_averaged: Spread | None = None
    layers: list[int] = Field(default_factory=list)
    quirks: dict[str, int] = Field(default_factory=dict)

    @classmethod
    def merged(cls, parts: Sequence[Tokens]) -> Tokens:
        """Add up the samples of several units."""
        spreads = {name: Spread.merged(getattr(part, name) for part in parts) for name in ("n_visual", "asked", "kept", "layer_averaged")}
        quirks: dict[str, int] = {}
        for name, count in (item for part in parts for item in part.quirks.items()):
            quirks[name] = quirks.get(name, 0) + count
        return cls(
            samples_with_images=sum(part.samples_with_images for part in parts),
            layers=sorted({layer for part in parts for layer in part.layers}),
            quirks=dict(sorted(quirks.items())),
            **spreads,
        )


class Times(Model):
    """Times of the answers; medians in milliseconds: a batch's prefill, a decoding step, a sample's selection.

    Attributes
    ----------
    decoded_tokens_per_s
        Rows of the batch over the time of a decoding step.
    batch_sizes
        Rows of the batches.
    total_s, answers_s
        Seconds of the whole unit, and of its answers; None if it shared work with others.
    """

    prefill_ms: Median | None = None
    decode_ms: Median | None = None
    selection_ms: Median | None = None
    decoded_tokens_per_s: Median | None = None
    batch_sizes: list[int] = Field(default_factory=list)
    total_s: float | None = None
    answers_s: float | None = None

    @classmethod
    def merged(cls, parts: Sequence[Times]) -> Times:
        """Join several units: medians are averaged over the units, seconds are added up."""
        names = ("prefill_ms", "decode_ms", "selection_ms", "decoded_tokens_per_s")
        medians = {name: Median.merged(getattr(part, name) for part in parts) for name in names}
        return cls(
            batch_sizes=sorted({size for part in parts for size in part.batch_sizes}),
            total_s=_sum([part.total_s for part in parts]),
            answers_s=_sum([part.answers_s for part in parts]),
            **medians,
        )


class Memory(Model):
    """Cost of a prompt with images in the language model, from the real length of every layer; bytes and operations.

    Attributes
    ----------
    flops, literature_flops, kv_bytes_counted
        Of the prefill with one position of logits; None if the model's shape is unknown.
    kv_bytes_measured
        A prompt's share of its batch's cache, padding included.
    peak_bytes
        The most that the GPU held while a batch was answered, weights included; None on the CPU.
    """

    flops: Spread | None = None
    literature_flops: Spread | None = None
    kv_bytes_counted: Spread | None = None
    kv_bytes_measured: Spread | None = None
    peak_bytes: int | None = None

    @classmethod
    def merged(cls, parts: Sequence[Memory]) -> Memory:
        """Join several units."""
        names = ("flops", "literature_flops", "kv_bytes_counted", "kv_bytes_measured")
        peaks = [part.peak_bytes for part in parts if part.peak_bytes is not None]
        return cls(peak_bytes=max(peaks, default=None), **{name: Spread.merged(getattr(part, name) for part in parts) for name in names})


class Failure(Model):
    """A sample that failed."""

    task: str
    doc_id: int
    error: str


class Provenance(Model):
    """Surroundings of a unit: versions, machine, checkpoint files, commit, command; times are UTC."""

    versions: dict[str, str]
    platform: str
    processor: str
    host: dict[str, Any]
    gpus: list[dict[str, Any]]
    cuda: dict[str, Any]
    threads: int
    model: dict[str, Any]
    checkpoint: dict[str, str]
    git_commit: str | None
    command: str
    started: str | None
    time: str


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known and len(known) == len(values) else None
