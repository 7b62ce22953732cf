"""Results folders of small sweeps with a stand-in, made once a session, and copies of them to change."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from sweep_standin import N_VISUAL, Behaviour, StandIn, make_config, task_manager, write_tasks

from vlm_pruner_eval.cost import DecoderShape
from vlm_pruner_eval.report.contents import report_of
from vlm_pruner_eval.report.load import load_sweep
from vlm_pruner_eval.report.writers.markdown import markdown
from vlm_pruner_eval.store.answers import Answer, AnswerLog, BatchSize, read_lines
from vlm_pruner_eval.sweep.metrics.scores import MAIN_METRICS, Main
from vlm_pruner_eval.sweep.runner import run_sweep

SHAPE = DecoderShape(hidden=64, intermediate=96, n_heads=4, n_kv_heads=2, head_dim=16, vocabulary=120)
PEAKS = {"none": 9000, "vlmpruner": 5000, "fastv": 4500, "uniform": 4200, "random": 4000, "blind": 3000}
PREFILL_MS = {"none": 20.0, "vlmpruner": 8.0, "fastv": 6.0, "uniform": 6.0, "random": 5.0, "blind": 1.0}
SEEDS = {"name": "random", "seeds": [0, 1, 2]}
RELEASE = {"name": "vlmpruner", "official_quirks": True, "label": "VLM-Pruner (release)"}
HOSTILE = "<script>alert('x')</script>\"&$y_{"
LLAVA = {
    "id": "vlmpruner_llava",
    "pretrained": "llava-hf/llava-1.5-7b-hf",
    "protocol": "paper",
    "visual_tokens": N_VISUAL,
    "layers": 4,
}
OF_PAPER = [
    RELEASE,
    {"name": "vlmpruner", "label": "VLM-Pruner"},
    {"name": "vlmpruner", "official_quirks": True, "pivots": 2, "label": "pivots 2"},
    {"name": "fastv", "label": HOSTILE},
    {"name": "uniform", "iso_layer": 2, "layer": 0, "label": "iso"},
    "blind",
]
# by name: documents a task, behaviour, changes of the configuration
SWEEPS: dict[str, tuple[int, Behaviour, dict[str, Any]]] = {
    "good": (24, Behaviour(), {"pruning_rates": ["8/9", "2/3"], "methods": ["vlmpruner", SEEDS, "blind"]}),
    "bad": (
        24,
        Behaviour(fail={("vlmpruner", 3)}),
        {"pruning_rates": ["8/9", "2/3"], "methods": ["vlmpruner", SEEDS, "blind"]},
    ),
    "plain": (96, Behaviour(), {"limit": None, "methods": ["vlmpruner", "fastv", "uniform", SEEDS, "blind"]}),
    "images": (96, Behaviour(questions_an_image=8), {"limit": None, "methods": ["vlmpruner"]}),
    "state": (96, Behaviour(), {"limit": None, "methods": ["vlmpruner"], "tasks": ["tiny_mean", "tiny_state"]}),
    "paper": (
        24,
        Behaviour(fail={("blind", 3)}, questions_an_image=2),
        {"limit": None, "model": LLAVA, "pruning_rates": ["2/3", "8/9"], "methods": OF_PAPER},
    ),
}


class Costly(StandIn):
    """The stand-in with a shape, and answers that carry what a GPU would measure."""

    def describe(self) -> dict[str, object]:
        return super().describe() | {"shape": dataclasses.asdict(SHAPE), "layers": 4}

    def _answer(self, doc_id: int, task: str, split: str) -> Answer:
        answer = super()._answer(doc_id, task, split)
        if answer.record is None:
            return answer
        lengths = [50 - N_VISUAL + n for n in answer.record.visual_lengths]
        runs = tuple((length, len(list(layers))) for length, layers in itertools.groupby(lengths))
        record = dataclasses.replace(answer.record, lengths=runs, kv_bytes=10 * sum(lengths))
        prefill_ms = PREFILL_MS[self.method] + (self.params.get("seed") or 0)
        return dataclasses.replace(answer, record=record, prefill_ms=prefill_ms, peak_bytes=PEAKS[self.method] + doc_id)


@functools.cache
def folder(name: str) -> Path:
    """The results folder of a sweep, which nobody changes."""
    n_documents, behaviour, changes = SWEEPS[name]
    root = Path(_root().name)
    tasks = task_manager(write_tasks(root / f"tasks{n_documents}", n=n_documents))
    with pytest.MonkeyPatch.context() as patch:
        for task, metric in (("tiny_mean", "right"), ("tiny_pairs", "both")) if name == "paper" else ():
            patch.setitem(MAIN_METRICS, task, Main((metric,)))  # in percent, as papers print
        load = lambda *args, **kwargs: Costly(behaviour)  # noqa: E731
        run_sweep(make_config(**changes), root / name, console=Console(file=io.StringIO()), load=load, task_manager=tasks)
    return root / name


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="report_sweeps")


def copied(name: str, tmp_path: Path) -> Path:
    """A copy of a results folder."""
    return Path(shutil.copytree(folder(name), tmp_path / "up" / name))


def edit(root: Path, key: str, change: Callable[[dict[str, Any]], object], task: str = "*") -> None:
    """Change the records of one run's tasks ("vlmpruner-2of3"), or of all runs' (""), or of one task alone."""
    _edit(root, f"runs/{key}*/{task}/record.json", change)


def configure(root: Path, key: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the configuration of one run, or of all ("")."""
    _edit(root, f"runs/{key}*/run.json", lambda head: change(head["config"]))


def edit_grid(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change sweep.json."""
    _edit(root, "sweep.json", change)


def _edit(root: Path, pattern: str, change: Callable[[dict[str, Any]], object]) -> None:
    paths = list(root.glob(pattern))
    assert paths, f"no {pattern}"
    for path in paths:
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))


def edit_answers(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the lines of an answers.jsonl, each with its new checksum, as if they had been written like that."""
    lines = []
    for batch in read_lines(path):
        for line in batch:
            row = line.parsed()
            change(row)
            row["batch"] = row.pop("batch")  # the last key of a line
            text = json.dumps(row)[:-1].encode()
            lines.append(b'%s, "crc": "%08x"}\n' % (text, zlib.crc32(text)))
    path.write_bytes(b"".join(lines))


def write_answers(folder: Path, answers: Sequence[Answer]) -> None:
    """Put other answers into a unit's folder, through the log, in one batch."""
    with AnswerLog(folder, {"unit": "of a test"}) as log:
        asked = [
            SimpleNamespace(index=i, task=answer.task, doc_id=answer.doc_id, nth=answer.choice or 0, digest="0")
            for i, answer in enumerate(answers)
        ]
        log.begin("generate_until", asked, BatchSize(1))
        log.append("generate_until", list(zip(asked, answers, strict=True)), 1.0)


def markdown_of(root: Path) -> str:
    """The text of the report, without its figures and files."""
    return markdown(report_of(load_sweep(root)), {})


def as_embedded(root: Path) -> Path:
    """Rename the tasks to those of the embedded benchmark, which is no evidence."""
    for path in (root / "sweep.json", *root.glob("runs/*/*/*.json*")):
        if path.name != "answers.jsonl":
            path.write_text(path.read_text().replace("tiny_", "digitscenes_"))
    for path in list(root.glob("runs/*/tiny_*")):
        edit_answers(path / "answers.jsonl", lambda row: row.update(task=row["task"].replace("tiny_", "digitscenes_")))
        path.rename(path.with_name(path.name.replace("tiny_", "digitscenes_")))
    return root
