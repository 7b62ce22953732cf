"""Which documents a task asked: a digest of their content, so that another revision of a data set can't pass as the same one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any


def fingerprints(logged: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Digest of the documents of every task: their numbers, what is plain data in them, and their targets.

    Pictures are left out (their hashes stand with the answers), and so are objects whose text names an address in memory.

    Parameters
    ----------
    logged
        By task, lmms-eval's logged samples.

    Returns
    -------
    dict
        By task, 16 hexadecimal digits of a SHA-256.
    """
    return {task: _digest(rows) for task, rows in logged.items()}


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = {json.dumps([row["doc_id"], _plain(row.get("doc")), _plain(row["target"])], sort_keys=True) for row in rows}
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """What JSON can hold of a value; everything else becomes the name of its type."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
