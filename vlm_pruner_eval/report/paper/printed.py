"""The numbers that papers print, with their errata, and how models and tasks map onto their tables."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.paper.papers import DEFAULT, PAPERS, Paper
from vlm_pruner_eval.sweep.grid import UNPRUNED

DATA = Path(__file__).parent / "data"
ERRATA = "errata.csv"
AVERAGE = "Avg"
BENCHMARKS = {
    "gqa": "GQA",
    "mmbench_en_dev_static": "MMB",
    "mmbench_en_dev_llava": "MMB",
    "mme": "MME",
    "mme_total": "MME",
    "pope": "POPE",
    "pope_splits": "POPE",
    "pope_splits_llava": "POPE",
    "scienceqa_img": "SQA",
    "textvqa_val": "VQAText",
    "textvqa_val_ocr": "VQAText",
    "ocrbench": "OCRBench",
    "ocrbench_short": "OCRBench",
    "seedbench": "SEED",
    "seedbench_image": "SEED",
    "ok_vqa_val2014": "OKVQA",
    "ok_vqa_val2014_plain": "OKVQA",
}
# Tasks of those that ask a model something else than the authors asked it, so that no printed number of the model stands for them.
# LLaVA's scripts have prompts of their own; Qwen2-VL, and in some papers LLaVA, was asked by a copy of lmms-eval. OCR tokens are in the
# prompt of TextVQA, but not where the authors' loader finds "1.6" in a checkpoint's name.
_NOT_LLAVAS = frozenset({"mmbench_en_dev_static", "ocrbench", "ok_vqa_val2014"})
_NOT_LMMS_EVALS = frozenset({"mmbench_en_dev_llava", "ocrbench_short", "ok_vqa_val2014_plain", "pope_splits_llava", "textvqa_val"})
ASKED_OTHERWISE = {
    "LLaVA-1.5-7B": _NOT_LLAVAS | {"textvqa_val"},
    "LLaVA-1.5-13B": _NOT_LLAVAS | {"textvqa_val"},
    "LLaVA-NeXT-7B": _NOT_LLAVAS | {"textvqa_val_ocr"},
    "Qwen2-VL-7B-Instruct": _NOT_LMMS_EVALS,
}
METHODS = {
    UNPRUNED: "vanilla (upper bound)",
    "vlmpruner": "VLM-Pruner",
    "fastv": "FastV",
    "dart": "DART",
    "divprune": "DivPrune",
    "sparsevlm": "SparseVLM",
    "pdrop": "PDrop",
    "mustdrop": "MustDrop",
}
_SAME_METHOD = {"vanilla": METHODS[UNPRUNED], "FastV K=3 R=50%": METHODS["fastv"]}
# Benchmarks of which a paper prints another score than ours, which is not to be held against it; by name and metric.
_OTHER_SCORE = {
    ("MME", "P-score only"): "MME-Perception",
    ("SEED", "acc (all, incl. video)"): "SEED (all)",
    ("SEED", 'lmms-eval (README labels SEED "Image-acc")'): "SEED (all)",
}
PRINTED_TABLE = "printed table"
_FULL_SCORE = {"MME": 2800.0, "OCRBench": 1000.0, "MME-Perception": 2000.0, "MME-Cognition": 800.0}
_RATIO = re.compile(r"\(ratio (0?\.\d+)\)")
_COLUMNS = ("paper", "table", "vlm", "method", "pruning_rate_percent", "benchmark", "value", "read_from")
_ERRATA_COLUMNS = ("number", "vlm", "method", "pruning_rate_percent", "benchmark", "corrected", "text")

Key = tuple[str, str, float, str]  # vlm, method as printed, percentage removed (one decimal), benchmark


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper: its id here, its sweep file under configs/paper, its name in the tables, its published checkpoints."""

    id: str
    file: str
    vlm: str
    checkpoints: tuple[str, ...]
    has_script: bool = True


PAPER_MODELS = {
    "llava-1.5-7b": PaperModel(
        "vlmpruner_llava", "table1_llava15_7b.yaml", "LLaVA-1.5-7B", ("llava-hf/llava-1.5-7b-hf", "liuhaotian/llava-v1.5-7b")
    ),
    "llava-1.5-13b": PaperModel(
        "vlmpruner_llava", "table2_llava15_13b.yaml", "LLaVA-1.5-13B", ("llava-hf/llava-1.5-13b-hf", "liuhaotian/llava-v1.5-13b")
    ),
    "llava-next-7b": PaperModel(
        "vlmpruner_llava_next",
        "table2_llava_next_7b.yaml",
        "LLaVA-NeXT-7B",
        ("llava-hf/llava-v1.6-vicuna-7b-hf", "liuhaotian/llava-v1.6-vicuna-7b"),
    ),
    "qwen2-vl-7b": PaperModel("vlmpruner_qwen2_vl", "table3_qwen2_vl_7b.yaml", "Qwen2-VL-7B-Instruct", ("Qwen/Qwen2-VL-7B-Instruct",)),
    "llava-video-7b": PaperModel(
        "vlmpruner_llava_video",
        "table4_llava_video_7b.yaml",
        "LLaVA-Video-7B-Qwen2",
        ("lmms-lab/LLaVA-Video-7B-Qwen2",),
        has_script=False,
    ),
    "qwen3-vl-4b": PaperModel(
        "vlmpruner_qwen3_vl", "table7_qwen3_vl_4b.yaml", "Qwen3-VL-4B-Instruct", ("Qwen/Qwen3-VL-4B-Instruct",), has_script=False
    ),
}


@dataclass(frozen=True)
class Number:
    """A printed number and where it was read."""

    value: float
    table: str
    read_from: str


@dataclass(frozen=True)
class Erratum:
    """Something wrong with printed numbers: `text`, the cells it touches (empty or None: any), and the right value of one of them."""

    number: int
    text: str
    cells: tuple[tuple[str, str, float | None, str], ...]
    corrected: dict[Key, float] = field(default_factory=dict)

    def touches(self, key: Key) -> bool:
        """Return True if a printed number is one of those."""
        vlm, method, percent, benchmark = key
        return any(
            cell[0] in ("", vlm) and cell[1] in ("", method) and cell[2] in (None, percent) and cell[3] in ("", benchmark)
            for cell in self.cells
        )


@dataclass(frozen=True)
class PrintedNumbers:
    """All numbers of a paper, by model, method, percentage removed (one decimal) and benchmark; and what is wrong with them."""

    numbers: dict[Key, Number]
    errata: tuple[Erratum, ...] = ()
    paper: Paper = PAPERS[DEFAULT]

    def find(self, vlm: str | None, method: str, percent: float | None, benchmark: str | None) -> Number | None:
        """The printed number of a cell, or None; `percent` None is the unpruned model."""
        key = key_of(vlm, method, percent, benchmark)
        return None if key is None else self.numbers.get(key)

    def errata_of(self, vlm: str | None, method: str, percent: float | None, benchmark: str | None) -> tuple[int, ...]:
        """Numbers of the errata that touch a printed number; none where nothing is printed."""
        key = key_of(vlm, method, percent, benchmark)
        return tuple(item.number for item in self.errata if item.touches(key)) if key in self.numbers else ()

    def has_sound_averages(self, vlm: str) -> bool:
        """Return True if no upper bound that the model's averages divide by is above the benchmark's own maximum."""
        bounds = {key[3]: number for key, number in self.numbers.items() if key[:2] == (vlm, METHODS[UNPRUNED])}
        return all(is_possible(number, benchmark) for benchmark, number in bounds.items())


def key_of(vlm: str | None, method: str, percent: float | None, benchmark: str | None) -> Key | None:
    """The key of a cell of the paper's tables; None where they have no such model, method or benchmark."""
    if vlm is None or method not in METHODS or benchmark is None:
        return None
    return vlm, METHODS[method], round(percent or 0.0, 1), benchmark


def benchmark_of(task: str, vlm: str | None, paper: Paper = PAPERS[DEFAULT]) -> str | None:
    """The column of a paper that a task of lmms-eval stands for, where the authors asked that model the same; else None."""
    otherwise = _NOT_LMMS_EVALS if paper.by_lmms_eval else ASKED_OTHERWISE.get(vlm, ())
    return None if task in otherwise else BENCHMARKS.get(task)


def paper_model(pretrained: str) -> PaperModel | None:
    """The model of the paper behind a checkpoint."""
    return next((paper for paper in PAPER_MODELS.values() if pretrained in paper.checkpoints), None)


def incomparable(paper: PaperModel | None, *, model_id: str, pretrained: str, protocol: str, limit: int | None) -> Iterator[str]:
    """Why printed numbers can't be held against a run; nothing when they can."""
    if limit is not None:
        yield f"limit {limit}"
    if paper is None or pretrained not in paper.checkpoints:
        yield f"other checkpoint, {pretrained}"
    elif model_id != paper.id:
        yield f"model id {model_id}"
    if not protocol.startswith("paper"):  # its second reading for LLaVA-NeXT is one as well
        yield f"protocol {protocol}"


def full_score(benchmark: str | None) -> float:
    """The best score that a benchmark can give, in its own unit: 2800 for MME, 1000 for OCRBench, else 100."""
    return _FULL_SCORE.get(benchmark, 100.0)


def is_possible(number: Number, benchmark: str) -> bool:
    """Return True if a printed number is at most the benchmark's maximum (2826 for MME is not: see the errata)."""
    return benchmark == AVERAGE or number.value <= full_score(benchmark)


def is_whole_paper(tasks: Iterable[str], vlm: str | None, paper: Paper = PAPERS[DEFAULT]) -> bool:
    """Tell if tasks stand for the paper's nine benchmarks, each once: only then is our average its average.

    Never for other papers: their averages have benchmarks that a server or a language model scores.
    """
    if paper is not PAPERS[DEFAULT]:
        return False
    columns = [benchmark_of(task, vlm) for task in tasks]
    return None not in columns and sorted(columns) == sorted(set(BENCHMARKS.values()))


def read_printed(folder: Path | None = None, paper: str = DEFAULT) -> PrintedNumbers:
    """Read the tables of a paper and their errata.

    Parameters
    ----------
    folder
        Where the .csv files of all papers are; default: the package's own.
    paper
        A name of `PAPERS`.

    Raises
    ------
    ConfigError
        A file that can't be read as such a table.
    """
    folder = DATA if folder is None else folder
    numbers: dict[Key, Number] = {}
    files = [file for file in sorted(folder.glob("*.csv")) if file.name != ERRATA]
    rows = [row for file in files for row in _numbers(file, PAPERS[paper].name)]
    for key, number in sorted(rows, key=lambda row: _rank(row[1])):
        numbers.setdefault(key, number)
    return PrintedNumbers(numbers, _errata(folder / ERRATA, paper) if (folder / ERRATA).is_file() else (), PAPERS[paper])


def _numbers(file: Path, paper: str) -> Iterator[tuple[Key, Number]]:
    for row in _lines(file, _COLUMNS):
        percent = _percent(row)
        # a number without a rate (table 7, or matched by FLOPs) can't be held against a row at a rate
        if not row["paper"].startswith(paper) or not percent:
            continue
        named = {
            "method": _SAME_METHOD.get(row["method"], row["method"]),
            "benchmark": _OTHER_SCORE.get((row["benchmark"], row.get("metric")), row["benchmark"]),
            "pruning_rate_percent": percent,
        }
        try:
            yield _key(row | named), Number(float(row["value"]), row["table"], row["read_from"])
        except ValueError as error:
            raise ConfigError(f"{file}: can't be read as a table of printed numbers ({error}); mend the file.") from error


def _percent(row: dict[str, str]) -> str:
    """The percentage removed as text; empty if the table gives none, neither itself nor as the share that is kept."""
    if row["pruning_rate_percent"]:
        return row["pruning_rate_percent"]
    if row["method"] in ("vanilla", METHODS[UNPRUNED]):
        return "0"
    ratio = _RATIO.search(row.get("retained_tokens") or "")
    return str(100 - 100 * float(ratio[1])) if ratio else ""


def _errata(file: Path, paper: str) -> tuple[Erratum, ...]:
    texts: dict[int, str] = {}
    cells: dict[int, list[tuple[str, str, float | None, str]]] = {}
    corrected: dict[int, dict[Key, float]] = {}
    try:
        for row in _lines(file, _ERRATA_COLUMNS):
            if (row.get("paper") or DEFAULT) != paper:
                continue
            number, percent = int(row["number"]), row["pruning_rate_percent"]
            texts[number] = texts.get(number) or row["text"]
            where = (row["vlm"], row["method"], round(float(percent), 1) if percent else None, row["benchmark"])
            cells.setdefault(number, []).append(where)
            if row["corrected"]:
                corrected.setdefault(number, {})[_key(row | {"pruning_rate_percent": percent or "0"})] = float(row["corrected"])
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file}: can't be read as errata ({error}); mend the file.") from error
    return tuple(Erratum(number, texts[number], tuple(cells[number]), corrected.get(number, {})) for number in sorted(texts))


def _lines(file: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    try:
        with file.open(encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle)
            if not set(columns) <= set(reader.fieldnames or ()):
                raise ConfigError(f"{file}: lacks columns, expected {', '.join(columns)}; mend the file, or move it away.")
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{file}: can't be read as a table of printed numbers ({error}); mend the file.") from error


def _key(row: dict[str, str]) -> Key:
    return row["vlm"], row["method"], round(float(row["pruning_rate_percent"]), 1), row["benchmark"]


def _rank(number: Number) -> int:
    """Where a number was read twice, print comes before notes, and notes before a figure."""
    return 0 if number.read_from == PRINTED_TABLE else 2 if "digitised" in number.read_from else 1
