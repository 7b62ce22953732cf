"""With method=none and protocol=hf, our wrappers answer as lmms-eval's stock wrapper of the same family does.

The stock classes run as they are, on the CPU (device_map="cpu"), on the same tiny checkpoint, one prompt at a time. Compared
are the strings, and what reaches `generate`: the ids exactly, the pixels to a rounding. Both sides are given the same pixel
limits and number type. Where the two differ on purpose, a test below asserts the difference and says whose it is, so that
we notice when it goes away.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from thinning import only

from vlm_pruner_eval.embedded import minivlm_path, tasks_path

pytest.importorskip("decord", reason="lmms-eval's stock wrappers import decord, which it does not install by itself")
pytest.importorskip("qwen_vl_utils", reason="lmms-eval's stock Qwen wrappers resize images with qwen_vl_utils")

from stock_wrappers import FAMILIES, GREEDY, QWEN, QWEN_SYSTEM, STOCK, Side, our_model, picture, stock_model

SIZES = [[(56, 112)], [(50, 100)], [(112, 80)], [(40, 140)], [(150, 160)], [(33, 71)], [(112, 112), (56, 56)], [(50, 100), (70, 64)], []]
SEVERAL, NO_IMAGE = (6, 7), 8
SAID = " Yes .\n\nAn answer to Q: it is a cat. "
LEVEL = 1 / 255 / 0.26  # one of 256 brightness levels after normalization, about


@functools.cache
def documents() -> list[dict]:
    pictures = [[picture(*size, 10 * i + k) for k, size in enumerate(sizes)] for i, sizes in enumerate(SIZES)]
    return [{"question": f"Q{i}: what is it{'?' * (i % 3)}", "images": images} for i, images in enumerate(pictures)]


def _seen_by_stock(family: str, docs: Sequence[dict]) -> list[dict]:
    """The documents as the stock wrapper hands them to the processor."""
    return [doc | {"images": [STOCK[family].prepare(image) for image in doc["images"]]} for doc in docs]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def sides(family: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Side, Side]:
    """(stock, ours)."""
    both = Side(stock_model(family), STOCK[family]), Side(our_model(family), None)
    for side in both:
        side.note_calls(monkeypatch)
    return both


def _comparable(family: str) -> list[dict]:
    """Documents that the stock wrapper answers, and answers rightly: `test_what_llava_hf_does_wrong` has the others."""
    left_out = {"llava": {NO_IMAGE}, "llava_next": {NO_IMAGE}, "llava_onevision": {NO_IMAGE, *SEVERAL}}.get(family, set())
    return [doc for i, doc in enumerate(documents()) if i not in left_out]


def _strings(family: str, answers: list[str]) -> list[str]:
    """Our answers, as far as they must be the stock ones: the stock Qwen2-VL strips white space from both ends."""
    return [answer.strip() for answer in answers] if family == "qwen2_vl" else answers


def _pixels(call: dict) -> torch.Tensor:
    return call["pixel_values"].float()


def _by_ids(calls: list[dict]) -> list[dict]:
    """Calls in an order that does not depend on how a wrapper sorts its requests."""
    return sorted(calls, key=lambda call: call["input_ids"].tolist())


# ---- the same


def test_the_answers_and_the_inputs_are_the_same(family: str, sides: tuple[Side, Side]) -> None:
    """On one image, odd sizes, several images and none; Qwen: on images as the stock wrapper makes them (see below).

    Both sides group requests, and give the answers back in the order of the questions.
    """
    stock, ours = sides
    docs = _comparable(family)
    expected = stock.ask(docs)
    assert len({answer for answer in expected if answer}) > len(docs) // 2, "the tiny model must answer differently to different documents"
    assert _strings(family, ours.ask(_seen_by_stock(family, docs))) == expected
    for theirs, call in zip(_by_ids(stock.calls), _by_ids(ours.calls), strict=True):
        assert torch.equal(theirs["input_ids"], call["input_ids"])
        assert ("pixel_values" in theirs) == ("pixel_values" in call)
        if "pixel_values" in call:
            assert torch.allclose(_pixels(theirs), _pixels(call), atol=0.01)  # bfloat16 rounds values up to 2.7
        for name in ("image_sizes", "image_grid_thw"):
            assert (name in theirs) == (name in call)
            assert name not in theirs or torch.equal(theirs[name], call[name])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_images_of_whole_patches_need_no_preparation(family: str, sides: tuple[Side, Side]) -> None:
    stock, ours = sides
    side = 2 * {"qwen2_5_vl": 14, "qwen3_vl": 16}[family]
    docs = [{"question": "Q?" * n, "images": [picture(2 * side, n * side, n)]} for n in (2, 3, 4)]
    assert ours.ask(docs) == stock.ask(docs)


OPTIONS = {
    "short": {"max_new_tokens": 3, "temperature": 0},
    "spelt out": {"max_new_tokens": 6, "temperature": 0, "top_p": None, "num_beams": 1, "do_sample": False},
    "no temperature": {"max_new_tokens": 7},
    "beams": {"max_new_tokens": 6, "temperature": 0, "num_beams": 2},
    "no stop string": {"max_new_tokens": 6, "temperature": 0, "until": []},
}
# one class stands behind the three LLaVA families, so two sets of options for each; by default for the others, too
ASKED = [(name, key) for i, name in enumerate(FAMILIES) for k, key in enumerate(OPTIONS) if "llava" not in name or (i + k) % 5 < 2]
BY_DEFAULT = [(name, key) for i, name in enumerate(FAMILIES) for k, key in enumerate(OPTIONS) if (i + k) % 5 < 2]


@pytest.mark.parametrize(("family", "options"), only(ASKED, BY_DEFAULT), indirect=["family"])
def test_generation_options_mean_the_same(family: str, sides: tuple[Side, Side], options: str) -> None:
    stock, ours = sides
    docs = _comparable(family)[:2]
    expected = stock.ask(docs, OPTIONS[options])
    assert _strings(family, ours.ask(_seen_by_stock(family, docs), OPTIONS[options])) == expected
    n_new = OPTIONS[options]["max_new_tokens"]
    assert [{call["max_new_tokens"] for call in side.calls} for side in sides] == [{n_new}] * 2


@pytest.mark.slow
def test_an_evaluation_ends_in_the_same_answers_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MiniVLM on the first documents of all DIGITSCENES tasks, through lmms-eval's evaluator, by either model name."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    found = {}
    for name, arguments in {
        "llava_hf": f"pretrained={minivlm_path()},device=cpu,device_map=cpu",
        "vlmpruner_llava": "pretrained=minivlm,device=cpu,method=none",
    }.items():
        manager = TaskManager(verbosity="ERROR", include_path=str(tasks_path()), include_defaults=False, model_name=name)
        result = simple_evaluate(model=name, model_args=arguments, tasks=["digitscenes"], limit=2, task_manager=manager)
        answers = {task: [sample["resps"] for sample in samples] for task, samples in result["samples"].items()}
        scores = {(task, key): value for task, metrics in result["results"].items() for key, value in metrics.items() if "," in key}
        found[name] = answers, scores
    assert len(found["llava_hf"][0]) == 6
    assert len({str(answer) for answers in found["llava_hf"][0].values() for answer in answers}) > 5
    assert found["llava_hf"] == found["vlmpruner_llava"]


# ---- different, and why


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"], indirect=True)
def test_what_llava_hf_does_wrong(family: str, sides: tuple[Side, Side]) -> None:
    """It hands an empty list of images to processors that can't take one, so a document without an image ends the run.

    And it hands the images of a prompt over flat, so LLaVA-OneVision cuts each of several images into tiles, as it should
    do with a single one only (arXiv 2408.03326: several images are base views).
    """
    stock, ours = sides
    with pytest.raises((IndexError, ValueError)):
        stock.ask([documents()[NO_IMAGE]])
    assert all(ours.ask([documents()[NO_IMAGE]]))
    if family == "llava_onevision":
        several = [documents()[i] for i in SEVERAL]
        assert stock.ask(several) != ours.ask(several)
        assert [call["pixel_values"].shape[:2] for call in ours.calls] == [(2, 1), (2, 1)]
        assert min(call["pixel_values"].shape[1] for call in stock.calls) > 1


@pytest.mark.parametrize("family", QWEN, indirect=True)
def test_the_stock_qwen_wrappers_change_the_pixels_first(family: str, sides: tuple[Side, Side]) -> None:
    """All resize an image on their own before the processor, with another filter; we leave it to the processor alone.

    By about a level of brightness where no limit is met. The stock Qwen2-VL compresses every image as a JPEG of quality 85
    besides, which moves noise by tens of levels.
    """
    stock, ours = sides
    docs = [documents()[1]]
    stock.ask(docs)
    ours.ask(docs)
    apart = float((_pixels(stock.calls[0]) - _pixels(ours.calls[0])).abs().max())
    if family == "qwen2_vl":
        assert apart > 20 * LEVEL
    else:
        assert 0.2 * LEVEL < apart < 2 * LEVEL


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
def test_the_stock_qwen3_vl_leaves_the_pixel_limits_of_images_unused(family: str, sides: tuple[Side, Side]) -> None:
    """Its max_pixels and min_pixels reach videos only, and do_resize=False keeps the checkpoint's own limits out too."""
    stock, ours = sides
    docs = [{"question": "Q?", "images": [picture(256, 256, 1)]}]  # 64 merged patches, limit 36
    stock.ask(docs)
    ours.ask(docs)
    tokens = [int(call["image_grid_thw"].prod()) // 4 for call in (stock.calls[0], ours.calls[0])]
    assert tokens == [64, 36]


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
def test_the_stock_qwen3_vl_adds_a_system_turn_that_the_checkpoint_has_not(
    family: str, sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    """protocol=hf is the checkpoint's template, in which Qwen3-VL has no system turn of its own; the stock wrapper makes one.

    Everywhere else in this file our side has `system_prompt`, which makes the same turn.
    """
    stock, ours = sides
    monkeypatch.setattr(ours.model.prompts, "_settings", dataclasses.replace(ours.model.settings, system_prompt=None))
    docs = [documents()[NO_IMAGE]]
    assert stock.ask(docs) != ours.ask(docs)
    theirs, own = (side.model.tokenizer.decode(side.calls[0]["input_ids"][0]) for side in sides)
    assert theirs == f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n{own}"


def test_answers_are_as_long_as_the_stock_wrappers_where_the_task_does_not_say(family: str, sides: tuple[Side, Side]) -> None:
    for side in sides:
        side.script = "yes"
        side.ask([documents()[0]], {})
    stock, ours = (side.calls[0]["max_new_tokens"] for side in sides)
    assert stock == ours == (128 if family in QWEN else 1024)


def test_stop_strings_end_an_answer(family: str, sides: tuple[Side, Side]) -> None:
    """The stock chat wrappers read no stop strings at all; the stock Qwen2-VL does, and strips white space besides.

    A task that names none is given a blank line by lmms-eval, which we heed where the stock wrapper of the family does.
    """
    stock, ours = sides
    stock.script = ours.script = SAID
    strips, behind = family == "qwen2_vl", " Yes .\n\nAn answer to "
    for until, cut in (([], SAID), (["Q:"], behind), ("Q:", behind), (["\n\n"], " Yes ." if strips else SAID)):
        options = GREEDY | {"until": until}
        assert ours.ask([documents()[0]], options) == [cut]
        assert stock.ask([documents()[0]], options) == [cut.strip() if strips else SAID]
