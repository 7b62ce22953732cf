from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.config import load, validate
from vlm_pruner_eval.sweep.grid import expand

CONFIGS = Path(__file__).parent.parent / "configs"

GOOD = """
name: good
model: {id: vlmpruner_llava, pretrained: minivlm}
tasks: [gqa, mme]
pruning_rates: [2/3, 0.889]
methods: [vlmpruner, {name: random, seeds: [0, 1]}, {name: fastv, layer: 3, label: FastV at 3}]
"""


def problems_of(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


def changed(**changes: object) -> str:
    raw = yaml.safe_load(GOOD)
    for key, value in changes.items():
        if value is ...:
            del raw[key]
        else:
            raw[key] = value
    return yaml.safe_dump(raw)


def test_a_good_file_is_read_as_written(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    config = load(tmp_path / "good.yaml")
    assert config.rates == ["2/3", 0.889]
    assert config.methods[0].name == "vlmpruner"
    assert config.methods[1].seeds == (0, 1)
    assert (config.methods[2].shown, config.methods[2].parameters) == ("FastV at 3", {"layer": 3})
    assert (config.model.batch_size, config.model.protocol, config.limit) == (1, "hf", None)


def test_settings_of_the_model_reach_the_loader_only_where_they_are_given() -> None:
    raw = yaml.safe_load(GOOD)
    names = {"max_frames_num", "min_pixels", "max_pixels", "allow_bin"}
    assert not names & set(validate(raw).model.model_dump(exclude_none=True))
    given = {"max_frames_num": 8, "min_pixels": 784, "max_pixels": 1003520, "allow_bin": True}
    plain = expand(validate(raw))[0]
    raw["model"] |= given
    assert validate(raw).model.model_dump(include=names) == given
    assert expand(validate(raw))[0].run_id != plain.run_id


@pytest.mark.parametrize("task", ["mmbench_en_dev", "mmbench_en_dev_lite", "mmbench_en", "mmbench"])
def test_a_task_that_draws_letters_at_random_is_no_paper_run(task: str) -> None:
    raw = yaml.safe_load(changed(tasks=["gqa", task]))
    assert validate(raw).tasks == ["gqa", task]
    raw["model"]["protocol"] = "paper"
    with pytest.raises(ConfigError, match=rf"tasks: got '{task}' with model.protocol paper.*use mmbench_en_dev_static"):
        validate(raw)
    for scored in ("mmbench_en_dev_static", "mmbench_en_test"):
        assert validate(raw | {"tasks": [scored]}).tasks == [scored]


def test_overrides_replace_keys_and_are_checked(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    assert load(tmp_path / "good.yaml", overrides={"limit": 7}).limit == 7
    with pytest.raises(ConfigError, match=r"limit: got -1 \(int\), expected a whole number"):
        load(tmp_path / "good.yaml", overrides={"limit": -1})


def test_keep_tokens_become_exact_fractions() -> None:
    raw = yaml.safe_load(changed(pruning_rates=..., keep_tokens=[192, 128, 64]))
    raw["model"]["visual_tokens"] = 576
    assert validate(raw).rates == ["2/3", "7/9", "8/9"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "got an empty file, expected a mapping"),
        ("# nothing\n", "got an empty file, expected a mapping"),
        ("- a\n- b\n", "got list ['a', 'b'], expected a mapping"),
        ("just text", "got str 'just text', expected a mapping"),
        ("a: [1, 2", "is not valid YAML"),
        ("a: b: c", "is not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
        (changed(task=["gqa"]), "task: is an unknown key; did you mean 'tasks'? Known: gallery, include_path, keep_tokens"),
        (changed(name=...), "name: is missing; expected letters"),
        (changed(name="../up"), "name: got '../up' (str), expected letters"),
        (changed(name=3), "name: got 3 (int), expected letters"),
        (changed(tasks=[]), "tasks: got [] (list), expected a list of at least one"),
        (changed(tasks="gqa"), "tasks: got 'gqa' (str), expected a list"),
        (changed(tasks=["gqa", "gqa"]), "tasks: got 'gqa' 2 times, expected each value once"),
        (changed(pruning_rates=[1.0]), "pruning_rates[0]: got 1.0, expected a number in [0, 1)"),
        (changed(pruning_rates=[0.5, -0.1]), "pruning_rates[1]: got -0.1, expected"),
        (changed(pruning_rates=["half"]), "pruning_rates[0]: got 'half', expected"),
        (changed(pruning_rates=[float("nan")]), "pruning_rates[0]: got nan, expected"),
        (changed(pruning_rates=[True]), "pruning_rates[0]: got True (bool), expected"),
        (changed(pruning_rates=["3/0"]), "pruning_rates[0]: got '3/0', expected"),
        (changed(pruning_rates=["1/2", 0.5]), "pruning_rates: got 0.5 2 times"),
        (changed(pruning_rates=[]), "pruning_rates: got [] (list), expected a list of rates"),
        (changed(pruning_rates=...), "got neither pruning_rates nor keep_tokens, expected exactly one"),
        (changed(keep_tokens=[64]), "got both pruning_rates and keep_tokens"),
        (changed(keep_tokens=[64], pruning_rates=...), "keep_tokens: needs model.visual_tokens"),
        (changed(model={"id": "x"}), "model.pretrained: is missing; expected a checkpoint folder"),
        (changed(model={"id": "x", "pretrained": "y", "batchsize": 2}), "model.batchsize: is an unknown key; did you mean 'batch_size'?"),
        (changed(model={"id": "x", "pretrained": "y", "batch_size": "2"}), "model.batch_size: got '2' (str), expected a whole number"),
        (changed(model={"id": "x", "pretrained": "y", "batch_size": 0}), "model.batch_size: got 0 (int), expected a whole number, 1"),
        (changed(model={"id": "x", "pretrained": "y", "dtype": "fp16"}), "model.dtype: got 'fp16' (str), expected one of auto"),
        (changed(model={"id": "x", "pretrained": "y", "max_frames_num": 0}), "model.max_frames_num: got 0 (int), expected a whole number"),
        (changed(model={"id": "x", "pretrained": "y", "min_pixels": "9"}), "model.min_pixels: got '9' (str), expected a whole number of"),
        (changed(model={"id": "x", "pretrained": "y", "max_pixels": 1.5}), "model.max_pixels: got 1.5 (float), expected a whole number of"),
        (changed(model={"id": "x", "pretrained": "y", "min_pixels": 9, "max_pixels": 4}), "model.min_pixels: got 9, expected at most"),
        (changed(model={"id": "x", "pretrained": "y", "allow_bin": 1}), "model.allow_bin: got 1 (int), expected true to load weights"),
        (changed(model="minivlm"), "model: got 'minivlm' (str), expected a mapping"),
        (changed(methods=[]), "methods: got [] (list), expected a list of method names"),
        (changed(methods=[3]), "methods[0]: got 3 (int), expected a list of method names, or mappings"),
        (changed(methods=[{"label": "x"}]), "methods[0].name: is missing"),
        (changed(methods=[{"name": "random", "seeds": 3}]), "methods[0].seeds: got 3 (int), expected a list of whole numbers"),
        (changed(limit=0.5), "limit: got 0.5 (float), expected a whole number"),
        (changed(seed=-1), "seed: got -1 (int), expected a whole number"),
        (GOOD + "limit: 3\nlimit: 4\n", "limit: is given twice (lines 7 and 8)"),
        ("a: &a [*a]\n" + GOOD, "a[0]: holds an anchor that contains itself"),
    ],
)
def test_every_mistake_is_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    found = problems_of(tmp_path, text)
    assert any(problem.startswith(sentence) for problem in found), found


def test_all_problems_of_a_file_come_together(tmp_path: Path) -> None:
    text = changed(name=1, limit=-3, tasks=[], pruning_rates=[2], extra=1, keep_tokens=[3], methods=[{"nam": "x"}])
    starts = ("name:", "limit:", "tasks:", "pruning_rates[0]:", "extra:", "got both", "keep_tokens:", "methods[0].name:")
    found = problems_of(tmp_path, text)
    assert all(any(problem.startswith(start) for problem in found) for start in starts), found


def test_more_tokens_than_there_are_is_refused() -> None:
    raw = yaml.safe_load(changed(pruning_rates=..., keep_tokens=[600]))
    raw["model"]["visual_tokens"] = 576
    with pytest.raises(ConfigError, match=r"keep_tokens: got 600, expected at most model.visual_tokens = 576"):
        validate(raw)


def test_an_anchor_bomb_is_not_unfolded(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    found = problems_of(tmp_path, "\n".join([*lines, GOOD.replace("[gqa, mme]", "*a8")]))
    assert found == ["a3: stands for more than 5000 values with its anchors written out; expected at most that."]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00binary"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "sweep.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="can't be read as a text file"):
        load(path)
    with pytest.raises(ConfigError, match="can't be read as a text file"):
        load(tmp_path)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_is_valid_and_its_grid_is_whole(path: Path) -> None:
    config = load(path)
    runs = expand(config)
    assert runs[0].method == "none"
    assert {run.method for run in runs[1:]} == {entry.name for entry in config.methods}
    assert config.name.replace("_", "") in (path.stem.replace("_", ""), "paper" + path.stem.replace("_", ""))


def test_the_config_and_the_command_line_do_not_import_torch() -> None:
    heavy = "{'torch', 'lmms_eval', 'transformers'}"
    code = f"import sys, vlm_pruner_eval.cli, vlm_pruner_eval.sweep.config; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
