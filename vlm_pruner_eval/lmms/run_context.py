"""Surroundings of an evaluation: where answers are found and written, who is told of them, how it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vlm_pruner_eval.lmms.prompts import Prompt, Request
from vlm_pruner_eval.store.answers import Batch, BatchSize, Compute

Source = Callable[[str, Sequence[Request], Compute, BatchSize], Iterator[Batch]]


@dataclass
class RunContext:
    """What a model's caller decides of an evaluation.

    Attributes
    ----------
    source
        Finds the answers in place of the model, or lets it compute them: a sweep's answer log.
    on_prompt
        Called with every prompt on its way to the model, in order but maybe in another thread; a sweep keeps pictures with it.
    on_requests
        Called with the number of requests when lmms-eval asks them, and again when they begin anew with smaller batches.
    on_answers
        Called with the number of answers of every batch as they come, and whether they were computed now rather than found.
    keep_loaded
        True if the weights survive `clean`, which lmms-eval calls after every evaluation.
    refuses_failures
        True if failed samples end the evaluation; so it is when lmms-eval built the model.
    show_progress
        True if a progress bar is drawn.
    """

    source: Source | None = None
    on_prompt: Callable[[Prompt], None] | None = None
    on_requests: Callable[[int], None] | None = None
    on_answers: Callable[[int, bool], None] | None = None
    keep_loaded: bool = False
    refuses_failures: bool = False
    show_progress: bool = False
