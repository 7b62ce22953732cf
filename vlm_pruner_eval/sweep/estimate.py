"""What a sweep will keep, ask, take and write, before anything is loaded: computed where it can be, measured where it was, else unknown."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_pruner_eval.budget import keep_count
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.store.folder import Store
from vlm_pruner_eval.store.schema import RunHead, UnitRecord
from vlm_pruner_eval.store.summaries import Spread
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.grid import UNPRUNED, Run
from vlm_pruner_eval.sweep.metrics.clusters import RESAMPLES

# Bytes of what does not depend on tokens, as in real runs: all else of an answer with its score; a resampled value; a record.
_SAMPLE_BYTES, _DRAW_BYTES, _RECORD_BYTES = 1400, 9, 8500
_PICTURE_BYTES = 70_000  # a photo of 768 pixels


@dataclass(frozen=True)
class Kept:
    """Visual tokens of one image that a run keeps; None where the sweep file says too little."""

    kept: int | None
    layer_averaged: float | None


@dataclass(frozen=True)
class Questions:
    """Questions of one run by task; None where only the data set knows, and not exact where it may hold fewer."""

    by_task: Mapping[str, int | None]
    is_exact: bool

    @property
    def total(self) -> int | None:
        """Of a run."""
        return None if None in self.by_task.values() else sum(self.by_task.values())


@dataclass(frozen=True)
class Pace:
    """What earlier units took: for each question, and for everything else; how near they are to the run in question."""

    per_question_s: float
    per_unit_s: float
    nearness: str


@dataclass(frozen=True)
class Disk:
    """Bytes of all records, and of the pictures at most."""

    records: int
    pictures: int


def kept_tokens(run: Run, n_visual: int | None, layers: int | None) -> Kept:
    """What the method keeps of an image of `n_visual` tokens, after its last cut and on average over layers.

    Raises
    ------
    ConfigError
        The method can't keep what it is asked in a model of so many layers.
    """
    from vlm_pruner_eval.pruners import get_pruner

    pruner = get_pruner(run.method, pruning_rate=0 if run.pruning_rate is None else run.pruning_rate, **run.params)
    if n_visual is None or (layers is None and pruner.budget == "layer_average" and pruner.layer):
        return Kept(None, None)
    if pruner.before_model:
        count = keep_count(n_visual, pruner.pruning_rate)
        return Kept(count, float(count))
    if layers is None:
        return Kept(pruner.default_keep(n_visual), None)
    lengths = [n_visual] * layers
    try:
        stages = pruner.stages(layers)
    except ConfigError as error:
        raise ConfigError(f"{run.key}: {problem}" for problem in error.problems) from error
    for stage in stages:
        lengths[stage.layer :] = [pruner.keep_at(stage, n_visual)] * len(lengths[stage.layer :])
    return Kept(lengths[-1], statistics.fmean(lengths))


@dataclass(frozen=True)
class Earlier:
    """A finished unit of a results directory, with the configuration of its run."""

    head: RunHead
    unit: UnitRecord

    @property
    def model(self) -> Mapping[str, Any]:
        """The model section."""
        return self.head.config["model"]


def read_earlier(store: Store) -> list[Earlier]:
    """All finished units in a results directory, whatever sweep file they are of."""
    return [Earlier(head, unit) for head, units in store.other_runs(()) for unit in units]


def visual_tokens(config: SweepConfig, earlier: Iterable[Earlier]) -> int | None:
    """Of a question: as the sweep file says, else as unpruned earlier runs of this model counted them."""
    if config.model.visual_tokens is not None:
        return config.model.visual_tokens
    unpruned = [one.unit.tokens.n_visual for one in earlier if one.head.run.method == UNPRUNED and _is_of(one, config)]
    counted = Spread.merged(unpruned)
    return None if counted is None else round(counted.mean)


def layers_of(config: SweepConfig, earlier: Iterable[Earlier]) -> int | None:
    """Decoder layers, in the same way."""
    if config.model.layers is not None:
        return config.model.layers
    return next((n for one in earlier if _is_of(one, config) and (n := one.unit.provenance.model.get("layers"))), None)


def count_questions(config: SweepConfig, earlier: Iterable[Earlier] = ()) -> Questions:
    """Questions of one run: exactly of packaged tasks and of tasks that were asked with this limit before, else the limit itself.

    A group of lmms-eval asks the limit of each of its tasks, so `is_exact` is False for the limit of a name that is not packaged.
    """
    from vlm_pruner_eval.embedded import GROUP, TASKS

    wanted: dict[str, int | None] = {}
    packaged = _packaged()
    for task in config.tasks:
        for name in [f"{GROUP}_{part}" for part in TASKS] if task == GROUP else [task]:
            whole = packaged.get(name)
            wanted[name] = config.limit if whole is None else min(whole, config.limit or whole)
    if wanted.keys() <= packaged.keys():
        return Questions(wanted, True)
    answered = {one.unit.task: one.unit.n_answers for one in earlier if one.unit.limit == config.limit}
    if all(task in answered for task in config.tasks):
        return Questions({task: answered[task] for task in config.tasks}, True)
    return Questions(wanted, False)


def _packaged() -> dict[str, int]:
    """Questions of every packaged task."""
    import pyarrow.parquet

    from vlm_pruner_eval.embedded import GROUP, questions_path

    column = pyarrow.parquet.read_table(questions_path(), columns=["task"])["task"]
    return {f"{GROUP}_{task}": count for task, count in Counter(column.to_pylist()).items()}


# ---- disk
def sample_bytes(n_visual: int, kept: int) -> int:
    """Bytes of one answer with its score: two bytes a kept token (four of more than 65,536), in base 64, unless nothing was cut."""
    return _SAMPLE_BYTES + (0 if kept == n_visual else math.ceil(kept * (2 if n_visual <= 2**16 else 4) * 4 / 3))


def disk(config: SweepConfig, kept: Sequence[int], n_visual: int, questions: Questions) -> Disk:
    """Bytes that runs write, one for each number in `kept`; the report is not counted."""
    samples = [sample_bytes(n_visual, count) * questions.total for count in kept]
    beside = (_RECORD_BYTES + _DRAW_BYTES * RESAMPLES) * len(config.tasks)
    pictures = sum(min(config.gallery, count) for count in questions.by_task.values()) * _PICTURE_BYTES
    return Disk(sum(samples) + beside * len(kept), pictures)


# ---- time
def pace(run: Run, earlier: Iterable[Earlier]) -> Pace | None:
    """What the nearest earlier runs of the same model took: of the same method and rate, of the method, or of any; None without one.

    Runs that shared their work have no times, and are left out.
    """
    groups: dict[str, list[tuple[float, float]]] = {"the same method and rate": [], "the same method": [], "other methods": []}
    for one in earlier:
        times, n, line = one.unit.times, one.unit.n_answers, one.head.run
        if times.total_s is None or not n or one.model != run.config["model"]:
            continue
        same_method = line.method == run.method and line.parameters == run.config["parameters"]
        same_rate = same_method and line.pruning_rate == run.pruning_rate
        nearness = list(groups)[0 if same_rate else 1 if same_method else 2]
        groups[nearness].append((times.answers_s / n, times.total_s - times.answers_s))
    for nearness, found in groups.items():
        if found:
            return Pace(statistics.fmean(each for each, _ in found), statistics.fmean(rest for _, rest in found), nearness)
    return None


def _is_of(one: Earlier, config: SweepConfig) -> bool:
    """Tell if a unit is of this checkpoint under this protocol."""
    return all(one.model[name] == getattr(config.model, name) for name in ("id", "pretrained", "revision", "protocol"))
