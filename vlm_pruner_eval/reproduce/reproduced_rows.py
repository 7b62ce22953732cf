"""The rows of a reproduction: scores beside printed numbers, equivalence of the release rows, and how often quirks fired."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.paper.paper_comparison import Compared, PaperRow, Reference
from vlm_pruner_eval.report.paper.printed import AVERAGE
from vlm_pruner_eval.report.rows import rows_of
from vlm_pruner_eval.reproduce.noise import Noise
from vlm_pruner_eval.store.summaries import Spread


@dataclass(frozen=True)
class ReproducedRow(PaperRow):
    """A line of the table.

    Attributes
    ----------
    samples
        Prompts with images over all finished seeds.
    quirks
        Share of them in which a quirk fired (release) or would have fired.
    """

    samples: int
    quirks: dict[str, float]


def spreads_of(noise: Noise) -> dict[str, float | None]:
    """The measured noise by task, and of the relative average."""
    return {task: measured.spread for task, measured in noise.tasks.items()} | {AVERAGE: noise.average_spread}


def reproduced_rows(against: Reference, results: Results) -> list[ReproducedRow]:
    """Every row of the sweep under DIR/rows with its printed numbers."""
    return [_reproduced(against.compare(row, results.tasks)) for row in rows_of(results)]


def _reproduced(compared: PaperRow) -> ReproducedRow:
    tokens = compared.row.tokens
    quirks = {name: count / tokens.samples_with_images for name, count in tokens.quirks.items()}
    return ReproducedRow(compared.row, compared.cells, compared.average, tokens.samples_with_images, quirks)


def as_json(rows: list[ReproducedRow]) -> list[dict[str, Any]]:
    """The rows in plain types."""
    return [
        {
            **{name: getattr(item.row, name) for name in ("label", "method", "pruning_rate", "status")},
            "removed_percent": item.row.percent,
            "release": item.row.release,
            "scores": {task: compared_json(compared) for task, compared in item.cells.items() if item.row.cells},
            "relative_average": compared_json(item.average),
            "tokens_asked": _spread(item.row.tokens.asked),
            "tokens_kept": _spread(item.row.tokens.kept),
            "samples_with_images": item.samples,
            "quirks": {name: {"samples": item.row.tokens.quirks[name], "share": share} for name, share in item.quirks.items()},
            "problems": list(item.row.problems),
        }
        for item in rows
    ]


def _spread(found: Spread | None) -> dict[str, float] | None:
    return None if found is None else found.model_dump(exclude={"n"})


def compared_json(compared: Compared) -> dict[str, Any]:
    """A cell in plain types."""
    printed = None if compared.printed is None else dataclasses.asdict(compared.printed)
    return dataclasses.asdict(compared.cell) | {
        "printed": printed,
        "difference": compared.difference,
        "tolerance": compared.tolerance,
        "verdict": compared.verdict,
        "reason": compared.reason,
    }
