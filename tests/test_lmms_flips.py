"""Answers of methods as rows of one batch are compared with those of each method alone, where numbers are short enough to differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from test_lmms_shared import Configuration, model, shared  # noqa: F401  # model: a fixture
from test_lmms_wrapper import request, set_batch_size

from vlm_pruner_eval.lmms import shared_runs
from vlm_pruner_eval.lmms.model import PrunedModel
from vlm_pruner_eval.store.answers import Answer

CHOSEN = {name: Configuration(name, "1/2") for name in ("fastv", "uniform", "random")} | {"none": Configuration("none", None)}


def flips(model: PrunedModel) -> dict[str, dict[str, int]]:  # noqa: F811
    set_batch_size(model, 2)
    requests = [request("first", i) for i in range(5)]
    with shared(model, CHOSEN) as runs:
        for key, one in CHOSEN.items():
            model.context.source = runs.source(key)
            model.configure(one.method, one.pruning_rate, **one.params)
            model.generate_until(requests)
        return runs.flips


def test_nothing_is_answered_twice_in_float32(model: PrunedModel) -> None:  # noqa: F811
    assert flips(model) == {}


def test_the_first_batch_is_compared_where_numbers_are_short(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(shared_runs, "HALF_BELOW", 5)
    assert flips(model) == {name: {"n": 2, "different": 0} for name in ("fastv", "uniform", "random")}, "float32 does not flip"


def test_an_answer_that_differs_is_counted(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(shared_runs, "HALF_BELOW", 5)
    answered = PrunedModel.answer

    def other(self: PrunedModel, batch: object, options: object, pruners: Sequence[object] = ()) -> list[Answer]:
        first, *rest = answered(self, batch, options, pruners)
        return [dataclasses.replace(first, answer="something else"), *rest] if pruners else [first, *rest]

    monkeypatch.setattr(PrunedModel, "answer", other)
    assert sum(found["different"] for found in flips(model).values()) == 1, "of the first row of the batch"
