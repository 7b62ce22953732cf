"""What a pruner is given and what it answers. Tensors only: no model, no transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from fractions import Fraction
from typing import Any

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


@dataclass(frozen=True)
class VisionTokens:
    """The same V tokens as the vision tower sees them; `needs` names fields as "vision.states", and `Pruner.tower_layers` the layers.

    In a tower with a CLS token and a token for each patch these are the tower's own values. Elsewhere they are the published
    stand-ins, and records say "adapted": without a CLS token, `cls_attention` is the attention that a patch receives; where several
    patches make one token, values are means over its patches, and `states` are the projected ones, which `project` leaves as they are.

    Attributes
    ----------
    states : Tensor [V, C]
        What the projector reads: in LLaVA the output of the last layer but one.
    project : callable
        ``[n, C] -> [n, D]``: the model's own projector.
    cls_state : Tensor [C] or None
        The CLS token among the same states; None in towers without one.
    cls_attention : mapping of layer to Tensor [H, V]
        Softmax attention of the CLS token by head, its own column left out and not renormalised.
    received_attention : mapping of layer to Tensor [V]
        Attention that each token receives, averaged over heads and all query rows, the CLS row among them.
    keys : mapping of layer to Tensor [V, H, d]
        Outputs of the key projection, bias included, nothing scaled.
    cls_query, cls_key : mapping of layer to Tensor [H, d]
        Outputs of the query and key projections for the CLS token.
    groups, views : Tensor [V] int64 or None
        Of a method that merged patches inside the tower: the number of the token that each became, view after view, and that of its
        view; -1 of newlines.
    """

    states: Tensor = None
    project: Callable[[Tensor], Tensor] = None  # type: ignore[assignment]
    cls_state: Tensor | None = None
    cls_attention: Mapping[int, Tensor] = field(default_factory=dict)
    received_attention: Mapping[int, Tensor] = field(default_factory=dict)
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    cls_query: Mapping[int, Tensor] = field(default_factory=dict)
    cls_key: Mapping[int, Tensor] = field(default_factory=dict)
    groups: Tensor = None
    views: Tensor = None


@dataclass(frozen=True)
class QuestionTokens:
    """The question beside the image; `needs` names fields as "question.text_embeddings".

    Attributes
    ----------
    image_embeddings : Tensor [V, D]
        Input embeddings of the language model for the visual tokens that are left.
    text_embeddings : Tensor [t, D]
        The same for the text after the image.
    clip_image : Tensor [V, E]
        Image embeddings of the method's text tower: ``visual_projection(post_layernorm(states))``.
    clip_text : Tensor [M, E]
        Text embeddings of the question, one for each row of 77 ids.
    """

    image_embeddings: Tensor = None
    text_embeddings: Tensor = None
    clip_image: Tensor = None
    clip_text: Tensor = None


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
    vision : VisionTokens
        What the vision tower knows of the tokens.
    question : QuestionTokens
        The question in the language model's embeddings, or in those of a text tower.
    own_attention : Tensor [V]
        As `attention`, of layer K on its own input.
    text_attention : callable
        ``rows [r] int64 or None -> Tensor [r, V]``: softmax attention at layer K-1, averaged over heads, of the text tokens after the image
        with these numbers; None: of all of them.
    ids : Tensor [V] int64
        Numbers that the tokens had before the first stage; default 0 .. V-1.
    n_original
        How many there were then; default V.
    stage
        Number of the stage, 0 for the first.
    memory : dict
        Of the scope, empty at the first stage: what a method leaves here it finds again at its next stage.
    contiguous
        True if kept tokens are renumbered, so that rows may stand in any order; else a row has the position of its place.
    is_video
        True of a video's frames, which share an `image` as tiles do.
    sample_id : str
        Identity of the sample and scope, for messages and for seeds that must not depend on the batch.
    image : str
        Identity of the image, which its views share.
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
    vision: VisionTokens = None  # type: ignore[assignment]
    question: QuestionTokens = None  # type: ignore[assignment]
    own_attention: Tensor = None
    text_attention: Callable[[Tensor | None], Tensor] = None  # type: ignore[assignment]
    ids: Tensor = None  # filled in __post_init__, as the next one
    n_original: int = None  # type: ignore[assignment]
    stage: int = 0
    memory: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    image: str | None = None
    contiguous: bool = True
    is_video: bool = False
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
        if self.ids is None:
            object.__setattr__(self, "ids", torch.arange(self.n_visual, device=self.hidden_states.device))
        if self.n_original is None:
            object.__setattr__(self, "n_original", self.n_visual)

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
        New states in the order of `keep`, which is that of the sequence; None when the method merges nothing. Where tokens are to
        stand in another order than in the prompt, or where a row is no token of the image (a CLS token, a sum of dropped ones), the
        places of `keep` are given new states row by row.
    merged : Tensor [m] int64 or None
        Those of `order` that name a place only: their rows are no tokens of the image that kept their number. `Pruner.select` answers
        with them in the memory of the host.
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
    merged: Tensor | None = None

    @property
    def keep(self) -> Tensor:
        """Tensor [R] int64: the same local indices, ascending."""
        return self.order.sort().values
