"""The results directory: a record vouches for what it was written with, and no file leads elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stored import units
from sweep_standin import make_config

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.store import files
from vlm_pruner_eval.store.answers import ANSWERS, PLAN
from vlm_pruner_eval.store.files import write_atomic
from vlm_pruner_eval.store.folder import DocumentScore, Store, Unit
from vlm_pruner_eval.store.kept import Kept
from vlm_pruner_eval.store.schema import FAILED, FINISHED, RunRecord, UnitRecord, to_json
from vlm_pruner_eval.store.summaries import Failure, Median, Memory, Provenance, Spread, Times, Tokens
from vlm_pruner_eval.sweep.grid import expand, grid_of

PLACE = {"versions": {}, "platform": "", "processor": "x", "host": {}, "gpus": [], "cuda": {}, "threads": 1, "model": {}}
PROVENANCE = Provenance(**PLACE, checkpoint={"config.json": "abc"}, git_commit=None, command="", started=None, time="2026-01-01")
SCORE = DocumentScore(task="gqa", doc_id=0, answer="ä\n", score=0.5, target="0139", items={"right": True}, images=["ab"])
BAD_NAMES = ["../up", "/etc", "a/b", "a\\b", "", ".", "..", "-x", "a b", "x" * 256, "a\x1bb"]


def record(**changes: Any) -> UnitRecord:
    return UnitRecord(**{"task": "gqa", "limit": 4, "status": FINISHED, "provenance": PROVENANCE} | changes)


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    """A finished unit with its answers."""
    found = Unit(tmp_path / "runs" / "r-1" / "gqa")
    found.folder.mkdir(parents=True)
    (found.folder / ANSWERS).write_text("")
    (found.folder / PLAN).write_text("{}")
    found.write(record(), [SCORE], {"gqa": np.array([1 / 3, 66.666666666666])})
    return found


# ---- units
def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, "old")

    def crash(*names: object) -> None:
        raise OSError("power is gone")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_unit_comes_back_as_it_was_written(unit: Unit) -> None:
    assert unit.read() == record() and unit.status(4) == FINISHED
    assert list(unit.each_score()) == [SCORE]
    assert unit.read_draws()["gqa"].tolist() == [0.333333333, 66.6666667], "nine digits"
    failed = record(status=FAILED, problem="boom", failures=[Failure(task="gqa", doc_id=3, error="no")])
    unit.write(failed, [], {})
    assert unit.read() == failed and unit.status(4) == FAILED


@pytest.mark.parametrize("name", ["scores.jsonl", "draws.json", "record.json"])
def test_a_unit_exists_only_when_all_of_it_is_written(unit: Unit, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    replace = os.replace

    def crash(source: str, target: Path) -> None:
        if Path(target).name == name:
            raise OSError("power is gone")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(OSError, match="power"):
        unit.write(record(), [], {})
    assert unit.status(4) is None and unit.read() is None, "the old record must not vouch for new scores"


@pytest.mark.parametrize(
    "change",
    [
        "",
        "{",
        "[]",
        "\xff",
        {"schema": 2},
        {"schema": None},
        {"limit": 5},
        {"limit": None},
        {"status": "perhaps"},
        {"surprise": 1},
        {"n_answers": "many"},
        {"provenance": {}},
        {"task": ...},
    ],
)
def test_a_record_that_is_broken_or_of_something_else_does_not_count(unit: Unit, change: str | dict[str, Any]) -> None:
    path = unit.folder / "record.json"
    if isinstance(change, dict):
        raw = json.loads(path.read_text()) | change
        change = json.dumps({name: value for name, value in raw.items() if value is not ...})
    path.write_bytes(change.encode("latin-1"))
    assert unit.status(4) is None


def test_a_unit_without_answers_or_of_another_checkpoint_does_not_count(unit: Unit) -> None:
    assert unit.status(4, {"config.json": "abc"}) == FINISHED
    assert unit.status(4, {"config.json": "changed"}) is None
    (unit.folder / ANSWERS).unlink()
    assert unit.status(4) is None


@pytest.mark.parametrize(("change", "fault"), [({"surprise": 1}, "surprise"), ({"schema": 2}, "got schema 2, expected 3"), ("{", "read")])
def test_a_file_that_is_not_what_was_written_is_a_sentence(unit: Unit, change: str | dict[str, Any], fault: str) -> None:
    path = unit.folder / "record.json"
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=rf"record\.json.*{fault}.*delete the folder") as refused:
        unit.read()
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("line", [b'{"a": 1', b"\xff\xfe\n", b"[1]\n"])
def test_a_damaged_score_is_a_sentence_with_its_line(unit: Unit, line: bytes) -> None:
    with (unit.folder / "scores.jsonl").open("ab") as file:
        file.write(line)
    scores = unit.each_score()
    assert next(scores) == SCORE
    with pytest.raises(ConfigError, match=r"scores\.jsonl, line 2: can't be read .*; delete the folder"):
        next(scores)


@pytest.mark.parametrize("broken", [None, "{", "[1]", '{"gqa": [[1], 2]}'])
def test_damaged_draws_are_a_sentence(unit: Unit, broken: str | None) -> None:
    path = unit.folder / "draws.json"
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
    with pytest.raises(ConfigError, match="delete the folder"):
        unit.read_draws()


def test_a_unit_is_copied_whole_its_record_last(unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, written = Unit(tmp_path / "copy" / "gqa"), []
    monkeypatch.setattr(
        "vlm_pruner_eval.store.folder.write_atomic", lambda path, content: written.append(path.name) or write_atomic(path, content)
    )
    unit.copy_to(other)
    assert written[-1] == "record.json" and other.status(4) == FINISHED
    for name in written:
        assert (other.folder / name).read_bytes() == (unit.folder / name).read_bytes()
    assert {ANSWERS, PLAN, "scores.jsonl", "draws.json"} < set(written)


def test_json_is_plain_and_strict() -> None:
    text = to_json({"nan": float("nan"), "np": np.float32(0.5), "n": np.int64(3), "set": {"b", "a"}, 1: (True, None), "p": Path("x")})
    assert json.loads(text) == {"nan": None, "np": 0.5, "n": 3, "set": ["a", "b"], "1": [True, None], "p": "x"}


# ---- the directory
def test_an_output_that_cannot_be_a_folder_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(ConfigError, match="is not a folder; choose another folder with --output"):
            Store(output).check_writable()
    with pytest.raises(ConfigError, match="more than 255 bytes"):
        Store(tmp_path / ("ä" * 128)).check_writable()
    Store(tmp_path / "new" / "deep").check_writable()
    assert os.listdir(tmp_path) == ["file"]


def test_an_output_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # a mode would not stop root
    with pytest.raises(ConfigError, match="can't be written"):
        Store(tmp_path / "out").check_writable()


def test_a_folder_that_refuses_the_first_write_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr("vlm_pruner_eval.store.folder.write_atomic", refuse)
    config = make_config()
    with pytest.raises(ConfigError, match=r"can't be written .*read-only.*choose another folder"):
        Store(tmp_path).begin(grid_of(config, expand(config)))


def begun(tmp_path: Path) -> tuple[Store, dict[str, Any]]:
    """A directory with its grid, and that grid in plain types."""
    store, config = Store(tmp_path), make_config()
    store.begin(grid_of(config, expand(config)))
    return store, json.loads((tmp_path / "sweep.json").read_text())


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no sweep"):
        Store(tmp_path).read_grid()
    store, _ = begun(tmp_path)
    assert store.read_grid().runs[0].key == "unpruned"
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ConfigError, match="can't be read"):
        store.read_grid()


@pytest.mark.parametrize(
    ("place", "name"), [*(("run_id", name) for name in BAD_NAMES), ("key", "a/b"), ("unit", "../up"), ("unit", "/etc"), ("name", "..")]
)
def test_a_grid_whose_names_lead_elsewhere_is_refused(tmp_path: Path, place: str, name: str) -> None:
    """The file may be someone else's, and its names become folders."""
    store, grid = begun(tmp_path)
    if place == "unit":
        grid["units"]["tiny_mean"] = name
    else:
        (grid if place == "name" else grid["runs"][1])[place] = name
    (tmp_path / "sweep.json").write_text(json.dumps(grid))
    with pytest.raises(ConfigError, match="expected the name of a folder") as refused:
        store.read_grid()
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "fault"), [({"label": "a\x1b[2Jb"}, "without control characters"), ({"label": "a\u202eb"}, "control"), ({"x": 1}, "x: ")]
)
def test_a_grid_with_hostile_labels_or_unknown_fields_is_refused(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    store, grid = begun(tmp_path)
    grid["runs"][1] |= change
    (tmp_path / "sweep.json").write_text(json.dumps(grid))
    with pytest.raises(ConfigError, match=fault) as refused:
        store.read_grid()
    assert str(refused.value).isprintable()


def test_a_run_under_a_foreign_name_is_refused(tmp_path: Path) -> None:
    store, run = Store(tmp_path), expand(make_config())[1]
    store.write_head(run.head)
    assert store.read_head(run.run_id) == run.head and store.read_head("other") is None
    store.run_dir(run.run_id).rename(store.run_dir("other"))
    with pytest.raises(ConfigError, match="two runs with the same id"):
        store.read_head("other")
    assert list(store.other_runs([])) == [], "a copy is not used"


def test_a_run_is_its_units_of_this_limit(tmp_path: Path) -> None:
    store, _ = begun(tmp_path)
    run, grid = expand(make_config())[1], store.read_grid()
    store.write_head(run.head)
    assert store.read(run.line, grid.units, 12) is None
    mean, pairs = units(tmp_path, run.key).values()
    mean.write(record(task="tiny_mean", limit=12), [], {})
    pairs.write(record(task="tiny_pairs", limit=5), [], {})
    half = store.read(run.line, grid.units, 12)
    assert list(half.units) == ["tiny_mean"] and (half.is_complete, half.status, half.is_usable) == (False, None, False)
    pairs.write(record(task="tiny_pairs", limit=12, status=FAILED, problem="boom"), [], {})
    whole = store.read(run.line, grid.units, 12)
    assert (whole.is_complete, whole.status, whole.is_usable, whole.problem) == (True, FAILED, False, "boom")
    ((head, finished),) = store.other_runs([])
    assert head == run.head and [unit.task for unit in finished] == ["tiny_mean"]


# ---- merging
NUMBERS = st.lists(st.lists(st.floats(-1e3, 1e3), max_size=5), min_size=1, max_size=4)


@given(parts=NUMBERS)
def test_merging_spreads_is_pooling_their_numbers(parts: list[list[float]]) -> None:
    merged, pooled = Spread.merged(map(Spread.of, parts)), Spread.of([value for part in parts for value in part])
    if pooled is None:
        assert merged is None
        return
    assert (merged.min, merged.max, merged.n) == (pooled.min, pooled.max, pooled.n)
    assert merged.mean == pytest.approx(pooled.mean, abs=1e-9)


def test_a_run_adds_up_its_units() -> None:
    first = record(
        tokens=Tokens(samples_with_images=2, kept=Spread.of([12, 12]), layers=[2], quirks={"stall": 1}),
        times=Times(prefill_ms=Median(median=10, iqr=2, n=2), batch_sizes=[4], total_s=3, answers_s=2),
        memory=Memory(flops=Spread.of([100.0, 300.0]), peak_bytes=5),
        failures=[Failure(task="a", doc_id=1, error="no")],
        n_answers=2,
    )
    second = record(
        tokens=Tokens(samples_with_images=1, kept=Spread.of([30]), layers=[0], quirks={"stall": 2, "x": 1}),
        times=Times(prefill_ms=Median(median=40, iqr=8, n=1), batch_sizes=[2, 4], total_s=5, answers_s=4),
        memory=Memory(flops=Spread.of([500.0])),
        n_answers=1,
        shared_prefix=True,
    )
    run = RunRecord(line=expand(make_config())[1].line, config={}, units={"a": first, "b": second}, expected=2)
    assert run.tokens.kept == Spread(mean=18, min=12, max=30, n=3)
    assert (run.tokens.samples_with_images, run.tokens.layers, run.tokens.quirks) == (3, [0, 2], {"stall": 3, "x": 1})
    assert run.times.prefill_ms == Median(median=20, iqr=4, n=3)
    assert (run.times.batch_sizes, run.times.total_s, run.times.answers_s) == ([2, 4], 8, 6)
    assert (run.memory.flops.mean, run.memory.peak_bytes, run.n_answers, run.shared_prefix) == (300.0, 5, 3, True)
    assert [failure.doc_id for failure in run.failures] == [1]
    untimed = RunRecord(line=run.line, config={}, units={"a": first, "b": record(times=Times(batch_sizes=[4]))}, expected=2)
    assert untimed.times.total_s is None, "a part that shared its work has no time, so the whole has none"


# ---- kept sets
@st.composite
def kept_records(draw: st.DrawFn) -> SampleRecord:
    """Rows of any count, order and layout: text between the images, gaps anywhere, nothing kept, everything kept."""
    n_visual = draw(st.one_of(st.integers(0, 60), st.integers(0, 60), st.sampled_from([2**16, 2**16 + 1])))
    some = st.lists(st.integers(0, n_visual - 1), unique=True, max_size=40) if n_visual else st.just([])
    order = draw(some if n_visual > 2**16 else st.one_of(some, st.just(list(range(n_visual))), st.just(list(range(n_visual))[::-1])))
    gaps = np.zeros(max(1, n_visual), dtype=np.int64)
    for place in draw(st.lists(st.integers(0, max(0, n_visual - 1)), max_size=4)):
        gaps[place] += draw(st.integers(1, 50))
    positions = np.arange(len(gaps)) + np.cumsum(gaps)
    layers = draw(st.lists(st.integers(0, 2**31), min_size=1, max_size=6))
    return SampleRecord(
        row=draw(st.integers(0, 9)),
        n_visual=n_visual,
        n_asked=draw(st.integers(0, 99)),
        n_kept=len(order),
        n_images=draw(st.integers(0, 5)),
        layer=draw(st.none() | st.integers(0, 40)),
        kept_positions=[int(positions[index]) for index in sorted(order)],
        order=order,
        kv_lengths=layers,
        visual_lengths=layers[::-1],
        quirks=draw(st.frozensets(st.sampled_from(["stall", "negative_weight_sum"]))),
        selection_ms=draw(st.none() | st.floats(0, 1e6)),
        scope=draw(st.sampled_from(["per_image", "per_sample"])),
        layouts=draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)), max_size=3)),
        kv_bytes=draw(st.none() | st.integers(0, 2**40)),
        n_full=draw(st.none() | st.integers(0, 2**20)),
    )


def row(order: list[int], n_visual: int) -> SampleRecord:
    lengths = {"kv_lengths": [9], "visual_lengths": [n_visual]}
    counts = {"row": 0, "n_visual": n_visual, "n_asked": 1, "n_kept": len(order), "n_images": 1, "layer": 2}
    return SampleRecord(**counts, **lengths, order=order, kept_positions=[5 + index for index in sorted(order)])


@settings(max_examples=60, deadline=None)
@given(record=kept_records())
@example(record=row([], 0))
@example(record=row([], 70_000))
@example(record=row([69_999, 65_536, 65_535, 0], 70_000))
def test_a_kept_set_comes_back_from_its_compact_form(record: SampleRecord) -> None:
    kept = Kept.of(record)
    read = Kept.from_json(json.loads(json.dumps(kept.as_json())))
    assert read == kept and read.digest == kept.digest
    for found in (kept, read):
        for name in ("order", "kept_positions", "kv_lengths", "visual_lengths"):
            assert getattr(found, name) == list(getattr(record, name)), name
        for name in ("row", "n_visual", "n_asked", "n_kept", "n_images", "layer", "quirks", "selection_ms", "scope", "kv_bytes", "n_full"):
            assert getattr(found, name) == getattr(record, name), name
        assert [list(layout) for layout in found.layouts] == [list(layout) for layout in record.layouts]
        assert found.layer_averaged == pytest.approx(record.layer_averaged)


def test_a_row_that_cut_nothing_holds_no_list() -> None:
    held = Kept.of(row(list(range(50_000)), 50_000)).as_json()
    assert "order" not in held and len(json.dumps(held)) < 300
    assert "order" in Kept.of(row([1, 0, 2], 3)).as_json(), "all of them, but in another order"
