"""What the files of a results directory must hold before anything is computed from them: the folder may come from someone else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from vlm_pruner_eval.redact import short, spelled_out

# Names of runs become names of folders and pictures, so that nothing in them may lead elsewhere.
_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")
_LINE = {"key": str, "run_id": str, "label": str, "method": str}
_OTHERS = ("pruning_rate", "seed")
_MODEL = ("id", "pretrained", "revision", "dtype", "protocol", "attn_implementation", "batch_size")
_RECORD = ("config", "tasks", "tokens", "times", "provenance")


def grid_problems(grid: object) -> Iterator[str]:
    """Sentences about a sweep.json that is not the grid of a sweep."""
    if not isinstance(grid, dict) or not isinstance(grid.get("runs"), list) or not isinstance(grid.get("config"), dict):
        yield "sweep.json: is not the grid of a sweep, expected name, config and runs; run the sweep again to rewrite it."
        return
    name, config = grid.get("name"), grid["config"]
    if not (isinstance(name, str) and _FOLDER_NAME.fullmatch(name)):
        yield f"sweep.json: has the name {short(name)}, expected letters, digits, '.', '_' and '-'."
    model = config.get("model")
    missing = [key for key in _MODEL if not isinstance(model, dict) or key not in model]
    missing += [key for key in ("tasks", "limit", "seed") if key not in config]
    if missing or not isinstance(config["tasks"], list):
        yield f"sweep.json: config lacks {', '.join(missing) or 'a list of tasks'}; run the sweep again to rewrite it."
    for index, line in enumerate(grid["runs"]):
        yield from _line_problems(f"sweep.json: runs[{index}]", line)


def _line_problems(where: str, line: object) -> Iterator[str]:
    if not isinstance(line, dict):
        yield f"{where}: got {short(line)}, expected a mapping; run the sweep again to rewrite it."
        return
    wrong = [name for name, kind in _LINE.items() if not isinstance(line.get(name), kind)]
    wrong += [name for name in _OTHERS if name not in line]
    if wrong:
        yield f"{where}: lacks {', '.join(wrong)} or has another type there; run the sweep again to rewrite it."
        return
    for name in ("key", "run_id"):
        if not _FOLDER_NAME.fullmatch(line[name]):
            yield f"{where}.{name}: got {short(line[name])}, expected the name of a folder, which leads nowhere else."
    if spelled_out(line["label"]) != line["label"]:
        yield f"{where}.label: got {short(line['label'])}, expected text without control characters."


def record_problem(run_id: str, record: dict[str, Any]) -> str | None:
    """A sentence when the record of a finished run lacks a part."""
    missing = [name for name in _RECORD if not isinstance(record.get(name), dict)]
    if not missing:
        return None
    return f"{run_id}: run.json lacks {', '.join(missing)}; delete the run's folder and run the sweep again."
