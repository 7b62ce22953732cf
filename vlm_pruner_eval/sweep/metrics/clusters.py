"""Documents that belong together, and the bootstrap that draws them together.

Questions about one image share what the model saw in it, so they are not independent: 9,000 questions of POPE are about 500
images. Intervals that resample single documents would be too narrow; whole clusters are drawn instead.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vlm_pruner_eval.sweep.turns import question_of

RESAMPLES = 1000
PAIR_KEYS = ("pair_id", "question_id")
_SEED = 20251200
_BLOCK = 100  # resamples drawn at a time: a task of 200,000 documents stays below 200 MB


@dataclass(frozen=True)
class Clusters:
    """Which documents of a task are drawn together.

    Attributes
    ----------
    task
        Its name; every task has draws of its own.
    of
        Document -> index of its cluster, 0 to n - 1.
    """

    task: str
    of: dict[Any, int]

    @cached_property
    def n(self) -> int:
        """Number of clusters."""
        return max(self.of.values(), default=-1) + 1

    def as_json(self) -> dict[str, Any]:
        """`n`, and a `digest` of the assignment: runs with equal digests drew the same documents."""
        text = json.dumps(sorted([str(doc), cluster] for doc, cluster in self.of.items()))
        return {"n": self.n, "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}

    def weights(self) -> Iterator[np.ndarray]:
        """Blocks [resamples, n]: how often each cluster is drawn.

        The generator is seeded by the task and its number of clusters only, so resample k holds the same documents in every
        run, and differences between runs are paired. Different tasks draw independently.
        """
        rng = np.random.default_rng([_SEED, zlib.crc32(self.task.encode()), self.n])
        for _ in range(RESAMPLES // _BLOCK):
            picks = rng.integers(0, self.n, size=(_BLOCK, self.n)) + self.n * np.arange(_BLOCK)[:, None]
            yield np.bincount(picks.ravel(), minlength=_BLOCK * self.n).reshape(_BLOCK, self.n).astype(np.float64)

    def sums(self, columns: np.ndarray) -> np.ndarray:
        """Sums [RESAMPLES, c] over the documents drawn, of `columns` [n, c] that hold each cluster's own sums."""
        return np.concatenate([block @ columns for block in self.weights()])

    def by_cluster(self, docs: Sequence[Any], columns: np.ndarray) -> np.ndarray:
        """Sums [n, c] over each cluster, of `columns` [len(docs), c] that hold a document's (or item's) numbers."""
        total = np.zeros((self.n, columns.shape[1]))
        np.add.at(total, [self.of[doc] for doc in docs], columns)
        return total


def find_clusters(task: str, rows: Sequence[dict[str, Any]], images: Mapping[Any, Sequence[str]]) -> Clusters:
    """Connected documents: those that share an image or the key of a pair, directly or through others.

    Parameters
    ----------
    rows
        lmms-eval's logged samples: doc_id, doc, and metric items.
    images
        Document -> content hashes of its images; documents that are not in it have none.
    """
    by_document = {row["doc_id"]: row for row in rows}  # one row for each filter of the task
    pairs = pair_keys([_fields(row) for row in by_document.values()])
    keys: dict[Any, list[Hashable]] = {}
    for (doc, row), key in zip(by_document.items(), pairs, strict=True):
        keys[doc] = [*images.get(doc, ()), *([] if key is None else [key]), *_question(row)]
    return Clusters(task, connected(keys))


def connected(keys: Mapping[Any, Iterable[Hashable]]) -> dict[Any, int]:
    """Union-find: items that share a key get the same number; numbers count up in the order of the items."""
    parent: dict[Any, Any] = {item: item for item in keys}

    def root(item: Any) -> Any:
        while parent[item] != item:
            parent[item] = item = parent[parent[item]]
        return item

    first: dict[Hashable, Any] = {}
    for item, own in keys.items():
        for key in own:
            parent[root(item)] = root(first.setdefault(key, item))
    numbers: dict[Any, int] = {}
    return {item: numbers.setdefault(root(item), len(numbers)) for item in keys}


def pair_keys(fields: Sequence[Mapping[str, Any]]) -> list[tuple | None]:
    """Per document the key that the two questions of a pair share; None of one that is alone.

    Any `pair_id` is one. A `question_id` is only where exactly two documents of a category have it: MME numbers its pictures so,
    POPE the questions of each split, and others write there what they like (MLVU: the question's text, the same of hundreds of videos).
    """
    keys = [pair_key(of_document) for of_document in fields]
    times = Counter(key for key in keys if key is not None)
    return [key if key is not None and (key[0] != "question_id" or times[key] == 2) else None for key in keys]


def has_pairs(items: Sequence[Any]) -> bool:
    """Tell if metric items are of questions in pairs."""
    return any(key is not None for key in pair_keys([item if isinstance(item, Mapping) else {} for item in items]))


def pair_key(fields: Mapping[str, Any]) -> tuple | None:
    """Name, value and category of what may be the key of a pair; None where there is nothing of the kind."""
    found = next((name for name in PAIR_KEYS if fields.get(name) not in (None, "")), None)
    return None if found is None else (found, str(fields[found]), str(fields.get("category")))


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Names of a document, as it has them itself; what it lacks is looked for in the metric items."""
    fields: dict[str, Any] = {}
    for held in (*_items(row), dict(row.get("doc") or {})):
        fields |= {name: held[name] for name in (*PAIR_KEYS, "category") if held.get(name) is not None}
    return fields


def _question(row: Mapping[str, Any]) -> list[tuple]:
    """The key that all turns of a question share."""
    asked = {question_of(item) for item in _items(row)} - {None}
    return [("turns of", question) for question in asked]


def _items(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [value for name, value in row.items() if name != "doc" and isinstance(value, Mapping)]
