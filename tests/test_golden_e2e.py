"""The authors' LLaVA run, end to end: their patched transformers 4.37 against our hook on an unmodified model."""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load, load_file

from vlm_pruner_eval import get_pruner, prune

GOLDEN = Path(os.environ.get("VLM_PRUNER_EVAL_GOLDEN", Path(__file__).parent / "golden")) / "e2e"
RUNS = {"none": 0, "889": "8/9", "778": "7/9", "667": "2/3"}


class RowsOfTheFile(torch.nn.Module):
    """Stands in for the projector: the file holds the embeddings that the image became."""

    def __init__(self, rows: torch.Tensor):
        super().__init__()
        self.rows = rows

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.rows.to(features.dtype)[None]


def read_weights() -> dict[str, torch.Tensor]:
    packed = GOLDEN / "llava_weights.safetensors.xz"
    return load(lzma.decompress(packed.read_bytes())) if packed.exists() else load_file(GOLDEN / "llava_weights.safetensors")


@pytest.fixture(scope="module")
def llava():
    """(model, inputs, goldens): the authors' weights in LlavaForConditionalGeneration, one more row for the image token."""
    facts = json.loads((GOLDEN / "llava_e2e.json").read_text())
    goldens = load_file(GOLDEN / "llava_e2e.safetensors")
    image_token = facts["hf_config"]["vocab_size"]
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.LlavaConfig(
        vision_config=vision | {"image_size": 336, "patch_size": 14},
        text_config=facts["hf_config"] | {"model_type": "llama", "vocab_size": image_token + 1},
        image_token_id=image_token,
        image_token_index=image_token,
    )
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    weights = {name: value.float() for name, value in read_weights().items()}
    row = torch.zeros(1, config.text_config.hidden_size)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], row])
    model.lm_head.weight.data = weights.pop("lm_head.weight")
    loaded = model.model.language_model.load_state_dict(
        {name.removeprefix("model."): value for name, value in weights.items()}, strict=False
    )
    assert not loaded.unexpected_keys
    assert all("inv_freq" in name for name in loaded.missing_keys)
    start, n = facts["start"], facts["n_image"]
    model.model.multi_modal_projector = RowsOfTheFile(goldens["inputs_embeds"][start : start + n].float())
    text = goldens["text_ids"].long()
    ids = torch.cat([text[:start], torch.full((n,), image_token), text[start:]])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.zeros(1, 3, 336, 336)}
    embeds = model.get_input_embeddings()(text)
    assert torch.equal(embeds[:start], goldens["inputs_embeds"][:start].float()), "the weights are those of the file"
    return model, inputs, goldens, image_token


@pytest.mark.parametrize("run", RUNS)
def test_the_authors_run(llava, run):
    model, inputs, goldens, image_token = llava
    name = "none" if run == "none" else "vlmpruner"
    with prune(model, get_pruner(name, pruning_rate=RUNS[run])) as ledger, torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=[image_token],
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    logits = torch.stack(out.logits, 1)[0, :, :image_token]
    assert float((logits - goldens[f"{run}.step_logits"]).abs().max()) < 2e-4
    assert float((logits[0] - goldens[f"{run}.logits_last"]).abs().max()) < 2e-4
    assert out.sequences[0, -12:].tolist() == goldens[f"{run}.greedy_ids"].tolist()
    (record,) = ledger.records
    assert record.kv_lengths == goldens[f"{run}.kv_len"].tolist()
    for i in (0, 1, 2, 5) if run != "none" else ():
        held = record.kv_lengths[i]
        mean = out.past_key_values.layers[i].keys[0, :, :held].mean(1)
        assert torch.allclose(mean, goldens[f"{run}.kv_key_mean_l{i}"], atol=2e-4)
    if run != "none":
        kept = set(record.kept_positions)
        text = set((inputs["input_ids"][0] != image_token).nonzero()[:, 0].tolist())
        assert sorted(kept | text) == goldens[f"{run}.keep_positions"].tolist()
        assert record.order == goldens[f"{run}.selected"].tolist()
