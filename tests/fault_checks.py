"""What a sweep that was killed must still hold, and what it must have become in the end."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_sweep import Sweep
from vlm_pruner_eval.lmms.lines import read_entries
from vlm_pruner_eval.sweep.store import FINISHED, Store

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.grid import expand

TIMES = ("prefill_ms", "decode_ms", "peak_bytes")
AGGREGATES = ("tasks", "documents", "tokens", "kept_digest", "n_answers", "failures", "status", "problem", "config", "label", "changed")
BATCHES = ("batch_size", "exhausted")
Key = tuple[str, int]  # task, document


def timeless(sample: dict[str, Any]) -> dict[str, Any]:
    """What of a sample is the same in every process that answers it."""
    record = sample["record"] and {name: value for name, value in sample["record"].items() if name != "selection_ms"}
    return {name: value for name, value in sample.items() if name not in TIMES} | {"record": record}


def as_bytes(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


@dataclass
class Expected:
    """What an uninterrupted sweep came to.

    `any_batch`: sizes of batches are not compared, as where memory is short at random.
    """

    sweep: Sweep
    any_batch: bool = False

    def __post_init__(self) -> None:
        store = Store(self.sweep.output)
        self.runs = {run.run_id: run.key for run in expand(self.sweep.config())}
        self.aggregates = {run_id: self.aggregate(store, run_id) for run_id in self.runs}
        self.answers = {run_id: {_key(s): self._answer(s) for s in store.each_sample(run_id)} for run_id in self.runs}
        self.files = files_of(store.root)

    def aggregate(self, store: Store, run_id: str) -> bytes:
        """Everything of a run that must be the same, as bytes."""
        record = store.read(run_id)
        if record is None:
            return b"(no record)"
        names = AGGREGATES if self.any_batch else (*AGGREGATES, *BATCHES)
        samples = [self._sample(sample) for sample in store.each_sample(run_id)]
        draws = (store.run_dir(run_id) / "draws.json").read_bytes()
        memory = {name: value for name, value in record["memory"].items() if name != "peak_bytes"}
        return b"\n".join([as_bytes({name: record[name] for name in names}), as_bytes(memory), draws, *map(as_bytes, samples)])

    def _sample(self, sample: dict[str, Any]) -> dict[str, Any]:
        plain = timeless(sample)
        return {name: value for name, value in plain.items() if name != "batch_size"} if self.any_batch else plain

    def _answer(self, answer: dict[str, Any]) -> bytes:
        """Of a sample or a journal's answer, what both hold."""
        return as_bytes({name: value for name, value in self._sample(answer).items() if name not in ("target", "metrics", "score")})

    def has(self, run_id: str, answer: dict[str, Any]) -> bool:
        """Whether an answer is the one that the uninterrupted sweep gave."""
        return self.answers[run_id].get(_key(answer)) == self._answer(answer)


@dataclass
class Findings:
    """What was wrong, as sentences by kind."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)


@dataclass
class Watch:
    """Looks at one results directory after every attempt; answers that it has seen must stay."""

    sweep: Sweep
    expected: Expected
    findings: Findings = field(default_factory=Findings)
    held: dict[str, set[Key]] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)  # by run, larger batches that did not fit

    @property
    def store(self) -> Store:
        return Store(self.sweep.output)

    def look(self, after: str) -> None:
        """Between two attempts."""
        for run_id, key in self.expected.runs.items():
            try:
                answers, exhausted = self._answers(run_id)
            except (ConfigError, ValueError, KeyError) as error:
                self.findings.broken.append(f"{after}: {key}: {error}")
                continue
            keys = [_key(answer) for answer in answers]
            if exhausted > self.restarts.get(run_id, 0):
                self.held.pop(run_id, None)  # begun anew with smaller batches
            self.restarts[run_id] = exhausted
            if missing := self.held.get(run_id, set()) - set(keys):
                self.findings.lost.append(f"{after}: {key}: {len(missing)} answers, such as {min(missing)}")
            if len(keys) > len(set(keys)):
                self.findings.doubled.append(f"{after}: {key}: {len(keys) - len(set(keys))} answers")
            if wrong := [_key(answer) for answer in answers if not self.expected.has(run_id, answer)]:
                self.findings.different.append(f"{after}: {key}: {len(wrong)} answers, such as {wrong[0]}")
            self.held[run_id] = set(keys)
        self._parse(after)

    def _answers(self, run_id: str) -> tuple[list[dict[str, Any]], int]:
        """What is held of a run, by its samples or else by its journal, and how often it began anew."""
        folder, record = self.store.run_dir(run_id), self.store.read(run_id)
        if record is not None:
            samples = self.store.read_samples(run_id)
            if len(samples) != record["n_answers"]:
                raise ValueError(f"run.json says {record['n_answers']} answers, samples.jsonl holds {len(samples)}")
            return samples, len(record["exhausted"])
        found, exhausted, path = [], 0, folder / "journal.jsonl"
        for _, entry in read_entries(path) if path.is_file() else ():
            exhausted = len(entry.get("exhausted", ())) or exhausted
            found += entry.get("answers", ())
        return found, exhausted

    def _parse(self, after: str) -> None:
        """No file that a reader may meet is half written."""
        for path in self.sweep.output.rglob("*"):
            if path.suffix == ".json" and not path.name.startswith("."):
                try:
                    json.loads(path.read_text())
                except ValueError as error:
                    self.findings.broken.append(f"{after}: {path.name}: {error}")
            if path.suffix == ".jpg" and not path.name.startswith(".") and not path.read_bytes().endswith(b"\xff\xd9"):
                self.findings.broken.append(f"{after}: {path.name} is no whole picture")

    def repeated(self, events: list[str], after: str) -> None:
        """After an attempt and before the next look: it found no answer that had been found before."""
        found: Counter[str] = Counter()
        for run_id, n in _notes(events, "answers"):
            found[run_id] += n
        for run_id, n in found.items():
            left = len(self.expected.answers[run_id]) - len(self.held.get(run_id, ()))
            if n > left:
                self.findings.repeated.append(f"{after}: {self.expected.runs[run_id]}: {n} answers were found, but {left} were left")

    def finish(self, after: str) -> None:
        """At the end, all is as if nothing had happened."""
        self.look(after)
        for run_id, key in self.expected.runs.items():
            if self.store.status(run_id) != FINISHED:
                self.findings.lost.append(f"{after}: {key} has no finished record")
            elif self.expected.aggregate(self.store, run_id) != self.expected.aggregates[run_id]:
                self.findings.different.append(f"{after}: {key}: aggregates")
        here = files_of(self.sweep.output)
        if missing := self.expected.files - here:
            self.findings.lost.append(f"{after}: no {', '.join(sorted(missing))}")
        if more := here - self.expected.files:
            self.findings.left_behind.append(f"{after}: {', '.join(sorted(more)[:3])} ({len(more)} files)")

    def acknowledged(self, events: list[str], after: str) -> None:
        """After a power cut: what was promised is there, in the journal or behind it in the record."""
        said = {name: number for name, number in _notes(events, "size") if "journal" in name}
        for name, size in said.items():
            path = Path(name)
            kept = path.stat().st_size if path.is_file() else 0
            if kept < size and self.store.status(path.parent.name) != FINISHED:
                self.findings.lost.append(f"{after}: {path.parent.name}: the journal has {kept} of {size} promised bytes")


def files_of(root: Path) -> set[str]:
    """Names below a results directory, and of folders."""
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def temporaries(root: Path) -> int:
    """Files that an interrupted write left."""
    return len(list(root.rglob(".*.tmp")))


def age_temporaries(root: Path) -> None:
    """Two hours pass for them."""
    for path in root.rglob(".*.tmp"):
        os.utime(path, (path.stat().st_mtime - 7200,) * 2)


def _notes(events: list[str], what: str) -> Iterator[tuple[str, int]]:
    """Of a trace, names with their numbers."""
    for line in events:
        if line.startswith(f"# {what} "):
            name, _, number = line.removeprefix(f"# {what} ").rpartition(" ")
            yield name, int(number)


def _key(answer: dict[str, Any]) -> Key:
    return answer["task"], answer["doc_id"]
