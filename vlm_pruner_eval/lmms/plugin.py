"""Entry point of lmms-eval's group `lmms_eval.models`: models, packaged tasks, prompts, exit codes.

lmms-eval 0.7.3 has an entry point for models only, so the rest is done by wrapping a few of its functions. Every wrapper
leaves runs of models that are not ours as they are, and wrapping twice is the same as wrapping once.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from vlm_pruner_eval.errors import ConfigError, PruningError, closest
from vlm_pruner_eval.redact import of_error, short, spelled_out, without_secrets
from vlm_pruner_eval.vlms import by_model_id

if TYPE_CHECKING:
    import argparse

    from lmms_eval.models.registry_v2 import ModelManifest, ModelRegistryV2

# The classes behind our model ids, by path: naming them imports nothing.
MODELS = {model_id: f"vlm_pruner_eval.lmms.families.VlmPruner{type(family).__name__}" for model_id, family in by_model_id().items()}

# Tasks choose their prompts by the name given to --model, so each of our ids asks under the name of its stock wrapper.
STOCK_PROMPTS = {model_id: family.spec.stock_prompt for model_id, family in by_model_id().items()}

_GROUP = "lmms_eval.models"  # of entry points
_PREFIX = "vlmpruner"  # of every id, and of those that are meant to be one
_LISTINGS = ("list", "list_groups", "list_tags", "list_subtasks")  # --tasks that print names and end
_WRAPPED = "_vlm_pruner_eval_wrapped"
_OURS = "_vlm_pruner_eval_asks"  # of a task index: its tasks are for one of our models


def manifests() -> list[ModelManifest]:
    """Register everything with lmms-eval; returns the manifests of our models. Imports neither torch nor transformers."""
    from lmms_eval import models
    from lmms_eval.models.registry_v2 import ModelManifest

    from vlm_pruner_eval.lmms import scored_tasks

    models.AVAILABLE_CHAT_TEMPLATE_MODELS.update(MODELS)  # what `lmms-eval models` prints
    _refuse_early(sys.argv)
    _wrap_task_manager()
    _wrap_registry()
    scored_tasks.keep_pairs()
    _watch_command_line()
    return [ModelManifest(model_id=model_id, chat_class_path=path) for model_id, path in MODELS.items()]


def prompt_name(model: object) -> object:
    """The name under which tasks look up prompts, for one of our ids or loaded models; anything else as it is."""
    model_id = getattr(model, "model_id", model)
    return STOCK_PROMPTS.get(model_id, model) if isinstance(model_id, str) else model


def task_folders() -> tuple[Path, ...]:
    """Return the folders with task files of this package.

    Raises
    ------
    ConfigError
        The installation is incomplete.
    """
    from vlm_pruner_eval.embedded import tasks_path

    return (tasks_path(), Path(__file__).parent / "tasks")


def packaged_tasks() -> list[str]:
    """Return the names of all tasks and groups of this package: a file of a name in one of its folders is a task of that name."""
    return sorted(file.stem for folder in task_folders() for file in folder.glob("*.yaml") if not file.stem.startswith("_"))


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
        paths = [] if include_path is None else [include_path] if isinstance(include_path, str) else list(include_path)
        return initialize(self, [*paths, *map(str, task_folders())], include_defaults)

    @functools.wraps(load)
    def load_task_or_group(self: TaskManager, *args: object, **kwargs: object) -> dict:
        from vlm_pruner_eval.lmms import scored_tasks

        loaded = load(self, *args, **kwargs)
        if getattr(self, _OURS, False):
            scored_tasks.offer(loaded)
        return loaded

    TaskManager.__init__, TaskManager.initialize_tasks, TaskManager.load_task_or_group = __init__, initialize_tasks, load_task_or_group
    setattr(TaskManager, _WRAPPED, True)


# ---- ids that are meant to be ours and are not: lmms-eval lists 142 names, and its command line exits with 0


def unknown_id(name: object, known: Sequence[str] = ()) -> str | None:
    """Return a sentence about a model id that is nearly one of ours; None for one of ours, and for everything else.

    Parameters
    ----------
    name
        What was given to --model.
    known
        Ids that other packages have registered; ours need not be among them.
    """
    if not isinstance(name, str) or name in MODELS or name in known:
        return None
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    ours = {re.sub("_", "", model_id): model_id for model_id in MODELS}
    near = difflib.get_close_matches(plain, ours, n=1, cutoff=0.75)
    if not near and not plain.startswith(_PREFIX):
        return None
    hint = f"did you mean {ours[near[0]]!r}? Known: {', '.join(sorted(MODELS))}." if near else closest(name, MODELS)
    return f"model: got {short(name)}, which is unknown; {hint}"


def _refuse_early(argv: Sequence[str]) -> None:
    """End a start of lmms-eval's command with an unknown id, before it imports the rest; other packages may have ids like ours."""
    if not _is_command_line() or len(entry_points(group=_GROUP)) > 1 or os.environ.get("LMMS_EVAL_PLUGINS"):
        return
    given = [after for option, after in itertools.pairwise(argv) if option == "--model"]
    given += [option.partition("=")[2] for option in argv if option.startswith("--model=")]
    for name in given:
        if problem := unknown_id(name):
            exit_with(problem, code=2)


def _is_command_line() -> bool:
    """Return True while lmms-eval's command is importing its modules."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    is_module = program.name == "__main__.py" and program.parent.name == "lmms_eval"
    return (program.stem == "lmms-eval" or is_module) and "lmms_eval.__main__" in sys.modules


def _wrap_registry() -> None:
    """Let the look-up of models refuse ids that are nearly ours with a ConfigError."""
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    if getattr(ModelRegistryV2, _WRAPPED, False):
        return
    ModelRegistryV2.resolve = _refusing(ModelRegistryV2.resolve)
    ModelRegistryV2.get_manifest = _refusing(ModelRegistryV2.get_manifest)
    setattr(ModelRegistryV2, _WRAPPED, True)


def _refusing(look_up: Callable) -> Callable:
    @functools.wraps(look_up)
    def looked_up(self: ModelRegistryV2, model_name: str, *args: object, **kwargs: object) -> object:
        if problem := unknown_id(model_name, self.list_model_names()):
            raise ConfigError(problem)
        return look_up(self, model_name, *args, **kwargs)

    return looked_up


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
        is_ours = args.model in MODELS
        if is_ours and (problem := _argument_problem(args)):
            exit_with(problem, code=2)
        try:
            return evaluate(args)
        except ConfigError as error:  # of ours, though the id may be that of another package that builds on this one
            exit_with("\n".join(error.problems), code=2)
        except PruningError as error:
            exit_with(str(error), code=1)
        except SystemExit as end:
            if is_ours and not end.code and args.tasks not in _LISTINGS:  # some tasks leave so when their data are not there
                exit_with(f"the evaluation of {args.model} ended without a result; the reason stands above.", code=1)
            raise
        except Exception as error:  # nothing is swallowed: printed with its traceback, then the process ends
            if not is_ours:
                raise
            print(without_secrets(traceback.format_exc()), file=sys.stderr)
            exit_with(f"the evaluation of {args.model} failed: {of_error(error)}", code=1)

    return cli_evaluate_single


def exit_with(sentence: str, *, code: int) -> NoReturn:
    """End the process, which is a command's, with a sentence on stderr, or one a line."""
    for line in sentence.splitlines():
        print(f"vlm_pruner_eval: {spelled_out(without_secrets(line))}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _argument_problem(args: argparse.Namespace) -> str | None:
    """Sentence about what lmms-eval would only log: no task, or an output folder that can't be written; None if all is well."""
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
