"""Reads queries and keys of one attention module from the outputs of its own projections.

No second projection is computed and any attention backend may run: what `keys` returns is bit-equal to the KV cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm_pruner_eval import hf_compat
from vlm_pruner_eval.errors import PruningError

# Outputs of the projections of queries (None if nobody asked) and keys, and the rotary embedding as (cos, sin).
Seen = tuple[Tensor | None, Tensor, tuple[Tensor, Tensor]]


def probe_for(layers: nn.ModuleList, layer: int, needs: frozenset[str]) -> Probe | None:
    """The probe that a stage at decoder layer `layer` needs: on the attention of the layer before, or none at all."""
    if layer == 0 or not needs & {"keys", "attention", "text_attention"}:
        return None
    return Probe(layers[layer - 1].self_attn, queries=bool(needs & {"attention", "text_attention"}))


def own_attention(layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Softmax attention of the last of `hidden` [n, D] over all of them in a decoder layer that has not run yet, averaged over heads: [n].

    The layer's own norm and projections are used, not called as modules, on which hooks may sit.

    Parameters
    ----------
    cos, sin : Tensor [..., 1, n, d]
        Rotary embedding of the tokens.
    """
    attn = layer.self_attn
    normed = layer.input_layernorm.forward(hidden)[None]
    projected = []
    for name, rows in (("q", normed[:, -1:]), ("k", normed)):
        states = getattr(attn, f"{name}_proj").forward(rows).unflatten(-1, (-1, attn.head_dim))
        norm = getattr(attn, f"{name}_norm", None)
        projected.append((states if norm is None else norm.forward(states)).transpose(1, 2))
    q, _ = hf_compat.rotate(attn, projected[0], projected[0], cos[..., -1:, :], sin[..., -1:, :])
    _, k = hf_compat.rotate(attn, projected[1], projected[1], cos, sin)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return ((q @ k.transpose(2, 3))[0, :, 0] * attn.scaling).softmax(-1, dtype=torch.float32).mean(0)


class Probe:
    """Holds q and k of the current forward of `attn`, between its projections and `clear`.

    Parameters
    ----------
    attn
        A Hugging Face attention module with ``q_proj`` / ``k_proj`` (and ``q_norm`` / ``k_norm`` where present).
    queries
        Whether the queries are wanted too.
    """

    def __init__(self, attn: nn.Module, *, queries: bool):
        self.attn = attn
        self.clear()
        self.handles = [attn.register_forward_pre_hook(self._see_rope, with_kwargs=True)]
        for name in ("q", "k") if queries else ("k",):
            module = getattr(attn, f"{name}_norm", None) or getattr(attn, f"{name}_proj")
            self.handles.append(module.register_forward_hook(self._see(name)))

    def clear(self) -> None:
        """Let go of the tensors."""
        self.q = self.k = self.rope = self._rotated = None

    def seen(self) -> Seen:
        """What this probe saw of the present forward."""
        return self.q, self.k, self.rope

    def show(self, seen: Seen) -> None:
        """What another probe of `attn` saw, in place of a forward that is left out."""
        (self.q, self.k, self.rope), self._rotated = seen, None

    @property
    def n_rows(self) -> int:
        """Rows of the batch that were seen."""
        self._check_seen()
        return len(self.k)

    def keys(self) -> Tensor:
        """Keys after rotary embedding, [B, H_kv, L, d]: what the KV cache of this layer holds."""
        if self._rotated is None:
            self._check_seen()
            k = self._heads(self.k)
            self._rotated = hf_compat.rotate(self.attn, k, k, *self.rope)[1]
        return self._rotated

    def attention_row(self, row: int, last: int, seen: Tensor) -> Tensor:
        """Softmax attention of token `last` of `row` over the tokens `seen`, averaged over heads: [L], 0 elsewhere.

        Parameters
        ----------
        seen : Tensor [n]
            Slots that the token may look at; all of them at or before `last`.
        """
        self._check_seen()
        return self._rows(row, slice(last, last + 1), seen)[0]

    def attention_rows(self, row: int, queries: Tensor, seen: Tensor) -> Tensor:
        """The same of several tokens `queries` [r] of `row`, each over those of `seen` that are not behind it: [r, L]."""
        self._check_seen()
        return self._rows(row, queries, seen, hidden=seen > queries[:, None])

    def _rows(self, row: int, queries: slice | Tensor, seen: Tensor, hidden: Tensor | None = None) -> Tensor:
        q = self._heads(self.q)[row : row + 1, :, queries]
        cos, sin = (x if x.shape[-3] == 1 else x[..., row : row + 1, :, :] for x in self.rope)
        q, _ = hf_compat.rotate(self.attn, q, q, cos[..., queries, :], sin[..., queries, :])
        k = self.keys()[row : row + 1, :, seen]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (q @ k.transpose(2, 3))[0] * self.attn.scaling
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype).float().mean(0)
        return weights.new_zeros(len(weights), self.k.shape[1]).index_copy(1, seen, weights)

    def _check_seen(self) -> None:
        """Raise a PruningError if the attention ran past its projections, as fused kernels of other libraries do."""
        if self.k is None or self.rope is None:
            raise PruningError(
                f"prune: {type(self.attn).__name__} did not call its {'k_proj' if self.rope else 'forward'} as a module, expected Hugging "
                "Face's own attention, whose keys methods look at; leave out the library that replaced it."
            )

    def _see(self, name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            setattr(self, name, output.clone() if hf_compat.has_foreign_rotary(self.attn) else output)

        return hook

    def _see_rope(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.rope = hf_compat.argument(kwargs, "position_embeddings", "attention")

    def _heads(self, projected: Tensor) -> Tensor:
        batch, length = projected.shape[:2]
        return projected.reshape(batch, length, -1, self.attn.head_dim).transpose(1, 2)
