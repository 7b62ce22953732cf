"""Made-up images for the methods that cut at several depths, and their stages one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from vlm_pruner_eval import Pruner, Selection, VisualTokens, get_pruner
from vlm_pruner_eval.types import QuestionTokens, VisionTokens


@dataclass(frozen=True)
class Scene:
    """An image of `rows` x `cols` tokens with a text behind it; `coarse` numbers repeat and tie."""

    seed: int
    rows: int
    cols: int
    n_text: int = 6
    width: int = 5
    coarse: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def n_visual(self) -> int:
        return self.rows * self.cols

    def numbers(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + len(shape) * 1000 + sum(shape))
        values = torch.randn(*shape, generator=generator)
        return (values.round() if self.coarse else values).to(self.dtype)

    def tokens(self, ids: Tensor | None = None, states: Tensor | None = None, **given: Any) -> VisualTokens:
        """What is left of the image: tokens that were numbered `ids`, with other states if they were merged."""
        ids = torch.arange(self.n_visual) if ids is None else ids
        attention = self.numbers(self.n_text, self.n_visual).float().softmax(-1)[:, ids]
        tower = self.numbers(3, self.n_visual).float().softmax(-1)
        return VisualTokens(
            self.numbers(self.n_visual, self.width)[ids] if states is None else states,
            grid=(self.rows, self.cols),
            coords=torch.stack([torch.zeros_like(ids), ids // self.cols, ids % self.cols], -1),
            own_attention=self.numbers(self.n_visual).float().softmax(0)[ids],
            text_attention=lambda rows: attention if rows is None else attention[rows],
            question=QuestionTokens(
                image_embeddings=self.numbers(self.n_visual, self.width)[ids], text_embeddings=self.numbers(self.n_text, self.width)
            ),
            vision=VisionTokens(cls_attention={layer: tower.roll(layer, 1)[:, ids] for layer in (5, -2, -1)}),
            ids=ids,
            n_original=self.n_visual,
            **given,
        )


SCENES = st.builds(
    Scene,
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    n_text=st.integers(0, 6),
    width=st.integers(1, 9),
    coarse=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)


def method_named(name: str, rate: object = "2/3", **params: object) -> Pruner:
    return get_pruner(name, pruning_rate=rate, **params)


def all_stages(method: Pruner, scene: Scene, n_layers: int = 32) -> list[Selection]:
    """Every stage on what the one before left, as the hook does it."""
    ids, states, memory, found = torch.arange(scene.n_visual), None, {}, []
    for number, stage in enumerate(method.stages(n_layers)):
        keep = min(len(ids), method.keep_at(stage, scene.n_visual))
        tokens = scene.tokens(ids, states, stage=number, memory=memory)
        found.append(method.select(tokens, keep))
        ids = ids[found[-1].keep]
        states = tokens.hidden_states[found[-1].keep] if found[-1].hidden_states is None else found[-1].hidden_states
    return found
