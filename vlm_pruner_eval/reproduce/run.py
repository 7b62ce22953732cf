"""Runs the stages of a reproduction, each an ordinary sweep that skips what is finished."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm_pruner_eval.report.load import Results, load_sweep
from vlm_pruner_eval.report.paper.gate import Gate
from vlm_pruner_eval.report.paper.paper_comparison import Reference
from vlm_pruner_eval.report.paper.printed import read_printed
from vlm_pruner_eval.reproduce.noise import Noise, measure_noise
from vlm_pruner_eval.reproduce.noise_gate import judge
from vlm_pruner_eval.reproduce.plan import Plan
from vlm_pruner_eval.reproduce.reproduced_rows import ReproducedRow, reproduced_rows, spreads_of
from vlm_pruner_eval.store.folder import Store
from vlm_pruner_eval.store.schema import FINISHED
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.grid import UNPRUNED, expand
from vlm_pruner_eval.sweep.opening import Loader, check_layers, check_methods, check_tasks
from vlm_pruner_eval.sweep.runner import Outcome, run_sweep
from vlm_pruner_eval.sweep.units import units_of


@dataclass(frozen=True)
class Reproduction:
    """All that was measured.

    Attributes
    ----------
    rows
        None when the gate stopped before them.
    results
        The sweep of the rows, None likewise.
    counts
        Runs of all stages: in the grids, finished before, failed now.
    """

    plan: Plan
    noise: Noise
    gate: Gate
    rows: list[ReproducedRow] | None
    results: Results | None
    counts: Outcome

    @property
    def failed(self) -> bool:
        """Tell if the exit code must not be 0: a run failed, or the unpruned row does not reproduce."""
        return self.counts.failed > 0 or self.gate.stops


def reproduce(
    plan: Plan, *, anyway: bool = False, console: Console | None = None, load: Loader | None = None, task_manager: Any = None
) -> Reproduction:
    """Measure the noise floor, judge the unpruned row, and run the rows if it reproduces (or `anyway`).

    Every variant loads the model anew, after the last one's has been freed: the weights are there once at any time.

    Parameters
    ----------
    plan
        From `make_plan`.
    anyway
        Run the pruned rows even if the unpruned row does not reproduce.
    console, load, task_manager
        As for `run_sweep`.

    Raises
    ------
    ConfigError
        What can't be run as asked. Problems of tasks, checkpoint and methods come up before anything is written.
    """
    console = console or Console(stderr=True)
    printed = read_printed(paper=plan.rows.paper)
    if load is None:
        check_layers(plan.rows.model)
    stages = _Stages(console, _OneAtATime(plan, load), check_tasks(plan.rows, task_manager))
    for variant in plan.variants:
        console.print(f"Noise floor: unpruned, batch size {variant.batch_size}, {variant.attention} attention", highlight=False)
        stages.run(plan.noise_config(variant), plan.noise_dir(variant))
    noise = measure_noise(plan)
    gate = judge(noise, printed, plan.vlm, plan.incomparable)
    console.print(gate.sentence, markup=False, highlight=False, soft_wrap=True)
    if gate.stops and not anyway:
        return Reproduction(plan, noise, gate, None, None, stages.counts)
    console.print("Rows of the table", highlight=False)
    _hand_on_unpruned(plan)
    stages.run(plan.rows, plan.rows_dir)
    results = load_sweep(plan.rows_dir)
    rows = reproduced_rows(Reference(plan.vlm, printed, gate, spreads_of(noise)), results)
    return Reproduction(plan, noise, gate, rows, results, stages.counts)


class _Stages:
    """Runs sweeps one after the other and adds their counts up."""

    def __init__(self, console: Console, load: Loader, task_manager: Any):
        self._console, self._load, self._task_manager = console, load, task_manager
        self.counts = Outcome(0, 0, 0)

    def run(self, config: SweepConfig, output: Path) -> None:
        """One sweep."""
        done = run_sweep(config, output, console=self._console, load=self._load, task_manager=self._task_manager)
        before = self.counts
        self.counts = Outcome(before.runs + done.runs, before.skipped + done.skipped, before.failed + done.failed)


class _OneAtATime:
    """A loader that frees the former model first, and lets the model refuse methods of the rows before any stage has run."""

    def __init__(self, plan: Plan, load: Loader | None):
        self._rows, self._load = expand(plan.rows), load

    def __call__(self, model_id: str, **args: object) -> Any:
        _free_memory()
        load = self._load
        if load is None:
            from vlm_pruner_eval.lmms.families import load
        model = load(model_id, **args)
        check_methods(model, self._rows)
        return model


def _free_memory() -> None:
    """Models hold references to themselves through their hooks, so only a collection lets go of a former one."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _hand_on_unpruned(plan: Plan) -> None:
    """The unpruned row of the table is the reference of the noise floor: the same run, which need not be run again."""
    noise, rows = Store(plan.noise_dir(plan.variants[0])), Store(plan.rows_dir)
    for unit in units_of(plan.rows, [run for run in expand(plan.rows) if run.method == UNPRUNED]):
        there, here = unit.stored(noise), unit.stored(rows)
        if there.status(plan.rows.limit) == FINISHED and here.status(plan.rows.limit) is None:
            rows.write_head(unit.run.head)
            there.copy_to(here)
