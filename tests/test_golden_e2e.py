"""The authors' runs, end to end: their patched transformers (4.37 for LLaVA, 4.45 for Qwen2-VL) against our hook on unmodified models."""

from __future__ import annotations

import inspect
import json
import lzma
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load, load_file

from vlm_pruner_eval import SampleRecord, get_pruner, prune
from vlm_pruner_eval.hf_compat import cache_of

GOLDEN = Path(os.environ.get("VLM_PRUNER_EVAL_GOLDEN", Path(__file__).parent / "golden")) / "e2e"
RUNS = {"none": 0, "889": "8/9", "778": "7/9", "667": "2/3"}


class RowsOfTheFile(torch.nn.Module):
    """Stands in for the projector: the file holds the embeddings that the image became."""

    def __init__(self, rows: torch.Tensor, *, batched: bool = True):
        super().__init__()
        self.rows = rows[None] if batched else rows

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.rows.to(features.dtype)


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


def check_run(
    golden: dict[str, torch.Tensor], run: str, out: object, record: SampleRecord, ids: torch.Tensor, visual: int, close: float
) -> None:
    """Logits, greedy tokens, kept positions and order, cache lengths and keys of one run."""
    n = golden[f"{run}.logits_last"].shape[0]
    logits = torch.stack(out.logits, 1)[0, :, :n]
    assert float((logits - golden[f"{run}.step_logits"]).abs().max()) < close
    assert float((logits[0] - golden[f"{run}.logits_last"]).abs().max()) < close
    assert out.sequences[0, -12:].tolist() == golden[f"{run}.greedy_ids"].tolist()
    assert record.kv_lengths == golden[f"{run}.kv_len"].tolist()
    if run == "none":
        return
    for i in (0, 1, 2, 5):
        mean = cache_of(out).layers[i].keys[0, :, : record.kv_lengths[i]].mean(1)
        assert torch.allclose(mean, golden[f"{run}.kv_key_mean_l{i}"], atol=close)
    text = (ids != visual).nonzero()[:, 0].tolist()
    assert sorted(record.kept_positions + text) == golden[f"{run}.keep_positions"].tolist()
    assert record.order == golden[f"{run}.selected"].tolist()


def greedy(model: torch.nn.Module, inputs: dict[str, torch.Tensor], suppress: list[int]) -> object:
    kwargs = {"eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=12, do_sample=False, suppress_tokens=suppress, **kwargs)


@pytest.mark.parametrize("run", RUNS)
def test_the_authors_llava_run(llava, run):
    model, inputs, golden, image_token = llava
    pruner = get_pruner("none" if run == "none" else "vlmpruner", pruning_rate=RUNS[run])
    with prune(model, pruner) as ledger:
        out = greedy(model, inputs, [image_token])
    check_run(golden, run, out, ledger.records[0], inputs["input_ids"][0], image_token, 2e-4)


@pytest.fixture(scope="module")
def qwen2_vl():
    """(model, inputs, goldens): the authors' text weights behind a vision tower whose merger answers what the file holds."""
    if not (GOLDEN / "qwen2vl_e2e.json").exists():
        pytest.skip("the Qwen2-VL run is not in this folder (6 MB); set VLM_PRUNER_EVAL_GOLDEN to the full set")
    facts = json.loads((GOLDEN / "qwen2vl_e2e.json").read_text())
    golden, given = load_file(GOLDEN / "qwen2vl_e2e.safetensors"), dict(facts["hf_config"])
    rope = {"rope_type": "default", "mrope_section": given.pop("rope_scaling")["mrope_section"], "rope_theta": given.pop("rope_theta")}
    new = int(transformers.__version__.split(".")[0]) >= 5
    text = given | ({"rope_parameters": rope} if new else {"rope_scaling": rope, "rope_theta": rope["rope_theta"]})
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 256, "num_heads": 2, "mlp_ratio": 1, "patch_size": 14}
    ids = {name: given[name] for name in given if name.endswith("token_id")}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    model = transformers.Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    weights = {name: value.float() for name, value in load_file(GOLDEN / "qwen2vl_weights.safetensors").items()}
    model.lm_head.weight.data = weights.pop("lm_head.weight")
    loaded = model.model.language_model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    assert not loaded.missing_keys
    start, n = facts["start"], facts["n_image"]
    model.model.visual.merger = RowsOfTheFile(golden["inputs_embeds"][start : start + n].float(), batched=False)
    input_ids, grid = golden["input_ids"].long()[None], golden["image_grid_thw"].long()[None]
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "image_grid_thw": grid}
    inputs["pixel_values"] = torch.zeros(int(grid.prod()), 3 * 2 * 14 * 14)
    if "mm_token_type_ids" in inspect.signature(model.model.get_rope_index).parameters:
        inputs["mm_token_type_ids"] = (input_ids == ids["image_token_id"]).int()
    return model, inputs, golden, ids


@pytest.mark.parametrize("run", ["none", *(f"{rate}_{grid}" for rate in ("667", "778", "889") for grid in ("merged", "premerge"))])
def test_the_authors_qwen2_vl_run(qwen2_vl, run):
    """Their harness passes the grid before the merge (a quirk); the merged runs give it the true one, with the same int() count."""
    model, inputs, golden, ids = qwen2_vl
    if run == "none":
        pruner = get_pruner("none", pruning_rate=0)
    elif run.endswith("premerge"):
        pruner = get_pruner("vlmpruner", pruning_rate=int(run[:3]) / 1000, official_quirks=True)
    else:
        pruner = get_pruner("vlmpruner", pruning_rate=1 - len(golden[f"{run}.selected"]) / 384)
    with prune(model, pruner) as ledger:
        out = greedy(model, inputs, sorted(ids.values()))
    check_run(golden, run, out, ledger.records[0], inputs["input_ids"][0], ids["image_token_id"], 5e-4)
