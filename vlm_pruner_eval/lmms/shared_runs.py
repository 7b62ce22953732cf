"""Answers of several methods to the same requests, computed together: one batch at a time is read by all of them.

Images are decoded and preprocessed once for all, the vision tower and the layers before the first cuts run once (see `prefix`), and
methods that cut at the same layer are rows of one batch, which decode together. Answers and records are those of separate runs (in
half precision those of another batch size), but for the times, which would be false. What fails for one method
is tried again by itself, as it would have been run, and is recorded as that method's failure alone.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from loguru import logger

from vlm_pruner_eval.budget import Rate
from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.lmms.answer_checks import Tally
from vlm_pruner_eval.lmms.answering import is_out_of_memory
from vlm_pruner_eval.lmms.failures import FailureLog
from vlm_pruner_eval.lmms.inputs import Prepared
from vlm_pruner_eval.lmms.model import PrunedModel, Taker
from vlm_pruner_eval.lmms.planning import Generation, generation
from vlm_pruner_eval.lmms.prompts import Prompt, Request
from vlm_pruner_eval.lmms.run_context import Source
from vlm_pruner_eval.lmms.settings import build_pruner
from vlm_pruner_eval.prefix import SharedPrefix, first_cut, rows_together
from vlm_pruner_eval.pruners import Pruner
from vlm_pruner_eval.pruners.none import NoPruning
from vlm_pruner_eval.store.answers import Answer, AnswerLog, Batch, BatchSize, Compute, Done


@dataclass(frozen=True)
class Configuration:
    """Arguments of `PrunedModel.configure`."""

    method: str
    pruning_rate: Rate | None
    params: Mapping[str, object] = field(default_factory=dict)


Group = list[tuple[str, "_Run"]]
HALF_BELOW = 4  # bytes of a number: in fewer, sums of another batch size may answer otherwise


@dataclass
class _Run:
    """One configuration on its way through the requests; its answers lie in its log, as those of many runs would fill the memory."""

    method: str
    pruner: Pruner
    log: AnswerLog
    done: Done
    tally: Tally

    def add(self, call: str, batch: Batch, seconds: float) -> None:
        self.log.append(call, batch, seconds)
        for _, answer in batch:
            self.tally.add(answer)


class SharedRuns:
    """Computes the answers of all `configurations` when the first of them is asked for.

    ::

        shared = SharedRuns(model, {"a": Configuration("fastv", "2/3"), "b": Configuration("dart", "2/3")}, logs)
        for key, configuration in shared.configurations.items():
            model.configure(configuration.method, configuration.pruning_rate, **configuration.params)
            model.context.source = shared.source(key)
            model.generate_until(requests)        # the same requests every time

    All answers go into the runs' logs, and every run reads its own from there, so what is killed on the way goes on like any
    other run. Requests that ask for sampling are not shared: each run draws its own answers. Neither are requests for log-likelihoods.

    Parameters
    ----------
    model
        Loaded; its own method and answers stay as they are.
    logs
        By the keys of `configurations`.
    rows
        Most rows of a batch that several runs read in one call of `generate`: their number times that of the prompts. Where the memory
        does not suffice, it is halved. 1: each run makes its own calls.

    Attributes
    ----------
    flips
        In half precision, of each run that was rows of a batch with others: answers of its first batch (`n`), and how many are
        `different` from those that it gives alone.
    """

    def __init__(self, model: PrunedModel, configurations: Mapping[str, Configuration], logs: Mapping[str, AnswerLog], rows: int = 64):
        self.model, self.configurations, self.logs, self.rows = model, dict(configurations), logs, rows
        self._pruners = {key: build_pruner(c.method, c.pruning_rate, c.params) for key, c in self.configurations.items()}
        self.flips: dict[str, dict[str, int]] = {}
        self._computed: tuple[int, BatchSize] | None = None
        self._runs: dict[str, _Run] = {}

    def source(self, key: str) -> Source:
        """The answers of one configuration, in the form that `RunContext.source` takes."""
        return functools.partial(self._answers, key)

    def _answers(self, key: str, call: str, asked: Sequence[Request], compute: Compute, size: BatchSize) -> Iterator[Batch]:
        if call == "generate_until":
            sampled = self._sampled(asked)
            shared = [request for request in asked if request.index not in sampled]
            if shared and self._computed is None:
                self._compute(call, asked, shared, size)
                self._computed = _identity(asked), size
            if shared and self._computed != (_identity(asked), size):
                raise PruningError(
                    f"share_prefix: run {key!r} got {len(asked)} requests that are not those which were answered for all runs together, "
                    "expected the same ones; a task that asks something else every time needs share_prefix: false."
                )
        yield from self.logs[key](call, asked, compute, size)

    def _sampled(self, asked: Iterable[Request]) -> set[int]:
        """Indices of the requests whose answers are drawn at random."""
        draws: dict[str, bool] = {}
        found = set()
        for request in asked:
            name = json.dumps(request.options, sort_keys=True, default=str)
            if name not in draws:
                draws[name] = generation(request.options, self.model.defaults).kwargs["do_sample"]
            if draws[name]:
                found.add(request.index)
        return found

    # ---- computing
    def _compute(self, call: str, asked: Sequence[Request], shared: Sequence[Request], size: BatchSize) -> None:
        """Answer `shared` by all configurations that have not answered them yet."""
        bounds = {bound for log in self.logs.values() for bound in log.bounds(size)}
        indices = {request.index for request in shared}
        parts: list[list[Request]] = []
        for key, configuration in self.configurations.items():
            begun = self.logs[key].begin(call, asked, size, bounds=list(bounds))
            self._runs[key] = _Run(configuration.method, self._pruners[key], self.logs[key], begun.done, Tally(len(shared)))
            parts = begun.parts  # of all runs the same, as they have the same bounds
        everywhere = Done(
            set.intersection(*(run.done.indices for run in self._runs.values())),
            set.intersection(*(run.done.alone for run in self._runs.values())),
        )
        self._tell(len(everywhere.indices), is_new=False)
        clock = time.monotonic()
        asked_parts = [[request for request in part if request.index in indices] for part in parts]
        batches = (self.model.batches_of(part, everywhere, self._of_batch, NoPruning()) for part in asked_parts)
        for batch in itertools.chain.from_iterable(batches):
            now = time.monotonic()
            alive = self._alive([request for request, _ in batch])
            for key, run in alive:
                answers = [(request, found if isinstance(found, Answer) else found[key]) for request, found in batch]
                run.add(call, answers, (now - clock) / len(alive))
            clock = now
            self._tell(len(batch), is_new=True)
            if not self._alive():
                break
        for log in self.logs.values():
            log.close()  # each run reads its own answers when its turn comes: those of all would fill the memory

    def _tell(self, count: int, *, is_new: bool) -> None:
        """Show how far all runs are; afterwards, each run's own answers come all at once."""
        if self.model.context.on_answers is not None:
            self.model.context.on_answers(count, is_new)

    def _alive(self, batch: Sequence[Request] = ()) -> list[tuple[str, _Run]]:
        """Runs that go on and have not answered `batch`; one whose first samples all failed will be refused when it is asked for."""
        indices = [request.index for request in batch]
        return [(key, run) for key, run in self._runs.items() if not run.tally.is_hopeless and not (indices and run.done.has(indices))]

    def _of_batch(self, batch: list[Prompt], options: Generation, prepared: Taker) -> Iterator[tuple[Request, dict[str, Answer]]]:
        alive = self._alive([prompt.request for prompt in batch])
        same_tower = [item for item in alive if not (item[1].pruner.before_model or item[1].pruner.acts_in_tower)]
        found = self._together(batch, options, same_tower, prepared)
        for key, run in alive:
            if key not in found:
                with self.model.using(run.method, run.pruner):
                    found[key] = [answer for _, answer in self.model.answers_of_batch(batch, options)]
        for i, prompt in enumerate(batch):
            yield prompt.request, {key: answers[i].untimed() for key, answers in found.items()}

    def _together(
        self, batch: list[Prompt], options: Generation, runs: Sequence[tuple[str, _Run]], prepared: Taker
    ) -> dict[str, list[Answer]]:
        """The answers to a batch of the runs that read the same pixels, as far as nothing fails."""
        found: dict[str, list[Answer]] = {}
        if not runs:
            return found
        layers = len(self.model.model.model.language_model.layers)
        depths = {key: first_cut(run.pruner, layers) for key, run in runs}
        try:
            inputs = prepared()
        except Exception as error:  # whatever it is, every run meets it again by itself, and records it
            _warn(self.model.failures, batch, "all runs", error)
            return found
        with SharedPrefix(self.model.model, list(depths.values()), [run.pruner for _, run in runs]) as prefix:
            waiting = deque(self._groups(runs, layers, len(batch)))
            while waiting:
                group = waiting.popleft()
                try:
                    depth = depths[group[0][0]]
                    found |= self._answered(group, inputs, options, prefix.reading(depth, repeats=len(group)))
                except Exception as error:  # as above
                    if len(group) > 1:
                        waiting.extendleft(self._parts(group, error))
                    else:
                        _warn(self.model.failures, batch, group[0][0], error)
                    continue
                if len(group) > 1 and self.model.dtype.itemsize < HALF_BELOW:
                    for item in group:
                        self._count_flips(item, inputs, options, prefix.reading(depth), found[item[0]])
        return found

    def _groups(self, runs: Sequence[tuple[str, _Run]], layers: int, n_prompts: int) -> list[Group]:
        by_key = dict(runs)
        most = max(1, self.rows // n_prompts)
        pruners = {key: run.pruner for key, run in runs}
        return [[(key, by_key[key]) for key in group] for group in rows_together(pruners, layers, mrope=self.model.family.mrope, most=most)]

    def _answered(
        self, group: Group, inputs: Prepared, options: Generation, reading: AbstractContextManager[None]
    ) -> dict[str, list[Answer]]:
        """Answers of a group to a batch, from one call of `generate`."""
        with reading:
            if len(group) == 1:
                ((key, run),) = group
                with self.model.using(run.method, run.pruner):
                    return {key: self.model.answer(inputs, options)}
            answers = self.model.answer(inputs, options, [run.pruner for _, run in group])
        n = len(inputs.prompts)
        return {key: answers[i * n : (i + 1) * n] for i, (key, _) in enumerate(group)}

    def _count_flips(
        self, item: tuple[str, _Run], inputs: Prepared, options: Generation, reading: AbstractContextManager[None], found: list[Answer]
    ) -> None:
        """Compare a run's first answers as rows of a batch of several with its answers alone: in half precision some may differ."""
        key = item[0]
        if key in self.flips:
            return
        alone = self._answered([item], inputs, options, reading)[key]
        different = sum(one.answer != other.answer for one, other in zip(alone, found, strict=True))
        self.flips[key] = {"n": len(found), "different": different}

    def _parts(self, group: Group, error: Exception) -> list[Group]:
        """A group that failed, in smaller ones: halves if the memory did not suffice, else each run by itself."""
        if not is_out_of_memory(error):
            return [[item] for item in group]
        half = (len(group) + 1) // 2
        self.rows = max(1, self.rows // 2)
        logger.warning(f"{len(group)} runs together do not fit into the memory ({error}); they go on in groups of {half}.")
        return [group[:half], group[half:]]


def _identity(asked: Iterable[Request]) -> int:
    return hash(tuple((request.index, request.digest) for request in asked))


def _warn(failures: FailureLog, batch: Sequence[Prompt], who: str, error: Exception) -> None:
    if failures.is_new(error):  # told with its sentence when it fails again
        logger.warning(f"A shared batch of {len(batch)} failed for {who} ({type(error).__name__}); it is tried again separately.")
