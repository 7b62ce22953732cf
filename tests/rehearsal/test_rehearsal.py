"""Every task of configs/paper and suite_2026 from its YAML file to the report, on stand-ins of the published data; see rehearse.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from expected_prompts import EXPECTED
from rehearse import HERE, SWEEPS, lines

from vlm_pruner_eval.sweep.config import load

CONFIGS = HERE.parent.parent / "configs"
TASKS = [(file, task) for file in SWEEPS for task in load(CONFIGS / file).tasks]
# of perfect answers, where it is not 100: MME's sum, and a point a question of OCRBench
FULL = {"mme_total": 2800, "ocrbench": 10, "ocrbench_short": 10}
COLUMNS = ["GQA", "MMB", "MME", "POPE", "SQA", "VQAText", "OCRBench", "SEED", "OKVQA"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # one to two minutes alone on two cores
every_task = pytest.mark.parametrize(("file", "task"), TASKS, ids=[f"{Path(file).stem}-{task}" for file, task in TASKS])


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """By file and task. In a process of its own, which has another hub from its first import on."""
    folder = tmp_path_factory.mktemp("rehearsal")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST"))}
    command = [sys.executable, str(HERE / "rehearse.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    rows = json.loads((folder / "rehearsal.json").read_text())
    print("\n".join(lines(rows)))
    return {(row["file"], row["task"]): row for row in rows}


def row_of(rehearsed: dict, file: str, task: str) -> dict[str, Any]:
    if task == "longvideobench_val_v" and importlib.util.find_spec("decord") is None:
        pytest.skip("lmms-eval's longvideobench needs decord, which this platform does not have")
    return rehearsed[file, task]


@every_task
def test_a_task_runs_and_is_scored_and_perfect_answers_have_the_full_score(file: str, task: str, rehearsed: dict) -> None:
    row = row_of(rehearsed, file, task)
    assert row["failed"] == 0
    assert 0 <= row["value"] <= FULL.get(task, 100)
    assert row["perfect"] == pytest.approx(FULL.get(task, 100))


@every_task
def test_a_task_asks_what_the_table_asks(file: str, task: str, rehearsed: dict) -> None:
    assert row_of(rehearsed, file, task)["prompts"] == EXPECTED[file][task]


def test_every_column_of_the_papers_tables_has_a_score(rehearsed: dict) -> None:
    for file in SWEEPS[:3]:
        assert [row["column"] for (name, _), row in rehearsed.items() if name == file] == COLUMNS
    shown = {task: cell for (file, task), row in rehearsed.items() if (cell := row["beside"]) and file == SWEEPS[0]}
    assert len(shown) == len(COLUMNS)
    assert shown["gqa"] == {"ours": 100.0, "printed": 61.95, "difference": pytest.approx(38.05)}
    assert shown["mme_total"]["printed"] == 1862
