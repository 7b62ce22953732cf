"""Metrics as functions of sums over documents, so that a thousand resamples cost one matrix product.

An aggregation is a black box. Each form below is a guess at what is in it; `scores` uses a guess only after it gave the same
value as the aggregation itself on the whole data and on several resamples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_pruner_eval.sweep.metrics.clusters import PAIR_KEYS

# What the tasks' own items call a score, and a parsed answer beside the one that would be right.
_SCORE_FIELDS = ("score", "right")
_PARSED_FIELDS = ("pred", "pred_answer", "parsed_pred", "predicted", "prediction")
_RAW_FIELD = "prediction"  # some tasks put the whole answer there
_GOLD_FIELDS = ("answer", "ground_truth")
_CHOICE = re.compile(r"[a-z]|yes|no|true|false", re.IGNORECASE)
_GROUP_FIELDS = ("category", "l2_category", "task_type", "task_category")


@dataclass(frozen=True)
class Form:
    """A metric as `value(sums of columns)`.

    Attributes
    ----------
    columns
        [items, c]: what each item adds.
    value
        From sums [..., c] to the metric [...]; NaN where it is not defined.
    """

    columns: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]


def held_score(item: Any) -> float | None:
    """The score in [0, 1] that the task's item is, or holds; None where it holds no such number."""
    score: Any = item
    if isinstance(item, dict):
        score = next((item[field] for field in _SCORE_FIELDS if is_number(item.get(field))), None)
    return float(score) if is_number(score) and 0 <= score <= 1 else None


def compared(item: Any, *, strict: bool = False) -> float | None:
    """1 if the answer that the task parsed is the right one, else 0; None where the item does not hold both.

    An answer that could not be parsed (None) is wrong.

    Parameters
    ----------
    strict
        Compare only what was parsed for sure (a field `prediction` may hold the whole answer), and only with a choice (a letter, yes,
        no) or a number: free text, or a box, may be judged otherwise.
    """
    if not isinstance(item, dict):
        return None
    parsed = next((field for field in _PARSED_FIELDS if field in item), None)
    gold = next((field for field in _GOLD_FIELDS if item.get(field) is not None), None)
    if parsed is None or gold is None or (strict and parsed == _RAW_FIELD):
        return None
    if item[parsed] is None:
        return 0.0
    return _same(item[parsed], item[gold]) if _is_one_kind(item[parsed], item[gold], strict) else None


def _is_one_kind(parsed: Any, gold: Any, strict: bool) -> bool:
    """A box is never a sentence; a number may be given as text, and free text be judged by its meaning, but neither is for sure."""
    if is_number(parsed) and is_number(gold):
        return True
    if strict:
        return isinstance(parsed, str) and isinstance(gold, str) and bool(_CHOICE.fullmatch(gold.strip()))
    return type(parsed) is type(gold) or all(isinstance(value, str) or is_number(value) for value in (parsed, gold))


def shares(items: Sequence[Any], numbers: Sequence[float | None]) -> Iterator[Form]:
    """Forms that are means of the items' scores: of all, and over categories, as fractions and as percentages.

    Items without a score (None) are not counted.
    """
    if all(number is None for number in numbers):
        return
    for scale in (1.0, 100.0):
        yield _mean(numbers, scale)
    for group in _groups(items) if None not in numbers else ():
        for scale in (1.0, 100.0):
            yield _mean_of_groups(numbers, group, scale)


def forms(items: Sequence[Any], numbers: Sequence[float | None]) -> Iterator[Form]:
    """Every form that these items could be summed by, the likeliest first.

    Parameters
    ----------
    numbers
        Per item: its score, see `document_scores`; values beyond [0, 1] where the items themselves are such numbers.
    """
    if items and all(map(is_number, items)):
        numbers = items
    yield from shares(items, numbers)
    if not all(isinstance(item, dict) for item in items):
        return
    answers = [_answers(item) for item in items]
    if not any(None in pair for pair in answers):
        for group in ([""] * len(items), *_groups(items)):
            for strict in (True, False):
                yield _f1(answers, group, strict=strict)
    key = next((key for key in PAIR_KEYS if all(key in item for item in items)), None)
    if key is not None and None not in numbers:
        pairs = [(item.get("category"), item[key]) for item in items]
        yield _both_right(numbers, pairs)
        yield _mme(numbers, pairs)


def _groups(items: Sequence[Any]) -> list[list[Any]]:
    """The items' categories, by every field that holds one."""
    if not all(isinstance(item, dict) for item in items):
        return []
    return [[item[field] for item in items] for field in _GROUP_FIELDS if all(field in item for item in items)]


def is_number(value: Any) -> bool:
    """Tell if it is a number or a truth value."""
    return isinstance(value, (bool, int, float, np.number))


def _answers(item: dict[str, Any]) -> tuple[Any, Any]:
    parsed = next((item[field] for field in _PARSED_FIELDS if field in item), None)
    return parsed, next((item[field] for field in _GOLD_FIELDS if field in item), None)


def _same(parsed: Any, gold: Any) -> float:
    return float(str(parsed).strip().lower() == str(gold).strip().lower())


def _mean(numbers: Sequence[float | None], scale: float) -> Form:
    """Mean of the items that are counted (those that are not None)."""
    counted = np.array([number is not None for number in numbers], dtype=np.float64)
    columns = np.column_stack([np.array([number or 0.0 for number in numbers], dtype=np.float64), counted])
    return Form(columns, lambda sums: scale * _ratio(sums[..., 0], sums[..., 1]))


def _mean_of_groups(numbers: Sequence[float], groups: Sequence[Any], scale: float) -> Form:
    """Mean over groups of the mean within: columns [sum, n] a group; a group of which nothing was drawn is left out."""
    member = _one_hot(groups)
    columns = np.concatenate([member * np.asarray(numbers, dtype=np.float64)[:, None], member], axis=1)
    n_groups = member.shape[1]

    def value(sums: np.ndarray) -> np.ndarray:
        return scale * _mean_of_known(_ratio(sums[..., :n_groups], sums[..., n_groups:]))

    return Form(columns, value)


def _f1(answers: Sequence[tuple[Any, Any]], groups: Sequence[Any], *, strict: bool) -> Form:
    """Mean over groups of ``F1 = 2 TP / (2 TP + FP + FN)`` of "yes"; NaN where nothing of a group was drawn.

    `strict`: an answer that is neither yes nor no misses a "yes" as well (FN); lmms-eval's POPE counts only a "no".
    Paper: arXiv 2305.10355, section 5 (POPE).
    """
    called, gold = ([str(pair[side]).strip().lower() for pair in answers] for side in (0, 1))
    hits = np.array([mine == right == "yes" for mine, right in zip(called, gold, strict=True)], dtype=float)
    missed = [right == "yes" != mine and (strict or mine == "no") for mine, right in zip(called, gold, strict=True)]
    total = hits + np.array(missed) + [mine == "yes" for mine in called]
    member = _one_hot(groups)
    n_groups = member.shape[1]
    columns = np.concatenate([member * hits[:, None], member * total[:, None], member], axis=1)

    def value(sums: np.ndarray) -> np.ndarray:
        hits, total, n = (sums[..., start * n_groups : (start + 1) * n_groups] for start in range(3))
        f1 = np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)
        return np.where((n > 0).all(-1), f1.mean(-1), np.nan)

    return Form(columns, value)


def _both_right(numbers: Sequence[float], pairs: Sequence[Any]) -> Form:
    """Share of complete pairs with both questions right."""
    last, right, size = _pairs(numbers, pairs)
    complete = last * (size == 2)
    return Form(np.column_stack([complete * (right == 2), complete]), lambda sums: _ratio(sums[..., 0], sums[..., 1]))


def _mme(numbers: Sequence[float], pairs: Sequence[tuple[Any, Any]]) -> Form:
    """Sum over categories of the mean over pairs of 100 x (share right + both right).

    Paper: arXiv 2306.13394, section 2.2 (MME): accuracy and accuracy+.
    """
    last, right, size = _pairs(numbers, pairs)
    points = last * 100.0 * (right / size + (right == 2))
    member = _one_hot([category for category, _ in pairs])
    n_groups = member.shape[1]
    columns = np.concatenate([member * points[:, None], member * last[:, None]], axis=1)

    def value(sums: np.ndarray) -> np.ndarray:
        return np.nansum(_ratio(sums[..., :n_groups], sums[..., n_groups:]), axis=-1)

    return Form(columns, value)


def _pairs(numbers: Sequence[float], pairs: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per item [items]: 1 at the last item of its pair, else 0; the pair's sum; the pair's size. A pair adds once, at its last."""
    _, index = np.unique([repr(pair) for pair in pairs], return_inverse=True)
    last = np.zeros(len(pairs))
    last[list({pair: at for at, pair in enumerate(index)}.values())] = 1.0
    right = np.bincount(index, weights=np.asarray(numbers, dtype=np.float64))
    return last, right[index], np.bincount(index)[index]


def _one_hot(groups: Sequence[Any]) -> np.ndarray:
    """[items, groups]"""
    _, index = np.unique([repr(group) for group in groups], return_inverse=True)
    return np.eye(index.max() + 1)[index]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0.0).sum(-1), known.sum(-1).astype(float))
