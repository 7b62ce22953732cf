"""Capabilities and hard subsets, on records written here, so that every number can be counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from large_results import MACHINE

from vlm_pruner_eval.report.load import load_sweep
from vlm_pruner_eval.report.rows import rows_of
from vlm_pruner_eval.report.stats.paired import Estimate
from vlm_pruner_eval.report.stats.strata import CAPABILITIES, CONTROLS, OF_CATEGORY, OF_TASK, Stratum, capability_of, strata
from vlm_pruner_eval.store import summaries
from vlm_pruner_eval.store.folder import DocumentScore, Store
from vlm_pruner_eval.store.schema import Grid, RunHead, RunLine, UnitRecord
from vlm_pruner_eval.store.summaries import TaskScore

Score = Callable[[str, int], float | None]
N = 12
TASKS = ["ocrbench", "mme_total", "gqa"]
MME = ["OCR", "position", "count", "commonsense_reasoning"]  # of document 0, 1, 2, 3, 4 and so on


def scores_of(task: str, score: Score, images: Callable[[int], str]) -> list[DocumentScore]:
    found = []
    for doc in range(N):
        item = {"question_id": str(doc), "category": MME[doc % 4]} if task == "mme_total" else {"question_type": "Doc-oriented VQA"}
        found.append(DocumentScore(task=task, doc_id=doc, answer="a", score=score(task, doc), items={"m": item}, images=[images(doc)]))
    return found


def write(root: Path, runs: dict[tuple[str, str | None, int | None], Score], *, images: Callable[[int], str] = str) -> Path:
    """A results directory of finished runs: (method, rate, seed) -> score of a document."""
    store, lines = Store(root), []
    model = dict.fromkeys(("id", "pretrained", "revision", "dtype", "protocol", "attn_implementation", "batch_size"), "x")
    config = {"model": model, "tasks": TASKS, "limit": None, "seed": 0}
    for (method, rate, seed), score in runs.items():
        run_id = f"{method}-{rate}-{seed}".replace("/", "of")
        rates = {"pruning_rate": rate, "asked_rate": rate, "iso_layer": None}
        line = RunLine(key=run_id, run_id=run_id, label=method, method=method, seed=seed, changed={}, parameters={}, **rates)
        store.write_head(RunHead(run=line, config=config))
        for task in TASKS:
            unit = store.unit(run_id, task)
            main = summaries.Score(value=50.0, n=N, metric="m")
            scored = {task: TaskScore(metrics={}, main=main)}
            record = UnitRecord(task=task, limit=None, status="finished", scores=scored, n_answers=N, provenance=MACHINE)
            unit.write(record, scores_of(task, score, images), {})
            (unit.folder / "answers.jsonl").touch()
        lines.append(line)
    store.begin(Grid(name="strata", config=config, runs=lines, units={task: task for task in TASKS}))
    return root


def found_in(root: Path) -> list[Stratum]:
    results = load_sweep(root)
    return strata(results, rows_of(results))


def right(task: str, doc: int) -> float:
    return 1.0


def of(found: list[Stratum], name: str, label: str) -> Stratum:
    (stratum,) = [stratum for stratum in found if (stratum.name, stratum.label) == (name, label)]
    return stratum


# ---- what a document asks for
@pytest.mark.parametrize(
    ("task", "items", "expected"),
    [
        ("ocrbench", {}, ("OCR", "ocrbench")),
        ("textvqa_val_ocr", {}, ("OCR", "textvqa_val_ocr")),
        ("pope_splits", {"pope_f1_mean": {"category": "random"}}, ("recognition", "pope_splits")),
        ("mme_total", {"mme_total_score": {"category": "OCR"}}, ("OCR", "mme_total: OCR")),
        ("mme", {"mme_perception_score": {"category": "color"}}, ("attribute", "mme: color")),
        ("mme", {"mme_cognition_score": {"category": "code_reasoning"}}, (None, "mme")),
        (
            "mmbench_en_dev_static",
            {"gpt_eval_score": {"category": "spatial_relationship"}},
            ("spatial", "mmbench_en_dev_static: spatial_relationship"),
        ),
        ("mmstar", {"average": {"l2_category": "object counting", "score": 1.0}}, ("counting", "mmstar: object counting")),
        ("videomme", {"s": {"category": "Knowledge", "task_category": "OCR Problems"}}, ("OCR", "videomme: OCR Problems")),
        ("mlvu_dev", {"s": {"task_type": "count"}}, ("counting", "mlvu_dev: count")),
        ("digitscenes_where", {"exact_match": 1.0}, ("spatial", "digitscenes_where")),
        ("digitscenes_pairs", {"accuracy": 1.0, "both_right": {"pair_id": "x"}}, (None, "digitscenes_pairs")),
        ("gqa", {"exact_match": 1.0}, (None, "gqa")),
        ("popeye", {}, (None, "popeye")),
    ],
)
def test_capability_of(task: str, items: dict, expected: tuple[str | None, str]) -> None:
    assert capability_of(task, items) == expected


def test_the_tables_name_capabilities_only_and_ocr_is_first() -> None:
    assert CAPABILITIES[0] == "OCR"
    assert set(OF_TASK.values()) == set(CAPABILITIES)
    assert {value for categories in OF_CATEGORY.values() for value in categories.values()} == set(CAPABILITIES)
    assert all(name == name.lower() for categories in OF_CATEGORY.values() for name in categories)


# ---- capabilities
def test_parts_weigh_the_same_and_scores_are_relative(tmp_path: Path) -> None:
    """OCR is all of ocrbench (unpruned 1.0, here 0.5) and 3 documents of MME (unpruned 1.0, here 1/3): (50 + 33.3) / 2."""
    scores = {"ocrbench": lambda doc: float(doc % 2), "mme_total": lambda doc: float(doc in (0, 1, 2)), "gqa": lambda doc: 0.0}
    root = write(tmp_path, {("none", None, None): right, ("uniform", "8/9", None): lambda task, doc: scores[task](doc)})
    found = found_in(root)
    assert list(dict.fromkeys(stratum.name for stratum in found)) == ["OCR", "spatial", "counting"]
    ocr = of(found, "OCR", "uniform")
    assert (ocr.method, ocr.pruning_rate, ocr.control) == ("uniform", "8/9", None)
    assert ocr.score.value == pytest.approx((50 + 100 / 3) / 2)
    assert (ocr.n_documents, ocr.parts) == (15, ("mme_total: OCR", "ocrbench"))
    assert of(found, "spatial", "uniform").score.value == pytest.approx(100 / 3)
    assert {stratum.score for stratum in found if stratum.label == "unpruned" or stratum.method == "none"} == {Estimate(100.0)}


def test_the_unpruned_score_is_the_denominator(tmp_path: Path) -> None:
    runs = {("none", None, None): lambda task, doc: 0.5 + 0.5 * (doc < 6), ("uniform", "8/9", None): lambda task, doc: 0.25}
    ocr = of(found_in(write(tmp_path, runs)), "spatial", "uniform")
    assert ocr.score.value == pytest.approx(100 * 0.75 / (1.0 + 1.0 + 0.5)), "documents 1, 5 and 9"


def test_intervals_resample_images(tmp_path: Path) -> None:
    """Four questions an image that are right or wrong together say as little as one."""

    def score(task: str, doc: int) -> float | None:
        return float(doc // 4 == 0) if task == "ocrbench" else None

    def width(folder: str, images: Callable[[int], str]) -> float:
        root = write(tmp_path / folder, {("none", None, None): right, ("uniform", "8/9", None): score}, images=images)
        estimate = of(found_in(root), "OCR", "uniform").score
        assert estimate.low < estimate.value < estimate.high
        return estimate.high - estimate.low

    assert width("together", lambda doc: str(doc // 4)) > 1.3 * width("apart", str)


def test_no_spread_is_no_interval(tmp_path: Path) -> None:
    root = write(tmp_path, {("none", None, None): right, ("uniform", "8/9", None): lambda task, doc: 0.0})
    assert of(found_in(root), "OCR", "uniform").score == Estimate(0.0)


def test_resamples_without_a_part_are_left_out_and_too_many_are_no_interval(tmp_path: Path) -> None:
    """12 images, of which one alone asks for reading in MME: a third of the resamples has no score there."""

    def of_unpruned(task: str, doc: int) -> float | None:
        return None if task == "mme_total" and doc in (4, 8) else 1.0

    runs = {("none", None, None): of_unpruned, ("uniform", "8/9", None): lambda task, doc: float(doc % 2)}
    ocr = of(found_in(write(tmp_path, runs)), "OCR", "uniform")
    assert (ocr.n_documents, ocr.score) == (13, Estimate(25.0))


def test_seeds_are_averaged_by_document(tmp_path: Path) -> None:
    runs = {("none", None, None): right} | {("random", "8/9", seed): lambda task, doc, seed=seed: float(seed == 0) for seed in range(4)}
    found = of(found_in(write(tmp_path, runs)), "OCR", "random")
    assert (found.score.value, found.n_documents) == (25.0, 15)


def test_a_part_that_the_unpruned_model_never_gets_right_has_no_ratio(tmp_path: Path) -> None:
    runs = {("none", None, None): lambda task, doc: float(task != "ocrbench"), ("uniform", "8/9", None): right}
    assert of(found_in(write(tmp_path, runs)), "OCR", "uniform").parts == ("mme_total: OCR",)


# ---- hard subsets
HARD = {
    ("none", None, None): lambda task, doc: float(doc < 8),
    ("vlmpruner", "8/9", None): lambda task, doc: float(doc not in (1, 9)),
    ("vlmpruner", "2/3", None): right,
    ("pool", "8/9", None): lambda task, doc: float(doc < 4),  # of the 8 that are right, documents 4 to 7 are hard
    ("blind", None, None): lambda task, doc: float(doc == 7),
}


def test_the_hard_subset_is_what_unpruned_gets_right_and_the_control_wrong(tmp_path: Path) -> None:
    hard = [stratum for stratum in found_in(write(tmp_path, HARD)) if stratum.control]
    assert [(s.name, s.label, s.pruning_rate, s.control) for s in hard] == [
        ("hard: pool fails", "vlmpruner", "8/9", "pool"),
        ("hard: pool fails", "blind", "8/9", "pool"),
    ]
    assert {(s.n_documents, s.parts) for s in hard} == {(12, ("gqa", "mme_total", "ocrbench"))}
    assert [s.score.value for s in hard] == [100.0, 25.0]


def test_a_score_of_100_on_few_documents_has_wilsons_interval(tmp_path: Path) -> None:
    """12 documents of 4 images, all right: the lower end is that of 4 out of 4."""
    vlmpruner = next(s for s in found_in(write(tmp_path, HARD)) if s.control and s.label == "vlmpruner")
    z = 1.959963985
    assert vlmpruner.score.high == 100.0
    assert vlmpruner.score.low == pytest.approx(100 * 4 / (4 + z**2))


def test_each_control_and_rate_has_a_subset_of_its_own(tmp_path: Path) -> None:
    runs = HARD | {
        ("downsample", "8/9", None): lambda task, doc: float(doc != 3),
        ("pool", "2/3", None): lambda task, doc: float(doc != 0),
    }
    hard = [stratum for stratum in found_in(write(tmp_path, runs)) if stratum.control]
    assert {(s.name, s.pruning_rate, s.n_documents) for s in hard} == {
        ("hard: pool fails", "2/3", 3),
        ("hard: pool fails", "8/9", 12),
        ("hard: downsample fails", "8/9", 3),
    }
    assert of(hard, "hard: downsample fails", "pool").score.value == 100.0
    assert {"pool", "downsample"} == CONTROLS


def test_a_control_that_fails_nowhere_has_no_subset(tmp_path: Path) -> None:
    assert not [s for s in found_in(write(tmp_path, HARD | {("pool", "8/9", None): right})) if s.control]


# ---- what is not there
def test_without_scores_or_without_the_unpruned_run_there_is_nothing(tmp_path: Path) -> None:
    assert found_in(write(tmp_path / "old", dict.fromkeys(HARD, lambda task, doc: None))) == []
    assert found_in(write(tmp_path / "none", {("pool", "8/9", None): right})) == []
