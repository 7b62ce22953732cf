"""Tiny random VLMs and prompts, made from config objects: no download, a fraction of a second each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

VOCAB, IMAGE, PAD = 120, 100, 0
N_LAYERS = 5
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 16,
}

Segments = Sequence[int | str]  # a number of text tokens, or "i<k>" for image k


@dataclass(frozen=True)
class TinyFamily:
    """How to make a tiny model of a family, and a prompt for it. One entry here puts a family into every behaviour test."""

    model_class: str
    config: Callable[[], object]
    image_tokens: Callable[[int], int]
    features: Callable[[list[int], torch.dtype], dict[str, Tensor]]


def _pixels(k: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + k))


def _llava_config() -> object:
    return transformers.LlavaConfig(
        vision_config=dict(CLIP),
        text_config=dict(TEXT, model_type="llama"),
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        image_seq_length=16,
    )


FAMILIES = {
    "llava": TinyFamily(
        model_class="LlavaForConditionalGeneration",
        config=_llava_config,
        image_tokens=lambda k: 16,
        features=lambda images, dtype: {"pixel_values": torch.stack([_pixels(k, 3, 56, 56) for k in images]).to(dtype)},
    ),
}


def build(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model whose random weights are large enough that a wrong mask or position shows in the logits."""
    tiny, generator = FAMILIES[family], torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for the parameters that are left as the model made them
        model = getattr(transformers, tiny.model_class)._from_config(tiny.config(), attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                fan_in = parameter.shape[-1] if parameter.dim() == 2 else parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.6 / math.sqrt(fan_in)))
            elif "bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        table = model.get_input_embeddings().weight
        table.copy_(torch.randn(table.shape, generator=generator))
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD, eos_token_id=None, bos_token_id=1)
    return model.to(dtype).eval()


def prompts(family: str, samples: Sequence[Segments], dtype: torch.dtype = torch.float32, *, pad: str = "left") -> dict[str, Tensor]:
    """A padded batch of prompts: input_ids, attention_mask, and the images' features."""
    rows, images = [], []
    for sample in samples:
        generator = torch.Generator().manual_seed(sum(map(ord, str(list(sample)))))
        row: list[int] = []
        for segment in sample:
            if isinstance(segment, int):
                row += torch.randint(5, 95, (segment,), generator=generator).tolist()
            else:
                images.append(int(segment[1:]))
                row += [IMAGE] * FAMILIES[family].image_tokens(images[-1])
        rows.append(row)
    length = max(map(len, rows))
    fill = [([PAD] * (length - len(row)), [0] * (length - len(row))) for row in rows]
    left = pad == "left"
    batch = {
        "input_ids": torch.tensor([ids + row if left else row + ids for row, (ids, _) in zip(rows, fill, strict=True)]),
        "attention_mask": torch.tensor(
            [mask + [1] * len(row) if left else [1] * len(row) + mask for row, (_, mask) in zip(rows, fill, strict=True)]
        ),
    }
    return batch | (FAMILIES[family].features(images, dtype) if images else {})


def generate(model: nn.Module, inputs: dict[str, Tensor], n: int = 6, **kwargs: object) -> object:
    """Greedy decoding of exactly `n` tokens, with the logits of every step; never an image token."""
    settings = {"do_sample": False, "suppress_tokens": [IMAGE]} | kwargs
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=n, return_dict_in_generate=True, output_logits=True, **settings)


def step_logits(output: object) -> Tensor:
    """Logits [B, n, vocabulary] of the generated tokens."""
    return torch.stack(output.logits, 1)


@dataclass(frozen=True)
class View:
    """What one decoder layer may use in `masked_recompute`.

    `seen` [B, L] bool: positions that it may look at. `positions` [B, L + n]: position ids other than the model's own.
    `edit`: applied to its input [B, L + n, D] (merged states).
    """

    seen: Tensor
    positions: Tensor | None = None
    edit: Callable[[Tensor], Tensor] | None = None


def masked_recompute(model: nn.Module, inputs: dict[str, Tensor], views: dict[int, View], new: Tensor | None = None) -> Tensor:
    """Logits [B, L + n, vocabulary] of the same rule without cutting anything: the definition of pruning, the slow way.

    The full-length sequence runs through every layer without a cache; layer i may not look at the positions that its view
    excludes. Rows of excluded positions hold meaningless values.
    """
    x = dict(inputs)
    n_new = 0 if new is None else new.shape[1]
    if new is not None:
        x["input_ids"] = torch.cat([x["input_ids"], new], 1)
        x["attention_mask"] = torch.cat([x["attention_mask"], x["attention_mask"].new_ones(len(new), n_new)], 1)
    attended = x["attention_mask"].bool()
    x["position_ids"] = (attended.long().cumsum(-1) - 1).clamp(min=0)
    causal = torch.ones(attended.shape[1], attended.shape[1]).tril().bool()
    text, dtype = model.model.language_model, next(model.parameters()).dtype

    def hook(view: View):
        visible = torch.cat([view.seen, view.seen.new_ones(len(attended), n_new)], 1) & attended
        allowed = causal[None, None] & visible[:, None, None, :]
        bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

        def apply(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden, changed = args[0], {"attention_mask": bias}
            if view.positions is not None:
                changed["position_embeddings"] = text.rotary_emb(hidden, view.positions)
            return ((view.edit(hidden) if view.edit else hidden, *args[1:]), kwargs | changed)

        return apply

    handles = [text.layers[i].register_forward_pre_hook(hook(view), with_kwargs=True) for i, view in views.items()]
    try:
        with torch.no_grad():
            return model(**x, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def seen_after(inputs: dict[str, Tensor], kept_positions: Sequence[Sequence[int]]) -> Tensor:
    """Bool [B, L]: attended text, and of the visual tokens only `kept_positions` of each row."""
    seen = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    for row, kept in zip(seen, kept_positions, strict=True):
        row[list(kept)] = True
    return seen


def views_from(records: Sequence[object], inputs: dict[str, Tensor]) -> dict[int, View]:
    """The views that one prefill's records describe, for methods with one stage."""
    view = View(seen_after(inputs, [record.kept_positions for record in records]))
    return dict.fromkeys(range(records[0].layer, N_LAYERS), view)
