"""The answer log: what was answered is not asked again, whatever a crash leaves; what was changed is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_requests import documents, fresh_model, request, set_batch_size
from thinning import only

from vlm_pruner_eval.errors import ConfigError, PruningError
from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.lmms import PrunedModel
from vlm_pruner_eval.lmms.prompts import Request
from vlm_pruner_eval.store import answers as answer_log
from vlm_pruner_eval.store.answers import Answer, AnswerLog, BatchSize, read_answers, read_lines
from vlm_pruner_eval.store.kept import Kept

HEAD = {"unit": "fastv-1of2/first", "checkpoint": "abc"}


class Killed(BaseException):
    """As a signal: nothing catches it."""


@pytest.fixture
def model() -> Iterator[PrunedModel]:
    model = fresh_model()
    model.configure("fastv", "1/2")
    model.task_dict["first"]["test"] = documents(70, seed=0)
    set_batch_size(model, 2)
    yield model
    model.context.source = None
    model.may_shrink = True


def requests(n: int = 70) -> list[Any]:
    return [request("first", i) for i in range(n)]


def run(model: PrunedModel, source: Any, asked: list[Any]) -> list[dict]:
    """Answers of one evaluation, without their times."""
    model.configure("fastv", "1/2")
    model.context.source = source
    texts = [result.text for result in model.generate_until(asked)]
    assert texts == [answer.answer for answer in model.answers]
    return timeless(model)


def timeless(model: PrunedModel) -> list[dict]:
    return [replace(answer.untimed(), batch_size=None).as_json() | {"batch": answer.batch_size} for answer in model.answers]


@pytest.fixture
def counted(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the model was really asked."""
    sizes: list[int] = []
    generate = model.model.generate

    def counting(**kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        return generate(**kwargs)

    monkeypatch.setattr(model.model, "generate", counting)
    return sizes


def kill_after(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die when batch number n + 1 is about to be written."""
    append, left = AnswerLog.append, [n]

    def dying(self: AnswerLog, *args: Any) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        append(self, *args)

    monkeypatch.setattr(AnswerLog, "append", dying)


@pytest.mark.parametrize("n_before", only([0, 1, 7, 8, 9, 18, 19], [1, 8, 19]))
def test_a_killed_run_goes_on_and_repeats_no_batch(
    model: PrunedModel, counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_before: int
) -> None:
    expected = run(model, None, requests(38))
    assert len(counted) == 19
    with monkeypatch.context() as patch, AnswerLog(tmp_path, HEAD) as first:
        kill_after(n_before, patch)
        if n_before < 19:
            with pytest.raises(Killed):
                run(model, first, requests(38))
        else:
            run(model, first, requests(38))
    counted.clear()
    with AnswerLog(tmp_path, HEAD) as second:
        assert run(model, second, requests(38)) == expected
    assert len(counted) == 19 - n_before
    assert sorted(answer.doc_id for answer in read_answers(tmp_path)) == list(range(38)), "an answer is lost or doubled"


def test_pictures_of_answered_windows_are_not_read_again(model: PrunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, AnswerLog(tmp_path, HEAD) as first:
        kill_after(8, patch)  # one window
        with pytest.raises(Killed):
            run(model, first, requests())
    seen: list[int] = []
    model.context.on_prompt = lambda prompt: seen.append(prompt.request.index)
    with AnswerLog(tmp_path, HEAD) as second:
        run(model, second, requests())
    model.context.on_prompt = None
    assert len(seen) == 70 - 16


def test_failed_prompts_stay_failed_and_leave_the_other_batches_as_they_were(
    model: PrunedModel, counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(document: dict) -> list[dict]:
        raise OSError("the image file is truncated")

    asked = [request("first", i, messages=broken) if i in (3, 4, 40) else request("first", i) for i in range(70)]
    expected = run(model, None, asked)
    sizes = sorted(counted)
    counted.clear()
    for n in (1, 9):
        with monkeypatch.context() as patch, AnswerLog(tmp_path, HEAD) as one:
            kill_after(n, patch)
            with pytest.raises(Killed):
                run(model, one, asked)
        counted.pop()  # answered, but not written
    with AnswerLog(tmp_path, HEAD) as last:
        assert run(model, last, asked) == expected
        assert last.has_failures()
    assert sorted(counted) == sizes
    assert [i for i, sample in enumerate(expected) if "error" in sample] == [3, 4, 40]


@pytest.mark.parametrize("size", [1, 3])
def test_what_a_crash_leaves_of_the_last_batch_is_dropped_at_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(answer_log.time, "monotonic", lambda: 0.0)
    whole = write_answers(tmp_path / "whole", 6, size)
    content = whole.read_bytes()
    ends = [batch[-1].end for batch in read_lines(whole)]
    asked, answers = made(6)
    for cut in range(len(content) - 600, len(content)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "plan.json").write_bytes((whole.parent / "plan.json").read_bytes())
        (folder / "answers.jsonl").write_bytes(content[:cut])
        n_whole = sum(end <= cut for end in ends) * size
        with AnswerLog(folder, HEAD) as again:
            begun = again.begin("generate_until", asked, BatchSize(1))
            assert len(begun.found) == n_whole, "whole batches count, and nothing else"
            for batch in batches(asked, answers, begun.done, size):
                again.append("generate_until", batch, 0.0)
        assert (folder / "answers.jsonl").read_bytes() == content, f"cut at {cut}"


@pytest.mark.parametrize("damage", ["flip", "remove", "foreign", "empty"])
def test_a_damaged_line_is_refused_with_file_and_line(tmp_path: Path, damage: str) -> None:
    path = write_answers(tmp_path, 6)
    lines = path.read_bytes().splitlines(keepends=True)
    changed = {"flip": lines[3].replace(b"yesyes", b"yesyea"), "remove": lines[3][:40] + lines[3][60:], "foreign": b"{}\n", "empty": b"\n"}
    path.write_bytes(b"".join([*lines[:3], changed[damage], *lines[4:]]))
    with pytest.raises(ConfigError, match=r"answers\.jsonl, line 4: got a line that does not fit its checksum"):
        AnswerLog(tmp_path, HEAD).has_failures()
    asked, _ = made(6)
    with AnswerLog(tmp_path, HEAD) as again, pytest.raises(ConfigError, match="line 4"):
        again.begin("generate_until", asked, BatchSize(1))
    assert path.read_bytes().splitlines(keepends=True)[3] == changed[damage], "bad input loses nothing"


@pytest.mark.parametrize("change", ["head", "checkpoint", "batch size", "questions", "options"])
def test_answers_of_something_else_are_not_used(model: PrunedModel, counted: list[int], tmp_path: Path, change: str) -> None:
    with AnswerLog(tmp_path, HEAD) as first:
        run(model, first, requests(8))
    counted.clear()
    head = HEAD | ({"unit": "other"} if change == "head" else {"checkpoint": "new"} if change == "checkpoint" else {})
    asked = requests(8)
    if change == "questions":
        asked[0] = request("first", 0, context="another question?")
    if change == "options":
        asked[0] = request("first", 0, options={"max_new_tokens": 2})
    if change == "batch size":
        set_batch_size(model, 4)
    with AnswerLog(tmp_path, head) as second:
        run(model, second, asked)
    assert sum(counted) == len(asked)


def test_every_field_comes_back(tmp_path: Path) -> None:
    record = SampleRecord(
        **{"row": 1, "n_visual": 4, "n_asked": 2, "n_kept": 2, "n_images": 1, "layer": 2, "kept_positions": [5, 7], "order": [2, 0]},
        **{"kv_lengths": [9, 7], "visual_lengths": [4, 2], "quirks": frozenset({"stall"}), "layouts": [[4, 2, 2, 1]], "selection_ms": 0.1},
    )
    answer = Answer(
        *("task", "test", 3, "line\n\u2028\ud800 ünï"),
        record=Kept.of(record),
        prefill_ms=0.1 + 0.2,
        loglikelihood=-math.inf,
        choice=0,
        is_greedy=False,
        images=("ab", "cd"),
    )
    assert Answer.from_json(json.loads(json.dumps(answer.as_json()))) == answer


# ---- memory
def test_too_little_memory_begins_the_run_anew_at_half_the_batch(
    model: PrunedModel, counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_batch_size(model, 1)
    alone = run(model, None, requests(9))
    set_batch_size(model, 4)
    limit_memory(model, monkeypatch, 1)
    counted.clear()
    with AnswerLog(tmp_path, HEAD) as first:
        assert run(model, first, requests(9)) == alone
    assert {answer.batch_size for answer in model.answers} == {1}
    assert (model.working_size.size, model.working_size.exhausted) == (1, (4, 2))
    size = AnswerLog(tmp_path, HEAD).batch_size()
    assert (size.size, size.exhausted) == (1, (4, 2))
    model.configure("fastv", "1/2")
    assert model.batch_size == 4, "the next run begins with what was asked for"


def test_a_run_is_resumed_with_the_batches_that_fitted(
    model: PrunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[int]
) -> None:
    set_batch_size(model, 4)
    limit_memory(model, monkeypatch, 2)
    with monkeypatch.context() as patch, AnswerLog(tmp_path, HEAD) as first:
        kill_after(3, patch)
        with pytest.raises(Killed):
            run(model, first, requests(12))
    counted.clear()
    with AnswerLog(tmp_path, HEAD) as second:
        model.configure("fastv", "1/2")
        model.resume_at(second.batch_size())
        model.context.source = second
        model.generate_until(requests(12))
    assert counted == [2, 2, 2]


def test_the_papers_protocol_never_changes_the_batch(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(model, monkeypatch, 1)
    model.may_shrink = False  # as of protocol=paper
    with pytest.raises(PruningError, match=r"A batch of 2 does not fit into the memory .* set a smaller batch_size"):
        model.generate_until(requests(4))
    assert model.batch_size == 2


def test_one_sample_that_never_fits_is_a_failed_sample(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    set_batch_size(model, 1)
    limit_memory(model, monkeypatch, 0, lambda kwargs: kwargs["input_ids"].shape[1] == longest(model))
    model.generate_until(requests(3))
    assert [answer.error is None for answer in model.answers].count(False) >= 1
    assert "out of memory" in next(answer.error for answer in model.answers if answer.error)


def longest(model: PrunedModel) -> int:
    return max(model.prepare([model.prompt_of(Request.of(i, r))]).inputs["input_ids"].shape[1] for i, r in enumerate(requests(3)))


def limit_memory(
    model: PrunedModel, monkeypatch: pytest.MonkeyPatch, rows: int, only: Callable[[dict], bool] = lambda kwargs: True
) -> None:
    """Batches of more than `rows` do not fit."""
    generate = model.model.generate

    def limited(**kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > rows and only(kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(**kwargs)

    monkeypatch.setattr(model.model, "generate", limited)


# ---- without a model
def made(n: int) -> tuple[list[Request], list[Answer]]:
    asked = [Request.of(i, request("first", i)) for i in range(n)]
    return asked, [Answer("first", "test", i, "yes" * 20, question="?" * 60) for i in range(n)]


def batches(asked: list[Request], answers: list[Answer], done: Any, size: int) -> Iterator[list[tuple]]:
    pairs = list(zip(asked, answers, strict=True))
    for start in range(0, len(pairs), size):
        batch = pairs[start : start + size]
        if not done.has([one.index for one, _ in batch]):
            yield batch


def write_answers(folder: Path, n: int, size: int = 1) -> Path:
    asked, answers = made(n)
    with AnswerLog(folder, HEAD) as one:
        begun = one.begin("generate_until", asked, BatchSize(1))
        for batch in batches(asked, answers, begun.done, size):
            one.append("generate_until", batch, 0.0)
    return folder / "answers.jsonl"


def test_the_document_of_a_line_is_known_without_parsing_it(tmp_path: Path) -> None:
    """Also where the task's name, the answer or the question look like a document's number."""
    asked, _ = made(1)
    told = '"doc_id": 7, \\"doc_id": 7'
    with AnswerLog(tmp_path, HEAD) as log:
        log.begin("generate_until", asked, BatchSize(1))
        log.append("generate_until", [(asked[0], Answer(told, told, 12, told, question=told))], 0.0)
    (line,) = answer_log.answer_lines(tmp_path)
    assert line.doc_id == line.answer().doc_id == 12 and line.answer().question == told


# ---- limits
def ask(folder: Path, n: int, size: int = 2) -> list[list[int]]:
    """Documents of the batches that are computed where `n` documents are asked, by a log of that limit."""
    asked, answers = made(n)
    computed = []

    def compute(part: list[Request], done: Any) -> Iterator[list[tuple]]:
        for batch in batches(part, [answers[one.doc_id] for one in part], done, size):
            left = [(one, answer) for one, answer in batch if one.index not in done.indices]
            computed.append([one.doc_id for one, _ in left])
            yield left

    with AnswerLog(folder, HEAD, n) as log:
        found = [answer.doc_id for batch in log("generate_until", asked, compute, BatchSize(size)) for _, answer in batch]
    assert sorted(found) == list(range(n)), "an answer is lost or doubled"
    return computed


def test_a_larger_limit_answers_only_what_is_new_and_a_smaller_one_nothing(tmp_path: Path) -> None:
    assert ask(tmp_path, 5) == [[0, 1], [2, 3], [4]]
    assert ask(tmp_path, 8) == [[5, 6], [7]], "planned by itself, so that a crash leaves the same batches"
    assert ask(tmp_path, 3) == []
    assert ask(tmp_path, 8) == []
    assert sorted(answer.doc_id for answer in read_answers(tmp_path)) == list(range(8))


def test_a_limit_between_others_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_after(1, patch)
        with pytest.raises(Killed):
            ask(tmp_path, 8)
    assert ask(tmp_path, 5) == [[2, 3], [4]]
    assert ask(tmp_path, 8) == [[5, 6], [7]]


def test_an_answer_that_cut_nothing_takes_less_than_two_kilobytes(tmp_path: Path) -> None:
    """Of LLaVA-Video: 64 frames of 210 tokens."""
    everything = list(range(13440))
    record = SampleRecord(
        **{"row": 0, "n_visual": 13440, "n_asked": 13440, "n_kept": 13440, "n_images": 1, "layer": None, "order": everything},
        **{"kept_positions": [14 + i for i in everything], "kv_lengths": [13500] * 28, "visual_lengths": [13440] * 28},
    )
    asked, _ = made(1)
    answer = Answer("first", "test", 0, "yes", record=Kept.of(record), prefill_ms=1234.5678, images=("0" * 16,), question="?" * 1000)
    with AnswerLog(tmp_path, HEAD) as log:
        log.begin("generate_until", asked, BatchSize(1))
        log.append("generate_until", [(asked[0], answer)], 1.0)
    assert (tmp_path / "answers.jsonl").stat().st_size <= 2000
    (found,) = read_answers(tmp_path)
    assert (found.record.order, found.record.kept_positions) == (record.order, record.kept_positions)
