"""FastV, DART and DivPrune against what their authors' released code answered (tests/golden/README.md)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vlm_pruner_eval import TextTokens, VisualTokens, get_pruner

GOLDEN = Path(os.environ.get("VLM_PRUNER_EVAL_GOLDEN", Path(__file__).parent / "golden")) / "baselines"
FILES = {method: sorted((GOLDEN / method).glob("*.npz")) for method in ("fastv", "dart", "divprune")}
RATE = 0.5  # not used: the files say how many to keep
SMALLEST_OVERLAP_FP16 = {"fastv": 0.9, "dart": 0.9, "divprune": 0.5}


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    with np.load(path) as arrays:
        meta = json.loads(str(arrays["meta"]))
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "meta"}, meta


def dtype_of(meta: dict) -> torch.dtype:
    return torch.float16 if meta["compute_dtype"] == "f16" else torch.float32


def overlap(left: Tensor, right: Tensor) -> float:
    return len({*left.tolist()} & {*right.tolist()}) / len({*right.tolist()})


def by_name(path: Path) -> str:
    return path.stem


def test_the_set_is_there():
    for method, files in FILES.items():
        assert len(files) >= 2, f"{GOLDEN / method} holds {len(files)} files"
        assert any("fp16" in path.stem for path in files)
    assert any("duplicates" in path.stem for path in FILES["divprune"])


@pytest.mark.parametrize("path", FILES["fastv"], ids=by_name)
def test_fastv(path: Path):
    data, meta = load(path)
    start, n_visual = meta["image_start"], meta["N"]
    attention = data["attn_last_row"].mean(0)[start : start + n_visual]
    tokens = VisualTokens(torch.zeros(n_visual, 1), grid=(1, n_visual), attention=attention)
    got = get_pruner("fastv", pruning_rate=RATE).select(tokens, meta["keep"])
    released = data["topk_desc"] - start
    if dtype_of(meta) == torch.float16:
        assert overlap(got.order, released) >= SMALLEST_OVERLAP_FP16["fastv"]
    else:
        assert torch.equal(got.order, released)


def dart_tokens(data: dict[str, Tensor], meta: dict) -> VisualTokens:
    start, stop = meta["image_start"], meta["image_start"] + meta["N"]
    states = data["last_layer_state"][0].to(dtype_of(meta))
    keys = data["key_states"][0].transpose(0, 1).to(dtype_of(meta))
    positions = torch.arange(len(states))
    return VisualTokens(
        torch.zeros(meta["N"], 1),
        grid=(1, meta["N"]),
        keys=keys[start:stop],
        normed_hidden_states=states[start:stop],
        positions=positions[start:stop],
        text=TextTokens(normed_hidden_states=states[stop:], keys=keys[stop:], positions=positions[stop:]),
    )


def dart_budget(meta: dict) -> int:
    config = meta["DART_config"]
    asked = {
        "llava": config["max_num_trunction"],
        "next": config["retain_token_num_for_llava_next"],
        "qwen": int(meta["N"] * (1 - config["reduction_ratio"])),
    }
    return asked[meta["kind"]]


@pytest.mark.parametrize("path", FILES["dart"], ids=by_name)
def test_dart(path: Path):
    data, meta = load(path)
    tokens, asked = dart_tokens(data, meta), dart_budget(meta)
    released = data["retained_sorted"] - meta["image_start"]
    got = get_pruner("dart", pruning_rate=RATE, official_quirks=True).select(tokens, asked)
    if dtype_of(meta) == torch.float16:
        assert len(got.order) == len(released)
        assert overlap(got.order, released) >= SMALLEST_OVERLAP_FP16["dart"]
    else:
        assert torch.equal(got.keep, released)
    assert "count" in got.quirks and len(released) == 4 + 8 * (asked // 8)
    sane = get_pruner("dart", pruning_rate=RATE).select(tokens, asked)
    assert len(sane.order) == asked
    assert {*(data["image_pivots"] - meta["image_start"]).tolist()} <= {*sane.order.tolist()}


@pytest.mark.parametrize("path", [path for path in FILES["divprune"] if "duplicates" not in path.stem], ids=by_name)
def test_divprune(path: Path):
    data, meta = load(path)
    tokens = VisualTokens(data["features"].to(dtype_of(meta)), grid=(1, meta["N"]))
    got = get_pruner("divprune", pruning_rate=RATE).select(tokens, meta["keep"])
    assert not got.quirks
    if dtype_of(meta) == torch.float16:
        assert overlap(got.order, data["selected_order"]) >= SMALLEST_OVERLAP_FP16["divprune"]
    else:
        assert torch.equal(got.order, data["selected_order"])


@pytest.mark.parametrize("path", [path for path in FILES["divprune"] if "fp16" in path.stem], ids=by_name)
def test_divprune_quirk_computes_in_the_models_dtype(path: Path):
    data, meta = load(path)
    tokens = VisualTokens(data["features"].to(torch.float16), grid=(1, meta["N"]))
    in_half = get_pruner("divprune", pruning_rate=RATE, official_quirks=True).select(tokens, meta["keep"])
    in_float = get_pruner("divprune", pruning_rate=RATE).select(tokens, meta["keep"])
    assert overlap(in_half.order, data["selected_order"]) >= 0.9
    assert not torch.equal(in_half.order, in_float.order), "half precision must show, or the switch does nothing"


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize("path", [path for path in FILES["divprune"] if "duplicates" in path.stem], ids=by_name)
def test_divprune_never_repeats(path: Path, quirks: bool):
    data, meta = load(path)
    tokens = VisualTokens(data["features"].to(dtype_of(meta)), grid=(1, meta["N"]))
    got = get_pruner("divprune", pruning_rate=RATE, official_quirks=quirks).select(tokens, meta["keep"])
    distinct = {*data["selected_order"].tolist()}
    assert len(distinct) == meta["n_unique"] < meta["keep"] == len({*got.order.tolist()})
    assert distinct <= {*got.order.tolist()}
    assert got.quirks == {"repeats"}
