"""The paper's prompt and image handling, restated from LLaVA's published behaviour."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lmms_requests import GREEDY, fresh_model, request, texts, tiny_llava
from PIL import Image

from vlm_pruner_eval import ConfigError
from vlm_pruner_eval.lmms import load
from vlm_pruner_eval.lmms.protocols import pad_to_square, vicuna_v1

QUESTION = {"role": "user", "content": [{"type": "text", "text": "What is it?\n"}, {"type": "image"}]}
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
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


def test_a_run_under_the_papers_protocol_sends_that_prompt_and_that_image() -> None:
    """Through the wrapper, against a plain generate of the prompt and the padded image written out here."""
    model = load("vlmpruner_llava", pretrained=tiny_llava(), protocol="paper")
    model.task_dict = fresh_model().task_dict
    answers = texts(model, [request("first", i) for i in range(3)])
    for i, answer in enumerate(answers):
        document = model.task_dict["first"]["test"][i]
        prompt = f"{SYSTEM} USER: <image>\n{document['question']} ASSISTANT:"
        mean = [int(value * 255) for value in model.processor.image_processor.image_mean]
        (image,) = document["images"]  # 70 wide, 60 high
        padded = Image.new("RGB", (70, 70), tuple(mean))
        padded.paste(image, (0, 5))
        inputs = model.processor(text=[prompt], images=[padded], return_tensors="pt")
        with torch.no_grad():
            ids = model.model.generate(**inputs, max_new_tokens=GREEDY["max_new_tokens"], do_sample=False)
        assert answer == model.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert model.describe()["protocol"] == "paper"
    assert answers != texts(fresh_model_without_pruning(), [request("first", i) for i in range(3)])


def fresh_model_without_pruning():
    model = fresh_model()
    model.configure("none")
    return model


def test_a_family_without_a_paper_protocol_says_so() -> None:
    with pytest.raises(ConfigError, match="protocol: got 'paper', expected hf for vlmpruner_qwen2_vl"):
        load("vlmpruner_qwen2_vl", pretrained="x", protocol="paper")
