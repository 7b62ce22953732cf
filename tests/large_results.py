"""Make a results directory of the size of a paper's table, to measure the report: `python tests/large_results.py FOLDER`.

Answers are drawn at random, scores follow from them, and everything is written through the store as a sweep does.
"""

from __future__ import annotations

import argparse
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np

from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.store.answers import Answer, AnswerLog, BatchSize
from vlm_pruner_eval.store.folder import DocumentScore, Store
from vlm_pruner_eval.store.kept import Kept
from vlm_pruner_eval.store.schema import UnitRecord, plain
from vlm_pruner_eval.store.summaries import Provenance, TaskScore
from vlm_pruner_eval.sweep import records
from vlm_pruner_eval.sweep.config import SweepConfig, validate
from vlm_pruner_eval.sweep.grid import expand, grid_of
from vlm_pruner_eval.sweep.metrics import scores
from vlm_pruner_eval.sweep.units import WorkUnit, units_of

N_VISUAL, N_LAYERS, BATCH = 576, 32, 500
TASKS = ("gqa", "pope", "mme", "textvqa_val", "scienceqa_img", "mmstar", "ai2d", "seedbench", "chartqa")
MACHINE = Provenance(
    versions={"torch": "0", "lmms_eval": "0"},
    platform="none",
    processor="none",
    host={},
    gpus=[],
    cuda={},
    threads=1,
    model={"geometry": {}},
    checkpoint={},
    git_commit=None,
    command="tests/large_results.py",
    started=None,
    time="2026-01-01T00:00:00+00:00",
)


class Asked:
    """A request, as far as the log looks at it."""

    nth = 0
    digest = "00000000"

    def __init__(self, task: str, doc_id: int):
        self.index = self.doc_id = doc_id
        self.task = task


class Share:
    """Stands in for a task of lmms-eval whose score is the share of right answers."""

    def aggregation(self) -> dict:
        return {"right": lambda items: sum(items) / len(items)}

    def higher_is_better(self) -> dict:
        return {"right": True}


def config_of(n_runs: int, n_tasks: int) -> SweepConfig:
    """The unpruned run and FastV at many layers and three rates."""
    n_entries = -(-(n_runs - 1) // 3)
    entries = [{"name": "fastv", "label": f"FastV {layer}", "layer": layer} for layer in range(1, n_entries + 1)]
    model = {"id": "vlmpruner_llava", "pretrained": "somewhere/large", "visual_tokens": N_VISUAL, "layers": N_LAYERS}
    raw = {"name": "large", "model": model, "tasks": list(TASKS[:n_tasks]), "methods": entries, "pruning_rates": ["2/3", "7/9", "8/9"]}
    return validate(raw | {"gallery": 0})


def write_unit(store: Store, unit: WorkUnit, n_documents: int) -> None:
    """Write the answers, scores and record of one unit."""
    draw = np.random.default_rng(zlib.crc32(unit.path.encode()))
    rate = 0.0 if unit.run.pruning_rate is None else float(Fraction(unit.run.pruning_rate))
    found = [_answer(unit.task, doc_id, draw, rate) for doc_id in range(n_documents)]
    with AnswerLog(unit.stored(store).folder, {"unit": unit.path}) as log:
        log.begin("generate_until", [Asked(unit.task, doc_id) for doc_id in range(n_documents)], BatchSize(8))
        for start in range(0, n_documents, BATCH):
            batch = [(Asked(unit.task, answer.doc_id), answer) for answer in found[start : start + BATCH]]
            log.append("generate_until", batch, 1.0)
    rows = [{"doc_id": answer.doc_id, "doc": {}, "right": float(answer.answer == "yes")} for answer in found]
    value = sum(row["right"] for row in rows) / len(rows)
    images = {answer.doc_id: answer.images for answer in found}
    scored = scores.score_task(f"{unit.task} of no benchmark", {"right,none": value}, rows, Share(), images)
    lines = [
        DocumentScore(
            task=unit.task, doc_id=answer.doc_id, answer=answer.answer, score=row["right"], target="yes", images=list(answer.images)
        )
        for answer, row in zip(found, rows, strict=True)
    ]
    record = UnitRecord(
        task=unit.task,
        limit=None,
        status="finished",
        scores={unit.task: TaskScore.model_validate(plain(scored.record))},
        documents={unit.task: "0"},
        splits={unit.task: "test"},
        tokens=records.summarise_tokens(found),
        times=records.summarise_times(found, 1.0, 1.0),
        kept_digest=records.kept_digest(found),
        n_answers=len(found),
        provenance=MACHINE,
    )
    store.write_head(unit.run.head)
    unit.stored(store).write(record, lines, {unit.task: scored.draws})


def _answer(task: str, doc_id: int, draw: np.random.Generator, rate: float) -> Answer:
    n_kept = round(N_VISUAL * (1 - rate))
    order = draw.permutation(N_VISUAL)[:n_kept] if rate else np.arange(N_VISUAL)
    lengths = [N_VISUAL] * 2 + [n_kept] * (N_LAYERS - 2)
    record = SampleRecord(
        row=0,
        n_visual=N_VISUAL,
        n_asked=n_kept,
        n_kept=n_kept,
        n_images=1,
        layer=2,
        kept_positions=(np.sort(order) + 35).tolist(),
        order=order.tolist(),
        kv_lengths=[60 + length for length in lengths],
        visual_lengths=lengths,
        selection_ms=1.0,
    )
    text = "yes" if draw.random() < 0.8 - 0.2 * rate else "no"
    times = {"prefill_ms": 20.0, "decode_ms": 2.0, "n_prompt_tokens": 636, "n_new_tokens": 2, "batch_size": 8}
    question = f"Is there anything of number {doc_id} in the picture? Answer the question using a single word or phrase."
    return Answer(task, "test", doc_id, text, record=Kept.of(record), images=(f"{doc_id // 3:016x}",), question=question, **times)


def main() -> None:
    """Write the folder that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=41)
    parser.add_argument("--tasks", type=int, default=9)
    parser.add_argument("--documents", type=int, default=5000)
    asked = parser.parse_args()
    config = config_of(asked.runs, asked.tasks)
    runs = expand(config)[: asked.runs]
    store = Store(asked.folder)
    store.begin(grid_of(config, runs))
    for unit in units_of(config, runs):
        write_unit(store, unit, asked.documents)
    print(f"{len(runs)} runs x {len(config.tasks)} tasks x {asked.documents} documents in {asked.folder}")


if __name__ == "__main__":
    main()
