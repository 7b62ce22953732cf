"""Results as pandas tables, for notebooks and scripts."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_pruner_eval.store.folder import Store
from vlm_pruner_eval.store.schema import Grid, RunLine, RunRecord
from vlm_pruner_eval.sweep.grid import RATELESS, UNPRUNED

if TYPE_CHECKING:
    import pandas as pd

_ANSWER = ("task", "split", "doc_id", "choice", "question", "answer", "error", "loglikelihood", "n_prompt_tokens", "n_new_tokens")
_TIMES = ("prefill_ms", "decode_ms", "batch_size", "peak_bytes")
_KEPT = ("n_visual", "n_asked", "n_kept", "n_images", "layer", "layer_averaged", "selection_ms", "kv_bytes")


class Frames(NamedTuple):
    """Three tables; `run` (the key of a run), `method`, `label`, `seed` and `pruning_rate` stand in each of them.

    Attributes
    ----------
    runs
        A row a run of the grid, finished or not: `status`, visual tokens a prompt (`n_visual`, `asked`, `kept`, `layer_averaged`),
        median times in milliseconds, `flops` of a prefill, `parameters`.
    scores
        A row a run and benchmark: `metric`, `value` in the unit of papers, its 95 % interval `low` to `high`, documents `n`.
    answers
        A row an answer (a choice, if choices are scored): question, answer, target (text), `score` in [0, 1], tokens, times.
        `pruning_rate` is the fraction removed: 0 for the unpruned run, 1 for `blind`.
    """

    runs: pd.DataFrame
    scores: pd.DataFrame
    answers: pd.DataFrame


def load_results(directory: Path | str) -> Frames:
    """Read a results directory.

    Raises
    ------
    ConfigError
        The folder holds no sweep, or a file that is not what was written.
    """
    import pandas as pd

    store = Store(Path(directory))
    grid = store.read_grid()
    records = [(line, store.read(line, grid.units, grid.config.get("limit"))) for line in grid.runs]
    runs = [_run_row(line, record) for line, record in records]
    scores = [row for line, record in records if record is not None for row in _score_rows(line, record)]
    answers = [row for line, record in records if record is not None for row in _answer_rows(store, grid, line, record)]
    return Frames(pd.DataFrame(runs), pd.DataFrame(scores), pd.DataFrame(answers))


def _named(line: RunLine) -> dict[str, Any]:
    rates = {UNPRUNED: 0.0} | dict.fromkeys(RATELESS, 1.0)
    rate = rates[line.method] if line.method in rates else float(Fraction(line.pruning_rate))
    return {"run": line.key, "method": line.method, "label": line.label, "seed": line.seed, "pruning_rate": rate}


def _run_row(line: RunLine, record: RunRecord | None) -> dict[str, Any]:
    row = _named(line) | {"run_id": line.run_id, "parameters": line.parameters}
    if record is None:
        return row | {"status": "not run"}
    spreads = {name: getattr(record.tokens, name) for name in ("n_visual", "asked", "kept", "layer_averaged")}
    spreads |= {name: getattr(record.memory, name) for name in ("flops", "kv_bytes_counted")}
    medians = {name: getattr(record.times, name) for name in ("prefill_ms", "decode_ms", "selection_ms")}
    return (
        row
        | {"status": record.status or "unfinished", "answers": record.n_answers, "problem": record.problem}
        | {name: None if spread is None else spread.mean for name, spread in spreads.items()}
        | {name: None if median is None else median.median for name, median in medians.items()}
    )


def _score_rows(line: RunLine, record: RunRecord) -> Iterator[dict[str, Any]]:
    for task, score in record.scores.items():
        main = score.main
        shown = {name: None if main is None else getattr(main, name) for name in ("metric", "value", "low", "high", "n")}
        yield _named(line) | {"task": task} | shown


def _answer_rows(store: Store, grid: Grid, line: RunLine, record: RunRecord) -> Iterator[dict[str, Any]]:
    limit = grid.config.get("limit")
    for task in record.units:
        unit = store.unit(line.run_id, grid.units[task])
        scores = {(score.task, score.doc_id): score for score in unit.each_score()}
        for answer in unit.answers():
            score = scores.get((answer.task, answer.doc_id))
            if limit is not None and answer.doc_id >= limit:
                continue
            row = _named(line) | {name: getattr(answer, name) for name in (*_ANSWER, *_TIMES)}
            target = None if score is None or score.target is None else str(score.target)
            row |= {"target": target, "score": None if score is None else score.score, "images": list(answer.images)}
            yield row | {name: None if answer.record is None else getattr(answer.record, name) for name in _KEPT}
