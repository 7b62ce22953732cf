"""Scores by the capability that a question asks for, OCR first, and on the documents that a coarser image alone gets wrong."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_pruner_eval.report.answer_arrays import RIGHT, Answers
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.rows import Row
from vlm_pruner_eval.report.stats.paired import Estimate, estimate
from vlm_pruner_eval.sweep.clusters import Clusters, connected
from vlm_pruner_eval.sweep.grid import RATELESS, UNPRUNED
from vlm_pruner_eval.sweep.scores import wilson_interval

OCR, RECOGNITION, ATTRIBUTE, SPATIAL, COUNTING = CAPABILITIES = ("OCR", "recognition", "attribute", "spatial", "counting")
CONTROLS = frozenset({"pool", "downsample"})
ENOUGH = 0.975  # share of the resamples that must have a value: those left out can only lie beyond the ends of the interval
CAPABILITY_NOTE = (
    "Percent of the unpruned model's document scores, averaged over the tasks (or parts of tasks) of a capability; 95 % intervals resample "
    "images. Tasks that mix capabilities and don't log which are left out."
)
HARD_NOTE = (
    "Mean score, in percent, on the documents that the unpruned model gets right and the control gets wrong; 95 % intervals resample "
    "images. The documents are chosen by what two runs answered, so differences to 100 are partly chance: compare methods, and see blind."
)

# Tasks that ask for one thing, by name or by prefix. GQA, ScienceQA, OK-VQA, AI2D and SEED-Bench ask for many, and don't log for which.
OF_TASK = {
    "textvqa": OCR,
    "ocrbench": OCR,
    "docvqa": OCR,
    "infovqa": OCR,
    "chartqa": OCR,
    "pope": RECOGNITION,
    "refcoco_bbox_rec": SPATIAL,
    "mvbench_object_existence": RECOGNITION,
    "mvbench_moving_attribute": ATTRIBUTE,
    "mvbench_moving_direction": SPATIAL,
    "mvbench_moving_count": COUNTING,
    "mvbench_action_count": COUNTING,
    "digitscenes_read": OCR,
    "digitscenes_exist": RECOGNITION,
    "digitscenes_attribute": ATTRIBUTE,
    "digitscenes_where": SPATIAL,
    "digitscenes_count": COUNTING,
}
# Tasks whose items carry a category: its capability, where it has one of ours.
OF_CATEGORY = {
    "mme": {
        "ocr": OCR,
        **dict.fromkeys(("existence", "posters", "celebrity", "scene", "landmark", "artwork"), RECOGNITION),
        "color": ATTRIBUTE,
        "position": SPATIAL,
        "count": COUNTING,
    },
    "mmbench": {
        "ocr": OCR,
        **dict.fromkeys(("celebrity_recognition", "image_scene", "image_topic"), RECOGNITION),
        **dict.fromkeys(("attribute_recognition", "attribute_comparison"), ATTRIBUTE),
        **dict.fromkeys(("object_localization", "spatial_relationship"), SPATIAL),
    },
    "mmstar": {
        **dict.fromkeys(("recognition", "image scene and topic"), RECOGNITION),
        "cross-instance attribute reasoning": ATTRIBUTE,
        "localization": SPATIAL,
        "object counting": COUNTING,
    },
    "videomme": {
        "ocr problems": OCR,
        "object recognition": RECOGNITION,
        "attribute perception": ATTRIBUTE,
        **dict.fromkeys(("spatial perception", "spatial reasoning"), SPATIAL),
        "counting problem": COUNTING,
    },
    "mlvu": {"count": COUNTING},
}

Document = tuple[str, int]  # task and number


@dataclass(frozen=True)
class Stratum:
    """The score of one row on a part of the documents.

    Attributes
    ----------
    name
        A capability, or "hard: ..." with the control's label.
    score
        Of a capability: percent of the unpruned model's; without interval where resampling shows no spread, or often has no value.
        Of a hard subset: mean score in percent.
    n_documents
        Documents that it holds.
    parts
        Tasks that they come from, with the category ("mme_total: OCR") where it is a part of the task.
    control
        Label of the control whose failures make the hard subset; None of a capability.
    """

    name: str
    label: str
    method: str
    pruning_rate: str | float | None
    score: Estimate
    n_documents: int
    parts: tuple[str, ...]
    control: str | None = None


@dataclass(frozen=True)
class _Facts:
    """Capability and part that a document belongs to, if any, and its images."""

    capability: str | None
    part: str
    images: tuple[str, ...]


def strata(results: Results, rows: Sequence[Row]) -> list[Stratum]:
    """Compute capabilities (`CAPABILITIES`, in that order), then one hard subset for every row of a control; in each the given rows.

    Empty if the unpruned run is not finished, or no document has a score.
    """
    finished = {run.run_id for run in results.runs if run.finished}
    rows = [row for row in rows if finished & set(row.runs)]
    unpruned = next((row for row in rows if row.method == UNPRUNED), None)
    if unpruned is None:
        return []
    facts = _facts(results, next(run_id for run_id in unpruned.runs if run_id in finished))
    scores = {row.key: _scores(results, [run_id for run_id in row.runs if run_id in finished]) for row in rows}
    found = [stratum for name in CAPABILITIES for stratum in _capability(name, rows, unpruned, scores, facts)]
    controls = [row for row in rows if row.method in CONTROLS]
    return found + [stratum for control in controls for stratum in _hard(control, rows, unpruned, scores, facts)]


def _facts(results: Results, run_id: str) -> dict[Document, _Facts]:
    return {(one.task, one.doc_id): _Facts(*capability_of(one.task, one.items), tuple(one.images)) for one in results.each_score(run_id)}


def _of_run(answers: Answers) -> dict[Document, float]:
    return {
        (task, doc_id): score
        for task, held in answers.items()
        for doc_id, score in zip(held.doc_ids.tolist(), held.scores.tolist(), strict=True)
        if not math.isnan(score)
    }


def _scores(results: Results, run_ids: Sequence[str]) -> dict[Document, float]:
    """Score of every document that every run (seed) scored, averaged over the runs."""
    of_runs = [_of_run(results.answers(run_id)) for run_id in run_ids]
    shared = set.intersection(*map(set, of_runs))
    return {document: statistics.fmean(scores[document] for scores in of_runs) for document in shared}


def capability_of(task: str, items: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the capability that a document asks for (None if unknown or none of ours), and the part of the benchmark that it belongs to.

    Parameters
    ----------
    items
        The document's metric items, as logged; categories are read from them.
    """
    known = _of_prefix(OF_TASK, task)
    if known is not None:
        return known, task
    capabilities = _of_prefix(OF_CATEGORY, task) or {}
    fields = [item for item in items.values() if isinstance(item, Mapping)]
    for value in (value for item in fields for name, value in item.items() if name.lower().endswith(("category", "task_type"))):
        if str(value).lower() in capabilities:
            return capabilities[str(value).lower()], f"{task}: {value}"
    return None, task


def _of_prefix(table: Mapping[str, Any], task: str) -> Any:
    """The entry of the longest name that `task` is or begins with."""
    names = [name for name in table if task == name or task.startswith(f"{name}_")]
    return table[max(names, key=len)] if names else None


def _clusters(name: str, documents: Sequence[Document], facts: Mapping[Document, _Facts]) -> Clusters:
    return Clusters(name, connected({document: facts[document].images for document in documents}))


def _capability(
    name: str, rows: Sequence[Row], unpruned: Row, scores: Mapping[tuple, dict[Document, float]], facts: Mapping[Document, _Facts]
) -> Iterator[Stratum]:
    full = scores[unpruned.key]
    for row in rows:
        own = scores[row.key]
        documents = sorted(document for document in full.keys() & own.keys() if facts[document].capability == name)
        # parts on which the unpruned model has a score above 0, of which others can be a share
        parts = sorted({facts[document].part for document in documents})
        parts = [part for part in parts if sum(full[document] for document in documents if facts[document].part == part) > 0]
        documents = [document for document in documents if facts[document].part in parts]
        if not documents:
            continue
        # columns [documents, 2 parts]: our score in the column of the part, then the unpruned one
        member = np.array([[facts[document].part == part for part in parts] for document in documents], dtype=np.float64)
        both = np.array([[own[document], full[document]] for document in documents])
        columns = np.concatenate([member * both[:, :1], member * both[:, 1:]], axis=1)
        score = Estimate(100.0) if row is unpruned else _estimate(_clusters(name, documents, facts), documents, columns, len(parts))
        yield Stratum(name, row.label, row.method, row.pruning_rate, score, len(documents), tuple(parts))


def _hard(
    control: Row, rows: Sequence[Row], unpruned: Row, scores: Mapping[tuple, dict[Document, float]], facts: Mapping[Document, _Facts]
) -> Iterator[Stratum]:
    full, coarse = scores[unpruned.key], scores[control.key]
    hard = sorted(document for document in full.keys() & coarse.keys() if full[document] >= RIGHT > coarse[document])
    name = f"hard: {control.label} fails"
    for row in rows:
        documents = [document for document in hard if document in scores[row.key]]
        is_rival = row.group == control.group and row.key != control.key
        if not documents or not (is_rival or row.method in RATELESS):
            continue
        columns = np.array([[scores[row.key][document], 1.0] for document in documents])
        clusters = _clusters(f"{name} {control.pruning_rate}", documents, facts)
        score = _estimate(clusters, documents, columns, 1)
        if score.value in (0, 100):  # resampling what is the same everywhere shows no spread
            low, high = wilson_interval(score.value / 100, clusters.n)
            score = Estimate(score.value, min(100.0 * low, score.value), max(100.0 * high, score.value))
        parts = tuple(sorted({task for task, _ in documents}))
        rate = control.pruning_rate if row.method in RATELESS else row.pruning_rate
        yield Stratum(name, row.label, row.method, rate, score, len(documents), parts, control.label)


def _estimate(clusters: Clusters, documents: Sequence[Document], columns: np.ndarray, n_parts: int) -> Estimate:
    """Percentage: the mean over the parts of the first `n_parts` columns' sums over the other columns' sums; whole clusters are drawn."""

    def percent(sums: np.ndarray) -> np.ndarray:
        return 100.0 * np.mean(sums[..., :n_parts] / sums[..., n_parts:], axis=-1)

    value = float(percent(columns.sum(0)))
    if clusters.n < 2:
        return Estimate(value)
    sums = clusters.sums(clusters.by_cluster(documents, columns))
    known = (sums[:, n_parts:] > 0).all(1)  # the others hold no right answer of the unpruned model on a part
    if known.mean() < ENOUGH:
        return Estimate(value)
    draws = percent(sums[known])
    return estimate(value, draws) if np.ptp(draws) > 0 else Estimate(value)
