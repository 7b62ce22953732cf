"""Made-up tokens of a vision tower: a seed and a shape in, everything that a method of the tower may read out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from vlm_pruner_eval import VisualTokens
from vlm_pruner_eval.types import VisionTokens

LAYERS = (8, -2, -1)


def bent(states: Tensor) -> Tensor:
    """A projector that is not linear, so that merging before it is not merging behind it."""
    return torch.tanh(states) * 3 + states[:, :1] ** 2


@dataclass(frozen=True)
class Scene:
    """Shrunk by hypothesis in its shape; numbers come from torch. `coarse`: repeats and exact ties; `flat`: attention is constant."""

    seed: int = 0
    rows: int = 4
    cols: int = 5
    width: int = 8
    heads: int = 2
    coarse: bool = False
    flat: bool = False
    cls: bool = True

    @property
    def n_visual(self) -> int:
        return self.rows * self.cols

    def numbers(self, name: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100 + name)
        values = torch.randn(*shape, generator=generator)
        return values.round() if self.coarse else values

    def attention(self, name: int, *shape: int) -> Tensor:
        values = (self.numbers(name, *shape) * 2).softmax(-1)
        return torch.full_like(values, 1 / 64) if self.flat else values

    def vision(self) -> VisionTokens:
        n, heads = self.n_visual, self.heads
        each = dict(enumerate(LAYERS))
        flat = 0 if self.flat else 1
        return VisionTokens(
            states=self.numbers(1, n, self.width),
            project=bent,
            cls_state=self.numbers(2, self.width) if self.cls else None,
            cls_attention={layer: self.attention(10 + i, heads, n) for i, layer in each.items()},
            received_attention={layer: self.attention(20 + i, n) for i, layer in each.items()},
            keys={layer: self.numbers(30 + i, n, heads, 3) for i, layer in each.items()},
            cls_query={layer: self.numbers(40 + i, heads, 3) * 2 * flat for i, layer in each.items()},
            cls_key={layer: self.numbers(50 + i, heads, 3) for i, layer in each.items()},
        )

    def tokens(self, image: str | None = None, start: int = 5) -> VisualTokens:
        vision = self.vision()
        return VisualTokens(
            bent(vision.states),
            grid=(self.rows, self.cols),
            vision=vision,
            positions=torch.arange(self.n_visual) + start,
            image=image,
            sample_id=f"scene {self.seed}",
        )


def changed(tokens: VisualTokens, **fields: object) -> VisualTokens:
    """The same tokens with other fields of `vision`."""
    return replace(tokens, vision=replace(tokens.vision, **fields))


SCENES = st.builds(
    Scene,
    seed=st.integers(0, 10**5),
    rows=st.integers(1, 7),
    cols=st.integers(1, 7),
    width=st.integers(1, 6),
    heads=st.integers(1, 3),
    coarse=st.booleans(),
    flat=st.booleans(),
    cls=st.booleans(),
)
