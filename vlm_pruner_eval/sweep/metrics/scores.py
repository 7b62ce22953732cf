"""Scores with confidence intervals, through each task's own aggregation, so that any lmms-eval task works."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_pruner_eval.sweep.metrics.aggregations import Aggregation
from vlm_pruner_eval.sweep.metrics.clusters import Clusters, find_clusters, has_pairs
from vlm_pruner_eval.sweep.metrics.counts import Form
from vlm_pruner_eval.sweep.metrics.document_scores import document_scores
from vlm_pruner_eval.sweep.metrics.resampling import Metric, draw
from vlm_pruner_eval.sweep.turns import has_turns

CONFIDENCE = 95.0


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
        Field of the per-document items whose sum is the score that papers print; for aggregations that keep state or write files
        and therefore can't be called on resamples.
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
    "muirbench": Main(("muirbench_score_overall",)),
    "blink_multi_view_reasoning": Main(("blink_acc",)),
    "blink_visual_similarity": Main(("blink_acc",)),
    "blink_visual_correspondence": Main(("blink_acc",)),
    "blink_jigsaw": Main(("blink_acc",)),
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
    """Tell if a task with these metrics only writes a file for someone else to score."""
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
        without a score, why. `remark`: only of a task whose score leaves documents out.
    draws
        [resamples]: the main metric on every resample, in its unit; None where it has no interval.
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
    aggregations = {metric: Aggregation.of(call) for metric, call in task_object.aggregation().items()}
    better = task_object.higher_is_better()
    names = [key for key in results if "," in key and key.split(",")[0] in aggregations]
    filters = list(dict.fromkeys(key.split(",")[1] for key in names))
    wanted, clusters = MAIN_METRICS.get(task), find_clusters(task, samples, images or {})
    per_filter = len(samples) // max(1, len(filters))
    scored, draws, metrics = {}, {}, {}
    for name in names:
        metric, filter_name = name.split(",")[:2]
        value = results[name]
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            continue  # submissions and tables are not scores
        start = filters.index(filter_name) * per_filter
        shown = metric if len(filters) == 1 else name
        rows = [row for row in samples[start : start + per_filter] if metric in row]
        rows = [row for index, row in enumerate(rows) if index not in aggregations[metric].left_out]
        metrics[shown] = _metric(metric, aggregations[metric].call, float(value), rows, wanted)
        draws[shown], scored[shown] = _score(metrics[shown], wanted, clusters)
    main, drawn = _main(wanted, scored, draws, better)
    mains = main["metric"].split(" + ") if main else []
    documents = {doc: score for name in mains for doc, score in zip(metrics[name].docs, metrics[name].numbers, strict=True)}
    notes = _notes(wanted, main, aggregations, scored, len(samples))
    return Scored({"metrics": scored, "main": main, "clusters": clusters.as_json()} | notes, drawn, documents)


def _notes(
    wanted: Main | None, main: dict[str, Any] | None, aggregations: dict[str, Aggregation], scored: dict[str, Any], n: int
) -> dict[str, str]:
    """`note`: why a task has no score; `remark`: what its score leaves out."""
    if is_submission(list(aggregations)):
        return {"note": NOT_SCORABLE}
    lacking = [metric for metric in (aggregations if wanted is None else wanted.metrics) if metric not in scored]
    if main is None and lacking:
        return {"note": f"without a score: {_why_none(lacking, aggregations, n)}"}
    if left := max((len(found.left_out) for found in aggregations.values()), default=0):
        return {"remark": f"{left} of {n} documents do not count, as the other question of their pair was not asked (an odd limit)"}
    return {}


def _why_none(lacking: list[str], aggregations: dict[str, Aggregation], n: int) -> str:
    for metric in lacking:
        if metric in aggregations and aggregations[metric].problem is not None:
            return f"its aggregation of {metric} failed ({aggregations[metric].problem})"
    why = "a benchmark of several parts needs documents of each, which a limit may leave out"
    return f"{', '.join(lacking)} is no number on these {n} documents ({why})"


def _metric(name: str, aggregate: Callable, value: float, rows: Sequence[dict[str, Any]], wanted: Main | None) -> Metric:
    is_main = wanted is None or name in wanted.metrics
    items = [row[name] for row in rows]
    numbers = document_scores(items, value, aggregate if is_main else None)
    points = _points(items, wanted, value) if wanted is not None and wanted.adds is not None and is_main else None
    return Metric(aggregate, value, [row["doc_id"] for row in rows], items, numbers, points, is_main)


def _score(metric: Metric, wanted: Main | None, clusters: Clusters) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Draws of one metric, and its entry in the record."""
    draws, note = draw(metric, clusters)
    summary = _summary(metric.value, draws, len(metric.docs)) | ({"note": note} if note else {})
    unit = None if draws is None else _unit_if_alike(metric, wanted)
    if unit is not None:
        low, high = wilson_interval(metric.value / unit, len({clusters.of[doc] for doc in metric.docs}))
        summary |= {"low": min(unit * low, metric.value), "high": max(unit * high, metric.value)}  # no rounding beside the value
    return draws, summary


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


def _unit_if_alike(metric: Metric, wanted: Main | None) -> float | None:
    """What a metric that is a share has where all is right, if here all documents score 0 or all score 1; else None.

    Nothing right of pairs, or of a task that is not known and has items that are no numbers, may be points: no share.
    """
    counted = {number for number in metric.numbers if number is not None}
    if counted == {1.0}:
        is_share = metric.points is not None or metric.value in (1, 100)
        return metric.value if is_share else None
    if counted != {0.0} or metric.value != 0:
        return None
    if metric.points is not None:
        return len(metric.items) / wanted.scale
    if all(map(np.isscalar, metric.items)):
        return 1.0
    if has_turns(metric.items):
        return 100.0
    return None if wanted is None or has_pairs(metric.items) else 100.0 / wanted.scale


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


def _points(items: Sequence[dict[str, Any]], wanted: Main, value: float) -> Form:
    """The mean of the items' points in the unit of the metric, whose value is their sum over ``wanted.scale``."""
    points = np.array([item[wanted.adds] for item in items], dtype=np.float64)
    unit = value / points.mean() if points.sum() > 0 else len(items) / wanted.scale
    return Form(np.column_stack([points, np.ones(len(items))]), lambda sums: unit * sums[..., 0] / sums[..., 1])
