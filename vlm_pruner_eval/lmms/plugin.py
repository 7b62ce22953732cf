"""What lmms-eval's entry-point group `lmms_eval.models` calls: models, packaged tasks, prompts, exit codes.

lmms-eval 0.7.3 has an entry point for models only, so the rest is done by wrapping a few of its functions. Every wrapper
leaves runs of models that are not ours as they are, and wrapping twice is the same as wrapping once.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from vlm_pruner_eval.shown import spelled_out, without_secrets

if TYPE_CHECKING:
    import argparse

    from lmms_eval.models.registry_v2 import ModelManifest

# The classes behind our model ids, by path: naming them imports nothing.
_FAMILIES = "vlm_pruner_eval.lmms.families"
MODELS = {
    "vlmpruner_llava": f"{_FAMILIES}.VlmPrunerLlava",
    "vlmpruner_llava_next": f"{_FAMILIES}.VlmPrunerLlavaNext",
    "vlmpruner_llava_onevision": f"{_FAMILIES}.VlmPrunerLlavaOnevision",
    "vlmpruner_llava_video": f"{_FAMILIES}.VlmPrunerLlavaVideo",
    "vlmpruner_qwen2_vl": f"{_FAMILIES}.VlmPrunerQwen2VL",
    "vlmpruner_qwen2_5_vl": f"{_FAMILIES}.VlmPrunerQwen25VL",
    "vlmpruner_qwen3_vl": f"{_FAMILIES}.VlmPrunerQwen3VL",
    "vlmpruner_internvl": f"{_FAMILIES}.VlmPrunerInternVL",
}

# Tasks choose their prompts by the name given to --model, so each of our ids asks under the name of its stock wrapper.
STOCK_PROMPTS = {
    "vlmpruner_llava": "llava_hf",
    "vlmpruner_llava_next": "llava_hf",
    "vlmpruner_llava_onevision": "llava_hf",
    "vlmpruner_llava_video": "llava_vid",
    "vlmpruner_qwen2_vl": "qwen2_vl",
    "vlmpruner_qwen2_5_vl": "qwen2_5_vl",
    "vlmpruner_qwen3_vl": "qwen3_vl",
    "vlmpruner_internvl": "internvl_hf",
}

_WRAPPED = "_vlm_pruner_eval_wrapped"
_OURS = "_vlm_pruner_eval_asks"  # of a task index: its tasks are for one of our models


def manifests() -> list[ModelManifest]:
    """Register everything with lmms-eval; returns the manifests of our models. Imports neither torch nor transformers."""
    from lmms_eval import models
    from lmms_eval.models.registry_v2 import ModelManifest

    from vlm_pruner_eval.lmms import scored_tasks

    models.AVAILABLE_CHAT_TEMPLATE_MODELS.update(MODELS)  # what `lmms-eval models` prints
    _wrap_task_manager()
    scored_tasks.keep_pairs()
    _watch_command_line()
    return [ModelManifest(model_id=model_id, chat_class_path=path) for model_id, path in MODELS.items()]


def prompt_name(model: object) -> object:
    """The name under which tasks look up prompts, for one of our ids or loaded models; anything else as it is."""
    model_id = getattr(model, "model_id", model)
    return STOCK_PROMPTS.get(model_id, model) if isinstance(model_id, str) else model


def _wrap_task_manager() -> None:
    from lmms_eval.tasks import TaskManager

    if getattr(TaskManager, _WRAPPED, False):
        return
    init, initialize, load = TaskManager.__init__, TaskManager.initialize_tasks, TaskManager.load_task_or_group

    @functools.wraps(init)
    def __init__(
        self: TaskManager,
        verbosity: str = "INFO",
        include_path: str | list | None = None,
        include_defaults: bool = True,
        model_name: object = None,
    ) -> None:
        setattr(self, _OURS, prompt_name(model_name) is not model_name)
        init(self, verbosity, include_path, include_defaults, prompt_name(model_name))

    @functools.wraps(initialize)
    def initialize_tasks(self: TaskManager, include_path: str | Sequence[str] | None = None, include_defaults: bool = True) -> dict:
        from vlm_pruner_eval.bench import tasks_path

        paths = [] if include_path is None else [include_path] if isinstance(include_path, str) else list(include_path)
        return initialize(self, [*paths, str(tasks_path()), str(Path(__file__).parent / "tasks")], include_defaults)

    @functools.wraps(load)
    def load_task_or_group(self: TaskManager, *args: object, **kwargs: object) -> dict:
        from vlm_pruner_eval.lmms import scored_tasks

        loaded = load(self, *args, **kwargs)
        if getattr(self, _OURS, False):
            scored_tasks.offer(loaded)
        return loaded

    TaskManager.__init__, TaskManager.initialize_tasks, TaskManager.load_task_or_group = __init__, initialize_tasks, load_task_or_group
    setattr(TaskManager, _WRAPPED, True)


# ---- exit codes: lmms-eval's command line prints an exception of an evaluation and exits with 0


class _CommandLine(ModuleType):
    """The class of the module `lmms_eval.__main__` until someone asks it for `cli_evaluate`.

    The entry point runs while that module is still being imported (it imports the models), so its functions can't be
    wrapped yet; its class can be set at any time, and tells when the module is complete and about to be used.
    """

    def __getattribute__(self, name: str) -> object:
        if name == "cli_evaluate":
            self.cli_evaluate_single = exit_on_error(self.cli_evaluate_single)
            self.__class__ = ModuleType
        return ModuleType.__getattribute__(self, name)


def _watch_command_line() -> None:
    main = sys.modules.get("lmms_eval.__main__")
    if type(main) is ModuleType and not hasattr(main, "cli_evaluate_single"):
        main.__class__ = _CommandLine


def exit_on_error(evaluate: Callable[[argparse.Namespace], tuple]) -> Callable[[argparse.Namespace], tuple]:
    """Wrap lmms-eval's `cli_evaluate_single`: what it raises for one of our models ends the process, code 2 for bad input, else 1.

    Leaving through SystemExit passes lmms-eval's `except Exception`, and lets torchrun stop the other ranks at once.
    """

    @functools.wraps(evaluate)
    def cli_evaluate_single(args: argparse.Namespace) -> tuple:
        if args.model not in MODELS:
            return evaluate(args)
        if problem := _argument_problem(args):
            exit_with(problem, code=2)
        try:
            return evaluate(args)
        except Exception as error:  # nothing is swallowed: printed with its traceback, then the process ends
            from vlm_pruner_eval.errors import ConfigError

            if isinstance(error, ConfigError):
                exit_with(str(error), code=2)
            print(without_secrets(traceback.format_exc()), file=sys.stderr)
            exit_with(f"the evaluation of {args.model} failed: {type(error).__name__}: {error}", code=1)

    return cli_evaluate_single


def exit_with(sentence: str, *, code: int) -> NoReturn:
    """End the process with a sentence on stderr."""
    print(f"vlm_pruner_eval: {spelled_out(without_secrets(sentence))}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _argument_problem(args: argparse.Namespace) -> str | None:
    """What lmms-eval would only log: no task at all, and an output folder that it finds unwritable after hours of work."""
    if args.tasks is None:
        return "--tasks is missing, expected names of tasks, separated by commas; `--tasks list` prints them."
    if not args.output_path:
        return None
    path = Path(args.output_path).absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir():
        return f"--output_path {args.output_path}: {nearest} is a file, expected a folder."
    if not os.access(nearest, os.W_OK):
        return f"--output_path {args.output_path} can't be written: no permission in {nearest}; choose another folder."
    return None
