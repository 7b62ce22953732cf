from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.config import load, validate
from vlm_pruner_eval.sweep.grid import expand

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
        (changed(task=["gqa"]), "task: is an unknown key; did you mean 'tasks'? Known: gallery, include_path, keep_tokens"),
        (changed(keep_tokens=[64], pruning_rates=...), "keep_tokens: needs model.visual_tokens"),
        (changed(model={"id": "x", "pretrained": "y", "max_frames_num": 0}), "model.max_frames_num: got 0 (int), expected a whole number"),
        (changed(model={"id": "x", "pretrained": "y", "min_pixels": "9"}), "model.min_pixels: got '9' (str), expected a whole number of"),
        (GOOD + "limit: 3\nlimit: 4\n", "limit: is given twice (lines 7 and 8)"),
    ],
)
def test_a_mistake_says_what_was_got_and_expected(tmp_path: Path, text: str, sentence: str) -> None:
    """All other mistakes are in `bad_inputs`, through the command line."""
    found = problems_of(tmp_path, text)
    assert any(problem.startswith(sentence) for problem in found), found


def test_all_problems_of_a_file_come_together(tmp_path: Path) -> None:
    text = changed(name=1, limit=-3, tasks=[], pruning_rates=[2], extra=1, keep_tokens=[3], methods=[{"nam": "x"}])
    starts = ("name:", "limit:", "tasks:", "pruning_rates[0]:", "extra:", "got both", "keep_tokens:", "methods[0].name:")
    found = problems_of(tmp_path, text)
    assert all(any(problem.startswith(start) for problem in found) for start in starts), found
