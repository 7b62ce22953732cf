"""Inputs and settings that can't be pruned rightly, each a sentence before anything is computed with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from vlm_pruner_eval import hf_compat
from vlm_pruner_eval.cut import Cut, CutState
from vlm_pruner_eval.errors import ConfigError, PruningError
from vlm_pruner_eval.pruners.base import FROM_PREVIOUS_LAYER, Pruner
from vlm_pruner_eval.types import Stage
from vlm_pruner_eval.vision_probe import looks_at_vision
from vlm_pruner_eval.vlms.family import Family, Layout
from vlm_pruner_eval.vlms.parts.scopes import SINGLY
from vlm_pruner_eval.vlms.parts.towers import Tower


def refuse_no_questions(pruners: Sequence[Pruner], questions: Sequence[str] | None) -> None:
    """Raise a ConfigError for a method that compares tokens with a question which it was not told."""
    asking = [pruner.name for pruner in pruners if "question.clip" in pruner.needs]
    if asking and questions is None:
        raise ConfigError(
            f"prune: {', '.join(asking)} looks at the question, got no questions; pass questions=[...], one text a prompt, without the "
            "system prompt and the template."
        )


def refuse_no_pruner(pruner: object) -> None:
    """Raise a ConfigError for what can't prune inside a model."""
    if not isinstance(pruner, Pruner):
        raise ConfigError(
            f"prune: got {pruner!r} ({type(pruner).__name__}), expected a Pruner; build one with get_pruner(name, pruning_rate=...)."
        )
    if pruner.before_model:
        raise ConfigError(
            f"prune: got method {pruner.name}, which makes the images smaller before the model sees them, so there is nothing to prune "
            f"inside it; use it through lmms-eval or a sweep (method={pruner.name}), or take another method."
        )


def problems_of(
    methods: Sequence[tuple[Pruner, Sequence[Stage]]], text: nn.Module, *, mrope: bool, tower: Tower | None = None
) -> list[str]:
    """Return sentences about layers, positions and towers that pruners ask for and this model, or one batch, does not have."""
    found = [sentence for pruner, stages in methods for sentence in _problems_of_one(pruner, stages, text, mrope=mrope)]
    found += [sentence for pruner, _ in methods for sentence in _problems_of_tower(pruner, tower)]
    kinds = {(tuple(stage.layer for stage in stages), pruner.position_policy(mrope)) for pruner, stages in methods}
    if len(methods) > 1 and any(pruner.acts_in_tower for pruner, _ in methods):
        found.append("prune: got a method that acts inside the vision tower together with others, expected it alone in its batch.")
    if len(kinds) != 1:
        said = "; ".join(f"layers {list(layers)}, {positions} positions" for layers, positions in sorted(kinds)) or "none"
        found.append(f"prune: got methods of {len(kinds)} kinds for one batch ({said}), expected the same layers and positions of all.")
    return found


def _problems_of_tower(pruner: Pruner, tower: Tower | None) -> Iterator[str]:
    """Say what a method looks at and this vision tower does not have."""
    if not looks_at_vision(pruner.needs):
        return
    if tower is None:
        yield f"{pruner.name}: looks at the vision tower, but of this model's it is not known where its layers and tokens are."
    elif "question.clip" in pruner.needs and (tower.projector is None or tower.adapted):
        yield (
            f"{pruner.name}: text_tower: got {pruner.text_tower!r}, but this model's vision tower is none of CLIP's, whose states its "
            "projections take; pass text_tower=llm, the adapted stand-in."
        )
    elif pruner.acts_in_tower and (tower.projector is None or tower.adapted):
        yield f"{pruner.name}: merges patches inside a CLIP tower; of this model's vision tower nothing is published."
    elif "vision.cls_query" in pruner.needs and not getattr(tower, "has_cls", False):
        yield f"{pruner.name}: reads the query of the CLS token, which this vision tower does not have; no stand-in is published."


def _problems_of_one(pruner: Pruner, stages: Sequence[Stage], text: nn.Module, *, mrope: bool) -> list[str]:
    name = pruner.name or type(pruner).__name__
    n = len(text.layers)
    found = []
    order = [stage.layer for stage in stages]
    for layer in order:
        if not 0 <= layer < n:
            found.append(f"{name}: layer: got {layer}, expected 0 to {n - 1}: this model has {n} decoder layers.")
    if order != sorted(set(order)):
        found.append(f"{name}: stages: got layers {order}, expected them ascending without repeats.")
    if order and order[0] == 0 and pruner.needs_now(0, {}) & FROM_PREVIOUS_LAYER:
        wanted = ", ".join(sorted(pruner.needs_now(0, {}) & FROM_PREVIOUS_LAYER))
        found.append(f"{name}: layer: got 0, but {wanted} come from the layer before; use layer >= 1.")
    if mrope and pruner.position_policy(mrope) == "contiguous":
        found.append(f"{name}: positions=contiguous: this model has multi-dimensional rotary positions; use positions=original.")
    kinds = list(getattr(text.config, "layer_types", None) or ())
    if order and "sliding_attention" in kinds[order[0] :]:
        found.append(f"{name}: layers from {order[0]} on use sliding-window attention, which can't be pruned; disable it in the config.")
    return found


# ---- a prompt that begins
def refuse_prepared(mask: object, cache: object) -> None:
    """Raise a PruningError for a mask or a cache that is made for one length of all layers."""
    if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
        raise PruningError(
            "prune: got a prepared attention mask (as static caches make), expected the 2-D padding mask [B, L]; use a dynamic cache."
        )
    if hf_compat.is_static(cache):
        raise PruningError(
            "prune: got a static cache, whose layers can't hold different lengths; use the default cache (cache_implementation=None)."
        )


def refuse_strange_ids(input_ids: Tensor | None, embeds: Tensor) -> None:
    """Raise a PruningError unless there are token ids [B, L] of the embeddings [B, L, D]."""
    if input_ids is None:
        raise PruningError(
            "prune: got inputs_embeds alone, expected input_ids: visual tokens are found through them. Pass input_ids and pixel_values."
        )
    if input_ids.shape != embeds.shape[:2]:
        raise PruningError(
            f"prune: got input_ids of shape {tuple(input_ids.shape)} and embeddings of shape {tuple(embeds.shape)}, expected one embedding "
            "for each id; something changed the sequence before the language model."
        )


def refuse_chunks(*arguments: object, size: int | None) -> None:
    """Raise a PruningError if generate() is to read the prompt in chunks, so that a method would not see its end.

    Parameters
    ----------
    arguments
        Of generate(), configurations among them.
    size
        Tokens of a chunk, where it was given by itself.
    """
    sizes = [size, *(getattr(argument, "prefill_chunk_size", None) for argument in arguments)]
    size = next((size for size in sizes if size is not None), None)
    if size is not None:
        raise PruningError(
            f"prune: got prefill_chunk_size={size}, expected a prompt that is read whole: methods look at its last token. Leave it out."
        )


def refuse_repeated_singly(
    family: Family, config: object, input_ids: Tensor, pixels: Mapping[str, object], layouts: Mapping[str, list[Layout]]
) -> None:
    """Raise a PruningError if rows with several images were given each other's, see `hf_compat.REPEATS_IMAGES_SINGLY`."""
    for kind, held in pixels.items():
        of_kind = layouts.get(kind, [])
        if not isinstance(held, Tensor) or len(held) != len(of_kind):
            continue  # patches of all images in one row, as Qwen has them, whose classes repeat them rightly
        token = family.token_id(config, kind)
        rows = family.scopes(config, torch.where(input_ids == token, token, -1), {kind: of_kind})
        if hf_compat.repeated_singly(held, [len(row) for row in rows], input_ids):
            raise PruningError(f"prune: {SINGLY}")


def refuse_read_positions(
    cut: Cut, read: Sequence[Sequence[int]], labels: Tensor | None, is_visual: Tensor, sample_ids: Sequence[str]
) -> None:
    """Raise a PruningError if something is read off a position that `cut` dropped.

    Parameters
    ----------
    read
        Positions of each row that new tokens are read off: the last one of its prompt, and its last one.
    labels : Tensor [B, L] or None
        A loss reads each label off the position before it; -100 and image tokens are not read.
    is_visual : Tensor [B, L] bool
    """
    for b, sample_id in enumerate(sample_ids):
        kept = torch.zeros(cut.length, dtype=torch.bool)
        kept[cut.positions_of(b)] = True
        if not bool(kept[list(read[b])].all()):
            raise PruningError(
                f"prune: sample {sample_id!r} ends with a visual token, which was removed, but the answer is read off the last token; put "
                "text behind the image, as chat templates do."
            )
        if labels is not None:
            labelled = (labels[b, 1:] != -100) & ~is_visual[b, 1:] & is_visual[b, :-1]
            if bool((labelled & ~kept[:-1]).any()):
                raise PruningError(
                    f"prune: sample {sample_id!r} has a label right behind an image, whose loss is read off a visual token that was "
                    "removed; set that label to -100."
                )


# ---- a prompt that goes on
def refuse_strange_cache(cache: object) -> None:
    """Raise a PruningError for a cache that can't tell how long its layers are, as those of serving code with pages."""
    if cache is not None and not (hasattr(cache, "get_seq_length") and hasattr(cache, "layers")):
        raise PruningError(
            f"prune: got a cache of type {type(cache).__name__}, expected one of transformers with a length for each layer (DynamicCache)."
        )


def refuse_late_images(n_new: int, holds_images: bool) -> None:
    """Raise a PruningError for images behind a filled cache."""
    if n_new > 1 and holds_images:
        raise PruningError(
            "prune: got image tokens behind a filled cache (a new image in a later turn, or a prefill in chunks), expected them in "
            "the first, whole prefill; start a new prompt that holds all images."
        )


def refuse_foreign_cache(state: CutState | None, text: nn.Module, first: int, mask: Tensor | None, n_new: int, past: int) -> None:
    """Raise a PruningError for a filled cache that this context can't go on with.

    Parameters
    ----------
    state
        The cuts that the cache remembers; None of a cache that no pruned prompt filled.
    first
        Decoder layer of the context's first stage.
    mask : Tensor [B, past + n_new] or None
    past
        Tokens that the prompt and its answer had so far, counted before any cut.
    """
    if state is None:
        raise PruningError(
            "prune: got a cache that was filled without this context, or that lost its record (rebuilt from its tensors), expected one "
            "whose prompt was read inside; read the prompt again."
        )
    if not state.cuts:
        return
    if state.context is not None and state.context.text is not text:
        raise PruningError("prune: got a cache that a prompt of another model filled, expected one of this model.")
    if state.cuts[0].layer < first:
        raise PruningError(
            f"prune: got a cache that was cut at layer {state.cuts[0].layer}, but this context acts from layer {first} on, expected the "
            "method that cut it."
        )
    if mask is not None and mask.dim() == 2 and mask.shape[1] != past + n_new:
        raise PruningError(
            f"prune: got an attention mask of {mask.shape[1]} tokens, expected {past + n_new}: the whole prompt as it was passed, dropped "
            "tokens included, and all that follows."
        )
