"""share_prefix in a sweep: the same scores, samples and resampled values as separate runs, no times, and failures of one run only."""

from __future__ import annotations

import functools
import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lmms_eval.tasks import TaskManager
from rich.console import Console
from stored import answers, read_runs, units
from test_cli import clean_surroundings, write  # noqa: F401  # a fixture that is always on
from typer.testing import CliRunner

from vlm_pruner_eval import cli
from vlm_pruner_eval.embedded import questions_path, tasks_path
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.lmms.families import load
from vlm_pruner_eval.pruners.uniform import Uniform
from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.report.load import load_sweep
from vlm_pruner_eval.store.answers import Answer, AnswerLog
from vlm_pruner_eval.sweep import main as sweep_main
from vlm_pruner_eval.sweep.config import SweepConfig, validate
from vlm_pruner_eval.sweep.grid import expand
from vlm_pruner_eval.sweep.runner import Outcome, run_sweep
from vlm_pruner_eval.sweep.units import groups, units_of

UTILS = "from vlm_pruner_eval.embedded.tasks.digitscenes_utils import doc_to_text, doc_to_visual, exist_docs\n"
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
    return load("vlmpruner_llava", pretrained="minivlm", batch_size=2, device="cpu")


def make(**changes: Any) -> SweepConfig:
    raw = {
        "name": "tiny",
        "model": {"id": "vlmpruner_llava", "pretrained": "minivlm", "batch_size": 2, "visual_tokens": 576},
        "tasks": TASKS,
        "pruning_rates": ["8/9"],
        "methods": METHODS,
        "limit": 4,
        "gallery": 0,
    }
    return validate(raw | changes)


def sweep(config: SweepConfig, folder: Path, manager: Any) -> tuple[Outcome, str]:
    console = Console(file=io.StringIO(), record=True, width=200)
    outcome = run_sweep(config, folder, console=console, load=lambda *args, **kwargs: minivlm(), task_manager=manager)
    return outcome, console.export_text()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, manager: Any) -> tuple[Path, Path]:
    """The same grid separately and shared."""
    folder = tmp_path_factory.mktemp("both")
    outcome, log = sweep(make(), folder / "separate", manager)
    assert outcome == Outcome(runs=7, skipped=0, failed=0)
    assert "share" not in log and "together" not in log
    outcome, log = sweep(make(**SHARED), folder / "shared", manager)
    assert outcome == Outcome(runs=7, skipped=0, failed=0)
    (folder / "shared.log").write_text(log)
    return folder / "separate", folder / "shared"


def test_two_rows_of_the_first_task_are_there_before_the_others_are_begun(both: tuple[Path, Path]) -> None:
    lines = (both[1].parent / "shared.log").read_text().splitlines()
    assert len(lines) == 1 + (2 + 7) + (1 + 7), "a line a unit, one a group, and the head"
    assert "7 runs on 2 tasks; loading minivlm. Runs share the image encoder and the layers before their first cuts" in lines[0]
    assert lines[1] == ("[0/14] answering 2 runs together: unpruned, digitscenes_exist; vlmpruner, 88.9 % removed, digitscenes_exist")
    assert lines[4] == "[2/14] answering 5 runs together"
    runs = read_runs(both[1])
    first, second = (runs[key].scores["digitscenes_exist"].main.value for key in ("unpruned", "vlmpruner-8of9"))
    assert lines[2] == f"[1/14] unpruned, digitscenes_exist: {first:.1f}, kept 576 of 576"
    average = f"{100 * second / first:.1f} % of unpruned"
    assert lines[3] == f"[2/14] vlmpruner, 88.9 % removed, digitscenes_exist: {second:.1f} ({average}), kept 64 of 576"
    assert [line.split(":")[0] for line in lines[5:10]] == [
        "[3/14] fastv, 88.9 % removed, digitscenes_exist",
        "[4/14] divprune, 88.9 % removed, digitscenes_exist",
        "[5/14] random seed 0, 88.9 % removed, digitscenes_exist",
        "[6/14] random seed 1, 88.9 % removed, digitscenes_exist",
        "[7/14] blind, digitscenes_exist",
    ]
    assert lines[10].startswith("[7/14] answering 7 runs together")


def test_every_unit_is_in_one_group() -> None:
    config = make(pruning_rates=["1/3", "8/9", "2/3"], methods=["fastv", "dart", "blind"])
    runs, whole = expand(config), units_of(config, expand(config))
    found = groups(whole, shared=True)
    assert [unit.run.key for unit in found[0]] == ["unpruned", "fastv-8of9"], "the first scores come early"
    assert [({unit.task for unit in group}, len(group)) for group in found] == [({TASKS[0]}, 2), ({TASKS[0]}, 6), ({TASKS[1]}, 8)]
    assert sorted(unit.path for group in found for unit in group) == sorted(unit.path for unit in whole)
    assert [len(group) for group in groups(whole, shared=False)] == [1] * 16
    first = [unit for unit in whole if unit.task == TASKS[0]]
    assert len(first) == len(runs)
    assert [len(group) for group in groups(first[1:], shared=True)] == [7], "without the unpruned run there is nothing to wait for"
    assert [len(group) for group in groups(first[:3], shared=True)] == [3], "nor a group of one, which could share nothing"
    assert [len(group) for group in groups([first[0], *first[7:]], shared=True)] == [2]
    assert groups([], shared=True) == groups([], shared=False) == []


def bare(output: Path, key: str) -> list[Answer]:
    """Answers of a run without times and batch sizes, which differ as runs are rows of one batch."""
    return [replace(answer.untimed(), batch_size=None) for answer in answers(output, key)]


def test_a_sweep_that_is_killed_in_its_second_group_loses_and_repeats_nothing(
    both: tuple[Path, Path], tmp_path: Path, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, append, written = make(**SHARED), AnswerLog.append, []

    def killed(self: AnswerLog, call: str, batch: Any, seconds: float) -> None:
        place = "/".join(self.folder.parts[-2:])
        if is_deadly and [name for name, _ in written].count(place) == 2 and place.startswith("divprune"):
            raise KeyboardInterrupt
        append(self, call, batch, seconds)
        written.extend((place, request.index) for request, _ in batch)

    monkeypatch.setattr(AnswerLog, "append", killed)
    is_deadly = True
    with pytest.raises(KeyboardInterrupt):
        sweep(config, tmp_path, manager)
    assert sorted(path.parents[1].name.split("-")[0] for path in tmp_path.rglob("record.json")) == ["unpruned", "vlmpruner"]
    is_deadly = False
    outcome, log = sweep(config, tmp_path, manager)
    assert outcome == Outcome(runs=7, skipped=0, failed=0)
    assert log.count("answering 5 runs together") == 2
    assert len(written) == len(set(written)) == 7 * 8, "every answer was computed once"
    for key in read_runs(tmp_path):
        assert bare(tmp_path, key) == bare(both[1], key)


def test_scores_answers_and_draws_are_those_of_separate_runs(both: tuple[Path, Path]) -> None:
    told = set()
    for key, one in read_runs(both[0]).items():
        other = read_runs(both[1])[key]
        for name in ("scores", "tokens", "n_answers", "documents", "memory"):
            assert getattr(other, name) == getattr(one, name), (key, name)
        found = [bare(output, key) for output in both]
        assert found[0] == found[1]
        told.add(json.dumps([answer.answer for answer in found[0]]))
        for mine, theirs in zip(units(both[0], key).values(), units(both[1], key).values(), strict=True):
            assert mine.read().kept_digest == theirs.read().kept_digest
            draws = mine.read_draws(), theirs.read_draws()
            assert draws[0].keys() == draws[1].keys() != set()
            assert all((draws[0][task] == draws[1][task]).all() for task in draws[0])
    assert len(told) > 3, "runs that all answer the same would prove nothing"


def test_shared_runs_have_no_times_and_say_so(both: tuple[Path, Path]) -> None:
    for key, one in read_runs(both[0]).items():
        other = read_runs(both[1])[key]
        assert (one.shared_prefix, other.shared_prefix) == (False, True)
        assert one.times.prefill_ms.median > 0 and one.times.total_s > 0
        assert {name for name, value in other.times if value is not None} == {"batch_sizes"}
        for answer in answers(both[1], key):
            assert answer.prefill_ms is answer.decode_ms is answer.record.selection_ms is None


def test_the_report_has_no_time_columns_for_them(both: tuple[Path, Path]) -> None:
    texts = [build(output)["md"].read_text() for output in both]
    sentence = "7 of 7 runs shared what precedes their first cuts (share_prefix), so they have no times of their own"
    assert [sentence in text for text in texts] == [False, True]
    assert ["| prefill, ms |" in text for text in texts] == [True, False]
    assert ["Not measured here: prefill, ms; selection, ms; decode, ms a step" in text for text in texts] == [False, True]
    rows = json.loads((both[1] / "report.json").read_text())["rows"]
    assert [row["prefill_ms"] for row in rows] == [None] * len(rows)


def test_they_count_as_finished_and_one_that_is_new_runs_by_itself(both: tuple[Path, Path], manager: Any) -> None:
    outcome, log = sweep(make(methods=[*METHODS, "uniform"], **SHARED), both[1], manager)
    assert outcome == Outcome(runs=8, skipped=7, failed=0)
    assert "Runs share" not in log and "together" not in log
    record = read_runs(both[1])["uniform-8of9"]
    assert record.shared_prefix is False and record.times.prefill_ms.median > 0
    assert any("7 of 8 runs shared" in note for note in load_sweep(both[1]).notes)
    build(both[1])
    rows = json.loads((both[1] / "report.json").read_text())["rows"]
    assert {row["method"] for row in rows if row["prefill_ms"] is not None} == {"uniform"}
    assert re.search(r"\| fastv \|.*\| n/a \| n/a \| n/a \| n/a \|\n", (both[1] / "report.md").read_text())


def test_a_method_that_fails_fails_its_own_run(tmp_path: Path, manager: Any) -> None:
    failing = {"name": f"{__name__}:FailsOnTwo", "label": "fails"}
    config = make(tasks=TASKS[:1], limit=5, methods=["uniform", failing, "blind"], **SHARED)
    outcome, _ = sweep(config, tmp_path, manager)
    assert outcome == Outcome(runs=4, skipped=0, failed=1)
    found = read_runs(tmp_path)
    assert [record.status for record in found.values()] == ["finished", "finished", "failed", "finished"]
    assert "1 of 5 samples failed (first: digitscenes_exist, document 2: PruningError" in found["fails-8of9"].problem
    assert minivlm().context.source is None


def test_likelihoods_are_scored_by_every_run_itself(tmp_path: Path, manager: Any) -> None:
    """Nothing is shared then, so their times are true; the tasks beside them share as ever."""
    mixed = {"tasks": ["exist_choice", "digitscenes_exist"], "limit": 3, "methods": ["uniform"]}
    for name, more in {"separate": {}, "shared": SHARED}.items():
        assert sweep(make(**mixed, **more), tmp_path / name, manager)[0].failed == 0
    for key, one in read_runs(tmp_path / "separate").items():
        other = read_runs(tmp_path / "shared")[key]
        assert one.scores == other.scores
        assert [unit.kept_digest for unit in one.units.values()] == [unit.kept_digest for unit in other.units.values()]
        scored, generated = other.units["exist_choice"], other.units["digitscenes_exist"]
        assert scored.shared_prefix is False and scored.times.prefill_ms.median > 0
        assert generated.shared_prefix is True and generated.times.prefill_ms is None


def test_how_many_rows_decode_together() -> None:
    paper = {"model": make().model.model_dump(exclude_none=True) | {"protocol": "paper"}}
    assert [make().rows_together(device) for device in ("cuda", "cpu", "mps")] == [64, 8, 8]
    assert [make(**paper, **rows).rows_together("cuda") for rows in ({}, {"shared_rows": 5})] == [1, 5]
    with pytest.raises(ConfigError, match=r"shared_rows: got 0 .int., expected the most rows of a batch"):
        make(shared_rows=0)


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
