"""Bad sweep files: each is answered by sentences with the key path and exit code 2; nothing is loaded and nothing written."""

from __future__ import annotations

import copy
import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_inputs import GOOD, SWEEP_FILES, TEXT
from click.testing import Result
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from loguru import logger
from typer.testing import CliRunner

from vlm_pruner_eval.cli import app
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.pruners import get_pruner
from vlm_pruner_eval.sweep.config import ModelSection, SweepConfig, load
from vlm_pruner_eval.sweep.grid import Run, expand, method_problems, run_hash
from vlm_pruner_eval.sweep.text_files import MOST_BYTES

SCHEMA = {*SweepConfig.model_fields, *ModelSection.model_fields, "the file"}
LONGEST = 900  # characters of a sentence


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder to work in, and a loader of models that must not be reached."""
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("vlm_pruner_eval.lmms.families.load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    yield
    logger.remove()
    logger.add(sys.stderr)


def sweep(path: Path | str, *options: str) -> Result:
    return CliRunner().invoke(app, ["sweep", str(path), *options])


def assert_refused(result: Result, sentence: str) -> None:
    assert result.exit_code == 2, (result.exit_code, result.exception, result.output[-500:])
    lines = result.stderr.splitlines()
    assert any(sentence in line for line in lines), lines
    assert all(line.startswith("vlm-pruner-eval: ") and is_sentence(line) for line in lines), lines
    assert result.stdout == ""
    assert os.listdir(".") == []


def is_sentence(text: str) -> bool:
    return len(text) <= LONGEST and text.isprintable() and text.endswith((".", ")")) and ": " in text


@pytest.mark.parametrize(("text", "sentence"), SWEEP_FILES, ids=range(len(SWEEP_FILES)))
def test_a_bad_file_is_refused_with_the_key_path(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    assert_refused(sweep(path), sentence)


@pytest.mark.parametrize(("text", "sentence"), SWEEP_FILES[::20])
def test_a_dry_run_refuses_the_same(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    assert_refused(sweep(path, "--dry-run"), sentence)


def test_the_tables_are_large_and_their_base_is_good(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(TEXT)
    assert sweep(tmp_path / "good.yaml", "--dry-run").exit_code == 0
    assert len({text for text, _ in SWEEP_FILES}) == len(SWEEP_FILES) >= 300


# ---- files that are no text
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff\xfe" + TEXT.encode("utf-16-le"), "can't be read as a text file"),
        (TEXT.encode("utf-16"), "can't be read as a text file"),
        (TEXT.encode("utf-32"), "can't be read as a text file"),
        (TEXT.encode().replace(b"good", b"g\xe4d"), "can't be read as a text file"),
        (b"\x80" * 100, "can't be read as a text file"),
        (b"\x00" * 100, "is not valid YAML"),
        (b"PK\x03\x04" + b"\x00" * 50, "is not valid YAML"),
        (b"\x89PNG\r\n\x1a\n", "can't be read as a text file"),
        (b"a: 1\n" * 2_000_000, f"got more than {MOST_BYTES} bytes"),
        (b"[" * (MOST_BYTES - 1), "is not valid YAML"),
        (b"- " * (MOST_BYTES // 2), "is not valid YAML"),
        (b'"' + b"\\x41" * 30_000 + b'"', "the file: the text has 30000 characters"),
        (b"a: &a [" + b"1," * 60_000 + b"1]", "stands for more than 5000 values"),
        (b"# " + b"x" * (MOST_BYTES - 2), "got an empty file"),
        (b"x" * MOST_BYTES, "the file: the text has"),
        (b": " * (MOST_BYTES // 2), "is not valid YAML"),
        (b"? " * (MOST_BYTES // 2), "is not valid YAML"),
    ],
    ids=range(17),
)
def test_content_that_is_no_sweep_file_is_refused_in_time(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    assert_refused(sweep(tmp_path / "bad.yaml", "--dry-run"), sentence)


def test_only_ordinary_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null", tmp_path, "/"):
        assert_refused(sweep(path), "can't be read as a text file (it is a")
    for path in (tmp_path / "circle", tmp_path / "nowhere", tmp_path / "missing.yaml", tmp_path / ("x" * 300), "\x1b[31mred"):
        assert_refused(sweep(path), "can't be read as a text file")


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert load(tmp_path / "good.yaml").name == "good"


def test_a_file_decides_about_folders_under_the_current_one_only(tmp_path: Path) -> None:
    for folder in ("results", "./results", "results/a.b/c", "..results", "é"):
        (tmp_path / "good.yaml").write_text(yaml.safe_dump(GOOD | {"output": folder}))
        assert load(tmp_path / "good.yaml").output == folder


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--limit", "0"), "limit: got 0"),
        (("--limit", "-3"), "limit: got -3"),
        (("--limit", "9" * 40), "limit: got 999"),
        (("--output", "x" * 300), "output: got"),
        (("--output", "/dev/null"), "is not a folder"),
        (("--output", "/dev/null/x"), "output: got"),
    ],
)
def test_bad_options_of_a_sweep_are_sentences(tmp_path: Path, options: tuple[str, ...], sentence: str) -> None:
    (tmp_path / "good.yaml").write_text(TEXT)
    assert_refused(sweep(tmp_path / "good.yaml", *options), sentence)


@pytest.mark.parametrize("options", [("--limit", "many"), ("--limit", "1.5"), ("--limit",), ("--no-such-option",), ("more",)])
def test_options_of_another_type_are_exit_code_2(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "good.yaml").write_text(TEXT)
    result = sweep(tmp_path / "good.yaml", *options)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert os.listdir(".") == []


@pytest.mark.cli
@pytest.mark.parametrize(
    "index", [next(i for i, (text, _) in enumerate(SWEEP_FILES) if part in text) for part in ("a7: &a7", "os.system", "٢/٣")]
)
def test_a_real_process_answers_the_same(tmp_path: Path, index: int) -> None:
    text, sentence = SWEEP_FILES[index]
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "vlm_pruner_eval", "sweep", str(tmp_path / "bad.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(".") == []


# ---- mutations of a good file
HOSTILE_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["", "..", "../x", "/etc", "2/0", "1e400", "nan", "٢/٣", "os:system", "\x00", "\ud800", "a\nb", "${HOME}", "!!python/x", "-"]
    ),
    st.dates(),
    st.binary(max_size=5),
    st.just(datetime.datetime(2024, 1, 1, 1, 1, 1)),
    st.sampled_from([[], {}, [[]], [None], {"a": 1}, {"name": "fastv", "layer": [1]}, {"name": "random", "seeds": [0, "x"]}]),
).map(copy.deepcopy)  # a later mutation may change it
WORDS = st.one_of(
    st.sampled_from(sorted(SCHEMA | {"seeds", "label", "layer", "output", "merge"})), st.text(max_size=8), st.integers(), st.none()
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """The good file with one to four values replaced, removed or added, anywhere."""
    raw = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        holder: Any = raw
        while True:
            places = list(range(len(holder))) if isinstance(holder, list) else list(holder)
            if not places:
                break
            place = draw(st.sampled_from(places))
            if isinstance(holder[place], (dict, list)) and draw(st.integers(0, 3)):
                holder = holder[place]
                continue
            action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
            if action == "remove":
                del holder[place]
            elif action == "replace":
                holder[place] = draw(HOSTILE_VALUES)
            elif isinstance(holder, list):
                holder.insert(place, draw(HOSTILE_VALUES))
            else:
                holder[draw(WORDS)] = draw(HOSTILE_VALUES)
            break
    return raw


def outcome(path: Path) -> list[Run] | list[str]:
    """The grid of a file, or why there is none; anything else is an exception of the test."""
    try:
        return expand(load(path, check=method_problems))
    except ConfigError as error:
        return [problem.removeprefix(f"{path}: ") for problem in error.problems]


def names_a_key(problem: str, raw: Any) -> bool:
    if re.match(r"(got (an empty file|both|neither|\w+ .*expected a mapping)|is not valid YAML|[a-z0-9.-]+: has (scope|budget) )", problem):
        return True
    known = SCHEMA | {str(key) for key in raw if key} if isinstance(raw, dict) else SCHEMA
    return re.split(r"[.\[:]", problem)[0] in known or problem.startswith(tuple(known)) or problem.startswith("'")


def check_outcome(found: list[Run] | list[str], raw: Any) -> None:
    assert found
    for item in found:
        if isinstance(item, str):
            assert is_sentence(item) and names_a_key(item, raw), item
            continue
        assert json.loads(json.dumps(item.config, allow_nan=False)) == item.config
        assert item.run_id == f"{item.key}-{run_hash(item.config)[:10]}"
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,220}", item.run_id)
        built = get_pruner(item.method, pruning_rate=0 if item.pruning_rate is None else item.pruning_rate, **item.params)
        assert {name: getattr(built, name) for name in item.changed} == item.changed
    if isinstance(found[0], Run):
        assert found[0].method == "none"
        assert len({item.run_id for item in found}) == len(found)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=mutated())
@example(raw=GOOD)
@example(raw=GOOD | {"limit": 5, "output": "x"})
def test_a_mutated_file_is_a_grid_or_sentences(tmp_path: Path, raw: Any) -> None:
    path = tmp_path / "mutated.yaml"
    path.write_bytes(yaml.safe_dump(raw, allow_unicode=True, encoding="utf-8") if is_encodable(raw) else yaml.safe_dump(raw).encode())
    check_outcome(outcome(path), raw)


def is_encodable(raw: Any) -> bool:
    return not re.search("[\ud800-\udfff]", str(raw))


@settings(max_examples=75, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_file_with_torn_bytes_is_a_grid_or_sentences(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(TEXT.encode())
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 8))
        content[start : start + length] = data.draw(
            st.one_of(
                st.binary(max_size=4),
                st.sampled_from([b"&a ", b"*a", b"!!", b"<<: ", b"- ", b": ", b"{", b"]", b"\n", b"? ", b"|\n", b"'"]),
            )
        )
    path = tmp_path / "torn.yaml"
    path.write_bytes(bytes(content))
    found = outcome(path)
    for item in found:
        assert isinstance(item, Run) or is_sentence(item), item
