"""Runs with and without threads, for the tests of what is made ahead."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from lmms_requests import documents, fresh_model, request, set_batch_size
from test_lmms_shared import timeless

from vlm_pruner_eval.lmms import PrunedModel
from vlm_pruner_eval.lmms.prefetch import THREADS


def set_workers(model: PrunedModel, n: int) -> None:
    model.settings = dataclasses.replace(model.settings, workers=n)


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREADS)]


@pytest.fixture(name="model")
def model_of_twenty() -> Iterator[PrunedModel]:
    model = fresh_model()
    model.task_dict["first"]["test"] = documents(20, seed=0)
    set_batch_size(model, 1)
    set_workers(model, 2)
    yield model
    assert our_threads() == []
    set_workers(model, 0)
    model.context.on_prompt = model.context.on_answers = model.context.source = None
    model.may_shrink = True


def asked(n: int = 20) -> list[Any]:
    return [request("first", i) for i in range(n)]


def run(model: PrunedModel, n_workers: int, ask: Callable[[], list]) -> tuple[list, list[dict]]:
    """Results and records without times; no thread may be left."""
    set_workers(model, n_workers)
    model.answers = []
    results = ask()
    assert our_threads() == []
    return results, timeless([answer.as_json() for answer in model.answers])


def assert_same_with_threads(model: PrunedModel, ask: Callable[[], list], counts: Sequence[int] = (1, 3)) -> list[dict]:
    expected = run(model, 0, ask)
    for n_workers in counts:
        assert run(model, n_workers, ask) == expected
    return expected[1]


class Lookups(list):
    """Documents that tell when they are looked up."""

    def __init__(self, documents: list[dict], seen: Callable[[int], None]):
        super().__init__(documents)
        self.seen = seen

    def __getitem__(self, index: int) -> dict:
        self.seen(index)
        return super().__getitem__(index)


def on_generate(model: PrunedModel, monkeypatch: pytest.MonkeyPatch, first: Callable[[int], None]) -> None:
    """Call `first` with the number of the batch whenever the model is asked."""
    generate, count = model.model.generate, iter(range(1000))

    def watched(**kwargs: Any) -> Any:
        first(next(count))
        return generate(**kwargs)

    monkeypatch.setattr(model.model, "generate", watched)
