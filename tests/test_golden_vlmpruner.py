"""VLM-Pruner against what the authors' released code answered (tests/golden/README.md)."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlm_pruner_eval import ConfigError, PruningError, Selection, VisualTokens, get_pruner, keep_count

GOLDEN = Path(os.environ.get("VLM_PRUNER_EVAL_GOLDEN", Path(__file__).parent / "golden")) / "vlmpruner"
CASES = [
    case
    for case in json.loads((GOLDEN / "manifest.json").read_text())["cases"]
    if (GOLDEN / case["file"]).exists() and (GOLDEN / f"in_{case['input']}.safetensors").exists()
]
CORNERS = {corner["name"]: corner for corner in json.loads((GOLDEN / "corners" / "corners.json").read_text())}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SANE_RATE = 0.5  # the tests pass `keep`; some corners ask for rates that keep_count refuses


def grid_of(entry: dict) -> tuple[int, int]:
    """The grid that the release measured distances on: LLaVA's is 24 wide whatever the number of tokens."""
    return (24, 24) if entry["variant"] == "llava" else (entry["config"]["height"], entry["config"]["width"])


def visual_tokens(entry: dict, data: dict[str, Tensor], grid: tuple[int, int]) -> VisualTokens:
    start, length = entry["config"]["image_token_start_index"], entry["config"]["image_token_length"]
    dtype = DTYPES[entry["dtype"]]
    index = torch.arange(length)
    coords = torch.stack([torch.zeros_like(index), index // max(grid[1], 1), index % max(grid[1], 1)], dim=-1)
    keys = data["keys"][:, start : start + length].transpose(0, 1).to(dtype)
    states = data["hidden"][start : start + length].to(dtype)
    return VisualTokens(states, grid=grid, coords=coords, keys=keys, sample_id="golden")


def select(entry: dict, tokens: VisualTokens, keep: int, *, quirks: bool) -> Selection:
    config = entry["config"]
    pruner = get_pruner(
        "vlmpruner",
        pruning_rate=SANE_RATE,
        pivots=config["pivot_image_token"],
        threshold=config["threshold"],
        token_batch=config["token_batch"],
        official_quirks=quirks,
    )
    return pruner.select(tokens, keep)


def overlap(left: Tensor, right: Tensor) -> float:
    return len({*left.tolist()} & {*right.tolist()}) / len(right)


def assert_states(states: Tensor, expected: Tensor) -> None:
    error, scale = (states - expected).abs().max().item(), expected.abs().max().item()
    assert error < 5e-5 * max(scale, 1), f"fused states are off by {error:.2e} at a scale of {scale:.1f}"


def test_the_set_is_there():
    kinds = {(case["dtype"], case["stopped_early"]) for case in CASES}
    assert {("f32", False), ("f32", True), ("f16", False), ("bf16", False)} <= kinds
    assert len(CASES) >= 11
    assert set(CORNERS) == set(EXPECTED) and len(CORNERS) == 45


@pytest.mark.parametrize("quirks", [False, True], ids=["default", "release"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_case(case: dict, quirks: bool):
    answer = load_file(GOLDEN / case["file"])
    tokens = visual_tokens(case, load_file(GOLDEN / f"in_{case['input']}.safetensors"), grid_of(case))
    asked, released = case["retain_token_num"], answer["selected"].long()
    got = select(case, tokens, asked, quirks=quirks)
    assert got.hidden_states.dtype == tokens.hidden_states.dtype
    if case["stopped_early"]:
        assert "stall" in got.quirks
        assert len(got.order) == (case["n_selected"] if quirks else asked)
        assert torch.equal(got.order[: len(released)], released), "what was chosen before the stall must be the same"
    else:
        assert not got.quirks
        assert len(got.order) == asked
    if case["dtype"] != "f32":
        assert overlap(got.order, released) >= 0.75
    elif len(got.order) == len(released):
        assert torch.equal(got.order, released)
        assert_states(got.hidden_states, answer["fused"])
        own = (got.hidden_states == tokens.hidden_states[got.keep]).all(1)
        assert torch.equal(own, answer["updated"][released.argsort()] == 0), "the same rows must be left as they were"


@pytest.mark.parametrize("case", [case for case in CASES if case["variant"] == "llava"], ids=lambda case: case["id"])
def test_the_count_is_the_budget(case: dict):
    config = case["config"]
    assert keep_count(config["image_token_length"], config["reduction_ratio"]) == case["retain_token_num"]


# What the product does with each corner:
#   release      the release's tokens in its order and its states, in both modes
#   half         half precision: at least 0.75 in common
#   quirk NAMES  the same with official_quirks; by default exactly the asked count, and these quirks counted in both modes
#   ties SHARE   scores tie exactly and the release leaves the order to an unstable sort: at least this share in common
#   sane NAMES   the release repeats tokens, overflows or crashes; the product keeps the asked count, these quirks counted
#   refuse WORDS an error that holds these words
RELEASE = """retain_eq_pivots ratio_zero ratio_zero_thr2 d256 nan_text_row zero_tokens batch_gt_candidates two_tokens threshold_neg_sims
    opposed_tokens round_half_even round_half_even2 qwen_int_floor llava_other_grid mixed_sign_blowup"""
HALF = "f16_var_inf f16_normal bf16_normal"
SANE = "d255 qwen_width_missing f16_cdist_overflow bf16_near_uniform_keys"
STALL = "early_stop_uniform early_stop_partial early_stop_mid threshold_tiny"
EXPECTED: dict[str, tuple] = {
    **dict.fromkeys(RELEASE.split(), ("release",)),
    **dict.fromkeys(HALF.split(), ("half",)),
    **dict.fromkeys(SANE.split(), ("sane",)),
    **dict.fromkeys(STALL.split(), ("quirk", "stall")),
    **dict.fromkeys(("retain_lt_pivots", "retain_zero", "pivots_eq_n"), ("quirk", "fewer_than_pivots")),
    "negative_weight_sum": ("quirk", "negative_weight_sum"),
    "identical_tokens": ("sane", "stall", "repeated_pivots"),
    "identical_keys_only": ("sane", "repeated_pivots"),
    **dict.fromkeys(("pivots_gt_n", "one_token"), ("sane", "fewer_than_pivots", "repeated_pivots")),
    "duplicate_half": ("ties", 0.95),
    "orthogonal": ("ties", 0.0),  # every score is 0: any 44 tokens beside the pivots are as good
    "simplex_negative": ("ties", 0.85),
    **dict.fromkeys(("nan_hidden_row", "nan_hidden_elem"), ("refuse", "hidden_states holds NaN")),
    "nan_key": ("refuse", "keys holds NaN"),
    "batch_zero": ("refuse", "token_batch: got 0"),
    "pivots_zero": ("refuse", "pivots: got 0"),
    "length_past_end": ("refuse", "coords has shape (106, 3), expected (98, 3)"),
    "length_zero": ("refuse", "at least one token"),
    "qwen_zero_hw": ("refuse", "got grid 0 x 0"),
}


@pytest.fixture(scope="module")
def corner_files(tmp_path_factory) -> Path:
    folder = GOLDEN / "corners"
    archive = folder / "corners.tar.xz"
    if not archive.exists():
        return folder
    unpacked = tmp_path_factory.mktemp("corners")
    with tarfile.open(archive) as packed:
        for member in packed.getmembers():
            (unpacked / Path(member.name).name).write_bytes(packed.extractfile(member).read())
    return unpacked


def answer_corner(corner: dict, data: dict[str, Tensor], *, quirks: bool) -> tuple[VisualTokens, Selection]:
    grid = (5, 10) if corner["name"] == "qwen_width_missing" else grid_of(corner)  # the product's caller knows the grid
    tokens = visual_tokens(corner, data, grid)
    # where the release crashed it gave no count
    asked = corner.get("retain_token_num", round(tokens.n_visual * (1 - corner["config"]["reduction_ratio"])))
    return tokens, select(corner, tokens, asked, quirks=quirks)


def assert_equals_release(tokens: VisualTokens, got: Selection, data: dict[str, Tensor], start: int) -> None:
    assert torch.equal(got.order, data["selected"].long())
    expected = tokens.hidden_states.clone()
    changed = data["changed_rows"].long() - start
    expected[changed] = data["changed_vals"]
    assert_states(got.hidden_states, expected[got.keep])
    rewritten = (got.hidden_states != tokens.hidden_states[got.keep]).any(1)
    assert torch.equal(got.keep[rewritten], changed.sort().values)


@pytest.mark.parametrize("quirks", [False, True], ids=["default", "release"])
@pytest.mark.parametrize("name", EXPECTED)
def test_corner(name: str, quirks: bool, corner_files: Path):
    corner, (kind, *details) = CORNERS[name], EXPECTED[name]
    data = load_file(corner_files / corner["file"])
    if kind == "refuse":
        with pytest.raises((ConfigError, PruningError)) as refusal:
            answer_corner(corner, data, quirks=quirks)
        assert details[0] in str(refusal.value)
        return
    tokens, got = answer_corner(corner, data, quirks=quirks)
    asked = corner.get("retain_token_num")
    assert torch.isfinite(got.hidden_states).all()
    assert got.quirks == (set(details) if kind in ("quirk", "sane") else {"negative_weight_sum"} & got.quirks)
    if not quirks and asked is not None:
        assert len(got.order) == asked
    if kind == "release" or (kind == "quirk" and quirks):
        assert_equals_release(tokens, got, data, corner["config"]["image_token_start_index"])
    elif kind == "quirk" and len(got.order):
        differs = len(got.order) != corner["n_selected"] or not torch.equal(got.hidden_states, tokens.hidden_states[got.keep])
        assert differs, "the quirk is said to fire, so the default must do something else"
    elif kind in ("ties", "half"):
        assert len(got.order) == asked
        assert torch.equal(got.order[:4], data["selected"][:4].long())
        assert overlap(got.order, data["selected"]) >= (details[0] if kind == "ties" else 0.75)


def test_orthogonal_tokens_are_left_alone(corner_files: Path):
    corner = CORNERS["orthogonal"]
    tokens, got = answer_corner(corner, load_file(corner_files / corner["file"]), quirks=True)
    assert torch.equal(got.hidden_states, tokens.hidden_states[got.keep])
    pivots = corner["selected"][:4]
    assert got.order.tolist() == pivots + [token for token in range(96) if token not in pivots][:44], "ties go to the lowest index"


def test_half_precision_pivots_do_not_collapse(corner_files: Path):
    corner = CORNERS["f16_cdist_overflow"]
    tokens, got = answer_corner(corner, load_file(corner_files / corner["file"]), quirks=False)
    keys = tokens.keys.flatten(1).double()
    pivots = [int(keys.abs().sum(1).argmax())]
    while len(pivots) < 4:
        pivots.append(int(torch.stack([(keys - keys[p]).norm(dim=1) for p in pivots]).amin(0).argmax()))
    assert got.order[:4].tolist() == pivots
    assert corner["selected"][:4] != pivots, "the release's did"
