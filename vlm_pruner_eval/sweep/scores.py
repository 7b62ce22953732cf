"""Scores with confidence intervals, through each task's own aggregation, so that any lmms-eval task works."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_pruner_eval.sweep.clusters import PAIR_KEYS, RESAMPLES, Clusters, find_clusters
from vlm_pruner_eval.sweep.counts import Form, forms, item_score

CONFIDENCE = 95.0
_MANY_ITEMS = 2000  # above this, only the main metric is resampled
_PATIENCE_S = 120.0  # for calling one metric's aggregation on all resamples
_CHECKS = 3  # resamples on which a form must agree with the aggregation


@dataclass(frozen=True)
class Main:
    """The metric that stands for a task in tables.

    Attributes
    ----------
    metrics
        Names in lmms-eval; several are summed (MME: perception + cognition).
    scale
        Factor to the unit in which papers print it.
    adds
        Field of the per-document items whose sum the task reports up to a constant; for aggregations that keep state or write
        files and therefore can't be called on resamples.
    """

    metrics: tuple[str, ...]
    scale: float = 100.0
    adds: str | None = None


MAIN_METRICS: dict[str, Main] = {
    "gqa": Main(("exact_match",)),
    "mmbench_en_dev_static": Main(("gpt_eval_score",), scale=1.0),
    "mme": Main(("mme_perception_score", "mme_cognition_score"), scale=1.0),
    "pope": Main(("pope_f1_score",)),
    "scienceqa_img": Main(("exact_match",)),
    "textvqa_val": Main(("exact_match",)),
    "ok_vqa_val2014": Main(("exact_match",)),
    "ocrbench": Main(("ocrbench_accuracy",), scale=1000.0, adds="score"),
    "seedbench": Main(("seed_image",)),
    "longvideobench_val_v": Main(("lvb_acc",)),
    "mlvu_dev": Main(("mlvu_percetion_score",), scale=1.0),
    "videomme": Main(("videomme_perception_score",), scale=1.0),
    "egoschema_subset": Main(("score",)),
    "textvqa_val_ocr": Main(("exact_match",)),
    "ok_vqa_val2014_plain": Main(("exact_match",)),
    "mme_total": Main(("mme_total_score",), scale=1.0),
    "pope_splits": Main(("pope_f1_mean",)),
    "pope_splits_llava": Main(("pope_f1_mean",)),
    "mmbench_en_dev_llava": Main(("gpt_eval_score",), scale=1.0),
    "ocrbench_short": Main(("ocrbench_accuracy",), scale=1000.0, adds="score"),
    "seedbench_image": Main(("seed_image",)),
    "chartqa": Main(("relaxed_overall",)),
    "docvqa_val": Main(("anls",)),
    "infovqa_val": Main(("anls",)),
    "mmstar": Main(("average",)),
    "ai2d": Main(("exact_match",)),
    "refcoco_bbox_rec_testA": Main(("refcoco_ACC@0.5",)),
    "digitscenes_exist": Main(("accuracy",)),
    "digitscenes_attribute": Main(("exact_match",)),
    "digitscenes_where": Main(("exact_match",)),
    "digitscenes_read": Main(("exact_match",)),
    "digitscenes_count": Main(("exact_match",)),
    "digitscenes_pairs": Main(("accuracy",)),
}

# Benchmarks that lmms-eval runs as a group of tasks of one metric, and papers print as one number: the mean over the tasks.
BENCHMARK_GROUPS = frozenset({"mvbench"})

NOT_SCORABLE = "not locally scorable: lmms-eval writes a file to submit to the benchmark's server"


def is_submission(metrics: Sequence[str]) -> bool:
    """Whether a task with these metrics only writes a file for someone else to score."""
    return bool(metrics) and set(metrics) == {"submission"}


@dataclass(frozen=True)
class Scored:
    """One task of one run.

    Attributes
    ----------
    record
        For the run's record. `metrics`: name -> value, low, high (95 % percentile bootstrap over clusters of documents; Wilson's
        interval where every document scored the same), n, note. `main`: the same for the metric that stands for the task, in
        the unit of papers, or None when no metric can. `clusters`: n and digest, see `Clusters.as_json`. `note`: only of a task
        that can't be scored here, why.
    draws
        [RESAMPLES]: the main metric on every resample, in its unit; None where it has no interval.
    documents
        Document -> its score in [0, 1] under the main metric; None where the task gives it no number.
    """

    record: dict[str, Any]
    draws: np.ndarray | None
    documents: dict[Any, float | None]


def score_task(
    task: str,
    results: dict[str, Any],
    samples: Sequence[dict[str, Any]],
    task_object: Any,
    images: Mapping[Any, Sequence[str]] | None = None,
) -> Scored:
    """All metrics of one task of one run.

    Parameters
    ----------
    task
        Name in lmms-eval.
    results
        ``simple_evaluate(...)["results"][task]``: values under "metric,filter".
    samples
        ``simple_evaluate(...)["samples"][task]``: per document, filter after filter.
    task_object
        The lmms-eval task, for its aggregations.
    images
        Document -> content hashes of its images: documents that share one are drawn together, as pairs of questions are.
    """
    aggregations, better = task_object.aggregation(), task_object.higher_is_better()
    names = [key for key in results if "," in key and key.split(",")[0] in aggregations]
    filters = list(dict.fromkeys(key.split(",")[1] for key in names))
    wanted, clusters = MAIN_METRICS.get(task), find_clusters(task, samples, images or {})
    per_filter = len(samples) // max(1, len(filters))
    scored, draws, rows = {}, {}, {}
    for name in names:
        metric, filter_name = name.split(",")[:2]
        value = results[name]
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            continue  # submissions and tables are not scores
        start = filters.index(filter_name) * per_filter
        shown = metric if len(filters) == 1 else name
        rows[shown] = [row for row in samples[start : start + per_filter] if metric in row]
        draws[shown], note = _draw(aggregations[metric], rows[shown], metric, float(value), wanted, clusters)
        scored[shown] = _summary(float(value), draws[shown], len(rows[shown])) | ({"note": note} if note else {})
        if draws[shown] is not None and _all_alike([row[metric] for row in rows[shown]], value):
            n = len({clusters.of[row["doc_id"]] for row in rows[shown]})
            scored[shown] |= dict(zip(("low", "high"), wilson_interval(float(value), n), strict=True))
    main, drawn = _main(wanted, scored, draws, better)
    mains = main["metric"].split(" + ") if main else []
    documents = {row["doc_id"]: item_score(row[name.split(",")[0]]) for name in mains for row in rows[name]}
    note = {"note": NOT_SCORABLE} if is_submission(list(aggregations)) else {}
    return Scored({"metrics": scored, "main": main, "clusters": clusters.as_json()} | note, drawn, documents)


def score_group(tasks: dict[str, Scored]) -> Scored:
    """One benchmark out of its tasks: the mean of their main metrics, every task with the same weight.

    Returns
    -------
    Scored
        `metrics` holds the tasks' main metrics by task. The interval adds half-widths in quadrature: tasks have documents of
        their own, so their errors are independent, and so are their draws. `documents` is empty: a document is scored in its task.
    """
    mains = {name: scores.record["main"] for name, scores in tasks.items()}
    parts = [scores.record["clusters"] for scores in tasks.values()]
    digest = hashlib.sha256(" ".join(part["digest"] for part in parts).encode()).hexdigest()[:16]
    clusters = {"n": sum(part["n"] for part in parts), "digest": digest}
    if any(main is None for main in mains.values()):
        known = {name: main for name, main in mains.items() if main is not None}
        return Scored({"metrics": known, "main": None, "clusters": clusters}, None, {})
    value = sum(main["value"] for main in mains.values()) / len(mains)
    low = high = None
    if all(main["low"] is not None for main in mains.values()):
        half = math.hypot(*((main["high"] - main["low"]) / 2 for main in mains.values())) / len(mains)
        low, high = value - half, value + half
    metric = "mean of " + ", ".join(sorted({main["metric"] for main in mains.values()})) + f" over {len(mains)} tasks"
    main = {"metric": metric, "value": value, "low": low, "high": high, "n": sum(main["n"] for main in mains.values())}
    drawn = [scores.draws for scores in tasks.values()]
    draws = None if any(draw is None for draw in drawn) else np.mean(drawn, axis=0)
    return Scored({"metrics": mains, "main": main, "clusters": clusters}, draws, {})


def percentile_interval(draws: np.ndarray) -> tuple[float, float]:
    """The central 95 % of the resampled values."""
    tail = (100.0 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100.0 - tail])
    return float(low), float(high)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The Wilson score interval (95 %) of a share of `n`: what 20 right answers out of 20 really say is 84 to 100 %.

    Used where every document scored the same, so that resampling them shows no spread at all.
    """
    z = 1.959963985
    middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _summary(value: float, draws: np.ndarray | None, n: int) -> dict[str, Any]:
    low, high = (None, None) if draws is None else percentile_interval(draws)
    return {"value": value, "low": low, "high": high, "n": n}


def _all_alike(items: list[Any], value: float) -> bool:
    """Whether a metric that is a share has the same 0 or 1 everywhere; of items that are no numbers, nothing but 0 may be points."""
    return value in (0, 1) and all(item_score(item) == value and (value == 1 or np.isscalar(item)) for item in items)


def _main(
    wanted: Main | None, scored: dict[str, Any], draws: dict[str, np.ndarray | None], better: dict[str, bool]
) -> tuple[dict[str, Any] | None, np.ndarray | None]:
    """The metric that stands for the task, and its draws; of an unknown task, its first score for which more is better."""
    if wanted is None:
        names = [name for name in scored if better.get(name.split(",")[0], True)][:1]
        scale = 1.0
    else:
        names, scale = [name for name in wanted.metrics if name in scored], wanted.scale
        if len(names) < len(wanted.metrics):
            return None, None
    if not names:
        return None, None
    known = [draws[name] for name in names]
    total = None if any(draw is None for draw in known) else scale * np.sum(known, axis=0)
    if len(names) == 1:
        (one,) = names
        scaled = {key: None if scored[one][key] is None else scale * scored[one][key] for key in ("value", "low", "high")}
        return {"metric": one} | scaled | {"n": scored[one]["n"]}, total
    value, n = scale * sum(scored[name]["value"] for name in names), sum(scored[name]["n"] for name in names)
    return {"metric": " + ".join(names)} | _summary(value, total, n), total


def _draw(
    aggregate: Callable, rows: list[dict[str, Any]], metric: str, value: float, wanted: Main | None, clusters: Clusters
) -> tuple[np.ndarray | None, str | None]:
    """Values of the metric on resampled clusters, or None and the reason why there are none."""
    docs, items = [row["doc_id"] for row in rows], [row[metric] for row in rows]
    is_main = wanted is not None and metric in wanted.metrics
    if is_main and wanted.adds is not None and (form := _adding(items, wanted.adds, value)) is not None:
        return _checked(form.value(clusters.sums(clusters.by_cluster(docs, form.columns))))
    slow = wanted is not None and not is_main and len(rows) > _MANY_ITEMS
    if reason := _unresampled(aggregate, items, value, n_clusters=len({clusters.of[doc] for doc in docs}), slow=slow):
        return None, f"no interval: {reason}"
    resamples = _Resamples(aggregate, docs, items, clusters)
    for form in forms(items):
        if resamples.agree_with(form, value):
            return _checked(form.value(clusters.sums(clusters.by_cluster(docs, form.columns))))
    return _checked(resamples.values()) if resamples.seconds() < _PATIENCE_S else (None, "no interval: its aggregation takes too long")


def _checked(draws: np.ndarray) -> tuple[np.ndarray | None, str | None]:
    return (draws, None) if np.isfinite(draws).all() else (None, "no interval: the metric is not defined on every resample")


def _adding(items: list[Any], field: str, value: float) -> Form | None:
    """The mean of a field of the items, in the unit of the metric."""
    numbers = np.array([item[field] for item in items], dtype=np.float64)
    if numbers.sum() <= 0:
        return None  # of nothing but zeros the unit can't be told
    unit = value / numbers.mean()
    return Form(np.column_stack([numbers, np.ones(len(items))]), lambda sums: unit * sums[..., 0] / sums[..., 1])


def _unresampled(aggregate: Callable, items: list[Any], value: float, *, n_clusters: int, slow: bool) -> str | None:
    """Why a metric can't be computed on resamples; None when it can."""
    if n_clusters < 2:
        return "fewer than two documents, or all of them share images"
    if "args" in inspect.signature(aggregate).parameters:
        return "this task's aggregation writes files"
    if slow:
        return "only the main metric of a task this large is resampled"
    again = float(_silently(aggregate, items))
    return None if math.isclose(again, value, rel_tol=1e-9, abs_tol=1e-12) else f"the aggregation answers {again:g} when asked again"


def _silently(aggregate: Callable, items: list[Any]) -> Any:
    """Some aggregations print their table every time."""
    with contextlib.redirect_stdout(io.StringIO()):
        return aggregate(items)


@dataclass(frozen=True)
class _Resamples:
    """An aggregation on resampled clusters."""

    aggregate: Callable
    docs: list[Any]
    items: list[Any]
    clusters: Clusters

    def agree_with(self, form: Form, value: float) -> bool:
        """Whether the form gives the metric's value on all items, and what the aggregation answers on a few resamples."""
        if not math.isclose(form.value(form.columns.sum(0)), value, rel_tol=1e-9, abs_tol=1e-12):
            return False
        weights = next(self.clusters.weights())[:_CHECKS]
        guesses = form.value(weights @ self.clusters.by_cluster(self.docs, form.columns))
        return all(np.isclose(guess, self._value(row), rtol=1e-9, equal_nan=True) for guess, row in zip(guesses, weights, strict=True))

    def seconds(self) -> float:
        """How long `values` would take."""
        started = time.perf_counter()
        self._value(next(self.clusters.weights())[0])
        return RESAMPLES * (time.perf_counter() - started)

    def values(self) -> np.ndarray:
        """[RESAMPLES]"""
        return np.array([self._value(row) for block in self.clusters.weights() for row in block])

    def _value(self, weights: np.ndarray) -> float:
        times = weights.astype(int).tolist()
        drawn = [
            _renamed(item, copy) for item, doc in zip(self.items, self.docs, strict=True) for copy in range(times[self.clusters.of[doc]])
        ]
        return float(_silently(self.aggregate, drawn)) if drawn else math.nan


def _renamed(item: Any, copy: int) -> Any:
    """A pair drawn twice must count as two pairs, so each draw gets its own id."""
    if not isinstance(item, dict):
        return item
    return item | {key: f"{item[key]}#{copy}" for key in PAIR_KEYS if key in item}
