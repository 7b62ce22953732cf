"""FLOPs and bytes against numbers that can be checked by hand or against what torch counts."""

from __future__ import annotations

import pytest
import torch
from tiny_models import prompts
from torch.utils.flop_counter import FlopCounterMode
from toy_pruners import Stride

from vlm_pruner_eval import prune
from vlm_pruner_eval.cost import DecoderShape, kv_bytes, literature_flops, prefill_flops

LLAVA_7B = DecoderShape(hidden=4096, intermediate=11008, n_heads=32, n_kv_heads=32, head_dim=128, vocabulary=32064)


def test_llava_7b_at_622_tokens():
    lengths = [622] * 32
    assert prefill_flops(LLAVA_7B, lengths) == pytest.approx(8.42e12, rel=2e-3)
    assert literature_flops(LLAVA_7B, lengths) == pytest.approx(3.23e12, rel=2e-3)
    assert kv_bytes(LLAVA_7B, lengths) == 622 * 32 * 2 * 4096 * 2


def test_shorter_layers_cost_less_in_proportion():
    full, cut = prefill_flops(LLAVA_7B, [622] * 32, logits=1), prefill_flops(LLAVA_7B, [622] * 2 + [110] * 30, logits=1)
    assert 0.20 < cut / full < 0.23
    assert kv_bytes(LLAVA_7B, [10, 20], 4) == 30 * 2 * 4096 * 4


@pytest.mark.parametrize("rate", [0, 0.5])
def test_torch_counts_the_same(tiny_model, rate):
    model, inputs = tiny_model("llava", "eager"), prompts("llava", [[4, "i0", 7]])
    with prune(model, Stride(pruning_rate=rate)) as ledger, torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    counts = counter.get_flop_counts()
    counted = sum(counts["LlavaForConditionalGeneration.model.language_model"].values())
    lengths = ledger.records[0].kv_lengths
    shape = DecoderShape.of(model.config.text_config)
    assert counted == pytest.approx(prefill_flops(shape, lengths, logits=0), rel=0.02)
