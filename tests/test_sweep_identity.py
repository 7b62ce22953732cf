"""A run survives what changes no answer of it, and is answered anew after its method, its task or the meaning of results changed."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sweep_standin import RIGHT_PERCENT, Behaviour, StandIn, make_config, task_manager, write_tasks

import vlm_pruner_eval
from vlm_pruner_eval import ConfigError, selftest
from vlm_pruner_eval.errors import StoppedError
from vlm_pruner_eval.lmms.prompts import Request
from vlm_pruner_eval.lmms.run_context import RunContext
from vlm_pruner_eval.store.answers import Answer, BatchSize
from vlm_pruner_eval.store.folder import Store
from vlm_pruner_eval.sweep import identity
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.grid import expand, unit_folders
from vlm_pruner_eval.sweep.metrics import scores
from vlm_pruner_eval.sweep.preview import preview
from vlm_pruner_eval.sweep.runner import Outcome, run_sweep
from vlm_pruner_eval.sweep.session import Session
from vlm_pruner_eval.sweep.units import units_of

METHOD = '''
from dataclasses import dataclass
from typing import ClassVar

from my_helpers import score
from vlm_pruner_eval import Pruner


@dataclass(frozen=True, kw_only=True)
class Mine(Pruner):
    """Keep by a score."""

    name: ClassVar[str] = "mine"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    def choose(self, tokens, keep):
        return score(tokens).topk(keep).indices
'''
HELPERS = "def score(tokens):\n    return tokens.keys.norm(dim=-1).sum(1)\n"
ROWS = {"methods": ["uniform", "my_methods:Mine"], "pruning_rates": ["2/3"]}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the Python path with a method and a module that it uses."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "my_methods.py").write_text(METHOD)
    (folder / "my_helpers.py").write_text(HELPERS)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(RIGHT_PERCENT, "my_methods:Mine", 70)
    yield folder
    forget()


def forget() -> None:
    """Another process imports the files as they are then."""
    for name in ("my_methods", "my_helpers"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


class Sweep:
    """Runs sweeps with a stand-in model over tasks in a folder of the user's own."""

    def __init__(self, root: Path):
        self.output, self.tasks = root / "out", write_tasks(root)
        self.log = ""

    def config(self, **changes: Any) -> SweepConfig:
        return make_config(**{**ROWS, "tasks": ["tiny_mean"], "include_path": str(self.tasks), **changes})

    def __call__(self, behaviour: Behaviour | None = None, rerun: str | None = None, **changes: Any) -> Outcome:
        console = Console(file=io.StringIO(), record=True, width=500)
        self.model = StandIn(behaviour)
        try:
            return run_sweep(
                self.config(**changes),
                self.output,
                console=console,
                load=lambda *_, **__: self.model,
                task_manager=task_manager(self.tasks),
                rerun=rerun,
            )
        finally:
            self.log = console.export_text()


@pytest.fixture
def sweep(tmp_path: Path, own: Path) -> Sweep:
    found = Sweep(tmp_path)
    assert found() == Outcome(runs=3, skipped=0, failed=0)
    return found


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    forget()


# ---- what loses nothing
def test_finished_runs_survive_an_upgrade_that_changes_no_answer(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """No source file of this package is part of an id: another version, in another folder, finds the runs."""
    monkeypatch.setattr(vlm_pruner_eval, "__version__", "9.9")
    monkeypatch.setattr(vlm_pruner_eval, "__file__", "/elsewhere/vlm_pruner_eval/__init__.py")
    assert sweep() == Outcome(runs=3, skipped=3, failed=0)
    assert sweep.model.evaluated == []
    config = json.loads(next(sweep.output.rglob("run.json")).read_text())["config"]
    assert "code" not in config and config["results_version"] == identity.RESULTS_VERSION


def test_methods_and_tasks_of_this_package_have_no_source_in_the_id() -> None:
    for run in expand(make_config(tasks=["digitscenes_read", "pope_splits"], methods=["vlmpruner", "fastv"])):
        assert run.config["sources"] == {}
    config = make_config(tasks=["digitscenes_read", "pope_splits"])
    assert unit_folders(config) == {task: task for task in config.tasks}


def test_the_regression_reference_is_of_this_results_version() -> None:
    """Whoever writes the reference again, since answers changed, raises the version; whoever raises it writes the reference again."""
    reference = json.loads((Path(__file__).parent.parent / "results" / "reference" / "ci.json").read_text())
    assert reference["results_version"] == identity.RESULTS_VERSION


# ---- what is answered anew
@pytest.mark.parametrize("file", ["my_methods.py", "my_helpers.py"])
def test_an_edited_method_is_answered_anew_and_said_before(sweep: Sweep, own: Path, file: str) -> None:
    edit(
        own / file,
        "topk(keep)" if file == "my_methods.py" else ".sum(1)",
        "topk(keep, largest=False)" if file == "my_methods.py" else ".amax(1)",
    )
    assert sweep() == Outcome(runs=3, skipped=2, failed=0)
    assert sweep.model.evaluated == ["my_methods:Mine"]
    assert "the source of my_methods:Mine was edited since" in " ".join(sweep.log.split()).replace("The", "the")
    assert sweep.log.index("edited since") < sweep.log.index("[")  # before the first line of progress
    assert sweep() == Outcome(runs=3, skipped=3, failed=0) and "edited" not in sweep.log


def test_an_edited_task_is_answered_anew_and_said(sweep: Sweep) -> None:
    (yaml,) = [file for file in sweep.tasks.rglob("*.yaml") if file.stem == "tiny_mean"]
    yaml.write_text(yaml.read_text() + "\n# another prompt\n")
    assert sweep() == Outcome(runs=3, skipped=0, failed=0)
    assert "Finished before with other files of tiny_mean, which were edited since: unpruned" in sweep.log


def test_a_rise_of_the_results_version_is_said(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "RESULTS_VERSION", identity.RESULTS_VERSION + 1)
    assert sweep() == Outcome(runs=3, skipped=0, failed=0)
    assert f"esults version: {identity.RESULTS_VERSION - 1} there, {identity.RESULTS_VERSION} now" in sweep.log


def test_records_of_an_older_edition_are_not_used_and_do_no_harm(sweep: Sweep) -> None:
    """Their files have another form, under the same names or others."""
    for path in sweep.output.rglob("run.json"):
        path.write_text(json.dumps({"run_id": path.parent.name, "status": "finished", "config": {"code": "0.1.0+0123456789ab"}}))
    for path in sweep.output.rglob("record.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    assert preview(sweep.config(), sweep.output).notices == []
    assert sweep() == Outcome(runs=3, skipped=0, failed=0)
    assert sweep.model.answered == [], "the answers are in their logs, whatever became of the records"
    assert sweep() == Outcome(runs=3, skipped=3, failed=0)


def test_rerun_answers_one_method_again(sweep: Sweep) -> None:
    assert sweep(rerun="uniform") == Outcome(runs=3, skipped=2, failed=0)
    assert sweep.model.evaluated == ["uniform"]
    assert sweep() == Outcome(runs=3, skipped=3, failed=0)


def test_rerun_of_a_method_that_is_not_there(sweep: Sweep) -> None:
    with pytest.raises(ConfigError, match=r"--rerun: got 'unifrom'.*did you mean 'uniform'"):
        sweep(rerun="unifrom")


# ---- whose folder it is
def test_a_sweep_of_another_name_is_refused_and_nothing_is_overwritten(sweep: Sweep) -> None:
    before = (sweep.output / "sweep.json").read_bytes()
    with pytest.raises(ConfigError, match="holds the sweep 'tiny', got 'other'"):
        sweep(name="other")
    with pytest.raises(ConfigError, match="holds the sweep 'tiny', got 'other'"):
        preview(sweep.config(name="other"), sweep.output)
    assert (sweep.output / "sweep.json").read_bytes() == before


# ---- what every run would meet
class Unanswered(StandIn):
    """Fails before its first answer."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def generate_until(self, requests: Any) -> Any:
        raise self.error


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'filelock._api'"), OSError("the data set is gone")])
def test_a_failure_that_every_run_would_meet_stops_the_sweep(tmp_path: Path, own: Path, error: Exception) -> None:
    sweep = Sweep(tmp_path)
    with pytest.raises(StoppedError) as stopped:
        run_sweep(
            sweep.config(),
            sweep.output,
            console=Console(file=io.StringIO()),
            load=lambda *_, **__: Unanswered(error),
            task_manager=task_manager(sweep.tasks),
        )
    assert str(error) in str(stopped.value) and "every run would fail" in str(stopped.value)
    assert str(error) in Store(sweep.output).stopped.read_text()
    assert not list(sweep.output.rglob("record.json")), "nothing is recorded as failed"
    assert sweep() == Outcome(runs=3, skipped=0, failed=0), "the same command goes on"
    assert not Store(sweep.output).stopped.exists()


def test_a_package_that_scoring_lacks_loses_no_answer(tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric that is imported when all is answered, as after days of a 7B model."""
    sweep = Sweep(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(StoppedError, match="can't be imported"):
        patched.setattr(scores, "score_task", lambda *_: importlib.import_module("no_such_metric"))
        sweep()
    answered = len(sweep.model.answered)
    assert answered == 12
    assert sweep() == Outcome(runs=3, skipped=0, failed=0)
    assert len(sweep.model.answered) == 2 * answered, "the unpruned run is answered out of its log"


def test_samples_that_failed_are_not_met_again_in_runs_that_were_answered_together(tmp_path: Path, own: Path) -> None:
    """A common cause: logs without a failed sample stay, those with one begin anew."""
    sweep = Sweep(tmp_path)
    config, store = sweep.config(), Store(sweep.output)
    unpruned, broken, whole = group = units_of(config, expand(config))
    session = Session(config, store, StandIn(), None, {}, RunContext(), sources=dict.fromkeys(unit.run.run_id for unit in group))
    for unit, error in ((unpruned, "PruningError: no"), (broken, "PruningError: no"), (whole, None)):
        with session.log(unit) as log:
            asked = Request(0, "tiny_mean", "test", 0, None, {}, 0, False)
            log.begin("generate_until", [asked], BatchSize(1))
            log.append("generate_until", [(asked, Answer("tiny_mean", "test", 0, "", error))], 0.1)
    assert "every run would fail" in str(session._stopped(unpruned, session.log(unpruned), "met it", "PruningError: no", None))
    assert [bool(list(unit.stored(store).answers())) for unit in group] == [False, False, True]


def test_a_sweep_begins_with_the_self_test(tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise StoppedError("self-test of hook failed")

    monkeypatch.setattr(selftest, "run", fail)
    config = make_config(**ROWS, tasks=["digitscenes_read"])
    with pytest.raises(StoppedError, match="self-test of hook failed"):
        run_sweep(config, tmp_path / "out", console=Console(file=io.StringIO()))
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_an_unpruned_model_whose_samples_all_fail_stops_the_sweep(tmp_path: Path, own: Path) -> None:
    sweep = Sweep(tmp_path)
    with pytest.raises(StoppedError, match="unpruned tiny_mean is the unpruned model, and all of its samples failed"):
        sweep(Behaviour(fail={("none", number) for number in range(100)}))
    assert not list(sweep.output.rglob("record.json"))
