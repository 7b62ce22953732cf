"""What the entry point changes in lmms-eval, and that it leaves other models' runs alone."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from lmms_eval import models
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from vlm_pruner_eval import ConfigError, PruningError
from vlm_pruner_eval.lmms import plugin
from vlm_pruner_eval.lmms.families import VlmPrunerLlava


def test_the_entry_point_registers_every_id_and_each_names_a_class() -> None:
    assert "vlm_pruner_eval.lmms.plugin:manifests" in {point.value for point in entry_points(group="lmms_eval.models")}
    for model_id in plugin.MODELS:
        cls = models.get_model(model_id)
        assert (cls.model_id, cls.is_simple) == (model_id, False)
        assert model_id in models.AVAILABLE_CHAT_TEMPLATE_MODELS
        assert plugin.STOCK_PROMPTS[model_id] in models.list_available_models()


def test_the_entry_point_imports_no_torch() -> None:
    code = "import sys, vlm_pruner_eval.lmms.plugin; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'lmms_eval')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_tasks_are_found_without_include_path_and_other_paths_are_kept(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: my_own_task\ndataset_path: parquet\noutput_type: generate_until\n")
    for include_path in (None, str(tmp_path), [str(tmp_path)]):
        manager = TaskManager(include_defaults=False, include_path=include_path)
        assert "digitscenes_read" in manager.all_tasks
        assert ("my_own_task" in manager.all_tasks) == (include_path is not None)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("vlmpruner_internvl", "internvl_hf"),
        ("vlmpruner_llava", "llava_hf"),
        ("vlmpruner_llava_video", "llava_vid"),
        ("vlmpruner_qwen2_5_vl", "qwen2_5_vl"),
        ("qwen2_vl", "qwen2_vl"),
        (None, None),
    ],
)
def test_tasks_see_the_stock_name_of_our_models_only(model: str | None, expected: str | None) -> None:
    assert TaskManager(include_defaults=False, model_name=model).model_name == expected


def test_a_loaded_model_stands_for_its_id() -> None:
    assert plugin.prompt_name(VlmPrunerLlava.__new__(VlmPrunerLlava)) == "llava_hf"
    other = SimpleNamespace()
    assert plugin.prompt_name(other) is other


def test_wrapping_twice_is_wrapping_once() -> None:
    before = TaskManager.__init__, TaskManager.initialize_tasks
    plugin.manifests()
    assert (TaskManager.__init__, TaskManager.initialize_tasks) == before


# ---- exit codes


def arguments(**values: object) -> argparse.Namespace:
    return argparse.Namespace(**{"model": "vlmpruner_llava", "tasks": "t", "output_path": None} | values)


def raising(error: Exception):
    def cli_evaluate_single(args: argparse.Namespace) -> tuple:
        raise error

    return plugin.exit_on_error(cli_evaluate_single)


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (
            ValueError("Tasks not found: nope."),
            1,
            "the evaluation of vlmpruner_llava failed: ValueError: Tasks not found: nope.",
        ),
        (KeyError("gone"), 1, "failed: KeyError: 'gone'"),
        (ConfigError("layer: got 9."), 2, "vlm_pruner_eval: layer: got 9."),
    ],
)
def test_an_exception_of_our_models_ends_the_process(error: Exception, code: int, sentence: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_info:
        raising(error)(arguments())
    assert exit_info.value.code == code
    assert sentence in capsys.readouterr().err


def test_other_models_keep_lmms_evals_own_behaviour() -> None:
    with pytest.raises(ValueError, match="Tasks not found"):
        raising(ValueError("Tasks not found"))(arguments(model="llava_hf", tasks=None))
    assert plugin.exit_on_error(lambda args: ("results", "samples"))(arguments()) == ("results", "samples")


@pytest.mark.parametrize(
    ("tasks", "code", "expected"), [("t", None, 1), ("t", 0, 1), ("t", 3, 3), ("list", None, None), ("list_tags", 0, 0)]
)
def test_a_task_that_ends_the_process_is_no_success(tasks: str, code: int | None, expected: int | None) -> None:
    """Some tasks of lmms-eval call `exit()` where their data are not there."""
    with pytest.raises(SystemExit) as exit_info:
        raising(SystemExit(code))(arguments(tasks=tasks))
    assert exit_info.value.code == expected


def test_our_errors_end_the_process_for_models_of_other_packages_too(capsys: pytest.CaptureFixture) -> None:
    for error, code in ((ConfigError(["a: got 1.", "b: got 2."]), 2), (PruningError("1 of 5 samples failed."), 1)):
        with pytest.raises(SystemExit) as exit_info:
            raising(error)(arguments(model="built_on_this_one"))
        assert exit_info.value.code == code
    written = capsys.readouterr().err
    assert written.splitlines() == [f"vlm_pruner_eval: {text}" for text in ("a: got 1.", "b: got 2.", "1 of 5 samples failed.")]


# ---- ids that are nearly ours


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("vlmpruner_lava", "vlmpruner_llava"),
        ("VLMPruner-LLaVA", "vlmpruner_llava"),
        ("vlm_pruner_qwen2_vl", "vlmpruner_qwen2_vl"),
        ("vlmpruner", None),
        ("vlmpruner_something_else_entirely", None),
    ],
)
def test_an_id_that_is_nearly_ours_is_a_config_error(name: str, meant: str | None) -> None:
    with pytest.raises(ConfigError, match="vlmpruner_llava_onevision") as refused:
        simple_evaluate(model=name, model_args="pretrained=minivlm", tasks=["digitscenes_read"], task_manager=SimpleNamespace())
    assert meant is None or f"did you mean {meant!r}?" in str(refused.value)


@pytest.mark.parametrize("name", ["llava", "llava_hf", "qwen2_vl", "internvl2", "vila", "pruner", "", None, "vlmpruner_llava"])
def test_other_ids_are_lmms_evals_business(name: str | None) -> None:
    assert plugin.unknown_id(name) is None


def test_an_id_of_another_package_is_no_typo() -> None:
    assert plugin.unknown_id("vlmpruner_mine") is not None
    assert plugin.unknown_id("vlmpruner_mine", known=["vlmpruner_mine"]) is None


@pytest.mark.parametrize(
    ("argv", "is_refused"),
    [
        (["/bin/lmms-eval", "--model", "vlmpruner_lava"], True),
        (["/site/lmms_eval/__main__.py", "--tasks", "t", "--model=vlmpruner_lava"], True),
        (["/bin/lmms-eval", "--model", "llava"], False),
        (["mine.py", "--model", "vlmpruner_lava"], False),
    ],
)
def test_the_command_is_refused_before_the_rest_is_imported(argv: list[str], is_refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval.__main__", ModuleType("lmms_eval.__main__"))
    monkeypatch.setattr(plugin, "entry_points", lambda **_: (1,))
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) if is_refused else nullcontext() as exit_info:
        plugin.manifests()
    assert not is_refused or exit_info.value.code == 2


def test_the_command_waits_for_other_packages_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval.__main__", ModuleType("lmms_eval.__main__"))
    monkeypatch.setattr(plugin, "entry_points", lambda **_: (1, 2))
    monkeypatch.setattr(sys, "argv", ["/bin/lmms-eval", "--model", "vlmpruner_of_theirs"])
    assert {manifest.model_id for manifest in plugin.manifests()} == set(plugin.MODELS)


def test_what_lmms_eval_would_only_log_ends_the_process(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = raising(AssertionError("must not be reached"))
    (tmp_path / "file").write_text("")
    for values, sentence in (
        ({"tasks": None}, "--tasks is missing"),
        ({"output_path": str(tmp_path / "file" / "deeper")}, "is a file, expected a folder"),
        ({"output_path": str(tmp_path / "new" / "folder")}, f"no permission in {tmp_path}"),
    ):
        monkeypatch.setattr(plugin.os, "access", lambda path, mode: False)  # root may write anywhere
        with pytest.raises(SystemExit) as exit_info:
            never(arguments(**values))
        assert exit_info.value.code == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_command_line_module_is_wrapped_when_it_is_used_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    main = ModuleType("lmms_eval.__main__")
    monkeypatch.setitem(sys.modules, "lmms_eval.__main__", main)
    plugin._watch_command_line()
    plugin._watch_command_line()
    body = "def cli_evaluate_single(args):\n    raise ValueError('boom')\ndef cli_evaluate(args):\n    return cli_evaluate_single(args)\n"
    exec(body, vars(main))
    assert not hasattr(vars(main)["cli_evaluate_single"], "__wrapped__")
    with pytest.raises(SystemExit):
        importlib.import_module("lmms_eval.__main__").cli_evaluate(arguments())
    assert type(main) is ModuleType
    assert not hasattr(main.cli_evaluate_single.__wrapped__, "__wrapped__"), "wrapped once"
