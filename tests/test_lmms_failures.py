"""What the chat wrapper does when something fails: a sample, a document, the hook, the whole run."""

from __future__ import annotations

import contextlib

import pytest
import torch
from lmms_requests import documents, fresh_model, plain, request, set_batch_size, texts
from loguru import logger
from tiny_checkpoints import N_IMAGE_TOKENS

from vlm_pruner_eval import Ledger, Pruner, PruningError
from vlm_pruner_eval.lmms import PrunedModel
from vlm_pruner_eval.lmms import model as lmms_model
from vlm_pruner_eval.pruners.uniform import Uniform


@pytest.fixture
def model() -> PrunedModel:
    return fresh_model()


def sabotage(model: PrunedModel, on: str) -> None:
    model.configure("toy_pruners:Sabotage", 0.5, on=on)


def test_one_failed_sample_costs_no_other(model: PrunedModel) -> None:
    requests = [request("first", i) for i in range(5)]
    expected = texts(model, requests)
    sabotage(model, "first/test/2")
    assert texts(model, requests) == [*expected[:2], "", *expected[3:]]
    failed = model.answers[2]
    assert failed.error.startswith("PruningError: ")
    assert "distinct" in failed.error
    assert failed.record is None
    assert [a.error for i, a in enumerate(model.answers) if i != 2] == [None] * 4


def test_a_document_that_cannot_be_read_costs_no_other(model: PrunedModel) -> None:
    def broken(document: dict) -> list[dict]:
        raise OSError("the image file is truncated")

    expected = texts(model, [request("first", 0), request("first", 1)])
    assert texts(model, [request("first", 0), request("first", 3, messages=broken), request("first", 1)]) == [expected[0], "", expected[1]]
    assert "first/test/3: a picture of this document can't be read whole (the image file is truncated)" in model.answers[-2].error


def test_a_prompt_longer_than_the_positions_is_a_sentence(model: PrunedModel) -> None:
    model.task_dict["first"]["test"][1]["question"] = "long " * 60
    requests = [request("first", 0), request("first", 1), request("first", 2)]
    results = texts(model, requests)
    assert results[1] == ""
    assert all(results[i] for i in (0, 2))
    n_tokens = len("USER: " + "long " * 60 + " ASSISTANT:") + N_IMAGE_TOKENS
    assert f"got a prompt of {n_tokens} tokens" in model.answers[1].error
    assert "the model has 256 positions" in model.answers[1].error


def test_failed_samples_end_an_evaluation_of_lmms_eval(model: PrunedModel) -> None:
    sabotage(model, "first/test/2")
    model.context.refuses_failures = True
    with pytest.raises(PruningError, match=r"1 of 5 samples failed.*first/test/2: PruningError"):
        model.generate_until([request("first", i) for i in range(5)])
    assert [bool(a.error) for a in model.answers] == [False, False, True, False, False]


def test_sixteen_failures_at_the_start_end_the_run(model: PrunedModel) -> None:
    model.task_dict["first"]["test"] = documents(40, seed=0)
    sabotage(model, "first")
    with pytest.raises(PruningError, match="16"):
        model.generate_until([request("first", i) for i in range(40)])
    assert len(model.answers) == 16


def test_a_rate_that_removes_nothing_is_refused(model: PrunedModel) -> None:
    model.configure("uniform", 0.01)  # round(16 * 0.99) = 16
    with pytest.raises(PruningError, match="none of the 2 samples with images lost a visual token"):
        model.generate_until([request("first", 0), request("first", 1)])


def test_rate_zero_is_no_failure(model: PrunedModel) -> None:
    model.configure("uniform", 0)
    pruned = texts(model, [request("first", i) for i in range(3)])
    assert pruned == [plain(model, model.task_dict["first"]["test"][i]) for i in range(3)]


def test_a_hook_that_does_nothing_is_caught(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def nothing(hooked: torch.nn.Module, pruner: Pruner, **_: object):
        yield Ledger()

    monkeypatch.setattr(lmms_model, "prune", nothing)
    model.generate_until([request("first", 0)])
    assert "holds 0 records for 1 prompts" in model.answers[0].error


def test_a_hook_that_keeps_everything_is_caught(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lmms_model.prune
    monkeypatch.setattr(lmms_model, "prune", lambda hooked, pruner, **names: real(hooked, Uniform(pruning_rate=0), **names))
    model.generate_until([request("first", 0)])
    assert "16 of 16 visual tokens were asked for, expected 8" in model.answers[0].error


def test_an_exception_in_generate_is_a_failed_sample(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(model.model, "generate", out_of_memory)
    assert texts(model, [request("first", 0)]) == [""]
    assert model.answers[0].error == "OutOfMemoryError: no memory left"


def test_keyboard_interrupt_passes(model: PrunedModel) -> None:
    def interrupted(document: dict) -> list[dict]:
        raise KeyboardInterrupt

    set_batch_size(model, 1)
    with pytest.raises(KeyboardInterrupt):
        model.generate_until([request("first", 0, messages=interrupted)])


def test_rounds_are_refused(model: PrunedModel) -> None:
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])


@pytest.mark.parametrize("size", [1, 2])
def test_a_kind_of_failure_is_shown_once_with_its_traceback(model: PrunedModel, size: int) -> None:
    """One typo in a method is one traceback, over all samples, batches and runs."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), level="WARNING", format="{level}: {message}")
    try:
        set_batch_size(model, size)
        for rate in (0.5, 0.75):
            model.configure("toy_pruners:Typo", rate)
            model.generate_until([request("first", i) for i in range(6)])
    finally:
        logger.remove(sink)
    told = "".join(lines)
    assert told.count("Traceback (most recent call last)") == 2, "of the cause, and of the error"
    assert told.count(" failed:\n") == 1
    assert "5 more samples: the same PruningError as shown before (first/test/" in told and "6 more samples: the same PruningError" in told
    assert told.count("A batch of 2 failed (PruningError)") == (size > 1)
    error = model.answers[3].error
    assert "no attribute 'hidden_state'" in error and "toy_pruners.py, line " in error and "shown above" not in error


def test_another_kind_is_shown_too(model: PrunedModel) -> None:
    def broken(document: dict) -> list[dict]:
        raise KeyError("question")

    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), level="ERROR")
    try:
        sabotage(model, "first/test/2")
        model.generate_until([request("first", 0, messages=broken), request("first", 1, messages=broken), request("first", 2)])
    finally:
        logger.remove(sink)
    told = "".join(lines)
    assert "Sample first/test/2 failed" in told and told.count(" failed:\n") == 2
    assert told.count("1 more sample: the same KeyError as shown before (first/test/") == 1 and "the same PruningError" not in told
