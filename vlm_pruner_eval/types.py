"""What a pruner is given and what it answers. Tensors only: no model, no transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from vlm_pruner_eval.device_copy import to_host
from vlm_pruner_eval.errors import PruningError


@dataclass(frozen=True)
class Stage:
    """One cut: from decoder layer `layer` (0-based) on, `share` of the original visual tokens of a scope is kept."""

    layer: int
    share: Fraction | float


@dataclass(frozen=True)
class TextTokens:
    """The text tokens AFTER the image (DART's text pivots).

    Attributes
    ----------
    normed_hidden_states : Tensor [T, D]
        Input of layer K after the model's final norm.
    keys : Tensor [T, H_kv, d]
        Post-RoPE keys of layer K-1.
    positions : Tensor [T]
        Absolute sequence positions.
    """

    normed_hidden_states: Tensor = None
    keys: Tensor = None
    positions: Tensor = None


def row_major(rows: int, cols: int) -> Tensor:
    """Coordinates [rows * cols, 3] of a grid in row-major order: (0, row, col)."""
    cell = torch.arange(rows * cols)
    return torch.stack([torch.zeros_like(cell), cell // cols, cell % cols], dim=-1)


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one budget scope (an image, or a video) as a pruner sees them.

    Fields that a pruner does not name in `needs` may be None or dummies: they are not looked at. To type checkers they are what they
    are where they are named, so that `choose` needs no assertions.

    Attributes
    ----------
    hidden_states : Tensor [V, D]
        Input of layer K; for K = 0 the embeddings after the projector.
    grid : (rows, cols)
        Sets the diagonal for spatial distances. V must equal rows * cols unless `coords` are given.
    coords : Tensor [V, 3]
        (image or frame, row, col); default row-major on `grid`; row = col = -1 marks newline tokens.
    keys : Tensor [V, H_kv, d]
        Post-RoPE keys of layer K-1.
    attention : Tensor [V]
        Softmax attention of the last prompt token at layer K-1, averaged over heads.
    normed_hidden_states : Tensor [V, D]
        `hidden_states` after the model's final norm.
    positions : Tensor [V]
        Absolute sequence positions, counted without left padding.
    text : TextTokens
        The text after the image.
    sample_id : str
        Identity of the sample and scope, for messages and for seeds that must not depend on the batch.
    on_host : callable
        ``a, b = tokens.on_host(a, b)``: the same tensors in the memory of the host. The host waits for the device once, for all of
        them and for the check of the tokens, which `Pruner.select` lets come along.

    Raises
    ------
    PruningError
        Shapes that contradict each other; the sentence names the field.
    """

    hidden_states: Tensor
    _: KW_ONLY
    grid: tuple[int, int]
    coords: Tensor = None  # filled in __post_init__
    keys: Tensor = None
    attention: Tensor = None
    normed_hidden_states: Tensor = None
    positions: Tensor = None
    text: TextTokens = None  # type: ignore[assignment]
    sample_id: str | None = None
    on_host: Callable[..., list[Tensor]] = field(default=to_host, repr=False, compare=False)

    def __post_init__(self) -> None:
        where = f"VisualTokens of sample {self.sample_id!r}"
        if self.hidden_states.dim() != 2 or len(self.hidden_states) == 0:
            shape = tuple(self.hidden_states.shape)
            raise PruningError(f"{where}: hidden_states has shape {shape}, expected [V, D] with at least one token.")
        rows, cols = self.grid
        if rows < 1 or cols < 1:
            raise PruningError(f"{where}: got grid {rows} x {cols}, expected at least 1 x 1 (rows, cols).")
        if self.coords is None:
            if rows * cols != self.n_visual:
                raise PruningError(
                    f"{where}: {self.n_visual} tokens do not fill a grid of {rows} x {cols} = {rows * cols}; "
                    "pass the true grid, or coords [V, 3] for layouts that are not one full grid."
                )
            object.__setattr__(self, "coords", row_major(rows, cols).to(self.hidden_states.device))
        elif tuple(self.coords.shape) != (self.n_visual, 3):
            shape = tuple(self.coords.shape)
            raise PruningError(f"{where}: coords has shape {shape}, expected ({self.n_visual}, 3) = (image, row, col).")

    @property
    def n_visual(self) -> int:
        """V, the number of tokens in this scope."""
        return len(self.hidden_states)


@dataclass(frozen=True)
class Selection:
    """A pruner's answer.

    Attributes
    ----------
    order : Tensor [R] int64
        Local indices in the order of selection.
    hidden_states : Tensor [R, D] or None
        New states in the order of `keep`; None when the method merges nothing.
    quirks : frozenset of str
        Release misbehaviours that fired (official_quirks), or would have fired (default).
    amplification : float or None
        No number of `hidden_states` is larger than this many times the largest of the input's, if that is known on the host, as it is
        of weighted sums. Spares a wait for the device, to learn whether they are finite.
    host_order : Tensor [R] int64 or None
        `order` in the memory of the host, as `Pruner.select` fills it in.
    """

    order: Tensor
    hidden_states: Tensor | None = None
    quirks: frozenset[str] = field(default_factory=frozenset)
    amplification: float | None = None
    host_order: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def keep(self) -> Tensor:
        """Tensor [R] int64: the same local indices, ascending."""
        return self.order.sort().values
