"""Reproductions of a tiny sweep: the command in an empty folder, a stand-in for the loader, and a paper that prints what a test says."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from loguru import logger
from sweep_standin import Behaviour, StandIn, task_manager, write_tasks
from typer.testing import CliRunner

from vlm_pruner_eval.cli import app
from vlm_pruner_eval.report.paper import printed
from vlm_pruner_eval.sweep.metrics.scores import MAIN_METRICS, Main

RELEASE = {"name": "vlmpruner", "official_quirks": True, "label": "VLM-Pruner (release)"}
GOOD = {
    "name": "tiny",
    "model": {"id": "vlmpruner_llava", "pretrained": "liuhaotian/llava-v1.5-7b", "protocol": "paper", "visual_tokens": 36},
    "tasks": ["tiny_mean"],
    "pruning_rates": ["2/3", "8/9"],
    "methods": [RELEASE, "vlmpruner", "fastv"],
}
VARIANTS = ["batch1-sdpa", "batch16-sdpa", "batch1-eager", "batch16-eager"]
HEADER = "paper,table,vlm,method,retained_tokens,pruning_rate_percent,benchmark,metric,value,read_from\n"
N_DOCS = 24  # of write_tasks


def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Commands run in an empty folder, and what they set in the environment is undone."""
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    logger.remove()


class Loads:
    """Stands for the loader: a stand-in per variant, misbehaving as `behaviours` says, and never two of them alive."""

    def __init__(self) -> None:
        self.behaviours: dict[str, Behaviour] = {}
        self.names: list[str] = []
        self._last: weakref.ref[StandIn] | None = None

    def __call__(self, model_id: str, *, batch_size: int, attn_implementation: str, **_: object) -> StandIn:
        assert self._last is None or self._last() is None, "the former model is still in memory"
        self.names.append(f"batch{batch_size}-{attn_implementation}")
        model = StandIn(self.behaviours.get(self.names[-1]))
        self._last = weakref.ref(model)
        return model


def install_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loads:
    tasks, loads = task_manager(write_tasks(tmp_path / "tasks", N_DOCS)), Loads()
    monkeypatch.setattr("vlm_pruner_eval.lmms.families.load", loads)
    for task, metric in (("tiny_mean", "right"), ("tiny_pairs", "both")):
        monkeypatch.setitem(MAIN_METRICS, task, Main((metric,)))  # in percent, as papers print
    monkeypatch.setattr("lmms_eval.tasks.TaskManager", lambda **kwargs: tasks)
    return loads


def printing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Function (tiny_mean=95.0, ...) that makes a paper print these upper bounds, and numbers for VLM-Pruner on tiny_mean."""

    def make(**bounds: float) -> None:
        lines = [
            f"VLM-Pruner,T,LLaVA-1.5-7B,vanilla (upper bound),576,0,{name},acc,{value},printed table" for name, value in bounds.items()
        ]
        for rate, name, value in ((66.7, "tiny_mean", 71.2), (66.7, "Avg", 70.4), (88.9, "tiny_mean", 71.4), (88.9, "Avg", 70.3)):
            lines.append(f"VLM-Pruner,T,LLaVA-1.5-7B,VLM-Pruner,1,{rate},{name},acc,{value},printed table")
        folder = tmp_path / "printed"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "numbers.csv").write_text(HEADER + "\n".join(lines) + "\n")
        monkeypatch.setattr(printed, "DATA", folder)
        monkeypatch.setattr(printed, "BENCHMARKS", {name: name for name in bounds})

    return make


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    return path


def call(*args: object) -> Result:
    return CliRunner().invoke(app, ["reproduce", *(str(arg) for arg in args)])


def last_json(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout)


def read(name: str = "tiny") -> dict[str, Any]:
    return json.loads(Path(f"output/reproduce/{name}/reproduce.json").read_text())
