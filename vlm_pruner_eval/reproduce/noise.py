"""The numeric noise floor: how far the unpruned model's answers and scores move with batch size and attention kernel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.load import Results, RunResult, load_results
from vlm_pruner_eval.report.rows import relative_average
from vlm_pruner_eval.report.stats.answers import document_answer
from vlm_pruner_eval.reproduce.plan import Plan, Variant
from vlm_pruner_eval.sweep.store import FINISHED

Documents = dict[tuple[str, int], list[dict[str, Any]]]  # the samples of a document: one, or one a choice that was scored

_KEPT_FIELDS = ("answer", "score", "choice", "loglikelihood", "n_new_tokens")


@dataclass(frozen=True)
class Flips:
    """Documents on which a variant differs from the reference, out of all that both hold."""

    changed: int
    documents: int

    @property
    def share(self) -> float:
        """Share of documents, 0 to 1."""
        return self.changed / self.documents if self.documents else 0.0


@dataclass(frozen=True)
class TaskNoise:
    """One task over the variants.

    Attributes
    ----------
    metric
        The metric that stands for the task, or None when none does.
    scores
        By variant, in the task's unit; None where the run failed or there is no such metric.
    spread
        Largest minus smallest score; None without any score.
    answer_flips
        By variant other than the reference: documents whose answer text differs.
    score_flips
        The same for the score of a document under the main metric, as the sweep recorded it; documents that the task does not count
        apart (further turns of MMBench's questions) are left out. None where the task gives a document no score.
    """

    metric: str | None
    scores: dict[str, float | None]
    spread: float | None
    answer_flips: dict[str, Flips]
    score_flips: dict[str, Flips | None]


@dataclass(frozen=True)
class Noise:
    """The noise floor.

    Attributes
    ----------
    variants
        In the order of the plan; the first is the reference.
    problems
        By variant that failed: what went wrong.
    record
        The record of the unpruned reference run, or None when it did not finish.
    tasks
        By task, empty without a reference.
    average_spread
        Largest minus smallest relative average, percent of the reference; None when it can't be computed.
    """

    variants: tuple[Variant, ...]
    problems: dict[str, str]
    record: dict[str, Any] | None
    tasks: dict[str, TaskNoise]
    average_spread: float | None


def measure_noise(plan: Plan) -> Noise:
    """Compare the variants' records, as they stand on disk.

    Raises
    ------
    ConfigError
        Variants that answered different documents: their data sets differ, and flips can't be counted.
    """
    loaded = {variant.name: load_results(plan.noise_dir(variant)) for variant in plan.variants}
    runs = {name: results.runs[0] for name, results in loaded.items()}
    problems = {name: _problem(run) for name, run in runs.items() if run.status != FINISHED}
    reference = plan.variants[0].name
    if reference in problems:
        return Noise(plan.variants, problems, None, {}, None)
    documents = {name: _documents(loaded[name], run) for name, run in runs.items() if run.status == FINISHED}
    records = {name: runs[name].record for name in documents}
    tasks = {task: _task_noise(task, list(runs), records, documents, reference) for task in loaded[reference].tasks}
    return Noise(plan.variants, problems, records[reference], tasks, _average_spread(tasks, documents, reference))


def _problem(run: RunResult) -> str:
    return run.record["problem"] if run.record is not None else "was not run"


def _documents(results: Results, run: RunResult) -> Documents:
    documents: Documents = {}
    for sample in results.store.each_sample(run.run_id):
        kept = {field: sample.get(field) for field in _KEPT_FIELDS}
        documents.setdefault((sample["task"], sample["doc_id"]), []).append(kept)
    return documents


def _task_noise(task: str, names: list[str], records: dict[str, Any], documents: dict[str, Documents], reference: str) -> TaskNoise:
    leaves = _leaves(task, records[reference]["tasks"][task])
    mine = {name: {key: held[key] for key in held if key[0] in leaves} for name, held in documents.items()}
    others = [name for name in mine if name != reference]
    for name in others:
        if mine[name].keys() != mine[reference].keys():
            raise ConfigError(
                f"{task}: {name} and {reference} answered different documents, expected the same; "
                "the data set has changed between them: start again in another folder with --output."
            )
    scores = {name: _score(records[name], task) if name in records else None for name in names}
    main = records[reference]["tasks"][task]["main"]
    return TaskNoise(
        metric=main["metric"] if main else None,
        scores=scores,
        spread=_spread(scores.values()),
        answer_flips={name: _answer_flips(mine[reference], mine[name]) for name in others},
        score_flips={name: _score_flips(mine[reference], mine[name]) for name in others},
    )


def _leaves(task: str, scored: dict[str, Any]) -> set[str]:
    """Tasks that samples are filed under: several where a group is one benchmark."""
    return {leaf for leaf, held in scored["metrics"].items() if "metric" in held} or {task}


def _score(record: dict[str, Any], task: str) -> float | None:
    main = record["tasks"][task]["main"]
    return main["value"] if main else None


def _spread(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) - min(known) if known else None


def _answer_flips(reference: Documents, other: Documents) -> Flips:
    return Flips(sum(document_answer(reference[key]) != document_answer(other[key]) for key in reference), len(reference))


def _score_flips(reference: Documents, other: Documents) -> Flips | None:
    """None where the two do not have scores of the same documents, or of none."""
    pairs = [(reference[key][0]["score"], other[key][0]["score"]) for key in reference]
    known = [pair for pair in pairs if pair != (None, None)]
    if not known or any(None in pair for pair in known):
        return None
    return Flips(sum(ours != theirs for ours, theirs in known), len(known))


def _average_spread(tasks: dict[str, TaskNoise], finished: Iterable[str], reference: str) -> float | None:
    """Spread of the relative average over the finished variants, in percent of the reference."""
    scores = {variant: {name: task.scores[variant] for name, task in tasks.items()} for variant in finished}
    averages = [relative_average(held, scores[reference]) for held in scores.values()]
    return None if None in averages else _spread(averages)
