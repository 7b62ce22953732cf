"""What is left to answer of a run, and whose share it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlm_pruner_eval.errors import ConfigError

if TYPE_CHECKING:
    from vlm_pruner_eval.lmms.prompts import Request

Batch = list[tuple["Request", Any]]  # requests with what was found for them: an Answer, or answers of several runs


@dataclass
class Done:
    """Requests that need no answer, by index.

    Attributes
    ----------
    alone
        Those that were answered in no batch with others, among them requests that could not be made a prompt. They are not
        planned again: without them, all other batches are as before.
    """

    indices: set[int] = field(default_factory=set)
    alone: set[int] = field(default_factory=set)

    def add(self, batch: Sequence[int]) -> None:
        """A batch is answered."""
        self.indices.update(batch)
        if len(batch) == 1:
            self.alone.update(batch)

    def has(self, batch: Sequence[int]) -> bool:
        """Whether a whole batch is answered."""
        return self.indices.issuperset(batch)


@dataclass(frozen=True)
class Part:
    """One of `count` shares of something, `index` from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str, option: str = "--shard") -> Part:
        """Read "2/4", the second of four.

        Raises
        ------
        ConfigError
            Something else.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isascii() and index.isdigit() and count.isascii() and count.isdigit() and 1 <= int(index) <= int(count)):
            raise ConfigError(f"{option}: got {text!r}, expected a share such as 2/4, the second of four.")
        return cls(int(index) - 1, int(count))

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    @property
    def suffix(self) -> str:
        """Of file names; empty for the whole."""
        return "" if self.count == 1 else f".{self.index + 1}of{self.count}"

    def has(self, number: int) -> bool:
        """Whether the thing of this number belongs to this part."""
        return number % self.count == self.index

    def all(self) -> list[Part]:
        """Every part."""
        return [Part(index, self.count) for index in range(self.count)]


WHOLE = Part()


class ShareDone(Exception):
    """A process that answers one share of a run, and nothing else, has done so."""


@dataclass(frozen=True)
class BatchSize:
    """Prompts per generate call, and the larger sizes for which the memory did not suffice."""

    size: int
    exhausted: tuple[int, ...] = ()

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> BatchSize:
        """From the form of `as_json`."""
        return cls(entry["batch_size"], tuple(entry["exhausted"]))

    def halved(self) -> BatchSize:
        """Half of it."""
        return BatchSize(self.size // 2, (*self.exhausted, self.size))

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        return {"batch_size": self.size, "exhausted": list(self.exhausted)}


Compute = Callable[[Done, Part], Iterator[Batch]]
