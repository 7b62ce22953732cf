"""Documents that are drawn together, and metrics that are no means: the fast draws against the aggregations of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_sweep_scores import Task, mean, rows_of

from vlm_pruner_eval.sweep import scores as scores_module
from vlm_pruner_eval.sweep.clusters import RESAMPLES, Clusters, connected, find_clusters
from vlm_pruner_eval.sweep.counts import item_score
from vlm_pruner_eval.sweep.scores import score_task


# ---- clusters
def test_documents_are_connected_through_images_and_pairs() -> None:
    assert connected({"a": [1], "b": [2], "c": [1, 3], "d": [3], "e": [], "f": [2]}) == {"a": 0, "b": 1, "c": 0, "d": 0, "e": 2, "f": 1}
    late = connected({"a": [1], "b": [2], "c": [1, 2]})
    assert set(late.values()) == {0}
    pairs = rows_of("accuracy", [1.0] * 6, pair_id=["x", "x", "y", "y", "", ""], category=["a"] * 6)
    found = find_clusters("task", pairs, {0: ("p",), 1: ("p",), 2: ("q",), 3: ("q",), 4: ("q",), 5: ("r",)})
    assert (found.n, found.of) == (3, {0: 0, 1: 0, 2: 1, 3: 1, 4: 1, 5: 2})


def test_pope_is_five_hundred_images_and_not_nine_thousand_questions() -> None:
    rows = rows_of(
        "pope_f1_score", [0.0] * 9000, question_id=[str(i % 3000) for i in range(9000)], category=[i // 3000 for i in range(9000)]
    )
    assert find_clusters("pope", rows, {i: (f"{i % 3000 // 6}",) for i in range(9000)}).n == 500
    assert find_clusters("pope", rows, {}).n == 9000  # the question numbers of its three splits are no pairs


def test_mme_keeps_its_pairs_even_without_images() -> None:
    items = [{"question_id": "0001.png", "category": name, "score": 1.0} for name in ("count", "count", "colour", "colour")]
    assert find_clusters("mme", rows_of("mme_perception_score", items), {}).of == {0: 0, 1: 0, 2: 1, 3: 1}


def test_every_run_draws_the_same_documents_and_every_task_its_own() -> None:
    of = {doc: doc for doc in range(50)}
    draws = [np.concatenate(list(Clusters(task, of).weights())) for task in ("gqa", "gqa", "pope")]
    assert draws[0].shape == (RESAMPLES, 50)
    assert (draws[0].sum(1) == 50).all()
    assert (draws[0] == draws[1]).all()
    assert abs(np.corrcoef(draws[0].ravel(), draws[2].ravel())[0, 1]) < 0.02


def test_the_digest_is_of_the_assignment() -> None:
    whole, half = Clusters("gqa", {0: 0, 1: 1}).as_json(), Clusters("gqa", {0: 0, 1: 0}).as_json()
    assert (whole["n"], half["n"]) == (2, 1)
    assert whole["digest"] != half["digest"]
    assert whole["digest"] == Clusters("gqa", {1: 1, 0: 0}).as_json()["digest"]


def test_questions_about_one_image_are_drawn_together() -> None:
    """Four questions an image with the same answer: as wide as a quarter of the documents."""
    items = [float(i // 4 % 3 > 0) for i in range(400)]
    task, results = Task(acc=mean), {"acc,none": mean(items)}
    alone = score_task("unknown", results, rows_of("acc", items), task)
    together = score_task("unknown", results, rows_of("acc", items), task, {i: (str(i // 4),) for i in range(400)})
    widths = [found.record["main"]["high"] - found.record["main"]["low"] for found in (together, alone)]
    assert widths[0] / widths[1] == pytest.approx(2.0, abs=0.2)
    assert (together.record["clusters"]["n"], alone.record["clusters"]["n"]) == (100, 400)
    assert together.draws.shape == (RESAMPLES,)


def test_one_image_for_all_documents_gives_no_interval() -> None:
    found = score_task("unknown", {"acc,none": 0.5}, rows_of("acc", [1.0, 0.0] * 5), Task(acc=mean), dict.fromkeys(range(10), ("same",)))
    assert (found.record["main"]["low"], found.draws) == (None, None)
    assert "all of them share images" in found.record["metrics"]["acc"]["note"]


# ---- metrics that are no means, against the aggregation itself on every resample
def yes_no(n: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    return [(str(rng.choice(["yes", "no", "maybe"], p=[0.5, 0.4, 0.1])), "yes" if rng.random() < 0.5 else "no") for _ in range(n)]


def real_metrics() -> dict[str, tuple[str, list[Any], Callable]]:
    """By name: the task, 60 items and the aggregation of the benchmarks themselves."""
    from lmms_eval.tasks.mlvu.utils import mlvu_aggregate_results_dev
    from lmms_eval.tasks.mme.utils import mme_aggregate_results
    from lmms_eval.tasks.mmstar.utils import mmstar_aggregate_results
    from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score
    from lmms_eval.tasks.seedbench.utils import seed_aggregation_result

    from vlm_pruner_eval.bench.tasks.utils import both_right, f1
    from vlm_pruner_eval.lmms.tasks.utils import pope_f1_mean

    rng = np.random.default_rng(5)
    answers, right = yes_no(60, rng), rng.random(60) < 0.6
    splits = ["random", "popular", "adversarial"]
    kinds = ["anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning"]
    pope = [
        {"question_id": str(i), "prediction": called, "ground_truth": gold, "score": float(called == gold)}
        for i, (called, gold) in enumerate(answers)
    ]
    mme = [{"question_id": f"{i // 2}", "category": "abc"[i % 12 // 4], "score": float(right[i])} for i in range(60)]
    letters = [{"pred": "a" if right[i] else "B", "answer": "A", "question_id": str(i)} for i in range(60)]
    return {
        "pope": ("pope_f1_score", pope, pope_aggregate_f1_score),
        "pope_splits": ("pope_f1_mean", [item | {"category": splits[i % 3]} for i, item in enumerate(pope)], pope_f1_mean),
        "mme_total": ("mme_total_score", mme, mme_aggregate_results),
        "seedbench_image": ("seed_image", letters, seed_aggregation_result),
        "mmstar": ("average", [{"score": float(right[i]), "l2_category": "xy"[i % 5 > 1]} for i in range(60)], mmstar_aggregate_results),
        "mlvu_dev": (
            "mlvu_percetion_score",
            [{"pred_answer": "A" if right[i] else "B", "answer": "A", "task_type": kinds[i % 7]} for i in range(60)],
            mlvu_aggregate_results_dev,
        ),
        "digits_f1": ("f1", [{"predicted": called, "answer": gold} for called, gold in answers], f1),
        "digits_pairs": ("both_right", [{"pair_id": str(i // 2), "right": float(right[i])} for i in range(60)], both_right),
    }


@pytest.mark.parametrize("name", list(real_metrics()))
def test_counted_draws_are_those_of_the_aggregation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six documents an image; the fast way through sums, and the slow one with a thousand calls."""
    metric, items, aggregate = real_metrics()[name]
    results, images = {f"{metric},none": aggregate(items)}, {i: (str(i // 6),) for i in range(len(items))}
    calls = []

    def counted(items: list[Any]) -> float:
        calls.append(1)
        return aggregate(items)

    fast = score_task(name, results, rows_of(metric, items), Task(**{metric: counted}), images)
    assert len(calls) <= 10, "the aggregation was called on all resamples"
    monkeypatch.setattr(scores_module, "forms", lambda items: iter(()))
    slow = score_task(name, results, rows_of(metric, items), Task(**{metric: aggregate}), images)
    assert np.std(fast.draws) > 0
    usual = np.isclose(fast.draws, slow.draws, rtol=1e-9)
    assert usual.mean() >= (0.99 if name == "mlvu_dev" else 1.0)  # which scores a kind of which nothing was drawn as 0


def test_a_form_that_fits_by_chance_is_not_used() -> None:
    """The median of these scores is their mean, on the whole data only."""
    items = [0.0, 0.25, 0.5, 0.75, 1.0] * 4
    calls = []

    def median(items: list[float]) -> float:
        calls.append(1)
        return float(np.median(items))

    draws = score_task("unknown", {"acc,none": 0.5}, rows_of("acc", items), Task(acc=median)).draws
    assert len(calls) > RESAMPLES
    assert set(np.unique(draws)) <= {0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0}


def test_an_aggregation_that_takes_too_long_is_not_called_a_thousand_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_module, "_PATIENCE_S", 0.0)
    got = score_task("unknown", {"acc,none": 1.0}, rows_of("acc", [1.0, 0.0, 1.0]), Task(acc=lambda items: float(any(items))))
    assert (got.draws, got.record["main"]["low"]) == (None, None)
    assert "takes too long" in got.record["metrics"]["acc"]["note"]


def test_a_metric_that_some_resamples_leave_undefined_has_no_interval() -> None:
    from vlm_pruner_eval.lmms.tasks.utils import pope_f1_mean

    items = [
        {"question_id": str(i), "prediction": "yes", "ground_truth": "yes", "category": name}
        for i, name in enumerate(["random", "popular", "adversarial"])
    ]
    got = score_task("pope_splits", {"pope_f1_mean,none": 1.0}, rows_of("pope_f1_mean", items), Task(pope_f1_mean=pope_f1_mean))
    assert "not defined on every resample" in got.record["metrics"]["pope_f1_mean"]["note"]


# ---- scores of documents
def test_a_document_has_the_score_that_its_item_holds() -> None:
    assert [item_score(item) for item in (True, 0.3, 7, "yes", None, {"score": 1.0}, {"right": False}, {"caption": "a"})] == [
        *(1.0, 0.3, None, None, None, 1.0, 0.0, None)
    ]
    assert [item_score({"pred": pred, "answer": "B"}) for pred in ("b ", "A")] == [1.0, 0.0]
    assert item_score({"prediction": "yes", "ground_truth": "no", "question_id": "1"}) == 0.0


def test_documents_are_scored_by_the_main_metric() -> None:
    perception = rows_of("mme_perception_score", [{"question_id": "0", "score": 1.0, "category": "a"}] * 2)
    cognition = [row | {"doc_id": row["doc_id"] + 2} for row in rows_of("mme_cognition_score", [{"question_id": "0", "score": 0.0}] * 2)]
    values = {"mme_perception_score,none": 200.0, "mme_cognition_score,none": 0.0}
    found = score_task("mme", values, perception + cognition, Task(mme_perception_score=lambda items: 200.0, mme_cognition_score=mean))
    assert found.documents == {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0}


def test_nothing_but_wrong_answers_in_points_is_no_share() -> None:
    """Wilson's interval is one of shares: it is used for 20 of 20 right letters, not for 0 of 2000 points."""
    wrong = [{"question_id": str(i // 2), "category": "a", "score": 0.0} for i in range(40)]
    points = score_task(
        "mme_total", {"mme_total_score,none": 0.0}, rows_of("mme_total_score", wrong), Task(mme_total_score=lambda items: 0.0)
    )
    assert (points.record["main"]["low"], points.record["main"]["high"]) == (0.0, 0.0)
    letters = rows_of("seed_image", [{"pred": "a", "answer": "A"}] * 20)
    right = score_task("seedbench_image", {"seed_image,none": 1.0}, letters, Task(seed_image=lambda items: 1.0))
    assert right.record["main"]["low"] == pytest.approx(83.89, abs=0.01)
