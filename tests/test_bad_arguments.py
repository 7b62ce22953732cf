"""Bad --model_args of lmms-eval and bad options of the other commands: a sentence each, exit code 2, nothing loaded or written."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import TEXT
from bad_model_args import MODEL_ARGS
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger
from report_sweeps import edit_answers
from rich.console import Console
from sweep_standin import StandIn, make_config, task_manager, write_tasks
from typer.testing import CliRunner

from vlm_pruner_eval.budget import parse_rate
from vlm_pruner_eval.cli import app
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.lmms import checkpoint, settings
from vlm_pruner_eval.lmms.families import VlmPrunerLlava
from vlm_pruner_eval.pruners import Pruner, list_pruners
from vlm_pruner_eval.report.check import check, write_reference
from vlm_pruner_eval.sweep.runner import run_sweep

LONGEST = 1500  # characters of a sentence; one that names all methods is long
FIELDS = ["pretrained", "method", "pruning_rate", "batch_size", "device", "dtype", "layer", "pivots", "revision", "allow_bin", "x", ""]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY", "KINETO_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for reads_weights in ("_model", "load_original"):
        monkeypatch.setattr(checkpoint, reads_weights, lambda *args, **kwargs: pytest.fail("weights were read"))
    yield
    logger.remove()
    logger.add(sys.stderr)


def is_sentence(text: str) -> bool:
    return len(text) <= LONGEST and text.isprintable() and text.endswith((".", ")")) and ": " in text


# ---- --model_args


def test_bad_model_args_are_refused_before_weights_are_read() -> None:
    wrong = {}
    for model_args, sentence in MODEL_ARGS:
        with pytest.raises(ConfigError) as refused:
            VlmPrunerLlava.create_from_arg_string(model_args, {"batch_size": 1, "device": None, "max_batch_size": None})
        said = refused.value.problems
        if sentence not in str(refused.value) or not all(map(is_sentence, said)):
            wrong[model_args] = said
    assert wrong == {}
    assert os.listdir(".") == []


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.fractions(),
    st.text(max_size=10),
    st.lists(st.integers(), max_size=3),
    st.binary(max_size=3),
    st.sampled_from(["minivlm", "8/9", 0.5, 2, "cpu", "auto", "nan", "2/0", "9" * 5000, 10**400, -(10**5000), [[[]]], {"a": {}}]),
    st.sampled_from(["os:system", "builtins:eval", "..x:y", ":", "a:b:c", "json:JSONDecoder", *list_pruners()]),
)


@given(model_args=st.dictionaries(st.one_of(st.sampled_from(FIELDS), st.text(max_size=5)), VALUES, max_size=6))
def test_any_mapping_is_settings_or_sentences(model_args: dict[str, object]) -> None:
    try:
        parsed, method, pruner = settings.parse({"pretrained": "minivlm"} | model_args)
    except ConfigError as error:
        assert error.problems
        assert all(is_sentence(problem) for problem in error.problems), error.problems
        return
    assert isinstance(pruner, Pruner)
    assert 0 <= parse_rate(pruner.pruning_rate) < 1
    assert parsed.batch_size >= 1
    assert isinstance(method, str)


@given(text=st.one_of(st.text(max_size=40), st.text(alphabet="ap=,'\"{}[]\\ 1.-", max_size=30)))
def test_any_text_is_arguments_or_a_sentence(text: str) -> None:
    try:
        joined = settings.from_command_line(text, {"batch_size": 1})
    except ConfigError as error:
        assert all(is_sentence(problem) for problem in error.problems), error.problems
        return
    assert joined["batch_size"] == 1 or "batch_size" in text


# ---- the other commands
_DOCS = ("", "x", "a/b/c/1", "-1", "1.5", "٣", "9" * 5000, "../../etc/passwd", "\x1b[31m")
_RATES = ("nan", "1", "-1", "x", "1e-999999999")
_SIZES = ("0", "-1", "x", ",", "1,1", "٣", "9" * 5000)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("arguments")
    tasks = task_manager(write_tasks(root / "tasks"))
    config = make_config(methods=["vlmpruner", "blind"], limit=4)
    run_sweep(config, root / "sweep", console=Console(file=io.StringIO()), load=lambda *args, **kwargs: StandIn(), task_manager=tasks)
    write_reference(root / "sweep", root / "reference.json")
    return root


@pytest.fixture
def folder(swept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(swept, tmp_path / "swept"))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_refused(result: Result, sentence: str) -> None:
    assert result.exit_code == 2, (result.exit_code, result.exception, result.output[-600:])
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())
    assert sentence in shown, shown
    assert "Traceback" not in result.output
    assert os.listdir(".") == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["report"], "report: got no results directory"),
        (["report", "nowhere"], "nowhere: holds no sweep"),
        (["report", "FILE"], "holds no sweep"),
        (["report", "/dev/null"], "holds no sweep"),
        (["report", "x" * 300], "holds no sweep"),
        (["report", "--check", "nowhere.json"], "report: got no results directory"),
        (["report", "SWEEP", "--check", "nowhere.json"], "nowhere.json: can't be read as a reference"),
        (["report", "SWEEP", "--check", "SWEEP"], "it is a folder"),
        (["report", "SWEEP", "--check", "/dev/zero"], "it is a device or a pipe"),
        (["report", "SWEEP", "--check", "FILE"], "can't be read as a reference"),
        (["report", "SWEEP", "--write-reference", "/dev/null/x"], "can't be written"),
        (["report", "SWEEP", "--write-reference", "FILE"], "can't be read as a reference"),
        (["report", "--no-such"], "No such option"),
        (["show"], "Missing argument"),
        (["show", "SWEEP"], "show: expected either --doc TASK/SPLIT/ID"),
        (["show", "SWEEP", "--doc", "1", "--flips", "vlmpruner", "blind"], "show: expected either --doc"),
        (["show", "nowhere", "--doc", "1"], "nowhere: holds no sweep"),
        (["show", "SWEEP", "--doc", "1"], "name one with --task"),
        *[(["show", "SWEEP", "--doc", doc], "--doc: got") for doc in _DOCS],
        (["show", "SWEEP", "--doc", "tiny_mean/train/1"], "--doc: got the split 'train'"),
        (["show", "SWEEP", "--doc", "nowhere/1"], "--task: got 'nowhere'"),
        (["show", "SWEEP", "--doc", "tiny_mean/test/" + "9" * 15], "was not answered"),
        (["show", "SWEEP", "--doc", "tiny_mean/1", "--methods", "fastw"], "methods: got 'fastw'"),
        *[(["show", "SWEEP", "--doc", "tiny_mean/1", "--rate", rate], "pruning_rate: got") for rate in _RATES],
        (["show", "SWEEP", "--doc", "tiny_mean/1", "--rate", "0.1"], "--rate: got 0.1, expected one of the sweep's"),
        (["show", "SWEEP", "--flips", "vlmpruner"], "requires 2 arguments"),
        (["show", "SWEEP", "--flips", "vlmpruner", "vlmpruner"], "vlmpruner"),
        (["show", "SWEEP", "--flips", "vlmpruner", "nothing"], "got 'nothing'"),
        (["show", "SWEEP", "--flips", "vlmpruner", "blind", "--n", "-1"], "Invalid value for '--n'"),
        (["show", "SWEEP", "--flips", "vlmpruner", "blind", "--methods", "a"], "--methods: got it with --flips"),
        (["reproduce", "--model", "../../etc"], "model: got '../../etc'"),
        (["reproduce", "--config", "/dev/zero"], "it is a device or a pipe"),
        (["reproduce", "--config", "FILE"], "is not valid YAML"),
        *[(["reproduce", "--config", "GOOD", "--batch-sizes", sizes], "batch-sizes: got") for sizes in _SIZES],
        (["reproduce", "--config", "GOOD", "--tasks", "gqa"], "tasks: got 'gqa'"),
        (["reproduce", "--config", "GOOD", "--method", "os:system"], "method: got 'os:system'"),
        (["reproduce", "--config", "GOOD", "--pretrained", "a\x1bb"], "pretrained: got control characters"),
        (["reproduce", "--config", "GOOD", "--output", "FILE"], "is not a folder"),
        (["bench"], "Usage"),
        *[(["bench", "selection", "--sizes", sizes], "--sizes: got") for sizes in ("", "0", "-5", "x", "1.5", "9" * 5000, "99999999")],
        (["bench", "selection", "--repeats", "0"], "--repeats: got 0"),
        (["bench", "selection", "--methods", "fastw"], "--methods: got 'fastw'"),
        (["bench", "selection", "--threads", "0"], "--threads: got 0"),
        (["bench", "selection", "--threads", "99999999999"], "--threads: got 99999999999"),
        (["bench", "selection", "--out", "/dev/null/x"], "can't be written"),
        (["bench", "selection", "--out", "."], "can't be written"),
        (["bench", "prefill", "--geometry", "mini0"], "--geometry: got 'mini0'"),
        *[(["bench", "prefill", "--device", device], "--device: got") for device in ("abacus", "meta", "cuda:x", "")],
        (["bench", "prefill", "--dtype", "int4"], "--dtype: got 'int4'"),
        *[(["bench", "prefill", "--rates", rate], "pruning_rate: got") for rate in ("nan", "1", "-0.1", "2/0")],
        *[(["bench", "prefill", "--batch-sizes", sizes], "--batch-sizes: got") for sizes in ("0", "x", "", "-1")],
        (["bench", "prefill", "--methods", "fastw"], "method: got 'fastw'"),
        (["bench", "prefill", "--text-tokens", "99999999999"], "needs"),
        (["bench", "profile", "--method", "os:system"], "method: "),
        (["bench", "shared", "--config", "nowhere.yaml"], "can't be read as a text file"),
        (["bench", "shared", "--config", "GOOD", "--rounds", "0"], "--rounds: got 0"),
        (["bench", "shared", "--config", "GOOD", "--limit", "0"], "limit: got 0"),
        (["list", "x"], "unexpected extra argument"),
        (["swep"], "No such command 'swep'"),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_other_commands_are_sentences(folder: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "file").write_text("{[")
    (tmp_path / "good.yaml").write_text(TEXT)
    places = {"SWEEP": folder / "sweep", "FILE": tmp_path / "file", "GOOD": tmp_path / "good.yaml"}
    before = sorted(folder.rglob("*"))
    assert_refused(call(*(places.get(argument, argument) for argument in arguments)), sentence)
    assert sorted(folder.rglob("*")) == before


# ---- files of a results directory, and references
def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda grid: [], "sweep.json: got no schema number"),
        (lambda grid: grid | {"schema": 2}, "sweep.json: got schema 2, expected 3"),
        (lambda grid: {key: value for key, value in grid.items() if key != "runs"}, "sweep.json: runs: "),
        (lambda grid: {key: value for key, value in grid.items() if key != "config"}, "sweep.json: config: "),
        (lambda grid: grid | {"more": 1}, "sweep.json: more: "),
        (lambda grid: grid | {"name": "../../x"}, "sweep.json: name: got '../../x'"),
        (lambda grid: grid | {"units": {"tiny_mean": "../.."}}, "sweep.json: units.tiny_mean: got '../..'"),
        (lambda grid: grid["config"].pop("model") and None, "sweep.json: config: lacks model.id"),
        (lambda grid: grid["config"].update(tasks="gqa"), "sweep.json: config: lacks a list of tasks"),
        (lambda grid: grid | {"runs": [3]}, "sweep.json: runs.0: "),
        (lambda grid: grid["runs"][1].pop("label") and None, "sweep.json: runs.1.label: "),
        (lambda grid: grid["runs"][1].update(seed_=grid["runs"][1].pop("seed")), "sweep.json: runs.1.seed: "),
        (lambda grid: grid["runs"][1].update(run_id="../../../elsewhere"), "sweep.json: runs.1.run_id: got '../../../elsewhere'"),
        (lambda grid: grid["runs"][1].update(run_id="/etc"), "sweep.json: runs.1.run_id: got '/etc'"),
        (lambda grid: grid["runs"][1].update(key="../../x"), "sweep.json: runs.1.key: got '../../x'"),
        (lambda grid: grid["runs"][1].update(label="\x1b[31mred"), "sweep.json: runs.1.label: got"),
    ],
)
def test_a_grid_that_is_broken_or_leads_elsewhere_is_refused(folder: Path, change: Callable[[Any], Any], sentence: str) -> None:
    edit(folder / "sweep" / "sweep.json", change)
    assert_refused(call("report", folder / "sweep"), sentence)
    assert_refused(call("show", folder / "sweep", "--doc", "tiny_mean/1"), sentence)
    assert not (folder / "sweep" / "report.md").exists()


@pytest.mark.parametrize(("file", "name"), [("run.json", "config"), ("*/record.json", "task"), ("*/record.json", "provenance")])
def test_a_record_without_a_part_is_refused(folder: Path, file: str, name: str) -> None:
    edit(next(folder.glob(f"sweep/runs/vlmpruner*/{file}")), lambda record: record.pop(name) and None)
    assert_refused(call("report", folder / "sweep"), f"{file.rpartition('/')[2]}: {name}: ")


@pytest.mark.parametrize("digest", ["../../../../etc/passwd", "a.b", ""])
def test_a_picture_is_never_looked_for_elsewhere(folder: Path, digest: str) -> None:
    """Answers name their pictures, and `report` looks for those of the first documents."""
    for path in folder.glob("sweep/runs/*/*/answers.jsonl"):
        edit_answers(path, lambda row: row.update(images=[digest]))
    assert_refused(call("report", folder / "sweep"), "images: got '")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@given(data=st.data())
def test_a_changed_reference_is_compared_or_refused(swept: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = json.loads((swept / "reference.json").read_text())
    holder = content
    while True:
        place = data.draw(st.sampled_from(sorted(holder)))
        if not isinstance(holder[place], dict) or not holder[place] or not data.draw(st.integers(0, 2)):
            break
        holder = holder[place]
    if data.draw(st.booleans()):
        holder[place] = data.draw(JSON)
    else:
        del holder[place]
    (tmp_path / "changed.json").write_text(json.dumps(content))
    try:
        problems = check(swept / "sweep", tmp_path / "changed.json")
    except ConfigError as error:
        problems = list(error.problems)
    assert all(problem.endswith(".") and ": " in problem for problem in problems), problems


def test_a_file_that_is_no_json_object_is_no_reference(swept: Path, tmp_path: Path) -> None:
    assert check(swept / "sweep", swept / "reference.json") == [], "the folder and its reference are good"
    for text in ("", "[]", "{", "null", "[" * 100_000, '{"a": 1}', "\x00", "NaN", "1" * 5000):
        (tmp_path / "reference.json").write_text(text)
        assert_refused(call("report", swept / "sweep", "--check", tmp_path / "reference.json"), "reference")
