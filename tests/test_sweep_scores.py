from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vlm_pruner_eval.sweep.metrics.scores import MAIN_METRICS, NOT_SCORABLE, Scored, score_group, score_task


class Task:
    """The two methods of an lmms-eval task that scoring asks."""

    def __init__(self, **aggregations: Callable):
        self._aggregations = aggregations

    def aggregation(self) -> dict[str, Callable]:
        return self._aggregations

    def higher_is_better(self) -> dict[str, bool]:
        return {name: name != "error_rate" for name in self._aggregations}


def mean(items: list[float]) -> float:
    return sum(items) / len(items)


def pairs_right(items: list[dict[str, Any]]) -> float:
    pairs: dict[str, list[float]] = {}
    for item in items:
        pairs.setdefault(item["question_id"], []).append(item["score"])
    assert all(len(scores) == 2 for scores in pairs.values())
    return sum(100.0 * sum(scores) / 2 + 100.0 * (sum(scores) == 2) for scores in pairs.values()) / len(pairs)


def rows_of(metric: str, items: list[Any], **docs: list[Any]) -> list[dict[str, Any]]:
    return [{"doc_id": i, "doc": {name: values[i] for name, values in docs.items()}, metric: item} for i, item in enumerate(items)]


def test_the_interval_of_a_mean_is_the_one_of_the_normal_law() -> None:
    items = [1.0] * 240 + [0.0] * 60
    scores = score_task("unknown", {"acc,none": 0.8, "alias": "x"}, rows_of("acc", items), Task(acc=mean)).record
    got = scores["metrics"]["acc"]
    half = 1.96 * math.sqrt(0.8 * 0.2 / 300)
    assert (got["value"], got["n"]) == (0.8, 300)
    assert got["low"] == pytest.approx(0.8 - half, abs=0.012)
    assert got["high"] == pytest.approx(0.8 + half, abs=0.012)
    assert scores["main"] == {"metric": "acc", **got}


def test_any_aggregation_is_resampled_the_way_it_is_computed() -> None:
    items = [float(i % 10) for i in range(100)]
    results = {"mean,none": mean(items), "mean_twice,none": 2 * mean(items)}
    rows = [row | {"mean_twice": row["mean"]} for row in rows_of("mean", items)]
    scores = score_task("unknown", results, rows, Task(mean=mean, mean_twice=lambda items: 2 * mean(items))).record["metrics"]
    assert scores["mean_twice"]["low"] == pytest.approx(2 * scores["mean"]["low"])
    assert scores["mean_twice"]["high"] == pytest.approx(2 * scores["mean"]["high"])


def test_pairs_stay_together_and_a_pair_drawn_twice_counts_twice() -> None:
    items = [{"question_id": i // 2, "score": float(i % 4 != 1), "category": "colour"} for i in range(80)]
    rows = rows_of("mme_perception_score", items)
    scores = score_task("mme_half", {"mme_perception_score,none": pairs_right(items)}, rows, Task(mme_perception_score=pairs_right)).record
    got = scores["metrics"]["mme_perception_score"]
    assert got["low"] < got["value"] < got["high"]


def test_numbers_of_a_pair_are_drawn_together_too() -> None:
    paired = [1.0, 1.0, 0.0, 0.0] * 50
    rows = rows_of("accuracy", paired, pair_id=[i // 2 for i in range(200)])
    alone = score_task("unknown", {"accuracy,none": 0.5}, rows_of("accuracy", paired, pair_id=[""] * 200), Task(accuracy=mean)).record[
        "main"
    ]
    together = score_task("unknown", {"accuracy,none": 0.5}, rows, Task(accuracy=mean)).record["main"]
    widths = [score["high"] - score["low"] for score in (together, alone)]
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(2), abs=0.15)  # half as many independent draws


def test_mme_is_the_sum_of_its_two_parts() -> None:
    perception = [{"question_id": i // 2, "score": float(i % 3 > 0), "category": "a"} for i in range(40)]
    cognition = [{"question_id": i // 2, "score": float(i % 4 > 0), "category": "b"} for i in range(20)]
    rows = rows_of("mme_perception_score", perception) + rows_of("mme_cognition_score", cognition)
    values = pairs_right(perception), pairs_right(cognition)
    results = {"mme_perception_score,none": values[0], "mme_cognition_score,none": values[1]}
    main = score_task("mme", results, rows, Task(mme_perception_score=pairs_right, mme_cognition_score=pairs_right)).record["main"]
    assert main["metric"] == "mme_perception_score + mme_cognition_score"
    assert main["value"] == pytest.approx(sum(values))
    assert main["n"] == 60
    assert main["low"] < main["value"] < main["high"]


def test_a_part_that_is_missing_leaves_no_main_metric() -> None:
    items = [{"question_id": i // 2, "score": 1.0, "category": "a"} for i in range(4)]
    rows = rows_of("mme_perception_score", items)
    assert score_task("mme", {"mme_perception_score,none": 200.0}, rows, Task(mme_perception_score=pairs_right)).record["main"] is None


def test_an_aggregation_that_remembers_is_not_resampled() -> None:
    seen = []

    def remembers(items: list[float]) -> float:
        seen.extend(items)
        return sum(seen)

    items = [1.0, 0.0, 1.0]
    got = score_task("unknown", {"points,none": remembers(items)}, rows_of("points", items), Task(points=remembers)).record["metrics"][
        "points"
    ]
    assert (got["value"], got["low"], got["high"]) == (2.0, None, None)
    assert "answers 4 when asked again" in got["note"]


def test_an_aggregation_that_writes_files_is_never_called_again() -> None:
    """Its interval is that of the mean where the mean of the items is its score; else there is none."""

    def writes(items: list[float], args: object) -> float:
        raise AssertionError("called")

    rows, task = rows_of("submitted", [1.0, 0.0] * 20), Task(submitted=writes)
    mean_of_them, other = (score_task("unknown", {"submitted,none": value}, rows, task).record["main"] for value in (0.5, 0.6))
    assert mean_of_them["high"] - mean_of_them["low"] == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 40), abs=0.03)
    assert other["low"] is None
    note = score_task("unknown", {"submitted,none": 0.6}, rows, task).record["metrics"]["submitted"]["note"]
    assert "writes files" in note


def test_ocrbench_points_get_an_interval_without_calling_its_aggregation() -> None:
    def writes(items: list[Any], args: object) -> float:
        raise AssertionError("called")

    items = [{"question_type": "x", "score": int(i % 2)} for i in range(1000)]
    rows = rows_of("ocrbench_accuracy", items)
    main = score_task("ocrbench", {"ocrbench_accuracy,none": 0.5}, rows, Task(ocrbench_accuracy=writes)).record["main"]
    assert main["value"] == 500.0
    assert main["low"] == pytest.approx(500 - 31, abs=5)
    assert main["high"] == pytest.approx(500 + 31, abs=5)


@pytest.mark.parametrize(("score", "ends"), [(0, (0.0, 16.11 * 20 / 100)), (1, (83.89 * 20 / 100, 20.0))])
def test_ocrbench_all_alike_has_wilsons_interval_in_points(score: int, ends: tuple[float, float]) -> None:
    """20 questions, a point each."""
    rows = rows_of("ocrbench_accuracy", [{"question_type": "x", "score": score}] * 20)
    found = score_task("ocrbench", {"ocrbench_accuracy,none": 20 * score / 1000}, rows, Task(ocrbench_accuracy=lambda items, args: 0.0))
    assert (found.record["main"]["low"], found.record["main"]["high"]) == (
        pytest.approx(ends[0], abs=0.01),
        pytest.approx(ends[1], abs=0.01),
    )
    assert "note" not in found.record["metrics"]["ocrbench_accuracy"]
    assert set(found.draws) == {20.0 * score}


def test_submissions_and_tables_are_no_scores() -> None:
    rows = [{"doc_id": 0, "doc": {}, "acc": 1.0, "submission": {}}, {"doc_id": 1, "doc": {}, "acc": 0.0, "submission": {}}]
    scores = score_task("unknown", {"acc,none": 0.5, "submission,none": None}, rows, Task(acc=mean, submission=mean)).record
    assert list(scores["metrics"]) == ["acc"]


def test_a_task_with_nothing_but_a_submission_is_marked() -> None:
    rows = rows_of("submission", [{"answer": "a"}, {"answer": "b"}])
    scores = score_task("mmbench_en_test", {"submission,none": None}, rows, Task(submission=mean)).record
    clusters = scores.pop("clusters")
    assert (scores, clusters["n"]) == ({"metrics": {}, "main": None, "note": NOT_SCORABLE}, 2)
    rows = [row | {"acc": 1.0} for row in rows]
    assert "note" not in score_task("unknown", {"acc,none": 1.0, "submission,none": None}, rows, Task(acc=mean, submission=mean)).record


def scored(value: float, half: float, n: int, draws: np.ndarray | None = None, **changes: Any) -> Scored:
    main = {"metric": "acc", "value": value, "low": value - half, "high": value + half, "n": n} | changes
    return Scored({"metrics": {}, "main": main, "clusters": {"n": n // 2, "digest": f"{n:x}"}}, draws, {})


def test_a_group_is_the_mean_of_its_tasks_with_their_errors_in_quadrature() -> None:
    """Half-widths 3 and 4 of two tasks: 5 of their sum, 2.5 of their mean."""
    tasks = {"a": scored(50.0, 3.0, 200, np.array([48.0, 52.0])), "b": scored(70.0, 4.0, 100, np.array([72.0, 70.0]))}
    group = score_group(tasks)
    assert group.record["main"] == {"metric": "mean of acc over 2 tasks", "value": 60.0, "low": 57.5, "high": 62.5, "n": 300}
    assert group.record["metrics"]["b"]["value"] == 70.0
    assert group.record["clusters"]["n"] == 150
    assert group.draws.tolist() == [60.0, 61.0]
    half_known = score_group(tasks | {"b": scored(70.0, 4.0, 100, low=None, high=None)})
    assert (half_known.record["main"]["value"], half_known.record["main"]["low"], half_known.draws) == (60.0, None, None)
    no_score = Scored({"metrics": {}, "main": None, "clusters": {"n": 0, "digest": ""}}, None, {})
    assert score_group(tasks | {"c": no_score}).record["main"] is None


def test_aggregations_that_print_are_resampled_in_silence(capsys: pytest.CaptureFixture) -> None:
    def prints(items: list[float]) -> float:
        print("a table")
        return 2 * mean(items)

    scores = score_task("unknown", {"acc,none": 1.0}, rows_of("acc", [1.0, 0.0] * 10), Task(acc=prints)).record
    assert scores["main"]["low"] < 1.0 < scores["main"]["high"]
    assert capsys.readouterr().out.count("a table") <= 1


def test_the_main_metric_of_an_unknown_task_is_one_of_which_more_is_better() -> None:
    rows = [{"doc_id": i, "doc": {}, "error_rate": 0.2, "score": 0.8} for i in range(3)]
    results = {"error_rate,none": 0.2, "score,none": 0.8}
    assert score_task("unknown", results, rows, Task(error_rate=mean, score=mean)).record["main"]["metric"] == "score"
    assert score_task("unknown", {"error_rate,none": 0.2}, rows, Task(error_rate=mean)).record["main"] is None


def test_filters_do_not_mix() -> None:
    rows = rows_of("acc", [1.0, 1.0]) + rows_of("acc", [0.0, 1.0])
    scores = score_task("unknown", {"acc,strict": 1.0, "acc,loose": 0.5}, rows, Task(acc=mean)).record["metrics"]
    assert (scores["acc,strict"]["value"], scores["acc,strict"]["n"]) == (1.0, 2)
    assert scores["acc,loose"]["low"] == 0.0


def test_the_same_score_everywhere_is_no_certainty() -> None:
    """20 of 20: 20 / (20 + 1.96^2) to 1, and the mirror image for 0 of 20; also in the unit of papers."""
    for value in (0.0, 1.0):
        scores = score_task(
            "digitscenes_read", {"exact_match,none": value}, rows_of("exact_match", [value] * 20), Task(exact_match=mean)
        ).record
        assert scores["main"]["low"] == pytest.approx(100 * (0.8389 if value else 0.0), abs=0.01)
        assert scores["main"]["high"] == pytest.approx(100 * (1.0 if value else 0.1611), abs=0.01)


def test_one_document_has_no_interval() -> None:
    got = score_task("unknown", {"acc,none": 1.0}, rows_of("acc", [1.0]), Task(acc=mean)).record["metrics"]["acc"]
    assert (got["low"], got["high"]) == (None, None)


def test_intervals_of_a_mean_cover_it_as_often_as_they_say() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        items = (rng.random(100) < 0.7).astype(float).tolist()
        got = score_task("unknown", {"acc,none": mean(items)}, rows_of("acc", items), Task(acc=mean)).record["main"]
        covered += got["low"] <= 0.7 <= got["high"]
    assert 0.90 <= covered / 200 <= 0.99


def test_every_packaged_task_and_every_benchmark_of_the_paper_has_a_main_metric() -> None:
    from vlm_pruner_eval.embedded import GROUP, TASKS

    assert {f"{GROUP}_{task}" for task in TASKS} <= set(MAIN_METRICS)
    assert {"gqa", "mme", "pope", "ocrbench", "seedbench", "textvqa_val", "ok_vqa_val2014", "scienceqa_img"} <= set(MAIN_METRICS)
