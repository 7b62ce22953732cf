"""Where the visual tokens are: coordinates against what the models themselves say, and what the releases took them to be."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, GRIDS, RECIPES, SIZES, build, generate, prompts, scopes_of
from toy_pruners import StateNorm

from vlm_pruner_eval import ConfigError, prune
from vlm_pruner_eval.vlms import families, family_of
from vlm_pruner_eval.vlms.family import Layout
from vlm_pruner_eval.vlms.llava_next import LlavaNext
from vlm_pruner_eval.vlms.parts.anyres import anyres_layout
from vlm_pruner_eval.vlms.qwen2_vl import Qwen2VL

QWEN = sorted(name for name, tiny in FAMILIES.items() if tiny.mrope)
ANYRES = ["llava_next", "llava_onevision", "llava_video"]


class _Look(StateNorm):
    """Keeps the first tokens, and remembers what it was shown."""

    seen: list = []  # noqa: RUF012

    def choose(self, tokens, keep):
        self.seen.append(tokens)
        return torch.arange(keep)


@pytest.fixture
def look():
    _Look.seen.clear()
    return _Look.seen


def test_every_family_has_a_tiny_model():
    assert set(families()) == set(RECIPES), "a family without an entry in tests/tiny_models.py is a family without tests"


@pytest.mark.parametrize("family", QWEN)
def test_qwen_coordinates_are_those_of_its_rotary_positions(tiny_model, look, family):
    """Under mRoPE a visual token's position is its grid cell plus an offset: the model's own statement of the layout."""
    model, inputs = tiny_model(family), prompts(family, [[4, "i0", 7, "i1", 2]])
    with prune(model, _Look(pruning_rate=0.5)), torch.no_grad():
        model(**inputs)
    kwargs = {name: inputs[name] for name in ("image_grid_thw", "attention_mask", "mm_token_type_ids") if name in inputs}
    positions = model.model.get_rope_index(inputs["input_ids"], **kwargs)[0][:, 0]
    for k, tokens in enumerate(look):
        at = positions[:, tokens.positions].T
        assert torch.equal(at - at[0], tokens.coords)
        assert tokens.grid == (GRIDS[k][1] // 2, GRIDS[k][2] // 2)


@pytest.mark.parametrize("family", [name for name in QWEN if FAMILIES[name].videos])
def test_a_video_is_one_scope_of_frames(tiny_model, look, family):
    with prune(tiny_model(family), _Look(pruning_rate=0.5)), torch.no_grad():
        tiny_model(family)(**prompts(family, [[4, "v1", 6]]))
    (tokens,) = look
    assert tokens.coords.tolist() == [[t, row, col] for t in range(3) for row in range(2) for col in range(3)]


@pytest.mark.parametrize("family", ANYRES)
@pytest.mark.parametrize("k", range(len(SIZES)))
def test_anyres_is_a_base_view_and_rows_of_tiles_that_end_in_a_newline(tiny_model, family, k):
    core, (n_visual,) = tiny_model(family).model, scopes_of(family, [f"i{k}"])
    arguments = {"vision_feature_select_strategy": "default"} if family == "llava_next" else {"vision_aspect_ratio": "anyres_max_9"}
    layout = anyres_layout(core, torch.tensor(SIZES[k]), **arguments)
    rows, cols = layout.grid
    assert layout.n_tokens == n_visual == 16 + rows * (cols + 1)
    base, tiles = layout.coords[:16], layout.coords[16:].reshape(rows, cols + 1, 3)
    assert base.tolist() == [[0, row, col] for row in range(4) for col in range(4)]
    assert bool((tiles[:, -1] == -1).all())
    first = tiles[0, 0].tolist()  # the unpadded region starts somewhere inside the tiles
    assert tiles[:, :-1].tolist() == [[[1, first[1] + row, first[2] + col] for col in range(cols)] for row in range(rows)]
    height, width = SIZES[k]
    assert abs(rows / cols - height / width) < 0.35 * height / width, "the unpadded grid has the image's proportions"


def test_onevision_videos_are_pooled_frames_and_one_newline(tiny_model, look):
    with prune(tiny_model("llava_onevision"), _Look(pruning_rate=0.5)), torch.no_grad():
        tiny_model("llava_onevision")(**prompts("llava_onevision", [[4, "v0", 6]]))
    (tokens,) = look
    assert tokens.coords.tolist() == [[t, row, col] for t in range(2) for row in range(2) for col in range(2)] + [[-1, -1, -1]]


def test_llava_video_closes_every_row_of_every_frame(tiny_model, look):
    with prune(tiny_model("llava_video"), _Look(pruning_rate=0.5)), torch.no_grad():
        tiny_model("llava_video")(**prompts("llava_video", [[4, "v0", 6]]))
    (tokens,) = look
    rows = [[[t, row, 0], [t, row, 1], [-1, -1, -1]] for t in range(2) for row in range(2)]
    assert tokens.coords.tolist() == [cell for row in rows for cell in row]
    assert tokens.grid == (2, 2)
    newline = tiny_model("llava_video").model.image_newline
    is_newline = (tokens.coords == -1).all(-1)
    with prune(tiny_model("llava_video"), _Look(pruning_rate=0.5, layer=0)), torch.no_grad():
        tiny_model("llava_video")(**prompts("llava_video", [[4, "v0", 6]]))
    assert torch.equal((look[-1].hidden_states == newline).all(-1), is_newline)


def test_internvl_tiles_are_scopes(tiny_model, look):
    with prune(tiny_model("internvl"), _Look(pruning_rate=0.5)) as ledger, torch.no_grad():
        tiny_model("internvl")(**prompts("internvl", [[4, "i1", 6]]))
    assert [tokens.grid for tokens in look] == [(2, 2), (2, 2)]
    assert ledger.records[0].n_images == 2


@pytest.mark.parametrize("family", QWEN)
def test_contiguous_positions_are_refused_under_mrope(tiny_model, family):
    with pytest.raises(ConfigError, match="multi-dimensional rotary positions"):
        prune(tiny_model(family), StateNorm(pruning_rate=0.5, positions="contiguous"))


# ---- what the released code took the layout to be
def test_the_release_strip_on_llava_next():
    layout = LlavaNext().release_layout(Layout(torch.zeros(50, 3), (5, 10)))
    assert layout.grid == (24, 24)
    assert layout.coords[[0, 23, 24, 49]].tolist() == [[0, 0, 0], [0, 0, 23], [0, 1, 0], [0, 2, 1]]


def test_the_release_grid_before_the_merge_on_qwen2_vl():
    layout = Qwen2VL().release_layout(Layout(torch.zeros(16 * 24, 3), (16, 24)))
    assert layout.grid == (32, 48)
    assert layout.coords[[24, 48]].tolist() == [[0, 0, 24], [0, 1, 0]]


@pytest.mark.parametrize("quirks", [False, True])
def test_quirks_of_a_family_are_applied_by_its_file(tiny_model, look, quirks):
    """int() count, first image only, and positions before the merge on Qwen2-VL, with official_quirks and not without."""
    inputs = prompts("qwen2_vl", [[4, "i0", 3, "i1", 5]])
    with prune(tiny_model("qwen2_vl"), _Look(pruning_rate=0.4, official_quirks=quirks)) as ledger:
        generate(tiny_model("qwen2_vl"), inputs, 1)
    (record,) = ledger.records
    assert record.n_visual == 6 + 8
    if quirks:
        assert record.n_kept == int(6 * 0.6) + 8
        assert [tokens.grid for tokens in look] == [(4, 6)]
    else:
        assert record.n_kept == round(6 * 0.6) + round(8 * 0.6)
        assert [tokens.grid for tokens in look] == [(2, 3), (4, 2)]


def test_the_family_of_a_model_is_found_by_its_type(tiny_model, family):
    found = family_of(tiny_model(family))
    assert tiny_model(family).config.model_type in found.spec.model_types
    assert found.mrope == FAMILIES[family].mrope


def test_a_balancing_loss_over_layers_of_different_lengths_is_refused():
    model = build("qwen3_vl_moe")
    model.config.text_config.output_router_logits = True
    with pytest.raises(ConfigError, match="model: got output_router_logits=True in the text configuration, expected False"):
        prune(model, StateNorm(pruning_rate=0.5))
    model.config.text_config.output_router_logits = False
    with prune(model, StateNorm(pruning_rate=0.5)) as ledger:
        generate(model, prompts("qwen3_vl_moe", [[4, "i0", 7]]), 1)
    assert ledger.records[0].n_kept == 3
