from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from vlm_pruner_eval.sweep.files import write_atomic
from vlm_pruner_eval.sweep.store import Store, to_json

from vlm_pruner_eval.errors import ConfigError

RECORD = {"run_id": "r-1", "status": "finished", "provenance": {"checkpoint": {"config.json": "abc"}}}


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


def test_a_run_exists_only_with_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.write_run(RECORD, [{"answer": "ä\n"}])
    assert store.is_finished("r-1")
    assert store.read_samples("r-1") == [{"answer": "ä\n"}]

    def crash(path: Path, text: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("vlm_pruner_eval.sweep.store.write_atomic", crash)
    with pytest.raises(OSError, match="disk full"):
        store.write_run(RECORD, [])
    assert not store.is_finished("r-1")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run_id": "other", "status": "finished"}', '{"run_id": "r-1", "status": "failed"}'])
def test_a_record_that_is_broken_failed_or_foreign_is_not_finished(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    store.write_run(RECORD, [])
    (store.run_dir("r-1") / "run.json").write_text(text)
    assert not store.is_finished("r-1")


def test_a_run_without_samples_or_of_another_checkpoint_is_not_finished(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_run(RECORD, [])
    assert store.is_finished("r-1", {"config.json": "abc"})
    assert not store.is_finished("r-1", {"config.json": "changed"})
    (store.run_dir("r-1") / "samples.jsonl").unlink()
    assert not store.is_finished("r-1")


def test_draws_come_back_with_nine_digits_and_are_written_before_the_record(tmp_path: Path) -> None:
    store = Store(tmp_path)
    draws = {"gqa": np.array([1 / 3, 66.666666666666]), "mme": np.array([1500.0])}
    store.write_run(RECORD, [], draws)
    found = store.read_draws("r-1")
    assert list(found) == ["gqa", "mme"]
    assert found["gqa"].tolist() == [0.333333333, 66.6666667]
    (store.run_dir("r-1") / "draws.json").unlink()
    assert store.read_draws("r-1") == {}  # a run of an older version
    for broken in ("{", "[1]", '{"gqa": [[1], 2]}'):
        (store.run_dir("r-1") / "draws.json").write_text(broken)
        with pytest.raises(ConfigError, match="delete the run's folder"):
            store.read_draws("r-1")


def test_samples_can_be_read_without_their_positions(tmp_path: Path) -> None:
    store = Store(tmp_path)
    text = 'he said "order": [1, 2] and \\"kept_positions\\": [3]'
    record = {"kept_positions": [1, 2, 30], "order": [2, 0, 1], "kv_lengths": [3, 4]}
    store.write_run(RECORD, [{"answer": text, "record": record}, {"answer": "", "record": None}])
    full, light = list(store.each_sample("r-1")), list(store.each_sample("r-1", positions=False))
    assert full[0]["record"] == record
    assert light[0] == {"answer": text, "record": record | {"kept_positions": [], "order": []}}
    assert light[1] == full[1]


@pytest.mark.parametrize("line", [b'{"a": 1', b"\xff\xfe\n"])
def test_a_damaged_sample_is_a_sentence_with_its_line(tmp_path: Path, line: bytes) -> None:
    store = Store(tmp_path)
    store.write_run({"run_id": "r-1"}, [{"answer": "a"}])
    with (store.run_dir("r-1") / "samples.jsonl").open("ab") as file:
        file.write(line)
    samples = store.each_sample("r-1")
    assert next(samples) == {"answer": "a"}
    with pytest.raises(ConfigError, match=r"samples\.jsonl, line 2: can't be read .*; delete the run's folder and run the sweep again"):
        next(samples)


def test_json_is_plain_and_strict() -> None:
    text = to_json({"nan": float("nan"), "np": np.float32(0.5), "n": np.int64(3), "set": {"b", "a"}, 1: (True, None), "p": Path("x")})
    assert json.loads(text) == {"nan": None, "np": 0.5, "n": 3, "set": ["a", "b"], "1": [True, None], "p": "x"}


def test_an_output_that_cannot_be_a_folder_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(ConfigError, match="is not a folder; choose another folder with --output"):
            Store(output).check_writable()
    Store(tmp_path / "new" / "deep").check_writable()
    assert os.listdir(tmp_path) == ["file"]


def test_an_output_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # a mode would not stop root
    with pytest.raises(ConfigError, match="can't be written"):
        Store(tmp_path / "out").check_writable()


def test_a_folder_that_refuses_the_first_write_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr("vlm_pruner_eval.sweep.store.write_atomic", refuse)
    with pytest.raises(ConfigError, match=r"can't be written .*read-only.*choose another folder"):
        Store(tmp_path).begin("x", {}, [])


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no sweep"):
        Store(tmp_path).read_grid()
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        Store(tmp_path).read_grid()
