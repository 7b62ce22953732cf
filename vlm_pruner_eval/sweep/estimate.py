"""What a sweep will keep, ask, take and write, before anything is loaded: computed where it can be, measured where it was, else unknown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_pruner_eval.budget import keep_count
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.clusters import RESAMPLES
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.grid import UNPRUNED, Run
from vlm_pruner_eval.sweep.store import FINISHED, Store

# Bytes of what does not depend on tokens, as in real runs: all else of a sample; a resampled value; a record.
_SAMPLE_BYTES, _DRAW_BYTES, _RECORD_BYTES = 900, 9, 8500
_PICTURE_BYTES = 70_000  # a photo of 768 pixels
_LAYERS = 32  # of a model that says nothing: they are a small part of a sample


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
    """What earlier runs took: for each question, and for everything else of a run; how near they are to the run in question."""

    per_question_s: float
    per_run_s: float
    nearness: str


@dataclass(frozen=True)
class Disk:
    """Bytes of all records, and of the pictures at most; what the journals of runs on their way take at a time."""

    records: int
    pictures: int
    journals: int


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


def read_earlier(store: Store) -> list[dict[str, Any]]:
    """Records of all finished runs in a results directory, whatever sweep file they are of."""
    folders = sorted(path.parent for path in store.root.glob("runs/*/run.json"))
    records = [record for folder in folders if (record := store.read(folder.name)) is not None]
    return [record for record in records if record["status"] == FINISHED]


def visual_tokens(config: SweepConfig, earlier: Iterable[Mapping[str, Any]]) -> int | None:
    """Of a question: as the sweep file says, else as unpruned earlier runs of this model counted them."""
    if config.model.visual_tokens is not None:
        return config.model.visual_tokens
    unpruned = [record for record in earlier if record["method"] == UNPRUNED and _is_of(record, config)]
    counts = [record["tokens"]["n_visual"]["mean"] for record in unpruned if record["tokens"]["n_visual"]]
    return round(statistics.fmean(counts)) if counts else None


def layers_of(config: SweepConfig, earlier: Iterable[Mapping[str, Any]]) -> int | None:
    """Decoder layers, in the same way."""
    if config.model.layers is not None:
        return config.model.layers
    return next((n for record in earlier if _is_of(record, config) and (n := record["provenance"]["model"].get("layers"))), None)


def count_questions(config: SweepConfig, earlier: Iterable[Mapping[str, Any]] = ()) -> Questions:
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
    for record in earlier:
        if record["config"]["tasks"] == config.tasks and record["config"]["limit"] == config.limit:
            return Questions({"all": record["n_answers"]}, True)
    return Questions(wanted, False)


def _packaged() -> dict[str, int]:
    """Questions of every packaged task."""
    import pyarrow.parquet

    from vlm_pruner_eval.embedded import GROUP, questions_path

    column = pyarrow.parquet.read_table(questions_path(), columns=["task"])["task"]
    return {f"{GROUP}_{task}": count for task, count in Counter(column.to_pylist()).items()}


# ---- disk
def sample_bytes(n_visual: int, kept: int, layers: int) -> int:
    """Bytes of one answer in samples.jsonl: the kept positions and their order, and two lengths of every layer, are most of it."""
    digits = sum(len(str(position)) for position in range(n_visual)) / max(1, n_visual)
    return round(_SAMPLE_BYTES + 2 * kept * (digits + 2) + 2 * layers * (len(str(n_visual)) + 2))


def disk(config: SweepConfig, kept: Sequence[int], n_visual: int, layers: int | None, questions: Questions) -> Disk:
    """Bytes that runs write, one for each number in `kept`; the report is not counted."""
    samples = [sample_bytes(n_visual, count, layers or _LAYERS) * questions.total for count in kept]
    beside = _RECORD_BYTES + _DRAW_BYTES * RESAMPLES * len(config.tasks)
    pictures = sum(min(config.gallery, count) for count in questions.by_task.values()) * _PICTURE_BYTES
    journals = sum(samples) if config.share_prefix else max(samples, default=0)
    return Disk(sum(samples) + beside * len(kept), pictures, journals)


# ---- time
def pace(run: Run, earlier: Iterable[Mapping[str, Any]]) -> Pace | None:
    """What the nearest earlier runs of the same model took: of the same method and rate, of the method, or of any; None without one.

    Runs that shared their work have no times, and are left out.
    """
    groups: dict[str, list[tuple[float, float]]] = {"the same method and rate": [], "the same method": [], "other methods": []}
    for record in earlier:
        total_s, n = record["times"].get("total_s"), record["n_answers"]
        if total_s is None or not n or record["config"]["model"] != run.config["model"]:
            continue
        answers_s = record["times"].get("answers_s", total_s)
        same_method = record["method"] == run.method and record["config"]["parameters"] == run.config["parameters"]
        same_rate = same_method and record["pruning_rate"] == run.pruning_rate
        nearness = list(groups)[0 if same_rate else 1 if same_method else 2]
        groups[nearness].append((answers_s / n, total_s - answers_s))
    for nearness, found in groups.items():
        if found:
            return Pace(statistics.fmean(each for each, _ in found), statistics.fmean(rest for _, rest in found), nearness)
    return None


def _is_of(record: Mapping[str, Any], config: SweepConfig) -> bool:
    """Whether a record is of this checkpoint under this protocol."""
    model = record["config"]["model"]
    return all(model[name] == getattr(config.model, name) for name in ("id", "pretrained", "revision", "protocol"))
