"""Base class of evaluated models: request order, sample records, failures, batch-size backoff, resume."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import NoReturn

import torch
from accelerate.utils.memory import should_reduce_batch_size
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from vlm_pruner_eval.errors import OutOfMemoryError, PruningError
from vlm_pruner_eval.lmms.answer_checks import Tally
from vlm_pruner_eval.lmms.failures import FailureLog
from vlm_pruner_eval.lmms.log import pruning_metrics
from vlm_pruner_eval.lmms.loglikelihood import Target
from vlm_pruner_eval.lmms.prompts import Request, requests_of
from vlm_pruner_eval.lmms.run_context import RunContext
from vlm_pruner_eval.redact import of_error
from vlm_pruner_eval.store.answers import Answer, Batch, BatchSize, Compute, Done


class Answering(lmms):
    """A model of lmms-eval whose answers are recorded one by one; what makes the answers is up to the class below.

    Attributes
    ----------
    answers : list of Answer
        Every sample answered since the method was last configured, in the order of the requests.
    context
        See `RunContext`.
    failures
        The log of failed samples.
    may_shrink
        Whether a run may begin anew with half the batch size when memory does not suffice.
    """

    may_shrink = True

    def __init__(self) -> None:
        super().__init__()
        self.context = RunContext()
        self.failures = FailureLog()
        self.forget_answers()

    def forget_answers(self) -> None:
        """Before another method or another run."""
        self.answers: list[Answer] = []  # not cleared: the former list may be in use
        self._reduced: BatchSize | None = None
        self._computed: Batch | None = None  # the latest

    # ---- what a class below says
    @property
    def full_batch_size(self) -> int:
        """Prompts per batch, as asked."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Of the progress bar."""
        return type(self).__name__

    def batches_of(self, asked: Sequence[Request], done: Done) -> Iterator[Batch]:
        """Answers to all requests but those in `done`, batch by batch."""
        raise NotImplementedError

    def scored_batches_of(self, targets: Sequence[Target], done: Done) -> Iterator[Batch]:
        """The same of continuations to be scored."""
        raise NotImplementedError

    def no_op_sentence(self, answers: Sequence[Answer]) -> str | None:
        """Why these answers are not those of a method that pruned; None where they are."""
        raise NotImplementedError

    # ---- batch size
    @property
    def batch_size(self) -> int:
        """Prompts per batch; less than asked for where the memory did not suffice."""
        return self.working_size.size

    @property
    def working_size(self) -> BatchSize:
        """The batch size, and those that were tried before it."""
        return self._reduced or BatchSize(self.full_batch_size)

    def resume_at(self, size: BatchSize | None) -> None:
        """Go on with the batch size that an earlier process was left with."""
        self._reduced = size if size is not None and size.exhausted else None

    # ---- lmms-eval's calls
    def clean(self) -> None:
        """Free the weights, as lmms-eval asks after every evaluation, unless `context.keep_loaded`."""
        if not self.context.keep_loaded:
            super().clean()

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Score the continuation of every request behind its pruned prompt, in order; failures are as in `generate_until`.

        Returns
        -------
        list of (value, is_greedy)
            What the metrics of the request's task want, see `Target.result`; and whether greedy decoding would have written it.
        """
        targets = [Target.of(index, instance) for index, instance in enumerate(requests)]
        answers = self._answers("loglikelihood", [target.request for target in targets], functools.partial(self._scored, targets))
        return [target.result(answer) for target, answer in zip(targets, answers, strict=True)]

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer every request, in order.

        A sample that fails is answered with "" and recorded with its error, and the run goes on. Where a batch does not fit into
        the memory, all answers begin anew with half the batch size, unless `may_shrink` is False.

        Raises
        ------
        PruningError
            The first 16 samples all failed, nothing was pruned though the method should have pruned, or the memory did not suffice;
            with `context.refuses_failures` also at the end of a run in which any sample failed.
        """
        answers = self._answers("generate_until", requests_of(requests), self.batches_of)
        return [GenerationResult(answer.answer, TokenCounts(answer.n_prompt_tokens, answer.n_new_tokens)) for answer in answers]

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        """Not offered: an image of a later round would meet a pruned cache."""
        raise NotImplementedError(f"{self.title} answers in one round; choose tasks with output_type generate_until.")

    # ---- collecting
    def _scored(self, targets: Sequence[Target], asked: Sequence[Request], done: Done) -> Iterator[Batch]:
        return self.scored_batches_of([targets[request.index] for request in asked], done)

    def _answers(self, call: str, asked: Sequence[Request], compute: Compute) -> list[Answer]:
        before = list(self.answers)
        compute = functools.partial(self._noted, compute)
        while True:
            if self.context.on_requests is not None:
                self.context.on_requests(len(asked))
            found = compute(asked, Done()) if self.context.source is None else self.context.source(call, asked, compute, self.working_size)
            try:
                with closing(found):  # what works ahead of a run must end with it, whatever ended it
                    return self._collect(asked, found)
            except OutOfMemoryError as error:
                sentence = str(error)
            self.answers = before  # outside the except clause, which would keep the failed batch's tensors alive
            self._shrink(sentence)

    def _noted(self, compute: Compute, asked: Sequence[Request], done: Done) -> Iterator[Batch]:
        """Yield the batches of `compute`; tells its batches from those that a source found."""
        for self._computed in compute(asked, done):
            yield self._computed

    def _shrink(self, sentence: str) -> None:
        if not self.may_shrink:
            raise PruningError(f"{sentence} Smaller batches can change answers here, so none were tried; set a smaller batch_size.")
        self._reduced = self.working_size.halved()
        logger.warning(f"{sentence} The run begins anew with batches of {self.batch_size}.")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _collect(self, asked: Sequence[Request], found: Iterable[Batch]) -> list[Answer]:
        """The answers in the order of the requests, after recording them, counting failures, and refusing a run that did not prune."""
        answers: list[Answer | None] = [None] * len(asked)
        tally, started = Tally(len(asked)), time.perf_counter()
        try:
            with tqdm(total=len(asked), disable=not self.context.show_progress or self.rank != 0, desc=self.title) as bar:
                for batch in found:
                    self._take(batch, answers, tally)
                    bar.update(len(batch))
        finally:
            self.failures.summarise()
            done = [answer for request, answer in zip(asked, answers, strict=True) if answer is not None and not request.is_padding]
            self.answers = [*self.answers, *done]
        self._log(done, time.perf_counter() - started)
        if tally.failed and self.context.refuses_failures:
            raise PruningError(tally.sentence())
        if sentence := self.no_op_sentence(done):
            raise PruningError(sentence)
        return answers

    def _take(self, batch: Batch, answers: list[Answer | None], tally: Tally) -> None:
        for request, answer in batch:
            answers[request.index] = answer
            tally.add(answer)
            if tally.is_hopeless:
                raise PruningError(tally.sentence())
        if self.context.on_answers is not None:
            self.context.on_answers(len(batch), batch is self._computed)

    def failed(self, request: Request, error: Exception) -> Answer:
        """Log a failure, see `failures`, and return the answer that records it."""
        self.failures.tell(request.sample_id, error)
        return Answer(request.task, request.split, request.doc_id, "", error=of_error(error))

    def failed_alone(self, request: Request, error: Exception) -> Batch:
        """Return a batch of the one request that failed."""
        return [(request, self.failed(request, error))]

    def _log(self, answers: list[Answer], elapsed_s: float) -> None:
        """Hand token counts and times to lmms-eval, which prints them below its table of scores."""
        n_tokens = sum(answer.n_new_tokens or 0 for answer in answers)
        log_metrics(elapsed_s, n_tokens, n_tokens / elapsed_s if elapsed_s > 0 else 0.0, additional_metrics=pruning_metrics(answers))


def is_out_of_memory(error: Exception) -> bool:
    """Tell if smaller batches may help."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or should_reduce_batch_size(error)
