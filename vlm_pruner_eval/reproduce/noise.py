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

Documents = dict[tuple[str, int], list[dict[str, Any]]]  # the samples of a document: one, or one a choice that was scored

_KEPT_FIELDS = ("answer", "metrics", "choice", "loglikelihood", "n_new_tokens")
# What the tasks' own items call a score, and a parsed answer beside the letter that would be right.
_SCORE_FIELDS = ("score", "right")
_PARSED_FIELDS = ("pred", "pred_answer", "parsed_pred", "predicted")


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
        The same for the score of a document; None where the task gives a document no score.
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
    problems = {name: _problem(run) for name, run in runs.items() if not run.finished}
    reference = plan.variants[0].name
    if reference in problems:
        return Noise(plan.variants, problems, None, {}, None)
    documents = {name: _documents(loaded[name], run) for name, run in runs.items() if run.finished}
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
    metrics = _metrics_by_leaf(task, records[reference]["tasks"][task])
    mine = {name: {key: held[key] for key in held if key[0] in metrics} for name, held in documents.items()}
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
        score_flips={name: _score_flips(mine[reference], mine[name], metrics) for name in others},
    )


def _metrics_by_leaf(task: str, scored: dict[str, Any]) -> dict[str, list[str]]:
    """Names of the metrics that make the score, by the task that samples are filed under: several where a group is one benchmark."""
    parts = {leaf: held for leaf, held in scored["metrics"].items() if "metric" in held}
    mains = parts or {task: scored["main"]}
    return {leaf: [name.split(",")[0] for name in main["metric"].split(" + ")] if main else [] for leaf, main in mains.items()}


def _score(record: dict[str, Any], task: str) -> float | None:
    main = record["tasks"][task]["main"]
    return main["value"] if main else None


def _spread(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) - min(known) if known else None


def _answer_flips(reference: Documents, other: Documents) -> Flips:
    return Flips(sum(document_answer(reference[key]) != document_answer(other[key]) for key in reference), len(reference))


def _score_flips(reference: Documents, other: Documents, metrics: dict[str, list[str]]) -> Flips | None:
    pairs = [tuple(document_score(held[key][0], metrics[key[0]]) for held in (reference, other)) for key in reference]
    if any(None in pair for pair in pairs):
        return None
    return Flips(sum(ours != theirs for ours, theirs in pairs), len(pairs))


def document_score(sample: dict[str, Any], metrics: list[str]) -> tuple[float | bool, ...] | None:
    """The scores of one document under the metrics it has items of (MME's have perception or cognition).

    Returns
    -------
    tuple or None
        None when an item holds no score of its own: MMBench, for one, reads letters out of answers while it aggregates.
    """
    items = sample["metrics"] or {}
    scores = [_item_score(items[name]) for name in metrics if name in items]
    return tuple(scores) if scores and None not in scores else None


def _item_score(item: Any) -> float | bool | None:
    if isinstance(item, (bool, int, float)):
        return item
    if not isinstance(item, dict):
        return None
    for field in _SCORE_FIELDS:
        if isinstance(item.get(field), (bool, int, float)):
            return item[field]
    parsed = next((field for field in _PARSED_FIELDS if field in item), None)
    if parsed is None or "answer" not in item:
        return None
    return str(item[parsed]).strip().lower() == str(item["answer"]).strip().lower()


def _average_spread(tasks: dict[str, TaskNoise], finished: Iterable[str], reference: str) -> float | None:
    """Spread of the relative average over the finished variants, in percent of the reference."""
    scores = {variant: {name: task.scores[variant] for name, task in tasks.items()} for variant in finished}
    averages = [relative_average(held, scores[reference]) for held in scores.values()]
    return None if None in averages else _spread(averages)
