"""The results directory of a sweep.

::

    sweep.json                         the grid: runs, and the folder of every task
    runs/RUN/run.json                  resolved configuration of a run, without tasks and limit
    runs/RUN/TASK/plan.json            what the answers are answers to, and how they were planned
    runs/RUN/TASK/answers.jsonl        the answers, see `answers`
    runs/RUN/TASK/scores.jsonl         by document: answer, target, metric items, score
    runs/RUN/TASK/draws.json           bootstrap replicates of the scores
    runs/RUN/TASK/record.json          written last: it is what makes the unit exist
    runs/RUN/TASK/.lock, .holder       the claim of the process that works on it, see `claims`
    logs/                              output of the processes of `--processes`, and what they are told
    images/                            pictures of the first documents, shared by all runs
    report.*, tables/, figures/        what the report adds

One task of one run is a unit. No file is written by two processes at a time: a unit's belong to whoever holds its claim, and
run.json and sweep.json are replaced in one step by the same content.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from vlm_pruner_eval.durable import stopped
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.store import answers as answer_log
from vlm_pruner_eval.store.files import remove_leftovers, write_atomic
from vlm_pruner_eval.store.schema import FINISHED, Grid, Model, RunHead, RunLine, RunRecord, UnitRecord, fault, read_model, to_json

_LONGEST_NAME = 255
_AGAIN = "run the sweep again to rewrite it."
_DELETE = "delete the folder and run the sweep again."


class DocumentScore(Model):
    """A line of scores.jsonl.

    Attributes
    ----------
    answer
        The text; of choices that were scored, the number of the likeliest one, by the mean over its tokens.
    score
        In [0, 1]; None if the task gives the document none.
    items
        lmms-eval's metric items.
    """

    task: str
    doc_id: int
    answer: str | int
    score: float | None
    target: Any = None
    items: dict[str, Any] = Field(default_factory=dict)
    images: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class Unit:
    """The folder of one task of one run."""

    folder: Path

    def read(self) -> UnitRecord | None:
        """The record; None if there is none.

        Raises
        ------
        ConfigError
            A file that is not what was written.
        """
        try:
            return read_model(UnitRecord, self.folder / "record.json", _DELETE)
        except FileNotFoundError:
            return None

    def status(self, limit: int | None, checkpoint: Mapping[str, Any] | None = None) -> str | None:
        """`FINISHED` or `FAILED` of a whole record of this limit, and of these checkpoint files if they are known; else None."""
        try:
            record = self.read()
        except ConfigError:  # it is made again out of the answers
            return None
        if record is None or record.limit != limit:
            return None
        must_have = record.status == FINISHED or record.n_answers > 0  # one may have failed before its first answer
        if must_have and not (self.folder / answer_log.ANSWERS).is_file():
            return None
        return record.status if not checkpoint or record.provenance.checkpoint == dict(checkpoint) else None

    def forget(self) -> None:
        """Remove the record: the unit is to be made again."""
        (self.folder / "record.json").unlink(missing_ok=True)

    def write(self, record: UnitRecord, scores: Iterable[DocumentScore], draws: Mapping[str, np.ndarray]) -> None:
        """Write scores and bootstrap replicates, then the record."""
        self.forget()  # an old record must not vouch for new scores
        remove_leftovers(self.folder)
        lines = "".join(json.dumps(score.model_dump(), ensure_ascii=False) + "\n" for score in scores)
        write_atomic(self.folder / "scores.jsonl", lines)
        rounded = {task: [float(f"{value:.9g}") for value in values] for task, values in draws.items()}
        write_atomic(self.folder / "draws.json", to_json(rounded, indent=None) + "\n")
        write_atomic(self.folder / "record.json", to_json(record) + "\n")

    def copy_to(self, other: Unit) -> None:
        """Make another unit the same, its record last."""
        other.forget()
        other.folder.mkdir(parents=True, exist_ok=True)
        for name in (answer_log.PLAN, answer_log.ANSWERS, "scores.jsonl", "draws.json", "record.json"):
            write_atomic(other.folder / name, (self.folder / name).read_bytes())

    def read_draws(self) -> dict[str, np.ndarray]:
        """Task -> values [replicates] of its score, replicate k of the same documents in every run.

        Raises
        ------
        ConfigError
            The file is broken.
        """
        path = self.folder / "draws.json"
        try:
            return {task: np.array(values, dtype=np.float64) for task, values in json.loads(path.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"{path}: can't be read ({error}); {_DELETE}") from error

    def each_score(self) -> Iterator[DocumentScore]:
        """Scores by document.

        Raises
        ------
        ConfigError
            A line that is not what was written, with file and line.
        """
        path = self.folder / "scores.jsonl"
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    yield _score(line, path, number)
        except OSError as error:
            raise ConfigError(f"{path}: can't be read ({error}); {_DELETE}") from error

    def answers(self) -> Iterator[answer_log.Answer]:
        """Answers, in the order in which they were found."""
        return answer_log.read_answers(self.folder)


def _score(line: bytes, path: Path, number: int) -> DocumentScore:
    try:
        return DocumentScore.model_validate_json(line)
    except ValidationError as error:
        raise ConfigError(f"{path}, line {number}: can't be read ({fault(error)}); {_DELETE}") from error


@dataclass(frozen=True)
class Store:
    """The results directory of one sweep."""

    root: Path

    def check_writable(self) -> None:
        """Refuse a directory that can't be written, before any work and without creating anything.

        Raises
        ------
        ConfigError
            The path is a file, or the nearest existing folder can't be written.
        """
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in self.root.parts):
            raise ConfigError(f"output: got a name of more than {_LONGEST_NAME} bytes; choose another folder with --output.")
        nearest = self.root.absolute()
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            what = "is not a folder" if not nearest.is_dir() else "can't be written"
            raise ConfigError(f"output: got {str(self.root)!r}, but {str(nearest)!r} {what}; choose another folder with --output.")

    # ---- the grid
    def begin(self, grid: Grid) -> None:
        """Write the grid, so that a report can tell "not run" from "not asked".

        Raises
        ------
        ConfigError
            The directory can't be written.
        StoppedError
            The disk is full.
        """
        path = self.root / "sweep.json"
        try:
            if self.is_of(grid):
                path.touch()  # it tells the time of the disk, by which leftovers are old
            else:
                write_atomic(path, _text(grid))
            self.stopped.unlink(missing_ok=True)
            for folder in (self.root, *filter(Path.is_dir, [*self.root.iterdir(), *self.root.glob("runs/*")])):
                remove_leftovers(folder, like=path)
        except OSError as error:
            if full := stopped(error):
                raise full from error
            raise ConfigError(f"output: {str(self.root)!r} can't be written ({error}); choose another folder with --output.") from error

    def withdraw(self) -> None:
        """Remove what `begin` wrote, and what processes have said; the directory too, unless it holds anything else."""
        (self.root / "sweep.json").unlink(missing_ok=True)
        shutil.rmtree(self.logs, ignore_errors=True)
        with suppress(OSError):  # it is not empty
            self.root.rmdir()

    def is_of(self, grid: Grid) -> bool:
        """Tell if the grid of the directory is this one."""
        try:
            return (self.root / "sweep.json").read_text(encoding="utf-8") == _text(grid)
        except (OSError, UnicodeDecodeError):
            return False

    def read_grid(self) -> Grid:
        """The grid of the sweep as `begin` wrote it.

        Raises
        ------
        ConfigError
            There is none: the directory holds no sweep; or it is not what was written.
        """
        path = self.root / "sweep.json"
        if not os.path.isfile(path):  # also of a name that can be none
            raise ConfigError(f"{self.root}: holds no sweep; give the folder that `vlm-pruner-eval sweep` wrote.")
        return read_model(Grid, path, _AGAIN)

    @property
    def stopped(self) -> Path:
        """The traceback of what stopped the last sweep; absent if nothing did."""
        return self.root / "stopped.txt"

    @property
    def logs(self) -> Path:
        """What processes of this machine printed."""
        return self.root / "logs"

    # ---- runs
    def run_dir(self, run_id: str) -> Path:
        """The folder of one run."""
        return self.root / "runs" / run_id

    def unit(self, run_id: str, folder: str) -> Unit:
        """One task of one run, by the name of its folder."""
        return Unit(self.run_dir(run_id) / folder)

    def write_head(self, head: RunHead) -> None:
        """Write run.json, unless it is there."""
        path = self.run_dir(head.run.run_id) / "run.json"
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != _text(head):
            write_atomic(path, _text(head))

    def read_head(self, run_id: str) -> RunHead | None:
        """The configuration of a run; None if there is none.

        Raises
        ------
        ConfigError
            A file that is not what was written, or that of another run.
        """
        path = self.run_dir(run_id) / "run.json"
        try:
            head = read_model(RunHead, path, _DELETE)
        except FileNotFoundError:
            return None
        if head.run.run_id != run_id:
            raise ConfigError(
                f"{path}: holds the record of {head.run.run_id!r}: two runs with the same id; delete the copy, or move it away."
            )
        return head

    def read(self, line: RunLine, units: Mapping[str, str], limit: int | None) -> RunRecord | None:
        """A run of the grid as it stands on disk; None if no unit of it has a record of this limit.

        Parameters
        ----------
        units
            Task -> folder, of the grid.

        Raises
        ------
        ConfigError
            See `read_head` and `Unit.read`.
        """
        head = self.read_head(line.run_id)
        found = {task: self.unit(line.run_id, folder) for task, folder in units.items()}
        records = {task: record for task, unit in found.items() if (record := unit.read()) is not None and record.limit == limit}
        if head is None or not records:
            return None
        return RunRecord(line=line, config=head.config, units=records, expected=len(units))

    def other_runs(self, known: Iterable[str]) -> Iterator[tuple[RunHead, Sequence[UnitRecord]]]:
        """Runs of the directory that are not among `known`, with their finished units."""
        left_out = set(known)
        for path in sorted(self.root.glob("runs/*/run.json")):
            if path.parent.name in left_out:
                continue
            try:
                head = self.read_head(path.parent.name)
                units = [record for folder in path.parent.iterdir() if folder.is_dir() and (record := Unit(folder).read()) is not None]
            except ConfigError:  # of another version: it is not used, whatever it holds
                continue
            if head is not None:
                yield head, [unit for unit in units if unit.status == FINISHED]


def _text(record: Model) -> str:
    return to_json(record) + "\n"
