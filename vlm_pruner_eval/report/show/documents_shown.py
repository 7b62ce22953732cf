"""What the runs of a sweep answered to single documents and which tokens they kept, read from their records."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from vlm_pruner_eval.budget import parse_rate
from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.redact import short
from vlm_pruner_eval.report.answer_arrays import RIGHT
from vlm_pruner_eval.report.load import Results, RunResult
from vlm_pruner_eval.store.answers import Answer
from vlm_pruner_eval.store.folder import DocumentScore
from vlm_pruner_eval.sweep.grid import RATELESS, UNPRUNED, rate_percent

_MOST_DIGITS = 18
_SAME_RATE = 5e-4  # 0.889 means 8/9


@dataclass(frozen=True)
class Place:
    """Where a document is."""

    task: str
    split: str
    doc_id: int

    def __str__(self) -> str:
        return f"{self.task}/{self.split}/{self.doc_id}"


@dataclass(frozen=True)
class Reply:
    """One run's answer to one document.

    Attributes
    ----------
    label
        The run's, with its rate where it has one.
    answer
        The text, or why there is none.
    score
        In [0, 1]; None where the task gives none.
    order
        Kept visual tokens in the order of their selection.
    layouts, n_visual
        See SampleRecord.
    """

    label: str
    answer: str
    score: float | None
    order: tuple[int, ...] = ()
    layouts: tuple[tuple[int, ...], ...] = ()
    n_visual: int = 0

    @property
    def is_right(self) -> bool | None:
        """Tell if the score counts as right."""
        return None if self.score is None else self.score >= RIGHT

    @property
    def verdict(self) -> str:
        """The answer with what it scored."""
        if self.score is None:
            return self.answer
        mark = {1.0: "right", 0.0: "wrong"}.get(self.score, f"score {self.score:.2f}")
        return f"{self.answer} ({mark})"


@dataclass(frozen=True)
class Document:
    """A question with the answers of the runs, in the order in which they were asked for, by run key."""

    place: Place
    question: str
    gold: str
    images: tuple[str, ...]
    replies: dict[str, Reply] = field(default_factory=dict)


# ---- runs
def pick_runs(results: Results, methods: Sequence[str] = (), rate: str | None = None) -> list[RunResult]:
    """The unpruned run, and one run a method at one rate (of several seeds the first).

    Parameters
    ----------
    methods
        Labels, names or keys; none: all at that rate.
    rate
        Default: the largest of the sweep.

    Raises
    ------
    ConfigError
        Nothing of that name, or at that rate, or no finished run.
    """
    finished = [run for run in results.runs if run.finished]
    if not finished:
        raise ConfigError(f"{results.store.root}: has no finished run; run the sweep first.")
    rates = {_percent(run) for run in finished if _percent(run) is not None}
    wanted = max(rates, default=None) if rate is None else 100 * float(parse_rate(rate))
    at_rate = [run for run in finished if _percent(run) is None or wanted is None or abs(_percent(run) - wanted) < 100 * _SAME_RATE]
    if rate is not None and not any(_percent(run) is not None for run in at_rate):
        known = ", ".join(f"{run.pruning_rate}" for run in {_percent(run): run for run in finished if _percent(run) is not None}.values())
        raise ConfigError(f"--rate: got {rate}, expected one of the sweep's: {known or '(none)'}.")
    unpruned = [run for run in at_rate if run.method == UNPRUNED][:1]
    by_label = {run.label: run for run in reversed(at_rate) if run.method != UNPRUNED}
    others = [by_label[label] for label in dict.fromkeys(run.label for run in at_rate) if label in by_label]
    if not methods:
        return unpruned + others
    return unpruned + [run for name in methods for run in _named(name, others, finished)]


def _percent(run: RunResult) -> float | None:
    return rate_percent(run.pruning_rate if run.asked_rate is None else run.asked_rate)


def _named(name: str, runs: Sequence[RunResult], finished: Sequence[RunResult]) -> list[RunResult]:
    """Runs of a label or a method; or any finished run by its key."""
    plain = name.strip().lower()
    found = [run for run in runs if plain == run.label.lower()] or [run for run in runs if plain == run.method.lower()]
    found = found or [run for run in finished if plain == run.key]
    if not found:
        known = {run.label for run in runs}
        raise ConfigError(f"methods: got {name!r}, which has no finished run at this rate; {closest(name, known)}")
    return found


def label_of(run: RunResult) -> str:
    """A run's label with its rate and, of several seeds, its seed."""
    if run.method == UNPRUNED or run.method in RATELESS or run.pruning_rate is None:
        return run.label
    seed = f", seed {run.seed}" if f"seed{run.seed}" in run.key else ""
    return f"{run.label}, {run.pruning_rate} removed{seed}"


# ---- documents
def find_place(results: Results, text: str, task: str | None = None) -> Place:
    """A document from ``TASK/SPLIT/ID``, ``TASK/ID`` or, with a task (or in a sweep of one), ``ID``.

    Raises
    ------
    ConfigError
        Text of another form, or a task that is not in the sweep.
    """
    *before, last = text.split("/")
    if not (last.isdecimal() and last.isascii() and len(last) <= _MOST_DIGITS) or len(before) > 2:
        raise ConfigError(f"--doc: got {short(text)}, expected TASK/SPLIT/ID or ID with --task, for example {results.tasks[0]}/test/0.")
    known = list(results.splits) or results.tasks
    name = task or (before[0] if before else None)
    if name is None and len(known) > 1:
        raise ConfigError(f"--doc: got {text!r} in a sweep of {len(known)} tasks; name one with --task: {', '.join(known)}.")
    name = name or known[0]
    if name not in known:
        raise ConfigError(f"--task: got {name!r}, which this sweep did not run; {closest(name, known)}")
    split = results.splits.get(name, before[1] if len(before) == 2 else "")
    if len(before) == 2 and before[1] != split:
        raise ConfigError(f"--doc: got the split {before[1]!r} of {name}, expected {split!r}, which the sweep ran.")
    return Place(name, split, int(last))


def read_documents(results: Results, runs: Sequence[RunResult], wanted: Collection[tuple[str, int]] | None, last: int) -> list[Document]:
    """Documents with the answers of `runs`, in the order of tasks and documents.

    Parameters
    ----------
    wanted
        (task, doc_id); None: all.
    last
        Documents with a larger number are not looked at: their kept positions need not be parsed.
    """
    found: dict[tuple[str, int], Document] = {}
    for run in runs:
        scores = {(one.task, one.doc_id): one for one in results.each_score(run.run_id) if one.doc_id <= last}
        answers: dict[tuple[str, int], list[Answer]] = {}
        for answer in results.each_answer(run.run_id, last):
            key = answer.task, answer.doc_id
            if wanted is None or key in wanted:
                answers.setdefault(key, []).append(answer)
        for key, listed in answers.items():
            document = found.setdefault(key, _document(listed[0], scores[key]))
            if not document.question and listed[0].question:  # the run before failed here
                found[key] = document = replace(_document(listed[0], scores[key]), replies=document.replies)
            document.replies[run.key] = _reply(run, listed, scores[key])
    order = task_order(results)
    return [found[key] for key in sorted(found, key=lambda key: (order(key[0]), key))]


def task_order(results: Results) -> Callable[[str], int]:
    """Sort key of tasks: as the answers hold them, others last."""
    order = {task: index for index, task in enumerate(results.splits or results.tasks)}
    return lambda task: order.get(task, len(order))


def _document(answer: Answer, score: DocumentScore) -> Document:
    return Document(Place(answer.task, answer.split, answer.doc_id), answer.question, _text(score.target), answer.images)


def _reply(run: RunResult, answers: list[Answer], score: DocumentScore) -> Reply:
    """One answer of possibly several choices of one document, which share its prefill."""
    if error := next((answer.error for answer in answers if answer.error), None):
        return Reply(label_of(run), f"failed: {error}", None)
    text = next((answer.answer for answer in answers if answer.choice == score.answer), score.answer)
    record = answers[0].record
    if record is None:
        return Reply(label_of(run), text, score.score)
    return Reply(label_of(run), text, score.score, tuple(record.order), record.layouts, record.n_visual)


def _text(target: object) -> str:
    if isinstance(target, (list, tuple)):
        return " | ".join(dict.fromkeys(map(str, target)))
    return "" if target is None else str(target)
