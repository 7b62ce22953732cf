"""`bench shared`: both ways really run, ratios are of the times beside them, and a difference between the ways would be counted."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from lmms_eval.tasks import TaskManager
from test_cli import clean_surroundings  # noqa: F401  # a fixture that is always on

from vlm_pruner_eval.embedded import tasks_path
from vlm_pruner_eval.speed.bench_shared import bench_shared
from vlm_pruner_eval.store.answers import Answer
from vlm_pruner_eval.sweep.config import SweepConfig, validate

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield TaskManager("ERROR", include_path=str(tasks_path()), include_defaults=False, model_name="vlmpruner_llava")


@pytest.fixture(scope="module")
def config() -> SweepConfig:
    return validate(
        {
            "name": "tiny",
            "model": {"id": "vlmpruner_llava", "pretrained": "minivlm", "batch_size": 2, "device": "cpu"},
            "tasks": ["digitscenes_exist"],
            "pruning_rates": ["2/3"],
            "methods": ["uniform", "fastv"],
            "limit": 2,
        }
    )


def test_both_ways_are_run_and_compared(config: SweepConfig, manager: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_shared(config, 2, task_manager=manager)
    assert json.loads(json.dumps(result)) == result
    assert (result["benchmark"], result["dtype"], result["threads"]) == ("shared", "float32", torch.get_num_threads())
    assert (result["runs"], result["samples"], result["limit"], result["batch_size"]) == (3, 6, 2, 2)
    assert (result["different"], result["failed"]) == (0, 0)
    assert [list(timed) for timed in result["rounds"]] == [["separate", "shared"], ["shared", "separate"]]
    for name, seconds in (("ratio", "wall_s"), ("cpu_ratio", "cpu_s")):
        ratios = [timed["shared"][seconds] / timed["separate"][seconds] for timed in result["rounds"]]
        assert result[name] == pytest.approx(median(ratios))
    told = capsys.readouterr()
    assert told.out == "" and "round 1: separate" in told.err and "round 2: separate" in told.err


def test_an_answer_that_differs_is_counted(config: SweepConfig, manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    untimed = Answer.untimed

    def other(self: Answer) -> Answer:
        answer = untimed(self)
        # shared answers pass here twice, where they are made and where they are compared; the others only where they are compared
        object.__setattr__(answer, "n_new_tokens", answer.n_new_tokens + 1)
        return answer

    monkeypatch.setattr(Answer, "untimed", other)
    assert bench_shared(config, 1, task_manager=manager)["different"] == 6
