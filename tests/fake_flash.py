"""A CPU stand-in for flash attention 2: it is given the masks that flash gets, and refuses what flash would misread.

Flash takes no 4-D mask, and at batch 1 it reads gaps in position_ids as packed sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

NAME = "fake_flash"


def fake_flash(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object):
    """Attention over a 2-D mask [B, kv] or None, causal at the end of the keys."""
    batch, heads, n_query, _ = query.shape
    n_keys, position_ids = key.shape[2], kwargs.get("position_ids")
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, n_keys):
        raise AssertionError(f"flash attention was given a mask of shape {tuple(attention_mask.shape)}, it takes ({batch}, {n_keys})")
    if attention_mask is None and batch == 1 and position_ids is not None and bool((position_ids.diff() != 1).any()):
        raise AssertionError("flash attention would take these position_ids for packed sequences")
    allowed = torch.ones(n_query, n_keys, dtype=torch.bool).tril(n_keys - n_query)[None, None]
    if attention_mask is not None:
        itself = torch.ones(n_query, n_keys, dtype=torch.bool).tril(n_keys - n_query).triu(n_keys - n_query)
        allowed = (allowed & attention_mask[:, None, None].bool()) | itself  # padding rows: anything finite
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=kwargs.get("scaling"))
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, fake_flash)
AttentionMaskInterface.register(NAME, flash_attention_mask)
