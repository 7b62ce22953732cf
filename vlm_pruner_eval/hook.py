"""HOW to cut: prune visual tokens in front of decoder layers of an unmodified Hugging Face VLM, with hooks only.

Layers before the first stage see the whole prompt; from each stage's layer on, hidden states are gathered, and positions,
masks and KV caches follow. Everything is undone on exit. Facts about Hugging Face that this relies on are tested, not assumed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from vlm_pruner_eval import hf_compat
from vlm_pruner_eval.cut import Cut, CutState, LayerLength, recall, remember, take
from vlm_pruner_eval.errors import ConfigError, PruningError
from vlm_pruner_eval.host import to_host
from vlm_pruner_eval.ledger import Ledger
from vlm_pruner_eval.prefill import Prefill
from vlm_pruner_eval.probe import Probe, probe_for
from vlm_pruner_eval.pruners.base import FROM_PREVIOUS_LAYER, Pruner
from vlm_pruner_eval.vlms import family_of
from vlm_pruner_eval.vlms.base import SINGLY

_INSTALLED = "_vlm_pruner_eval_hook"


def prune(model: nn.Module, pruner: Pruner, *, sample_ids: Sequence[str] | None = None) -> PruningHook:
    """Prune visual tokens of every prompt that `model` reads inside the context.

    ::

        with prune(model, get_pruner("vlmpruner", pruning_rate="8/9")) as ledger:
            model.generate(**inputs)
        ledger.records[0].n_kept

    Parameters
    ----------
    model
        A Hugging Face VLM of a known family (see `vlm_pruner_eval.vlms`), loaded and unmodified.
    pruner
        Built by `get_pruner`, or an instance of your own Pruner subclass.
    sample_ids
        One name per prompt of the batch, for error messages and for seeded methods; default a digest of the prompt's ids.

    Returns
    -------
    A context manager yielding a Ledger with one record per row and prefill.

    Raises
    ------
    ConfigError
        On entry: a model, layer or position policy that can't work.
    PruningError
        In the context: what the tensors hold differs from what was asked, or an input that can't be pruned
        (static caches, chunked prefill, inputs_embeds without input_ids, a new image in a later turn).
    """
    return PruningHook(model, pruner, sample_ids)


def installed_probes(core: nn.Module) -> Mapping[int, Probe]:
    """The probes of the hook that is on a model now, by the layer of the stage that reads them; none without a hook."""
    hook = core.__dict__.get(_INSTALLED)
    return {} if hook is None else hook._probes


class PruningHook:
    """The context manager behind `prune`."""

    def __init__(self, model: nn.Module, pruner: Pruner, sample_ids: Sequence[str] | None = None):
        if not isinstance(pruner, Pruner):
            raise ConfigError(
                f"prune: got {pruner!r} ({type(pruner).__name__}), expected a Pruner; build one with get_pruner(name, pruning_rate=...)."
            )
        if pruner.before_model:
            raise ConfigError(
                f"prune: got method {pruner.name}, which makes the images smaller before the model sees them, so there is nothing to prune "
                f"inside it; use it through lmms-eval or a sweep (method={pruner.name}), or take another method."
            )
        self.family, self.pruner, self.sample_ids = family_of(model), pruner, sample_ids
        self.core, self.text = hf_compat.decoder(model)
        self.layers = self.text.layers
        self.stages = pruner.stages(len(self.layers))
        self.contiguous = pruner.position_policy(self.family.mrope) == "contiguous"
        if problems := self._problems():
            raise ConfigError(problems)
        self.ledger = Ledger()
        self._handles: list = []
        self._replaced: list[tuple[object, str, object, Callable]] = []
        self._layouts: dict[str, list] = {}
        self._pixels: dict[str, object] = {}
        self._is_encoding = False
        self._prefill: Prefill | None = None
        self._forget_forward()

    def _problems(self) -> list[str]:
        name, n, found = self.pruner.name or type(self.pruner).__name__, len(self.layers), []
        order = [stage.layer for stage in self.stages]
        for layer in order:
            if not 0 <= layer < n:
                found.append(f"{name}: layer: got {layer}, expected 0 to {n - 1}: this model has {n} decoder layers.")
        if order != sorted(set(order)):
            found.append(f"{name}: stages: got layers {order}, expected them ascending without repeats.")
        if 0 in order and self.pruner.needs & FROM_PREVIOUS_LAYER:
            wanted = ", ".join(sorted(self.pruner.needs & FROM_PREVIOUS_LAYER))
            found.append(f"{name}: layer: got 0, but {wanted} come from the layer before; use layer >= 1.")
        if self.contiguous and self.family.mrope:
            found.append(f"{name}: positions=contiguous: this model has multi-dimensional rotary positions; use positions=original.")
        kinds = list(getattr(self.text.config, "layer_types", None) or ())
        if order and "sliding_attention" in kinds[order[0] :]:
            found.append(
                f"{name}: layers from {order[0]} on use sliding-window attention, which can't be pruned; disable it in the config."
            )
        return found

    # ---- installation
    def __enter__(self) -> Ledger:
        if _INSTALLED in self.core.__dict__:
            raise PruningError("prune: this model is being pruned already; close the outer context first (nested use is refused).")
        self.core.__dict__[_INSTALLED] = self
        with ExitStack() as undo:
            undo.callback(self._remove)
            self._install()
            undo.pop_all()
        return self.ledger

    def _install(self) -> None:
        add = self._handles.append
        add(self.core.register_forward_pre_hook(self._before_core, with_kwargs=True))
        add(self.text.register_forward_pre_hook(self._before_text, with_kwargs=True))
        first = self.stages[0].layer if self.stages else len(self.layers)
        for i, layer in enumerate(self.layers[first:], start=first):
            add(layer.register_forward_pre_hook(functools.partial(self._before_layer, i), with_kwargs=True))
        if self.stages:
            add(self.text.norm.register_forward_hook(self._after_norm))
        add(self.text.register_forward_hook(self._after_text))
        needs = self.pruner.needs
        self._probes = {s.layer: probe for s in self.stages if (probe := probe_for(self.layers, s.layer, needs))}
        self._handles.extend(handle for probe in self._probes.values() for handle in probe.handles)
        for kind in self.family.kinds:
            self._replace(self.core, f"get_{kind}_features", functools.partial(self._see_features, kind))
        for owner, attribute, wrapper in self.family.patches(self.core):
            self._replace(owner, attribute, functools.partial(self._with_cut, wrapper))

    def _replace(self, owner: object, name: str, function: Callable) -> None:
        """Hide a method behind an instance attribute; one that the user put there himself is kept for later."""
        original = getattr(owner, name)
        ours = functools.wraps(original)(functools.partial(function, original))
        self._replaced.append((owner, name, owner.__dict__.get(name), ours))
        owner.__dict__[name] = ours

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for owner, name, before, _ in reversed(self._replaced):
            owner.__dict__.pop(name, None)
            if before is not None:
                owner.__dict__[name] = before
        self._replaced.clear()
        self.core.__dict__.pop(_INSTALLED, None)

    def __exit__(self, exc_type: type | None, *rest: object) -> None:
        missing = self._missing_hooks()
        self._remove()
        if exc_type is None and missing:
            raise PruningError(missing)
        if exc_type is None and self._prefill is not None:
            raise PruningError("prune: a prompt was read but its prefill never finished, so nothing proves that it was pruned.")

    def _missing_hooks(self) -> str | None:
        gone = sum(handle.id not in handle.hooks_dict_ref() for handle in self._handles)
        gone += sum(owner.__dict__.get(name) is not ours for owner, name, _, ours in self._replaced)
        if not gone:
            return None
        total = len(self._handles) + len(self._replaced)
        return f"prune: {gone} of {total} hooks were removed from the model inside the context, so prompts may not have been pruned."

    # ---- hooks, in the order in which a forward meets them
    def _see_features(self, kind: str, original: Callable, *args: object, **kwargs: object) -> object:
        if self._is_encoding:  # Qwen3-VL's get_video_features calls get_image_features, which has seen the images already
            return original(*args, **kwargs)
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        call = bound | bound.get("kwargs", {})
        self._layouts[kind] = self.family.layouts(self.core, kind, call)
        if hf_compat.REPEATS_IMAGES_SINGLY:
            self._pixels[kind] = call.get(f"pixel_values_{kind}s", call.get("pixel_values"))
        self._is_encoding = True
        try:
            return original(*args, **kwargs)
        finally:
            self._is_encoding = False

    def _forget_forward(self) -> None:
        self._input_ids = self._mask = self._state = self._patch = None

    def _before_core(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._forget_forward()
        self._input_ids = kwargs.get("input_ids", args[0] if args else None)

    def _before_text(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if missing := self._missing_hooks():
            raise PruningError(missing)
        self._mask, self._patch, self._prefill = kwargs.get("attention_mask"), None, None
        for probe in self._probes.values():
            probe.clear()
        embeds = hf_compat.argument(kwargs, "inputs_embeds", "the language model")
        cache = hf_compat.cache_argument(kwargs, "the language model")
        if cache is not None and cache.get_seq_length() > 0:
            self._state = recall(cache)
            self._refuse_late_images(embeds)
            return
        if self.stages:
            self._refuse(cache)
        if self._input_ids is None:
            raise PruningError(
                "prune: got inputs_embeds alone, expected input_ids: visual tokens are found through them. Pass input_ids and pixel_values."
            )
        self._state = CutState(embeds.shape[1])
        input_ids, *mask = to_host(self._input_ids, *([] if self._mask is None else [self._mask]))
        attended = mask[0].bool() if mask else torch.ones(input_ids.shape, dtype=torch.bool)
        scopes = self.family.scopes(self.core.config, input_ids, self._layouts)
        self._refuse_repeated_singly(input_ids)
        self._prefill = Prefill(
            pruner=self.pruner,
            family=self.family,
            text=self.text,
            stages=self.stages,
            probes=self._probes,
            input_ids=input_ids,
            attended=attended,
            scopes=scopes,
            sample_ids=self.sample_ids,
            contiguous=self.contiguous,
        )
        self._prefill.cache = cache

    def _refuse(self, cache: object) -> None:
        if isinstance(self._mask, dict) or (self._mask is not None and self._mask.dim() != 2):
            raise PruningError(
                "prune: got a prepared attention mask (as static caches make), expected the 2-D padding mask [B, L]; use a dynamic cache."
            )
        if hf_compat.is_static(cache):
            raise PruningError(
                "prune: got a static cache, whose layers can't hold different lengths; use the default cache (cache_implementation=None)."
            )

    def _refuse_repeated_singly(self, input_ids: Tensor) -> None:
        for kind, pixels in self._pixels.items():
            layouts = self._layouts.get(kind, [])
            if not isinstance(pixels, Tensor) or len(pixels) != len(layouts):
                continue  # patches of all images in one row, as Qwen has them, whose classes repeat them rightly
            token = self.family.token_id(self.core.config, kind)
            rows = self.family.scopes(self.core.config, torch.where(input_ids == token, token, -1), {kind: layouts})
            if hf_compat.repeated_singly(pixels, [len(row) for row in rows], input_ids):
                raise PruningError(f"prune: {SINGLY}")
        self._pixels.clear()

    def _refuse_late_images(self, embeds: Tensor) -> None:
        if (
            self.stages
            and embeds.shape[1] > 1
            and self._input_ids is not None
            and bool(self.family.is_visual(self.core.config, self._input_ids).any())
        ):
            raise PruningError(
                "prune: got image tokens behind a filled cache (a new image in a later turn, or a prefill in chunks), expected them in "
                "the first, whole prefill; start a new prompt that holds all images."
            )

    def _before_layer(self, i: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        hidden = before = hf_compat.hidden_argument(args, kwargs, i)
        if self._state is None:  # a cache that was filled outside this context
            return None
        cache = hf_compat.cache_argument(kwargs, i)
        if self._prefill is not None:
            hidden = self._prefill.enter_layer(i, hidden, self._state)
            if cache is not None:
                self._prefill.cache = cache
                remember(cache, self._state)
        cut = self._state.at(i)
        if cut is None:
            return None
        if self._patch is None or self._patch[0] is not cut:
            for name in ("attention_mask", "position_embeddings"):
                hf_compat.argument(kwargs, name, i)
            self._patch = cut, self._arguments(cut, i, hidden, kwargs, cache)
        patched = kwargs | {name: value for name, value in self._patch[1].items() if name in kwargs}
        if not args:
            return args, patched | {"hidden_states": hidden}
        return ((hidden, *args[1:]), patched) if hidden is not before else (args, patched)

    def _arguments(self, cut: Cut, i: int, hidden: Tensor, kwargs: dict, cache: object) -> dict[str, object]:
        """What a layer behind `cut` must be told instead of what the model tells all its layers."""
        view = LayerLength(cache, i) if self._prefill is None else LayerLength(None, i)
        found = {
            "position_ids": None,  # read by flash attention only, which at batch 1 would take gaps for packed sequences
            "attention_mask": cut.mask(self.text, hidden, view, self._mask),
            "cache_position": torch.arange(view.length, view.length + hidden.shape[1], device=hidden.device),
        }
        if cut.contiguous:
            positions = cut.position_ids(view.length, hidden.shape[1])
            found["position_embeddings"] = self.text.rotary_emb(hidden, positions.to(hidden.device, non_blocking=True))
        elif self._prefill is not None:
            found["position_embeddings"] = tuple(take(x, cut.on(x.device)[0]) for x in kwargs["position_embeddings"])
        return found

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
        if missing := self._missing_hooks():
            raise PruningError(missing)
        if self._prefill is None:
            return
        prefill, self._prefill = self._prefill, None
        if prefill.cache is None:
            prefill.cache = hf_compat.cache_of(output)
        prefill.verify(self._state)
        if prefill.cache is not None:  # without a cache every step is a prefill of the same images
            self._layouts.clear()
        prefill.cache = None  # measured; records that nobody has read yet must not keep it alive
        self.ledger.add(functools.partial(prefill.records, self._state))
