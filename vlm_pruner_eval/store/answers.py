"""The answer log: answers.jsonl is both the journal of a unit and its samples.

A line is an answer with a checksum. The lines of a batch are written in one go and through to the disk before the next batch
begins, so a killed process loses the batch it was at and nothing else: a batch whose lines are not all there is cut off. How
requests are planned into batches depends on the requests and the batch size alone, so what is left of the plan after a crash is
what was left of it before. plan.json beside it says which plan that is: where requests were added (a larger `limit`), the
earlier ones and the new ones are planned apart.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from loguru import logger
from pydantic import Field

from vlm_pruner_eval.durable import make_folder, sync_folder
from vlm_pruner_eval.errors import DamagedError
from vlm_pruner_eval.store.answer_record import Answer, Batch, BatchSize, Compute, Done
from vlm_pruner_eval.store.files import write_atomic
from vlm_pruner_eval.store.schema import SCHEMA, Model, read_model, to_json

ANSWERS, PLAN = "answers.jsonl", "plan.json"
_LINE = re.compile(rb'(\{.*), "crc": "([0-9a-f]{8})"\}\n')
_BATCH = re.compile(rb'"batch": \[(\d+), (\d+)\]$')
_ADVICE = "delete the folder and run the sweep again."

Key = tuple[str, str, int, int]  # call, task, document, how many requests of that document came before


class Plan(Model):
    """plan.json: what the answers are answers to, and how they were planned.

    Attributes
    ----------
    head
        What must be the same for answers to be used again.
    bounds
        Numbers of documents of each task up to which requests were planned together, ascending; None: without an end.
    asked
        Requests by call.
    """

    schema_: int = Field(default=SCHEMA, alias="schema")
    head: dict[str, Any]
    batch_size: int
    exhausted: list[int] = Field(default_factory=list)
    bounds: list[int | None] = Field(default_factory=list)
    asked: dict[str, int] = Field(default_factory=dict)

    @property
    def size(self) -> BatchSize:
        """The batch size."""
        return BatchSize(self.batch_size, tuple(self.exhausted))


@dataclass(frozen=True)
class Line:
    """A line of the log: its bytes without checksum, where it ends, which of how many lines of its batch it is."""

    text: bytes
    end: int
    number: int
    of: int

    @property
    def doc_id(self) -> int:
        """The document, without parsing the line; no text looks like it, as quotes in texts are escaped."""
        return int(self.text.partition(b'"doc_id": ')[2].partition(b",")[0])

    def parsed(self) -> dict[str, Any]:
        """The answer in plain types, with what the log adds."""
        return dict(json.loads(self.text + b"}"))

    def answer(self) -> Answer:
        """The answer."""
        return Answer.from_json(self.parsed())


def read_lines(path: Path) -> Iterator[list[Line]]:
    """Whole batches of a log; a batch that a crash cut off is left out.

    Raises
    ------
    DamagedError
        A whole line that is not what was written, with file and line.
    """
    batch: list[Line] = []
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            found = _LINE.fullmatch(line)
            place = _BATCH.search(found[1]) if found else None
            if found is None or place is None or int(found[2], 16) != zlib.crc32(found[1]) or int(place[1]) != len(batch):
                raise DamagedError(
                    f"{path}, line {number}: got a line that does not fit its checksum, so the file was changed or its disk is failing; "
                    f"the answers in it can't be trusted: {_ADVICE}"
                )
            batch.append(Line(found[1], offset, int(place[1]), int(place[2])))
            if len(batch) == batch[0].of:
                yield batch
                batch = []


def answer_lines(folder: Path) -> Iterator[Line]:
    """Lines of a unit's log, in the order in which they were written; none if there is no log."""
    if (folder / ANSWERS).is_file():
        for batch in read_lines(folder / ANSWERS):
            yield from batch


def read_answers(folder: Path) -> Iterator[Answer]:
    """Answers of a unit, in the order in which they were found; none if there is no log."""
    return (line.answer() for line in answer_lines(folder))


def count_answers(folder: Path) -> tuple[int, int | None]:
    """Answers of a unit, and how many requests it has as far as it asked them."""
    done = sum(1 for _ in answer_lines(folder))
    plan = read_plan(folder)
    return done, sum(plan.asked.values()) if plan is not None and plan.asked else None


def read_plan(folder: Path) -> Plan | None:
    """The plan of a unit; None if there is none yet."""
    try:
        return read_model(Plan, folder / PLAN, _ADVICE)
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class Begun:
    """A call that begins or goes on: answers that are there, and all requests in parts that are planned each by itself."""

    found: Batch
    done: Done
    parts: list[list[Any]]


@dataclass
class AnswerLog:
    """The log of one unit in its folder, also as the source of a model's answers; use as a context manager.

    Parameters
    ----------
    folder
        Of the unit; made when the first call begins.
    head
        What must be the same for answers to be used again: the identity of the unit, a digest of the checkpoint's files.
    limit
        Documents of each task that are asked; None: all. Answers of a smaller or larger limit are used again.
    """

    folder: Path
    head: Mapping[str, Any]
    limit: int | None = None
    earlier_s: float = 0.0  # what the answers took that earlier processes left
    computed_s: float = 0.0  # what answers took that were not there yet
    _file: IO[bytes] | None = field(default=None, repr=False)
    _plan: Plan | None = field(default=None, repr=False)
    _held: dict[Key, tuple[dict[str, Any], int]] = field(default_factory=dict, repr=False)  # with the size of its batch

    @property
    def path(self) -> Path:
        """The file of the answers."""
        return self.folder / ANSWERS

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; what is in it stays."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._held = {}

    def batch_size(self) -> BatchSize | None:
        """Size of the batches in the log; None if there is no log that can be continued."""
        plan = read_plan(self.folder)
        return plan.size if plan is not None and plan.head == dict(self.head) else None

    def bounds(self, size: BatchSize) -> list[int | None]:
        """See `Plan`; none if nothing can be continued."""
        plan = read_plan(self.folder)
        return list(plan.bounds) if plan is not None and self._continues(plan, size) else []

    def has_failures(self) -> bool:
        """Tell if a sample in it failed."""
        return any(answer.error is not None for answer in read_answers(self.folder))

    def delete(self) -> None:
        """Remove all answers: the unit is to begin anew."""
        self.close()
        for name in (ANSWERS, PLAN):
            (self.folder / name).unlink(missing_ok=True)

    # ---- the source of answers
    def __call__(self, call: str, asked: Sequence[Any], compute: Compute, size: BatchSize) -> Iterator[Batch]:
        """Answers that are there, then those that `compute` makes of the rest batch by batch, each written down first."""
        begun = self.begin(call, asked, size)
        if begun.found:
            yield begun.found
        clock = time.monotonic()
        for part in begun.parts:
            for batch in compute(part, begun.done):
                now = time.monotonic()
                self.append(call, batch, now - clock)
                self.computed_s += now - clock
                clock = now
                yield batch

    def begin(self, call: str, asked: Sequence[Any], size: BatchSize, bounds: Sequence[int | None] = ()) -> Begun:
        """Open the log behind its last whole batch, or anew if its answers are of something else.

        Parameters
        ----------
        asked
            All requests of the call, see `Asked`.
        bounds
            More bounds to plan by, of logs that are answered together with this one.
        """
        if self._file is None or self._plan is None or self._plan.size != size:
            self._open(size)
        keys = _keys(call, asked)
        if any(self._held[key][0].get("request") != request.digest for key, request in keys.items() if key in self._held):
            logger.warning(f"{self.path}: the tasks ask other questions than when this was begun; it begins anew.")
            self._restart(size)
        self._note(call, len(asked), bounds)
        return self._begun(keys)

    def append(self, call: str, batch: Batch, seconds: float) -> None:
        """Write one batch through to the disk.

        Raises
        ------
        OSError
            It does not fit on the disk; the part that was written is cut off when the log is opened again.
        """
        more = {"call": call, "seconds": round(seconds / max(1, len(batch)), 6)}
        lines = []
        for number, (request, answer) in enumerate(batch):
            nth = {"nth": request.nth} if request.nth else {}
            row = answer.as_json() | more | nth | {"request": request.digest, "batch": [number, len(batch)]}
            text = json.dumps(row)[:-1].encode()  # ASCII, and with NaN and infinity, which likelihoods may be
            lines.append(b'%s, "crc": "%08x"}\n' % (text, zlib.crc32(text)))
        self._write(b"".join(lines))

    # ---- opening
    def _continues(self, plan: Plan, size: BatchSize) -> bool:
        return plan.head == dict(self.head) and plan.size == size

    def _open(self, size: BatchSize) -> None:
        self.close()
        self.earlier_s = self.computed_s = 0.0
        plan = read_plan(self.folder)
        if plan is None or not self._continues(plan, size) or not self.path.is_file():
            self._restart(size)
            return
        end = 0
        for batch in read_lines(self.path):
            end = batch[-1].end
            for line in batch:
                row = line.parsed()
                self._held[row["call"], row["task"], row["doc_id"], row.get("nth", 0)] = row, line.of
                self.earlier_s += row["seconds"]
        self._plan = plan
        self._file = self.path.open("r+b", buffering=0)
        self._file.truncate(end)
        self._file.seek(end)

    def _restart(self, size: BatchSize) -> None:
        """Begin without answers; they go before the plan that they belong to is replaced."""
        self.close()
        make_folder(self.folder)
        self._file = self.path.open("wb", buffering=0)
        os.fsync(self._file.fileno())
        sync_folder(self.folder)  # the file may be new: what is written to it counts from now on
        self.earlier_s = 0.0
        self._plan = Plan(head=dict(self.head), batch_size=size.size, exhausted=list(size.exhausted))
        self._write_plan()

    def _note(self, call: str, count: int, bounds: Sequence[int | None]) -> None:
        """Put the call and the present limit into the plan."""
        wanted = {*self._begun_plan.bounds, *bounds, self.limit}
        ascending = sorted(wanted, key=lambda bound: float("inf") if bound is None else bound)
        noted = self._begun_plan.model_copy(update={"bounds": ascending, "asked": self._begun_plan.asked | {call: count}})
        if noted != self._plan:
            self._plan = noted
            self._write_plan()

    def _write_plan(self) -> None:
        write_atomic(self.folder / PLAN, to_json(self._plan) + "\n")

    def _begun(self, keys: Mapping[Key, Any]) -> Begun:
        """Split requests into those with answers and the others, by the bounds of the plan."""
        done = Done()
        found: Batch = []
        for key, (row, of) in self._held.items():
            request = keys.get(key)
            if request is not None:
                found.append((request, Answer.from_json(row)))
                done.indices.add(request.index)
                done.alone.update([request.index] if of == 1 else [])
        parts: dict[int, list[Any]] = {}
        for request in keys.values():
            place = next(n for n, bound in enumerate(self._begun_plan.bounds) if bound is None or request.doc_id < bound)
            parts.setdefault(place, []).append(request)
        return Begun(found, done, [part for _, part in sorted(parts.items())])

    @property
    def _begun_plan(self) -> Plan:
        if self._plan is None:
            raise RuntimeError("the log has no plan before `begin`.")
        return self._plan

    def _write(self, content: bytes) -> None:
        if self._file is None:
            raise RuntimeError("the log is not open before `begin`.")
        view = memoryview(content)
        while view:  # unbuffered: what did not fit is not tried again when the file is closed
            view = view[self._file.write(view) :]
        os.fsync(self._file.fileno())


def _keys(call: str, asked: Sequence[Any]) -> dict[Key, Any]:
    """Requests by what their answers are found by."""
    return {(call, request.task, request.doc_id, request.nth): request for request in asked}
