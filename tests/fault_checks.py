"""What a sweep that was killed must still hold, and what it must have become in the end."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.store.answers import ANSWERS, read_lines
from vlm_pruner_eval.store.claims import HOLDER
from vlm_pruner_eval.store.folder import Store
from vlm_pruner_eval.store.schema import FINISHED
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.grid import expand, grid_of
from vlm_pruner_eval.sweep.units import units_of

FOUND = ("lost", "doubled", "repeated", "different", "broken", "left_behind")
TIMED = ("prefill_ms", "decode_ms", "peak_bytes", "seconds")  # of an answer
ABOUT_BATCHES = ("batch", "batch_size", "exhausted")
_NOTHING: Mapping[str, int] = {}
Key = tuple[str, int, int | None]  # task, document, choice
Findings = defaultdict[str, list[str]]  # by kind, see FOUND: what was wrong, in sentences


@dataclass
class Expected:
    """What an uninterrupted sweep came to, by unit; without sizes of batches if they may be any (`any_batch`)."""

    config: SweepConfig
    output: Path
    any_batch: bool = False

    def __post_init__(self) -> None:
        store = Store(self.output)
        self.units = {unit.path: unit.stored(store).folder.relative_to(self.output) for unit in units_of(self.config, expand(self.config))}
        self.answers = {path: dict(self.answers_in(self.output, path)) for path in self.units}
        self.results = {path: self.results_in(self.output, path) for path in self.units}
        self.files = files_of(self.output)

    def answers_in(self, output: Path, path: str) -> list[tuple[Key, bytes]]:
        """Answers of a unit without their times, as bytes."""
        log = output / self.units[path] / ANSWERS
        rows = [line.parsed() for batch in read_lines(log) for line in batch] if log.is_file() else []
        return [((row["task"], row["doc_id"], row.get("choice")), self._answer(row)) for row in rows]

    def _answer(self, row: dict[str, Any]) -> bytes:
        record = _without(row.get("record", {}), ("selection_ms",))
        return _as_bytes(_without(row, TIMED + ABOUT_BATCHES * self.any_batch) | {"record": record})

    def results_in(self, output: Path, path: str) -> bytes:
        """All other files of a unit that must be the same, as bytes."""
        folder = output / self.units[path]
        record = json.loads((folder / "record.json").read_text())
        record["memory"] = _without(record["memory"], ("peak_bytes",))
        record = _without(record, ("provenance", "times") + ABOUT_BATCHES * self.any_batch)
        files = [folder / "scores.jsonl", folder / "draws.json", folder.parent / "run.json"]
        return b"\n".join([_as_bytes(record), *(file.read_bytes() for file in files)])


@dataclass
class Watch:
    """Looks at one results directory after every attempt; answers that were written down, or that it has seen, must stay.

    `may_restart`: units may begin anew with smaller batches, so answers may go until the end.
    """

    output: Path
    expected: Expected
    findings: Findings = field(default_factory=lambda: defaultdict(list))
    may_restart: bool = False
    written: Counter[str] = field(default_factory=Counter)  # by unit, answers that any attempt wrote
    held: dict[str, set[Key]] = field(default_factory=dict)

    def look(self, after: str, written: Mapping[str, int] = _NOTHING) -> None:
        """Between two attempts; `written` by the last one, see `End`."""
        self.written.update(written)
        for path, want in self.expected.answers.items():
            try:
                found = self.expected.answers_in(self.output, path)
            except (ConfigError, ValueError, KeyError) as error:
                self.findings["broken"].append(f"{after}: {path}: {error}")
                continue
            keys = {key for key, _ in found}
            if not self.may_restart:
                self._keep(f"{after}: {path}", path, keys)
            self.held[path] = keys
            if len(found) > len(keys):
                self.findings["doubled"].append(f"{after}: {path}: {len(found) - len(keys)} answers")
            if wrong := [key for key, answer in found if want.get(key) != answer]:
                self.findings["different"].append(f"{after}: {path}: {len(wrong)} answers, such as {wrong[0]}")
        # no file that a reader may meet is half written
        for path in self.output.rglob("[!.]*.json"):
            try:
                json.loads(path.read_text())
            except ValueError as error:
                self.findings["broken"].append(f"{after}: {path.name}: {error}")
        for path in self.output.rglob("[!.]*.jpg"):
            if not path.read_bytes().endswith(b"\xff\xd9"):
                self.findings["broken"].append(f"{after}: {path.name} is no whole picture")

    def _keep(self, where: str, path: str, keys: set[Key]) -> None:
        """Nothing that was there is gone, and nothing was written twice."""
        if missing := self.held.get(path, set()) - keys:
            self.findings["lost"].append(f"{where}: {len(missing)} answers, such as {min(missing)}")
        if self.written[path] > len(keys):
            kind = "repeated" if len(keys) == len(self.expected.answers[path]) else "lost"
            self.findings[kind].append(f"{where}: {self.written[path]} answers were written, {len(keys)} are there")

    def is_finished(self) -> bool:
        """Tell if all units are."""
        store, config = Store(self.output), self.expected.config
        return all(unit.stored(store).status(config.limit) == FINISHED for unit in units_of(config, expand(config)))

    def finish(self, after: str, written: Mapping[str, int] = _NOTHING) -> None:
        """At the end, all is as if nothing had happened."""
        self.look(after, written)
        if not self.is_finished():
            self.findings["lost"].append(f"{after}: units have no finished record")
            return
        for path, want in self.expected.results.items():
            if self.held[path] != set(self.expected.answers[path]):
                self.findings["lost"].append(f"{after}: {path}: {len(self.held[path])} of {len(self.expected.answers[path])} answers")
            if self.expected.results_in(self.output, path) != want:
                self.findings["different"].append(f"{after}: {path}: record, scores, replicates or configuration")
        Store(self.output).begin(grid_of(self.expected.config, expand(self.expected.config)))  # as the next command with work to do
        here = files_of(self.output)
        for kind, names in (("lost", self.expected.files - here), ("left_behind", here - self.expected.files)):
            if names:
                self.findings[kind].append(f"{after}: {len(names)} files, such as {min(names)}")


def files_of(root: Path) -> set[str]:
    """Names below a results directory, and of folders; without who holds a claim, which the dead leave and nobody reads."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.name != HOLDER}


def contents_of(root: Path) -> dict[str, bytes]:
    """The same with the content of every file."""
    return {name: (root / name).read_bytes() for name in files_of(root) if (root / name).is_file()}


def age(root: Path) -> None:
    """Two hours pass for everything in a results directory."""
    for path in root.rglob("*"):
        os.utime(path, (path.stat().st_mtime - 7200,) * 2)


def _without(row: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _as_bytes(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
