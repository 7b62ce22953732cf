"""Attention, keys and states of vision towers, read from the inputs of their layers and aligned with the tokens of each image.

Nothing of a forward is repeated but projections of queries and keys; whole attention matrices are made for a view at a time, and
only where every query counts.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vlm_pruner_eval.vlms.parts.layout import Layout

# Layer -> what it was called with: its input, and keyword arguments.
Entered = Mapping[int, tuple[Tensor, Mapping[str, Any]]]


@dataclass(frozen=True)
class Tower:
    """A vision tower of a loaded model.

    Attributes
    ----------
    blocks
        Its layers.
    reads
        Layer whose output the projector reads, counted from the end: -1 the last.
    adapted
        Why its values are stand-ins for those that methods were published with; None where they are the same.
    projector
        Module that takes what `VisionTokens.states` holds; None where states are taken behind it.
    """

    blocks: nn.ModuleList
    reads: int = -1
    adapted: str | None = None
    projector: nn.Module | None = None

    def number(self, layer: int) -> int:
        """Number of a layer as methods name it: -2 is the layer that the projector reads, as in LLaVA-1.5; -1 the last.

        Numbers from 0 on are those of CLIP-L's 24 layers; in a tower that is not that deep, the same share of the depth is meant.
        """
        n = len(self.blocks)
        if layer == -2:
            return n + self.reads
        if layer < 0:
            return max(0, n + layer)
        return layer if layer < n else min(n - 1, layer * n // 24)


@dataclass(frozen=True)
class GridTower(Tower):
    """A tower that sees each view as one grid of patches, behind a CLS token or not: CLIP, SigLIP, InternViT."""

    side: int = 24
    has_cls: bool = True

    def cls_attention(self, entered: Entered, layer: int, layouts: Sequence[Layout], groups: Tensor | None = None) -> list[Tensor]:
        """Of each image Tensor [H, V]; without a CLS token [1, V], the attention that tokens receive.

        Parameters
        ----------
        groups : Tensor [views, N] or None
            The token that each patch became before this layer.
        """
        if not self.has_cls:
            return [values[None] for values in self.received_attention(entered, layer, layouts)]
        q, k, scale = self._projected(entered, layer, first=1)
        weights = (q @ k.transpose(-1, -2) * scale).softmax(-1, dtype=torch.float32)[:, :, 0, 1:]  # [views, H, N]
        if groups is not None:
            weights = weights.gather(2, groups[:, None].expand(-1, weights.shape[1], -1))
        return [found.T for found in self._aligned(weights.transpose(1, 2), layouts)]

    def received_attention(self, entered: Entered, layer: int, layouts: Sequence[Layout]) -> list[Tensor]:
        """Of each image Tensor [V]."""
        q, k, scale = self._projected(entered, layer)
        views = zip(q, k, strict=True)
        received = [(one @ other.transpose(-1, -2) * scale).softmax(-1, dtype=torch.float32).mean((0, 1)) for one, other in views]
        return [found[:, 0] for found in self._aligned(torch.stack(received)[:, self.has_cls :, None], layouts)]

    def keys(self, entered: Entered, layer: int, layouts: Sequence[Layout]) -> list[Tensor]:
        """Of each image Tensor [V, H, d]."""
        _, k, _ = self._projected(entered, layer, first=0)
        n_heads, _, width = k.shape[1:]
        flat = k[:, :, self.has_cls :].transpose(1, 2).flatten(2)
        return [found.unflatten(1, (n_heads, width)) for found in self._aligned(flat, layouts)]

    def cls_rows(self, entered: Entered, layer: int) -> tuple[Tensor, Tensor]:
        """Query and key of each view's CLS token, Tensors [views, H, d]."""
        q, k, _ = self._projected(entered, layer, first=1)
        return q[:, :, 0], k[:, :, 0]

    def aligned_states(self, states: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
        """What the projector was given, [views, N, C], with a CLS token before it or not, as Tensor [V, C] of each image."""
        return self._aligned(states[:, states.shape[1] - self.side**2 :], layouts)

    def aligned_groups(self, groups: Tensor, layout: Layout) -> Tensor:
        """Numbers [views, N] of tokens that patches became as numbers [V] through all views; -1 of newlines."""
        firsts = torch.cat([groups.new_zeros(1), groups.amax(1) + 1]).cumsum(0)[:-1]
        through = (groups + firsts[:, None]).flatten()
        patches = self._patches(layout, self.side, self.side).to(groups.device, non_blocking=True)
        return torch.where(patches < 0, -1, through[patches])

    def views(self, layout: Layout) -> Tensor:
        """Number [V] of the view that each token is in; -1 of newlines."""
        patches = self._patches(layout, self.side, self.side)
        return torch.where(patches < 0, -1, patches // self.side**2)

    def n_views(self, layout: Layout) -> int:
        """Views that the tower saw of an image or video."""
        if layout.tiles is not None:
            return 1 + layout.tiles[0] * layout.tiles[1]
        return int(layout.coords[:, 0].max()) + 1

    def _projected(self, entered: Entered, layer: int, first: int | None = None) -> tuple[Tensor, Tensor, float]:
        """Queries [views, H, m, d], of the `first` tokens or of all, keys [views, H, n, d], and the scale of their products."""
        block, (hidden, _) = self.blocks[layer], entered[layer]
        attention = getattr(block, "self_attn", None) or block.attention
        norm = getattr(block, "layer_norm1", None) or block.layernorm_before
        normed = norm(hidden)
        found = []
        for name, rows in (("q", normed[:, :first]), ("k", normed)):
            projected = getattr(attention, f"{name}_norm", nn.Identity())(getattr(attention, f"{name}_proj")(rows))
            found.append(projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2))
        return found[0], found[1], attention.scale

    def _aligned(self, values: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
        """Values [views, N, c] of patches as values [V, c] of each image's tokens: means where tokens are pooled, 0 of newlines."""
        parts = values.split([self.n_views(layout) for layout in layouts])
        return [self._of_image(part, layout) for part, layout in zip(parts, layouts, strict=True)]

    def _of_image(self, values: Tensor, layout: Layout) -> Tensor:
        rows, cols = (self.side, self.side) if layout.tiles is not None else layout.grid
        if (rows, cols) != (self.side, self.side):
            planes = values.float().transpose(1, 2).unflatten(2, (self.side, self.side))
            values = adaptive_avg_pool2d(planes, (rows, cols)).flatten(2).transpose(1, 2).to(values.dtype)
        flat = torch.cat([values.flatten(0, 1), values.new_zeros(1, values.shape[-1])])  # the last row for newline tokens
        return flat[self._patches(layout, rows, cols).to(flat.device, non_blocking=True)]

    def _patches(self, layout: Layout, rows: int, cols: int) -> Tensor:
        """Number [V] of each token's patch among those of all views of its image; -1 of a newline token."""
        frame, row, col = layout.coords.round().long().unbind(-1)
        number = frame * rows * cols + row * cols + col
        if layout.tiles is not None:
            view = 1 + row // rows * layout.tiles[1] + col // cols
            number = torch.where(frame > 0, view * rows * cols + row % rows * cols + col % cols, number)
        return torch.where(row < 0, torch.full_like(number, -1), number)


@dataclass(frozen=True)
class SequenceTower(Tower):
    """A tower that sees all images as one sequence of patches, several of which make one token: Qwen-VL.

    Attributes
    ----------
    merge
        Patches along each side of a token; they stand side by side in the sequence.
    window
        Tokens along each side of an attention window, whose order the sequence has; None: the order of the tokens.
    """

    merge: int = 2
    window: int | None = None

    def cls_attention(self, entered: Entered, layer: int, layouts: Sequence[Layout]) -> list[Tensor]:
        """Of each image the attention that tokens receive, Tensor [1, V]: there is no CLS token."""
        return [values[None] for values in self.received_attention(entered, layer, layouts)]

    def received_attention(self, entered: Entered, layer: int, layouts: Sequence[Layout]) -> list[Tensor]:
        """Of each image Tensor [V]: the mean over a token's patches of what each receives on average within its segment."""
        block, (_, called) = self.blocks[layer], entered[layer]
        q, k = self._projected(entered, layer)
        cos, sin = called["position_embeddings"]
        rotated = sys.modules[type(block.attn).__module__].apply_rotary_pos_emb_vision(q, k, cos, sin)
        lengths = called["cu_seqlens"].diff().tolist()
        segments = zip(*(x.transpose(0, 1).split(lengths, 1) for x in rotated), strict=True)
        scale = q.shape[-1] ** -0.5
        found = torch.cat([_received(one, other, scale) for one, other in segments])
        return [values[:, 0] for values in self._aligned(found[:, None], layouts)]

    def keys(self, entered: Entered, layer: int, layouts: Sequence[Layout]) -> list[Tensor]:
        """Of each image Tensor [V, H, d]: means over a token's patches, before rotary embedding."""
        _, k = self._projected(entered, layer)
        return [values.unflatten(1, k.shape[1:]) for values in self._aligned(k.flatten(1), layouts)]

    def _projected(self, entered: Entered, layer: int) -> tuple[Tensor, Tensor]:
        """Queries and keys [S, H, d] of all patches."""
        block, (hidden, _) = self.blocks[layer], entered[layer]
        q, k, _ = block.attn.qkv(block.norm1(hidden)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(1)
        normed = [getattr(block.attn, f"{name}_norm", nn.Identity())(states) for name, states in (("q", q), ("k", k))]
        return normed[0], normed[1]

    def _aligned(self, values: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
        """Values [S, c] of patches as values [V, c] of each image's tokens."""
        merged = values.unflatten(0, (-1, self.merge**2)).float().mean(1).to(values.dtype)
        found = []
        for part, layout in zip(merged.split([layout.n_tokens for layout in layouts]), layouts, strict=True):
            order = self._order(layout).to(part.device, non_blocking=True)
            found.append(torch.empty_like(part).index_copy(0, order, part))
        return found

    def _order(self, layout: Layout) -> Tensor:
        """Tokens [V] in the order of the tower: window by window, and row by row in each."""
        if self.window is None:
            return torch.arange(layout.n_tokens)
        frame, row, col = layout.coords.unbind(-1)
        order = torch.arange(layout.n_tokens)
        for key in (col, row, col // self.window, row // self.window, frame):  # the last one decides
            order = order[key[order].argsort(stable=True)]
        return order


def _received(q: Tensor, k: Tensor, scale: float, rows: int = 512) -> Tensor:
    """Attention that each of n patches receives, Tensor [n]: mean over heads and query rows of [H, n, d], some rows at a time."""
    total = torch.zeros(q.shape[1], device=q.device)
    for part in q.split(rows, 1):
        total += (part @ k.transpose(-1, -2) * scale).softmax(-1, dtype=torch.float32).mean(0).sum(0)
    return total / q.shape[1]


def project(projector: nn.Module, states: Tensor) -> Tensor:
    """States [n, C] behind a model's projector, [n, D], in the projector's dtype."""
    run: Callable[[Tensor], Tensor] = projector.forward  # not called as a module: our own hook sits on it
    return run(states.to(next(projector.parameters()).dtype))


def projecting(projector: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return `project` for one projector."""
    return functools.partial(project, projector)
