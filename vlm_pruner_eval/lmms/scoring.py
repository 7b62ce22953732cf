"""Requests for log-likelihoods, one prompt after the other: all continuations of a document are scored behind one prefill."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vlm_pruner_eval.lmms import prompts
from vlm_pruner_eval.lmms.ahead import Ahead, Job, Made, Step, Turn
from vlm_pruner_eval.lmms.inputs import Prepared
from vlm_pruner_eval.lmms.loglikelihood import PREFILL, Target, by_prompt, continuation_ids, score
from vlm_pruner_eval.lmms.prompts import Prompt
from vlm_pruner_eval.store.answers import Answer, Batch, Done


class Scorer:
    """Scores continuations with a loaded model, by its own method; prompts are made ahead as for generated answers."""

    def __init__(self, model: Any):
        self._model = model  # a PrunedModel, whose file imports this one

    def batches(self, targets: Sequence[Target], done: Done) -> Iterator[Batch]:
        """Targets with their answers, those in `done` left out."""
        left = (same_prompt for same_prompt in by_prompt(targets) if not done.has([target.request.index for target in same_prompt]))
        groups = iter(lambda: list(itertools.islice(left, prompts.WINDOW_BATCHES)), [])
        with Ahead(self._model.settings.workers) as ahead:
            yield from ahead.batches(((None, group) for group in groups), self._prompt_of, self._steps)

    def _prompt_of(self, targets: list[Target], in_turn: Turn | None = None) -> Prompt:
        """The prompt of all `targets`, with their texts: these too are up to the task's own code."""
        request, texts = targets[0].request, []

        def to_messages(document: Mapping[str, Any]) -> object:
            messages = request.to_messages(document)
            texts.extend(target.text(document) for target in targets)
            return messages

        prompt = self._model.prompt_of(dataclasses.replace(request, to_messages=to_messages), in_turn)
        return dataclasses.replace(prompt, continuations=texts)

    def _steps(self, _: None, made: Made) -> Iterator[Step]:
        model = self._model
        for same_prompt, found in [(targets, model.taken(targets[0].request, job)) for targets, job in made]:
            if isinstance(found, Answer):
                yield Step(functools.partial(list, [(target.request, target.failed(found)) for target in same_prompt]))
            else:
                prepared = Job(functools.partial(model.prepare, [found], model.pruner))
                yield Step(functools.partial(self._batch, same_prompt, found, prepared.take), prepared)

    def _batch(self, targets: Sequence[Target], prompt: Prompt, prepared: Callable[[], Prepared]) -> Batch:
        model = self._model
        try:
            with model.processing:
                tokens = [continuation_ids(model.tokenizer, prompt.text, text) for text in prompt.continuations]
            reading = model.read(prepared(), PREFILL, n_more=max(map(len, tokens)))
            found = zip(targets, prompt.continuations, score(model.model, model.hooked, reading, tokens), strict=True)
            answers = [target.answer(text, scored, reading, prompt.digests, prompt.question) for target, text, scored in found]
        except Exception as error:  # as for generated answers: it is recorded, and the run ends in failure
            answers = [target.failed(model.failed(target.request, error)) for target in targets]
        return list(zip((target.request for target in targets), answers, strict=True))
