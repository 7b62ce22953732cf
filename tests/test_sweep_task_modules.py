"""Tasks whose modules can't be imported are refused before a model is loaded, wherever a sweep is looked at."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lmms_eval.tasks import TaskManager
from rich.console import Console
from sweep_standin import make_config, task_manager, write_tasks

from vlm_pruner_eval.doctor import data_sets
from vlm_pruner_eval.doctor.finding import FAIL
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.reproduce.run import reproduce
from vlm_pruner_eval.store.folder import Store
from vlm_pruner_eval.sweep import opening
from vlm_pruner_eval.sweep.preview import preview
from vlm_pruner_eval.sweep.task_modules import module_problems

MINIVLM = {"id": "vlmpruner_llava", "pretrained": "minivlm", "device": "cpu", "visual_tokens": 576, "layers": 5}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """A task that needs cv2 under another name, one that fails otherwise, and groups of them."""
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    (folder / "lacking.py").write_text("print('a notice')\nimport nowhere_to_be_found.deeper\n")
    (folder / "failing.py").write_text("raise OSError('no model file')\n")
    for name in ("lacking", "failing"):
        (folder / f"{name}.yaml").write_text(f"include: tiny_mean.yaml\ntask: {name}\nprocess_results: !function {name}.f\n")
    (folder / "both.yaml").write_text("group: both\ntask: [tiny_mean, lacking, failing]\n")
    return task_manager(folder)


def test_what_a_task_lacks_is_named_with_the_command_that_installs_it(tasks: TaskManager, capsys: pytest.CaptureFixture) -> None:
    expected = [
        "tasks: lacking can't be loaded, as it needs the package nowhere_to_be_found, which is not installed: "
        "`pip install nowhere_to_be_found`.",
        "tasks: failing can't be loaded, as its functions raise OSError: no model file; mend that, or leave the task out.",
    ]
    assert list(module_problems(["both", "tiny_pairs"], tasks)) == expected
    assert capsys.readouterr().out == ""
    assert list(module_problems(["tiny_mean", "tiny_pairs"], tasks)) == []


def test_doctor_dry_run_and_sweep_refuse_it(tasks: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmms_eval.tasks.TaskManager", lambda **arguments: tasks)
    config = make_config(tasks=["tiny_mean", "lacking"])
    with pytest.raises(ConfigError, match="needs the package nowhere_to_be_found"):
        preview(config, tmp_path / "out")
    with pytest.raises(ConfigError, match="needs the package nowhere_to_be_found"):
        opening.check_tasks(config, tasks)
    (finding,) = data_sets.tasks(config)
    assert finding.status == FAIL and "pip install nowhere_to_be_found" in finding.found


def test_longvideobench_needs_decord(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case that led here: a task of table 4."""
    index = TaskManager(verbosity="ERROR", include_defaults=False)
    import lmms_eval.tasks

    file = Path(lmms_eval.tasks.__file__).parent / "longvideobench" / "longvideobench_val_v.yaml"
    index.task_index["longvideobench_val_v"] = {"type": "task", "yaml_path": str(file)}
    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.delitem(sys.modules, "lmms_eval.tasks.longvideobench.utils", raising=False)
    (problem,) = module_problems(["longvideobench_val_v"], index)
    assert "needs the package decord" in problem and "x86-64" in problem


def test_wrong_layers_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    from vlm_pruner_eval.sweep.config import ModelSection

    opening.check_layers(ModelSection(**MINIVLM))
    opening.check_layers(ModelSection(**MINIVLM | {"layers": None}))
    with pytest.raises(ConfigError, match=r"model.layers: got 32, but minivlm has 5 decoder layers; write 5."):
        opening.check_layers(ModelSection(**MINIVLM | {"layers": 32}))
    original = '{"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "x", "num_hidden_layers": 40}'
    (tmp_path / "config.json").write_text(original)
    with pytest.raises(ConfigError, match="has 40 decoder layers"):
        opening.check_layers(ModelSection(**MINIVLM | {"pretrained": str(tmp_path), "layers": 32}))
    (tmp_path / "config.json").write_text("{broken")
    opening.check_layers(ModelSection(**MINIVLM | {"pretrained": str(tmp_path), "layers": 32}))  # who loads it says what is wrong


def test_layers_are_looked_at_before_anything_loads(tasks: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the noise floor would come first, of a model that takes minutes to load."""

    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("vlm_pruner_eval.lmms.families.load", load)
    monkeypatch.setattr("vlm_pruner_eval.selftest.run", lambda: None)
    config = make_config(model=MINIVLM | {"layers": 32})
    console = Console(file=io.StringIO(), record=True)
    with pytest.raises(ConfigError, match="has 5 decoder layers"):
        opening.open_session(config, Store(tmp_path), [], console=console, task_manager=tasks)
    with pytest.raises(ConfigError, match="has 5 decoder layers"):
        reproduce(SimpleNamespace(rows=config), console=console, task_manager=tasks)
    assert "Noise floor" not in console.export_text()
