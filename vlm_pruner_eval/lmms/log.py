"""What the wrapper remembers of every sample, and the numbers that it adds to lmms-eval's throughput table."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.lmms.prompts import Generation, Prompt, count_new


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
        Prefill of the whole batch that the sample was in (`batch_size` rows), not its share; None where it was shared with other methods.
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
        Content hashes of the document's images and videos, see `prompts.image_digest`; documents that share one are not
        independent.
    question
        The text of the prompt, at most 2000 characters of it.
    """

    task: str
    split: str
    doc_id: int
    answer: str
    error: str | None = None
    record: SampleRecord | None = None
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
        """The same without times and peak memory, which say nothing of a method where others did part of its work."""
        record = self.record and replace(self.record, selection_ms=None)
        return replace(self, record=record, prefill_ms=None, decode_ms=None, peak_bytes=None)

    def as_json(self) -> dict:
        """Plain types only."""
        return vars(self) | {"record": self.record and self.record.as_json()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Answer:
        """The inverse of `as_json`."""
        record = plain["record"] and SampleRecord.from_json(plain["record"])
        return cls(**dict(plain) | {"record": record, "images": tuple(plain["images"])})


@dataclass(frozen=True)
class Reading:
    """What one call of generate under pruning gave, its records checked.

    Attributes
    ----------
    output
        What ``model.generate`` returned.
    width
        Columns of the padded prompts.
    n_prompt
        Tokens of each prompt, without padding.
    records
        One per row.
    prefill_ms, decode_ms
        One per forward of the language model.
    peak_bytes
        See `Answer`.
    """

    output: Any
    width: int
    n_prompt: list[int]
    records: list[SampleRecord]
    prefill_ms: list[float]
    decode_ms: list[float]
    peak_bytes: int | None = None

    def answers(
        self, batch: Sequence[Prompt], options: Generation, tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int]
    ) -> list[Answer]:
        """The answer to every prompt of the batch that was read."""
        new_ids = self.output[:, self.width :]
        texts = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        return [
            Answer(
                *(prompt.request.task, prompt.request.split, prompt.request.doc_id, options.cut(texts[i])),
                record=self.records[i * options.n_beams],
                n_prompt_tokens=self.n_prompt[i],
                n_new_tokens=count_new(new_ids[i], eos_ids),
                images=prompt.digests,
                question=prompt.question,
                **self.of_batch(),
            )
            for i, prompt in enumerate(batch)
        ]

    def of_batch(self) -> dict[str, Any]:
        """What all answers of the batch share, by field of `Answer`."""
        return {
            "prefill_ms": sum(self.prefill_ms),
            "decode_ms": statistics.median(self.decode_ms) if self.decode_ms else None,
            "batch_size": len(self.n_prompt),
            "peak_bytes": self.peak_bytes,
        }


def pruning_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """Means of token counts, and medians of times where these were measured, over the samples with images; empty when there is none."""
    seen = [answer for answer in answers if answer.record is not None and answer.record.n_visual]
    if not seen:
        return {}
    counts = {
        "kept_tokens": statistics.fmean(answer.record.n_kept for answer in seen),
        "visual_tokens": statistics.fmean(answer.record.n_visual for answer in seen),
    }
    timed = [answer for answer in seen if answer.prefill_ms is not None]
    if not timed:
        return counts
    return counts | {
        "prefill_ms": statistics.median(answer.prefill_ms for answer in timed),
        "selection_ms": statistics.median(answer.record.selection_ms for answer in timed),
    }
