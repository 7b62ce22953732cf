"""Documents that are drawn together, and metrics that are no means: the fast draws against the aggregations of the benchmarks."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_sweep_scores import Task, mean, rows_of

from vlm_pruner_eval.sweep.metrics import resampling
from vlm_pruner_eval.sweep.metrics.clusters import RESAMPLES, Clusters, connected, find_clusters
from vlm_pruner_eval.sweep.metrics.counts import compared, held_score
from vlm_pruner_eval.sweep.metrics.document_scores import document_scores
from vlm_pruner_eval.sweep.metrics.scores import Scored, score_task
from vlm_pruner_eval.sweep.turns import turn_scores


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


def test_mlvu_writes_the_question_where_others_have_its_number() -> None:
    """One question about two hundred videos is no cluster; also where two ask it, and the document has a number of its own."""
    from lmms_eval.tasks.mlvu.utils import mlvu_process_results

    for n in (200, 2):
        rows = []
        for i in range(n):
            doc = {"question": "Any anomalies?", "answer": "A", "task_type": "anomaly_reco", "question_id": f"6_{i}"}
            rows.append({"doc_id": i, "doc": doc, **mlvu_process_results(doc, ["(A)"])})
        assert find_clusters("mlvu_dev", rows, {}).n == n
    del doc["question_id"]
    rows = [{"doc_id": i, "doc": doc, **mlvu_process_results(doc, ["(A)"])} for i in range(200)]
    assert find_clusters("mlvu_dev", rows, {}).n == 200
    assert find_clusters("two filters", rows[:1] * 2, {}).n == 1


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

    from vlm_pruner_eval.embedded.tasks.digitscenes_utils import both_right, f1
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
    assert len(calls) <= 10 + len(items), "the aggregation was called on all resamples"
    monkeypatch.setattr(resampling, "forms", lambda items, numbers: iter(()))
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
    monkeypatch.setattr(resampling, "_PATIENCE_S", 0.0)
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
    assert [held_score(item) for item in (True, 0.3, 7, "yes", None, {"score": 1.0}, {"right": False}, {"caption": "a"})] == [
        *(1.0, 0.3, None, None, None, 1.0, 0.0, None)
    ]


def test_only_what_is_of_one_kind_is_compared() -> None:
    """A letter with a letter; a box with a sentence never; a whole answer, free text and boxes only where the metric confirms it."""
    assert [compared({"pred": pred, "answer": "B"}, strict=True) for pred in ("b ", "A", None)] == [1.0, 0.0, 0.0]
    box = [0.1, 0.2, 0.3, 0.4]
    for pred, gold in ((box, "left person"), (box, box), ("a cat", "a cat"), ("2", 2)):
        assert compared({"pred": pred, "answer": gold}, strict=True) is None
    assert compared({"prediction": "yes", "ground_truth": "no"}, strict=True) is None
    assert [compared({"pred": pred, "answer": 2}) for pred in ("2", 3, box)] == [1.0, 0.0, None]
    scores = [document_scores([{"prediction": "yes", "answer": "no"}, {"prediction": "b", "answer": "b"}], value) for value in (0.5, 0.7)]
    assert scores == [[0.0, 1.0], [None, None]]


def test_a_box_is_right_where_the_metric_says_so() -> None:
    """RefCOCO's items hold the sentence as their answer and the box beside it: the metric's own number for each box."""
    from lmms_eval.tasks.refcoco.utils_rec import refcoco_bbox_rec_acc05, refcoco_bbox_rec_process_result

    document = {"answer": "left person", "question_id": "7", "bbox": [0.1, 0.2, 0.3, 0.4]}
    boxes = ["[0.1, 0.2, 0.3, 0.4]", "[0.1, 0.2, 0.3, 0.35]", "[0.1, 0.2, 0.15, 0.3]", "nothing"] * 5
    items = [refcoco_bbox_rec_process_result(document, [box])["refcoco_ACC@0.5"] for box in boxes]
    name, metric = "refcoco_bbox_rec_testA", "refcoco_ACC@0.5"
    found = score_task(name, {f"{metric},none": 0.5}, rows_of(metric, items), Task(**{metric: refcoco_bbox_rec_acc05}))
    assert list(found.documents.values()) == [1.0, 1.0, 0.0, 0.0] * 5
    assert found.record["main"]["low"] < 50.0 < found.record["main"]["high"]


def test_text_that_is_judged_by_its_distance_has_the_metrics_score() -> None:
    def closeness(items: list[dict[str, Any]]) -> float:
        return 100.0 * mean([1.0 - abs(len(item["pred"]) - len(item["answer"])) / 4 for item in items])

    items = [{"pred": "a" * n, "answer": "aaaa"} for n in (4, 3, 2, 1)]
    assert document_scores(items, closeness(items), closeness) == [1.0, 0.75, 0.5, 0.25]
    assert document_scores(items, closeness(items), None) == [None] * 4

    def of_pairs(items: list[dict[str, Any]]) -> float:
        assert len(items) % 2 == 0
        return closeness(items)

    assert document_scores(items, closeness(items), of_pairs) == [None] * 4


# ---- MMBench: letters out of answers, all turns of a question
def mmbench(answers: list[tuple[int, str]], **changes: Any) -> list[dict[str, Any]]:
    from lmms_eval.tasks.mmbench.en_utils import mmbench_process_results

    options = {"A": "the cup", "B": "the dog", "C": "nan", "D": "nan"}
    names = {"question": "q", "answer": "A", "hint": "nan", "source": "s", "split": "dev", "category": "c", "L2-category": "l"}
    return [mmbench_process_results({"index": i, **names, **options} | changes, [text])["gpt_eval_score"] for i, text in answers]


def score_mmbench(items: list[dict[str, Any]], task: str = "mmbench_en_dev_static", images: dict | None = None) -> Scored:
    """Scored as lmms-eval does, whose aggregation is asked once, as it writes a file."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    with contextlib.redirect_stdout(io.StringIO()):
        value = 100.0 * mmbench_evaluator.eval_result(items, "static")[0]

    def writes(items: list[Any], args: object) -> float:
        raise AssertionError("called")

    return score_task(task, {"gpt_eval_score,none": value}, rows_of("gpt_eval_score", items), Task(gpt_eval_score=writes), images)


@pytest.mark.parametrize("task", ["mmbench_en_dev_static", "a_variant_of_it"])
def test_mmbench_is_resampled_and_its_documents_scored_as_it_counts_them(task: str) -> None:
    """Ten questions of two turns: right twice, right once, and right in other words."""
    turns = [(i, ("A", "A.", "A. the cup", "the cup", "B")[i % 5]) for i in range(10)]
    turns += [(1_000_000 + i, "A" if i != 1 else "B") for i in range(10)]
    found = score_mmbench(mmbench(turns), task)
    assert [found.documents[i] for i in range(10)] == [1, 0, 1, 1, 0, 1, 1, 1, 1, 0]
    assert {found.documents[i] for i in range(10, 20)} == {None}, "a question counts once, not once a turn"
    main = found.record["main"]
    assert (main["value"], found.record["clusters"]["n"]) == (70.0, 10)
    assert main["low"] < 70.0 < main["high"]
    assert np.std(found.draws) == pytest.approx(100 * math.sqrt(0.7 * 0.3 / 10), rel=0.1)


def test_mmbench_all_right_or_all_wrong_has_wilsons_interval_in_percent() -> None:
    right = score_mmbench(mmbench([(i, "A") for i in range(20)])).record["main"]
    wrong = score_mmbench(mmbench([(i, "B") for i in range(20)])).record["main"]
    assert (right["low"], right["high"]) == (pytest.approx(83.89, abs=0.01), pytest.approx(100.0))
    assert (wrong["low"], wrong["high"]) == (0.0, pytest.approx(16.11, abs=0.01))


def test_turns_are_right_where_lmms_evals_own_evaluation_says_so() -> None:
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    rng = np.random.default_rng(3)
    said = ["A"] * 9
    said += [
        "A.",
        "(A)",
        "the cup",
        "A cup is what I see here",
        "Answer: A",
        "**A**",
        "nothing",
        "",
        "E",
        "A B",
        "the cup and the dog",
    ]
    for _ in range(5):
        turns = [(i + 1_000_000 * turn, said[rng.integers(len(said))]) for i in range(20) for turn in range(1 + i % 4)]
        items = mmbench([turns[i] for i in rng.permutation(len(turns))])
        with contextlib.redirect_stdout(io.StringIO()):
            expected = mmbench_evaluator.eval_result(items, "static")[0]
        known = [score for score in turn_scores(items) if score is not None]
        assert len(known) == 20
        assert mean(known) == pytest.approx(expected)


def test_mmbench_that_a_judge_read_has_no_scores_of_ours() -> None:
    """Where the metric is not what the letters say, nothing is claimed."""
    items, task = mmbench([(i, "A" if i % 2 else "perhaps") for i in range(10)]), Task(gpt_eval_score=lambda items, args: 0.0)
    found = score_task("mmbench_en_dev", {"gpt_eval_score,none": 60.0}, rows_of("gpt_eval_score", items), task)
    assert set(found.documents.values()) == {None}
    assert "do not add up" in found.record["metrics"]["gpt_eval_score"]["note"]


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
