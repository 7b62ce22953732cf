"""What happens to prompts and tensors made in threads when something fails or ends: failures as without threads, nothing left behind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_requests import documents, request, set_batch_size, texts, tiny_llava
from prefetch_runs import Lookups, asked, assert_same_with_threads, model_of_twenty, on_generate, our_threads, run, set_workers  # noqa: F401
from sweep_standin import make_config
from test_lmms_failures import sabotage
from thinning import only

from vlm_pruner_eval import ConfigError, PruningError
from vlm_pruner_eval.lmms import PrunedModel, load
from vlm_pruner_eval.lmms.planning import WINDOW_BATCHES
from vlm_pruner_eval.lmms.prefetch import Attempt, Prefetch, default_workers
from vlm_pruner_eval.lmms.prompts import Request
from vlm_pruner_eval.store.answers import AnswerLog, BatchSize, Done
from vlm_pruner_eval.sweep.config import validate
from vlm_pruner_eval.sweep.grid import expand
from vlm_pruner_eval.sweep.opening import _load_model


# ---- failures
def test_failures_are_those_of_a_run_without_threads(model: PrunedModel) -> None:
    def broken(document: dict) -> list[dict]:
        raise OSError("the image file is truncated")

    def gave_up(document: dict) -> list[dict]:
        raise SystemExit("video not found")

    sabotage(model, "first/test/13")
    model.task_dict["first"]["test"][5]["question"] = "long " * 60
    set_batch_size(model, 2)
    requests = asked()
    requests[2], requests[11] = request("first", 2, messages=broken), request("first", 11, messages=gave_up)
    requests.insert(4, request("first", 99))
    records = assert_same_with_threads(model, lambda: texts(model, requests))
    errors = {i: record.get("error") for i, record in enumerate(records) if record.get("error")}
    assert sorted(errors) == [2, 4, 6, 12, 14]
    sentences = [errors[i] for i in sorted(errors)]
    expected = [
        "can't be read whole (the image file",
        "IndexError",
        "got a prompt of",
        "ValueError: first/test/11: the task gave up",
        "distinct",
    ]
    assert all(part in sentence for part, sentence in zip(expected, sentences, strict=True))


def test_what_is_told_of_prompts_may_fail(model: PrunedModel) -> None:
    def told(prompt: Any) -> None:
        if prompt.request.index in (3, 11):
            raise OSError("no space left on the device")

    model.context.on_prompt = told
    set_batch_size(model, 2)
    records = assert_same_with_threads(model, lambda: texts(model, asked()))
    assert [i for i, record in enumerate(records) if record.get("error")] == [3, 11]


def test_a_batch_too_large_to_be_prepared_is_halved(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    set_batch_size(model, 4)
    inputs = model._inputs

    def small_memory(batch: list) -> Any:
        if len(batch) > 2:
            raise MemoryError("too many pictures")
        return inputs(batch)

    monkeypatch.setattr(model, "_inputs", small_memory)
    model.configure("uniform", 0.5)
    texts(model, asked())
    assert model.working_size == BatchSize(2, (4,))
    assert [answer.error for answer in model.answers] == [None] * 20


# ---- the end
def stopped_by(model: PrunedModel, monkeypatch: pytest.MonkeyPatch, how: str) -> type[BaseException]:
    """Make a run end before its last window."""
    if how == "hopeless":
        sabotage(model, "first")
        return PruningError
    if how == "callback":
        model.context.on_answers = lambda n, is_new: [][n]
        return IndexError
    if how == "generate":
        on_generate(model, monkeypatch, interrupt)
    return KeyboardInterrupt


def interrupt(number: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("n_workers", only([1, 4], [4]))
@pytest.mark.parametrize("how", ["hopeless", "callback", "generate", "task"])
def test_nothing_runs_on_after_a_run_that_was_stopped(
    model: PrunedModel, monkeypatch: pytest.MonkeyPatch, how: str, n_workers: int
) -> None:
    raised = stopped_by(model, monkeypatch, how)
    looked: list[int] = []

    def look(index: int) -> None:
        looked.append(index)
        if how == "task" and index == 20:
            interrupt(index)

    model.task_dict["first"]["test"] = Lookups(documents(60, seed=0), look)
    set_workers(model, n_workers)
    with pytest.raises(raised) as caught:  # whose traceback holds the frames of the run
        model.generate_until(asked(60))
    assert our_threads() == []
    n = len(looked)
    assert n < 60
    time.sleep(0.1)
    assert len(looked) == n
    del caught


def test_what_stops_a_run_does_so_in_its_turn(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document of the second window, met while the first is answered, costs no answer of the first."""
    looked: list[int] = []

    def look(index: int) -> None:
        looked.append(index)
        if len(looked) == WINDOW_BATCHES + 1:
            interrupt(index)

    def wait(batch: int) -> None:
        while batch == WINDOW_BATCHES - 2 and len(looked) < 2 * WINDOW_BATCHES:
            time.sleep(0.01)

    model.task_dict["first"]["test"] = Lookups(documents(20, seed=0), look)
    set_workers(model, 1)
    on_generate(model, monkeypatch, lambda batch: (wait(batch), time.sleep(0.2)))
    with pytest.raises(KeyboardInterrupt):
        model.generate_until(asked())
    assert len(model.answers) == WINDOW_BATCHES


def test_nothing_runs_on_after_a_log_that_can_not_be_written(model: PrunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError("no space left on the device")

    monkeypatch.setattr(AnswerLog, "append", full)
    with AnswerLog(tmp_path, {"unit": "a"}) as log, pytest.raises(OSError, match="no space left") as caught:
        model.context.source = log
        model.generate_until(asked())
    assert our_threads() == []
    del caught


def test_answers_that_are_not_asked_for_any_more(model: PrunedModel) -> None:
    batches = model.batches_of([Request.of(i, one) for i, one in enumerate(asked())], Done())
    assert len(next(batches)) == 1
    assert our_threads() != []
    batches.close()
    assert our_threads() == []


def test_many_threads_keep_the_order_and_hold_errors_until_they_are_taken() -> None:
    def make(item: int) -> int:
        time.sleep(0.001 * (7 - item % 8))
        if item % 3 == 0:
            raise ValueError(item)
        return item

    def taken(attempt: Attempt[int]) -> object:
        try:
            return attempt.take()
        except ValueError as error:
            return error.args

    for n_workers in (0, 1, 16):
        with Prefetch(n_workers) as prefetch:
            windows = prefetch.ahead(prefetch.attempts(make, window) for window in (range(20), [], range(20, 30)))
            found = [taken(attempt) for attempt in prefetch.ahead(attempt for window in windows for attempt in window)]
        assert found == [i if i % 3 else (i,) for i in range(30)]
        assert our_threads() == []


def test_an_attempt_holds_nothing_after_it_was_taken_and_takes_others() -> None:
    def fail() -> None:
        raise MemoryError

    good, bad = Attempt(object), Attempt(fail)
    behind = Attempt(id, bad)
    made = good.take()
    assert type(made) is object
    with pytest.raises(MemoryError):
        behind.take()
    assert [vars(attempt) for attempt in (good, bad, behind)] == [{"_result": None, "_error": None}] * 3


# ---- going on after a crash
@pytest.mark.parametrize(("first", "second"), only([(3, 0), (0, 3), (2, 2)], [(3, 0)]))
def test_a_killed_run_goes_on_with_other_threads(
    model: PrunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, second: int
) -> None:
    set_batch_size(model, 2)
    expected = run(model, 0, lambda: texts(model, asked()))
    generated: list[int] = []

    def killed(n: int) -> None:
        if len(generated) == 6:
            raise KeyboardInterrupt
        generated.append(n)

    with monkeypatch.context() as patch, AnswerLog(tmp_path, {"unit": "a"}) as log:
        on_generate(model, patch, killed)
        model.context.source = log
        set_workers(model, first)
        with pytest.raises(KeyboardInterrupt):
            model.generate_until(asked())
    generated.clear()
    with AnswerLog(tmp_path, {"unit": "a"}) as log:
        on_generate(model, monkeypatch, generated.append)
        model.context.source = log
        assert run(model, second, lambda: texts(model, asked())) == expected
    assert len(generated) == 4


# ---- the setting
def test_by_default_threads_read_ahead_of_a_gpu_and_leave_a_cpu_to_the_model() -> None:
    assert (default_workers(torch.device("cuda", 1)), default_workers(torch.device("cpu"))) == (2, 0)
    assert [load("vlmpruner_llava", pretrained=tiny_llava(), **given).describe()["workers"] for given in ({}, {"workers": 3})] == [0, 3]


def test_the_number_of_threads_is_no_part_of_a_runs_identity() -> None:
    section = {"id": "vlmpruner_llava", "pretrained": "somewhere/tiny"}
    ids = [[run.run_id for run in expand(make_config(model=section | more))] for more in ({}, {"workers": 0}, {"workers": 4})]
    assert ids[0] == ids[1] == ids[2]


@pytest.mark.parametrize(("given", "expected"), [({"workers": 0}, {"workers": 0}), ({"workers": 5}, {"workers": 5}), ({}, {})])
def test_a_sweep_hands_the_number_of_threads_to_the_model(given: dict, expected: dict) -> None:
    handed: dict[str, object] = {}

    def loading(model_id: str, **arguments: object) -> Any:
        handed.update(arguments)
        return type("Model", (), {})()

    _load_model(make_config(model={"id": "vlmpruner_llava", "pretrained": "somewhere/tiny"} | given).model, loading)
    assert {name: value for name, value in handed.items() if name == "workers"} == expected


def test_a_wrong_number_of_threads_in_a_sweep_file_is_a_sentence() -> None:
    raw = make_config().model_dump(exclude_none=True, exclude={"methods"}) | {"methods": ["fastv"]}
    with pytest.raises(ConfigError, match=r"model.workers: got -1 \(int\), expected a whole number of threads that read documents ahead"):
        validate(raw | {"model": raw["model"] | {"workers": -1}})
