"""Answers of several methods to the same requests, computed together: one batch at a time is read by all of them.

Images are decoded and preprocessed once for all, and the vision tower and the layers before the first cuts run once (see
`prefix`). Answers and records are those of separate runs, but for the times, which would be false. What fails for one method
is tried again by itself, as it would have been run, and is recorded as that method's failure alone.
"""

from __future__ import annotations

import functools
import json
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from loguru import logger

from vlm_pruner_eval.budget import Rate
from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.lmms import prompts
from vlm_pruner_eval.lmms.checks import Tally
from vlm_pruner_eval.lmms.log import Answer
from vlm_pruner_eval.lmms.prompts import Generation, Prompt, Request
from vlm_pruner_eval.lmms.settings import build_pruner
from vlm_pruner_eval.lmms.wrapper import PrunedModel
from vlm_pruner_eval.prefix import SharedPrefix, first_cut
from vlm_pruner_eval.pruners import Pruner


@dataclass(frozen=True)
class Configuration:
    """What `PrunedModel.configure` is called with."""

    method: str
    pruning_rate: Rate | None
    params: Mapping[str, object] = field(default_factory=dict)


@dataclass
class _Run:
    """One configuration on its way through the requests; its answers lie in a file, as those of many runs would fill the memory."""

    method: str
    pruner: Pruner
    file: IO[bytes]
    tally: Tally

    def add(self, index: int, answer: Answer) -> None:
        pickle.dump((index, answer), self.file)
        self.tally.add(answer)

    def answers(self) -> Iterator[tuple[int, Answer]]:
        self.file.seek(0)
        for _ in range(self.tally.done):
            yield pickle.load(self.file)


class SharedRuns:
    """Computes the answers of all `configurations` when the first of them is asked for; use as a context manager.

    ::

        with SharedRuns(model, {"a": Configuration("fastv", "2/3"), "b": Configuration("dart", "2/3")}) as shared:
            for key, configuration in shared.configurations.items():
                model.configure(configuration.method, configuration.pruning_rate, **configuration.params)
                model.source = shared.source(key)
                model.generate_until(requests)        # the same requests every time

    Requests that ask for sampling are not shared: each run draws its own answers. Neither are requests for log-likelihoods.

    Parameters
    ----------
    model
        Loaded; its own method and answers stay as they are.
    """

    def __init__(self, model: PrunedModel, configurations: Mapping[str, Configuration]):
        self.model, self.configurations = model, dict(configurations)
        self._pruners = {key: build_pruner(c.method, c.pruning_rate, c.params) for key, c in self.configurations.items()}
        self._asked: list[tuple] | None = None
        self._runs: dict[str, _Run] = {}
        self.replayed: set[str] = set()

    def __enter__(self) -> SharedRuns:
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of the answers, and let the model answer by itself again."""
        self._forget()
        self.model.source = None

    def _forget(self) -> None:
        for run in self._runs.values():
            run.file.close()
        self._runs, self._asked = {}, None

    def source(self, key: str) -> Callable[[list[Request]], Iterable[tuple[Request, Answer]]]:
        """The answers of one configuration, in the form that `PrunedModel.source` takes."""
        return functools.partial(self._answers, key)

    def _answers(self, key: str, asked: list[Request]) -> Iterator[tuple[Request, Answer]]:
        sampled = self._sampled(asked)
        shared = [request for request in asked if request.index not in sampled]
        if self._asked is None and shared:
            self._compute(shared)
        if shared and self._asked != [_identity(request) for request in shared]:
            raise PruningError(
                f"share_prefix: run {key!r} got {len(shared)} requests that are not those which were answered for all runs together "
                f"({len(self._asked)}), expected the same ones; a task that asks something else every time needs share_prefix: false."
            )
        if shared:
            self.replayed.add(key)
            of_index = {request.index: request for request in shared}
            for index, answer in self._runs[key].answers():
                yield of_index[index], answer
        if sampled:
            yield from self.model.answers_of([request for request in asked if request.index in sampled])

    def _sampled(self, asked: Iterable[Request]) -> set[int]:
        """Indices of the requests whose answers are drawn at random."""
        draws: dict[str, bool] = {}
        found = set()
        for request in asked:
            name = json.dumps(request.options, sort_keys=True, default=str)
            if name not in draws:
                draws[name] = prompts.generation(request.options, self.model.defaults).kwargs["do_sample"]
            if draws[name]:
                found.add(request.index)
        return found

    # ---- computing
    def _compute(self, asked: list[Request]) -> None:
        """Answer all requests by all configurations; what stops half way leaves nothing behind."""
        try:
            for key, configuration in self.configurations.items():
                file = tempfile.TemporaryFile()  # noqa: SIM115  # closed by _forget
                self._runs[key] = _Run(configuration.method, self._pruners[key], file, Tally(len(asked)))
            for request, found in self.model.answers_of(asked, self._of_batch):
                if not self._alive():
                    break
                for key, run in self._alive():
                    run.add(request.index, found if isinstance(found, Answer) else found[key])
        except BaseException:
            self._forget()
            raise
        self._asked = [_identity(request) for request in asked]

    def _alive(self) -> list[tuple[str, _Run]]:
        """Runs that go on: one whose first samples all failed will be refused when its answers are asked for."""
        return [(key, run) for key, run in self._runs.items() if not run.tally.is_hopeless]

    def _of_batch(self, batch: list[Prompt], options: Generation) -> Iterator[tuple[Request, dict[str, Answer]]]:
        alive = self._alive()
        found = self._together(batch, options, [run for run in alive if not run[1].pruner.before_model])
        for key, run in alive:
            if key not in found:
                with self.model.using(run.method, run.pruner):
                    found[key] = [answer for _, answer in self.model.answers_of_batch(batch, options)]
        for i, prompt in enumerate(batch):
            yield prompt.request, {key: answers[i].untimed() for key, answers in found.items()}

    def _together(self, batch: list[Prompt], options: Generation, runs: Sequence[tuple[str, _Run]]) -> dict[str, list[Answer]]:
        """The answers to a batch of the runs that read the same pixels, as far as nothing fails."""
        found: dict[str, list[Answer]] = {}
        if not runs:
            return found
        layers = len(self.model.model.model.language_model.layers)
        depths = {key: first_cut(run.pruner, layers) for key, run in runs}
        try:
            with self.model.using(runs[0][1].method, runs[0][1].pruner):  # one that leaves images as they are, like all of `runs`
                prepared = self.model.prepare(batch)
        except Exception as error:  # whatever it is, every run meets it again by itself, and records it
            _warn(batch, "all runs", error)
            return found
        with SharedPrefix(self.model.model, list(depths.values())) as prefix:
            for key, run in sorted(runs, key=lambda item: -depths[item[0]]):
                try:
                    with self.model.using(run.method, run.pruner), prefix.reading(depths[key]):
                        found[key] = self.model.answer(prepared, options)
                except Exception as error:  # as above
                    _warn(batch, key, error)
        return found


def _warn(batch: Sequence[Prompt], who: str, error: Exception) -> None:
    logger.warning(f"A shared batch of {len(batch)} failed for {who} ({type(error).__name__}: {error}); it is tried again separately.")


def _identity(request: Request) -> tuple:
    """What tells requests of two evaluations apart."""
    options = json.dumps(request.options, sort_keys=True, default=str)
    return request.index, request.task, request.split, request.doc_id, options, request.length, request.is_padding
