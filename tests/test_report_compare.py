from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from report_sweeps import as_embedded, copied, edit, folder

from vlm_pruner_eval.report.answer_arrays import TaskAnswers, answers_of
from vlm_pruner_eval.report.load import Results, load_sweep
from vlm_pruner_eval.report.rows import rows_of
from vlm_pruner_eval.report.stats import paired
from vlm_pruner_eval.report.stats.compare import compare
from vlm_pruner_eval.report.stats.comparisons import AVERAGE, Comparison, Comparisons
from vlm_pruner_eval.report.stats.flip_counts import flips
from vlm_pruner_eval.report.tables.table_layout import differences
from vlm_pruner_eval.store.answers import Answer
from vlm_pruner_eval.store.folder import DocumentScore
from vlm_pruner_eval.sweep.metrics.scores import percentile_interval
from vlm_pruner_eval.sweep.records import document_answer

TASKS = ["tiny_mean", "tiny_pairs"]


@pytest.fixture(scope="module")
def plain() -> tuple[Results, Comparisons]:
    """96 documents of 48 pairs a task."""
    return compared(folder("plain"))


def compared(root: Path) -> tuple[Results, Comparisons]:
    results = load_sweep(root)
    return results, compare(results, rows_of(results))


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    return copied("plain", tmp_path)


def draws_of(results: Results, key: str) -> dict[str, np.ndarray]:
    """Replicates by task of one run."""
    (run,) = [run for run in results.runs if run.key == key]
    return results.read_draws(run.run_id)


def scores_of(results: Results, key: str, task: str) -> list[DocumentScore]:
    """Scores of one run by document."""
    (run,) = [run for run in results.runs if run.key == key]
    return [one for one in results.each_score(run.run_id) if one.task == task]


def known(comparisons: Comparisons, label: str, task: str, rate: str | None = "2/3") -> Comparison:
    found = comparisons.of(label, rate, task)
    assert found is not None
    return found


def test_a_difference_has_the_interval_of_paired_draws(plain: tuple[Results, Comparisons]) -> None:
    results, comparisons = plain
    ours, theirs = draws_of(results, "fastv-2of3"), draws_of(results, "unpruned")
    for task in TASKS:
        cell, reference = known(comparisons, "fastv", task), known(comparisons, "unpruned", task, None)
        assert cell.difference.value == pytest.approx(cell.score.value - reference.score.value)
        draws = ours[task] - theirs[task]
        assert (cell.difference.low, cell.difference.high) == percentile_interval(draws)
        assert cell.p == paired.p_of_no_difference(cell.difference.value, draws, 48)
        assert (reference.difference, reference.p, reference.flip_rate, reference.gain_kept) == (None, None, None, None)
    cell = known(comparisons, "fastv", "tiny_mean")
    alone = np.std(ours["tiny_mean"]) ** 2 + np.std(theirs["tiny_mean"]) ** 2
    assert np.std(ours["tiny_mean"] - theirs["tiny_mean"]) <= np.sqrt(alone) + 1e-9
    assert cell.difference.high < 0
    assert cell.p < 0.001


def test_flips_and_mcnemar_are_counted_over_documents(plain: tuple[Results, Comparisons]) -> None:
    results, comparisons = plain
    ours, theirs = (scores_of(results, key, "tiny_mean") for key in ("fastv-2of3", "unpruned"))
    changed = sum(mine.answer != other.answer for mine, other in zip(ours, theirs, strict=True))
    lost = sum(mine.score < other.score for mine, other in zip(ours, theirs, strict=True))
    gained = sum(mine.score > other.score for mine, other in zip(ours, theirs, strict=True))
    cell = known(comparisons, "fastv", "tiny_mean")
    assert cell.flip_rate == pytest.approx(changed / 96)
    assert (lost > 10, gained) == (True, 0)
    assert cell.mcnemar_p == pytest.approx(2 * 0.5**lost)
    assert known(comparisons, "fastv", AVERAGE).flip_rate == pytest.approx(
        np.mean([known(comparisons, "fastv", task).flip_rate for task in TASKS])
    )


def test_the_average_is_resampled_with_its_denominators(plain: tuple[Results, Comparisons]) -> None:
    results, comparisons = plain
    ours, theirs = draws_of(results, "vlmpruner-2of3"), draws_of(results, "unpruned")
    draws = 100 * np.mean([ours[task] / theirs[task] for task in TASKS], axis=0)
    cell = known(comparisons, "vlmpruner", AVERAGE)
    assert (cell.score.low, cell.score.high) == pytest.approx(percentile_interval(draws))
    assert cell.score.value == pytest.approx(rows_of(results)[1].relative.value)
    assert cell.difference == paired.Estimate(
        *(pytest.approx(value - 100) for value in (cell.score.value, cell.score.low, cell.score.high))
    )
    whole = known(comparisons, "unpruned", AVERAGE, None).score
    assert (whole.value, whole.low, whole.high) == (100.0, 100.0, 100.0)


def test_draws_of_seeds_are_averaged(plain: tuple[Results, Comparisons]) -> None:
    results, comparisons = plain
    draws = [draws_of(results, f"random-2of3-seed{seed}")["tiny_mean"] for seed in range(3)]
    cell = known(comparisons, "random", "tiny_mean")
    assert (cell.score.low, cell.score.high) == percentile_interval(np.mean(draws, axis=0))
    assert (cell.seeds, cell.sd > 0, cell.mcnemar_p) == (3, True, None)
    assert 0 < cell.flip_rate < 1


def test_the_share_of_the_gain_over_blind(plain: tuple[Results, Comparisons]) -> None:
    _, comparisons = plain
    for task in (*TASKS, AVERAGE):
        row, unpruned, blind = (
            known(comparisons, label, task, rate).score.value for label, rate in (("fastv", "2/3"), ("unpruned", None), ("blind", None))
        )
        gain = known(comparisons, "fastv", task).gain_kept
        assert gain.value == pytest.approx((row - blind) / (unpruned - blind))
        assert gain.low < gain.value < gain.high
        assert known(comparisons, "blind", task, None).gain_kept is None


def test_holm_goes_over_the_whole_table(plain: tuple[Results, Comparisons]) -> None:
    _, comparisons = plain
    tested = [cell for cell in comparisons.cells if cell.p is not None]
    assert len(tested) == 5 * 3  # rows but the unpruned one; two tasks and their average
    assert [cell.p_holm for cell in tested] == paired.holm([cell.p for cell in tested])
    smallest = min(tested, key=lambda cell: cell.p)
    assert smallest.p_holm == pytest.approx(15 * smallest.p)


def test_the_best_is_bold_only_where_the_data_decide_it(plain: tuple[Results, Comparisons]) -> None:
    results, comparisons = plain
    assert len(comparisons.contests) == 3
    for contest in comparisons.contests:
        scores = {label: known(comparisons, label, contest.task).score.value for label in ("vlmpruner", "fastv", "uniform", "random")}
        first, second, *_ = sorted(scores, key=lambda label: -scores[label])
        assert (contest.best, contest.runner_up, contest.pruning_rate) == (first, second, "2/3")
        assert contest.difference.value == pytest.approx(scores[first] - scores[second])
        assert contest.decided == (contest.difference.low > 0)
        bold = [cell.label for cell in comparisons.cells if cell.task == contest.task and cell.bold]
        assert bold == ([first] if contest.decided else [])
    assert {contest.decided for contest in comparisons.contests} == {True, False} or all(one.decided for one in comparisons.contests)
    pairs = [pair for pair in comparisons.pairs if pair.task == AVERAGE]
    assert len(pairs) == 6
    assert [pair.p_holm for pair in pairs] == paired.holm([pair.p for pair in pairs])
    twin = dataclasses.replace(rows_of(results)[1], label="twin")
    tied = compare(results, [*rows_of(results)[:2], twin, *rows_of(results)[2:]])
    assert not any(cell.bold for cell in tied.cells)


def test_iso_compute_rows_do_not_compete(plain: tuple[Results, Comparisons]) -> None:
    results, comparisons = plain
    rows = [dataclasses.replace(row, iso_layer=2) if row.label == "vlmpruner" else row for row in rows_of(results)]
    assert {contest.best for contest in comparisons.contests} == {"vlmpruner"}
    assert "vlmpruner" not in {name for contest in compare(results, rows).contests for name in (contest.best, contest.runner_up)}


def test_nobody_wins_on_the_embedded_benchmark(changed: Path) -> None:
    comparisons = compared(as_embedded(changed))[1]
    assert comparisons.contests
    assert not any(contest.decided for contest in comparisons.contests)
    assert not any(cell.bold for cell in comparisons.cells)


def test_the_power_is_that_of_the_observed_spread(plain: tuple[Results, Comparisons]) -> None:
    results, comparisons = plain
    reference = draws_of(results, "unpruned")["tiny_mean"]
    errors = [
        paired.standard_error(draws_of(results, f"{key}-2of3")["tiny_mean"] - reference, 48) for key in ("vlmpruner", "fastv", "uniform")
    ]
    seeds = [draws_of(results, f"random-2of3-seed{seed}")["tiny_mean"] for seed in range(3)]
    errors.append(paired.standard_error(np.mean(seeds, axis=0) - reference, 48))
    power = {entry.task: entry for entry in comparisons.power}
    assert power["tiny_mean"].smallest == pytest.approx(paired.smallest_difference(np.median(errors)))
    assert [(power[task].n_documents, power[task].n_clusters) for task in TASKS] == [(96, 48), (96, 48)]


def test_questions_about_one_image_make_one_cluster() -> None:
    results, comparisons = compared(folder("images"))
    power = comparisons.power
    assert [(entry.n_documents, entry.n_clusters) for entry in power] == [(96, 12), (96, 12)]
    first, second = (run.record.scores["tiny_mean"].clusters for run in results.runs)
    assert first == second
    images = {tuple(one.images) for one in results.each_score(results.runs[0].run_id)}
    assert len(images) == 12


def test_a_task_that_cannot_be_resampled_says_why() -> None:
    comparisons = compared(folder("state"))[1]
    cell = known(comparisons, "vlmpruner", "tiny_state")
    assert (cell.difference.low, cell.p, cell.p_holm) == (None, None, None)
    assert cell.flip_rate is not None
    assert known(comparisons, "vlmpruner", "tiny_mean").difference.low is not None
    assert known(comparisons, "vlmpruner", AVERAGE).difference.low is None
    assert any("tiny_state: differences have no interval (no interval: the aggregation answers" in note for note in comparisons.notes)
    assert "Relative averages have no interval and no p value: tiny_state has none." in comparisons.notes
    assert not [note for note in comparisons.notes if "in this row" in note]


def test_draws_of_other_clusters_are_not_paired(changed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(changed, "fastv-2of3", lambda record: record["scores"]["tiny_mean"]["clusters"].update(digest="other"), "tiny_mean")
    monkeypatch.setattr("vlm_pruner_eval.report.load._other_documents", lambda runs: [])  # it refuses such a table
    comparisons = compared(changed)[1]
    assert known(comparisons, "fastv", "tiny_mean").difference.low is None
    assert known(comparisons, "fastv", "tiny_pairs").difference.low is not None
    assert known(comparisons, "uniform", "tiny_mean").difference.low is not None
    (note,) = [note for note in comparisons.notes if "in this row" in note]
    assert note == "fastv: its relative average has no interval and no p value: tiny_mean has none in this row."


def test_without_the_unpruned_run_rows_are_compared_with_each_other_only(changed: Path) -> None:
    shutil.rmtree(next(changed.glob("runs/unpruned-*")))
    comparisons = compared(changed)[1]
    assert all(cell.difference is None and cell.flip_rate is None for cell in comparisons.cells)
    assert {contest.task for contest in comparisons.contests} == set(TASKS)
    assert comparisons.contests[0].difference.low is not None
    assert "unpruned run is not finished" in comparisons.notes[0]


def test_a_sweep_without_any_run_has_nothing_to_compare(changed: Path) -> None:
    shutil.rmtree(changed / "runs")
    comparisons = compared(changed)[1]
    assert (comparisons.cells, comparisons.contests, comparisons.pairs, comparisons.power) == ((), (), (), ())


def test_of_scored_choices_the_likeliest_by_mean_over_its_tokens_is_the_answer() -> None:
    choices = [
        Answer("t", "test", 0, text, choice=i, loglikelihood=value, n_new_tokens=n)
        for i, (text, value, n) in enumerate([("a", -4.0, 1), ("a longer one", -6.0, 3), ("c", -5.0, 2)])
    ]
    assert document_answer(choices) == 1
    failed = dataclasses.replace(choices[1], loglikelihood=None, error="no memory")
    assert document_answer([choices[0], failed, choices[2]]) == 2
    assert document_answer([Answer("t", "test", 0, "yes")]) == "yes"


def test_answers_of_a_run_are_arrays_in_the_order_of_documents() -> None:
    lines = [
        DocumentScore(task=task, doc_id=i, answer=text, score=s)
        for task, i, text, s in [("a", 2, "x", 1), ("b", 0, 3, None), ("a", 1, "x", 0.5)]
    ]
    found = answers_of(lines)
    assert found["a"].doc_ids.tolist() == [1, 2] and found["a"].scores.tolist() == [0.5, 1.0]
    assert found["a"].answers[0] == found["a"].answers[1]
    assert np.isnan(found["b"].scores).all()


def task_answers(*documents: tuple[str, float | None]) -> TaskAnswers:
    return answers_of(DocumentScore(task="t", doc_id=i, answer=text, score=s) for i, (text, s) in enumerate(documents))["t"]


def test_flips_need_the_same_documents() -> None:
    ours = {"a": task_answers(("yes", 1.0), ("no", None)), "b": task_answers(("x", 1.0))}
    theirs = {"a": task_answers(("yes", 1.0), ("yes", 1.0)), "b": task_answers(("x", 1.0))}
    assert flips(ours, theirs, ["a", "b"]).rate == pytest.approx(1 / 3)
    assert flips(ours, theirs, ["a"]).mcnemar_p is None
    assert flips(ours, theirs, ["b"]).mcnemar_p == 1.0
    theirs["a"] = task_answers(("yes", 1.0), ("yes", None))  # a further turn of a question of MMBench is not counted apart
    assert flips(ours, theirs, ["a", "b"]).mcnemar_p == 1.0
    ours["a"] = task_answers(("yes", 1.0))
    assert flips(ours, theirs, ["a"]) is None
    assert flips(ours, theirs, ["c"]) is None


def test_averages_without_an_interval_say_why(changed: Path) -> None:
    (path,) = changed.glob("runs/unpruned-*/tiny_mean/draws.json")
    draws = json.loads(path.read_text())
    draws["tiny_mean"][0] = 0.0
    path.write_text(json.dumps(draws))
    comparisons = compared(changed)[1]
    assert {cell.score.low for cell in comparisons.cells if cell.task == AVERAGE} == {None}
    assert any("in some resamples of tiny_mean the unpruned model scores 0" in note for note in comparisons.notes)


def test_a_row_that_scores_as_unpruned_has_no_interval_and_says_so(changed: Path) -> None:
    """Documents that are all alike say nothing of the width of an interval, and a p of 1 would sound as if they did."""
    (unpruned,) = changed.glob("runs/unpruned-*")
    (pruned,) = changed.glob("runs/vlmpruner-2of3-*")
    for task in TASKS:
        shutil.copytree(unpruned / task, pruned / task, dirs_exist_ok=True)
    results = load_sweep(changed)
    rows = rows_of(results)
    comparisons = compare(results, rows)
    cell = comparisons.of("vlmpruner", "2/3", "tiny_mean")
    assert (cell.difference, cell.alike) == (paired.Estimate(0.0), 96)
    table = differences(rows, results.tasks, comparisons)
    (line,) = [line for line in table.lines if line.head == "vlmpruner"]
    assert [(entry.text, entry.small) for entry in table.cells(line)] == [(f"{0.0:+.1f}", (f"{n} of {n} equal",)) for n in (96, 96, 192)]
    other = comparisons.of("fastv", "2/3", "tiny_mean")
    assert other.alike is None and other.difference.low < other.difference.value < other.difference.high
