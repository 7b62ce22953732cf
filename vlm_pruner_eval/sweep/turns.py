"""MMBench's circular evaluation: a question is asked once for every order of its options, and counts only if all turns are right."""

from __future__ import annotations

import numbers
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

_A_TURN = 1_000_000  # added to the number of a question for every further turn
_FIELDS = frozenset({"index", "answer", "prediction", *"ABCD"})


def question_of(item: Any) -> Hashable | None:
    """Number of the question that an item is a turn of; None of an item that is none of MMBench's."""
    if not isinstance(item, Mapping) or not item.keys() >= _FIELDS or not isinstance(item["index"], numbers.Integral):
        return None
    return int(item["index"]) % _A_TURN


def has_turns(items: Sequence[Any]) -> bool:
    """Tell if all items are turns of MMBench's questions, of whatever task."""
    return bool(items) and all(question_of(item) is not None for item in items)


def turn_scores(items: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Score of every question, at its first turn: 1 if the letters that lmms-eval reads out of all its turns are right.

    Paper: arXiv 2307.06281, section 4.3 (CircularEval).

    Parameters
    ----------
    items
        lmms-eval's metric items, see `has_turns`.

    Returns
    -------
    list
        None for further turns, which the metric does not count apart.
    """
    right: dict[Hashable, bool] = {}
    for item in items:
        question = question_of(item)
        right[question] = right.get(question, True) and _letter(item) == item["answer"]
    return [float(right[question_of(item)]) if item["index"] < _A_TURN else None for item in items]


def _letter(item: Mapping[str, Any]) -> str | None:
    """The letter that lmms-eval's evaluation without a judge reads out of an answer: by MMBench's rules, else by its own."""
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    rules = MMBench_Evaluator()
    answered = {**item, "prediction": str(item["prediction"])}
    return rules.prefetch_answer(answered) or extract_mcq_answer(answered["prediction"], choices=sorted(rules.build_choices(answered)))
