"""The lmms-eval side of DIGITSCENES: tasks load in the stock TaskManager, and scores are right on cases made by hand."""

from __future__ import annotations

import math

import pytest

from vlm_pruner_eval.embedded import GROUP, TASKS, tasks_path
from vlm_pruner_eval.embedded.tasks import digitscenes_utils as utils

METRICS = {"exist": {"accuracy", "f1"}, "pairs": {"accuracy", "both_right"}}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict:
    import lmms_eval.tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        manager = lmms_eval.tasks.TaskManager(include_path=str(tasks_path()), include_defaults=False, model_name="vlmpruner_llava")
        own = {name for name in manager.all_tasks if name.startswith(GROUP)}  # the paper's variants of other tasks are there as well
        assert own == {GROUP, *(f"{GROUP}_{task}" for task in TASKS)}
        loaded = lmms_eval.tasks.get_task_dict([GROUP], manager, task_type="chat")
    (members,) = loaded.values()
    return members


def test_the_group_holds_the_six_tasks(tasks):
    assert list(tasks) == [f"{GROUP}_{task}" for task in TASKS]


@pytest.mark.parametrize("name", TASKS)
def test_every_question_gives_a_prompt_and_a_picture(tasks, name):
    task = tasks[f"{GROUP}_{name}"]
    docs = task.test_docs()
    assert len(docs) >= 300
    assert set(docs["task"]) == {name}
    for doc in docs:
        (message,) = task.doc_to_messages(doc)
        picture, text = message["content"]
        assert text == {"type": "text", "text": doc["question"]}
        assert (picture["type"], picture["url"].size, picture["url"].mode) == ("image", (336, 336), "RGB")


@pytest.mark.parametrize("name", TASKS)
def test_settings_and_metrics(tasks, name):
    task = tasks[f"{GROUP}_{name}"]
    settings = task.config.generation_kwargs
    assert (settings["max_new_tokens"], settings["temperature"], settings["do_sample"]) == (8, 0, False)
    metrics = METRICS.get(name, {"exact_match"})
    assert set(task.aggregation()) == metrics
    assert all(task.higher_is_better().values())
    doc = task.eval_docs_no_media[0]
    assert "image" not in doc
    right, wrong = task.process_results(doc, [doc["answer"]]), task.process_results(doc, ["<unk>"])
    first = "accuracy" if name in METRICS else "exact_match"
    assert set(right) == metrics
    assert (right[first], wrong[first]) == (1.0, 0.0)


@pytest.mark.parametrize("name", TASKS)
def test_perfect_answers_score_one_and_wrong_ones_zero(tasks, name):
    task = tasks[f"{GROUP}_{name}"]
    docs = list(task.eval_docs_no_media)
    for metric, aggregate in task.aggregation().items():
        assert aggregate([task.process_results(doc, [doc["answer"]])[metric] for doc in docs]) == 1.0
        assert aggregate([task.process_results(doc, ["nothing"])[metric] for doc in docs]) == 0.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("4 0 7", "407"), (" 407.\n", "407"), ("Red", "red"), ("top  left", "top left"), ("7 is red", "7 is red"), ("", ""), ("'9'", "9")],
)
def test_normalise(answer, expected):
    assert utils.normalise(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("yes", "yes"), ("Yes, there is.", "yes"), (" No.", "no"), ("none", None), ("not", None), ("", None), ("7", None)],
)
def test_yes_or_no(answer, expected):
    assert utils.yes_or_no(answer) == expected


def test_exact_match_is_exact():
    doc = {"answer": "407"}
    assert utils.process_exact_match(doc, ["4 0 7"]) == {"exact_match": 1.0}
    assert utils.process_exact_match(doc, ["4 0 7 7"]) == {"exact_match": 0.0}
    assert utils.process_exact_match(doc, ["40"]) == {"exact_match": 0.0}


def f1_of(*cases: tuple[str, str]) -> float:
    return utils.f1([utils.process_yes_no({"answer": answer}, [predicted])["f1"] for predicted, answer in cases])


def test_f1():
    assert f1_of(("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")) == 0.5
    assert f1_of(("yes", "yes"), ("yes", "yes"), ("yes", "no")) == pytest.approx(0.8)
    assert f1_of(("no", "no")) == 0.0  # 0 / 0: nothing is there and nothing was called
    assert f1_of(("red", "yes"), ("yes", "yes")) == pytest.approx(2 / 3)  # neither yes nor no misses a yes
    assert f1_of() == 0.0


def both_right_of(*cases: tuple[str, str, str]) -> float:
    return utils.both_right([utils.process_pairs({"pair_id": pair, "answer": a}, [p])["both_right"] for pair, p, a in cases])


def test_both_right():
    assert both_right_of(("a", "yes", "yes"), ("a", "no", "no"), ("b", "yes", "yes"), ("b", "yes", "no")) == 0.5
    assert both_right_of(("a", "yes", "yes"), ("b", "yes", "no"), ("a", "no", "no"), ("b", "no", "yes")) == 0.5  # not adjacent


def test_both_right_leaves_out_half_pairs_and_says_so(caplog):
    assert both_right_of(("a", "yes", "yes"), ("a", "no", "no"), ("b", "no", "yes")) == 1.0
    assert "1 of 2 pairs lack a question" in caplog.text
    assert math.isnan(both_right_of(("a", "yes", "yes")))


def test_prompts_are_added_only_when_a_task_file_names_them():
    doc = {"question": "is there a 7 ?"}
    assert utils.doc_to_text(doc) == utils.doc_to_text(doc, {"pre_prompt": "", "post_prompt": ""}) == "is there a 7 ?"
    assert utils.doc_to_text(doc, {"pre_prompt": "Look: ", "post_prompt": "\nOne word."}) == "Look: is there a 7 ?\nOne word."
