"""The numeric noise floor: how far the unpruned model's answers and scores move with batch size and attention kernel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.load import RunResult, load_sweep
from vlm_pruner_eval.reproduce.plan import Plan, Variant
from vlm_pruner_eval.store.folder import DocumentScore
from vlm_pruner_eval.store.schema import FINISHED, RunRecord
from vlm_pruner_eval.store.summaries import TaskScore
from vlm_pruner_eval.sweep.metrics.score_line import relative_average

Documents = dict[tuple[str, int], DocumentScore]


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
    record: RunRecord | None
    tasks: dict[str, TaskNoise]
    average_spread: float | None


def measure_noise(plan: Plan) -> Noise:
    """Compare the variants' records, as they stand on disk.

    Raises
    ------
    ConfigError
        Variants that answered different documents: their data sets differ, and flips can't be counted.
    """
    loaded = {variant.name: load_sweep(plan.noise_dir(variant)) for variant in plan.variants}
    runs = {name: results.runs[0] for name, results in loaded.items()}
    problems = {name: _problem(run) for name, run in runs.items() if run.status != FINISHED}
    reference = plan.variants[0].name
    if reference in problems:
        return Noise(plan.variants, problems, None, {}, None)
    documents = {
        name: {(score.task, score.doc_id): score for score in loaded[name].each_score(run.run_id)}
        for name, run in runs.items()
        if run.status == FINISHED
    }
    records = {name: runs[name].record for name in documents}
    tasks = {task: _task_noise(task, list(runs), records, documents, reference) for task in loaded[reference].tasks}
    return Noise(plan.variants, problems, records[reference], tasks, _average_spread(tasks, documents, reference))


def _problem(run: RunResult) -> str:
    return run.record.problem if run.record is not None and run.record.problem else "was not run"


def _task_noise(task: str, names: list[str], records: dict[str, RunRecord], documents: dict[str, Documents], reference: str) -> TaskNoise:
    leaves = _leaves(task, records[reference].scores[task])
    mine = {name: {key: held[key] for key in held if key[0] in leaves} for name, held in documents.items()}
    others = [name for name in mine if name != reference]
    for name in others:
        if mine[name].keys() != mine[reference].keys():
            raise ConfigError(
                f"{task}: {name} and {reference} answered different documents, expected the same; "
                "the data set has changed between them: start again in another folder with --output."
            )
    scores = {name: _score(records[name], task) if name in records else None for name in names}
    main = records[reference].scores[task].main
    return TaskNoise(
        metric=main.metric if main else None,
        scores=scores,
        spread=_spread(scores.values()),
        answer_flips={name: _answer_flips(mine[reference], mine[name]) for name in others},
        score_flips={name: _score_flips(mine[reference], mine[name]) for name in others},
    )


def _leaves(task: str, scored: TaskScore) -> set[str]:
    """Tasks that samples are filed under: several where a group is one benchmark."""
    return {leaf for leaf, held in scored.metrics.items() if held.metric is not None} or {task}


def _score(record: RunRecord, task: str) -> float | None:
    main = record.scores[task].main
    return main.value if main else None


def _spread(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) - min(known) if known else None


def _answer_flips(reference: Documents, other: Documents) -> Flips:
    return Flips(sum(reference[key].answer != other[key].answer for key in reference), len(reference))


def _score_flips(reference: Documents, other: Documents) -> Flips | None:
    """None where the two do not have scores of the same documents, or of none."""
    pairs = [(reference[key].score, other[key].score) for key in reference]
    known = [pair for pair in pairs if pair != (None, None)]
    if not known or any(None in pair for pair in known):
        return None
    return Flips(sum(ours != theirs for ours, theirs in known), len(known))


def _average_spread(tasks: dict[str, TaskNoise], finished: Iterable[str], reference: str) -> float | None:
    """Spread of the relative average over the finished variants, in percent of the reference."""
    scores = {variant: {name: task.scores[variant] for name, task in tasks.items()} for variant in finished}
    averages = [relative_average(held, scores[reference]) for held in scores.values()]
    return None if None in averages else _spread(averages)
