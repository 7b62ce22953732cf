"""A task whose aggregation fails, tears a pair or prints costs the run's other tasks nothing."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stored import scores
from sweep_standin import StandIn, make_config, task_manager, write_tasks
from test_sweep_scores import Task, rows_of

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.report.check import write_reference
from vlm_pruner_eval.report.load import load_sweep
from vlm_pruner_eval.report.rows import rows_of as table_rows
from vlm_pruner_eval.report.stats.compare import compare
from vlm_pruner_eval.report.stats.comparisons import AVERAGE
from vlm_pruner_eval.store.schema import FAILED
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.metrics.aggregations import Aggregation
from vlm_pruner_eval.sweep.metrics.scores import score_task
from vlm_pruner_eval.sweep.runner import Outcome, run_sweep

BROKEN = """
include: tiny_mean.yaml
task: tiny_broken
process_results: !function broken.score
metric_list:
  - {metric: broken, aggregation: !function broken.fail, higher_is_better: true}
"""
FUNCTIONS = """
def score(doc, results):
    print("a notice of the task")
    return {"broken": 1.0}


def fail(items):
    print("a table of the task")
    raise ZeroDivisionError("division by hf_abcdefghijklmnopqrst")
"""


MMBENCH = """
include: tiny_mean.yaml
task: tiny_mmbench
process_results: !function circular.score
metric_list:
  - metric: gpt_eval_score
    aggregation: !function lmms_eval.tasks.mmbench.en_utils.mmbench_aggregate_dev_results_static
    higher_is_better: true
"""
CIRCULAR = """
from lmms_eval.tasks.mmbench.en_utils import mmbench_process_results


def score(doc, results):
    number = int(doc["question"].split()[1].rstrip("?"))
    index = number // 2 + 1_000_000 * (number % 2)
    letter = {"yes": "A", "no": "B"}[doc["answer"]]
    names = dict.fromkeys(("hint", "source", "split", "category", "L2-category", "C", "D"), "nan")
    document = {"index": index, "question": doc["question"], "answer": letter, "A": "yes", "B": "no", **names}
    return {"gpt_eval_score": mmbench_process_results(document, [results[0] + "."])["gpt_eval_score"]}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    (folder / "broken.py").write_text(FUNCTIONS)
    (folder / "tiny_broken.yaml").write_text(BROKEN)
    (folder / "circular.py").write_text(CIRCULAR)
    (folder / "tiny_mmbench.yaml").write_text(MMBENCH)
    return task_manager(folder)


def sweep(config: SweepConfig, output: Path, tasks: Any, **options: Any) -> tuple[Outcome, StandIn, str]:
    model, console = StandIn(), Console(file=io.StringIO(), record=True, width=300)
    outcome = run_sweep(config, output, console=console, load=lambda *args, **kwargs: model, task_manager=tasks, **options)
    return outcome, model, console.export_text()


def test_a_pair_that_the_limit_tore_is_left_out(tmp_path: Path, tasks: Any) -> None:
    """13 questions are six pairs and a half; the other task counts all of them."""
    config = make_config(limit=13, methods=["fastv"])
    assert sweep(config, tmp_path / "out", tasks)[0] == Outcome(runs=2, skipped=0, failed=0)
    for run in load_sweep(tmp_path / "out").runs:
        scored = run.record.scores
        assert (scored["tiny_mean"].main.n, scored["tiny_pairs"].main.n) == (13, 12)
        assert scored["tiny_pairs"].main.low is not None
        alone = [score for score in scores(tmp_path / "out", run.key) if score.doc_id == 12]
        assert [score.score is None for score in alone] == [False, True]
    text = build(tmp_path / "out")["md"].read_text()
    assert "Note: tiny_pairs: 1 of 13 documents do not count, as the other question of their pair was not asked (an odd limit)." in text


def test_mme_with_half_a_pair_is_scored_by_its_whole_ones() -> None:
    from lmms_eval.tasks.mme.utils import mme_aggregate_results

    items = [{"question_id": f"{i // 2}.png", "category": "count", "score": float(i % 3 > 0)} for i in range(41)]
    guarded = Aggregation(mme_aggregate_results)
    value = guarded(items)
    assert (value, guarded.left_out, guarded.problem) == (mme_aggregate_results(items[:40]), {40}, None)
    found = score_task("mme_total", {"mme_total_score,none": value}, rows_of("mme_total_score", items), Task(mme_total_score=guarded))
    assert found.record["main"]["n"] == 40
    assert found.record["main"]["low"] < value < found.record["main"]["high"]


def test_an_aggregation_that_fails_costs_its_own_task(tmp_path: Path, tasks: Any, capsys: pytest.CaptureFixture) -> None:
    config, output = make_config(tasks=["tiny_mean", "tiny_broken", "tiny_pairs"], methods=["fastv"]), tmp_path / "out"
    outcome, _, log = sweep(config, output, tasks)
    assert outcome == Outcome(runs=2, skipped=0, failed=2)
    assert "tiny_broken: its aggregation of broken failed, so there is no such score (ZeroDivisionError: division by ***)." in log
    printed = capsys.readouterr()
    assert printed.out == "", "what tasks print must not mix with what programs read"
    assert "a notice of the task" in printed.err and "a table of the task" in printed.err
    (unpruned, fastv) = load_sweep(output).runs
    assert unpruned.status == fastv.status == FAILED
    trace = unpruned.record.units["tiny_broken"].traceback
    assert "ZeroDivisionError" in trace and "hf_" not in trace
    row = next(row for row in table_rows(load_sweep(output)) if row.label == "fastv")
    assert row.cells["tiny_mean"].value == fastv.record.scores["tiny_mean"].main.value
    assert (row.cells["tiny_broken"].value, row.relative.value, row.status) == (None, None, FAILED)
    text = build(output)["md"].read_text()
    assert "fastv-2of3: tiny_broken: its aggregation of broken failed" in text
    with pytest.raises(ConfigError, match="unfinished runs"):
        write_reference(output, tmp_path / "reference.json")


def test_scoring_is_tried_again_without_asking_again(tmp_path: Path, tasks: Any) -> None:
    config, output = make_config(tasks=["tiny_mean", "tiny_broken"], methods=["fastv"]), tmp_path / "out"
    assert len(sweep(config, output, tasks)[1].answered) == 2 * 24
    outcome, model, _ = sweep(config, output, tasks, retry_failed=True)
    assert (outcome.failed, model.answered) == (2, [])


def test_a_package_that_an_aggregation_lacks_stops_it() -> None:
    def lacks(items: list[float]) -> float:
        raise ModuleNotFoundError("No module named 'pycocoevalcap'")

    with pytest.raises(ModuleNotFoundError):
        Aggregation(lacks)([1.0])


def test_a_score_that_is_no_number_says_why() -> None:
    """POPE's mean of three splits, asked of one: the cell is empty, and the report tells the reason."""
    from vlm_pruner_eval.lmms.tasks.utils import pope_f1_mean

    items = [{"question_id": str(i), "prediction": "yes", "ground_truth": "yes", "score": 1.0, "category": "random"} for i in range(8)]
    results = {"pope_f1_mean,none": math.nan}
    found = score_task("pope_splits", results, rows_of("pope_f1_mean", items), Task(pope_f1_mean=pope_f1_mean)).record
    assert found["main"] is None
    assert "pope_f1_mean is no number on these 8 documents" in found["note"] and "limit" in found["note"]


def test_resampling_that_fails_costs_the_interval_only() -> None:
    def needs_all(items: list[float]) -> float:
        assert len(items) == 20 and items.count(1.0) == 10, "other items than were asked"
        return 0.7

    found = score_task("unknown", {"acc,none": 0.7}, rows_of("acc", [1.0, 0.0] * 10), Task(acc=needs_all)).record
    assert (found["main"]["value"], found["main"]["low"]) == (0.7, None)
    assert "other items than were asked" in found["metrics"]["acc"]["note"]


def test_an_average_with_mmbench_has_an_interval_and_its_questions_are_counted_once(tmp_path: Path, tasks: Any) -> None:
    """24 rows are 12 questions of two turns; the pruned model is right in words, where a comparison of texts would see a wrong answer."""
    config, output = make_config(tasks=["tiny_mean", "tiny_mmbench"], methods=["vlmpruner"], limit=None), tmp_path / "out"
    assert sweep(config, output, tasks)[0].failed == 0
    results = load_sweep(output)
    pruned = results.runs[1]
    told = [score for score in scores(output, pruned.key) if score.task == "tiny_mmbench"]
    right = {score.doc_id: score.answer == score.target for score in told}
    expected = {doc: float(right[doc] and right[doc + 1]) for doc in range(0, 24, 2)}
    assert {score.doc_id: score.score for score in told if score.score is not None} == expected
    wrong = list(expected.values()).count(0.0)
    assert 0 < wrong < 12 and pruned.record.scores["tiny_mmbench"].clusters.n == 12
    comparisons = compare(results, table_rows(results))
    average, task = (comparisons.of("vlmpruner", "2/3", name) for name in (AVERAGE, "tiny_mmbench"))
    assert average.difference.low < average.difference.value < average.difference.high
    assert average.p is not None and average.p_holm is not None
    assert task.difference.value == pytest.approx(-100 * wrong / 12)
    assert task.mcnemar_p == pytest.approx(min(1.0, 2 * 0.5**wrong))
    assert not [note for note in comparisons.notes if "no interval" in note]
