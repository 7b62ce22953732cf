"""The text tower: rows of 77, the pooled position, projections, and sentences about checkpoints that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_clip
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_clip import SPACE, TOKENS, WIDTH, clip_checkpoint
from torch.nn.functional import layer_norm
from transformers import CLIPModel, LlamaConfig

from vlm_pruner_eval import ConfigError, PruningError
from vlm_pruner_eval.clip_text import TextTower, blanked, pooled_positions, question_only, segments

SHORT = "What is on the table?"
LONG = "Is there a cup on the table, or is it a bowl? " * 4  # three rows


@pytest.fixture(scope="module", params=[len(TOKENS) - 1, 2], ids=["end", "old_end"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPModel]:
    folder = tmp_path_factory.mktemp("clip")
    return folder, clip_checkpoint(folder, end=request.param)


# ---- rows
@given(n=st.integers(1, 400), row=st.sampled_from([77, 5]))
def test_rows_hold_the_ids_in_order_and_zeros_behind(n: int, row: int):
    ids = torch.arange(1, n + 1)
    rows, mask = segments(ids, row)
    assert rows.shape == mask.shape == ((n - 1) // row + 1, row) and rows.dtype == mask.dtype == torch.int64
    assert rows.flatten()[:n].equal(ids) and not rows.flatten()[n:].any()
    assert mask.equal((rows > 0).long())


def test_the_state_that_stands_for_a_row():
    ids = torch.tensor([[7, 5, 9, 9, 0], [5, 8, 6, 4, 4], [6, 2, 8, 2, 0]])
    assert pooled_positions(ids, 9).tolist() == [2, 0, 0]
    assert pooled_positions(ids, 2).tolist() == [2, 1, 2], "the largest id, where an old configuration names 2"


# ---- the tower
def by_hand(model: CLIPModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each row by itself; position by position of the rule as written."""
    found = []
    end = model.config.text_config.eos_token_id
    for row, known in zip(ids, mask, strict=True):
        states = model.text_model(input_ids=row[None], attention_mask=known[None]).last_hidden_state[0]
        listed = row.tolist()
        at = listed.index(max(listed)) if end == 2 else listed.index(end) if end in listed else 0
        found.append(states[at] @ model.text_projection.weight.T)
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("text", [SHORT, LONG, ""])
def test_a_question_is_one_embedding_for_each_row(checkpoint: tuple[Path, CLIPModel], text: str):
    folder, model = checkpoint
    tower = TextTower(str(folder))
    ids = tower.ids(text)
    assert ids[[0, -1]].tolist() == [len(TOKENS) - 2, len(TOKENS) - 1] and len(ids) == len(text) + 2
    got = tower.encode(text)
    assert got.shape == ((len(text) + 1) // 77 + 1, SPACE) and not got.requires_grad
    torch.testing.assert_close(got, by_hand(model, *segments(ids)))


@torch.no_grad()
def test_one_row_ends_with_the_end_token(checkpoint: tuple[Path, CLIPModel]):
    folder, model = checkpoint
    tower = TextTower(str(folder))
    whole, cut = tower.ids(LONG), tower.ids(LONG, truncated=True)
    assert len(cut) == 77 and cut[:76].equal(whole[:76]) and cut[76] == whole[-1]
    got = tower.encode(LONG, truncated=True)
    assert got.shape == (1, SPACE) and not torch.allclose(got, tower.encode(LONG)[:1])
    torch.testing.assert_close(got, by_hand(model, cut[None], torch.ones(1, 77, dtype=torch.int64)))
    assert tower.encode(SHORT, truncated=True).equal(tower.encode(SHORT))


@torch.no_grad()
def test_states_of_the_vision_tower_come_into_the_same_space(checkpoint: tuple[Path, CLIPModel]):
    folder, model = checkpoint
    states = torch.randn(9, WIDTH)
    norm = model.vision_model.post_layernorm
    expected = layer_norm(states, (WIDTH,), norm.weight, norm.bias, norm.eps) @ model.visual_projection.weight.T
    tower = TextTower(str(folder))
    torch.testing.assert_close(tower.project(states), expected)
    assert tower.width == WIDTH
    half = TextTower(str(folder), dtype=torch.bfloat16)
    assert half.project(states).dtype == half.encode(SHORT).dtype == torch.bfloat16
    torch.testing.assert_close(half.encode(SHORT).float(), tower.encode(SHORT), rtol=0.1, atol=0.1)


# ---- checkpoints that do not fit
def test_another_width_is_a_sentence(checkpoint: tuple[Path, CLIPModel]):
    with pytest.raises(PruningError, match=r"vision tower has 20 channels, but this CLIP checkpoint's has 12; .*text_tower=llm"):
        TextTower(str(checkpoint[0])).project(torch.zeros(3, 20))


def refused(folder: Path | str) -> str:
    with pytest.raises(ConfigError) as refusal:
        TextTower(str(folder))
    assert "openai/clip-vit-large-patch14-336" in str(refusal.value)
    return str(refusal.value)


def test_checkpoints_that_are_none(tmp_path: Path):
    assert "can't be loaded" in refused(tmp_path / "nowhere")
    LlamaConfig(hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path)
    assert "of type 'llama'" in refused(tmp_path)


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path):
    """transformers makes up one that knows nothing."""
    tiny_clip.clip_model(2).save_pretrained(tmp_path)
    assert "token" in refused(tmp_path)


def test_a_checkpoint_without_its_text_side(tmp_path: Path):
    model = clip_checkpoint(tmp_path)
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("text_projection")}
    model.save_pretrained(tmp_path, state_dict=own)
    assert "lacks 1 weights, text_projection.weight" in refused(tmp_path)


# ---- texts
def test_the_closing_sentence_is_no_part_of_the_question():
    for closing in (
        "Answer the question using a single word or phrase.",
        "Answer with the option's letter from the given choices directly.",
    ):
        assert question_only(f"{SHORT}\nA. cup\nB. bowl\n{closing}") == f"{SHORT}\nA. cup\nB. bowl"
        assert question_only(f"{closing} {SHORT}") == f"{closing} {SHORT}"
    assert blanked("USER: <image>\nWhat?") == "USER:  \nWhat?"
