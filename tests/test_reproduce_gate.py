"""The parts of a reproduction that need no model: flips, the gate's arithmetic, printed numbers, the paper's files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.paper.gate import IMPOSSIBLE, INSIDE, NO_NUMBER, NO_SCORE, OUTSIDE, tolerance, within
from vlm_pruner_eval.report.paper.printed import BENCHMARKS, METHODS, PAPER_MODELS, Number, PrintedNumbers, is_whole_paper, read_printed
from vlm_pruner_eval.reproduce import noise
from vlm_pruner_eval.reproduce.noise import Flips, Noise, TaskNoise
from vlm_pruner_eval.reproduce.noise_gate import judge
from vlm_pruner_eval.reproduce.plan import Variant, make_plan
from vlm_pruner_eval.store.folder import DocumentScore
from vlm_pruner_eval.store.schema import RunRecord
from vlm_pruner_eval.store.summaries import Score, TaskScore

HEADER = "paper,table,vlm,method,retained_tokens,pruning_rate_percent,benchmark,metric,value,read_from\n"


def score(doc_id: int, value: float | None, answer: str = "a") -> DocumentScore:
    return DocumentScore(task="t", doc_id=doc_id, answer=answer, score=value)


def test_an_answer_may_change_without_its_score() -> None:
    ours, theirs = ({("t", 0): score(0, 0.0, text)} for text in ("a", "b"))
    assert noise._answer_flips(ours, theirs) == Flips(1, 1)
    assert noise._score_flips(ours, theirs) == Flips(0, 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([1.0, 0.0, None], [0.0, 0.0, None], Flips(1, 2)),  # further turns of a question are not counted apart
        ([1.0, 0.0], [1.0, None], None),
        ([None, None], [None, None], None),
    ],
)
def test_score_flips_are_counted_over_the_documents_that_have_scores(ours: list, theirs: list, expected: Flips | None) -> None:
    sides = [{("t", i): score(i, value) for i, value in enumerate(values)} for values in (ours, theirs)]
    assert noise._score_flips(*sides) == expected


def test_a_benchmark_of_several_tasks_counts_the_documents_of_all() -> None:
    parts = {name: Score(value=1.0, n=2, metric=metric) for name, metric in (("part_a", "acc"), ("part_b", "acc,none"))}
    whole = TaskScore(metrics=parts, main=Score(value=1.0, n=4, metric="mean of acc over 2 tasks"))
    assert noise._leaves("whole", whole) == {"part_a", "part_b"}
    single = TaskScore(metrics={name: Score(value=1.0, n=2) for name in "pc"}, main=Score(value=2.0, n=2, metric="p + c"))
    assert noise._leaves("mme", single) == {"mme"}


def unpruned(**scores: tuple[float | None, float]) -> Noise:
    """A noise floor of one variant: task=(score, spread)."""
    variant = Variant(1, "sdpa")
    tasks = {name: TaskNoise("m", {variant.name: score}, spread, {}, {}) for name, (score, spread) in scores.items()}
    return Noise((variant,), {}, RunRecord.model_construct(units={}), tasks, 0.0)


def numbers(**bounds: float) -> PrintedNumbers:
    return PrintedNumbers({("VLM", METHODS["none"], 0.0, BENCHMARKS[task]): Number(value, "T", "p") for task, value in bounds.items()})


@pytest.mark.parametrize(
    ("task", "score", "spread", "bound", "verdict"),
    [
        ("gqa", 61.45, 0.0, 61.95, INSIDE),
        ("gqa", 61.44, 0.0, 61.95, OUTSIDE),
        ("gqa", 61.25, 0.35, 61.95, INSIDE),
        ("gqa", 61.24, 0.35, 61.95, OUTSIDE),
        ("mme_total", 1876.0, 0.0, 1862.0, INSIDE),
        ("mme_total", 1876.1, 0.0, 1862.0, OUTSIDE),
        ("ocrbench", 292.0, 0.0, 297.0, INSIDE),
        ("ocrbench", 291.0, 0.0, 297.0, OUTSIDE),
        ("ocrbench", 291.0, 3.0, 297.0, INSIDE),
        ("mme", 1826.0, 0.0, 2826.0, IMPOSSIBLE),
        ("pope", None, 0.0, 85.9, NO_SCORE),
    ],
)
def test_the_gate_is_half_a_point_or_twice_the_spread_in_the_benchmarks_unit(
    task: str, score: float | None, spread: float, bound: float, verdict: str
) -> None:
    gate = judge(unpruned(**{task: (score, spread)}), numbers(**{task: bound}), "VLM", ())
    assert [item.verdict for item in gate.tasks] == [verdict]
    assert gate.stops == (verdict in (OUTSIDE, NO_SCORE))


def test_tasks_without_a_printed_number_pass_and_say_so() -> None:
    gate = judge(unpruned(gqa=(1.0, 0.0), chartqa=(1.0, 0.0)), numbers(), "VLM", ())
    assert (gate.status, gate.stops) == (NO_NUMBER, False)
    assert [item.verdict for item in gate.tasks] == [NO_NUMBER, NO_NUMBER]
    mixed = judge(unpruned(gqa=(60.0, 0.0), chartqa=(1.0, 0.0)), numbers(gqa=60.1), "VLM", ())
    assert mixed.sentence == "The unpruned row reproduces: 1 of 1 tasks with a printed number are inside."
    assert (tolerance(2800, None), tolerance(100, 0.4)) == (14.0, 0.8)
    assert within(0.5 + 1e-12, 0.5)
    assert not within(-0.51, 0.5)


def test_printed_numbers_are_those_of_the_paper() -> None:
    table = read_printed()
    assert table.find("LLaVA-1.5-7B", "none", None, "GQA").value == 61.95
    assert table.find("LLaVA-1.5-7B", "vlmpruner", 100 * 8 / 9, "MME") is not None
    assert table.find("LLaVA-1.5-7B", "uniform", 100 * 8 / 9, "MME") is None
    twice = table.find("Qwen2-VL-7B-Instruct", "vlmpruner", 88.9, "Avg")
    assert (twice.value, twice.read_from) == (92.58, "third-party reading notes"), "a note comes before a digitised figure"
    assert table.has_sound_averages("LLaVA-1.5-7B")
    assert not table.has_sound_averages("LLaVA-1.5-13B"), "its printed averages divide by an MME of 2826"


def test_a_broken_table_of_printed_numbers_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("paper,value\n")
    with pytest.raises(ConfigError, match="lacks columns"):
        read_printed(tmp_path)
    (tmp_path / "a.csv").write_text(HEADER + "VLM-Pruner,T,V,M,1,much,GQA,acc,1,p\n")
    with pytest.raises(ConfigError, match="can't be read as a table of printed numbers"):
        read_printed(tmp_path)
    assert read_printed(tmp_path / "nowhere").numbers == {}


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_every_model_of_the_paper_can_be_planned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planned = make_plan(model=name)
    assert planned.vlm in {key[0] for key in read_printed().numbers} | {"Qwen3-VL-4B-Instruct"}
    assert not [reason for reason in planned.incomparable if not reason.startswith("protocol hf")]
    assert (planned.rows.model.batch_size, planned.rows.model.attn_implementation) == (1, "sdpa")
    assert planned.output == Path("output/reproduce") / name
    assert os.listdir(tmp_path) == []
    whole = name not in ("llava-video-7b", "qwen3-vl-4b")
    assert is_whole_paper(planned.rows.tasks, planned.vlm) == whole
    labels = [entry.label for entry in make_plan(model=name, methods=["vlmpruner"]).rows.methods]
    assert labels == ["VLM-Pruner (release)", "VLM-Pruner"]
