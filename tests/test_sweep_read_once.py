"""Data sets are read once in a session; all that has state, tasks and their modules, is made afresh for every unit."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from lmms_eval.api.task import ConfigurableTask
from rich.console import Console
from stored import read_runs
from sweep_standin import StandIn, make_config, task_manager, write_tasks

from vlm_pruner_eval.sweep.read_once import read_once
from vlm_pruner_eval.sweep.runner import run_sweep

CUT = """

def process_docs(docs):
    with open(__file__ + ".calls", "a") as calls:
        calls.write("x")
    cut = docs.select(range(10))
    docs.set_format("numpy")
    return cut
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each data set is really loaded."""
    times: Counter = Counter()
    load = datasets.load_dataset

    def counted(*args: Any, **kwargs: Any) -> Any:
        times[str(kwargs.get("data_files"))] += 1
        return load(*args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", counted)
    return times


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Sweeps one task; gives its score by run."""
    folder = write_tasks(tmp_path / "tasks")
    (folder / "utils.py").write_text((folder / "utils.py").read_text() + CUT)
    (folder / "tiny_state.yaml").write_text((folder / "tiny_state.yaml").read_text() + "process_docs: !function utils.process_docs\n")
    manager = task_manager(folder)

    def swept(name: str) -> dict[str, Any]:
        config = make_config(tasks=["tiny_state"], methods=["uniform", "blind"], limit=None)
        run_sweep(config, tmp_path / name, console=Console(file=io.StringIO()), load=lambda *_, **__: StandIn(), task_manager=manager)
        return {key: record.scores["tiny_state"].main for key, record in read_runs(tmp_path / name).items()}

    return swept


def test_a_data_set_is_read_once_and_the_module_of_its_task_begins_anew(sweep: Callable, asked: Counter, tmp_path: Path) -> None:
    found = sweep("once")
    assert list(asked.values()) == [1] and (tmp_path / "tasks" / "utils.py.calls").read_text() == "x"
    assert {score.n for score in found.values()} == {10}, "each run cut the same documents"
    right = {key: score.value * 10 for key, score in found.items()}
    assert right["unpruned"] == 10 and 0 < right["uniform-2of3"] < 10 and 0 <= right["blind"] < 10, "points of one run, not of all so far"


def test_another_sweep_of_the_same_process_reads_anew(sweep: Callable, asked: Counter) -> None:
    assert sweep("first") == sweep("second")
    assert list(asked.values()) == [2]


def test_what_a_task_does_to_its_data_set_stays_with_it(tmp_path: Path) -> None:
    manager, held = task_manager(write_tasks(tmp_path, 4)), {}
    download = ConfigurableTask.download

    def loaded() -> Any:
        with read_once(held):
            return manager.load_task_or_group(["tiny_mean"], "chat")["tiny_mean"]

    first = loaded()
    first.test_docs().set_format("numpy")
    first.dataset["other"] = first.dataset.pop("test").select([1])
    first.dataset_no_image.clear()
    second = loaded()
    assert second.test_docs()["answer"][:] == second.test_docs_no_media()["answer"][:] == ["no", "yes", "no", "yes"]
    assert second.test_docs().format["type"] is None and list(second.dataset) == ["test"]
    assert ConfigurableTask.download is download and len(held) == 1
