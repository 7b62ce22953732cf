"""The packaged variants of stock tasks: what differs from lmms-eval's own, prompts of every model id, and scores counted by hand."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmms_eval.tasks
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value
from lmms_eval import models  # noqa: F401  # loads the plugin
from lmms_eval.api import task as lmms_task
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from PIL import Image as PILImage
from rich.console import Console
from stored import read_runs
from sweep_standin import StandIn, make_config

from vlm_pruner_eval.lmms import plugin
from vlm_pruner_eval.lmms.tasks import utils
from vlm_pruner_eval.sweep.runner import run_sweep

OURS = Path(plugin.__file__).parent / "tasks"
STOCK = Path(lmms_eval.tasks.__file__).parent
PICTURE = PILImage.new("RGB", (8, 6), (200, 30, 30))
WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

# our task: the stock file, the keys in which the two differ, and those that only the stock file has
VARIANTS = {
    "textvqa_val_ocr": ("textvqa/textvqa_val.yaml", {"task", "metric_list", "lmms_eval_specific_kwargs", "metadata"}),
    "ok_vqa_val2014_plain": ("ok_vqa/ok_vqa_val2014.yaml", {"task", "metric_list", "lmms_eval_specific_kwargs", "metadata"}),
    "mme_total": ("mme/mme.yaml", {"task", "metric_list", "process_results", "doc_to_text", "lmms_eval_specific_kwargs", "metadata"}),
    "pope_splits": ("pope/pope.yaml", {"task", "metric_list", "process_results", "lmms_eval_specific_kwargs", "metadata"}),
    "pope_splits_llava": ("pope/pope.yaml", {"task", "metric_list", "process_results", "lmms_eval_specific_kwargs", "metadata"}),
    "ocrbench_short": ("ocrbench/ocrbench.yaml", {"task", "tag", "metric_list", "lmms_eval_specific_kwargs", "metadata"}),
    "mmbench_en_dev_llava": (
        "mmbench/mmbench_en_dev_static.yaml",
        {"task", "metric_list", "doc_to_text", "model_specific_generation_kwargs", "metadata"},
    ),
    "seedbench_image": (
        "seedbench/seedbench.yaml",
        {"task", "metric_list", "process_results", "process_docs", "generation_kwargs", "metadata"},
    ),
}

# Rows in the columns of the published data sets: what each is asked for, and scored, by hand below.
TEXTVQA = {
    "image_id": ["1", "2"],
    "question_id": [1, 2],
    "question": ["what is the brand of this phone?", "what time is it?"],
    "image": [PICTURE, PICTURE],
    "answers": [["nokia"] * 8 + ["toshiba"] * 2, ["10:10"] * 10],
    "ocr_tokens": [["NOKIA", "10:15"], []],
}
OK_VQA = {
    "question_id": ["11"],
    "image": [PICTURE],
    "question": ["What sport can you use this for?"],
    "answers": [["race"] * 8 + ["motocross"] * 2],
}
_SUBJECT = " Please answer yes or no."
MME = {
    "question_id": ["existence/1.png"] * 2 + ["existence/2.png"] * 2 + ["code_reasoning/3.png"] * 2,
    "image": [PICTURE] * 6,
    "question": [f"Is there a {name} in this image?{_SUBJECT}" for name in ("dog", "cat", "bus", "car", "loop", "list")],
    "answer": ["Yes", "No", "Yes", "No", "Yes", "No"],
    "category": ["existence"] * 4 + ["code_reasoning"] * 2,
}
POPE = {
    "id": [str(i) for i in range(9)],
    "question_id": ["1", "2", "3"] * 3,
    "question": ["Is there a snowboard in the image?"] * 9,
    "answer": ["yes", "yes", "no"] * 3,
    "image_source": ["COCO_val2014_000000310196"] * 9,
    "image": [PICTURE] * 9,
    "category": ["adversarial"] * 3 + ["popular"] * 3 + ["random"] * 3,
}
SEED = {
    "question_id": ["101669", "v1", "101670"],
    "question": ["How many towels are in the image?", "What happens?", "Where is the dog?"],
    "image": [[PICTURE], [PICTURE] * 2, [PICTURE]],
    "choice_a": ["One", "a", "left"],
    "choice_b": ["Two", "b", "right"],
    "choice_c": ["Three", "c", "above"],
    "choice_d": ["Four", "d", "below"],
    "answer": ["A", "B", "D"],
    "data_type": ["image", "video", "image"],
}
OCRBENCH = {
    "dataset": ["IIIT5K", "HME100k"],
    "question": ["what is written in the image?", "Please write out the expression."],
    "question_type": ["Regular Text Recognition", "Handwritten Mathematical Expression Recognition"],
    "answers": [["CENTRE"], ["x ^ 2"]],
    "image": [PICTURE] * 2,
}
# two questions of two turns each: the options of the second turn are rotated, and both must be right
MMBENCH = {
    "index": [241, 1000241, 242, 1000242],
    "question": ["What is it?"] * 2 + ["Which one?"] * 2,
    "hint": ["Read this.\nThen answer."] * 2 + ["nan"] * 2,
    "answer": ["A", "B", "B", "A"],
    "A": ["a cup", "a dog", "red", "blue"],
    "B": ["a dog", "a cup", "blue", "red"],
    "C": ["a car", "a car", "nan", "nan"],
    "D": ["nan", "nan", "nan", "nan"],
    "category": ["ocr"] * 4,
    "image": [PICTURE] * 4,
    "source": ["s"] * 4,
    "L2-category": ["coarse_perception"] * 4,
    "split": ["dev"] * 4,
}
ROWS = {
    "echo840/OCRBench": ("test", OCRBENCH),
    "lmms-lab-encoder/MMBench": ("dev", MMBENCH),
    "lmms-lab-encoder/textvqa": ("validation", TEXTVQA),
    "lmms-lab-encoder/OK-VQA": ("val2014", OK_VQA),
    "lmms-lab-encoder/MME": ("test", MME),
    "lmms-lab-encoder/POPE": ("test", POPE),
    "lmms-lab-encoder/SEED-Bench": ("test", SEED),
}


def as_dataset(rows: dict[str, list[Any]]) -> Dataset:
    kinds = {"image": Sequence(Image()) if isinstance(rows["image"][0], list) else Image()}
    lists = {name: Sequence(Value("string")) for name in ("answers", "ocr_tokens")}
    types = {int: Value("int64"), str: Value("string")}
    features = {name: kinds.get(name) or lists.get(name) or types[type(values[0])] for name, values in rows.items()}
    return Dataset.from_dict(rows, features=Features(features))


@pytest.fixture(scope="module")
def no_hub() -> Any:
    """Data sets come from the rows above; anything else would need the network."""

    def load_dataset(path: str, name: str | None = None, **options: Any) -> DatasetDict:
        split, rows = ROWS[path]
        assert name == ("en" if rows is MMBENCH else None)
        rows = as_dataset(rows)
        return DatasetDict({split: rows.rename_column("answers", "answer") if path == "echo840/OCRBench" else rows})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lmms_task.datasets, "load_dataset", load_dataset)
        yield


@pytest.fixture(scope="module")
def load(no_hub: None) -> Callable[[str, str], Any]:
    """One of our tasks as `--model MODEL_ID` gets it."""

    def load(name: str, model_id: str = "vlmpruner_llava") -> Any:
        manager = TaskManager(verbosity="ERROR", include_defaults=False, model_name=model_id)
        return manager.load_task_or_group([name], "chat")[name]

    return load


def stock(name: str, model_name: str) -> Any:
    config = load_yaml_config(str(STOCK / VARIANTS[name][0]))
    return lmms_task.ConfigurableMessagesTask(config=config, model_name=model_name)


def text_of(task: Any, doc_id: int = 0) -> str:
    (message,) = task.doc_to_messages(task.test_docs()[doc_id])
    picture, text = message["content"]
    assert (picture["type"], picture["url"].mode, text["type"]) == ("image", "RGB", "text")
    return text["text"]


def scores(task: Any, answers: list[str]) -> dict[str, float]:
    """As lmms-eval aggregates: every metric over the documents that have it."""
    items: dict[str, list[Any]] = {}
    for doc, answer in zip(task.eval_docs_no_media, answers, strict=True):
        assert "image" not in doc
        for metric, item in task.process_results(dict(doc), [answer]).items():
            items.setdefault(metric, []).append(item)
    writes = {"args": SimpleNamespace(output_path=tempfile.mkdtemp())} if "gpt_eval_score" in items else {}
    return {metric: aggregate(items[metric], **writes) for metric, aggregate in task.aggregation().items() if metric in items}


def comparable(value: Any) -> Any:
    """A function is the same when its source is: lmms-eval loads one file under several names."""
    if callable(value):
        return Path(value.__code__.co_filename).resolve(), value.__qualname__
    return value


def test_the_folder_holds_these_tasks_and_the_plugin_finds_them() -> None:
    assert {path.stem for path in OURS.glob("*.yaml")} == set(VARIANTS)
    index = TaskManager(verbosity="ERROR", include_defaults=False).task_index
    assert {name: Path(index[name]["yaml_path"]) for name in VARIANTS} == {name: OURS / f"{name}.yaml" for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_stock_task_but_for_what_it_says(name: str) -> None:
    """Fails as well when another version of lmms-eval changes the stock task, so that ours can follow."""
    path, expected = VARIANTS[name]
    own, other = load_yaml_config(str(OURS / f"{name}.yaml")), load_yaml_config(str(STOCK / path))
    assert {key for key in own.keys() | other.keys() if comparable(own.get(key)) != comparable(other.get(key))} == expected
    stock_metrics = [line["metric"] for line in other["metric_list"]]
    dropped = {"submission", "seed_video", "seed_all", "pope_accuracy", "pope_precision", "pope_recall", "pope_yes_ratio"}
    assert set(stock_metrics) - dropped <= {line["metric"] for line in own["metric_list"]}
    if name == "seedbench_image":  # our wrapper knows no image_aspect_ratio: the protocol says how images are made square
        assert own["generation_kwargs"] | {"image_aspect_ratio": "original"} == other["generation_kwargs"]


@pytest.mark.parametrize("model_id", plugin.STOCK_PROMPTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_prompts_are_those_of_the_stock_name(name: str, model_id: str, load: Callable) -> None:
    ours, theirs = text_of(load(name, model_id)), text_of(stock(name, plugin.STOCK_PROMPTS[model_id]))
    if name == "textvqa_val_ocr":
        assert ours == theirs.replace(WORD, "\nReference OCR token: NOKIA, 10:15" + WORD) != theirs
    elif name == "ok_vqa_val2014_plain":
        clause = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        assert ours == theirs.replace(clause, "") != theirs
    elif name == "ocrbench_short":
        assert ours == theirs + WORD
    elif name == "mmbench_en_dev_llava":
        assert theirs == "Read this.\nThen answer. What is it? There are several options:\nA. a cup\nB. a dog\nC. a car\n" + LETTER
        assert ours == "Read this.\nThen answer.\nWhat is it?\nA. a cup\nB. a dog\nC. a car" + LETTER
    else:
        assert ours == theirs


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("textvqa_val_ocr", "What is the brand of this phone?\nReference OCR token: NOKIA, 10:15" + WORD),
        ("ok_vqa_val2014_plain", "What sport can you use this for?" + WORD),
        ("mme_total", "Is there a dog in this image?" + WORD),
        ("pope_splits", "Is there a snowboard in the image?" + WORD),
        ("pope_splits_llava", "Is there a snowboard in the image?" + WORD),
        ("ocrbench_short", "what is written in the image?" + WORD),
        ("mmbench_en_dev_llava", "Read this.\nThen answer.\nWhat is it?\nA. a cup\nB. a dog\nC. a car" + LETTER),
        ("seedbench_image", "How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER),
    ],
)
def test_the_prompt(name: str, text: str, load: Callable) -> None:
    assert text_of(load(name)) == text


def test_an_image_without_text_has_no_ocr_tokens(load: Callable) -> None:
    assert text_of(load("textvqa_val_ocr"), 1) == "What time is it?\nReference OCR token: " + WORD


def test_mmbench_without_a_hint_begins_with_the_question(load: Callable) -> None:
    assert text_of(load("mmbench_en_dev_llava"), 2) == "Which one?\nA. red\nB. blue" + LETTER


@pytest.mark.parametrize("missing", ["nan", "None", math.nan, None])
def test_mmbench_lists_options_up_to_the_first_that_is_missing(missing: object) -> None:
    doc = {"question": "Which?", "hint": missing, "A": "red", "B": missing, "C": "blue", "D": "green"}
    assert utils.mmbench_doc_to_text(doc, {"pre_prompt": "", "post_prompt": LETTER}) == "Which?\nA. red" + LETTER


def test_mmbench_counts_a_question_whose_every_turn_is_right(load: Callable) -> None:
    task = load("mmbench_en_dev_llava")
    assert scores(task, ["A", "B.", "B", "blue"]) == {"gpt_eval_score": 100.0}
    assert scores(task, ["A", "A", "B", "A"]) == {"gpt_eval_score": 50.0}


def test_ocrbench_forgets_the_points_of_the_evaluation_before(load: Callable) -> None:
    task = load("ocrbench_short")
    for _ in range(2):
        assert scores(task, ["The Centre!", "x^2"]) == {"ocrbench_accuracy": 0.002}
    assert scores(task, ["nothing", "x^2"]) == {"ocrbench_accuracy": 0.001}


@pytest.mark.parametrize("spaces", ["", " ", "  ", "   "])
def test_mme_has_no_space_before_the_line_break(spaces: str, load: Callable) -> None:
    doc = {"question": f"Is it red?{spaces}Please answer yes or no.", "image": PICTURE}
    left = "Please answer yes or no." if spaces == "" else ""  # nothing that the stock function takes off
    (message,) = load("mme_total").doc_to_messages(doc)
    assert message["content"][1]["text"] == "Is it red?" + left + WORD


@pytest.mark.parametrize("name", ["textvqa_val_ocr", "ok_vqa_val2014_plain"])
def test_vqa_accuracy_is_a_third_for_each_annotator_who_agrees_up_to_one(name: str, load: Callable) -> None:
    """Two of ten say it: the mean over the ten sets of nine is (2 x 1/3 + 8 x 2/3) / 10 = 0.6."""
    task = load(name)
    rows = TEXTVQA if name == "textvqa_val_ocr" else OK_VQA
    often, seldom = rows["answers"][0][0], rows["answers"][0][-1]
    rest = ["10:10"] * (len(rows["question"]) - 1)
    for answer, value in ((f"{often.upper()}.", 1.0), (seldom, 0.6), ("nothing", 0.0)):
        assert scores(task, [answer, *rest])["exact_match"] == pytest.approx((value + len(rest)) / (1 + len(rest)))


def test_mme_adds_accuracy_and_accuracy_of_pairs_over_all_categories(load: Callable) -> None:
    """Existence: one pair right (100 + 100), one half right (50 + 0), mean 125. Code: the pair is right, 200. Total 325."""
    task = load("mme_total")
    assert scores(task, ["Yes", "No.", "yes", "Yes", "Yes", "no"]) == {
        "mme_perception_score": 125.0,
        "mme_cognition_score": 200.0,
        "mme_total_score": 325.0,
    }
    assert scores(task, ["No", "Yes"] * 3)["mme_total_score"] == 0.0
    assert scores(task, ["perhaps"] * 6)["mme_total_score"] == 0.0


def test_pope_has_an_f1_a_split_their_mean_and_one_of_all(load: Callable) -> None:
    """Adversarial: one of two found, no false alarm, 2/3. Popular: both found, one false alarm, 0.8. Random: all right, 1.

    All nine: 5 found of 6, 1 false alarm, so precision = recall = F1 = 5/6.
    """
    got = scores(load("pope_splits"), ["Yes", "No", "No", "yes", "Yes", "Yes", "Yes", "Yes ", "No"])
    expected = {"pope_f1_adversarial": 2 / 3, "pope_f1_popular": 0.8, "pope_f1_random": 1.0, "pope_f1_score": 5 / 6}
    assert got == pytest.approx(expected | {"pope_f1_mean": (2 / 3 + 0.8 + 1) / 3})


@pytest.mark.parametrize(
    ("answer", "strict", "lenient"),
    [
        ("Yes", "yes", "yes"),
        ("no", "no", "no"),
        ("No, there is not.", None, "no"),
        ("There is no snowboard. Yes", None, "no"),
        ("Yes. No snowboard", None, "yes"),
        ("It is not,there", None, "yes"),  # commas go, and nothing comes for them
        ("NO", "no", "yes"),
        ("nothing", None, "yes"),
        ("", None, "yes"),
    ],
)
def test_pope_reads_answers_as_lmms_eval_or_as_llavas_script(answer: str, strict: str | None, lenient: str) -> None:
    doc = {name: values[0] for name, values in POPE.items()}
    items = [read(doc, [answer])["pope_f1_mean"]["prediction"] for read in (utils.pope_process_results, utils.pope_llava_process_results)]
    assert (items[0] if items[0] in ("yes", "no") else None, items[1]) == (strict, lenient)


def test_pope_by_llavas_rule_has_the_same_metrics(load: Callable) -> None:
    answers = ["Yes, it is", "perhaps", "No.", "there is not one", "a snowboard", "Not", "no", "no", "no"]
    got = scores(load("pope_splits_llava"), answers)
    # adversarial: all right. Popular: one of two found, and "Not" is no denial: 1/2 and 1/2. Random: nothing found
    expected = {"pope_f1_adversarial": 1.0, "pope_f1_popular": 0.5, "pope_f1_random": 0.0, "pope_f1_score": 2 * 3 / (2 * 3 + 1 + 3)}
    assert got == pytest.approx(expected | {"pope_f1_mean": 0.5})


def test_pope_without_a_split_has_no_mean(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{name: values[i] for name, values in POPE.items()} for i in range(6)]
    items = [utils.pope_process_results(row, [row["answer"]]) for row in rows]
    assert math.isnan(utils.pope_f1_mean([item["pope_f1_mean"] for item in items]))
    assert "no question of split random" in caplog.text
    with pytest.raises(ValueError, match=r"question 1 is of split 'hard', expected one of random, popular, adversarial"):
        utils.pope_process_results(rows[0] | {"category": "hard"}, ["yes"])


def test_seed_asks_about_images_only(load: Callable) -> None:
    task = load("seedbench_image")
    assert list(task.test_docs()["question_id"]) == ["101669", "101670"]
    assert scores(task, ["A. One", "b"]) == {"seed_image": 0.5}
    assert scores(task, ["a", "D"]) == {"seed_image": 1.0}


def test_a_sweep_scores_them_in_the_units_of_papers(no_hub: None, tmp_path: Path) -> None:
    config = make_config(tasks=["mme_total", "pope_splits"], methods=["blind"], limit=None)
    manager = TaskManager(verbosity="ERROR", include_defaults=False, model_name="vlmpruner_llava")
    console = Console(file=io.StringIO())
    outcome = run_sweep(config, tmp_path, console=console, load=lambda *args, **kwargs: StandIn(), task_manager=manager)
    assert outcome.failed == 0
    unpruned = read_runs(tmp_path)["unpruned"].scores
    main = {name: (task.main.metric, task.main.value, task.main.n) for name, task in unpruned.items()}
    assert main == {"mme_total": ("mme_total_score", 400.0, 6), "pope_splits": ("pope_f1_mean", pytest.approx(100.0), 9)}
    assert set(unpruned["mme_total"].metrics) == {"mme_perception_score", "mme_cognition_score", "mme_total_score"}
