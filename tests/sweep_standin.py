"""A stand-in for the wrapper around a VLM, and a tiny lmms-eval task folder: sweeps without a checkpoint, in a second."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lmms_eval.api.instance import GenerationResult
from lmms_eval.tasks import TaskManager

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.lmms.answering import Answering
from vlm_pruner_eval.lmms.prompts import Request
from vlm_pruner_eval.store.answers import Answer, Batch, Done
from vlm_pruner_eval.store.kept import Kept
from vlm_pruner_eval.sweep.config import SweepConfig, validate

N_VISUAL, N_LAYERS = 36, 4
TIMES = {"prefill_ms": 20.0, "decode_ms": 2.0, "n_prompt_tokens": 50, "n_new_tokens": 1, "batch_size": 1}
RIGHT_PERCENT = {"none": 100, "vlmpruner": 80, "fastv": 60, "random": 50, "uniform": 40, "blind": 20}

UTILS = """
points = {"all": 0}


def doc_to_visual(doc):
    return []


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    return {"right": float(results[0] == doc["answer"])}


def score_pairs(doc, results):
    return {"both": {"pair_id": doc["pair_id"], "right": results[0] == doc["answer"]}}


def both(items):
    pairs = {}
    for item in items:
        pairs.setdefault(item["pair_id"], []).append(item["right"])
    assert all(len(rights) == 2 for rights in pairs.values()), "a pair was torn apart"
    return sum(map(all, pairs.values())) / len(pairs)


def total(items):
    points["all"] += sum(items)
    return points["all"] / len(items)
"""

TASK = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: data.parquet}}}}
task: {name}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4}}
process_results: !function utils.{process}
metric_list:
  - {{metric: {metric}, aggregation: {aggregation}, higher_is_better: true}}
"""


def write_tasks(folder: Path, n: int = 24) -> Path:
    """Three tasks over one parquet file: a mean, pairs, and an aggregation that keeps state as OCRBench's does."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "question": [f"question {i}?" for i in range(n)],
        "answer": ["yes" if i % 2 else "no" for i in range(n)],
        "pair_id": [f"pair {i // 2}" for i in range(n)],
    }
    pq.write_table(pa.table(rows), folder / "data.parquet")
    (folder / "utils.py").write_text(UTILS)
    for name, process, metric, aggregation in (
        ("tiny_mean", "score", "right", "mean"),
        ("tiny_pairs", "score_pairs", "both", "!function utils.both"),
        ("tiny_state", "score", "right", "!function utils.total"),
    ):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, process=process, metric=metric, aggregation=aggregation))
    return folder


def task_manager(folder: Path, model_name: str | None = None) -> TaskManager:
    """An index of the folder's tasks and the packaged ones, without those of lmms-eval."""
    return TaskManager(verbosity="ERROR", include_path=str(folder), include_defaults=False, model_name=model_name)


@dataclass
class Behaviour:
    """How the stand-in misbehaves: samples that fail, methods that raise or forget to answer, methods that it can't run.

    `questions_an_image`: so many documents in a row show the same image.
    """

    fail: set[tuple[str, int]] = field(default_factory=set)
    explode: set[str] = field(default_factory=set)
    forget: set[str] = field(default_factory=set)
    refuse: set[str] = field(default_factory=set)
    shift_padding: int = 0
    flip: int = 0
    other_kept: int = 0
    questions_an_image: int = 1


class StandIn(Answering):
    """Answers right as often as RIGHT_PERCENT says, the same way every time, in batches of `size`."""

    is_simple = False

    def __init__(self, behaviour: Behaviour | None = None, size: int = 1):
        super().__init__()
        self.behaviour = behaviour or Behaviour()
        self.size = size
        self.context.refuses_failures = True
        self.cleaned = 0
        self.evaluated: list[str] = []
        self.answered: list[tuple[str, int]] = []

    @property
    def full_batch_size(self) -> int:
        return self.size

    def configure(self, method: str = "none", pruning_rate: object = None, **params: object) -> None:
        if method in self.behaviour.refuse:
            raise ConfigError(f"layer: got 99, expected 0 to {N_LAYERS - 1}.")
        self.method, self.rate, self.params = method, pruning_rate, params
        self.forget_answers()

    def describe(self) -> dict[str, object]:
        return {"device": "cpu", "dtype": "float32"}

    def clean(self) -> None:
        assert self.context.keep_loaded, "lmms-eval would have deleted the model"
        self.cleaned += 1

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        assert not self.context.refuses_failures
        self.evaluated.append(self.method)
        results = super().generate_until(requests)
        if self.method in self.behaviour.forget:
            self.answers.pop()
        return results

    def batches_of(self, asked: Sequence[Request], done: Done) -> Iterator[Batch]:
        if self.method in self.behaviour.explode:
            raise RuntimeError("the device is gone")
        for start in range(0, len(asked), self.batch_size):
            batch = [request for request in asked[start : start + self.batch_size] if request.index not in done.indices]
            if batch:
                yield [(request, self._answer(request.doc_id, request.task, request.split)) for request in batch]

    def no_op_sentence(self, answers: Sequence[Answer]) -> str | None:
        return None

    def _answer(self, doc_id: int, task: str, split: str) -> Answer:
        gold = self.task_dict[task][split][doc_id]["answer"]
        draw = random.Random(f"{task} {doc_id} {self.params.get('seed', 0)}")
        right = draw.random() * 100 < RIGHT_PERCENT[self.method] and doc_id >= self.behaviour.flip
        failed = (self.method, doc_id) in self.behaviour.fail
        text = "" if failed else (gold if right else "perhaps")
        error = "PruningError: kept 3 tokens, expected 12." if failed else None
        images = (f"{doc_id // self.behaviour.questions_an_image:016x}",)
        self.answered.append((task, doc_id))
        return Answer(task, split, doc_id, text, error, None if failed else Kept.of(self._record(doc_id, draw)), **TIMES, images=images)

    def _record(self, doc_id: int, draw: random.Random) -> SampleRecord:
        share = {"none": 1.0, "blind": 0.0}.get(self.method, 1 / 3)
        kept = draw.sample(range(N_VISUAL), round(N_VISUAL * share))
        if doc_id < self.behaviour.other_kept and self.method == "vlmpruner":
            kept = [(index + 1) % N_VISUAL for index in kept]
        start = 5 + self.behaviour.shift_padding
        return SampleRecord(
            row=0,
            n_visual=N_VISUAL,
            n_asked=len(kept),
            n_kept=len(kept),
            n_images=1,
            layer=2,
            kept_positions=sorted(start + index for index in kept),
            order=kept,
            kv_lengths=[50, 50, 50 - N_VISUAL + len(kept), 50 - N_VISUAL + len(kept)],
            visual_lengths=[N_VISUAL, N_VISUAL, len(kept), len(kept)],
            quirks=frozenset({"stall"}) if self.method == "vlmpruner" and doc_id % 2 else frozenset(),
            selection_ms=0.5,
        )


def make_config(**changes: Any) -> SweepConfig:
    raw = {
        "name": "tiny",
        "model": {"id": "vlmpruner_llava", "pretrained": "somewhere/tiny", "visual_tokens": N_VISUAL},
        "tasks": ["tiny_mean", "tiny_pairs"],
        "pruning_rates": ["2/3"],
        "methods": ["vlmpruner", {"name": "random", "seeds": [0, 1, 2]}, "blind"],
        "limit": 12,
    }
    return validate(raw | changes)
