"""Answers made of what generate gave, and the numbers that the wrapper adds to lmms-eval's throughput table."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.lmms.planning import Generation, count_new
from vlm_pruner_eval.lmms.prompts import Prompt
from vlm_pruner_eval.store.answers import Answer
from vlm_pruner_eval.store.kept import Kept


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
                record=Kept.of(self.records[i * options.n_beams]),
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


def end_ids(config: GenerationConfig) -> set[int]:
    """Return the tokens that end an answer."""
    ids = config.eos_token_id
    return set(ids) if isinstance(ids, (list, tuple)) else {ids}


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
