"""The batched chat wrapper: one class, used by lmms-eval's command line and by library code alike.

It does not build on lmms-eval's stock wrappers, which answer "" when generate fails and look documents of a batch up in
the first one's task.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
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
from vlm_pruner_eval.lmms import prompts, settings
from vlm_pruner_eval.lmms.ahead import Ahead, Job, Made, Step, Turn, default_workers
from vlm_pruner_eval.lmms.answer_checks import check_prompt_lengths, check_records, no_op_sentence
from vlm_pruner_eval.lmms.answering import Answering, is_out_of_memory
from vlm_pruner_eval.lmms.checkpoint import load_checkpoint
from vlm_pruner_eval.lmms.device import pick_device
from vlm_pruner_eval.lmms.downsampling import as_planned, hooked, sized
from vlm_pruner_eval.lmms.inputs import Prepared, bound_pixels, build_inputs, move_inputs
from vlm_pruner_eval.lmms.log import Reading
from vlm_pruner_eval.lmms.loglikelihood import Target
from vlm_pruner_eval.lmms.prompts import Defaults, Generation, Prompt, Request
from vlm_pruner_eval.lmms.run_context import RunContext
from vlm_pruner_eval.lmms.scoring import Scorer
from vlm_pruner_eval.pruners import Pruner
from vlm_pruner_eval.redact import of_error
from vlm_pruner_eval.store.answers import Answer, Batch, Done
from vlm_pruner_eval.timing import time_forwards
from vlm_pruner_eval.vlms import Family, family_named, family_of

Taker = Callable[[], Prepared]
OfBatch = Callable[[list[Prompt], Generation, Taker], Iterable[tuple[Request, Any]]]


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
        self.kinds = spec.media
        self.protocol = spec.protocols[self.settings.protocol]
        self.defaults = Defaults(self.protocol.new_tokens or spec.new_tokens, spec.stops_at_blank_line)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = pick_device(self.settings.device, self.accelerator)
        if self.settings.workers is None:
            self.settings = dataclasses.replace(self.settings, workers=default_workers(self.device))
        checkpoint = load_checkpoint(self.settings, self.device, spec.model_types, self.model_id)
        self._model, self.processor, self.config = checkpoint.model, checkpoint.processor, checkpoint.model.config
        # held by whoever uses the processor, see `Ahead`: a fast tokenizer can't be used by two, and downsample changes sizes for a batch
        self.processing = RLock()
        self.protocol.prepare(self.config, self.processor)
        bound_pixels(self.processor, self.settings)
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
            "params": {
                name: value if isinstance(value, (bool, int, float, str, type(None))) else str(value) for name, value in params.items()
            },
            "shape": dataclasses.asdict(DecoderShape.of(self.config.get_text_config())),
            "geometry": {
                "family": self.config.model_type,
                **self.family.geometry(self.config, self.processor, self.protocol),
            },
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

    @property
    def _eos_ids(self) -> set[int]:
        ids = self.model.generation_config.eos_token_id
        return set(ids) if isinstance(ids, (list, tuple)) else {ids}

    # ---- answering
    def no_op_sentence(self, answers: Sequence[Answer]) -> str | None:
        """Why these can't be answers of a method that pruned; None where they can."""
        return no_op_sentence(answers, self.pruner, self._n_layers)

    @property
    def title(self) -> str:
        """Of the progress bar."""
        return f"{self.model_id} {self.method}"

    def batches_of(
        self, asked: Sequence[Request], done: Done, of_batch: OfBatch | None = None, pruner: Pruner | None = None
    ) -> Iterator[Batch]:
        """Requests with their answers, batch by batch; `of_batch` in place of `answers_of_batch` may find something else for them.

        A request that can't be made a prompt is a batch of its own, with a failed Answer in any case. Batches are planned with all
        requests, those in `done` included, so that they are the same after a restart. They are prepared for `pruner`, by default
        the model's.
        """
        windows = (
            (options, [request for request in window if request.index not in done.alone])
            for options, window in prompts.windows(asked, self.batch_size, self.defaults)
            if not done.has([request.index for request in window])
        )
        plan = functools.partial(self._steps, done, of_batch or self.answers_of_batch, pruner or self.pruner)
        with Ahead(self.settings.workers) as ahead:
            yield from ahead.batches(windows, self.prompt_of, plan)

    def _steps(self, done: Done, of_batch: OfBatch, pruner: Pruner, options: Generation, made: Made) -> Iterator[Step]:
        ready = []
        for request, job in made:
            found = self.taken(request, job)
            if isinstance(found, Answer):
                yield Step(functools.partial(list, [(request, found)]))
            else:
                ready.append(found)
        for planned in prompts.batches(ready, self.batch_size):
            batch = [prompt for prompt in planned if prompt.request.index not in done.indices]  # whole, unless the limit was changed
            if batch:
                prepared = Job(functools.partial(self.prepare, batch, pruner))
                yield Step(functools.partial(of_batch, batch, options, prepared.take), prepared)

    def scored_batches_of(self, targets: Sequence[Target], done: Done) -> Iterator[Batch]:
        """Targets with their answers, one prompt after the other."""
        return Scorer(self).batches(targets, done)

    def prompt_of(self, request: Request, in_turn: Turn | None = None) -> Prompt:
        """What the model is asked by a request; `in_turn` see `prompts.build`."""
        return prompts.build(request, self.task_dict, self.processor, self.kinds, self.protocol, self.settings, in_turn)

    def taken(self, request: Request, job: Job[Prompt]) -> Prompt | Answer:
        """The prompt, after telling about it, or the answer that stands for it where it failed."""
        try:
            prompt = job.take()
            if self.context.on_prompt is not None and not request.is_padding:
                with self.processing:  # frames of a video may be read in both places
                    self.context.on_prompt(prompt)
        except Exception as error:  # a document can be broken in any way; it is recorded, and the run ends in failure
            if is_disk_full(error):
                raise  # no picture fits any more, which says nothing about the document
            return self.failed(request, error)
        return prompt

    def answers_of_batch(self, batch: list[Prompt], options: Generation, prepared: Taker | None = None) -> Iterator[tuple[Request, Answer]]:
        """One batch, or its samples one by one where it fails as a whole, each with its own error."""
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

    def prepare(self, batch: list[Prompt], pruner: Pruner | None = None) -> Prepared:
        """The tensors of a batch, for the model's own method or for `pruner`; any thread may call this."""
        sample_ids = [prompt.request.sample_id for prompt in batch]
        with self.processing, sized(batch, self.processor, pruner or self.pruner) as (resized, plans):
            inputs = self._inputs(resized)
        n_prompt = inputs["attention_mask"].sum(1).tolist()
        n_visual = self._family.is_visual(self.config, inputs["input_ids"]).sum(1).tolist()
        return Prepared(batch, sample_ids, inputs, plans, n_prompt, n_visual)

    def read(self, batch: Prepared, options: Generation, *, n_more: int = 0) -> Reading:
        """Generate under pruning, and hold what was measured against the prompts; `n_more` tokens must fit behind each of them."""
        ids, asked = batch.sample_ids, {"n_beams": options.n_beams, "pruner": self.hooked, "n_layers": self._n_layers}
        check_prompt_lengths([n + n_more for n in batch.n_prompt], ids, self.config, self._n_positions(batch, n_more))
        inputs = move_inputs(batch.inputs, self.device, self.dtype)
        with time_forwards(self.model.model) as times, prune(self.model, self.hooked, sample_ids=ids) as ledger:
            output = self.model.generate(**inputs, **options.kwargs, pad_token_id=self.tokenizer.pad_token_id)
        records = ledger.records
        check_records(records, ids, batch.n_visual, batch.n_prompt, **asked)
        records, width = as_planned(records, batch.plans, ids), inputs["input_ids"].shape[1]
        return Reading(output, width, batch.n_prompt, records, times.prefill_ms, times.decode_ms, times.peak_bytes)

    def _n_positions(self, batch: Prepared, n_more: int) -> list[int] | None:
        """Positions of each prompt, of a model that has other ones than one for each token."""
        if not has_multidimensional_positions(self.config):
            return None
        return [n + n_more for n in count_positions(self.model.model, batch.inputs)]

    def answer(self, batch: Prepared, options: Generation) -> list[Answer]:
        """Answer a batch by one call of the model's `generate` under pruning; whatever that raises is not caught."""
        reading = self.read(batch, options)
        with self.processing:
            return reading.answers(batch.prompts, options, self.tokenizer, self._eos_ids)

    def _inputs(self, batch: list[Prompt]) -> BatchFeature:
        inputs = build_inputs(self.processor, batch, self.settings)
        if "token_type_ids" not in inspect.signature(self.model.forward).parameters:
            inputs.pop("token_type_ids", None)  # some tokenizers add these zeros, and generate refuses what a model does not take
        return inputs

    def failed(self, request: Request, error: Exception) -> Answer:
        """The answer that records a failure, which is logged, see `failures`."""
        self.failures.tell(request.sample_id, error)
        return Answer(request.task, request.split, request.doc_id, "", error=of_error(error))


@functools.cache
def family_class(model_id: str) -> type[PrunedModel]:
    """Return the class behind one of our lmms-eval ids.

    Raises
    ------
    ConfigError
        An unknown id.
    """
    family = family_named(model_id)
    attributes = {"family": family, "model_id": model_id, "__doc__": family.__doc__, "__module__": "vlm_pruner_eval.lmms.families"}
    return type(f"VlmPruner{type(family).__name__}", (PrunedModel,), attributes)


def load(model_id: str, **model_args: object) -> PrunedModel:
    """Load a model by its lmms-eval id, for use from Python: problems are exceptions, and the process is never ended.

    Parameters
    ----------
    model_id
        As after ``lmms-eval --model``, e.g. "vlmpruner_llava".
    model_args
        As in ``--model_args``: pretrained, method, pruning_rate, batch_size, dtype and so on.

    Raises
    ------
    ConfigError
        An unknown id, or arguments that can't be run.
    """
    return family_class(model_id)(**model_args)
