"""What the hook must know about a model family: where its visual tokens are, and which grid cell each one shows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from vlm_pruner_eval import hf_compat
from vlm_pruner_eval.errors import ConfigError, PruningError
from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.types import Stage


@dataclass(frozen=True)
class Layout:
    """Tokens of one image or video, in prompt order.

    Attributes
    ----------
    coords : Tensor [n, 3]
        (image or frame, row, col) of each token; row = col = -1 for newline tokens.
    grid : (rows, cols)
        Sets the diagonal of spatial distances.
    """

    coords: Tensor
    grid: tuple[int, int]

    @property
    def n_tokens(self) -> int:
        """Tokens that the image takes up in the prompt."""
        return self.coords.shape[0]

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """(n_tokens, rows, cols, frames): rows and columns of tokens in the last frame (tiles are finer than the base view)."""
        cells = self.coords[self.coords[:, 1] >= 0].float().round(decimals=2)  # packing may interpolate, and so round, coordinates
        last = cells[cells[:, 0] == cells[:, 0].max()]
        return self.n_tokens, len(last[:, 1].unique()), len(last[:, 2].unique()), len(cells[:, 0].unique())


@dataclass(frozen=True)
class Scope:
    """One image or video of one row: its layout, and where its tokens are.

    Attributes
    ----------
    positions : Tensor [n]
        Ascending positions in the row of input_ids as passed; need not be contiguous.
    """

    positions: Tensor
    layout: Layout


def joined(scopes: list[Scope]) -> Scope:
    """All images of a row as one scope: frames are numbered through, and the diagonal is that of the largest sides."""
    coords, first = [], 0
    for scope in scopes:
        own = scope.layout.coords.clone()
        own[:, 0] = torch.where(own[:, 1] < 0, own[:, 0], own[:, 0] + first)
        first = int(own[:, 0].max()) + 1
        coords.append(own)
    rows, cols = (max(sides) for sides in zip(*(scope.layout.grid for scope in scopes), strict=True))
    return Scope(torch.cat([scope.positions for scope in scopes]), Layout(torch.cat(coords), (rows, cols)))


class SeenTokens(Protocol):
    """The shortened sequence that a layer sees."""

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """On a device: `index` [B, L'], positions in the prompt, and `valid` [B, L'], False for fillers."""


SINGLY = (
    "Under beams or returned sequences, this version of transformers repeats the images of a batch one by one, so that rows with "
    "several images read each other's, pruned or not; install transformers 5.18 or newer, or answer with one sequence a prompt."
)

# Arguments of one call of ``get_image_features`` / ``get_video_features``, by name.
FeatureCall = Mapping[str, object]
# (owner, attribute, wrapper(original, cut, *args, **kwargs)); cut = the sequence the current layer sees, or None.
InstancePatch = tuple[object, str, Callable]


class Family:
    """A VLM family: one file, found by being in this folder. Subclasses say how images turn into tokens."""

    model_types: ClassVar[frozenset[str]] = frozenset()
    mrope: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("image",)

    def layouts(self, core: nn.Module, kind: str, call: FeatureCall) -> list[Layout]:
        """Layouts of the images (or videos) that one call of ``get_{kind}_features`` encodes, in order."""
        raise NotImplementedError

    def refuse(self, config: object) -> str | None:
        """A sentence when a checkpoint of this model type can't be pruned, else None."""
        return None

    def keep(self, pruner: Pruner, stage: Stage, n_visual: int, scope: int) -> int:
        """Tokens kept after `stage` of the row's scope number `scope`; a family's release count (official_quirks) goes here."""
        return pruner.keep_at(stage, n_visual)

    def release_layout(self, layout: Layout) -> Layout:
        """Where the released code takes the tokens of `layout` to be (official_quirks)."""
        return layout

    def patches(self, core: nn.Module) -> list[InstancePatch]:
        """Methods of the model that must know which tokens were cut (DeepStack); most families have none."""
        return []

    def token_id(self, config: object, kind: str) -> int | None:
        """Return the placeholder token of images or videos in input_ids."""
        return hf_compat.token_id(config, kind)

    def is_visual(self, config: object, input_ids: Tensor) -> Tensor:
        """Bool [B, L]: which tokens of input_ids are visual."""
        ids = [token for kind in self.kinds if (token := self.token_id(config, kind)) is not None]
        return torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))

    def scopes(self, config: object, input_ids: Tensor, layouts: Mapping[str, list[Layout]]) -> list[list[Scope]]:
        """The images and videos of every row of `input_ids` [B, L], which is in the memory of the host, in prompt order.

        Tokens are given to images by COUNT, in order: two images can touch, and a video's tokens can be interrupted
        by text. Beams and returned sequences repeat each row's images, as generate() repeats its input_ids.

        Raises
        ------
        PruningError
            Placeholder tokens that do not match the encoded images.
        """
        rows: list[list[Scope]] = [[] for _ in input_ids]
        for kind in self.kinds:
            token = self.token_id(config, kind)
            if token is not None and bool((input_ids == token).any()):
                for row, found in zip(rows, _assign(input_ids == token, layouts.get(kind, []), kind), strict=True):
                    row.extend(found)
        return [sorted(row, key=lambda scope: int(scope.positions[0])) for row in rows]


def _assign(is_token: Tensor, layouts: list[Layout], kind: str) -> list[list[Scope]]:
    n_tokens, n_features = int(is_token.sum()), sum(layout.n_tokens for layout in layouts)
    copies, rest = divmod(n_tokens, max(1, n_features))
    if rest or not copies or len(is_token) % copies:
        raise PruningError(
            f"The prompt holds {n_tokens} {kind} tokens, but the encoded {kind}s make {n_features} "
            f"({len(layouts)} {kind}s); build the prompt with the checkpoint's own processor."
        )
    rows: list[list[Scope]] = []
    queue = iter(layouts)
    for first in range(0, len(is_token), copies):
        left = is_token[first].nonzero()[:, 0]
        found: list[Scope] = []
        while len(left):
            layout = next(queue, None)
            if layout is None or layout.n_tokens > len(left):
                raise PruningError(
                    f"The {kind} tokens of row {first} do not line up with whole {kind}s: {len(left)} tokens are left over."
                    + (f" {SINGLY}" if hf_compat.REPEATS_IMAGES_SINGLY else "")
                )
            found.append(Scope(left[: layout.n_tokens], layout))
            left = left[layout.n_tokens :]
        rows.extend([found] * copies)
    return rows


def unknown_family(model_type: object, known: frozenset[str]) -> ConfigError:
    """The sentence for a model that no file of this folder knows."""
    return ConfigError(
        f"model: got model_type {model_type!r}, which can't be pruned yet; known: {', '.join(sorted(known))}. "
        "A new family is one file in vlm_pruner_eval/vlms/."
    )
