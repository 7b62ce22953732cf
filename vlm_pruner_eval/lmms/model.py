"""The model that lmms-eval evaluates: one class for all families, used by its command line and by library code alike.

It does not build on lmms-eval's stock wrappers, which answer "" when generate fails and look documents of a batch up in
the first one's task.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from loguru import logger
from transformers import BatchFeature

from vlm_pruner_eval import versions
from vlm_pruner_eval.budget import Rate
from vlm_pruner_eval.cost import DecoderShape
from vlm_pruner_eval.durable import is_disk_full
from vlm_pruner_eval.errors import OutOfMemoryError
from vlm_pruner_eval.hf_compat import count_positions, has_multidimensional_positions
from vlm_pruner_eval.hook import prune
from vlm_pruner_eval.lmms import planning, settings
from vlm_pruner_eval.lmms.answer_checks import check_prompt_lengths, check_records, no_op_sentence
from vlm_pruner_eval.lmms.answering import Answering, is_out_of_memory
from vlm_pruner_eval.lmms.checkpoint import load_checkpoint
from vlm_pruner_eval.lmms.device import pick_device
from vlm_pruner_eval.lmms.downsampling import as_planned, hooked, sized
from vlm_pruner_eval.lmms.inputs import Prepared, bound_pixels, build_inputs, move_inputs
from vlm_pruner_eval.lmms.log import Reading, end_ids
from vlm_pruner_eval.lmms.loglikelihood import PREFILL, Target, by_prompt, continuation_ids, request_of, score
from vlm_pruner_eval.lmms.planning import WINDOW_BATCHES, Defaults, Generation
from vlm_pruner_eval.lmms.prefetch import Attempt, Prefetch, default_workers
from vlm_pruner_eval.lmms.prompts import Prompt, PromptMaker, Request
from vlm_pruner_eval.lmms.run_context import RunContext
from vlm_pruner_eval.prefix import repeated
from vlm_pruner_eval.pruners import Pruner
from vlm_pruner_eval.store.answers import Answer, Batch, Done
from vlm_pruner_eval.timing import time_forwards
from vlm_pruner_eval.vision_probe import adaptation
from vlm_pruner_eval.vlms import Family, family_of

PLAIN = (bool, int, float, str, type(None))
Taker = Callable[[], Prepared]
OfBatch = Callable[[list[Prompt], Generation, Taker], Iterable[tuple[Request, Any]]]
Step = Callable[[], Iterable[tuple[Request, Any]]]
Window = tuple[Generation, list[Request]]
Made = tuple[Request, Attempt[Prompt]]


class PrunedModel(Answering):
    """A VLM of one family, answering lmms-eval's requests while its visual tokens are pruned.

    Parameters
    ----------
    model_args
        The fields of `settings.Settings`, `method` (default "none", the plain model), `pruning_rate`, and the
        parameters of the method.

    Attributes
    ----------
    method, pruner
        As configured last.
    hooked
        What `prune` takes for it: `pruner`, but `none` where a method is done before the model.
    processing
        A lock, held by whoever uses the processor or its tokenizer.

    Raises
    ------
    ConfigError
        A request that can't be run as written.
    """

    is_simple = False
    model_id: ClassVar[str]
    family: ClassVar[Family]

    def __init__(self, **model_args: object):
        super().__init__()
        spec = self.family.spec
        self.family.check_complete()
        parsed, method, pruner = settings.parse(model_args)
        self.settings = settings.resolve(parsed, spec)
        self.protocol = spec.protocols[self.settings.protocol]
        self.defaults = Defaults(self.protocol.new_tokens or spec.new_tokens, spec.stops_at_blank_line)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = pick_device(self.settings.device, self.accelerator)
        if self.settings.workers is None:
            self.settings = dataclasses.replace(self.settings, workers=default_workers(self.device))
        checkpoint = load_checkpoint(self.settings, self.device, spec.model_types, self.model_id)
        self._model, self.processor, self.config = checkpoint.model, checkpoint.processor, checkpoint.model.config
        # held by whoever uses the processor: a fast tokenizer can't be used by two threads, and downsample changes sizes for a batch
        self.processing = RLock()
        self.protocol.prepare(self.config, self.processor)
        bound_pixels(self.processor, self.settings)
        self.prompts = PromptMaker(self.processor, self.protocol, spec.media, self.settings)
        self.dtype, self._family, self._n_layers = self._model.dtype, family_of(self._model), len(self._model.model.language_model.layers)
        # under torchrun the other ranks would go on with larger batches; the paper's protocol fixes the batch
        self.may_shrink = not self.settings.protocol.startswith("paper") and self._world_size == 1
        self._use(method, pruner)
        self.describe()  # a family that can't be described is refused before it answers

    @classmethod
    def create_from_arg_string(cls, arg_string: str | Mapping[str, object], additional_config: dict | None = None) -> PrunedModel:
        """Build the model for lmms-eval: its command line, or `simple_evaluate`.

        Raises
        ------
        ConfigError
            Arguments that can't be run. The command ends with its sentences, see `plugin.exit_on_error`.
        """
        versions.check(logger.warning)
        model = cls(**settings.from_command_line(arg_string, additional_config))
        model.context = RunContext(refuses_failures=True, show_progress=True)
        return model

    # ---- configuration
    def configure(self, method: str, pruning_rate: Rate | None = None, **params: object) -> None:
        """Switch the method on the loaded model and forget the answers.

        Raises
        ------
        ConfigError
            The method, its parameters or its layer do not fit; the former method stays.
        """
        self._use(method, settings.build_pruner(method, pruning_rate, params))

    def _use(self, method: str, pruner: Pruner) -> None:
        inside = hooked(pruner, self.processor, self.model_id)
        prune(self.model, inside)  # not entered: refuses layers and positions that this model does not have
        self.method, self.pruner, self.hooked = method, pruner, inside
        self.forget_answers()

    @contextmanager
    def using(self, method: str, pruner: Pruner) -> Iterator[None]:
        """Another method while the context is open; the answers so far stay."""
        before = self.method, self.pruner, self.hooked
        self.method, self.pruner, self.hooked = method, pruner, hooked(pruner, self.processor, self.model_id)
        try:
            yield
        finally:
            self.method, self.pruner, self.hooked = before

    def describe(self) -> dict[str, object]:
        """The resolved configuration, in plain types: everything that an answer depends on, and where it ran."""
        params = dataclasses.asdict(self.pruner)
        return {
            "model": self.model_id,
            **dataclasses.asdict(self.settings),
            "commit": getattr(self.config, "_commit_hash", None),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "layers": self._n_layers,
            "method": self.method,
            "adapted": adaptation(self.pruner, self._family.tower(self.model.model)),
            "params": {name: value if isinstance(value, PLAIN) else str(value) for name, value in params.items()},
            "shape": dataclasses.asdict(DecoderShape.of(self.config.get_text_config())),
            "geometry": {"family": self.config.model_type, **self.family.geometry(self.config, self.processor, self.protocol)},
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({json.dumps(self.describe(), sort_keys=True)})"

    # ---- what lmms-eval reads
    @property
    def model(self) -> torch.nn.Module:
        """The Hugging Face model; gone after `clean`, unless `context.keep_loaded`."""
        return self._model

    @property
    def tokenizer(self) -> object:
        """The checkpoint's tokenizer, padding on the left."""
        return self.processor.tokenizer

    @property
    def full_batch_size(self) -> int:
        """Prompts per generate call, as asked."""
        return self.settings.batch_size

    # ---- answering
    def no_op_sentence(self, answers: Sequence[Answer]) -> str | None:
        """Why these can't be answers of a method that pruned; None where they can."""
        return no_op_sentence(answers, self.pruner, self._n_layers)

    @property
    def title(self) -> str:
        """Of the progress bar."""
        return f"{self.model_id} {self.method}"

    # ---- the loop: plan, prefetch, prepare, generate; the caller logs
    def batches_of(
        self, asked: Sequence[Request], done: Done, of_batch: OfBatch | None = None, pruner: Pruner | None = None
    ) -> Iterator[Batch]:
        """Yield requests with their answers, batch by batch; `of_batch` in place of `answers_of_batch` may find something else for them.

        A request that can't be made a prompt is a batch of its own, with a failed Answer in any case. Batches are planned with all
        requests, those in `done` included, so that they are the same after a restart. They are prepared for `pruner`, by default
        the model's.
        """
        windows = (
            (options, [request for request in window if request.index not in done.alone])
            for options, window in planning.windows(asked, self.batch_size, self.defaults)
            if not done.has([request.index for request in window])
        )
        with Prefetch(self.settings.workers) as prefetch:
            made = prefetch.ahead(self._made(windows, prefetch))
            steps = prefetch.ahead(self._steps(made, done, of_batch or self.answers_of_batch, pruner or self.pruner, self.batch_size))
            for step in steps:
                yield list(step())

    def scored_batches_of(self, targets: Sequence[Target], done: Done) -> Iterator[Batch]:
        """Yield targets with their answers; all continuations of a prompt are a batch, which one prefill answers."""
        groups = {same[0].request.index: same for same in by_prompt(targets) if not done.has([target.request.index for target in same])}
        requests = [request_of(same) for same in groups.values()]
        windows = ((PREFILL, requests[i : i + WINDOW_BATCHES]) for i in range(0, len(requests), WINDOW_BATCHES))
        with Prefetch(self.settings.workers) as prefetch:
            made = prefetch.ahead(self._made(windows, prefetch))
            for step in prefetch.ahead(self._steps(made, Done(), functools.partial(self._scores_of_batch, groups), self.pruner, 1)):
                ((request, found),) = step()
                same = groups[request.index]
                answers = [target.failed(found) for target in same] if isinstance(found, Answer) else found
                yield list(zip((target.request for target in same), answers, strict=True))

    def _made(self, windows: Iterable[Window], prefetch: Prefetch) -> Iterator[tuple[Generation, list[Made]]]:
        """Make the prompts of each window; only the task's own code is run in one thread, see `PromptMaker`."""
        for options, window in windows:
            documents = prefetch.attempts(self.prompts.look_up, window, [self.task_dict] * len(window))
            chats = list(map(Attempt, itertools.repeat(self.prompts.ask), window, documents))
            prompts = prefetch.attempts(self.prompts.render, window, chats)
            yield options, list(zip(window, prompts, strict=True))

    def _steps(
        self, windows: Iterable[tuple[Generation, list[Made]]], done: Done, of_batch: OfBatch, pruner: Pruner, batch_size: int
    ) -> Iterator[Step]:
        """Plan batches of each window and prepare them; a step finds the answers of one."""
        for options, made in windows:
            ready = []
            for request, attempt in made:
                found = self._told(request, attempt)
                if isinstance(found, Prompt):
                    ready.append(found)
                else:
                    yield functools.partial(self.failed_alone, request, found)
            for planned in planning.batches(ready, batch_size):
                # whole, unless the limit was changed
                batch = [prompt for prompt in planned if prompt.request.index not in done.indices]
                if batch:
                    yield functools.partial(of_batch, batch, options, Attempt(self.prepare, batch, pruner).take)

    def _told(self, request: Request, made: Attempt[Prompt]) -> Prompt | Exception:
        """Return the prompt, after telling about it, or the error that stands for it."""
        try:
            prompt = made.take()
            if self.context.on_prompt is not None and not request.is_padding:
                with self.processing:  # frames of a video may be read in both places
                    self.context.on_prompt(prompt)
        except Exception as error:  # a document can be broken in any way; it is recorded, and the run ends in failure
            if is_disk_full(error):
                raise  # no picture fits any more, which says nothing about the document
            return error
        return prompt

    def answers_of_batch(self, batch: list[Prompt], options: Generation, prepared: Taker | None = None) -> Iterator[tuple[Request, Answer]]:
        """Answer one batch, or its samples one by one if it fails as a whole, each with its own error."""
        try:
            answers = self.answer(prepared() if prepared else self.prepare(batch), options)
        except Exception as error:  # whatever it is, it must cost its own sample only, and be recorded as that sample's failure
            if self.batch_size > 1 and is_out_of_memory(error):
                raise OutOfMemoryError(f"A batch of {len(batch)} does not fit into the memory ({error}).") from error
            answers = None
            if len(batch) == 1:
                answers = [self.failed(batch[0].request, error)]
            elif self.failures.is_new(error):  # the sentence stands with the sample that failed
                logger.warning(f"A batch of {len(batch)} failed ({type(error).__name__}); its samples are tried one by one.")
        if answers is None:  # outside the except clause, which would keep the failed batch's tensors alive
            for prompt in batch:
                yield from self.answers_of_batch([prompt], options)
        else:
            yield from zip((prompt.request for prompt in batch), answers, strict=True)

    def _scores_of_batch(
        self, groups: Mapping[int, Sequence[Target]], batch: list[Prompt], options: Generation, prepared: Taker
    ) -> list[tuple[Request, list[Answer] | Answer]]:
        """Score the continuations of the one prompt of `batch`: an answer each, or one that failed for all."""
        (prompt,) = batch
        targets = groups[prompt.request.index]
        try:
            with self.processing:
                tokens = [continuation_ids(self.tokenizer, prompt.text, text) for text in prompt.continuations]
            reading = self.read(prepared(), options, n_more=max(map(len, tokens)))
            found = zip(targets, prompt.continuations, score(self.model, self.hooked, reading, tokens), strict=True)
            answers = [target.answer(text, scored, reading, prompt.digests, prompt.question) for target, text, scored in found]
        except Exception as error:  # as for generated answers
            answers = self.failed(prompt.request, error)
        return [(prompt.request, answers)]

    # ---- one batch
    def prompt_of(self, request: Request) -> Prompt:
        """Make the prompt of a request."""
        return self.prompts.make(request, self.task_dict)

    def prepare(self, batch: list[Prompt], pruner: Pruner | None = None) -> Prepared:
        """The tensors of a batch, for the model's own method or for `pruner`; any thread may call this."""
        sample_ids = [prompt.request.sample_id for prompt in batch]
        with self.processing, sized(batch, self.processor, pruner or self.pruner) as (resized, plans):
            inputs = self._inputs(resized)
        n_prompt = inputs["attention_mask"].sum(1).tolist()
        n_visual = self._family.is_visual(self.config, inputs["input_ids"]).sum(1).tolist()
        n_positions = count_positions(self.model.model, inputs) if has_multidimensional_positions(self.config) else n_prompt
        return Prepared(batch, sample_ids, inputs, plans, n_prompt, n_visual, n_positions)

    def read(self, batch: Prepared, options: Generation, *, n_more: int = 0, pruners: Sequence[Pruner] = ()) -> Reading:
        """Generate under pruning, by `pruners` in one call behind a shared prefix; hold what was measured against the prompts.

        `n_more` tokens must fit behind each of them.
        """
        chosen = pruners or [self.hooked]
        inputs = move_inputs(batch.inputs, self.device, self.dtype)
        width = inputs["input_ids"].shape[1]
        if len(chosen) > 1:
            batch, inputs = batch.repeated(len(chosen)), repeated(inputs, len(chosen))
        check_prompt_lengths(batch, n_more, self.config)
        with time_forwards(self.model.model) as times, prune(self.model, chosen, **batch.told) as ledger:
            output = self.model.generate(**inputs, **options.kwargs, pad_token_id=self.tokenizer.pad_token_id)
        records = ledger.records
        check_records(records, batch, n_beams=options.n_beams, pruners=chosen, n_layers=self._n_layers)
        records = as_planned(records, batch.plans, batch.sample_ids)
        return Reading(output, width, batch.n_prompt, records, times.prefill_ms, times.decode_ms, times.peak_bytes)

    def answer(self, batch: Prepared, options: Generation, pruners: Sequence[Pruner] = ()) -> list[Answer]:
        """Answer a batch by one call of `generate`, whose errors are not caught; all prompts by the first of `pruners`, and so on."""
        reading = self.read(batch, options, pruners=pruners)
        with self.processing:
            return reading.answers(batch.prompts * max(1, len(pruners)), options, self.tokenizer, end_ids(self.model.generation_config))

    def _inputs(self, batch: list[Prompt]) -> BatchFeature:
        inputs = build_inputs(self.processor, batch, self.settings)
        if "token_type_ids" not in inspect.signature(self.model.forward).parameters:
            inputs.pop("token_type_ids", None)  # some tokenizers add these zeros, and generate refuses what a model does not take
        return inputs
