"""Prompts and tensors made in threads: answers and order as without them, real overlap, and its bounds."""

from __future__ import annotations

import io
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_lmms_families
import test_lmms_loglikelihood
import test_lmms_video_runs
import torch
from lmms_requests import GREEDY, documents, picture, request, set_batch_size, texts, to_messages
from PIL import Image
from prefetch_runs import Lookups, asked, assert_same_with_threads, model_of_twenty, on_generate, our_threads, run, set_workers  # noqa: F401
from test_lmms_shared import assert_same, configurations, separately, timeless, together
from thinning import only

from vlm_pruner_eval.lmms import PrunedModel
from vlm_pruner_eval.lmms.planning import WINDOW_BATCHES
from vlm_pruner_eval.lmms.shared_runs import Configuration

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
SOON_S = 20.0  # for what must happen; nothing waits so long unless it is broken


# ---- answers and records
@pytest.mark.parametrize("family", only(test_lmms_families.FAMILIES, ["internvl", "qwen2_5_vl"]))
def test_families_answer_as_without_threads(family: str) -> None:
    model = test_lmms_families.loaded(family)
    n = len(test_lmms_families.SIZES)
    model.task_dict = {
        "first": {
            "test": [document | {"question": f"{k}{document['question']}"} for k in range(2) for document in test_lmms_families.documents()]
        }
    }
    model.configure("downsample" if family in QWEN else "vlmpruner", "2/3")
    set_batch_size(model, 2)
    records = assert_same_with_threads(model, lambda: texts(model, [request("first", i) for i in range(2 * n)]), (2,))
    assert [record.get("error") for record in records] == [None] * (2 * n)
    assert len({record["answer"] for record in records}) > 3, "a model that always answers the same would prove nothing"
    set_workers(model, 0)


@pytest.mark.parametrize("family", only(test_lmms_video_runs.FAMILIES, ["llava_video", "qwen3_vl"]))
def test_videos(family: str) -> None:
    model = test_lmms_video_runs._loaded(family)
    model.task_dict = {"clips": {"test": test_lmms_video_runs.documents()}}
    model.configure("vlmpruner", "2/3")
    requests = [test_lmms_video_runs.asked(i) for i in range(len(test_lmms_video_runs.LENGTHS))]
    set_batch_size(model, 2)
    assert all(record["images"] for record in assert_same_with_threads(model, lambda: texts(model, requests), (2,))[:7])
    set_workers(model, 0)


def test_scored_continuations(model: PrunedModel) -> None:
    requests = [one for i in range(20) for one in test_lmms_loglikelihood.choices(i)]
    requests[8:8] = [test_lmms_loglikelihood.target(99, " x"), test_lmms_loglikelihood.target(3, "")]
    records = assert_same_with_threads(model, lambda: model.loglikelihood(requests))
    assert [i for i, record in enumerate(records) if record.get("error")] == [8, 9, 14, 15, 16, 17], (
        "document 3 has a choice without tokens"
    )


def test_continuations_that_a_task_draws(model: PrunedModel) -> None:
    """They are asked for in the order of the documents, between the documents' messages, from the document as it was looked up."""

    def drawn(document: dict) -> str:
        return f" {document['question']} {random.random()}"

    def messages(document: dict) -> list[dict]:
        return to_messages(document | {"question": f"{document['question']} {random.random()}"})

    def ask() -> list:
        random.seed(7)
        return model.loglikelihood([test_lmms_loglikelihood.target(i, drawn, messages=messages) for i in range(20)])

    looked: list[int] = []
    model.task_dict["first"]["test"] = Lookups(documents(20, seed=0), looked.append)
    records = assert_same_with_threads(model, ask)
    assert len({record["answer"] for record in records}) == 20
    assert sorted(looked) == sorted([*range(20)] * 3)


def test_documents_of_datasets_are_decoded_in_threads(model: PrunedModel) -> None:
    import datasets

    def encoded(seed: int) -> dict:
        content = io.BytesIO()
        picture(seed).save(content, "PNG")
        return {"bytes": content.getvalue(), "path": None}

    rows = [{"question": f"Q{i}", "image": encoded(i)} for i in range(40)]
    model.task_dict["first"]["test"] = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())

    def messages(document: dict) -> list[dict]:
        return to_messages({"question": document["question"], "images": [document["image"].convert("RGB")]})

    set_batch_size(model, 2)
    records = assert_same_with_threads(model, lambda: texts(model, [request("first", i, messages=messages) for i in range(40)]))
    assert len({record["images"][0] for record in records}) == 40


def test_a_picture_that_several_documents_share_is_read_once_at_a_time(model: PrunedModel, tmp_path: Path) -> None:
    """Pillow reads a file when its pixels are wanted, and can't do so in two threads."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randint(0, 256, (600, 600, 3), generator=generator, dtype=torch.uint8).numpy()
    Image.fromarray(large).save(tmp_path / "large.png")

    def ask() -> list[str]:
        unread = Image.open(tmp_path / "large.png")
        model.task_dict["first"]["test"] = [{"question": f"Q{i}", "images": [unread]} for i in range(12)]
        return texts(model, asked(12))

    assert {record.get("error") for record in assert_same_with_threads(model, ask)} == {None}


def test_drawn_answers_and_the_random_state(model: PrunedModel) -> None:
    def ask() -> list:
        torch.manual_seed(3)
        drawn = texts(model, [request("first", i, options=GREEDY | {"temperature": 5.0, "do_sample": True}) for i in range(20)])
        return [drawn, torch.rand(1).item()]

    assert_same_with_threads(model, ask)


def test_runs_that_share_a_prefix(model: PrunedModel) -> None:
    chosen = {name: found for name, found in configurations("1/2").items() if name in ("none", "vlmpruner 1/2", "divprune 1/2")}
    found = {}
    for n_workers in (0, 3):
        set_workers(model, n_workers)
        found[n_workers] = {key: (results, timeless(samples)) for key, (results, samples) in together(model, chosen, asked()).items()}
        assert our_threads() == []
    assert found[0] == found[3]


def test_runs_that_share_a_prefix_read_the_same_images_whichever_method_is_first() -> None:
    """Downsampling changes how the processor sizes images, for itself alone."""
    model = test_lmms_families.loaded("qwen2_vl")
    model.task_dict = {"first": {"test": test_lmms_families.documents()}}
    set_batch_size(model, 1)
    requests = [request("first", i) for i in range(len(test_lmms_families.SIZES))]
    chosen = {name: Configuration(name, "2/3") for name in ("downsample", "fastv")}
    expected = separately(model, chosen, requests)
    assert expected["downsample"][1][0]["record"]["n_visual"] < expected["fastv"][1][0]["record"]["n_visual"]
    set_workers(model, 2)
    assert_same(together(model, chosen, requests), expected)
    set_workers(model, 0)


# ---- the task's own code
def test_the_tasks_code_runs_in_the_order_of_the_requests_one_at_a_time(model: PrunedModel) -> None:
    """Some tasks draw random numbers for a prompt: they must be drawn as without threads."""
    running, order = [], []

    def messages(document: dict) -> list[dict]:
        running.append(document)
        time.sleep(0.002)
        assert len(running) == 1
        order.append(document["question"])
        running.pop()
        return to_messages(document | {"question": f"{document['question']} {random.random()}"})

    def ask() -> list[str]:
        random.seed(5)
        return texts(model, [request("first", i, messages=messages) for i in range(20)])

    model.task_dict["first"]["test"] = Lookups(documents(20, seed=0), lambda index: time.sleep(0.004 * (3 - index % 4)))
    records = assert_same_with_threads(model, ask)
    assert {record.get("error") for record in records} == {None}
    assert order[:20] == order[20:40] == order[40:]


def test_prompts_are_shown_in_order_by_one_thread(model: PrunedModel) -> None:
    seen: list[tuple[int, str]] = []
    model.context.on_prompt = lambda prompt: seen.append((prompt.request.index, threading.current_thread().name))
    model.task_dict["first"]["test"] = Lookups(documents(20, seed=0), lambda index: time.sleep(0.004 * (3 - index % 4)))
    texts(model, asked())
    order = [index for index, _ in seen]
    assert len({name for _, name in seen}) == 1
    seen.clear()
    set_workers(model, 0)
    texts(model, asked())
    assert [index for index, _ in seen] == order


# ---- overlap and its bounds
@pytest.mark.parametrize(("n_workers", "overlaps"), [(0, False), pytest.param(1, True, marks=pytest.mark.slow), (2, True)])
def test_the_next_window_is_read_while_the_model_answers(
    model: PrunedModel, monkeypatch: pytest.MonkeyPatch, n_workers: int, overlaps: bool
) -> None:
    looked, next_window = set(), threading.Event()

    def look(index: int) -> None:
        looked.add(index)
        if len(looked) > WINDOW_BATCHES:
            next_window.set()

    found: list[bool] = []
    model.task_dict["first"]["test"] = Lookups(documents(20, seed=0), look)
    on_generate(model, monkeypatch, lambda batch: found.append(next_window.wait(SOON_S if overlaps else 0.1)) if batch == 0 else None)
    set_workers(model, n_workers)
    texts(model, asked())
    assert found == [overlaps]


@pytest.mark.parametrize(("n_workers", "overlaps"), [(0, False), (2, True)])
def test_the_next_batch_is_prepared_while_the_model_answers(
    model: PrunedModel, monkeypatch: pytest.MonkeyPatch, n_workers: int, overlaps: bool
) -> None:
    """Within a window and over the border of two."""
    set_workers(model, n_workers)
    inputs, prepared, found = model._inputs, [threading.Event() for _ in range(21)], {}
    count = iter(range(20))

    def noted(batch: list) -> Any:
        made = inputs(batch)
        prepared[next(count)].set()
        return made

    def wait(batch: int) -> None:
        if batch in (0, 3, WINDOW_BATCHES - 1):
            found[batch] = prepared[batch + 1].wait(SOON_S if overlaps else 0.1)
        elif batch == WINDOW_BATCHES - 2:
            time.sleep(0.5)  # the prompts of the next window, so that the border does not have to wait for them

    monkeypatch.setattr(model, "_inputs", noted)
    on_generate(model, monkeypatch, wait)
    texts(model, asked())
    assert found == {0: overlaps, 3: overlaps, WINDOW_BATCHES - 1: overlaps}


def test_decoding_does_not_run_away(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the model is: at most a window of prompts ahead of the one that is answered, and one batch of tensors."""
    model.task_dict["first"]["test"] = documents(40, seed=0)
    inputs, build, made = model._inputs, model.prompts.render, {"prompts": 0, "tensors": 0}
    most = {"prompts": 0, "tensors": 0}

    def counting(name: str, make: Callable) -> Callable:
        def counted(*args: Any) -> Any:
            made[name] += 1
            return make(*args)

        return counted

    def slow(batch: int) -> None:
        time.sleep(0.03)
        begun = batch // WINDOW_BATCHES + (batch % WINDOW_BATCHES == WINDOW_BATCHES - 1)
        most["prompts"] = max(most["prompts"], made["prompts"] - (begun + 1) * WINDOW_BATCHES)
        most["tensors"] = max(most["tensors"], made["tensors"] - batch - 1)

    monkeypatch.setattr(model, "_inputs", counting("tensors", inputs))
    monkeypatch.setattr(model.prompts, "render", counting("prompts", build))
    on_generate(model, monkeypatch, slow)
    texts(model, asked(40))
    assert most == {"prompts": WINDOW_BATCHES, "tensors": 1}


def test_the_tokenizer_is_used_by_one_thread_at_a_time(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast tokenizers raise "Already borrowed" where one thread decodes while another sets how they pad."""
    inputs, decode, generate = model._inputs, type(model.tokenizer).batch_decode, model.model.generate
    using, count, answered = [], iter(range(9)), threading.Event()

    def long(batch: list) -> Any:
        using.append("inputs")
        if next(count) > 0:
            answered.wait(SOON_S)
            time.sleep(0.2)  # the answer before is ready to be decoded
        made = inputs(batch)
        using.remove("inputs")
        return made

    def noted(**kwargs: Any) -> Any:
        output = generate(**kwargs)
        answered.set()
        return output

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert using == []
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(model, "_inputs", long)
    monkeypatch.setattr(model.model, "generate", noted)
    monkeypatch.setattr(type(model.tokenizer), "batch_decode", watched)
    texts(model, [request("first", 0), request("first", 3)])
    assert [answer.error for answer in model.answers] == [None] * 2
