"""method=downsample through the chat wrapper: images really get smaller, records say so, and what can't be done is refused."""

from __future__ import annotations

import pytest
import torch
from lmms_requests import GREEDY, plain, request, set_batch_size, texts, to_messages
from PIL import Image
from test_lmms_families import NO_IMAGE, ask, documents, loaded
from test_lmms_loglikelihood import choices
from tiny_checkpoints import checkpoint
from tiny_videos import pictures

from vlm_pruner_eval import ConfigError, PruningError, keep_count
from vlm_pruner_eval.lmms import PrunedModel, downsampling, load
from vlm_pruner_eval.pruners.downsample import smaller_grid

QWEN = ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"]


@pytest.fixture(params=QWEN)
def model(request: pytest.FixtureRequest) -> PrunedModel:
    model = loaded(request.param)
    model.task_dict = {"first": {"test": documents()}}
    model.configure("none")
    set_batch_size(model, 1)
    return model


def side(model: PrunedModel) -> int:
    """Pixels of a token."""
    part = model.processor.image_processor
    return part.patch_size * part.merge_size


def full_tokens(model: PrunedModel, image: Image.Image) -> int:
    """Tokens of an image as the processor has it, from the pixels that it makes."""
    part = model.processor.image_processor
    return int(part(images=[image], return_tensors="pt")["image_grid_thw"][0].prod()) // part.merge_size**2


def test_images_are_resized_to_at_most_what_the_rate_leaves(model: PrunedModel, rate: str = "2/3") -> None:
    images = [document["images"] for document in documents()]
    full = [[full_tokens(model, image) for image in found] for found in images]
    grids = [
        [smaller_grid(image.height, image.width, keep_count(n, rate)) for image, n in zip(found, counts, strict=True)]
        for found, counts in zip(images, full, strict=True)
    ]
    model.configure("downsample", rate)
    answers = {}
    for size in (1, 4):
        answers[size] = ask(model, size)
        for answer, counts, expected in zip(model.answers, full, grids, strict=True):
            record = answer.record
            assert record.n_images == len(counts)
            assert record.n_visual == record.n_kept == sum(rows * cols for rows, cols in expected)
            assert record.n_asked == sum(keep_count(n, rate) for n in counts) >= record.n_kept
            assert record.n_full == sum(counts)
            assert record.layouts == tuple((rows * cols, rows, cols, 1) for rows, cols in expected)
            assert record.layer is None and len(set(record.kv_lengths)) == 1
            assert record.n_visual < record.n_full or not counts
    assert answers[1] == answers[4]
    model.configure("none")
    assert ask(model)[NO_IMAGE] == answers[1][NO_IMAGE]
    assert ask(model) != answers[1]


def test_the_model_answers_as_the_plain_one_does_to_the_smaller_image(model: PrunedModel) -> None:
    larger = [
        document | {"images": [image.resize((3 * image.width, 3 * image.height)) for image in document["images"]]}
        for document in documents()
    ]
    model.task_dict = {"first": {"test": larger}}
    model.configure("downsample", "1/2")
    found = ask(model)
    for document, answer, record in zip(larger, found, [answer.record for answer in model.answers], strict=True):
        resized = []
        for image, (_, rows, cols, _) in zip(document["images"], record.layouts, strict=True):
            assert rows * cols >= 4, "below, the processor by itself would make the image larger again"
            resized.append(image.resize((cols * side(model), rows * side(model)), Image.Resampling.BICUBIC))
        assert answer == plain(model, document | {"images": resized})


def test_the_processors_lower_bound_does_not_undo_it_and_is_there_again_afterwards(model: PrunedModel) -> None:
    """The checkpoint makes no image smaller than 4 tokens; 1/9 of 9 is one."""
    part = model.processor.image_processor
    before = dict(part.size), getattr(part, "min_pixels", None)
    image = documents()[0]["images"][0].resize((3 * side(model), 3 * side(model)))
    model.task_dict = {"first": {"test": [{"question": "?", "images": [image]}]}}
    model.configure("downsample", "8/9")
    texts(model, [request("first", 0)])
    assert (model.answers[0].error, model.answers[0].record.n_full, model.answers[0].record.n_visual) == (None, 9, 1)
    assert (dict(part.size), getattr(part, "min_pixels", None)) == before


def test_a_protocol_that_fixes_the_size_is_undercut_too() -> None:
    sizes = {"min_pixels": 16 * 28**2, "max_pixels": 16 * 28**2}
    fixed = load("vlmpruner_qwen2_vl", pretrained=checkpoint("qwen2_vl"), **sizes, method="downsample", pruning_rate="3/4")
    fixed.task_dict = {"first": {"test": documents()}}
    texts(fixed, [request("first", i) for i in (0, 1, 3)])
    for answer in fixed.answers:
        assert answer.error is None
        assert 12 <= answer.record.n_full <= 20 and answer.record.n_visual <= answer.record.n_asked < answer.record.n_full


def test_rate_zero_is_the_plain_model(model: PrunedModel) -> None:
    expected = ask(model)
    plain_records = [answer.record for answer in model.answers]
    model.configure("downsample", 0)
    assert ask(model) == ask(model, 4) == expected
    assert [(a.record.n_visual, a.record.n_full) for a in model.answers] == [(record.n_visual, None) for record in plain_records]


def test_scored_continuations_see_the_smaller_image(model: PrunedModel) -> None:
    model.configure("downsample", "2/3")
    small = model.loglikelihood(choices(0))
    assert {answer.error for answer in model.answers} == {None}
    assert {answer.record.n_full > answer.record.n_visual for answer in model.answers} == {True}
    model.configure("none")
    assert model.loglikelihood(choices(0)) != small


# ---- refusals


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])
def test_families_without_dynamic_resolution_are_refused_and_keep_their_method(family: str) -> None:
    model = loaded(family)
    model.configure("uniform", "1/2")
    with pytest.raises(ConfigError, match=rf"method: got downsample for vlmpruner_{family}, whose images make whole views or tiles"):
        model.configure("downsample", "1/2")
    assert model.method == "uniform"


def test_a_video_is_a_failed_sample_with_a_sentence(model: PrunedModel) -> None:
    def with_video(document: dict) -> list[dict]:
        clip = [Image.fromarray(frame) for frame in pictures(4)]
        return [{"role": "user", "content": [{"type": "video", "url": clip}, {"type": "text", "text": "?"}]}]

    model.configure("downsample", "1/2")
    assert texts(model, [request("first", 0, messages=with_video)]) == [""]
    assert "got 1 video(s) with method=downsample, expected images only; method=pool" in model.answers[0].error


@pytest.mark.parametrize("keeps", ["the image", "a larger one"])
def test_images_that_did_not_get_smaller_are_an_error(model: PrunedModel, keeps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_resize(image: Image.Image, size: tuple[int, int], *args: object) -> Image.Image:
        pixels = torch.zeros(size[1] + side(model), size[0], 3, dtype=torch.uint8)
        return image.copy() if keeps == "the image" else Image.fromarray(pixels.numpy())

    model.configure("downsample", "2/3")
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "resize", no_resize)
        texts(model, [request("first", 0)])
    assert "visual tokens, expected " in model.answers[0].error
    assert "images make at full size; something else changed their size" in model.answers[0].error


def test_a_rate_that_makes_no_image_smaller_is_an_error(model: PrunedModel) -> None:
    model.configure("downsample", 0.01)
    with pytest.raises(PruningError, match=r"none of the 6 samples with images lost a visual token at pruning rate 0.01 \(downsample\)"):
        ask(model)


def test_records_are_held_against_the_plans(model: PrunedModel) -> None:
    model.configure("downsample", "2/3")
    texts(model, [request("first", 0, options=GREEDY | {"num_beams": 2}, messages=to_messages)])
    record = model.answers[0].record
    assert model.answers[0].error is None and record.n_full > record.n_visual
    plan = downsampling.Plan(record.n_full, record.n_asked, record.n_visual)
    assert downsampling.as_planned([record, record], [plan], ["a"]) == [record, record]
    for wrong in (
        downsampling.Plan(record.n_full, record.n_asked, record.n_visual + 1),
        downsampling.Plan(record.n_full, record.n_visual - 1, record.n_visual),
        downsampling.Plan(record.n_visual, record.n_visual - 1, record.n_visual),
    ):
        with pytest.raises(PruningError, match="a: the model saw"):
            downsampling.as_planned([record], [wrong], ["a"])
