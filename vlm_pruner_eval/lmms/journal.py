"""Answers on disk as they come, so that a killed run goes on from its last whole batch and repeats none.

A journal is a file of JSON lines, each with its checksum: a head, and one line for every batch, written through to the disk before
the next batch begins. How requests are planned into batches depends on the requests and the batch size alone, so what is left
of the plan after a crash is what was left of it before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from loguru import logger

from vlm_pruner_eval.durable import make_folder, sync_folder
from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.lmms.lines import encode, read_entries
from vlm_pruner_eval.lmms.log import Answer
from vlm_pruner_eval.lmms.plan import WHOLE, Batch, BatchSize, Compute, Done, Part, ShareDone
from vlm_pruner_eval.lmms.prompts import Request, digest_of

VERSION = 1
_POLL_S, _PATIENCE_S = 0.2, 3600.0


@dataclass
class Journal:
    """The journal of one run in its folder, also as the source of a model's answers (`Answering.source`); use as a context manager.

    Parameters
    ----------
    folder
        Of the run; made when the first answer is written.
    head
        What must be the same for answers to be used again: the run's id, a digest of the checkpoint's files.
    part
        The share of the run that this process answers; every part has a file of its own, and each reads those of all.
    watch
        Called again and again while this process waits for other parts; raises where that is in vain.
    waits
        Whether a part waits for the others and goes on with all answers; if not, it ends with a `ShareDone`.

    Raises
    ------
    DamagedError
        A journal that was changed or damaged.
    """

    folder: Path
    head: Mapping[str, Any]
    part: Part = WHOLE
    watch: Callable[[], None] | None = None
    waits: bool = True
    earlier_s: float = 0.0  # what the answers took that earlier processes left
    replayed: int = 0  # those answers
    computed_s: float = 0.0  # what answers took that were not there yet
    _file: IO[bytes] | None = field(default=None, repr=False)
    _begun: dict[str, str] = field(default_factory=dict, repr=False)  # by call, the digest of what it asks

    @property
    def path(self) -> Path:
        """The file that this process writes."""
        return self.folder / f"journal{self.part.suffix}.jsonl"

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; what is in it stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def files(self) -> list[Path]:
        """Journals of all parts, this one's first."""
        others = sorted(path for path in self.folder.glob("journal*.jsonl") if path != self.path)
        return [path for path in (self.path, *others) if path.is_file()]

    def batch_size(self) -> BatchSize | None:
        """The size of the batches in the journal; None where there is no journal that can be continued."""
        for path in self.files():
            for _, entry in read_entries(path):
                if entry.get("head") == self._head():
                    return BatchSize.of(entry)
                break
        return None

    def has_failures(self) -> bool:
        """Whether a sample in it failed."""
        return any(
            answer["error"] is not None for path in self.files() for _, entry in read_entries(path) for answer in entry.get("answers", ())
        )

    def delete(self) -> None:
        """Remove the journals of all parts: the run is recorded, or is to begin anew."""
        self.close()
        for path in self.files():
            path.unlink(missing_ok=True)  # another process may find the run recorded and do the same

    # ---- the source of answers
    def __call__(self, call: str, asked: Sequence[Request], compute: Compute, size: BatchSize) -> Iterator[Batch]:
        """Batches that earlier processes left, then those that `compute` makes of the rest, each written down first.

        Raises
        ------
        PruningError
            The run's requests changed while it ran, or another part of the run stands still.
        """
        digest, done = digest_of(asked), Done()
        self._begin(call, digest, len(asked), size)
        yield from self._replay(call, asked, digest, done)
        clock = time.monotonic()
        for batch in compute(done, self.part):
            now = time.monotonic()
            self.append(call, batch, now - clock)
            self.computed_s += now - clock
            done.add([request.index for request, _ in batch])
            clock = now
            yield batch
        if self.part is not WHOLE:
            self._write({"call": call, "end": True})
            if not self.waits:
                raise ShareDone
            self._wait(call, digest)
            yield from self._replay(call, asked, digest, done)

    def done(self, call: str, asked: Sequence[Request], size: BatchSize) -> Done:
        """What is answered already of a call that begins or goes on."""
        digest, done = digest_of(asked), Done()
        self._begin(call, digest, len(asked), size)
        for entry in self._entries(call, digest):
            done.add(entry["requests"])
        return done

    def append(self, call: str, batch: Batch, seconds: float) -> None:
        """Write one batch through to the disk.

        Raises
        ------
        OSError
            It does not fit on the disk; the part that was written is dropped when the journal is opened again.
        """
        answers = [answer.as_json() for _, answer in batch]
        self._write({"call": call, "requests": [request.index for request, _ in batch], "seconds": seconds, "answers": answers})

    def _head(self) -> dict[str, Any]:
        return {"version": VERSION, **self.head}

    def _begin(self, call: str, digest: str, count: int, size: BatchSize) -> None:
        """Open the file behind its last whole line, or anew where its answers are of something else, and note what `call` asks."""
        if self._file is None or self._size != size:
            self._open(call, digest, size)
        begun = self._begun.setdefault(call, digest)
        if begun != digest:
            raise PruningError(
                f"{self.path}: {call} asks for other requests than when the run was begun, expected the same ones; delete the run's folder "
                "and run the sweep again."
            )
        if call not in self._noted:
            self._write({"call": call, "asked": digest, "count": count})
            self._noted.add(call)

    def _open(self, call: str, digest: str, size: BatchSize) -> None:
        self.close()
        self._begun, self._size, self.earlier_s, self.replayed, self.computed_s = {}, size, 0.0, 0, 0.0
        end = self._usable(call, digest) if self.path.is_file() else 0
        self._noted = set(self._begun)
        make_folder(self.folder)
        self._file = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
        self._file.truncate(end)
        self._file.seek(end)
        if not end:
            sync_folder(self.folder)  # the file may be new: what is written to it counts from now on
            self._write({"head": self._head(), **size.as_json()})

    def _usable(self, call: str, digest: str) -> int:
        """Bytes of the file that can be continued: all its whole lines, or none."""
        end = 0
        for offset, entry in read_entries(self.path):
            if end == 0 and not self._fits(entry):
                return 0
            if "asked" in entry:
                self._begun[entry["call"]] = entry["asked"]
            end = offset
        if self._begun.get(call, digest) != digest:
            logger.warning(f"{self.path}: the tasks ask other questions than when this run was begun; it begins anew.")
            self._begun = {}
            return 0
        return end

    def _fits(self, entry: Mapping[str, Any]) -> bool:
        """Whether a file that begins so holds answers to this very run."""
        return entry.get("head") == self._head() and BatchSize.of(entry) == self._size

    def _replay(self, call: str, asked: Sequence[Request], digest: str, done: Done) -> Iterator[Batch]:
        """Batches of `call` in the files of all parts that are not in `done` yet."""
        for entry in self._entries(call, digest):
            if not done.has(entry["requests"]):
                done.add(entry["requests"])
                self.earlier_s += entry["seconds"]
                self.replayed += len(entry["answers"])
                yield [(asked[i], Answer.from_json(answer)) for i, answer in zip(entry["requests"], entry["answers"], strict=True)]

    def _entries(self, call: str, digest: str) -> Iterator[dict[str, Any]]:
        """Entries of all parts that hold answers to these very requests."""
        for path in self.files():
            is_begun = False
            for position, (_, entry) in enumerate(read_entries(path)):
                if position == 0 and not self._fits(entry):
                    break
                if entry.get("call") == call:
                    is_begun |= entry.get("asked") == digest
                    if is_begun and "answers" in entry:
                        yield entry

    def _write(self, entry: Mapping[str, Any]) -> None:
        line = memoryview(encode(entry))
        while line:  # unbuffered: what did not fit is not tried again when the file is closed
            line = line[self._file.write(line) :]
        os.fsync(self._file.fileno())

    # ---- other parts
    def _wait(self, call: str, digest: str) -> None:
        """Until every part has answered its share."""
        paths = [self.folder / f"journal{part.suffix}.jsonl" for part in self.part.all()]
        sizes, since = [], time.monotonic()
        while True:
            looked = time.monotonic()
            if self.watch is not None:
                self.watch()
            waiting = [path for path in paths if not self._is_ended(path, call, digest)]
            if not waiting:
                return
            now = [path.stat().st_size if path.is_file() else 0 for path in paths]
            if now != sizes:
                sizes, since = now, looked
            if looked - since > _PATIENCE_S:
                raise PruningError(
                    f"{waiting[0]}: this part of the run has not answered anything for {_PATIENCE_S / 60:.0f} minutes, expected that all "
                    f"{self.part.count} parts run at the same time; see whether its process lives, and run the same command again."
                )
            time.sleep(max(_POLL_S, 10 * (time.monotonic() - looked)))  # reading long files again and again must not cost a processor

    def _is_ended(self, path: Path, call: str, digest: str) -> bool:
        """Whether a part wrote that it answered its share of `call`."""
        if not path.is_file():
            return False
        entries = [entry for _, entry in read_entries(path, answers=False) if "requests" not in entry]
        is_begun = any(entry.get("call") == call and entry.get("asked") == digest for entry in entries)
        return is_begun and self._fits(entries[0]) and {"call": call, "end": True} in entries


Source = Callable[[str, Sequence[Request], Compute, BatchSize], Iterator[Batch]]
