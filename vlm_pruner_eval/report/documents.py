"""Which documents every run answered, read from its answers, and a sentence where runs can't be compared document by document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlm_pruner_eval.sweep.store import Store

_TEXT = rb'"(?:[^"\\]|\\.)*"'
# What every line begins with. A sweep over the paper's benchmarks holds gigabytes of kept positions that need not be parsed for this.
_START = re.compile(rb'\{"task": (' + _TEXT + rb'), "split": (null|' + _TEXT + rb'), "doc_id": (\d+), ')


@dataclass(frozen=True)
class Documents:
    """The documents of one run's answers, by task, with the splits they come from; `broken` counts lines that are cut off."""

    ids: dict[str, frozenset[int]]
    splits: dict[str, str]
    n_answers: int
    broken: int


def read_documents(store: Store, run_id: str) -> Documents:
    """Read through the answers of a run."""
    ids: dict[str, set[int]] = {}
    splits: dict[str, str] = {}
    n_answers = broken = 0
    with (store.run_dir(run_id) / "samples.jsonl").open("rb") as file:
        for line in file:
            found = _document(line)
            n_answers += found is not None
            broken += found is None
            if found is not None:
                task, split, doc_id = found
                ids.setdefault(task, set()).add(doc_id)
                splits.setdefault(task, str(split))
    return Documents({task: frozenset(found) for task, found in ids.items()}, splits, n_answers, broken)


def _document(line: bytes) -> tuple[str, str | None, int] | None:
    """Task, split and number of a document; None for a line that is cut off."""
    if not line.endswith(b"}\n"):
        return None
    if match := _START.match(line):
        task, split, doc_id = (json.loads(part) for part in match.groups())
        return task, split, doc_id
    try:
        sample = json.loads(line)
        return sample["task"], sample.get("split"), sample["doc_id"]
    except (ValueError, KeyError, TypeError):
        return None


def document_problems(records: dict[str, dict[str, Any]], documents: dict[str, Documents]) -> Iterator[str]:
    """A sentence for each run whose answers are incomplete, or whose documents are not those of the first run.

    Parameters
    ----------
    records, documents
        By key of the run, finished ones only.
    """
    for key, record in records.items():
        found, expected = documents[key], record.get("n_answers")
        if found.broken or expected not in (None, found.n_answers):
            cut = f", {found.broken} lines are cut off" if found.broken else ""
            yield (
                f"{key}: samples.jsonl holds {found.n_answers} answers{cut}, expected {expected}: samples are missing; "
                "delete the run's folder and run the sweep again."
            )
    first = next(iter(records), None)
    for key in list(records)[1:]:
        yield from _other_documents(key, documents[key], first, documents[first])
        yield from _other_data(key, records[key], first, records[first])


def _other_documents(key: str, ours: Documents, first: str, theirs: Documents) -> Iterator[str]:
    for task in sorted(ours.ids.keys() | theirs.ids.keys()):
        apart = ours.ids.get(task, frozenset()) ^ theirs.ids.get(task, frozenset())
        if apart:
            yield (
                f"{key}: answered other documents of {task} than {first} ({len(apart)} are on one side only, the first is {min(apart)}); "
                "differences would not be paired: run one of them again."
            )


def _other_data(key: str, ours: dict[str, Any], first: str, theirs: dict[str, Any]) -> Iterator[str]:
    """Same numbers of documents, other content: a data set that changed between runs. Older records don't tell."""
    mine, expected = ours.get("documents", {}), theirs.get("documents", {})
    changed = {task for task in mine.keys() & expected.keys() if mine[task] != expected[task]}
    clusters = [{task: (held.get("clusters") or {}).get("digest") for task, held in record["tasks"].items()} for record in (ours, theirs)]
    pictures = {task for task, digest in clusters[0].items() if digest and clusters[1].get(task) and digest != clusters[1][task]}
    for task in sorted(changed | pictures):
        what = "documents" if task in changed else "images"
        yield (
            f"{key}: the {what} of {task} have another content than those of {first}: another revision of the data set; "
            "pin one revision and run both again."
        )
