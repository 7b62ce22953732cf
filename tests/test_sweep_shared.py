"""share_prefix in a sweep: the same scores, samples and resampled values as separate runs, no times, and failures of one run only."""

from __future__ import annotations

import functools
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lmms_eval.tasks import TaskManager
from rich.console import Console
from test_cli import clean_surroundings, write  # noqa: F401  # a fixture that is always on
from typer.testing import CliRunner
from vlm_pruner_eval.lmms.journal import Journal
from vlm_pruner_eval.sweep.groups import groups
from vlm_pruner_eval.sweep.store import Store

from vlm_pruner_eval import cli
from vlm_pruner_eval.embedded import questions_path, tasks_path
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.lmms.wrapper import load
from vlm_pruner_eval.pruners.uniform import Uniform
from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.report.load import load_results
from vlm_pruner_eval.sweep import main as sweep_main
from vlm_pruner_eval.sweep.config import SweepConfig, validate
from vlm_pruner_eval.sweep.grid import expand
from vlm_pruner_eval.sweep.runner import Outcome, run_sweep

UTILS = "from vlm_pruner_eval.embedded.tasks.utils import doc_to_text, doc_to_visual, exist_docs\n"
CHOICE = """
task: exist_choice
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
process_docs: !function utils.exist_docs
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
output_type: multiple_choice
doc_to_choice: ['yes', 'no']
doc_to_target: answer
"""
TASKS = ["digitscenes_exist", "digitscenes_pairs"]
METHODS = ["vlmpruner", "fastv", "divprune", {"name": "random", "seeds": [0, 1]}, "blind"]
SHARED = {"share_prefix": True}


@dataclass(frozen=True, kw_only=True)
class FailsOnTwo(Uniform):
    """Chooses one token again and again for document 2 of exist."""

    name: ClassVar[str] = "fails_on_two"

    def choose(self, tokens, keep: int) -> torch.Tensor:
        chosen = super().choose(tokens, keep)
        return chosen[:1].expand(keep) if "exist/test/2/" in tokens.sample_id else chosen


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("choice")
    (folder / "utils.py").write_text(UTILS)
    (folder / "exist_choice.yaml").write_text(CHOICE.format(data=questions_path()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield TaskManager("ERROR", include_path=[str(tasks_path()), str(folder)], include_defaults=False, model_name="vlmpruner_llava")


@functools.cache
def minivlm() -> Any:
    return load("vlmpruner_llava", pretrained="minivlm", batch_size=4, device="cpu")


def make(**changes: Any) -> SweepConfig:
    raw = {
        "name": "tiny",
        "model": {"id": "vlmpruner_llava", "pretrained": "minivlm", "batch_size": 4, "visual_tokens": 576},
        "tasks": TASKS,
        "pruning_rates": ["8/9"],
        "methods": METHODS,
        "limit": 6,
    }
    return validate(raw | changes)


def sweep(config: SweepConfig, folder: Path, manager: Any) -> tuple[Outcome, str]:
    console = Console(file=io.StringIO(), record=True, width=200)
    outcome = run_sweep(config, folder, console=console, load=lambda *args, **kwargs: minivlm(), task_manager=manager)
    return outcome, console.export_text()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, manager: Any) -> tuple[Store, Store]:
    """The same grid separately and shared."""
    folder = tmp_path_factory.mktemp("both")
    outcome, log = sweep(make(), folder / "separate", manager)
    assert outcome == Outcome(runs=7, skipped=0, failed=0)
    assert "share" not in log and "together" not in log
    outcome, log = sweep(make(**SHARED), folder / "shared", manager)
    assert outcome == Outcome(runs=7, skipped=0, failed=0)
    (folder / "shared.log").write_text(log)
    return Store(folder / "separate"), Store(folder / "shared")


def test_two_rows_are_there_before_the_others_are_begun(both: tuple[Store, Store]) -> None:
    lines = (both[1].root.parent / "shared.log").read_text().splitlines()
    assert len(lines) == 1 + 2 + 7, "a line a run, one a group, and the head"
    assert "7 runs on 2 tasks; loading minivlm. Runs share the image encoder and the layers before their first cuts" in lines[0]
    assert lines[1] == "[0/7] answering 2 runs together: unpruned; vlmpruner, 88.9 % removed"
    assert lines[4] == "[2/7] answering 5 runs together"
    runs = {run.label: both[1].read(run.run_id) for run in expand(make())}
    scores = {label: [record["tasks"][task]["main"]["value"] for task in TASKS] for label, record in runs.items()}
    first, second = scores["unpruned"], scores["vlmpruner"]
    average = sum(100 * mine / full for mine, full in zip(second, first, strict=True)) / 2
    assert lines[2] == f"[1/7] unpruned: exist {first[0]:.1f}, pairs {first[1]:.1f}, kept 576 of 576"
    assert lines[3] == (
        f"[2/7] vlmpruner, 88.9 % removed: exist {second[0]:.1f}, pairs {second[1]:.1f} ({average:.1f} % of unpruned), kept 64 of 576"
    )
    assert [line.split(":")[0] for line in lines[5:]] == [
        "[3/7] fastv, 88.9 % removed",
        "[4/7] divprune, 88.9 % removed",
        "[5/7] random seed 0, 88.9 % removed",
        "[6/7] random seed 1, 88.9 % removed",
        "[7/7] blind",
    ]


def test_every_run_is_in_one_group() -> None:
    runs = expand(make(pruning_rates=["1/3", "8/9", "2/3"], methods=["fastv", "dart", "blind"]))
    keys = [[run.key for run in group] for group in groups(runs, shared=True)]
    assert keys[0] == ["unpruned", "fastv-8of9"]
    assert keys[1] == [run.key for run in runs if run.key not in keys[0]]
    assert [len(group) for group in groups(runs, shared=False)] == [1] * 8
    assert [len(group) for group in groups(runs[1:], shared=True)] == [7], "without the unpruned run there is nothing to wait for"
    assert [len(group) for group in groups(runs[:3], shared=True)] == [3], "nor a group of one, which could share nothing"
    assert [len(group) for group in groups([runs[0], *runs[7:]], shared=True)] == [2]
    assert groups([], shared=True) == groups([], shared=False) == []


def test_a_sweep_that_is_killed_in_its_second_group_loses_and_repeats_nothing(
    both: tuple[Store, Store], tmp_path: Path, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, append, written = make(**SHARED), Journal.append, []

    def killed(self: Journal, call: str, batch: Any, seconds: float) -> None:
        if is_deadly and [folder for folder, _ in written].count(self.folder.name) == 4 and self.folder.name.startswith("divprune"):
            raise KeyboardInterrupt
        append(self, call, batch, seconds)
        written.extend((self.folder.name, request.index) for request, _ in batch)

    monkeypatch.setattr(Journal, "append", killed)
    is_deadly = True
    with pytest.raises(KeyboardInterrupt):
        sweep(config, tmp_path, manager)
    assert sorted(path.parent.name.split("-")[0] for path in tmp_path.rglob("run.json")) == ["unpruned", "vlmpruner"]
    is_deadly = False
    outcome, log = sweep(config, tmp_path, manager)
    assert outcome == Outcome(runs=7, skipped=2, failed=0)
    assert "[2/7] answering 5 runs together" in log
    assert len(written) == len(set(written)) == 7 * 12, "every answer was computed once"
    for run in expand(config):
        assert Store(tmp_path).read_samples(run.run_id) == both[1].read_samples(run.run_id)


def without_times(sample: dict[str, Any]) -> dict[str, Any]:
    record = {name: value for name, value in sample["record"].items() if name != "selection_ms"}
    return {name: value for name, value in sample.items() if name not in ("prefill_ms", "decode_ms", "peak_bytes")} | {"record": record}


def test_scores_samples_and_draws_are_those_of_separate_runs(both: tuple[Store, Store]) -> None:
    separate, shared = both
    answers = set()
    for run in expand(make()):
        one, other = separate.read(run.run_id), shared.read(run.run_id)
        for name in ("tasks", "tokens", "kept_digest", "n_answers", "documents", "memory"):
            assert other[name] == one[name], (run.key, name)
        samples = [list(map(without_times, store.read_samples(run.run_id))) for store in both]
        assert samples[0] == samples[1]
        answers.add(json.dumps([sample["answer"] for sample in samples[0]]))
        draws = [store.read_draws(run.run_id) for store in both]
        assert draws[0].keys() == draws[1].keys() == set(TASKS)
        assert all((draws[0][task] == draws[1][task]).all() for task in TASKS)
    assert len(answers) > 3, "runs that all answer the same would prove nothing"


def test_shared_runs_have_no_times_and_say_so(both: tuple[Store, Store]) -> None:
    separate, shared = both
    for run in expand(make()):
        one, other = separate.read(run.run_id), shared.read(run.run_id)
        assert (one["shared_prefix"], other["shared_prefix"]) == (False, True)
        assert one["times"]["prefill_ms"]["median"] > 0 and one["times"]["total_s"] > 0
        assert one["times"].keys() == other["times"].keys()
        assert {name for name, value in other["times"].items() if value is not None} == {"batch_sizes"}
        for sample in shared.each_sample(run.run_id):
            assert sample["prefill_ms"] is sample["decode_ms"] is sample["record"]["selection_ms"] is None


def test_the_report_has_no_time_columns_for_them(both: tuple[Store, Store]) -> None:
    texts = [build(store.root)["md"].read_text() for store in both]
    sentence = "7 of 7 runs shared what precedes their first cuts (share_prefix), so they have no times of their own"
    assert [sentence in text for text in texts] == [False, True]
    assert ["| prefill, ms |" in text for text in texts] == [True, False]
    assert ["Not measured here: prefill, ms; selection, ms; decode, ms a step" in text for text in texts] == [False, True]
    rows = json.loads((both[1].root / "report.json").read_text())["rows"]
    assert [row["prefill_ms"] for row in rows] == [None] * len(rows)


def test_they_count_as_finished_and_one_that_is_new_runs_by_itself(both: tuple[Store, Store], manager: Any) -> None:
    shared, more = both[1], make(methods=[*METHODS, "uniform"], **SHARED)
    outcome, log = sweep(more, shared.root, manager)
    assert outcome == Outcome(runs=8, skipped=7, failed=0)
    assert "Runs share" not in log and "together" not in log
    (run,) = [run for run in expand(more) if run.method == "uniform"]
    record = shared.read(run.run_id)
    assert record["shared_prefix"] is False
    assert record["times"]["prefill_ms"]["median"] > 0
    assert any("7 of 8 runs shared" in note for note in load_results(shared.root).notes)
    assert timed_methods(shared.root) == {"uniform"}
    assert re.search(r"\| fastv \|.*\| n/a \| n/a \| n/a \| n/a \|\n", (shared.root / "report.md").read_text())


def timed_methods(folder: Path) -> set[str]:
    """Methods that the report prints a prefill time of."""
    build(folder)
    rows = json.loads((folder / "report.json").read_text())["rows"]
    return {row["method"] for row in rows if row["prefill_ms"] is not None}


def test_a_method_that_fails_fails_its_own_run(tmp_path: Path, manager: Any) -> None:
    failing = {"name": f"{__name__}:FailsOnTwo", "label": "fails"}
    config = make(tasks=TASKS[:1], limit=5, methods=["uniform", failing, "blind"], **SHARED)
    outcome, _ = sweep(config, tmp_path, manager)
    assert outcome == Outcome(runs=4, skipped=0, failed=1)
    status = {run.label: Store(tmp_path).read(run.run_id) for run in expand(config)}
    assert [record["status"] for record in status.values()] == ["finished", "finished", "failed", "finished"]
    assert "1 of 5 samples failed (first: digitscenes_exist, document 2: PruningError" in status["fails"]["problem"]
    assert minivlm().source is None


def test_likelihoods_are_scored_by_every_run_itself(tmp_path: Path, manager: Any) -> None:
    alone = make(tasks=["exist_choice"], limit=3, methods=["uniform"], **SHARED)
    assert sweep(alone, tmp_path / "alone", manager)[0].failed == 0
    for run in expand(alone):
        record = Store(tmp_path / "alone").read(run.run_id)
        assert record["shared_prefix"] is False, "nothing was shared, so times are true"
        assert record["times"]["prefill_ms"]["median"] > 0
    mixed = {"tasks": ["exist_choice", "digitscenes_exist"], "limit": 3, "methods": ["uniform"]}
    for name, more in {"separate": {}, "shared": SHARED}.items():
        assert sweep(make(**mixed, **more), tmp_path / name, manager)[0].failed == 0
    for run in expand(make(**mixed)):
        one, other = (Store(tmp_path / name).read(run.run_id) for name in ("separate", "shared"))
        assert one["tasks"] == other["tasks"] and one["kept_digest"] == other["kept_digest"]
        assert other["shared_prefix"] is True and other["times"]["prefill_ms"] is None


def test_the_key_and_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make().share_prefix is False
    assert [run.run_id for run in expand(make(**SHARED))] == [run.run_id for run in expand(make())], "answers do not depend on it"
    with pytest.raises(ConfigError, match=r"share_prefix: got 'yes' .str., expected true or false"):
        make(share_prefix="yes")
    asked: list[SweepConfig] = []
    monkeypatch.setattr(sweep_main, "run", lambda command, *reports: asked.append(command.config) or sweep_main.Ended(0))
    for options in ([], ["--share-prefix"], ["--no-share-prefix"], ["--share-prefix", "--limit", "2"]):
        result = CliRunner().invoke(cli.app, ["sweep", str(write(tmp_path)), *options])
        assert result.exit_code == 0, result.output
    assert [(config.share_prefix, config.limit) for config in asked] == [(False, 4), (True, 4), (False, 4), (True, 2)]
    asked.clear()
    for options in ([], ["--no-share-prefix"], ["--share-prefix"]):
        result = CliRunner().invoke(cli.app, ["sweep", str(write(tmp_path, **SHARED)), *options])
        assert result.exit_code == 0, result.output
    assert [config.share_prefix for config in asked] == [True, False, True], "the option goes before the file"
