"""The numbers that the paper prints, as results/paper holds them, and how tasks of lmms-eval map onto its columns."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.reproduce.plan import REPOSITORY
from vlm_pruner_eval.sweep.grid import UNPRUNED

AVERAGE = "Avg"
# Tasks that ask what the paper asked. textvqa_val (no OCR tokens in the prompt) and ok_vqa_val2014 (an 'Unanswerable'
# clause) ask something else, so no printed number stands for them.
BENCHMARKS = {
    "gqa": "GQA",
    "mmbench_en_dev_static": "MMB",
    "mme": "MME",
    "mme_total": "MME",
    "pope": "POPE",
    "pope_splits": "POPE",
    "scienceqa_img": "SQA",
    "textvqa_val_ocr": "VQAText",
    "ocrbench": "OCRBench",
    "seedbench": "SEED",
    "seedbench_image": "SEED",
    "ok_vqa_val2014_plain": "OKVQA",
}
METHODS = {UNPRUNED: "vanilla (upper bound)", "vlmpruner": "VLM-Pruner", "fastv": "FastV", "dart": "DART", "divprune": "DivPrune"}
_FULL_SCORE = {"MME": 2800.0, "OCRBench": 1000.0}
_PAPER = "VLM-Pruner"  # files of other papers may lie beside
_COLUMNS = ("paper", "table", "vlm", "method", "pruning_rate_percent", "benchmark", "value", "read_from")


@dataclass(frozen=True)
class Number:
    """A printed number and where it was read."""

    value: float
    table: str
    read_from: str


@dataclass(frozen=True)
class PrintedNumbers:
    """All numbers of the paper, by model, method, percentage removed (one decimal) and benchmark."""

    numbers: dict[tuple[str, str, float, str], Number]

    def find(self, vlm: str | None, method: str, percent: float | None, benchmark: str | None) -> Number | None:
        """The printed number of a cell, or None; `percent` None is the unpruned model."""
        if vlm is None or method not in METHODS or benchmark is None:
            return None
        return self.numbers.get((vlm, METHODS[method], round(percent or 0.0, 1), benchmark))

    def has_sound_averages(self, vlm: str) -> bool:
        """Whether no upper bound that the model's averages divide by is above the benchmark's own maximum."""
        bounds = {key[3]: number for key, number in self.numbers.items() if key[:2] == (vlm, METHODS[UNPRUNED])}
        return all(is_possible(number, benchmark) for benchmark, number in bounds.items())


def full_score(benchmark: str | None) -> float:
    """The best score that a benchmark can give, in its own unit: 2800 for MME, 1000 for OCRBench, else 100."""
    return _FULL_SCORE.get(benchmark, 100.0)


def is_possible(number: Number, benchmark: str) -> bool:
    """Whether a printed number is at most the benchmark's maximum (2826 for MME is not: see results/paper/README.md)."""
    return benchmark == AVERAGE or number.value <= full_score(benchmark)


def is_whole_paper(tasks: Iterable[str]) -> bool:
    """Whether tasks stand for the paper's nine benchmarks, each once: only then is our average its average."""
    columns = [BENCHMARKS.get(task) for task in tasks]
    return None not in columns and sorted(columns) == sorted(set(BENCHMARKS.values()))


def read_printed(folder: Path | None = None) -> PrintedNumbers:
    """Read the tables of the paper; without the repository there are none.

    Parameters
    ----------
    folder
        Where the .csv files are; default: results/paper beside the package.

    Raises
    ------
    ConfigError
        A file that can't be read as such a table.
    """
    numbers: dict[tuple[str, str, float, str], Number] = {}
    rows = [row for file in sorted((folder or REPOSITORY / "results" / "paper").glob("*.csv")) for row in _rows(file)]
    for key, number in sorted(rows, key=lambda row: _rank(row[1])):
        numbers.setdefault(key, number)
    return PrintedNumbers(numbers)


def _rows(file: Path) -> Iterator[tuple[tuple[str, str, float, str], Number]]:
    try:
        with file.open(encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle)
            if not set(_COLUMNS) <= set(reader.fieldnames or ()):
                raise ConfigError(f"{file}: lacks columns, expected {', '.join(_COLUMNS)}; mend the file, or move it away.")
            for row in reader:
                # a number without a rate (table 7) can't be held against a row at a rate
                if row["paper"].startswith(_PAPER) and row["pruning_rate_percent"]:
                    key = (row["vlm"], row["method"], round(float(row["pruning_rate_percent"]), 1), row["benchmark"])
                    yield key, Number(float(row["value"]), row["table"], row["read_from"])
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file}: can't be read as a table of printed numbers ({error}); mend the file.") from error


def _rank(number: Number) -> int:
    """Where a number was read twice, print comes before notes, and notes before a figure."""
    return 0 if number.read_from == "printed table" else 2 if "digitised" in number.read_from else 1
