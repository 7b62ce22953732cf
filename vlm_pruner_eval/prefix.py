"""One prefix for many methods: what a batch makes of the vision tower and of the layers before the first cut is kept, and given back.

Image features, and the states, keys and values of the layers before a cut, do not depend on the method that cuts. The first
forward that computes them leaves them here; a later one over the same batch takes them, and everything else (positions, masks,
the cache, what is added between layers) is done by the model and the hook as ever. Nothing of a batch outlives the context.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from vlm_pruner_eval import hf_compat
from vlm_pruner_eval.cut import LayerLength
from vlm_pruner_eval.encoding import REPEATED
from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.installed import installed_probes, installed_vision
from vlm_pruner_eval.probe import Probe, Seen
from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.vision_probe import Encoded, VisionProbe, vision_probe_for
from vlm_pruner_eval.vlms import family_of

# Of what a vision tower returns, the model reads these; the states of all its layers would fill the memory of a GPU.
_DEEP = "deepstack_features"
_READ = ("pooler_output", _DEEP)


def first_cut(pruner: Pruner, n_layers: int) -> int:
    """Decoder layers that see the whole prompt: K of the first stage, or all of them where nothing is cut."""
    stages = pruner.stages(n_layers)
    return stages[0].layer if stages else n_layers


def rows_together(pruners: Mapping[str, Pruner], n_layers: int, *, mrope: bool, most: int) -> list[list[str]]:
    """Group methods that read a batch in one forward, by name: the one that sees most layers alone, as the others need what it leaves.

    Those of one group cut at the same layers and treat positions alike, at most `most` of them. Of these the ones that keep most come
    first, so that rows of like length meet.
    """
    stages = {name: pruner.stages(n_layers) for name, pruner in pruners.items()}
    first, *others = sorted(pruners, key=lambda name: -first_cut(pruners[name], n_layers))
    kinds: dict[tuple, list[str]] = {}
    for name in others:
        kind = (tuple(stage.layer for stage in stages[name]), pruners[name].position_policy(mrope))
        kinds.setdefault(kind, []).append(name)
    groups = [[first]]
    for kind in kinds.values():
        kind.sort(key=lambda name: -min((stage.share for stage in stages[name]), default=1))
        groups += [kind[i : i + most] for i in range(0, len(kind), most)]
    return groups


def repeated(inputs: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Return the rows of a batch `times` times, all of them and then all again, for `SharedPrefix.reading`: pixels stay as they are."""
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        if name.startswith("pixel_values"):
            found[name] = value
        elif isinstance(value, Tensor):
            found[name] = _repeated(value, times)
        else:
            found[name] = value * times if isinstance(value, list) else value
    return found


@dataclass(frozen=True)
class Kept:
    """The first `depth` decoder layers' work on one batch.

    Attributes
    ----------
    states : Tensor [B, L, D]
        Output of layer depth - 1.
    in_tuple
        Whether the layers of this model wrap their output in a tuple.
    cached : list of (keys, values), each Tensor [B, H_kv, L, d]
        What the layers put into the cache.
    seen
        Queries, keys and rotary embeddings of the last of these layers, which methods may ask for.
    """

    states: Tensor
    in_tuple: bool
    cached: list[tuple[Tensor, Tensor]]
    seen: Seen


class SharedPrefix:
    """A context in which several forwards over ONE batch share what precedes their first cuts.

    ::

        with SharedPrefix(model, [first_cut(pruner, n_layers) for pruner in pruners]) as prefix:
            for pruner in pruners:
                with prefix.reading(first_cut(pruner, n_layers)), prune(model, pruner):
                    model.generate(**inputs)

    The deepest first, so that the others find all that they can take. Once a forward has read the batch, several methods can read it
    in one forward: ``prefix.reading(depth, repeats=n)`` takes the prompts n times, as `prune` does with a list, and the images once.
    What is kept is then given to every repetition. Layers from the first one with sliding-window attention on are
    computed anew, as its cache does not hold all that it saw.

    Parameters
    ----------
    model
        A Hugging Face VLM of a known family.
    depths
        Of every forward to come, the decoder layers before its first cut.
    pruners
        Methods that look at the vision tower, which runs once for all.
    """

    def __init__(self, model: nn.Module, depths: Sequence[int], pruners: Sequence[Pruner] = ()):
        self.family = family_of(model)
        self.core, text = hf_compat.decoder(model)
        self.layers = text.layers
        kinds = list(getattr(text.config, "layer_types", None) or ())
        deepest = kinds.index("sliding_attention") if "sliding_attention" in kinds else len(self.layers)
        reach = [min(depth, deepest) for depth in depths]
        self._wanted = sorted({depth for depth in reach if depth and sum(other >= depth for other in reach) > 1})  # by two forwards or more
        self._replaced: list[tuple[nn.Module, str, object]] = []
        self._probes: dict[int, Probe] = {}
        self._pruners = pruners
        self._vision: VisionProbe | None = None
        self._forget()

    def _forget(self) -> None:
        self._depth: int | None = None
        self._repeats = 1
        self._skip = 0
        self._kept: dict[int, Kept] = {}
        self._entered: tuple[Tensor, ...] | None = None
        self._features: list[tuple[str, dict[str, Any], Any, Encoded | None]] = []

    # ---- installation
    def __enter__(self) -> SharedPrefix:
        with ExitStack() as undo:
            undo.callback(self.__exit__)
            for kind in self.family.kinds:
                self._replace(self.core, f"get_{kind}_features", functools.partial(self._encode, kind))
            for i, layer in enumerate(self.layers[: max(self._wanted, default=0)]):
                self._replace(layer, "forward", functools.partial(self._run_layer, i))
            for depth in self._wanted:
                self._probes[depth] = Probe(self.layers[depth - 1].self_attn, queries=True)
            self._vision = vision_probe_for(self.family.tower(self.core), self._pruners)
            undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        for probe in (*self._probes.values(), self._vision):
            for handle in [] if probe is None else probe.handles:
                handle.remove()
        self._vision = None
        for owner, name, before in reversed(self._replaced):
            owner.__dict__.pop(name, None)
            if before is not None:
                owner.__dict__[name] = before
        self._probes.clear()
        self._replaced.clear()
        self._forget()

    def _replace(self, owner: nn.Module, name: str, function: Callable) -> None:
        original = getattr(owner, name)
        self._replaced.append((owner, name, owner.__dict__.get(name)))
        owner.__dict__[name] = functools.wraps(original)(functools.partial(function, original))

    @contextmanager
    def reading(self, depth: int, *, repeats: int = 1) -> Iterator[None]:
        """One forward over the batch, whose first cut is in front of decoder layer `depth`; over its prompts `repeats` times."""
        self._depth, self._skip = depth, max((kept for kept in self._kept if kept <= depth), default=0)
        self._repeats = repeats
        if repeats > 1:
            self.core.__dict__[REPEATED] = repeats, lambda kind, call: self._known(kind, call)[0]
        try:
            yield
        finally:
            self._depth = None
            self.core.__dict__.pop(REPEATED, None)
            for probe in self._probes.values():
                probe.clear()

    # ---- the vision tower
    def _encode(self, kind: str, original: Callable, *args: object, **kwargs: object) -> object:
        """The features of these very pixels, computed once."""
        if self._depth is None:
            return original(*args, **kwargs)
        self._refuse_merging()
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        call = {name: value for name, value in bound.items() if name != "kwargs"} | bound.get("kwargs", {})
        if self._repeats > 1:
            _, features, encoded = self._known(kind, call)
            self._show(encoded)
            return _copied(features, self._repeats)
        for known_kind, known, features, encoded in self._features:
            if known_kind == kind and _equal(known, call):
                self._show(encoded)
                return _copied(features)
        if self._vision is not None:
            self._vision.begin()
        output = original(*args, **kwargs)
        seen = None if self._vision is None else self._vision.end(kind, ())
        self._features.append((kind, call, _copied(output), seen))
        return output

    def _show(self, encoded: Encoded | None) -> None:
        """Tell the hook of this forward what the vision tower did."""
        probe = installed_vision(self.core)
        if probe is None:
            return
        if encoded is None:
            raise PruningError(
                "shared prefix: got a method that looks at the vision tower, expected it among the `pruners` of SharedPrefix, which keeps "
                "what such methods look at."
            )
        probe.show(encoded)

    def _refuse_merging(self) -> None:
        """Raise a PruningError for a method that makes other features of the same images."""
        probe = installed_vision(self.core)
        if probe is not None and probe.merging is not None:
            raise PruningError(
                "shared prefix: got a method that merges patches inside the vision tower, whose features are its own; expected it to read "
                "the batch outside of a shared prefix."
            )

    def _known(self, kind: str, call: dict[str, Any]) -> tuple[dict[str, Any], Any, Encoded | None]:
        """Return call, features and what was seen of these pixels; sizes and grids of `call` are those of repeated prompts."""
        for known_kind, known, features, encoded in self._features:
            if known_kind == kind and _equal(_pixels(known), _pixels(call)):
                return known, features, encoded
        raise PruningError("shared prefix: got other images than those of the batch, expected that one forward has read it before.")

    # ---- the decoder
    def _run_layer(self, i: int, original: Callable, *args: object, **kwargs: object) -> object:
        """Layer `i`: skipped where its work is kept, kept where it is wanted, and left alone while decoding."""
        if not self._depth:
            return original(*args, **kwargs)
        cache = hf_compat.cache_argument(kwargs, i)
        if LayerLength(cache, i).length:
            return original(*args, **kwargs)
        hidden = hf_compat.hidden_argument(args, kwargs, i)
        if i == 0:
            self._check(hidden, hf_compat.argument(kwargs, "position_embeddings", i), cache)
        if i < self._skip:
            return self._give_back(i, hidden, cache)
        output = original(*args, **kwargs)
        if i + 1 in self._wanted and i + 1 <= self._depth:
            self._keep(i + 1, output, cache)
        return output

    def _check(self, hidden: Tensor, rope: tuple[Tensor, Tensor], cache: object) -> None:
        """Refuse to answer one batch with another one's prefix."""
        if cache is None:
            raise PruningError("shared prefix: got a forward without a cache, expected generate() with use_cache=True.")
        entered = (hidden, *rope)
        if self._entered is None and self._repeats == 1:
            self._entered = entered
        elif self._entered is None or not all(map(self._is_repeated, self._entered, entered)):
            raise PruningError(
                f"shared prefix: got embeddings of shape {tuple(hidden.shape)} that are not those whose prefix is kept (shape "
                f"{tuple(self._entered[0].shape)}), expected the same batch in every forward; open a new context for each batch."
            )

    def _is_repeated(self, once: Tensor, found: Tensor) -> bool:
        """Tell if `found` [..., repeats * B, L, d] is `once` [..., B, L, d] again and again, bit by bit; or both [..., 1, L, d]."""
        if self._repeats == 1 or once.shape == found.shape:
            return _equal(once, found)
        if found.shape[-3] != self._repeats * once.shape[-3]:
            return False
        alike = [(part == once).all() for part in found.chunk(self._repeats, dim=-3)]
        return bool(torch.stack(alike).all())

    def _keep(self, depth: int, output: Tensor | tuple, cache: Any) -> None:
        in_tuple = isinstance(output, tuple)
        states = (output[0] if in_tuple else output).clone()  # some models add to it in place before the next layer
        cached = [(layer.keys, layer.values) for layer in cache.layers[:depth]]
        self._kept[depth] = Kept(states, in_tuple, cached, self._probes[depth].seen())

    def _give_back(self, i: int, hidden: Tensor, cache: Any) -> Tensor | tuple:
        kept = self._kept[self._skip]
        cache.update(*(_repeated(part, self._repeats) for part in kept.cached[i]), i)
        if i + 1 < self._skip:
            states = hidden  # nobody reads it: the layers up to the last one pass it on
        else:
            states = _repeated(kept.states, self._repeats) if self._repeats > 1 else kept.states.clone()
            probe = installed_probes(self.core).get(self._skip)
            if probe is not None:
                probe.show(kept.seen)
        return (states,) if kept.in_tuple else states


def _equal(one: object, other: object) -> bool:
    """Tell if two nested structures hold the same values; of tensors, bit by bit."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        alike = isinstance(one, Tensor) and isinstance(other, Tensor) and one.device == other.device and one.dtype == other.dtype
        return alike and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _pixels(call: dict[str, Any]) -> list[Any]:
    """Pixels among the arguments of a vision tower."""
    return [value for name, value in sorted(call.items()) if name.startswith("pixel_values")]


def _repeated(tensor: Tensor, repeats: int) -> Tensor:
    """Rows [B, ...] again and again: [repeats * B, ...]."""
    return tensor if repeats == 1 else tensor.repeat(repeats, *[1] * (tensor.dim() - 1))


def _copied(features: Any, repeats: int = 1) -> Any:
    """The same tensors in containers of their own, which the model may change, without what it does not read; all images repeated."""
    if isinstance(features, ModelOutput):
        held = {field.name: getattr(features, field.name) for field in dataclasses.fields(features) if field.name in _READ}
        of_layers = {name: _copied_layers(value, repeats) for name, value in held.items() if name == _DEEP}
        return type(features)(**{name: _copied(value, repeats) for name, value in held.items()} | of_layers)
    if isinstance(features, tuple) and len(features) == 2 and not isinstance(features[0], Tensor):
        return _copied(features[0], repeats), _copied_layers(features[1], repeats)  # Qwen3-VL's, before it had names for them
    if isinstance(features, (list, tuple)):
        return type(features)(map(_copied, features)) * repeats  # one an image
    return _repeated(features, repeats) if isinstance(features, Tensor) else features


def _copied_layers(features: Any, repeats: int) -> Any:
    """The same of what a vision tower gives to several decoder layers: a tensor, or one an image, for each."""
    return features if features is None else [_copied(layer, repeats) for layer in features]
