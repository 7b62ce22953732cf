from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sweep_standin import N_VISUAL, Behaviour, StandIn, make_config, task_manager, write_tasks

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.sweep import records
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.grid import expand
from vlm_pruner_eval.sweep.opening import unscorable
from vlm_pruner_eval.sweep.runner import Outcome, run_sweep
from vlm_pruner_eval.sweep.scores import NOT_SCORABLE
from vlm_pruner_eval.sweep.store import Store


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return task_manager(write_tasks(tmp_path_factory.mktemp("tasks")))


class Sweep:
    """Runs sweeps with a stand-in model into one folder."""

    def __init__(self, output: Path, tasks: Any):
        self.output, self.tasks, self.store = output, tasks, Store(output)
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

    def record(self, config: SweepConfig, key: str) -> dict[str, Any]:
        (run,) = [run for run in expand(config) if run.key == key]
        record = self.store.read(run.run_id)
        assert record is not None
        return record


@pytest.fixture
def sweep(tmp_path: Path, tasks: Any) -> Sweep:
    return Sweep(tmp_path / "out", tasks)


def test_a_sweep_loads_once_runs_everything_and_records_it(sweep: Sweep) -> None:
    config = make_config()
    assert sweep(config) == Outcome(runs=6, skipped=0, failed=0)
    (model,) = sweep.loaded
    assert model.evaluated == ["none", "vlmpruner", "random", "random", "random", "blind"]
    assert model.cleaned == 6
    record = sweep.record(config, "vlmpruner-2of3")
    assert record["status"] == "finished"
    assert record["tokens"]["kept"] == {"mean": 12.0, "min": 12, "max": 12}
    assert record["tokens"]["asked"]["mean"] == 12.0
    assert record["tokens"]["layer_averaged"]["mean"] == (2 * N_VISUAL + 2 * 12) / 4
    assert record["tokens"]["quirks"] == {"stall": 12}
    assert record["times"]["prefill_ms"] == {"median": 20.0, "iqr": 0.0, "n": 24}
    assert set(record["tasks"]) == {"tiny_mean", "tiny_pairs"}
    main = record["tasks"]["tiny_mean"]["main"]
    assert main["low"] <= main["value"] <= main["high"]
    assert main["n"] == record["n_answers"] / 2 == 12
    provenance = record["provenance"]
    assert {"torch", "transformers", "lmms_eval", "python", "vlm_pruner_eval"} <= set(provenance["versions"])
    assert provenance["processor"]
    assert provenance["model"]["device"] == "cpu"


def test_samples_hold_answer_target_score_and_what_was_kept(sweep: Sweep) -> None:
    config = make_config()
    sweep(config)
    samples = sweep.store.read_samples(sweep.record(config, "vlmpruner-2of3")["run_id"])
    assert [(sample["task"], sample["doc_id"]) for sample in samples] == [
        (task, i) for task in ("tiny_mean", "tiny_pairs") for i in range(12)
    ]
    for sample in samples[:12]:
        assert sample["metrics"] == {"right": float(sample["answer"] == sample["target"])}
        assert len(sample["record"]["kept_positions"]) == 12
    value = sweep.record(config, "vlmpruner-2of3")["tasks"]["tiny_mean"]["main"]["value"]
    assert value == pytest.approx(sum(sample["metrics"]["right"] for sample in samples[:12]) / 12)


def test_finished_runs_are_skipped_and_nothing_is_loaded_for_them(sweep: Sweep) -> None:
    config = make_config()
    sweep(config)
    before = {path: path.stat().st_mtime_ns for path in sweep.output.rglob("run.json")}
    assert sweep(config) == Outcome(runs=6, skipped=6, failed=0)
    assert len(sweep.loaded) == 1
    assert {path: path.stat().st_mtime_ns for path in sweep.output.rglob("run.json")} == before


def test_a_journal_that_outlived_its_run_is_removed(sweep: Sweep) -> None:
    """A process was killed after it had recorded the last run."""
    config = make_config()
    sweep(config)
    journal = sweep.store.run_dir(sweep.record(config, "vlmpruner-2of3")["run_id"]) / "journal.jsonl"
    journal.write_text("any\n")
    assert sweep(config).skipped == 6
    assert not journal.exists() and len(sweep.loaded) == 1


def test_only_what_is_new_or_unfinished_is_run(sweep: Sweep) -> None:
    sweep(make_config())
    config = make_config(methods=["vlmpruner", "fastv"])
    broken = sweep.store.run_dir(sweep.record(config, "vlmpruner-2of3")["run_id"])
    (broken / "samples.jsonl").unlink()
    assert sweep(config) == Outcome(runs=3, skipped=1, failed=0)
    assert sweep.loaded[-1].evaluated == ["vlmpruner", "fastv"]
    assert "unpruned: finished before, skipped" in sweep.log


def test_a_changed_parameter_reuses_nothing(sweep: Sweep) -> None:
    sweep(make_config(methods=["vlmpruner"]))
    assert sweep(make_config(methods=[{"name": "vlmpruner", "threshold": 0.7}])) == Outcome(runs=2, skipped=1, failed=0)
    assert sweep(make_config(methods=["vlmpruner"], limit=4)) == Outcome(runs=2, skipped=0, failed=0)


def test_a_changed_checkpoint_reuses_nothing(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(make_config(methods=["vlmpruner"]))
    monkeypatch.setattr("vlm_pruner_eval.sweep.provenance.checkpoint_files", lambda *args: {"model.safetensors": "changed"})
    assert sweep(make_config(methods=["vlmpruner"])) == Outcome(runs=2, skipped=0, failed=0)


def test_a_failed_sample_fails_its_run_and_the_others_go_on(sweep: Sweep) -> None:
    config = make_config()
    assert sweep(config, Behaviour(fail={("vlmpruner", 3)})) == Outcome(runs=6, skipped=0, failed=1)
    record = sweep.record(config, "vlmpruner-2of3")
    assert record["status"] == "failed"
    assert record["problem"].startswith("2 of 24 samples failed (first: tiny_mean, document 3: PruningError: kept 3 tokens, expected 12.")
    assert [failure["doc_id"] for failure in record["failures"]] == [3, 3]
    assert sweep.record(config, "blind")["status"] == "finished"
    assert re.search(r"\] vlmpruner, 66.7 % removed: FAILED after \d+ s: 2 of 24 samples failed", sweep.log)
    assert sweep(config) == Outcome(runs=6, skipped=5, failed=1), "a failure stays one until it is asked to be tried again"
    assert "1 of 6 runs failed; --retry-failed repeats only those" in sweep.log
    assert sweep(config, retry_failed=True) == Outcome(runs=6, skipped=5, failed=0)
    assert sweep.record(config, "vlmpruner-2of3")["status"] == "finished"
    assert sweep.loaded[-1].evaluated == ["vlmpruner"]


def test_only_failed_runs_are_tried_again(sweep: Sweep) -> None:
    sweep(make_config(), Behaviour(explode={"random"}))
    more = make_config(methods=["vlmpruner", {"name": "random", "seeds": [0, 1, 2]}, "blind", "uniform"])
    assert sweep(more, retry_failed=True) == Outcome(runs=7, skipped=3, failed=0, left=1)
    assert sweep.loaded[-1].evaluated == ["random"] * 3
    assert "1 of 7 runs are left; without --retry-failed they are run" in sweep.log
    assert sweep(more) == Outcome(runs=7, skipped=6, failed=0)


def test_an_exception_fails_its_run_with_a_traceback(sweep: Sweep) -> None:
    config = make_config()
    assert sweep(config, Behaviour(explode={"random"})) == Outcome(runs=6, skipped=0, failed=3)
    record = sweep.record(config, "random-2of3-seed0")
    assert record["problem"] == "RuntimeError: the device is gone"
    assert "generate_until" in record["traceback"]
    assert record["tasks"] == {}


def test_an_answer_that_is_missing_fails_its_run(sweep: Sweep) -> None:
    config = make_config(methods=["vlmpruner"])
    assert sweep(config, Behaviour(forget={"vlmpruner"})).failed == 1
    assert "1 of 12 documents have no answer of their own (first: document 11)" in sweep.record(config, "vlmpruner-2of3")["problem"]


def test_tasks_that_keep_state_start_afresh_in_every_run(sweep: Sweep) -> None:
    config = make_config(tasks=["tiny_state"], methods=["uniform", "blind"])
    sweep(config)
    assert sweep.record(config, "unpruned")["tasks"]["tiny_state"]["main"]["value"] == 1.0
    assert 0 < sweep.record(config, "uniform-2of3")["tasks"]["tiny_state"]["main"]["value"] < 1.0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks": ["tiny_meen"]}, "tasks: got 'tiny_meen', which lmms-eval does not know; did you mean 'tiny_mean'?"),
        ({"methods": ["vlmprune"]}, "methods[0]: method: got 'vlmprune', which is unknown; did you mean 'vlmpruner'?"),
        ({"methods": ["fastv"]}, "fastv-2of3: layer: got 99, expected 0 to 3."),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(sweep: Sweep, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(make_config(**changes), Behaviour(refuse={"fastv"}))
    assert caught.value.problems[0].startswith(sentence)
    assert not sweep.output.exists()


def test_an_output_that_is_a_file_is_refused_before_loading(sweep: Sweep) -> None:
    sweep.output.write_text("mine")
    with pytest.raises(ConfigError, match="is not a folder"):
        sweep(make_config())
    assert sweep.loaded == []


def test_half_of_torchruns_environment_is_refused(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="got WORLD_SIZE=2 without RANK and MASTER_ADDR and MASTER_PORT; start by torchrun"):
        sweep(make_config())
    assert not sweep.output.exists()


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        ({"WORLD_SIZE": "two"}, "got WORLD_SIZE='two', expected a whole number; start by torchrun, or unset it"),
        ({"WORLD_SIZE": "-2"}, "got WORLD_SIZE='-2', expected a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "1.5"}, "got RANK='1.5', expected a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "got RANK=2 and WORLD_SIZE=2, expected a rank from 0 to 1"),
    ],
)
def test_what_no_torchrun_says_is_refused(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], match: str) -> None:
    for name, value in ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=match):
        sweep(make_config())
    assert not sweep.output.exists()


def test_an_interrupt_is_not_a_failed_run(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: StandIn, requests: list[Any]) -> list[Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(StandIn, "generate_until", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep(make_config())
    assert list(sweep.output.rglob("run.json")) == []
    assert len(json.loads((sweep.output / "sweep.json").read_text())["runs"]) == 6


def test_digests_are_of_kept_sets_whatever_the_padding_and_the_order(sweep: Sweep) -> None:
    model = StandIn()
    model.configure("vlmpruner", "2/3")
    draw = random.Random
    plain = model._record(3, draw(1)).as_json()
    model.behaviour.shift_padding = 7
    padded = model._record(3, draw(1)).as_json()
    reordered = plain | {"order": plain["order"][::-1]}
    assert plain["kept_positions"] != padded["kept_positions"]
    assert records.kept_digest(plain) == records.kept_digest(padded) == records.kept_digest(reordered)
    other = plain | {"order": [*plain["order"][1:], 35 if 35 not in plain["order"] else 34]}
    scattered = plain | {"kept_positions": [*plain["kept_positions"][:-1], plain["kept_positions"][-1] + 1]}
    assert len({records.kept_digest(record) for record in (plain, other, scattered)}) == 3
    assert records.kept_digest(None) is None


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
    record = sweep.record(config, "unpruned")
    assert list(record["tasks"]) == ["tiny_mean", "tiny_submission"]
    del record["tasks"]["tiny_submission"]["clusters"]
    assert record["tasks"]["tiny_submission"] == {"metrics": {}, "main": None, "note": NOT_SCORABLE}
    assert (sweep.store.run_dir(record["run_id"]) / "submission.txt").read_text().splitlines() == ["no", "yes"] * 6
    text = build(sweep.output)["md"].read_text()
    assert f"Note: tiny_submission is {NOT_SCORABLE}; without its score, rows have no relative average." in text
    assert f"tiny_submission: {NOT_SCORABLE}" in text
    assert re.search(r"\| unpruned \| 1\.0 \[[^|]+\] \| n/a \| n/a \|", text)


def test_a_benchmark_that_is_a_group_is_one_score(tmp_path: Path, benchmark: Any) -> None:
    sweep, config = Sweep(tmp_path / "out", benchmark), make_config(tasks=["mvbench", "tiny_state"], methods=["fastv"])
    assert sweep(config) == Outcome(runs=2, skipped=0, failed=0)
    assert "not locally scorable" not in sweep.log
    tasks = sweep.record(config, "fastv-2of3")["tasks"]
    assert list(tasks) == ["mvbench", "tiny_state"]
    members = tasks["mvbench"]["metrics"]
    assert list(members) == ["tiny_mean", "tiny_pairs"]
    assert tasks["mvbench"]["main"]["value"] == pytest.approx(sum(member["value"] for member in members.values()) / 2)
    assert tasks["mvbench"]["main"]["n"] == 24
    samples = sweep.store.read_samples(sweep.record(config, "fastv-2of3")["run_id"])
    assert {sample["task"] for sample in samples} == {"tiny_mean", "tiny_pairs", "tiny_state"}


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
    assert "fastv, 66.7 % removed: goes on behind 5 of 12" in sweep.log
    assert "unpruned: goes on" not in sweep.log


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
    assert "fastv, 66.7 % removed: failed before, skipped; --retry-failed repeats it" in sweep.log
