"""The paper's prompt and image handling, restated from LLaVA's published behaviour."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lmms_requests import GREEDY, fresh_model, request, texts, tiny_llava
from PIL import Image
from tiny_checkpoints import checkpoint
from tiny_models import IMAGE
from transformers import LlavaNextConfig, LlavaNextImageProcessor

from vlm_pruner_eval import ConfigError, keep_count
from vlm_pruner_eval.lmms import PrunedModel, load, planning
from vlm_pruner_eval.lmms.prompts import Request
from vlm_pruner_eval.vlms.llava_next import at_most_tiles
from vlm_pruner_eval.vlms.parts.vicuna import pad_to_square, vicuna_v1

QUESTION = {"role": "user", "content": [{"type": "text", "text": "What is it?\n"}, {"type": "image"}]}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def test_vicuna_v1_puts_the_image_first_and_has_the_system_sentence() -> None:
    assert vicuna_v1([QUESTION], "<image>") == f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"


def test_vicuna_v1_closes_earlier_answers() -> None:
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    again = {"role": "user", "content": [{"type": "text", "text": "Sure?"}]}
    assert vicuna_v1([QUESTION, answer, again], "<image>").endswith("What is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:")


@pytest.mark.parametrize("message", [{"role": "system", "content": []}, {"role": "user", "content": [{"type": "video"}]}])
def test_what_the_template_has_no_place_for_is_a_sentence(message: dict) -> None:
    with pytest.raises(ValueError, match=r"protocol=paper: got .* expected"):
        vicuna_v1([message], "<image>")


@pytest.mark.parametrize(("size", "box"), [((6, 2), (0, 2, 6, 4)), ((3, 8), (2, 0, 5, 8)), ((4, 4), (0, 0, 4, 4))])
def test_padding_is_the_mean_colour_with_the_image_in_the_middle(size: tuple[int, int], box: tuple[int, ...]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    padded = pad_to_square(image, (0.48145466, 0.4578275, 0.40821073))
    assert padded.size == (max(size),) * 2
    assert np.array_equal(np.asarray(padded.crop(box)), np.asarray(image))
    outside = np.ones(padded.size[::-1], dtype=bool)
    outside[box[1] : box[3], box[0] : box[2]] = False
    assert np.asarray(padded)[outside].tolist() == [[122, 116, 104]] * int(outside.sum())


def metaspace_copy(family: str, folder: Path, prepend: str) -> str:
    """A tiny checkpoint whose tokenizer writes spaces as Llama's does, and puts one at the start of a text or of every piece."""
    copy = shutil.copytree(tiny_llava() if family == "llava" else checkpoint(family), folder / prepend)
    core = json.loads((copy / "tokenizer.json").read_text())
    space = next(token for token, number in core["model"]["vocab"].items() if number > 5 and token not in ("<image>", "<pad>"))
    core["model"]["vocab"]["▁"] = core["model"]["vocab"].pop(space)
    core["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prepend, "split": False}
    (copy / "tokenizer.json").write_text(json.dumps(core))
    return str(copy)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_tokenizer_that_loses_the_space_behind_an_image_is_refused_under_the_papers_protocol_only(family: str, tmp_path: Path) -> None:
    """LLaVA tokenizes the text behind an image apart, so it begins with Llama's space; transformers 5 can save one that has none there."""
    model_id, broken = f"vlmpruner_{family}", metaspace_copy(family, tmp_path, "first")
    with pytest.raises(ConfigError, match=r"protocol: got 'paper' for a checkpoint whose tokenizer splits .* unlike LLaVA.*protocol=hf"):
        load(model_id, pretrained=broken, protocol="paper")
    assert load(model_id, pretrained=broken).settings.protocol == "hf"
    assert load(model_id, pretrained=metaspace_copy(family, tmp_path, "always"), protocol="paper").settings.protocol == "paper"


def test_an_answer_has_at_most_the_tokens_of_llavas_scripts_where_the_task_names_none() -> None:
    model = load("vlmpruner_llava", pretrained=tiny_llava(), protocol="paper")
    assert planning.generation({}, model.defaults).kwargs["max_new_tokens"] == 128
    assert planning.generation({"max_new_tokens": 16}, model.defaults).kwargs["max_new_tokens"] == 16
    assert planning.generation({}, fresh_model().defaults).kwargs["max_new_tokens"] == 1024


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3_vl", "the script behind the paper's numbers of this family was not released"),
        ("llava_video", "the script behind the paper's numbers of this family was not released"),
        ("qwen2_5_vl", "the paper has no numbers of this family"),
        ("llava_onevision", "the paper has no numbers of this family"),
        ("internvl", "the paper has no numbers of this family"),
    ],
)
def test_a_family_without_a_paper_protocol_says_why(family: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"protocol: got 'paper', expected hf for vlmpruner_{family}: {reason}.*; protocol=hf is the "):
        load(f"vlmpruner_{family}", pretrained="x", protocol="paper")


SIZES = [(40, 40), (100, 100), (480, 640), (60, 400), (500, 50), (112, 112), (1200, 1300)]


def model_of(family: str, protocol: str = "paper") -> PrunedModel:
    """A tiny checkpoint under a protocol, with images of many sizes, (height, width)."""
    model = load(f"vlmpruner_{family}", pretrained=checkpoint(family), protocol=protocol)
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]
    model.task_dict = {"first": {"test": [{"question": f"What is {i}?", "images": [image]} for i, image in enumerate(images)]}}
    return model


def inputs_of(model: PrunedModel, i: int) -> dict[str, torch.Tensor]:
    return model._inputs([model.prompt_of(Request.of(0, request("first", i)))])


# ---- LLaVA and LLaVA-NeXT


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_run_under_the_papers_protocol_sends_that_prompt_and_that_image(family: str) -> None:
    """Through the wrapper, against a plain generate of the prompt and the image, padded for LLaVA-1.5, made here."""
    model, requests = model_of(family), [request("first", i) for i in range(len(SIZES))]
    answers = texts(model, requests)
    mean = tuple(int(value * 255) for value in model.processor.image_processor.image_mean)
    for i, answer in enumerate(answers):
        (image,) = model.task_dict["first"]["test"][i]["images"]
        if family == "llava":
            padded = Image.new("RGB", (max(image.size),) * 2, mean)
            padded.paste(image, ((padded.width - image.width) // 2, (padded.height - image.height) // 2))
            image = padded
        inputs = model.processor(text=[f"{SYSTEM} USER: <image>\nWhat is {i}? ASSISTANT:"], images=[image], return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            ids = model.model.generate(**inputs, max_new_tokens=GREEDY["max_new_tokens"], do_sample=False, pad_token_id=0)
        assert answer == model.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert model.describe()["protocol"] == "paper"
    assert answers != texts(model_of(family, "hf"), requests)
    model.configure("vlmpruner", "8/9")
    model.generate_until(requests)
    assert [a.record.n_kept for a in model.answers] == [keep_count(a.record.n_visual, "8/9") for a in model.answers]


# ---- Qwen2-VL


def test_qwen2_vl_makes_about_1280_tokens_of_every_image_and_keeps_its_own_template() -> None:
    model = model_of("qwen2_vl")
    assert (model.processor.image_processor.patch_size, model.processor.image_processor.merge_size) == (14, 2)  # as published
    for i, (height, width) in enumerate(SIZES):
        inputs = inputs_of(model, i)
        _, rows, cols = (inputs["image_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
        n_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
        assert n_tokens == rows * cols
        assert n_tokens == pytest.approx(1280, rel=0.08), (height, width)
        assert rows / cols == pytest.approx(height / width, rel=0.15)
        text = model.tokenizer.decode(inputs["input_ids"][0]).replace("<|image_pad|>" * n_tokens, "<|image_pad|>")
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is {i}?"}]}]
        assert text == model.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    described = model.describe()
    assert (described["protocol"], described["min_pixels"], described["max_pixels"]) == ("paper", 1003520, 1003520)


@pytest.mark.parametrize("name", ["min_pixels", "max_pixels"])
def test_pixels_beside_the_papers_protocol_contradict_it(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: got 784, but protocol=paper means 1003520 on vlmpruner_qwen2_vl; leave it out"):
        load("vlmpruner_qwen2_vl", pretrained="x", protocol="paper", **{name: 784})


# ---- LLaVA-NeXT


def test_llava_next_shows_at_most_four_views_of_any_image() -> None:
    model, free = model_of("llava_next"), model_of("llava_next", "hf")
    newline_rows = 12  # at most: three tiles of four rows
    n_views = {"paper": [], "hf": []}
    for i in range(len(SIZES)):
        inputs = inputs_of(model, i)
        n_views["paper"].append(inputs["pixel_values"].shape[1])
        n_views["hf"].append(inputs_of(free, i)["pixel_values"].shape[1])
        assert int((inputs["input_ids"] == IMAGE).sum()) <= 4 * 16 + newline_rows
    assert max(n_views["paper"]) == 4
    assert max(n_views["hf"]) == 5, "2 x 2 tiles and the base view, without the protocol"
    assert model.config.image_grid_pinpoints == model.processor.image_processor.image_grid_pinpoints == [[56, 112], [112, 56], [56, 168]]


def test_the_published_shapes_of_llava_next_but_the_square_one_are_left() -> None:
    config, processor = LlavaNextConfig(), SimpleNamespace(image_processor=LlavaNextImageProcessor())
    assert [672, 672] in config.image_grid_pinpoints
    at_most_tiles(3, config, processor)
    shapes = [[336, 672], [672, 336], [1008, 336], [336, 1008]]
    assert config.image_grid_pinpoints == processor.image_processor.image_grid_pinpoints == shapes
    assert max(height * width for height, width in shapes) + 336**2 == 1344 * 336


def test_the_second_reading_has_newline_tokens_among_the_papers_2304() -> None:
    """Two tiles of 24 x 24 and at most 48 newlines beside the base view are 1,776 tokens; three are more than 2,304 with any newline."""
    config, processor = LlavaNextConfig(), SimpleNamespace(image_processor=LlavaNextImageProcessor())
    at_most_tiles(2, config, processor)
    assert config.image_grid_pinpoints == processor.image_processor.image_grid_pinpoints == [[336, 672], [672, 336]]
    model = load("vlmpruner_llava_next", pretrained=checkpoint("llava_next"), protocol="paper_two_tiles")
    assert model.config.image_grid_pinpoints == [[56, 112], [112, 56]]
    assert (model.describe()["protocol"], model.may_shrink, model.defaults.new_tokens) == ("paper_two_tiles", False, 128)
    assert model.protocol.render([QUESTION], model.processor) == f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"
    with pytest.raises(ConfigError, match=r"got 'paper_two_tiles', expected hf or paper for vlmpruner_llava: it is a reading of another"):
        load("vlmpruner_llava", pretrained="x", protocol="paper_two_tiles")


def test_llava_next_around_another_language_model_has_no_paper_protocol() -> None:
    config = LlavaNextConfig(text_config={"model_type": "mistral"})
    with pytest.raises(ConfigError, match="protocol: got 'paper' for a LLaVA-NeXT around 'mistral', expected one around Vicuna"):
        at_most_tiles(3, config, SimpleNamespace(image_processor=LlavaNextImageProcessor()))


def test_llava_next_without_a_shape_of_three_tiles_has_no_paper_protocol() -> None:
    config = LlavaNextConfig(image_grid_pinpoints=[[672, 672]])
    with pytest.raises(ConfigError, match=r"image_grid_pinpoints are \[\[672, 672\]\], expected one or more of at most 3 tiles"):
        at_most_tiles(3, config, SimpleNamespace(image_processor=LlavaNextImageProcessor()))
