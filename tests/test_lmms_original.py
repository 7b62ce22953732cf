"""Checkpoints in LLaVA's original format, against the original forward restated, and against Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from lmms_requests import request, texts
from original_checkpoints import LLAVA_VIDEO, TILE, Parts, copy_of, edit_config, llava_parts, loaded, parts_of, published, write_original
from original_forward import (
    SIDE,
    anyres_views,
    assert_same,
    averaged_features,
    image_features,
    original_embeds,
    picture,
    prepared,
    tower_features,
    video_features,
)
from PIL import Image
from torch import nn

from vlm_pruner_eval import ConfigError, get_pruner, keep_count, prune
from vlm_pruner_eval.lmms import load
from vlm_pruner_eval.lmms.checkpoint import Checkpoint
from vlm_pruner_eval.lmms.original_format.conversion import pinpoints
from vlm_pruner_eval.vlms.parts.vicuna import vicuna_v1

CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in it?"}]}]
N_FRAMES = 3


@pytest.fixture(scope="module")
def video() -> Checkpoint:
    return loaded(published("llava_video"), "llava_video")


@pytest.fixture(scope="module")
def llava() -> Checkpoint:
    return loaded(published("llava"), "llava")


# ---- LLaVA-Video


def test_videos_equal_the_original_forward(video: Checkpoint) -> None:
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}]
    text = video.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    answers = []
    for seed in (1, 2, 3):
        frames = np.stack([np.asarray(picture(60, 90, 10 * seed + t)) for t in range(N_FRAMES)])
        inputs = video.processor(text=[text], videos=[frames], videos_kwargs={"do_sample_frames": False}, return_tensors="pt")
        pixels = inputs["pixel_values_videos"][0]
        restated = torch.stack([prepared(Image.fromarray(frame)) for frame in frames])
        torch.testing.assert_close(pixels, restated, atol=2.5 / 127.5, rtol=0)  # Pillow and torchvision round differently
        assert int((inputs["input_ids"] == video.model.config.video_token_id).sum()) == N_FRAMES * 3 * (3 + 1)
        embeds = original_embeds(parts_of("llava_video")[0], text, [video_features(parts_of("llava_video")[0], pixels)])
        answers.append(assert_same(video, dict(inputs), parts_of("llava_video")[0], embeds))
    assert len({tuple(answer) for answer in answers}) > 1, "the answers must depend on the video"


@pytest.mark.parametrize(("height", "width", "most_tiles"), [(60, 130, 9), (130, 60, 2), (100, 100, 2), (30, 140, 9)])
def test_images_equal_the_original_forward(tmp_path: Path, height: int, width: int, most_tiles: int) -> None:
    parts, folder, image = parts_of("llava_video")[0], copy_of("llava_video", tmp_path), picture(height, width)
    edit_config(folder, image_aspect_ratio=f"anyres_max_{most_tiles}")
    checkpoint = loaded(folder, "llava_video")
    text = checkpoint.processor.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    inputs = checkpoint.processor(text=[text], images=[[image]], return_tensors="pt")
    sizes = [(i * TILE, j * TILE) for i in (1, 2) for j in (1, 2)]
    views = anyres_views(image, sizes)
    assert inputs["pixel_values"][0].shape == views.shape
    torch.testing.assert_close(inputs["pixel_values"][0], views, atol=0.1, rtol=0)  # resized twice, rounded differently
    embeds = original_embeds(parts, text, [image_features(parts, image, inputs["pixel_values"][0], sizes, most_tiles)])
    assert_same(checkpoint, dict(inputs), parts, embeds)


def test_a_config_that_says_average_pools_frames_by_averages(tmp_path: Path) -> None:
    """The second way to read the paper's number of tokens: 13 x 13 and newlines in place of 14 x 14, here 2 x 2 in place of 3 x 3."""
    folder, parts = copy_of("llava_video", tmp_path), parts_of("llava_video")[0]
    edit_config(folder, mm_spatial_pool_mode="average")
    checkpoint = loaded(folder, "llava_video")
    frames, text = [picture(70, 90, seed=i) for i in range(N_FRAMES)], "<|im_start|>user\n<video>\nWhat?<|im_end|>\n"
    inputs = checkpoint.processor(text=[text], videos=[frames], videos_kwargs={"do_sample_frames": False}, return_tensors="pt")
    assert int((inputs["input_ids"] == checkpoint.model.config.video_token_id).sum()) == N_FRAMES * 2 * (2 + 1)
    features = averaged_features(parts, inputs["pixel_values_videos"][0])
    assert_same(checkpoint, dict(inputs), parts, original_embeds(parts, text, [features]))
    with prune(checkpoint.model, get_pruner("vlmpruner", pruning_rate="2/3")) as ledger:
        checkpoint.model.generate(**inputs, max_new_tokens=2, pad_token_id=0)
    assert [(record.n_visual, record.n_kept) for record in ledger.records] == [(N_FRAMES * 6, keep_count(N_FRAMES * 6, "2/3"))]


def test_image_and_video_in_one_prompt(video: Checkpoint) -> None:
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Same?"}]
    text = video.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    image, frames = picture(60, 130), np.stack([np.asarray(picture(60, 90, t)) for t in range(2)])
    kwargs = {"videos_kwargs": {"do_sample_frames": False}, "return_tensors": "pt"}
    inputs = video.processor(text=text, images=[[image]], videos=[frames], **kwargs)
    sizes = [(i * TILE, j * TILE) for i in (1, 2) for j in (1, 2)]
    features = [
        image_features(parts_of("llava_video")[0], image, inputs["pixel_values"][0], sizes, 9),
        video_features(parts_of("llava_video")[0], inputs["pixel_values_videos"][0]),
    ]
    assert_same(video, dict(inputs), parts_of("llava_video")[0], original_embeds(parts_of("llava_video")[0], text, features))


def test_pruning_keeps_and_records_what_was_asked(video: Checkpoint) -> None:
    frames = np.stack([np.asarray(picture(60, 90, t)) for t in range(N_FRAMES)])
    text = "<|im_start|>user\n<video>\nWhat?<|im_end|>\n"
    inputs = video.processor(text=[text], videos=[frames], videos_kwargs={"do_sample_frames": False}, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    n_visual = N_FRAMES * 3 * 4
    for method in ("vlmpruner", "divprune", "uniform"):
        with prune(video.model, get_pruner(method, pruning_rate="2/3")) as ledger:
            video.model.generate(**inputs, max_new_tokens=2, pad_token_id=0)
        (record,) = ledger.records
        assert (record.n_images, record.n_visual, record.n_kept) == (1, n_visual, keep_count(n_visual, "2/3"))
        n_text = inputs["input_ids"].shape[1] - n_visual
        assert record.kv_lengths[-1] == n_text + record.n_kept


def test_towers_layer_that_the_original_drops_is_not_there(video: Checkpoint) -> None:
    vision = video.model.config.vision_config
    assert (vision.num_hidden_layers, vision.vision_use_head, video.model.config.vision_feature_layer) == (2, False, -1)
    assert not [name for name, _ in video.model.named_parameters() if ".head." in name or "encoder.layers.2." in name]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("(1x1),...,(2x3)", [[10, 10], [20, 10], [30, 10], [10, 20], [20, 20], [30, 20]]),
        ([[10, 30], [20, 10]], [[30, 10], [10, 20]]),
        ("[[10, 30], (20, 10)]", [[30, 10], [10, 20]]),
    ],
)
def test_sizes_of_tilings_are_written_width_first(written: object, expected: list) -> None:
    assert pinpoints(written, 10) == expected


@pytest.mark.parametrize("written", [None, [], "six", "[1, 2]", [[1, -2]], [[1.5, 2]]])
def test_sizes_of_tilings_that_can_not_be_read(written: object) -> None:
    with pytest.raises(ConfigError, match=r"image_grid_pinpoints: got .*expected pairs of pixels"):
        pinpoints(written, 10)


# ---- LLaVA-1.5


def hugging_face_layout(parts: Parts, folder: Path) -> Path:
    """The same weights as transformers itself would save them, with the image token's row."""
    vision = parts.tower.config.to_dict()
    text = parts.language.config.to_dict() | {"vocab_size": len(parts.tokenizer) + 1}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=len(parts.tokenizer), image_seq_length=25)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tower, weights = model.model.vision_tower, {name: x.clone() for name, x in parts.language.state_dict().items()}
    getattr(tower, "vision_model", tower).load_state_dict(parts.tower.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name].mean(0, keepdim=True)])
    model.model.language_model.load_state_dict({k.removeprefix("model."): x for k, x in weights.items() if k.startswith("model.")})
    model.lm_head.weight = nn.Parameter(weights["lm_head.weight"])
    projector = model.model.multi_modal_projector
    for ours, theirs in ((projector.linear_1, parts.projector[0]), (projector.linear_2, parts.projector[2])):
        ours.load_state_dict(theirs.state_dict())
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("with_tower", "as_bin"), [(True, True), (False, False)], ids=["tower inside, bin", "tower outside, safetensors"])
def test_llava_equals_the_same_weights_in_hugging_face_layout(tmp_path: Path, with_tower: bool, as_bin: bool) -> None:
    parts, clip = llava_parts()
    checkpoint = loaded(write_original(tmp_path, parts, clip, with_tower=with_tower, as_bin=as_bin), "llava", allow_bin=as_bin)
    hf = transformers.LlavaForConditionalGeneration.from_pretrained(hugging_face_layout(parts, tmp_path / "hf")).eval()
    ours, theirs = checkpoint.model.state_dict(), hf.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    text = checkpoint.processor.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    answers = []
    for seed in range(3):
        inputs = checkpoint.processor(text=[text], images=[picture(80, 90, seed)], return_tensors="pt")
        inputs.pop("token_type_ids", None)
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
        with torch.no_grad():
            assert torch.equal(checkpoint.model(**inputs).logits, hf(**inputs).logits)
            answers.append(checkpoint.model.generate(**inputs, **options)[0].tolist())
            assert answers[-1] == hf.generate(**inputs, **options)[0].tolist()
    assert len({tuple(answer[-8:]) for answer in answers}) > 1


def test_llava_equals_the_original_forward(llava: Checkpoint) -> None:
    parts, checkpoint = parts_of("llava")[0], llava
    text = checkpoint.processor.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    inputs = checkpoint.processor(text=[text], images=[picture(80, 90)], return_tensors="pt")
    features = [*tower_features(parts, inputs["pixel_values"])]
    assert_same(checkpoint, dict(inputs), parts, original_embeds(parts, text, features))


def test_the_image_token_has_the_mean_of_all_rows_and_is_never_said(llava: Checkpoint) -> None:
    model = llava.model
    table, n_words = model.lm_head.weight, model.config.text_config.vocab_size - 1
    assert model.config.image_token_id == n_words
    torch.testing.assert_close(table[n_words], table[:n_words].mean(0))
    scores = torch.randn(1000, table.shape[1]) @ table.T
    assert not bool((scores.argmax(-1) == n_words).any())


def test_spare_rows_of_a_table_are_used_before_it_grows(video: Checkpoint) -> None:
    config = video.model.config
    assert config.text_config.vocab_size == LLAVA_VIDEO["vocab_size"] == len(video.model.lm_head.weight)
    assert [config.image_token_id, config.video_token_id] == video.processor.tokenizer.convert_tokens_to_ids(["<image>", "<video>"])


@pytest.mark.parametrize(("model_type", "protocol"), [("llava", "paper"), ("llava_video", "hf")])
def test_answers_through_the_wrapper(model_type: str, protocol: str) -> None:
    rate, source = "2/3", str(published(model_type))
    model = load(f"vlmpruner_{model_type}", pretrained=source, protocol=protocol, method="vlmpruner", pruning_rate=rate, batch_size=2)
    documents = [{"question": f"Q{i}?", "images": [picture(60, 60, i)]} for i in range(2)]
    model.task_dict = {"first": {"test": documents}}
    texts(model, [request("first", i) for i in range(2)])
    assert [answer.error for answer in model.answers] == [None, None]
    n_visual = SIDE**2 if model_type == "llava" else SIDE**2 + SIDE * (SIDE + 1)  # one tile beside the base view
    assert [answer.record.n_kept for answer in model.answers] == [keep_count(n_visual, rate)] * 2


# ---- prompts

TURNS = [
    {"role": "user", "content": [{"type": "text", "text": " Two pictures. "}, {"type": "image"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    {"role": "user", "content": [{"type": "text", "text": "It's"}, {"type": "text", "text": '"what"?\n'}]},
]


@pytest.mark.parametrize("messages", [CHAT, TURNS], ids=["one turn", "three turns"])
def test_the_chat_template_of_llava_is_vicuna_v1(llava: Checkpoint, messages: list[dict]) -> None:
    processor = llava.processor
    assert processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == vicuna_v1(messages, "<image>")


def test_the_chat_template_of_llava_refuses_other_roles(llava: Checkpoint) -> None:
    with pytest.raises(Exception, match="got a message of role tool, expected user or assistant"):
        llava.processor.apply_chat_template([{"role": "tool", "content": "?"}], tokenize=False)


def test_the_chat_template_of_llava_video_is_qwen_1_5(video: Checkpoint) -> None:
    rendered = video.processor.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    assert rendered == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\n<image>\n Two pictures. <|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
        '<|im_start|>user\nIt\'s\n"what"?\n<|im_end|>\n'
        "<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert video.processor.apply_chat_template(own, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_prompts_pad_on_the_left_and_answers_are_greedy_by_default(llava: Checkpoint, video: Checkpoint) -> None:
    for checkpoint in (llava, video):
        assert checkpoint.processor.tokenizer.padding_side == "left"
        settings = checkpoint.model.generation_config
        assert settings.eos_token_id == 2
        assert not settings.do_sample
        assert settings.top_p == transformers.GenerationConfig().top_p
        assert not checkpoint.model.training
