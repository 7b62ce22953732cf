"""Checks on either side of a generate call, and the tally of what failed: a run that did not prune must not look like one that did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PretrainedConfig

from vlm_pruner_eval.budget import parse_rate
from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.pruners import Pruner
from vlm_pruner_eval.store.answers import Answer

if TYPE_CHECKING:
    from vlm_pruner_eval.lmms.inputs import Prepared  # which needs lmms-eval

HOPELESS_AFTER = 16


def check_prompt_lengths(batch: Prepared, n_more: int, config: PretrainedConfig) -> None:
    """Refuse prompts longer than the model's positions: rotary embeddings would run on and answer nonsense.

    Parameters
    ----------
    n_more
        Tokens that must fit behind each prompt.
    config
        The Hugging Face configuration of the VLM.

    Raises
    ------
    ValueError
        Naming the sample, its tokens and the model's positions.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return
    for n_prompt, n_positions, sample_id in zip(batch.n_prompt, batch.n_positions, batch.sample_ids, strict=True):
        if n_positions + n_more > limit:
            raise ValueError(
                f"{sample_id}: got a prompt of {n_prompt + n_more} tokens (image tokens included), which takes {n_positions + n_more} "
                f"positions, but the model has {limit} positions; use a task with fewer images or shorter questions, a smaller "
                "max_frames_num, or a checkpoint with a longer context."
            )


def check_records(records: Sequence[SampleRecord], batch: Prepared, *, n_beams: int, pruners: Sequence[Pruner], n_layers: int) -> None:
    """Hold what the hook measured against the prompts as they were sent.

    Parameters
    ----------
    batch
        The same prompts once for each of `pruners`.

    Raises
    ------
    PruningError
        Rows without a record, visual tokens that were not seen, or a count that is not what was asked.
    """
    n_prompts = len(batch.sample_ids)
    if len(records) != n_prompts * n_beams:
        raise PruningError(
            f"The ledger holds {len(records)} records for {n_prompts} prompts in {n_beams} beam(s), expected "
            f"{n_prompts * n_beams}: one per row of one prefill; nothing proves that each prompt was pruned once."
        )
    for i, record in enumerate(records):
        prompt = i // n_beams
        pruner = pruners[prompt // (n_prompts // len(pruners))]
        _check_record(record, batch.sample_ids[prompt], batch.n_visual[prompt], batch.n_prompt[prompt], pruner, n_layers)


def _check_record(record: SampleRecord, sample_id: str, n_visual: int, n_prompt: int, pruner: Pruner, n_layers: int) -> None:
    stages = pruner.stages(n_layers)
    if record.n_visual != n_visual:
        raise PruningError(f"{sample_id}: {record.n_visual} visual tokens were seen by the hook, but the prompt holds {n_visual}.")
    if record.n_kept != record.n_asked and not pruner.decides_count():
        raise PruningError(f"{sample_id}: {record.n_kept} of {n_visual} visual tokens were kept, expected {record.n_asked}.")
    asked = pruner.keep_at(stages[-1], n_visual) if stages and n_visual else record.n_asked
    if abs(record.n_asked - asked) > _slack(record, pruner):
        raise PruningError(
            f"{sample_id}: {record.n_asked} of {n_visual} visual tokens were asked for, expected {asked} at rate "
            f"{pruner.pruning_rate} (images or tiles: {record.n_images})."
        )
    left = n_prompt - n_visual + record.n_kept
    if record.kv_lengths and record.kv_lengths[-1] != left:
        raise PruningError(f"{sample_id}: the last layer's cache holds {record.kv_lengths[-1]} tokens of the prompt, expected {left}.")


def _slack(record: SampleRecord, pruner: Pruner) -> float:
    """How far the tokens asked for may be from what the rate says of all of them.

    Each scope's count is rounded by less than one token; release behaviour and a method's own rule know no such bound.
    """
    if pruner.official_quirks or pruner.decides_count() or type(pruner).keep_at is not Pruner.keep_at:
        return math.inf
    if pruner.scope == "per_view":  # newline tokens have no budget
        return sum(views + tokens - rows * cols for tokens, rows, cols, views in record.layouts)
    return 0 if record.n_images == 1 else record.n_images


def no_op_sentence(answers: Sequence[Answer], pruner: Pruner, n_layers: int) -> str | None:
    """A sentence when a method that should remove tokens removed none in a whole run, else None."""
    seen = [answer.record for answer in answers if answer.record is not None and answer.record.n_visual]
    should = parse_rate(pruner.pruning_rate) != 0 if pruner.before_model else any(stage.share != 1 for stage in pruner.stages(n_layers))
    if not seen or not should or any(record.n_kept < (record.n_full or record.n_visual) for record in seen):
        return None
    return (
        f"none of the {len(seen)} samples with images lost a visual token at pruning rate {pruner.pruning_rate} ({pruner.name}), "
        f"so these would be the answers of the plain model; {seen[0].n_visual} tokens may be too few for this rate. "
        "Raise it, or use method=none."
    )


@dataclass
class Tally:
    """Samples of one call that are done, and how many of them failed."""

    total: int
    done: int = 0
    failed: int = 0
    first: Answer | None = None

    def add(self, answer: Answer) -> None:
        """Count one answer."""
        self.done += 1
        if answer.error is not None:
            self.failed += 1
            self.first = self.first or answer

    @property
    def is_hopeless(self) -> bool:
        """Tell if every one of the first 16 samples failed, so that the rest need not be tried."""
        return self.failed == self.done >= HOPELESS_AFTER

    def sentence(self) -> str:
        """How many failed, out of how many, and the first of them."""
        return (
            f"{self.failed} of {self.done} samples failed ({self.total} in the run), so no score is given. First: "
            f"{self.first.sample_id}: {self.first.error}"
        )
