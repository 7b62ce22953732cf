"""Scores by the capability that a question asks for, OCR first, and on the documents that a coarser image alone gets wrong."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm_pruner_eval.report.answer_arrays import RIGHT, Answers
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.rows import Key, Row
from vlm_pruner_eval.report.stats.paired import Estimate, estimate
from vlm_pruner_eval.store.folder import DocumentScore
from vlm_pruner_eval.sweep.grid import RATELESS, UNPRUNED
from vlm_pruner_eval.sweep.metrics.clusters import Clusters, connected
from vlm_pruner_eval.sweep.metrics.scores import wilson_interval

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
class _Documents:
    """Documents of the unpruned run in the order of tasks and numbers, and what the rows scored on them.

    Attributes
    ----------
    place
        Of a task: its slice of the documents, and their numbers, ascending.
    tasks, capabilities, parts
        [documents] of text: see `capability_of`; the capability is empty where there is none.
    images
        Of each document.
    scores
        By row, [documents]: the mean over the row's runs, NaN where one of them has none.
    """

    place: dict[str, tuple[slice, np.ndarray]]
    tasks: np.ndarray
    capabilities: np.ndarray
    parts: np.ndarray
    images: list[list[str]]
    scores: dict[Key, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: Iterable[DocumentScore]) -> _Documents:
        """Read the documents of a run."""
        read = sorted(scores, key=lambda one: (one.task, one.doc_id))
        place, start = {}, 0
        for task, listed in itertools.groupby(read, key=lambda one: one.task):
            numbers = np.array([one.doc_id for one in listed])
            place[task] = slice(start, start := start + len(numbers)), numbers
        asked = [capability_of(one.task, one.items) for one in read]
        texts = ([one.task for one in read], [name or "" for name, _ in asked], [part for _, part in asked])
        return cls(place, *(np.array(listed, dtype=str) for listed in texts), [one.images for one in read])

    def scores_of(self, runs: Sequence[Answers]) -> np.ndarray:
        """Score of every document averaged over runs (seeds)."""
        each = [self._scores(answers) for answers in runs]
        return each[0] if len(each) == 1 else np.array([statistics.fmean(scores) for scores in np.stack(each, axis=1).tolist()])

    def _scores(self, answers: Answers) -> np.ndarray:
        found = np.full(len(self.images), np.nan)
        for task, (where, numbers) in self.place.items():
            if task in answers:
                _, ours, theirs = np.intersect1d(numbers, answers[task].doc_ids, assume_unique=True, return_indices=True)
                found[where][ours] = answers[task].scores[theirs]
        return found

    def clusters(self, name: str, documents: np.ndarray) -> Clusters:
        """Clusters of the documents at these places that share images."""
        return Clusters(name, connected({document: self.images[document] for document in documents.tolist()}))


def strata(results: Results, rows: Sequence[Row]) -> list[Stratum]:
    """Compute capabilities (`CAPABILITIES`, in that order), then one hard subset for every row of a control; in each the given rows.

    Empty if the unpruned run is not finished, or no document has a score.
    """
    finished = {run.run_id for run in results.runs if run.finished}
    rows = [row for row in rows if finished & set(row.runs)]
    unpruned = next((row for row in rows if row.method == UNPRUNED), None)
    if unpruned is None:
        return []
    documents = _Documents.of(results.each_score(next(run_id for run_id in unpruned.runs if run_id in finished)))
    for row in rows:
        documents.scores[row.key] = documents.scores_of([results.answers(run_id) for run_id in row.runs if run_id in finished])
    found = [stratum for name in CAPABILITIES for stratum in _capability(name, rows, unpruned, documents)]
    controls = [row for row in rows if row.method in CONTROLS]
    return found + [stratum for control in controls for stratum in _hard(control, rows, unpruned, documents)]


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


def _capability(name: str, rows: Sequence[Row], unpruned: Row, documents: _Documents) -> Iterator[Stratum]:
    full = documents.scores[unpruned.key]
    for row in rows:
        own = documents.scores[row.key]
        asked = (documents.capabilities == name) & ~np.isnan(full) & ~np.isnan(own)
        # parts on which the unpruned model has a score above 0, of which others can be a share
        parts = np.unique(documents.parts[asked & (full > 0)])
        (at,) = np.nonzero(asked & np.isin(documents.parts, parts))
        if not len(at):
            continue
        # columns [documents, 2 parts]: our score in the column of the part, then the unpruned one
        member = (documents.parts[at, None] == parts).astype(np.float64)
        columns = np.concatenate([member * own[at, None], member * full[at, None]], axis=1)
        score = Estimate(100.0) if row is unpruned else _estimate(documents.clusters(name, at), at, columns, len(parts))
        yield Stratum(name, row.label, row.method, row.pruning_rate, score, len(at), tuple(parts.tolist()))


def _hard(control: Row, rows: Sequence[Row], unpruned: Row, documents: _Documents) -> Iterator[Stratum]:
    full, coarse = documents.scores[unpruned.key], documents.scores[control.key]
    name = f"hard: {control.label} fails"
    for row in rows:
        own = documents.scores[row.key]
        (at,) = np.nonzero((full >= RIGHT) & (coarse < RIGHT) & ~np.isnan(own))
        is_rival = row.group == control.group and row.key != control.key
        if not len(at) or not (is_rival or row.method in RATELESS):
            continue
        clusters = documents.clusters(f"{name} {control.pruning_rate}", at)
        score = _estimate(clusters, at, np.column_stack([own[at], np.ones(len(at))]), 1)
        if score.value in (0, 100):  # resampling what is the same everywhere shows no spread
            low, high = wilson_interval(score.value / 100, clusters.n)
            score = Estimate(score.value, min(100.0 * low, score.value), max(100.0 * high, score.value))
        rate = control.pruning_rate if row.method in RATELESS else row.pruning_rate
        parts = tuple(np.unique(documents.tasks[at]).tolist())
        yield Stratum(name, row.label, row.method, rate, score, len(at), parts, control.label)


def _estimate(clusters: Clusters, documents: np.ndarray, columns: np.ndarray, n_parts: int) -> Estimate:
    """Percentage: the mean over the parts of the first `n_parts` columns' sums over the other columns' sums; whole clusters are drawn."""

    def percent(sums: np.ndarray) -> np.ndarray:
        return 100.0 * np.mean(sums[..., :n_parts] / sums[..., n_parts:], axis=-1)

    value = float(percent(columns.sum(0)))
    if clusters.n < 2:
        return Estimate(value)
    sums = clusters.sums(clusters.by_cluster(documents.tolist(), columns))
    known = (sums[:, n_parts:] > 0).all(1)  # the others hold no right answer of the unpruned model on a part
    if known.mean() < ENOUGH:
        return Estimate(value)
    draws = percent(sums[known])
    return estimate(value, draws) if np.ptp(draws) > 0 else Estimate(value)
