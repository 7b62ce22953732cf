"""Prompts of every kind in one batch: images, videos, both, several, none; and a second turn on what is left of them."""

from __future__ import annotations

import pytest
import torch
import transformers
from fake_flash import NAME as FAKE_FLASH
from test_hook_batches import SEVERAL_UNDER_BEAMS, plain_positions, rate_for
from test_hook_exact import CLOSE, MIXED, compare, distance
from tiny_models import FAMILIES, generate, masked_recompute, prompts, scopes_of, step_logits, views_from
from torch import Tensor, nn
from toy_pruners import IN_MODEL, KeyNorm, StateNorm, Stride

from vlm_pruner_eval import PruningError, hf_compat, hook, prune
from vlm_pruner_eval.hf_compat import cache_of, with_cache
from vlm_pruner_eval.pruners import get_pruner

VIDEO_FAMILIES = sorted(name for name, tiny in FAMILIES.items() if tiny.videos)
MEDIA = [[4, "i0", 7], [3, "v1", 12], [5, "i1", 2, "v1", 6, "i2", 3], [9]]
# every family with images, and those that take videos with both
FAMILY_ROWS = [(family, MIXED) for family in sorted(FAMILIES)] + [(family, MEDIA) for family in VIDEO_FAMILIES]
BY_NAME = [f"{family}-{'images' if rows is MIXED else 'images and videos'}" for family, rows in FAMILY_ROWS]


def each_alone(model: nn.Module, family: str, rows: list, pruner: object, n: int) -> tuple[list, list]:
    """Records and outputs of every row prompted by itself."""
    records, outputs = [], []
    for row in rows:
        with prune(model, pruner) as ledger:
            outputs.append(generate(model, prompts(family, [row]), n))
        records += ledger.records
    return records, outputs


def assert_as_alone(family: str, rows: list, together: list, records: list, padded_to: int) -> None:
    """A row of a batch keeps what it keeps alone, all of its scopes counted."""
    for row, record, alone in zip(rows, together, records, strict=True):
        padding = padded_to - prompts(family, [row])["input_ids"].shape[1]
        assert [p - padding for p in record.kept_positions] == alone.kept_positions
        assert record.kv_lengths == alone.kv_lengths
        assert (record.n_images, record.n_visual) == (len(scopes_of(family, row)), sum(scopes_of(family, row)))


# ---- one batch of everything


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(("family", "rows"), FAMILY_ROWS, ids=BY_NAME)
def test_a_batch_is_exact_and_equals_its_rows_alone(tiny_model, family, rows, layer, attention):
    model, inputs, pruner = tiny_model(family, attention), prompts(family, rows), StateNorm(pruning_rate="2/3", layer=layer)
    output, together, apart = compare(model, inputs, pruner, 4)
    assert apart < CLOSE
    records, outputs = each_alone(model, family, rows, pruner, 4)
    assert_as_alone(family, rows, together, records, inputs["input_ids"].shape[1])
    assert len({record.n_kept for record in records}) > 2, "the rows must end at different lengths"
    for i, alone in enumerate(outputs):
        assert distance(step_logits(output)[i], step_logits(alone)[0]) < CLOSE
        assert torch.equal(output.sequences[i, -4:], alone.sequences[0, -4:])


@pytest.mark.parametrize("name", IN_MODEL)
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_every_method_prunes_videos(tiny_model, family, name):
    model, rows, pruner = tiny_model(family), MEDIA[1:3], get_pruner(name, pruning_rate=rate_for(name))
    inputs = prompts(family, rows)
    with prune(model, pruner, sample_ids=["a", "b"]) as ledger:
        output = generate(model, inputs, 3)
    together = ledger.records
    assert [record.n_kept for record in together] == [sum(map(pruner.default_keep, scopes_of(family, row))) for row in rows]
    for i, row in enumerate(rows):
        with prune(model, pruner, sample_ids=["ab"[i]]) as ledger:
            alone = generate(model, prompts(family, [row]), 3)
        assert_as_alone(family, [row], together[i : i + 1], ledger.records, inputs["input_ids"].shape[1])
        assert distance(step_logits(output)[i], step_logits(alone)[0]) < CLOSE


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_one_budget_over_images_and_videos(tiny_model, family):
    pruner = StateNorm(pruning_rate="2/3", scope="per_sample")
    _, records, apart = compare(tiny_model(family), prompts(family, MEDIA), pruner, 3)
    assert apart < CLOSE
    for record, row in zip(records, MEDIA, strict=True):
        assert (record.scope, record.n_images) == ("per_sample", len(scopes_of(family, row)))
        assert record.n_kept == record.n_asked == pruner.default_keep(sum(scopes_of(family, row)))


@pytest.mark.parametrize("kind", ["beams", "samples"])
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_beams_and_returned_sequences_of_videos(tiny_model, family, kind):
    """With a rule that does not depend on numbers, cached decoding equals decoding without a cache."""
    if family == "qwen3_vl" and not SEVERAL_UNDER_BEAMS:
        pytest.skip("this transformers version can't repeat a video of Qwen3-VL: it takes every frame for a video")
    rows = MEDIA if SEVERAL_UNDER_BEAMS else [[3, "v1", 12], [4, "v1", 3]]
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    kwargs = beams if kind == "beams" else {"do_sample": True, "num_return_sequences": 3}
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        with prune(tiny_model(family), Stride(pruning_rate="2/3")) as ledger:
            outputs.append(generate(tiny_model(family), prompts(family, rows), 4, use_cache=use_cache, **kwargs))
        kept = [sum(map(Stride(pruning_rate="2/3").default_keep, scopes_of(family, row))) for row in rows for _ in range(3)]
        assert [record.n_kept for record in ledger.records[: 3 * len(rows)]] == kept
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    if kind == "beams":
        assert distance(outputs[0].sequences_scores, outputs[1].sequences_scores) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_videos_in_half_precision(tiny_model, family, dtype):
    model, inputs = tiny_model(family, "sdpa", dtype), prompts(family, MEDIA, dtype)
    plain = step_logits(generate(model, inputs, 2))
    tolerance = 0.05 * float(plain.float().abs().max())
    with prune(model, KeyNorm(pruning_rate=0)):
        assert torch.equal(step_logits(generate(model, inputs, 2)), plain)
    output, _, apart = compare(model, inputs, Stride(pruning_rate="2/3"), 2)
    assert bool(step_logits(output).isfinite().all())
    assert apart < tolerance
    with prune(model, Stride(pruning_rate="2/3")):
        for i, row in enumerate(MEDIA):
            alone = step_logits(generate(model, prompts(family, [row], dtype), 1))
            assert distance(step_logits(output)[i, :1], alone[0]) < tolerance


@pytest.mark.parametrize("rows", [[[3, "v1", 6]], MEDIA], ids=["video", "mixed batch"])
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_flash_attentions_rules_with_videos(tiny_model, family, rows):
    if family == "qwen3_vl" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("this transformers version hands flash attention positions of Qwen3-VL that it misreads, pruned or not")
    model, inputs, found = tiny_model(family), prompts(family, rows), []
    config = model.model.language_model.config
    try:
        for attention in ("sdpa", FAKE_FLASH):
            config._attn_implementation = attention
            with prune(model, KeyNorm(pruning_rate="2/3")):
                found.append(step_logits(generate(model, inputs, 4)))
    finally:
        config._attn_implementation = "sdpa"
    assert distance(*found) < CLOSE


# ---- a second turn


def all_positions(model: nn.Module, inputs: dict[str, Tensor], turns: Tensor) -> Tensor:
    """Position ids of a left-padded batch and of the text `turns` [B, n] behind it, [B, L + n] or [3, B, L + n]."""
    ids = torch.cat([inputs["input_ids"], turns], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(turns)], 1)
    if not hasattr(model.model, "get_rope_index"):
        return (mask.cumsum(1) - 1).clamp(min=0)
    known = {name: value for name, value in inputs.items() if name.endswith("grid_thw")} | {"attention_mask": mask}
    if "mm_token_type_ids" in inputs:
        known["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(turns)], 1)
    return model.model.get_rope_index(ids, **known)[0]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(("family", "rows"), FAMILY_ROWS, ids=BY_NAME)
def test_text_in_later_turns_continues_a_pruned_cache_of_a_batch(tiny_model, family, rows, layer):
    """Two turns of text behind prompts of different lengths, one of them without an image."""
    model, inputs = tiny_model(family), prompts(family, rows)
    turns = torch.randint(5, 95, (len(rows), 7), generator=torch.Generator().manual_seed(1))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(turns)], 1)
    length, found, positions = inputs["input_ids"].shape[1], [], all_positions(model, inputs, turns)
    with prune(model, StateNorm(pruning_rate="2/3", layer=layer)) as ledger, torch.no_grad():
        cache = cache_of(model(**inputs, **plain_positions(family, inputs), use_cache=True))
        for first, last in ((length, length + 4), (length + 4, length + 7)):
            later = {"position_ids": positions[..., first:last], "attention_mask": mask[:, :last]}
            found.append(model(input_ids=turns[:, first - length : last - length], **with_cache(model.forward, cache), **later).logits)
    assert len(ledger.records) == len(rows), "a later turn is no prefill"
    slow = masked_recompute(model, inputs, views_from(ledger.records, inputs), turns)[:, -7:]
    assert distance(torch.cat(found, 1), slow) < CLOSE


def _later_media(model: nn.Module, family: str, segment: str) -> None:
    late = prompts(family, [[4, segment, 7]])
    del late["attention_mask"]
    with torch.no_grad():
        cache = cache_of(model(**prompts(family, [[9]]), use_cache=True))
        model(**late, position_ids=torch.arange(9, 9 + late["input_ids"].shape[1])[None], **with_cache(model.forward, cache))


def test_a_new_image_in_a_later_turn_is_refused(tiny_model, family):
    with pytest.raises(PruningError, match="later turn"), prune(tiny_model(family), Stride(pruning_rate=0.5)):
        _later_media(tiny_model(family), family, "i0")


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_a_new_video_in_a_later_turn_is_refused(tiny_model, family):
    with pytest.raises(PruningError, match="later turn"), prune(tiny_model(family), Stride(pruning_rate=0.5)):
        _later_media(tiny_model(family), family, "v0")


# ---- what stays behind, and what these tests would notice


def _traces(model: nn.Module) -> tuple[set, set]:
    """Hooks of all modules, but for transformers' own output capturing, and attributes of the two that are patched."""
    hooks = {
        (name, key, id(function))
        for name, module in model.named_modules()
        for table in (module._forward_pre_hooks, module._forward_hooks)
        for key, function in table.items()
        if "output_capturing" not in getattr(function, "__name__", "")
    }
    return hooks, {(id(owner), name) for owner in (model.model, model.model.language_model) for name in owner.__dict__}


@pytest.mark.parametrize("ending", ["as usual", "by an exception"])
@pytest.mark.parametrize(("family", "rows"), FAMILY_ROWS, ids=BY_NAME)
def test_nothing_stays_behind_on_any_family(tiny_model, family, rows, ending):
    model, inputs = tiny_model(family), prompts(family, rows)
    plain, before = step_logits(generate(model, inputs, 2)), _traces(model)
    if ending == "as usual":
        with prune(model, KeyNorm(pruning_rate="2/3")):
            assert not torch.equal(step_logits(generate(model, inputs, 2)), plain)
            assert _traces(model) != before
    else:
        with pytest.raises(ZeroDivisionError), prune(model, KeyNorm(pruning_rate="2/3")):
            model(**inputs, use_cache=True)
            raise ZeroDivisionError
    assert _traces(model) == before
    assert torch.equal(step_logits(generate(model, inputs, 2)), plain)


@pytest.mark.parametrize("mistake", ["renumbered positions", "unmasked fillers", "stale decoding mask"])
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_these_tests_would_notice(tiny_model, monkeypatch, family, mistake):
    """Three plausible mistakes of the hook move the logits of a batch of images and videos far beyond the tolerance."""
    if mistake == "renumbered positions":
        monkeypatch.setattr(hook, "take", lambda x, index: x[..., : index.shape[1], :].expand(*x.shape[:-3], len(index), -1, -1))
    else:
        right = hf_compat.causal_mask

        def wrong(config: object, hidden: Tensor, mask: Tensor, view: object) -> Tensor | None:
            if mistake == "unmasked fillers":
                return right(config, hidden, None, view)
            return right(config, hidden, mask if view.length == 0 else mask.flip(1), view)

        monkeypatch.setattr(hf_compat, "causal_mask", wrong)
    assert compare(tiny_model(family), prompts(family, MEDIA), KeyNorm(pruning_rate="2/3"))[2] > 1e-2
