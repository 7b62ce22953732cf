"""HOW to cut: prune visual tokens in front of decoder layers of an unmodified Hugging Face VLM, with hooks only.

Layers before the first stage see the whole prompt; from each stage's layer on, hidden states are gathered, and positions,
masks and KV caches follow. Everything is undone on exit. Facts about Hugging Face that this relies on are tested, not assumed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlm_pruner_eval import hf_compat
from vlm_pruner_eval.clip_text import load_towers
from vlm_pruner_eval.cut import Context, CutState, recall, remember
from vlm_pruner_eval.device_copy import to_host
from vlm_pruner_eval.eager import EagerExecution
from vlm_pruner_eval.encoding import Encoding
from vlm_pruner_eval.errors import ConfigError, PruningError
from vlm_pruner_eval.guard import Guard, NotCopied
from vlm_pruner_eval.installed import INSTALLED, Hooks
from vlm_pruner_eval.layer_arguments import LayerArguments
from vlm_pruner_eval.ledger import Ledger
from vlm_pruner_eval.prefill import Prefill
from vlm_pruner_eval.probe import probe_for
from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.refusals import (
    problems_of,
    refuse_chunks,
    refuse_foreign_cache,
    refuse_late_images,
    refuse_no_pruner,
    refuse_no_questions,
    refuse_prepared,
    refuse_repeated_singly,
    refuse_strange_cache,
    refuse_strange_ids,
)
from vlm_pruner_eval.unwrap import uncompiled, unwrapped
from vlm_pruner_eval.vision_probe import vision_probe_for
from vlm_pruner_eval.vlms import family_of


def prune(
    model: nn.Module,
    pruner: Pruner | Sequence[Pruner],
    *,
    sample_ids: Sequence[str] | None = None,
    questions: Sequence[str] | None = None,
) -> PruningHook:
    """Prune visual tokens of every prompt that `model` reads inside the context.

    ::

        with prune(model, get_pruner("vlmpruner", pruning_rate="8/9")) as ledger:
            model.generate(**inputs)
        ledger.records[0].n_kept

    Parameters
    ----------
    model
        A Hugging Face VLM of a known family (see `vlm_pruner_eval.vlms`), or a wrapper that holds one (an adapter, a compiled or a
        data-parallel module). Compiled code runs eagerly inside the context, with a RuntimeWarning.
    pruner
        Built by `get_pruner`, or an instance of your own Pruner subclass. A list of n takes the same prompts n times, all for the first
        method, then all for the second; they cut at the same layers and treat positions alike.
    sample_ids
        One name per row of the batch, for error messages and for seeded methods; default a digest of the prompt's ids.
    questions
        One per row of the batch, the text of a prompt without its template, for methods with a text tower.

    Returns
    -------
    A context manager yielding a Ledger with one record per row and prefill.

    Raises
    ------
    ConfigError
        A model, layer or position policy that can't work.
    PruningError
        In the context: what the tensors hold differs from what was asked; an input that can't be pruned (static caches, chunked
        prefill, inputs_embeds without input_ids, a new image in a later turn, an image at the prompt's end); a forward in the middle
        of another thread's; a copy of the model. On exit: the model ran, and no prefill was recorded.
    """
    return PruningHook(model, pruner, sample_ids, questions)


class PruningHook(NotCopied):
    """The context manager behind `prune`."""

    def __init__(
        self,
        model: nn.Module,
        pruner: Pruner | Sequence[Pruner],
        sample_ids: Sequence[str] | None = None,
        questions: Sequence[str] | None = None,
    ):
        pruners = list(pruner) if isinstance(pruner, (list, tuple)) else [pruner]
        for one in pruners:
            refuse_no_pruner(one)
        self.outer = model
        self.head = unwrapped(model)
        self.family = family_of(self.head)
        self.sample_ids, self.questions = sample_ids, questions
        self.core, self.text = hf_compat.decoder(self.head)
        self.layers = [uncompiled(layer) for layer in self.text.layers]
        self.methods = [(one, one.stages(len(self.layers))) for one in pruners]
        self.tower = self.family.tower(self.core)
        if problems := problems_of(self.methods, self.text, mrope=self.family.mrope, tower=self.tower):
            raise ConfigError(problems)
        load_towers(pruners, self.core)
        self.stages = [stage.layer for stage in self.methods[0][1]]  # layers, of all methods the same
        self.contiguous = pruners[0].position_policy(self.family.mrope) == "contiguous"
        self.first = self.stages[0] if self.stages else len(self.layers)
        self.ledger = Ledger()
        self._labels: Tensor | None = None
        self._prefill: Prefill | None = None
        self._n_prompt: int | None = None
        self._arguments = LayerArguments(self.text)
        self._followed: list[RemovableHandle] = []
        self._forget_forward()

    # ---- installation
    def __enter__(self) -> Ledger:
        if INSTALLED in self.core.__dict__:
            raise PruningError("prune: this model is being pruned already; close the outer context first (nested use is refused).")
        refuse_no_questions([pruner for pruner, _ in self.methods], self.questions)
        self._guard = Guard()
        self._context = Context(self.text)
        with ExitStack() as undo:
            undo.enter_context(EagerExecution(self.head))
            self.core.__dict__[INSTALLED] = self
            undo.callback(self.core.__dict__.pop, INSTALLED, None)
            self._hooks = undo.enter_context(Hooks())
            self._install()
            self._undo = undo.pop_all()
        return self.ledger

    def _install(self) -> None:
        add = self._hooks.add
        for module in {id(module): module for module in (self.outer, self.head, self.core)}.values():
            add(module.register_forward_pre_hook(self._guard.begin, prepend=True))
            add(module.register_forward_hook(self._guard.end, always_call=True))
        add(self.head.register_forward_pre_hook(self._before_head, with_kwargs=True))
        add(self.core.register_forward_pre_hook(self._before_core, with_kwargs=True))
        add(self.core.register_forward_hook(self._after_core, always_call=True))
        add(self.text.register_forward_pre_hook(self._before_text, with_kwargs=True))
        for i in self.stages:
            add(self._hooked(i))
        if self.stages:
            add(self.text.norm.register_forward_hook(self._after_norm))
        add(self.text.register_forward_hook(self._after_text))
        pruners = [pruner for pruner, _ in self.methods]
        needs = frozenset().union(*(pruner.needs for pruner in pruners))
        self.probes = {layer: probe for layer in self.stages if (probe := probe_for(self.layers, layer, needs))}
        add(*(handle for probe in self.probes.values() for handle in probe.handles))
        self.vision = vision_probe_for(self.tower, pruners)
        if self.vision is not None:
            add(*self.vision.handles)
            if self.vision.merging is not None:
                self._hooks.replace(self.core.vision_tower, "forward", self.vision.merging.run)
        self._encoding = Encoding(self.family, self.core, self.vision, check=self._guard.check_thread)
        for kind in self.family.kinds:
            self._hooks.replace(self.core, f"get_{kind}_features", functools.partial(self._encoding.run, kind))
        if hasattr(self.head, "generate"):
            self._hooks.replace(self.head, "generate", self._generate)
        for owner, attribute, wrapper in self.family.patches(self.core):
            self._hooks.replace(owner, attribute, functools.partial(self._with_cut, wrapper))

    def _hooked(self, i: int) -> RemovableHandle:
        return self.layers[i].register_forward_pre_hook(functools.partial(self._before_layer, i), with_kwargs=True)

    def _follow_all(self) -> None:
        """For the rest of this forward, tell each layer what it must know; otherwise only layers where a cut begins are told."""
        if not self._followed:
            self._followed = [self._hooked(i) for i in range(self.first, len(self.layers)) if i not in self.stages]

    def __exit__(self, exc_type: type | None, *rest: object) -> None:
        with self._guard.turn():  # a thread that still generates comes to its end first
            self._context.is_open = False
            with self._undo:
                if exc_type is None:
                    self._check_hooks()
        if exc_type is not None:
            return
        if self._prefill is not None:
            raise PruningError("prune: a prompt was read but its prefill never finished, so nothing proves that it was pruned.")
        self._guard.check_exit()

    def _check_hooks(self) -> None:
        present = [uncompiled(layer) for layer in self.text.layers]
        pairs = itertools.zip_longest(present, self.layers)
        self._hooks.check([i for i, (layer, hooked) in enumerate(pairs) if layer is not hooked])

    # ---- hooks, in the order in which a forward meets them
    def _generate(self, original: Callable, *args: object, **kwargs: object) -> object:
        if self.stages:
            refuse_chunks(getattr(self.head, "generation_config", None), *args, *kwargs.values(), size=kwargs.get("prefill_chunk_size"))
        given = next((ids for ids in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if isinstance(ids, Tensor)), None)
        with self._guard.turn():
            outer = self._n_prompt
            self._n_prompt = None if given is None else given.shape[1]
            try:
                return self._guard.generate(original, *args, **kwargs)
            finally:
                self._n_prompt = outer

    def _forget_forward(self) -> None:
        self._input_ids = self._mask = self._state = self._patch = None
        self._end_layers()

    def _end_layers(self) -> None:
        self._arguments.give_back()
        for handle in self._followed:
            handle.remove()
        self._followed.clear()

    def _before_head(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._labels = kwargs.get("labels")

    def _before_core(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._forget_forward()
        self._input_ids = kwargs.get("input_ids", args[0] if args else None)

    def _after_core(self, module: nn.Module, args: tuple, output: object) -> None:
        self._forget_forward()
        self._labels = None

    def _before_text(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._check_hooks()
        self._mask, self._patch, self._prefill = kwargs.get("attention_mask"), None, None
        for probe in self.probes.values():
            probe.clear()
        embeds = hf_compat.argument(kwargs, "inputs_embeds", "the language model")
        cache = hf_compat.cache_argument(kwargs, "the language model")
        refuse_strange_cache(cache)
        if cache is not None and cache.get_seq_length() > 0:
            self._go_on(embeds, cache)
        else:
            self._begin(embeds, cache)

    def _go_on(self, embeds: Tensor, cache: Any) -> None:
        """Read new tokens behind a prompt that the cache holds."""
        self._state = recall(cache)
        if not self.stages and (self._state is None or not self._state.cuts):
            return
        n_new = embeds.shape[1]
        holds_images = self._input_ids is not None and n_new > 1 and bool(self.family.is_visual(self.core.config, self._input_ids).any())
        refuse_late_images(n_new, holds_images)
        refuse_foreign_cache(self._state, self.text, self.first, self._mask, n_new, cache.get_seq_length())
        self._state.context = self._context
        if any(cut.layer not in self.stages for cut in self._state.cuts):  # of a prompt that another method has cut
            self._follow_all()

    def _begin(self, embeds: Tensor, cache: Any) -> None:
        """Read a prompt from its first token on."""
        if self.stages:
            refuse_prepared(self._mask, cache)
        refuse_strange_ids(self._input_ids, embeds)
        self._state = CutState(embeds.shape[1], context=self._context)
        mask = torch.ones_like(self._input_ids) if self._mask is None else self._mask
        input_ids, attended, *labels = to_host(self._input_ids, mask.bool(), *([] if self._labels is None else [self._labels]))
        scopes = self.family.scopes(self.core.config, input_ids, self._encoding.layouts)
        refuse_repeated_singly(self.family, self.core.config, input_ids, self._encoding.pixels, self._encoding.layouts)
        self._encoding.pixels.clear()
        self._prefill = Prefill(
            methods=self.methods,
            family=self.family,
            text=self.text,
            probes=self.probes,
            input_ids=input_ids,
            attended=attended,
            scopes=scopes,
            sample_ids=self.sample_ids,
            questions=self.questions,
            contiguous=self.contiguous,
            labels=labels[0] if labels else None,
            n_prompt=self._n_prompt,
            embeds=embeds,
            vision=self.vision,
            side=getattr(self.tower, "side", None),
        )
        self._prefill.cache = cache
        if cache is None and self.stages:  # only hooks see how long the layers' inputs are, those of text alone among them
            self._follow_all()

    def _before_layer(self, i: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        hidden = before = hf_compat.hidden_argument(args, kwargs, i)
        if self._state is None:  # a cache that was filled outside this context
            return None
        cache = hf_compat.cache_argument(kwargs, i)
        if self._prefill is not None:
            rope = hf_compat.argument(kwargs, "position_embeddings", i) if self._patch is None else self._patch[1]["position_embeddings"]
            hidden = self._prefill.enter_layer(i, hidden, self._state, rope)
            if cache is not None:
                self._prefill.cache = cache
                remember(cache, self._state)
        cut = self._state.at(i)
        if cut is None:
            return None if hidden is before else hf_compat.with_hidden(hidden, args, kwargs)
        if self._patch is None or self._patch[0] is not cut:
            self._arguments.give_back()  # what was cut for an earlier stage, which its probe has seen
            for name in ("attention_mask", "position_embeddings"):
                hf_compat.argument(kwargs, name, i)
            is_prefill = self._prefill is not None
            found = self._arguments.behind(cut, i, hidden, kwargs, cache, is_prefill=is_prefill, prompt_mask=self._mask)
            self._patch = cut, found
            if not self._arguments.hand_on(found, kwargs, cache):
                self._follow_all()
        patched = kwargs | {name: value for name, value in self._patch[1].items() if name in kwargs}
        return (args, patched) if args and hidden is before else hf_compat.with_hidden(hidden, args, patched)

    def _with_cut(self, wrapper: Callable, original: Callable, *args: object, **kwargs: object) -> object:
        return wrapper(original, self._patch[0] if self._patch else None, *args, **kwargs)

    def _after_norm(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Give the language model its input length back, so that logits line up with input_ids and labels."""
        if self._prefill is None:
            return None
        cut = self._state.at(len(self.layers))
        if cut is None:
            return None
        full = output.new_zeros(output.shape[0], cut.length, output.shape[-1])
        places = (*cut.valid.nonzero(as_tuple=True), cut.index[cut.valid])  # found on the host: the device would be waited for
        rows, slots, positions = (part.to(output.device, non_blocking=True) for part in places)
        full[rows, positions] = output[rows, slots]
        return full

    def _after_text(self, module: nn.Module, args: tuple, output: object) -> None:
        self._end_layers()
        self._check_hooks()
        self._guard.n_seen += 1
        if self._prefill is None:
            return
        prefill, self._prefill = self._prefill, None
        if prefill.cache is None:
            prefill.cache = hf_compat.cache_of(output)
        prefill.verify(self._state)
        if prefill.cache is not None:  # without a cache every step is a prefill of the same images
            self._encoding.forget()
        prefill.cache = None  # measured; records that nobody has read yet must not keep it alive
        self.ledger.add(functools.partial(prefill.records, self._state))
