"""The lines of a journal: JSON with a checksum each. Light to import, so that looking at a sweep needs no torch."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_pruner_eval.errors import DamagedError

_LINE = re.compile(rb'\{"crc": "([0-9a-f]{8})", "entry": (\{.*\})\}\n')
_ANSWERS = b', "answers": ['  # the last key of an entry, and nearly all of its bytes


def encode(entry: Mapping[str, Any]) -> bytes:
    """One line: the entry and the CRC-32 of its JSON text."""
    text = json.dumps(entry).encode()  # ASCII, and with NaN and infinity, which likelihoods may be
    return b'{"crc": "%08x", "entry": %s}\n' % (zlib.crc32(text), text)


def read_entries(path: Path, *, answers: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """Entries with the offset behind each; a last line without its end, as a crash leaves it, is no entry.

    Without `answers`, entries come without what was answered, which is checked but not parsed: a tenth of the time.

    Raises
    ------
    DamagedError
        A whole line that is not what was written, with file and line.
    """
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            found = _LINE.fullmatch(line)
            if found is None or int(found[1], 16) != zlib.crc32(found[2]):
                raise DamagedError(
                    f"{path}, line {number}: got a line that does not fit its checksum, so the file was changed or its disk is failing; "
                    "the answers in it can't be trusted. Delete the run's folder and run the sweep again."
                )
            offset += len(line)
            head, cut, _ = found[2].partition(_ANSWERS)
            yield offset, json.loads(head + b"}" if cut and not answers else found[2])
