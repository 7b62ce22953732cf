"""lmms-eval's tasks of type multiple_choice and loglikelihood with our models, through its evaluator, a sweep, and its command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lmms_eval import evaluator
from lmms_eval.api import instance
from lmms_eval.api.instance import GenerationResult
from lmms_eval.tasks import TaskManager
from lmms_requests import fresh_model
from stored import answers, read_runs, scores

from vlm_pruner_eval import ConfigError
from vlm_pruner_eval.embedded import questions_path
from vlm_pruner_eval.errors import StoppedError
from vlm_pruner_eval.lmms import PrunedModel, plugin
from vlm_pruner_eval.lmms.scored_tasks import TOTAL, keep_pairs
from vlm_pruner_eval.store.answers import Answer
from vlm_pruner_eval.store.schema import RunRecord
from vlm_pruner_eval.sweep import records
from vlm_pruner_eval.sweep.runner import Outcome, run_sweep

N_DOCS = 40

UTILS = """
from vlm_pruner_eval.embedded.tasks.digitscenes_utils import doc_to_text, doc_to_visual, exist_docs


def gold(doc):
    return ["yes", "no"].index(doc["answer"])


def questions(doc):
    return [doc["question"], "is there a 0 ? is there a 1 ?"]


def score(doc, results):
    (yes, _), (no, _) = results
    return {"right": float(("yes" if yes < no else "no") == doc["answer"])}
"""

# the embedded questions, asked by likelihood; {rest} is what differs
TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
process_docs: !function utils.exist_docs
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
{rest}
"""
TASKS = {
    "exist_choice": "output_type: multiple_choice\ndoc_to_choice: ['yes', 'no']\ndoc_to_target: !function utils.gold\n"
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]",
    "exist_norm": "output_type: multiple_choice\ndoc_to_choice: ['yes', 'no']\ndoc_to_target: answer",
    "exist_own": "output_type: multiple_choice\ndoc_to_choice: ['yes', 'no']\ndoc_to_target: answer\n"
    "process_results: !function utils.score\nmetric_list: [{metric: right, aggregation: mean, higher_is_better: true}]",
    "exist_gold": "output_type: loglikelihood\ndoc_to_target: answer",
    "exist_questions": "output_type: multiple_choice\ndoc_to_text: !function utils.gold\ndoc_to_choice: !function utils.questions\n"
    "doc_to_target: answer\ntarget_delimiter: ''",
    "exist_mutual": "output_type: multiple_choice\ndoc_to_choice: ['yes', 'no']\ndoc_to_target: answer\n"
    "metric_list: [{metric: acc_mutual_info, aggregation: mean, higher_is_better: true}]",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "utils.py").write_text(UTILS)
    for name, rest in TASKS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=questions_path(), rest=rest))
    return folder


@pytest.fixture(scope="module")
def manager(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield TaskManager("ERROR", include_path=str(folder), include_defaults=False, model_name="vlmpruner_llava")


@pytest.fixture
def model() -> PrunedModel:
    return fresh_model()


def task_of(manager: TaskManager, name: str) -> Any:
    return manager.load_task_or_group([name], "chat")[name]


def requests_of(task: Any, doc_id: int = 0) -> list[Any]:
    task.build_all_requests(limit=doc_id + 1, rank=0, world_size=1)
    return [one for one in task.instances if one.doc_id == doc_id]


def evaluate(model: PrunedModel, manager: TaskManager, *tasks: str, limit: int = 6) -> dict[str, Any]:
    model.answers = []
    return evaluator.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, limit=limit, batch_size=1, log_samples=True, bootstrap_iters=0
    )


# ---- requests


def test_a_choice_is_a_continuation_of_one_chat(manager: TaskManager) -> None:
    task = task_of(manager, "exist_choice")
    yes, no = requests_of(task, 2)
    assert [(one.request_type, one.idx, one.args[1], one.args[3:]) for one in (yes, no)] == [
        ("loglikelihood", i, text, (2, "exist_choice", "test")) for i, text in enumerate((" yes", " no"))
    ]
    assert yes.args[2] == no.args[2]
    (message,) = yes.args[2](task.dataset["test"][2])
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert not yes.metadata[TOTAL]
    assert requests_of(task_of(manager, "exist_norm"))[0].metadata[TOTAL], "acc_norm divides by the length itself"


def test_a_gold_answer_is_one_request_with_its_delimiter(manager: TaskManager) -> None:
    task = task_of(manager, "exist_gold")
    (one,) = requests_of(task)
    assert one.args[1](task.dataset["test"][0]) == " " + task.dataset["test"][0]["answer"]


def test_choices_that_are_questions_have_chats_of_their_own(manager: TaskManager) -> None:
    task = task_of(manager, "exist_questions")
    document = task.dataset["test"][0]
    chats = [one.args[2](document)[0]["content"] for one in requests_of(task)]
    assert [chat[1]["text"] for chat in chats] == [document["question"], "is there a 0 ? is there a 1 ?"]
    assert [chat[0]["type"] for chat in chats] == ["image"] * 2
    assert [one.args[1] for one in requests_of(task)] == [document["answer"]] * 2


def test_other_models_tasks_are_left_alone(folder: Path) -> None:
    other = TaskManager("ERROR", include_path=str(folder), include_defaults=False, model_name="llava_hf")
    with pytest.raises(AssertionError, match="generation only"):
        requests_of(task_of(other, "exist_choice"))


def test_a_metric_that_wants_the_other_sign_is_refused(manager: TaskManager) -> None:
    with pytest.raises(ConfigError, match="exist_mutual: metric_list: got acc_mutual_info"):
        task_of(manager, "exist_mutual")


def test_pairs_reach_the_metrics_and_text_is_unwrapped_as_before() -> None:
    for unwrap in (instance.unwrap_generation_output, evaluator.unwrap_generation_output):
        assert unwrap((0.5, True)) == ((0.5, True), None)
        assert unwrap([0.5, True]) == ([0.5, True], None), "as lmms-eval's cache of answers gives it back"
        assert unwrap(GenerationResult("text")) == ("text", None)
        assert unwrap(("text", {"input_tokens": 3}))[0] == "text"
        assert unwrap((0.5, 1)) == ("(0.5, 1)", None)
    before = instance.unwrap_generation_output
    keep_pairs()
    plugin.manifests()
    assert instance.unwrap_generation_output is before


# ---- scores


def test_metrics_are_those_of_the_values(model: PrunedModel, manager: TaskManager) -> None:
    results = evaluate(model, manager, "exist_choice", "exist_norm", "exist_own", "exist_gold", "exist_questions")["results"]
    assert [answer.error for answer in model.answers] == [None] * len(model.answers)
    found = {(answer.task, answer.doc_id, answer.choice): answer for answer in model.answers}
    gold = [model.task_dict["exist_choice"]["test"][i]["answer"] for i in range(6)]
    lengths = {"mean": lambda answer: answer.n_new_tokens, "total": lambda answer: 1, "norm": lambda answer: len(answer.answer) - 1}
    rights = {}
    for name, length in lengths.items():
        pairs = [[found["exist_norm", i, choice] for choice in (0, 1)] for i in range(6)]
        chosen = [max(pair, key=lambda answer, length=length: answer.loglikelihood / length(answer)) for pair in pairs]
        rights[name] = sum(answer.answer == f" {right}" for answer, right in zip(chosen, gold, strict=True)) / 6
    assert results["exist_choice"]["acc,none"] == results["exist_own"]["right,none"] == pytest.approx(rights["mean"])
    assert results["exist_norm"]["acc,none"] == pytest.approx(rights["total"])
    assert results["exist_norm"]["acc_norm,none"] == pytest.approx(rights["norm"])
    loglikelihoods = [found["exist_gold", i, 0].loglikelihood for i in range(6)]
    assert results["exist_gold"]["perplexity,none"] == pytest.approx(math.exp(-sum(loglikelihoods) / 6))
    assert results["exist_gold"]["acc,none"] == 0
    assert found["exist_gold", 0, 0].loglikelihood == found["exist_choice", 0, ("yes", "no").index(gold[0])].loglikelihood
    assert 0 <= results["exist_questions"]["acc,none"] <= 1
    assert found["exist_questions", 0, 0].n_prompt_tokens != found["exist_questions", 0, 1].n_prompt_tokens


def sweep(folder: Path, manager: TaskManager, **changes: Any) -> tuple[Outcome, list[RunRecord]]:
    raw = {
        "name": "scored",
        "model": {"id": "vlmpruner_llava", "pretrained": "minivlm", "batch_size": 4, "visual_tokens": 576},
        "tasks": ["exist_choice"],
        "pruning_rates": ["8/9"],
        "methods": ["vlmpruner", "blind"],
        "limit": N_DOCS,
    }
    outcome = run_sweep(raw | changes, folder, task_manager=manager)
    return outcome, list(read_runs(folder).values())


@pytest.mark.slow
def test_a_sweep_scores_minivlm_by_likelihood(manager: TaskManager, tmp_path: Path) -> None:
    outcome, (plain, pruned, blind) = sweep(tmp_path, manager)
    assert outcome == Outcome(runs=3, skipped=0, failed=0)
    accuracy = [record.scores["exist_choice"].main.value for record in (plain, pruned, blind)]
    assert accuracy[0] > 0.85
    assert abs(accuracy[2] - 0.5) < 0.2
    assert accuracy[0] - accuracy[2] > 0.3
    assert [record.tokens.kept.mean for record in (plain, pruned, blind)] == [576, 64, 0]
    for record in (plain, pruned, blind):
        assert record.scores["exist_choice"].main.n == record.tokens.samples_with_images == record.times.prefill_ms.n
        assert (record.n_answers, record.tokens.samples_with_images) == (2 * N_DOCS, N_DOCS)
    found = answers(tmp_path, "vlmpruner-8of9")
    assert [(answer.doc_id, answer.choice, answer.answer) for answer in found] == [
        (i, choice, text) for i in range(N_DOCS) for choice, text in enumerate((" yes", " no"))
    ]
    for yes, no, score in zip(found[::2], found[1::2], scores(tmp_path, "vlmpruner-8of9"), strict=True):
        assert yes.record == no.record
        mean = [answer.loglikelihood / answer.n_new_tokens for answer in (yes, no)]
        assert score.answer == (0 if mean[0] > mean[1] else 1)
        likelier = 0 if yes.loglikelihood > no.loglikelihood else 1
        assert score.items == {"acc": float(likelier == score.target)}


def test_choices_that_all_fail_unpruned_stop_the_sweep(manager: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_pruner_eval.lmms import model as lmms_model

    def broken(*args: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(lmms_model, "score", broken)
    sentence = r"4 of 4 samples failed \(first: exist_choice, document 0: RuntimeError: the device is gone"
    with pytest.raises(StoppedError, match=sentence):
        sweep(tmp_path, manager, methods=["blind"], limit=2)


def test_missing_and_double_choices_are_noticed() -> None:
    def sample(doc_id: int, choice: int | None) -> Answer:
        return Answer("t", "test", doc_id, "", choice=choice)

    logged = {"t": [{"doc_id": 0, "resps": [[1], [1]]}, {"doc_id": 1, "resps": [[1], [1]]}]}
    whole = [sample(i, choice) for i in (0, 1) for choice in (0, 1)]
    assert records.missing_answers(whole, logged) == []
    for wrong in (whole[:3], [*whole, sample(1, 1)], [*whole[:3], sample(1, 0)], whole[:2]):
        (problem,) = records.missing_answers(wrong, logged)
        assert "1 of 2 documents" in problem
        assert "document 1" in problem


# ---- the command line


@pytest.mark.slow
@pytest.mark.cli
def test_the_command_line_scores_choices_and_reads_them_from_its_cache(folder: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("lmms-eval")), "--model", "vlmpruner_llava", "--include_path", str(folder)]
    command += ["--model_args", "pretrained=minivlm,method=vlmpruner,pruning_rate=8/9", "--tasks", "exist_choice,exist_gold"]
    command += ["--limit", "4", "--log_samples", "--use_cache", str(tmp_path / "cache")]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    found = []
    for name in ("first", "again"):
        done = subprocess.run(
            [*command, "--output_path", str(tmp_path / name)],
            env=dict(os.environ) | quiet, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        (path,) = (tmp_path / name).rglob("*_results.json")
        results = json.loads(path.read_text())["results"]
        found.append((results["exist_choice"]["acc,none"], results["exist_gold"]["perplexity,none"]))
    assert found[0] == found[1]
    assert found[0][0] in (0, 0.25, 0.5, 0.75, 1)
    assert found[0][1] > 1
    assert "served from cache" in done.stderr + done.stdout
