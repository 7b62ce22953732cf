"""An answer as it is recorded, and what batches of answers are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from vlm_pruner_eval.store.kept import Kept


@dataclass(frozen=True)
class Answer:
    """One request: what the model answered, or why it could not.

    Attributes
    ----------
    task, split, doc_id
        Where the document is: ``task_dict[task][split][doc_id]``.
    answer
        The text, cut at the task's stop strings; empty when the sample failed.
    error
        Why the sample failed, as a sentence; None when it did not.
    record
        What was really kept; None when the sample failed.
    prefill_ms
        Prefill of the whole batch that the sample was in (`batch_size` rows), not its share; None if it was shared with other methods.
    decode_ms
        Median of that batch's decoding steps; None when the answer took no step, or like `prefill_ms`.
    n_prompt_tokens, n_new_tokens
        Of this sample alone, without padding; image tokens are counted in the prompt.
        Of a scored continuation: its tokens, though none was generated.
    batch_size
        Rows of the batch; a sample that was tried again alone has 1.
    choice, loglikelihood, is_greedy
        Of a continuation that was scored (`answer` holds it), else None: which of its document's, from 0; the sum of its
        tokens' log-probabilities; whether greedy decoding would have written it.
    peak_bytes
        The most that the GPU held while the sample's batch was answered, weights included; None on a CPU, or like `prefill_ms`.
    images
        Content hashes of the document's images and videos; documents that share one are not independent.
    question
        The text of the prompt, at most 1,000 characters of it.
    """

    task: str
    split: str
    doc_id: int
    answer: str
    error: str | None = None
    record: Kept | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    n_prompt_tokens: int | None = None
    n_new_tokens: int | None = None
    batch_size: int | None = None
    choice: int | None = None
    loglikelihood: float | None = None
    is_greedy: bool | None = None
    peak_bytes: int | None = None
    images: tuple[str, ...] = ()
    question: str = ""

    @property
    def sample_id(self) -> str:
        """``task/split/doc_id``."""
        return f"{self.task}/{self.split}/{self.doc_id}"

    def untimed(self) -> Answer:
        """Return the same without times and peak memory, which say nothing of a method if others did part of its work."""
        record = self.record and replace(self.record, selection_ms=None)
        return replace(self, record=record, prefill_ms=None, decode_ms=None, peak_bytes=None)

    def as_json(self) -> dict[str, Any]:
        """Plain types; what has its default is left out."""
        held = {name: value for name, value in vars(self).items() if (value is not None and value not in ((), "")) or name == "answer"}
        return held | ({} if self.record is None else {"record": self.record.as_json()})

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> Answer:
        """Read what `as_json` made; other names are not looked at."""
        given = {name: held[name] for name in _FIELDS if name in held}
        if "record" in given:
            given["record"] = Kept.from_json(given["record"])
        return cls(**given | {"images": tuple(given.get("images", ()))})


_FIELDS = tuple(one.name for one in fields(Answer))


class Asked(Protocol):
    """A request, as far as the log looks at it; `digest` tells it from any other question about its document."""

    index: int
    task: str
    doc_id: int
    is_padding: bool

    @property
    def digest(self) -> str:
        """Text that differs for another question."""


Batch = list[tuple[Any, Answer]]  # requests with their answers


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

    def has(self, batch: Sequence[int]) -> bool:
        """Tell if a whole batch is answered."""
        return self.indices.issuperset(batch)


Compute = Callable[[Sequence[Any], Done], Iterator[Batch]]


@dataclass(frozen=True)
class BatchSize:
    """Prompts per generate call, and the larger sizes for which the memory did not suffice."""

    size: int
    exhausted: tuple[int, ...] = ()

    def halved(self) -> BatchSize:
        """Half of it."""
        return BatchSize(self.size // 2, (*self.exhausted, self.size))
