"""The journal: what was answered is not asked again, whatever a crash leaves; what was changed is refused; parts make a whole."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_requests import documents, fresh_model, request, set_batch_size

from vlm_pruner_eval.errors import ConfigError, PruningError
from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.lmms import PrunedModel, journal
from vlm_pruner_eval.lmms.journal import Journal, encode, read_entries
from vlm_pruner_eval.lmms.log import Answer
from vlm_pruner_eval.lmms.plan import Part

HEAD = {"run_id": "fastv-1of2", "checkpoint": "abc"}


class Killed(BaseException):
    """As a signal: nothing catches it."""


@pytest.fixture
def model() -> Iterator[PrunedModel]:
    model = fresh_model()
    model.configure("fastv", "1/2")
    model.task_dict["first"]["test"] = documents(70, seed=0)
    set_batch_size(model, 2)
    yield model
    model.source = None
    model.may_shrink = True


def requests(n: int = 70) -> list[Any]:
    return [request("first", i) for i in range(n)]


def run(model: PrunedModel, source: Any, asked: list[Any]) -> list[dict]:
    """Answers of one evaluation, without their times."""
    model.configure("fastv", "1/2")
    model.source = source
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
    append, left = Journal.append, [n]

    def dying(self: Journal, *args: Any) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        append(self, *args)

    monkeypatch.setattr(Journal, "append", dying)


@pytest.mark.parametrize("n_before", [0, 1, 7, 8, 9, 34, 35])
def test_a_killed_run_goes_on_and_repeats_no_batch(
    model: PrunedModel, counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_before: int
) -> None:
    expected = run(model, None, requests())
    assert len(counted) == 35
    with monkeypatch.context() as patch, Journal(tmp_path, HEAD) as first:
        kill_after(n_before, patch)
        if n_before < 35:
            with pytest.raises(Killed):
                run(model, first, requests())
        else:
            run(model, first, requests())
    counted.clear()
    with Journal(tmp_path, HEAD) as second:
        assert run(model, second, requests()) == expected
        assert second.replayed == 2 * n_before
    assert len(counted) == 35 - n_before
    entries = [entry for _, entry in read_entries(tmp_path / "journal.jsonl")]
    answered = [index for entry in entries for index in entry.get("requests", ())]
    assert sorted(answered) == list(range(70)), "an answer is lost or doubled"


def test_pictures_of_answered_windows_are_not_read_again(model: PrunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, Journal(tmp_path, HEAD) as first:
        kill_after(8, patch)  # one window
        with pytest.raises(Killed):
            run(model, first, requests())
    seen: list[int] = []
    model.on_prompt = lambda prompt: seen.append(prompt.request.index)
    with Journal(tmp_path, HEAD) as second:
        run(model, second, requests())
    model.on_prompt = None
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
    for n in (1, 2, 3, 9):
        with monkeypatch.context() as patch, Journal(tmp_path, HEAD) as one:
            kill_after(n, patch)
            with pytest.raises(Killed):
                run(model, one, asked)
        counted.pop()  # answered, but not written
    with Journal(tmp_path, HEAD) as last:
        assert run(model, last, asked) == expected
        assert last.has_failures()
    assert sorted(counted) == sizes
    assert [i for i, sample in enumerate(expected) if sample["error"]] == [3, 4, 40]


def test_what_a_crash_leaves_of_the_last_line_is_dropped_at_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal.time, "monotonic", lambda: 0.0)
    whole = write_answers(tmp_path / "whole", 3)
    content = whole.read_bytes()
    starts = [0, *(offset for offset, _ in read_entries(whole))]
    asked, answers = made(3)
    for cut in range(len(content) - 300, len(content)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(content[:cut])
        with Journal(folder, HEAD) as again:
            found = list(again("generate_until", asked, lambda done, part: iter(rest(asked, answers, done)), SIZE))
        assert sorted(answer.doc_id for batch in found for _, answer in batch) == [0, 1, 2]
        assert (folder / "journal.jsonl").read_bytes() == content, f"cut at {cut}"
    assert starts[-1] == len(content)


@pytest.mark.parametrize("damage", ["flip", "remove", "foreign", "empty"])
def test_a_damaged_line_is_refused_with_file_and_line(tmp_path: Path, damage: str) -> None:
    path = write_answers(tmp_path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    changed = {"flip": lines[3].replace(b"yesyes", b"yesyea"), "remove": lines[3][:40] + lines[3][60:], "foreign": b"{}\n", "empty": b"\n"}
    path.write_bytes(b"".join([*lines[:3], changed[damage], *lines[4:]]))
    with pytest.raises(ConfigError, match=r"journal\.jsonl, line 4: got a line that does not fit its checksum"):
        Journal(tmp_path, HEAD).has_failures()
    asked, answers = made(3)
    with Journal(tmp_path, HEAD) as again, pytest.raises(ConfigError, match="line 4"):
        list(again("generate_until", asked, lambda done, part: iter(rest(asked, answers, done)), SIZE))
    assert path.read_bytes().splitlines(keepends=True)[3] == changed[damage], "bad input loses nothing"


@pytest.mark.parametrize("change", ["head", "checkpoint", "batch size", "questions", "options"])
def test_answers_of_something_else_are_not_used(model: PrunedModel, counted: list[int], tmp_path: Path, change: str) -> None:
    with Journal(tmp_path, HEAD) as first:
        run(model, first, requests(8))
    counted.clear()
    head = HEAD | ({"run_id": "other"} if change == "head" else {"checkpoint": "new"} if change == "checkpoint" else {})
    asked = requests(9) if change == "questions" else requests(8)
    if change == "options":
        asked[0] = request("first", 0, options={"max_new_tokens": 2})
    if change == "batch size":
        set_batch_size(model, 4)
    with Journal(tmp_path, head) as second:
        run(model, second, asked)
        assert second.replayed == 0
    assert sum(counted) == len(asked)


def test_every_field_comes_back(tmp_path: Path) -> None:
    record = SampleRecord(
        **{"row": 1, "n_visual": 4, "n_asked": 2, "n_kept": 2, "n_images": 1, "layer": 2, "kept_positions": [5, 7], "order": [2, 0]},
        **{"kv_lengths": [9, 7], "visual_lengths": [4, 2], "quirks": frozenset({"stall"}), "layouts": [[4, 2, 2, 1]], "selection_ms": 0.1},
    )
    answer = Answer(
        *("task", "test", 3, "line\n\u2028\ud800 ünï"),
        record=record,
        prefill_ms=0.1 + 0.2,
        loglikelihood=-math.inf,
        choice=0,
        is_greedy=False,
        images=("ab", "cd"),
    )
    written = json.loads(encode({"answers": [answer.as_json()]}))["entry"]["answers"][0]
    assert Answer.from_json(written) == answer


# ---- memory
def test_too_little_memory_begins_the_run_anew_at_half_the_batch(
    model: PrunedModel, counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_batch_size(model, 1)
    alone = run(model, None, requests(9))
    set_batch_size(model, 4)
    limit_memory(model, monkeypatch, 1)
    counted.clear()
    with Journal(tmp_path, HEAD) as first:
        assert run(model, first, requests(9)) == alone
    assert {answer.batch_size for answer in model.answers} == {1}
    assert (model.working_size.size, model.working_size.exhausted) == (1, (4, 2))
    size = Journal(tmp_path, HEAD).batch_size()
    assert (size.size, size.exhausted) == (1, (4, 2))
    model.configure("fastv", "1/2")
    assert model.batch_size == 4, "the next run begins with what was asked for"


def test_a_run_is_resumed_with_the_batches_that_fitted(
    model: PrunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[int]
) -> None:
    set_batch_size(model, 4)
    limit_memory(model, monkeypatch, 2)
    with monkeypatch.context() as patch, Journal(tmp_path, HEAD) as first:
        kill_after(3, patch)
        with pytest.raises(Killed):
            run(model, first, requests(12))
    counted.clear()
    with Journal(tmp_path, HEAD) as second:
        model.configure("fastv", "1/2")
        model.resume_at(second.batch_size())
        model.source = second
        model.generate_until(requests(12))
        assert second.replayed == 6
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
    return max(model.prepare([model.prompt_of(journal.Request.of(i, r))]).inputs["input_ids"].shape[1] for i, r in enumerate(requests(3)))


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


# ---- parts
@pytest.mark.parametrize("count", [2, 3])
def test_parts_answer_a_run_together(tmp_path: Path, count: int) -> None:
    asked, answers = made(11)
    found: dict[int, list[int]] = {}
    own: dict[int, list[int]] = {}

    def work(part: Part) -> None:
        def compute(done: Any, share: Part) -> Iterator[Any]:
            assert share == part
            mine = [batch for batch in rest(asked, answers, done) if part.has(batch[0][0].index)]
            own[part.index] = [request.index for batch in mine for request, _ in batch]
            yield from mine

        with Journal(tmp_path, HEAD, part) as journal:
            got = list(journal("generate_until", asked, compute, SIZE))
        found[part.index] = sorted(request.index for batch in got for request, _ in batch)

    threads = [threading.Thread(target=work, args=(part,)) for part in Part(0, count).all()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == {index: list(range(11)) for index in range(count)}, "every part ends with all answers"
    assert sorted(index for part in own.values() for index in part) == list(range(11))
    with Journal(tmp_path, HEAD) as whole:
        list(whole("generate_until", asked, lambda done, part: iter(rest(asked, answers, done)), SIZE))
        assert whole.replayed == 11, "a later process uses what parts left"


def test_a_part_that_stands_still_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_PATIENCE_S", 0.3)
    asked, answers = made(4)
    with Journal(tmp_path, HEAD, Part(0, 2)) as first, pytest.raises(PruningError, match=r"journal\.2of2\.jsonl: this part of the run has"):
        list(first("generate_until", asked, lambda done, part: iter(rest(asked, answers, done)), SIZE))


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "a/b", "1/2/3", "-1/2", "1/", "²/3"])
def test_shares_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--shard: got .*, expected a share such as 2/4"):
        Part.parse(text)
    assert Part.parse("2/4") == Part(1, 4) and str(Part(1, 4)) == "2/4"


# ---- without a model
SIZE = journal.BatchSize(1)


def made(n: int) -> tuple[list[journal.Request], list[Answer]]:
    asked = [journal.Request.of(i, request("first", i)) for i in range(n)]
    return asked, [Answer("first", "test", i, "yes" * 20, question="?" * 60) for i in range(n)]


def rest(asked: list, answers: list[Answer], done: Any) -> list[list[tuple]]:
    return [[(one, answer)] for one, answer in zip(asked, answers, strict=True) if one.index not in done.indices]


def write_answers(folder: Path, n: int) -> Path:
    asked, answers = made(n)
    with Journal(folder, HEAD) as one:
        list(one("generate_until", asked, lambda done, part: iter(rest(asked, answers, done)), SIZE))
    return folder / "journal.jsonl"
