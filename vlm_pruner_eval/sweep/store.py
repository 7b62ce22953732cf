"""Records on disk: one directory per run, written so that a reader never sees half a file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_pruner_eval.durable import stopped
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.files import remove_leftovers, write_atomic

FINISHED, FAILED = "finished", "failed"
_LONGEST_NAME = 255
# Their lists are most of a line. Inside the text of an answer the quotes would be escaped, so this can't match there.
_POSITIONS = re.compile(rb'("(?:kept_positions|order)": )\[[\d, ]*\]')


def to_json(value: object, *, indent: int | None = 1) -> str:
    """JSON text with Unicode kept; NaN and infinity become null, numpy numbers plain ones, other objects their text."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if all(type(item) is int for item in value):  # thousands of positions
            return list(value)
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(item) for item in value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy and torch scalars
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


@dataclass(frozen=True)
class Store:
    """The results directory of one sweep.

    Layout: ``sweep.json`` (the grid), ``runs/<run_id>/run.json``, ``samples.jsonl`` and ``draws.json``, and what the report adds.
    """

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

    def begin(self, name: str, source: dict[str, Any], runs: Iterable[dict[str, Any]]) -> None:
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
            write_atomic(path, self._grid(name, source, runs))
            self.stopped.unlink(missing_ok=True)
            for folder in (self.root, *(child for child in self.root.iterdir() if child.is_dir())):
                remove_leftovers(folder, like=path)
        except OSError as error:
            if full := stopped(error):
                raise full from error
            raise ConfigError(f"output: {str(self.root)!r} can't be written ({error}); choose another folder with --output.") from error

    def is_of(self, name: str, source: dict[str, Any], runs: Iterable[dict[str, Any]]) -> bool:
        """Return True if the grid of the directory is the one that `begin` would write."""
        try:
            return (self.root / "sweep.json").read_text(encoding="utf-8") == self._grid(name, source, runs)
        except (OSError, UnicodeDecodeError):
            return False

    @staticmethod
    def _grid(name: str, source: dict[str, Any], runs: Iterable[dict[str, Any]]) -> str:
        return to_json({"name": name, "config": source, "runs": list(runs)}) + "\n"

    @property
    def stopped(self) -> Path:
        """The traceback of what stopped the last sweep; absent if nothing did."""
        return self.root / "stopped.txt"

    def run_dir(self, run_id: str) -> Path:
        """The directory of one run."""
        return self.root / "runs" / run_id

    def read(self, run_id: str) -> dict[str, Any] | None:
        """A run's record, or None when there is none or it was not written by this package."""
        path = self.run_dir(run_id) / "run.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        return record if isinstance(record, dict) and record.get("run_id") == run_id else None

    def status(self, run_id: str, checkpoint: dict[str, Any] | None = None) -> str | None:
        """`FINISHED` or `FAILED` of a run with a complete record, of the same checkpoint files where they are given; else None."""
        record = self.read(run_id)
        if record is None or record.get("status") not in (FINISHED, FAILED) or not (self.run_dir(run_id) / "samples.jsonl").is_file():
            return None
        return record["status"] if checkpoint is None or record["provenance"]["checkpoint"] == checkpoint else None

    def is_finished(self, run_id: str, checkpoint: dict[str, Any] | None = None) -> bool:
        """Whether a run has a complete record that counts."""
        return self.status(run_id, checkpoint) == FINISHED

    def stamp(self, run_id: str) -> str | None:
        """Changes whenever a run is recorded: a digest of its record, None where there is none."""
        try:
            return hashlib.sha256((self.run_dir(run_id) / "run.json").read_bytes()).hexdigest()
        except FileNotFoundError:
            return None

    def forget(self, run_id: str) -> None:
        """Remove a run's record: it is to be run again."""
        (self.run_dir(run_id) / "run.json").unlink(missing_ok=True)

    def write_run(self, record: dict[str, Any], samples: Iterable[dict[str, Any]], draws: Mapping[str, np.ndarray] | None = None) -> None:
        """Write a run's samples and the resampled values of its scores, then its record: the record is what makes the run exist."""
        folder = self.run_dir(record["run_id"])
        remove_leftovers(folder)  # a run is recorded by one process at a time
        self.forget(record["run_id"])  # an old record must not vouch for new samples
        write_atomic(folder / "samples.jsonl", "".join(to_json(sample, indent=None) + "\n" for sample in samples))
        short = {task: [float(f"{value:.9g}") for value in values] for task, values in (draws or {}).items()}
        write_atomic(folder / "draws.json", to_json(short, indent=None) + "\n")
        write_atomic(folder / "run.json", to_json(record) + "\n")

    def read_draws(self, run_id: str) -> dict[str, np.ndarray]:
        """Task -> values [resamples] of its score on the resamples, draw k of the same documents in every run.

        A task without interval is absent, and so are all tasks of a run that an older version of this package made.

        Raises
        ------
        ConfigError
            The file is broken.
        """
        path = self.run_dir(run_id) / "draws.json"
        if not path.is_file():
            return {}
        try:
            return {task: np.array(values, dtype=np.float64) for task, values in json.loads(path.read_text(encoding="utf-8")).items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"{path}: can't be read ({error}); delete the run's folder and run the sweep again.") from error

    def read_samples(self, run_id: str) -> list[dict[str, Any]]:
        """The answers of a run, one mapping each."""
        return list(self.each_sample(run_id))

    def each_sample(self, run_id: str, *, positions: bool = True) -> Iterator[dict[str, Any]]:
        """The same one by one: all samples of a large run at once, with their kept positions, fill gigabytes.

        Without `positions`, `kept_positions` and `order` of the records are empty, and reading takes two thirds of the time or less.

        Raises
        ------
        ConfigError
            A line that is not what was written, with file and line.
        """
        path = self.run_dir(run_id) / "samples.jsonl"
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    sample = json.loads(line if positions else _POSITIONS.sub(rb"\1[]", line))
                except ValueError as error:
                    problem = f"{path}, line {number}: can't be read ({error}); delete the run's folder and run the sweep again."
                    raise ConfigError(problem) from error
                yield sample

    def read_grid(self) -> dict[str, Any]:
        """The grid of the sweep as `begin` wrote it.

        Raises
        ------
        ConfigError
            There is none: the directory holds no sweep.
        """
        path = self.root / "sweep.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{self.root}: holds no sweep ({error}); give the folder that `vlm-pruner-eval sweep` wrote.") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: is not valid JSON ({error}); run the sweep again to rewrite it.") from error
