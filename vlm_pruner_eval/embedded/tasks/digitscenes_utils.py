"""Functions that the task files of DIGITSCENES name: prompts, images, scores. All scores are fractions in [0, 1]."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

logger = logging.getLogger(__name__)


def exist_docs(docs: Dataset) -> Dataset:
    """Questions of digitscenes_exist."""
    return _of_task(docs, "exist")


def attribute_docs(docs: Dataset) -> Dataset:
    """Questions of digitscenes_attribute."""
    return _of_task(docs, "attribute")


def where_docs(docs: Dataset) -> Dataset:
    """Questions of digitscenes_where."""
    return _of_task(docs, "where")


def read_docs(docs: Dataset) -> Dataset:
    """Questions of digitscenes_read."""
    return _of_task(docs, "read")


def pairs_docs(docs: Dataset) -> Dataset:
    """Questions of digitscenes_pairs; the two of a pair are adjacent."""
    return _of_task(docs, "pairs")


def count_docs(docs: Dataset) -> Dataset:
    """Questions of digitscenes_count."""
    return _of_task(docs, "count")


def _of_task(docs: Dataset, task: str) -> Dataset:
    return docs.select([index for index, name in enumerate(docs["task"]) if name == task])


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The one picture of a question."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """The question between the model's pre and post prompts (none by default: MiniVLM knows 51 words)."""
    prompts = lmms_eval_specific_kwargs or {}
    return f"{prompts.get('pre_prompt', '')}{doc['question']}{prompts.get('post_prompt', '')}"


def normalise(answer: str) -> str:
    """Lower case, outer punctuation gone, single spaces, and none between digits: "4 0 7." is "407"."""
    words = " ".join(answer.lower().split()).strip(" .,;:!?\"'")
    return re.sub(r"(?<=\d) (?=\d)", "", words)


def yes_or_no(answer: str) -> str | None:
    """The first word if it is yes or no, else None: "Yes, there is." means yes."""
    found = re.match(r"(yes|no)\b", normalise(answer))
    return found.group(1) if found else None


def process_exact_match(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 when the normalised answers are equal, else 0."""
    return {"exact_match": float(normalise(results[0]) == normalise(doc["answer"]))}


def process_yes_no(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Accuracy of a yes/no question, and what `f1` needs. An answer that is neither yes nor no is wrong."""
    predicted = yes_or_no(results[0])
    return {"accuracy": float(predicted == doc["answer"]), "f1": {"predicted": predicted, "answer": doc["answer"]}}


def process_pairs(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Accuracy of a yes/no question, and what `both_right` needs."""
    right = float(yes_or_no(results[0]) == doc["answer"])
    return {"accuracy": right, "both_right": {"pair_id": doc["pair_id"], "right": right}}


def f1(results: Sequence[dict[str, Any]]) -> float:
    """F1 of "yes", ``2 TP / (2 TP + FP + FN)``, as POPE scores existence; 0 when nothing is and nothing was called yes.

    Paper: arXiv 2305.10355, section 5 (POPE).
    """
    hits = sum(result["predicted"] == result["answer"] == "yes" for result in results)
    false_alarms = sum(result["predicted"] == "yes" != result["answer"] for result in results)
    misses = sum(result["answer"] == "yes" != result["predicted"] for result in results)
    called = 2 * hits + false_alarms + misses
    return 2 * hits / called if called else 0.0


def both_right(results: Sequence[dict[str, Any]]) -> float:
    """Share of pairs with both questions answered right, as MME's accuracy+; NaN when no pair is complete.

    A pair with one question only (an odd --limit cuts the last one) is left out, with a warning.

    Paper: arXiv 2306.13394, section 2.2 (MME).
    """
    pairs: dict[str, list[float]] = defaultdict(list)
    for result in results:
        pairs[result["pair_id"]].append(result["right"])
    complete = [rights for rights in pairs.values() if len(rights) == 2]
    if len(complete) < len(pairs):
        logger.warning("digitscenes_pairs: %d of %d pairs lack a question and are left out.", len(pairs) - len(complete), len(pairs))
    return sum(all(rights) for rights in complete) / len(complete) if complete else math.nan
