"""FLOPs and KV-cache bytes of a decoder from the real length of every layer. Arithmetic only, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The sizes of a decoder-only language model with gated (SwiGLU) feed-forward layers.

    Attributes
    ----------
    hidden, intermediate, head_dim
        Sizes of the residual stream, of the feed-forward layer, and of one attention head.
    n_heads, n_kv_heads
        Query heads, and key/value heads under grouped-query attention.
    vocabulary
        Rows of lm_head.
    """

    hidden: int
    intermediate: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """Read a Hugging Face text config."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            n_heads=config.num_attention_heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=head_dim,
            vocabulary=config.vocab_size,
        )


def layer_flops(shape: DecoderShape, length: int) -> int:
    """FLOPs of one decoder layer over a prompt of `length` tokens, 2 per multiply-add, full attention matrix.

    Query and output projections 2 * (2 n d h), key and value 2 * (2 n d h_kv), attention 2 * (2 n^2 h), three feed-forward
    matrices 3 * (2 n d m). The causal half is not subtracted: kernels without block skipping compute it.
    """
    queries, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    projections = 4 * length * shape.hidden * (queries + keys)
    return projections + 4 * length**2 * queries + 6 * length * shape.hidden * shape.intermediate


def prefill_flops(shape: DecoderShape, lengths: Sequence[int], *, logits: int | None = None) -> int:
    """FLOPs of a prefill whose layer i holds ``lengths[i]`` tokens; `logits`: positions that lm_head sees (default all)."""
    seen = lengths[0] if logits is None else logits
    return sum(layer_flops(shape, n) for n in lengths) + 2 * seen * shape.hidden * shape.vocabulary


def literature_flops(shape: DecoderShape, lengths: Sequence[int]) -> int:
    """The formula of the pruning literature: ``4 n d^2 + 2 n^2 d + 2 n d m`` per layer.

    It counts multiply-adds as one, two feed-forward matrices of the three, and no lm_head: 3.23 T for LLaVA-1.5-7B at
    n = 622, where `prefill_flops` gives 8.42 T. Printed beside ours, and named.

    Paper: FastV, arXiv 2403.06764, section 4.3.
    """
    d, m = shape.hidden, shape.intermediate
    return sum(4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m for n in lengths)


def kv_bytes(shape: DecoderShape, lengths: Sequence[int], bytes_per_value: int = 2) -> int:
    """Bytes of keys and values that layers of these lengths hold."""
    return sum(lengths) * 2 * shape.n_kv_heads * shape.head_dim * bytes_per_value
