"""Functions that the task files of this folder name beyond lmms-eval's own: prompts, scores, and a choice of questions."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from lmms_eval.tasks.mme import utils as mme
from lmms_eval.tasks.pope import utils as pope
from lmms_eval.tasks.seedbench import utils as seedbench

if TYPE_CHECKING:
    from datasets import Dataset

POPE_SPLITS = ("random", "popular", "adversarial")
POPE_DENIALS = frozenset({"No", "no", "not"})
MMBENCH_LETTERS = "ABCD"
OCRBENCH_QUESTIONS = 1000
logger = logging.getLogger(__name__)


def mme_doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    """The stock prompt, without a space before its line break.

    The stock function takes " Please answer yes or no." off with one space; some questions have two before it.
    """
    question, ending = doc["question"].strip(), mme.replace_prompt
    if question.endswith(ending):
        question = question.removesuffix(ending).rstrip() + ending
    return mme.mme_doc_to_text(doc | {"question": question}, lmms_eval_specific_kwargs)


def mme_process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The stock item of one question, under its part (perception or cognition) and under the total.

    Paper: arXiv 2306.13394, section 2.2 (MME): a category's score is accuracy + accuracy over pairs, both in percent. The total is
    the sum over all 14 categories, at most 2800.
    """
    ((part, item),) = mme.mme_process_results(doc, results).items()
    return {part: item, "mme_total_score": item}


def pope_process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The stock item of one question, under its split, the mean of the splits, and all questions together.

    Raises
    ------
    ValueError
        A question of a split that POPE does not have.
    """
    split = doc["category"]
    if split not in POPE_SPLITS:
        raise ValueError(f"pope_splits: question {doc['question_id']} is of split {split!r}, expected one of {', '.join(POPE_SPLITS)}.")
    item = pope.pope_process_results(doc, results)["pope_f1_score"]
    return {f"pope_f1_{split}": item, "pope_f1_mean": item | {"category": split}, "pope_f1_score": item}


def pope_llava_process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The items of `pope_process_results`, with the answer read as LLaVA's evaluation script reads it (arXiv 2310.03744).

    Of the first sentence, commas removed: "No", "no" or "not" among the words, as split at spaces, is a no; all else is a yes.
    """
    words = results[0].partition(".")[0].replace(",", "").split(" ")
    answer = "yes" if POPE_DENIALS.isdisjoint(words) else "no"
    return pope_process_results(doc, [answer])


def pope_f1_mean(results: Sequence[dict[str, Any]]) -> float:
    """Mean over the three splits of the F1 of "yes", a fraction in [0, 1]; NaN where a split has no question (a small --limit).

    Paper: arXiv 2305.10355, section 5 (POPE), for the F1 and the splits.
    """
    splits = {split: [result for result in results if result["category"] == split] for split in POPE_SPLITS}
    missing = [split for split, items in splits.items() if not items]
    if missing:
        logger.warning("pope_splits: no question of split %s, so there is no mean of the three; raise --limit.", " and ".join(missing))
        return math.nan
    return sum(pope.pope_aggregate_f1_score(items) for items in splits.values()) / len(splits)


def seed_image_docs(docs: Dataset) -> Dataset:
    """The questions about one image."""
    return docs.select([index for index, kind in enumerate(docs["data_type"]) if kind == "image"])


def seed_process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The stock item of one question about an image."""
    return {"seed_image": seedbench.seed_process_result(doc, results)["seed_image"]}


def mmbench_doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    """The prompt of LLaVA's evaluation script (arXiv 2310.03744): hint, question and options, each on a line of its own.

    Options end at the first that is empty, "nan" or "none", in any case of letters.
    """
    lines = [doc["question"]] if _is_missing(doc["hint"]) else [doc["hint"], doc["question"]]
    for letter in MMBENCH_LETTERS:
        if _is_missing(doc[letter]):
            break
        lines.append(f"{letter}. {doc[letter]}")
    return lmms_eval_specific_kwargs["pre_prompt"] + "\n".join(lines) + lmms_eval_specific_kwargs["post_prompt"]


def _is_missing(value: Any) -> bool:
    return pd.isna(value) or str(value).lower() in ("nan", "none")


def ocrbench_points(results: Sequence[dict[str, Any]]) -> float:
    """Points as a fraction of the benchmark's 1,000; the stock aggregation adds them to those of the evaluations before."""
    return sum(result["score"] for result in results) / OCRBENCH_QUESTIONS
