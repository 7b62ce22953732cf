"""The records of a sweep as typed models: each is written and read by the same class, and unknown fields are refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.redact import short, spelled_out
from vlm_pruner_eval.store.summaries import Failure, Memory, Model, Provenance, TaskScore, Times, Tokens

SCHEMA: Final = 3  # the form of the files; raised when a field changes
FINISHED, FAILED = "finished", "failed"

_MODEL = ("id", "pretrained", "revision", "dtype", "protocol", "attn_implementation", "batch_size")
_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")
Record = TypeVar("Record", bound="Model")
Rate = str | float | None


def _folder_name(text: str) -> str:
    """Refuse a name that could lead elsewhere: names of runs become folders and pictures, and the file may be someone else's."""
    if not _FOLDER_NAME.fullmatch(text):
        raise ValueError(f"got {short(text)}, expected the name of a folder: letters, digits, '.', '_' and '-'")
    return text


def _plain_text(text: str) -> str:
    if spelled_out(text) != text:
        raise ValueError(f"got {short(text)}, expected text without control characters")
    return text


def _sweep_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Refuse a sweep file's content that lacks what a report reads of it."""
    model = config.get("model")
    missing = [f"model.{name}" for name in _MODEL if not isinstance(model, dict) or name not in model]
    missing += [name for name in ("limit", "seed") if name not in config]
    if missing or not isinstance(config.get("tasks"), list):
        raise ValueError(f"lacks {', '.join(missing) or 'a list of tasks'}")
    return config


FolderName = Annotated[str, AfterValidator(_folder_name)]
PlainText = Annotated[str, AfterValidator(_plain_text)]
SweepSettings = Annotated[dict[str, Any], AfterValidator(_sweep_settings)]


# ---- files
class UnitRecord(Model):
    """record.json: one benchmark of one run, complete.

    Attributes
    ----------
    limit
        Documents of each task that it covers; None: all.
    status
        "finished", or "failed" with a `problem` in a sentence and perhaps a `traceback`.
    unscored
        Sentences about tasks whose aggregation failed though all was answered; the other scores count.
    scores
        By benchmark: the entry of the sweep file, or each of its tasks if that is a group of several benchmarks.
    documents
        By task, a digest of the content of its documents; `splits`: the split that they come from.
    kept_digest
        SHA-256 over the kept sets of all documents.
    adapted
        How the method is adapted to the model, with stand-ins for what it was published with; None if it is as published.
    """

    schema_: Literal[3] = Field(default=SCHEMA, alias="schema")
    task: str
    limit: int | None
    status: Literal["finished", "failed"]
    problem: str | None = None
    traceback: str | None = None
    unscored: list[str] = Field(default_factory=list)
    scores: dict[str, TaskScore] = Field(default_factory=dict)
    documents: dict[str, str] = Field(default_factory=dict)
    splits: dict[str, str] = Field(default_factory=dict)
    tokens: Tokens = Tokens()
    times: Times = Times()
    memory: Memory = Memory()
    shared_prefix: bool = False
    batch_size: int | None = None
    exhausted: list[int] = Field(default_factory=list)
    kept_digest: str | None = None
    adapted: str | None = None
    n_answers: int = 0
    failures: list[Failure] = Field(default_factory=list)
    provenance: Provenance

    @property
    def is_usable(self) -> bool:
        """True if its scores may be shown: finished, or failed for tasks that could not be scored only."""
        return self.status == FINISHED or bool(self.unscored)


class RunLine(Model):
    """One run of the grid, as the report lists it.

    Attributes
    ----------
    parameters, changed
        Every parameter of the method, and those that differ from its defaults.
    asked_rate
        The sweep file's rate under which tables list the run: `pruning_rate`, but for iso-compute rows.
    iso_layer
        Of an iso-compute row: the layer of the methods that it matches in compute.
    """

    key: FolderName
    run_id: FolderName
    label: PlainText
    method: str
    pruning_rate: Rate
    seed: int | None
    changed: dict[str, Any]
    asked_rate: Rate
    iso_layer: int | None
    parameters: dict[str, Any]


class RunHead(Model):
    """run.json: the resolved configuration of a run, without tasks and limit."""

    schema_: Literal[3] = Field(default=SCHEMA, alias="schema")
    run: RunLine
    config: dict[str, Any]


class Grid(Model):
    """sweep.json: the runs of a sweep, and the folder of every entry of its `tasks`."""

    schema_: Literal[3] = Field(default=SCHEMA, alias="schema")
    name: FolderName
    config: SweepSettings
    runs: list[RunLine]
    units: dict[str, FolderName]


class RunRecord(Model):
    """A run as it stands on disk: its line of the grid, its configuration, and the records of its units by task."""

    line: RunLine
    config: dict[str, Any]
    units: dict[str, UnitRecord]
    expected: int  # units of the sweep

    @property
    def is_complete(self) -> bool:
        """True if every unit has a record."""
        return len(self.units) == self.expected

    @property
    def status(self) -> str | None:
        """State: "finished" or "failed" of a complete run, "failed" of one with a failed unit, else None."""
        if any(unit.status == FAILED for unit in self.units.values()):
            return FAILED
        return FINISHED if self.is_complete else None

    @property
    def is_usable(self) -> bool:
        """True if there are scores, and none of the units failed as a whole."""
        return bool(self.units) and self.is_complete and all(unit.is_usable for unit in self.units.values())

    @property
    def scores(self) -> dict[str, TaskScore]:
        """Scores by benchmark."""
        return {name: score for unit in self.units.values() for name, score in unit.scores.items()}

    @property
    def documents(self) -> dict[str, str]:
        """Digests of documents by task."""
        return {task: digest for unit in self.units.values() for task, digest in unit.documents.items()}

    @property
    def splits(self) -> dict[str, str]:
        """Splits by task."""
        return {task: split for unit in self.units.values() for task, split in unit.splits.items()}

    @property
    def problem(self) -> str | None:
        """Why units failed, in sentences; None if none did."""
        return " ".join(unit.problem for unit in self.units.values() if unit.problem) or None

    @property
    def unscored(self) -> list[str]:
        """See `UnitRecord.unscored`."""
        return [sentence for unit in self.units.values() for sentence in unit.unscored]

    @property
    def failures(self) -> list[Failure]:
        """Samples that failed."""
        return [failure for unit in self.units.values() for failure in unit.failures]

    @property
    def tokens(self) -> Tokens:
        """Of all units."""
        return Tokens.merged([unit.tokens for unit in self.units.values()])

    @property
    def times(self) -> Times:
        """Of all units."""
        return Times.merged([unit.times for unit in self.units.values()])

    @property
    def memory(self) -> Memory:
        """Of all units."""
        return Memory.merged([unit.memory for unit in self.units.values()])

    @property
    def shared_prefix(self) -> bool:
        """True if any unit shared work with other runs."""
        return any(unit.shared_prefix for unit in self.units.values())

    @property
    def adapted(self) -> str | None:
        """How the method is adapted to the model."""
        return next((unit.adapted for unit in self.units.values() if unit.adapted), None)

    @property
    def n_answers(self) -> int:
        """Answers of all units."""
        return sum(unit.n_answers for unit in self.units.values())

    @property
    def provenance(self) -> Provenance:
        """Of the unit that was recorded last."""
        return max((unit.provenance for unit in self.units.values()), key=lambda found: found.time)

    @property
    def processors(self) -> list[str]:
        """Processors that units were made on."""
        return sorted({unit.provenance.processor for unit in self.units.values()})


# ---- text
def to_json(value: object, *, indent: int | None = 1) -> str:
    """JSON text with Unicode kept; NaN and infinity become null, numpy numbers plain ones, other objects their text."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def plain(value: object) -> Any:
    """Return what JSON can hold of a value."""
    if isinstance(value, BaseModel):
        value = value.model_dump(by_alias=True)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(item) for item in value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy and torch scalars
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def read_model(kind: type[Record], path: Path, advice: str) -> Record:
    """Read a file as a record.

    Raises
    ------
    FileNotFoundError
        There is no file.
    ConfigError
        It is no JSON, of another version of this package, or lacks a field: with the first fault and `advice`.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(str(error)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: can't be read ({error}); {advice}") from error
    found = raw.get("schema") if isinstance(raw, dict) else None
    if found != SCHEMA:
        told = "no schema number" if found is None else f"schema {short(found)}"
        raise ConfigError(f"{path}: got {told}, expected {SCHEMA}: the file is of another version of this package; {advice}")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {fault(error)}; {advice}") from error


def fault(error: ValidationError) -> str:
    """Return the first fault that was found, with its place."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return (f"{place}: " if place else "") + first["msg"].removeprefix("Value error, ")
