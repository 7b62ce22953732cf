from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sweep_standin import Behaviour, StandIn, make_config, task_manager, write_tasks

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.check import TOLERANCE, check, write_reference
from vlm_pruner_eval.sweep.identity import RESULTS_VERSION
from vlm_pruner_eval.sweep.runner import run_sweep

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Function (behaviour, changes of the configuration) -> results folder; the same one again for the same arguments."""
    tasks = task_manager(write_tasks(tmp_path_factory.mktemp("tasks")))
    made: dict[str, Path] = {}

    def run(behaviour: Behaviour | None = None, **changes: Any) -> Path:
        asked = repr((behaviour, changes))
        if asked in made:
            return made[asked]
        made[asked] = output = tmp_path_factory.mktemp("sweep")
        config = make_config(**{"methods": ["vlmpruner", "random"], "limit": 8} | changes)
        run_sweep(config, output, console=Console(file=io.StringIO()), load=lambda *args, **kwargs: StandIn(behaviour), task_manager=tasks)
        return output

    return run


@pytest.fixture(scope="module")
def reference(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reference(make(), tmp_path_factory.mktemp("reference") / "ci.json")


def changed(reference: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = json.loads(reference.read_text())
    change(content)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(content))
    return path


def test_the_same_sweep_passes_whatever_the_padding(make: Make, reference: Path) -> None:
    assert check(make(), reference) == []
    assert check(make(Behaviour(shift_padding=9)), reference) == []


def test_a_reference_is_small_and_one_line_a_task(reference: Path) -> None:
    content = json.loads(reference.read_text())
    assert set(content["runs"]) == {"unpruned", "vlmpruner-2of3", "random-2of3"}
    docs = content["runs"]["vlmpruner-2of3"]["tiny_mean"]
    assert list(docs) == [str(i) for i in range(8)]
    assert all(len(value) == 17 and value[8] == ":" for value in docs.values())
    assert content["tolerance"] == TOLERANCE
    assert reference.stat().st_size < 48 * 40 + 2200
    assert sum('"tiny_mean": {' in line for line in reference.read_text().splitlines()) == 3


def test_kept_sets_must_match_on_the_same_processor(make: Make, reference: Path) -> None:
    (problem,) = check(make(Behaviour(other_kept=1)), reference)  # as many tokens, other ones
    assert problem.startswith(
        "vlmpruner-2of3: 2 of 16 kept sets differ from the reference (at most 0 may, on the same processor and torch): tiny_mean 0"
    )


def test_a_handful_may_differ_on_another_processor(make: Make, reference: Path, tmp_path: Path) -> None:
    elsewhere = changed(reference, tmp_path, lambda content: content.update(processor="Abacus"))
    assert check(make(Behaviour(other_kept=1)), elsewhere) == []
    (problem,) = check(make(Behaviour(other_kept=2)), elsewhere)
    assert "4 of 16 kept sets differ from the reference (at most 2 may, on another processor or torch)" in problem


def test_answers_may_flip_only_as_often_as_stated(make: Make, reference: Path) -> None:
    assert check(make(Behaviour(flip=1)), reference) == []
    problems = check(make(Behaviour(flip=6)), reference)
    assert any("unpruned: 12 of 16 answers differ from the reference (at most 2 may" in problem for problem in problems)


def test_counts_must_match(make: Make, reference: Path, tmp_path: Path) -> None:
    counted = changed(reference, tmp_path, lambda content: content["measured"]["vlmpruner-2of3"].update(asked=13.0, kept=11.5))
    assert check(make(), counted) == [
        "vlmpruner-2of3: asked 12 visual tokens a prompt on average, the reference 13.",
        "vlmpruner-2of3: kept 12 visual tokens a prompt on average, the reference 11.5.",
    ]


def test_a_score_may_only_differ_where_an_answer_does(make: Make, reference: Path, tmp_path: Path) -> None:
    score = json.loads(reference.read_text())["measured"]["vlmpruner-2of3"]["scores"]["tiny_mean"]

    def rescore(content: dict[str, Any]) -> None:
        content["measured"]["vlmpruner-2of3"]["scores"]["tiny_mean"] = score - 0.05

    rescored = changed(reference, tmp_path, rescore)
    (problem,) = check(make(), rescored)
    assert problem.startswith(f"vlmpruner-2of3: tiny_mean scores {score}, the reference {score - 0.05}, though no answer differs")
    wider = changed(rescored, tmp_path, lambda content: content["tolerance"].update(score_at_equal_answers=0.06))
    assert check(make(), wider) == []
    # one answer less is right: the two that may differ account for the score
    assert check(make(Behaviour(flip=1)), reference) == []


def test_runs_and_documents_must_be_the_same(make: Make, reference: Path, tmp_path: Path) -> None:
    assert check(make(methods=["vlmpruner"]), reference) == ["random-2of3: is in the reference and not in the sweep."]
    problems = check(make(methods=["vlmpruner", "random", "blind"]), reference)
    assert problems == ["blind: is in the sweep and not in the reference."]
    fewer = changed(reference, tmp_path, lambda content: content["runs"]["random-2of3"]["tiny_mean"].pop("3"))
    assert check(make(), fewer) == ["random-2of3: 1 documents are on one side only; expected the same documents."]


def test_another_results_version_is_a_problem(make: Make, reference: Path, tmp_path: Path) -> None:
    older = changed(reference, tmp_path, lambda content: content.update(results_version=0))
    (problem,) = check(make(), older)
    assert f"the sweep has {RESULTS_VERSION}, the reference 0" in problem


def test_a_run_that_failed_or_did_not_happen_is_a_problem(make: Make, reference: Path, tmp_path: Path) -> None:
    assert check(make(Behaviour(fail={("vlmpruner", 1)})), reference) == ["vlmpruner-2of3: is failed, expected finished."]
    folder = Path(shutil.copytree(make(), tmp_path / "copy"))
    next(folder.glob("runs/random*/tiny_mean/record.json")).unlink()
    assert check(folder, reference) == ["random-2of3: is not run, expected finished."]


def test_another_configuration_cannot_be_compared(make: Make, reference: Path) -> None:
    with pytest.raises(ConfigError, match="limit: the sweep has 6, the reference 8"):
        check(make(limit=6), reference)


def test_a_reference_needs_a_complete_sweep_and_keeps_its_tolerance(make: Make, reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got unfinished runs \(vlmpruner-2of3 \(failed\)\), expected a complete sweep"):
        write_reference(make(Behaviour(fail={("vlmpruner", 1)})), tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()
    wider = changed(reference, tmp_path, lambda content: content["tolerance"].update(answers=5))
    assert json.loads(write_reference(make(), wider).read_text())["tolerance"]["answers"] == 5
