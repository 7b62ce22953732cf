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
    """Whether all items are turns of MMBench's questions, of whatever task."""
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
    import pandas as pd
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    table = pd.DataFrame(list(items)).sort_values(by="index")
    table["prediction"] = table["prediction"].astype(str)
    answers = dict(zip(table["index"], table["answer"], strict=True))
    grouped = table.groupby(table["index"] % _A_TURN)
    right = {question: MMBench_Evaluator().eval_sub_data(turns, answers, static_only=True) for question, turns in grouped}
    return [float(right[question_of(item)]) if item["index"] < _A_TURN else None for item in items]
