"""Scores with confidence intervals, through each task's own aggregation, so that any lmms-eval task works."""

from __future__ import annotations

import contextlib
import inspect
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 95.0
_SEED = 20251200
_MANY_ITEMS = 2000  # above this, only the main metric is resampled through a slow aggregation
_PAIR_KEYS = ("pair_id", "question_id")


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


def score_task(task: str, results: dict[str, Any], samples: Sequence[dict[str, Any]], task_object: Any) -> dict[str, Any]:
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

    Returns
    -------
    dict
        `metrics`: name -> value, low, high (95 % percentile bootstrap over documents, whole pairs kept together; Wilson's
        interval where every document scored the same), n, note.
        `main`: the same for the metric that stands for the task, in the unit of papers, or None when no metric can.
        `note`: only of a task that can't be scored here, why.
    """
    aggregations, better = task_object.aggregation(), task_object.higher_is_better()
    names = [key for key in results if "," in key and key.split(",")[0] in aggregations]
    filters = list(dict.fromkeys(key.split(",")[1] for key in names))
    wanted = MAIN_METRICS.get(task)
    per_filter = len(samples) // max(1, len(filters))
    scored, draws = {}, {}
    for name in names:
        metric, filter_name = name.split(",")[:2]
        value = results[name]
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            continue  # submissions and tables are not scores
        start = filters.index(filter_name) * per_filter
        rows = [row for row in samples[start : start + per_filter] if metric in row]
        shown = metric if len(filters) == 1 else name
        slow = wanted is not None and metric not in wanted.metrics and len(rows) > _MANY_ITEMS
        draws[shown], note = _draw(aggregations[metric], rows, metric, float(value), wanted, slow=slow)
        scored[shown] = _summary(float(value), draws[shown], len(rows)) | ({"note": note} if note else {})
        if draws[shown] is not None and value in (0, 1) and all(np.isscalar(row[metric]) and row[metric] == value for row in rows):
            scored[shown] |= dict(zip(("low", "high"), wilson_interval(float(value), len(rows)), strict=True))
    note = {"note": NOT_SCORABLE} if is_submission(list(aggregations)) else {}
    return {"metrics": scored, "main": _main(wanted, scored, draws, better)} | note


def score_group(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One benchmark out of its tasks: the mean of their main metrics, every task with the same weight.

    Parameters
    ----------
    tasks
        By name, what `score_task` answered.

    Returns
    -------
    dict
        As of `score_task`; `metrics` holds the tasks' main metrics by task. The interval adds half-widths in quadrature: tasks
        have documents of their own, so their errors are independent.
    """
    mains = {name: scores["main"] for name, scores in tasks.items()}
    if any(main is None for main in mains.values()):
        return {"metrics": {name: main for name, main in mains.items() if main is not None}, "main": None}
    value = sum(main["value"] for main in mains.values()) / len(mains)
    low = high = None
    if all(main["low"] is not None for main in mains.values()):
        half = math.hypot(*((main["high"] - main["low"]) / 2 for main in mains.values())) / len(mains)
        low, high = value - half, value + half
    metric = "mean of " + ", ".join(sorted({main["metric"] for main in mains.values()})) + f" over {len(mains)} tasks"
    n = sum(main["n"] for main in mains.values())
    return {"metrics": mains, "main": {"metric": metric, "value": value, "low": low, "high": high, "n": n}}


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


def _main(
    wanted: Main | None, scored: dict[str, Any], draws: dict[str, np.ndarray | None], better: dict[str, bool]
) -> dict[str, Any] | None:
    """The metric that stands for the task; of an unknown task, its first score for which more is better."""
    if wanted is None:
        names = [name for name in scored if better.get(name.split(",")[0], True)][:1]
        scale = 1.0
    else:
        names, scale = [name for name in wanted.metrics if name in scored], wanted.scale
        if len(names) < len(wanted.metrics):
            return None
    if not names:
        return None
    value = scale * sum(scored[name]["value"] for name in names)
    if len(names) == 1:
        (one,) = names
        scaled = {key: None if scored[one][key] is None else scale * scored[one][key] for key in ("value", "low", "high")}
        return {"metric": one} | scaled | {"n": scored[one]["n"]}
    known = [draws[name] for name in names]
    total = None if any(draw is None for draw in known) else scale * np.sum(known, axis=0)
    return {"metric": " + ".join(names)} | _summary(value, total, sum(scored[name]["n"] for name in names))


def _draw(
    aggregate: Callable, rows: list[dict[str, Any]], metric: str, value: float, wanted: Main | None, *, slow: bool
) -> tuple[np.ndarray | None, str | None]:
    """Values of the metric on resampled documents, or None and the reason why there are none."""
    items, clusters = [row[metric] for row in rows], _clusters(rows, metric)
    adds = wanted.adds if wanted is not None and metric in wanted.metrics else None
    numbers = _numbers(items, adds)
    if adds is not None and numbers is not None and numbers.sum() > 0:
        return value / numbers.sum() * _resampled_sums(numbers, clusters)[0], None
    if reason := _unresampled(aggregate, items, value, n_clusters=len(clusters), slow=slow):
        return None, f"no interval: {reason}"
    if numbers is not None and math.isclose(numbers.mean(), value, rel_tol=1e-9, abs_tol=1e-12):
        sums, sizes = _resampled_sums(numbers, clusters)
        return sums / sizes, None
    return _resampled_values(aggregate, items, clusters), None


def _unresampled(aggregate: Callable, items: list[Any], value: float, *, n_clusters: int, slow: bool) -> str | None:
    """Why a metric can't be computed on resamples; None when it can."""
    if n_clusters < 2:
        return "fewer than two documents"
    if "args" in inspect.signature(aggregate).parameters:
        return "this task's aggregation writes files"
    if slow:
        return "only the main metric of a task this large is resampled"
    again = float(aggregate(items))
    return None if math.isclose(again, value, rel_tol=1e-9, abs_tol=1e-12) else f"the aggregation answers {again:g} when asked again"


def _numbers(items: list[Any], field: str | None) -> np.ndarray | None:
    """The items as numbers, if that is what they are (or hold under `field`)."""
    if field is not None:
        items = [item[field] for item in items]
    if all(isinstance(item, (bool, int, float, np.number)) for item in items):
        return np.asarray(items, dtype=np.float64)
    return None


def _clusters(rows: list[dict[str, Any]], metric: str) -> list[list[int]]:
    """Row numbers that are drawn together: the questions of a pair, else single documents."""
    groups: dict[object, list[int]] = {}
    for index, row in enumerate(rows):
        fields = dict(row.get("doc", {})) | (row[metric] if isinstance(row[metric], dict) else {})
        pair = next(((key, str(fields[key])) for key in _PAIR_KEYS if fields.get(key) not in (None, "")), ("row", index))
        groups.setdefault((*pair, fields.get("category")), []).append(index)  # MME and POPE number their questions by category
    return list(groups.values())


def _picks(n: int) -> np.ndarray:
    """Indices [RESAMPLES, n] of the clusters drawn, the same in every run: differences between runs are not from drawing."""
    return np.random.default_rng([_SEED, n]).integers(0, n, size=(RESAMPLES, n))


def _resampled_sums(numbers: np.ndarray, clusters: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    sums = np.array([numbers[group].sum() for group in clusters])
    sizes = np.array([len(group) for group in clusters])
    picks = _picks(len(clusters))
    return sums[picks].sum(axis=1), sizes[picks].sum(axis=1)


def _resampled_values(aggregate: Callable, items: list[Any], clusters: list[list[int]]) -> np.ndarray:
    values = []
    for picks in _picks(len(clusters)):
        drawn = [_renamed(items[index], copy) for copy, pick in enumerate(picks) for index in clusters[pick]]
        with contextlib.redirect_stdout(io.StringIO()):  # some aggregations print their table every time
            values.append(float(aggregate(drawn)))
    return np.array(values)


def _renamed(item: Any, copy: int) -> Any:
    """A pair drawn twice must count as two pairs, so each draw gets its own id."""
    if not isinstance(item, dict):
        return item
    return item | {key: f"{item[key]}#{copy}" for key in _PAIR_KEYS if key in item}
