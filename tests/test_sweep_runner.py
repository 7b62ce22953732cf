from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stored import answers, read_runs, scores, units
from sweep_standin import N_VISUAL, Behaviour, StandIn, make_config, task_manager, write_tasks

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.store.kept import Kept
from vlm_pruner_eval.store.schema import RunRecord
from vlm_pruner_eval.store.summaries import Median, Spread
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.metrics.scores import NOT_SCORABLE
from vlm_pruner_eval.sweep.opening import unscorable
from vlm_pruner_eval.sweep.runner import Outcome, run_sweep


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return task_manager(write_tasks(tmp_path_factory.mktemp("tasks")))


class Sweep:
    """Runs sweeps with a stand-in model into one folder."""

    def __init__(self, output: Path, tasks: Any):
        self.output, self.tasks = output, tasks
        self.loaded: list[StandIn] = []
        self.log = ""

    def __call__(self, config: SweepConfig, behaviour: Behaviour | None = None, **options: Any) -> Outcome:
        def load(model_id: str, **args: object) -> StandIn:
            assert model_id == "vlmpruner_llava"
            assert args == {
                "pretrained": "somewhere/tiny",
                "dtype": "auto",
                "batch_size": 1,
                "protocol": "hf",
                "attn_implementation": "sdpa",
            }
            self.loaded.append(StandIn(behaviour))
            return self.loaded[-1]

        console = Console(file=io.StringIO(), record=True, width=200)
        try:
            return run_sweep(config, self.output, console=console, load=load, task_manager=self.tasks, **options)
        finally:
            self.log = console.export_text()

    def record(self, key: str) -> RunRecord:
        return read_runs(self.output)[key]


@pytest.fixture
def sweep(tmp_path: Path, tasks: Any) -> Sweep:
    return Sweep(tmp_path / "out", tasks)


def test_a_sweep_loads_once_runs_everything_and_records_it(sweep: Sweep) -> None:
    config = make_config()
    assert sweep(config) == Outcome(runs=6, skipped=0, failed=0)
    (model,) = sweep.loaded
    assert model.evaluated == [method for method in ("none", "vlmpruner", "random", "random", "random", "blind") for _ in range(2)]
    assert model.cleaned == 12
    record = sweep.record("vlmpruner-2of3")
    assert record.status == "finished"
    assert record.tokens.kept == Spread(mean=12.0, min=12, max=12, n=24)
    assert record.tokens.asked.mean == 12.0
    assert record.tokens.layer_averaged.mean == (2 * N_VISUAL + 2 * 12) / 4
    assert record.tokens.quirks == {"stall": 12}
    assert record.times.prefill_ms == Median(median=20.0, iqr=0.0, n=24)
    assert set(record.scores) == {"tiny_mean", "tiny_pairs"}
    main = record.scores["tiny_mean"].main
    assert main.low <= main.value <= main.high
    assert main.n == record.n_answers / 2 == 12
    assert {"torch", "transformers", "lmms_eval", "python", "vlm_pruner_eval"} <= set(record.provenance.versions)
    assert record.provenance.processor
    assert record.provenance.model["device"] == "cpu"


def test_samples_hold_answer_target_score_and_what_was_kept(sweep: Sweep) -> None:
    config = make_config()
    sweep(config)
    found = scores(sweep.output, "vlmpruner-2of3")
    assert [(score.task, score.doc_id) for score in found] == [(task, i) for task in ("tiny_mean", "tiny_pairs") for i in range(12)]
    for score in found[:12]:
        assert score.items == {"right": float(score.answer == score.target)} and score.score == score.items["right"]
    kept = answers(sweep.output, "vlmpruner-2of3")
    assert [(answer.task, answer.doc_id) for answer in kept] == [(score.task, score.doc_id) for score in found]
    assert {len(answer.record.kept_positions) for answer in kept} == {12}
    value = sweep.record("vlmpruner-2of3").scores["tiny_mean"].main.value
    assert value == pytest.approx(sum(score.score for score in found[:12]) / 12)


def test_finished_runs_are_skipped_and_nothing_is_loaded_for_them(sweep: Sweep) -> None:
    config = make_config()
    sweep(config)
    before = {path: path.stat().st_mtime_ns for path in sweep.output.rglob("record.json")}
    assert sweep(config) == Outcome(runs=6, skipped=6, failed=0)
    assert len(sweep.loaded) == 1
    assert {path: path.stat().st_mtime_ns for path in sweep.output.rglob("record.json")} == before


def test_only_what_is_new_or_unfinished_is_run(sweep: Sweep) -> None:
    sweep(make_config())
    config = make_config(methods=["vlmpruner", "fastv"])
    (units(sweep.output, "vlmpruner-2of3")["tiny_pairs"].folder / "answers.jsonl").unlink()
    assert sweep(config) == Outcome(runs=3, skipped=1, failed=0)
    assert sweep.loaded[-1].evaluated == ["vlmpruner", "fastv", "fastv"]
    assert "unpruned, tiny_mean: finished before, skipped" in sweep.log


def test_another_task_or_more_questions_answer_only_what_is_new(sweep: Sweep) -> None:
    sweep(make_config(methods=["vlmpruner"], tasks=["tiny_mean"], limit=8))
    assert sweep(make_config(methods=["vlmpruner"], limit=8)) == Outcome(runs=2, skipped=0, failed=0)
    assert sweep.loaded[-1].answered == [("tiny_pairs", i) for _ in range(2) for i in range(8)]
    assert sweep(make_config(methods=["vlmpruner"], limit=12)) == Outcome(runs=2, skipped=0, failed=0)
    assert sorted(set(sweep.loaded[-1].answered)) == [(task, i) for task in ("tiny_mean", "tiny_pairs") for i in range(8, 12)]
    whole = sweep.record("vlmpruner-2of3")
    assert whole.n_answers == 24 and whole.scores["tiny_mean"].main.n == 12
    assert sweep(make_config(methods=["vlmpruner"], limit=4)) == Outcome(runs=2, skipped=0, failed=0)
    assert sweep.loaded[-1].answered == [] and sweep.record("vlmpruner-2of3").n_answers == 8


def test_a_limit_that_was_raised_gives_the_scores_of_a_fresh_sweep(sweep: Sweep, tmp_path: Path, tasks: Any) -> None:
    sweep(make_config(limit=6))
    sweep(make_config(limit=12))
    fresh = Sweep(tmp_path / "fresh", tasks)
    fresh(make_config(limit=12))
    for key, record in read_runs(fresh.output).items():
        assert sweep.record(key).scores == record.scores
        assert answers(sweep.output, key) == answers(fresh.output, key)


def test_a_changed_parameter_reuses_nothing(sweep: Sweep) -> None:
    sweep(make_config(methods=["vlmpruner"]))
    assert sweep(make_config(methods=[{"name": "vlmpruner", "threshold": 0.7}])) == Outcome(runs=2, skipped=1, failed=0)


def test_a_changed_checkpoint_reuses_nothing(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(make_config(methods=["vlmpruner"]))
    monkeypatch.setattr("vlm_pruner_eval.sweep.provenance.checkpoint_files", lambda *args: {"model.safetensors": "changed"})
    assert sweep(make_config(methods=["vlmpruner"])) == Outcome(runs=2, skipped=0, failed=0)


def test_a_failed_sample_fails_its_run_and_the_others_go_on(sweep: Sweep) -> None:
    config = make_config()
    assert sweep(config, Behaviour(fail={("vlmpruner", 3)})) == Outcome(runs=6, skipped=0, failed=1)
    record = sweep.record("vlmpruner-2of3")
    assert record.status == "failed"
    assert record.problem.startswith("1 of 12 samples failed (first: tiny_mean, document 3: PruningError: kept 3 tokens, expected 12.")
    assert [failure.doc_id for failure in record.failures] == [3, 3]
    assert sweep.record("blind").status == "finished"
    assert re.search(r"\] vlmpruner, 66.7 % removed, tiny_mean: FAILED after \d+ s: 1 of 12 samples failed", sweep.log)
    assert sweep(config) == Outcome(runs=6, skipped=5, failed=1), "a failure stays one until it is asked to be tried again"
    assert "1 of 6 runs failed; --retry-failed repeats only what failed" in sweep.log
    assert sweep(config, retry_failed=True) == Outcome(runs=6, skipped=5, failed=0)
    assert sweep.record("vlmpruner-2of3").status == "finished"
    assert sweep.loaded[-1].evaluated == ["vlmpruner"] * 2


def test_only_failed_runs_are_tried_again(sweep: Sweep) -> None:
    sweep(make_config(), Behaviour(explode={"random"}))
    more = make_config(methods=["vlmpruner", {"name": "random", "seeds": [0, 1, 2]}, "blind", "uniform"])
    assert sweep(more, retry_failed=True) == Outcome(runs=7, skipped=3, failed=0, left=1)
    assert sweep.loaded[-1].evaluated == ["random"] * 6
    assert "1 of 7 runs are left" in sweep.log
    assert sweep(more) == Outcome(runs=7, skipped=6, failed=0)


def test_an_exception_fails_its_run_with_a_traceback(sweep: Sweep) -> None:
    config = make_config()
    assert sweep(config, Behaviour(explode={"random"})) == Outcome(runs=6, skipped=0, failed=3)
    record = sweep.record("random-2of3-seed0").units["tiny_mean"]
    assert record.problem == "RuntimeError: the device is gone"
    assert "generate_until" in record.traceback
    assert record.scores == {}


def test_an_answer_that_is_missing_fails_its_run(sweep: Sweep) -> None:
    config = make_config(methods=["vlmpruner"])
    assert sweep(config, Behaviour(forget={"vlmpruner"})).failed == 1
    assert "1 of 12 documents have no answer of their own (first: document 11)" in sweep.record("vlmpruner-2of3").problem


def test_tasks_that_keep_state_start_afresh_in_every_run(sweep: Sweep) -> None:
    config = make_config(tasks=["tiny_state"], methods=["uniform", "blind"])
    sweep(config)
    assert sweep.record("unpruned").scores["tiny_state"].main.value == 1.0
    assert 0 < sweep.record("uniform-2of3").scores["tiny_state"].main.value < 1.0


def test_an_output_that_is_a_file_is_refused_before_loading(sweep: Sweep) -> None:
    sweep.output.write_text("mine")
    with pytest.raises(ConfigError, match="is not a folder; choose another folder with --output"):
        sweep(make_config())
    assert sweep.loaded == [] and sweep.output.read_text() == "mine"


def test_an_interrupt_is_not_a_failed_run(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: StandIn, requests: list[Any]) -> list[Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(StandIn, "generate_until", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep(make_config())
    assert list(sweep.output.rglob("record.json")) == []
    assert len(json.loads((sweep.output / "sweep.json").read_text())["runs"]) == 6


def test_digests_are_of_kept_sets_whatever_the_padding_and_the_order() -> None:
    def digest(order: list[int], positions: list[int]) -> str:
        lengths = {"kv_lengths": [9, 9], "visual_lengths": [8, 3], "layer": 1}
        counts = {"row": 0, "n_visual": 8, "n_asked": 3, "n_kept": 3, "n_images": 1}
        return Kept.of(SampleRecord(**counts, **lengths, order=order, kept_positions=positions)).digest

    plain = digest([4, 1, 6], [11, 14, 16])
    assert plain == digest([4, 1, 6], [18, 21, 23]), "padding shifts a row"
    assert plain == digest([6, 4, 1], [11, 14, 16]), "the order is another one"
    assert len({plain, digest([4, 1, 7], [11, 14, 17]), digest([4, 1, 6], [11, 14, 17])}) == 3


SUBMISSION = """
include: tiny_mean.yaml
task: tiny_submission
process_results: !function submit.collect
metric_list:
  - {metric: submission, aggregation: !function submit.write, higher_is_better: true}
"""
SUBMIT = """
from pathlib import Path


def collect(doc, results):
    return {"submission": results[0]}


def write(items, args):
    Path(args.output_path).mkdir(parents=True, exist_ok=True)
    (Path(args.output_path) / "submission.txt").write_text("\\n".join(items))
"""


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A task that only writes a file to submit, and a group that papers print as one number."""
    folder = write_tasks(tmp_path_factory.mktemp("benchmark"))
    (folder / "submit.py").write_text(SUBMIT)
    (folder / "tiny_submission.yaml").write_text(SUBMISSION)
    (folder / "group.yaml").write_text("group: mvbench\ntask: [tiny_mean, tiny_pairs]\n")
    (folder / "plain.yaml").write_text("group: plain\ntask: [tiny_mean, tiny_submission]\n")
    return task_manager(folder)


def test_a_task_that_is_scored_elsewhere_says_so_before_during_and_after(tmp_path: Path, benchmark: Any) -> None:
    sweep, config = Sweep(tmp_path / "out", benchmark), make_config(tasks=["plain"], methods=["blind"])
    assert unscorable(config, benchmark) == ["tiny_submission"]
    assert sweep(config) == Outcome(runs=2, skipped=0, failed=0)
    assert "tiny_submission is not locally scorable" in sweep.log
    found = sweep.record("unpruned").scores
    assert list(found) == ["tiny_mean", "tiny_submission"]
    assert (found["tiny_submission"].metrics, found["tiny_submission"].main) == ({}, None)
    assert found["tiny_submission"].note == NOT_SCORABLE
    folder = units(sweep.output, "unpruned")["plain"].folder
    assert (folder / "submission.txt").read_text().splitlines() == ["no", "yes"] * 6
    text = build(sweep.output)["md"].read_text()
    assert f"Note: tiny_submission is {NOT_SCORABLE}; without its score, rows have no relative average." in text
    assert f"tiny_submission: {NOT_SCORABLE}" in text
    assert re.search(r"\| unpruned \| 1\.0 \[[^|]+\] \| n/a \| n/a \|", text)


def test_a_benchmark_that_is_a_group_is_one_score(tmp_path: Path, benchmark: Any) -> None:
    sweep, config = Sweep(tmp_path / "out", benchmark), make_config(tasks=["mvbench", "tiny_state"], methods=["fastv"])
    assert sweep(config) == Outcome(runs=2, skipped=0, failed=0)
    assert "not locally scorable" not in sweep.log
    found = sweep.record("fastv-2of3").scores
    assert list(found) == ["mvbench", "tiny_state"]
    members = found["mvbench"].metrics
    assert list(members) == ["tiny_mean", "tiny_pairs"]
    assert found["mvbench"].main.value == pytest.approx(sum(member.value for member in members.values()) / 2)
    assert found["mvbench"].main.n == 24
    assert {answer.task for answer in answers(sweep.output, "fastv-2of3")} == {"tiny_mean", "tiny_pairs", "tiny_state"}


def test_stopping_says_what_is_kept_and_going_on_where(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(methods=["fastv"], tasks=["tiny_mean"])
    answer, left = StandIn._answer, iter(range(12 + 5))

    def stopped(self: StandIn, *about: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return answer(self, *about)

    monkeypatch.setattr(StandIn, "_answer", stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep(config)
    assert sweep.log.splitlines()[-1] == "Stopped. 1 of 2 runs finished, 5 of 12 answers of fastv-2of3 kept; the same command goes on."
    monkeypatch.setattr(StandIn, "_answer", answer)
    sweep(config)
    assert "fastv, 66.7 % removed, tiny_mean: goes on behind 5 of 12" in sweep.log
    assert "unpruned, tiny_mean: goes on" not in sweep.log


def test_stopping_before_anything_was_written_says_so(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StandIn, "configure", stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep(make_config(methods=["fastv"]))
    assert "Stopped before the first run" in sweep.log and not sweep.output.exists()


def test_runs_that_failed_before_say_how_they_are_repeated(sweep: Sweep) -> None:
    sweep(make_config(methods=["fastv"]), Behaviour(fail={("fastv", 3)}))
    sweep(make_config(methods=["fastv", "uniform"]))
    assert "fastv, 66.7 % removed, tiny_mean: failed before, skipped; --retry-failed repeats it" in sweep.log


def test_a_run_without_its_configuration_is_made_again_out_of_its_answers(sweep: Sweep) -> None:
    config = make_config(methods=["fastv"])
    sweep(config)
    before = sweep.record("fastv-2of3").scores
    (units(sweep.output, "fastv-2of3")["tiny_mean"].folder.parent / "run.json").unlink()
    assert sweep(config) == Outcome(runs=2, skipped=1, failed=0)
    assert sweep.loaded[-1].answered == [] and sweep.record("fastv-2of3").scores == before


def test_a_run_that_failed_before_its_first_answer_is_failed(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: StandIn, requests: list[Any]) -> list[Any]:
        if self.method == "fastv":
            raise KeyError("a key of the task")
        return generate(self, requests)

    generate = StandIn.generate_until
    monkeypatch.setattr(StandIn, "generate_until", broken)
    config = make_config(methods=["fastv"])
    assert sweep(config) == Outcome(runs=2, skipped=0, failed=1)
    assert sweep(config) == Outcome(runs=2, skipped=1, failed=1), "it is not tried again unasked"
    assert sweep.record("fastv-2of3").status == "failed"
