"""What one reproduction runs: a model of the paper or a sweep file, the variants of the unpruned run, and the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vlm_pruner_eval
from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.redact import sentence, short
from vlm_pruner_eval.report.paper.printed import PAPER_MODELS, incomparable, paper_model
from vlm_pruner_eval.store.folder import Store
from vlm_pruner_eval.sweep import config as sweep_config
from vlm_pruner_eval.sweep.config import SweepConfig

REPOSITORY = Path(vlm_pruner_eval.__file__).parent.parent
BATCH_SIZES, ATTENTION = "1,16", "sdpa,eager"
_MOST_DIGITS = 9


@dataclass(frozen=True)
class Variant:
    """One way to run the same model, which would change nothing if arithmetic were exact."""

    batch_size: int
    attention: str

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"batch{self.batch_size}-{self.attention}"


@dataclass(frozen=True)
class Plan:
    """A reproduction that has been checked as far as possible without loading a model.

    Attributes
    ----------
    name
        Title of the report.
    rows
        The sweep of the pruned rows, under the reference variant.
    variants
        Of the unpruned run; the first is the reference.
    vlm
        Name of the model in results/paper, or None when the checkpoint is none of the paper's.
    incomparable
        Why printed numbers can't be held against this run; empty when they can.
    output
        Folder of the results: noise/VARIANT and rows are ordinary sweep results.
    """

    name: str
    rows: SweepConfig
    variants: tuple[Variant, ...]
    vlm: str | None
    incomparable: tuple[str, ...]
    output: Path

    @property
    def rows_dir(self) -> Path:
        """Results of the rows."""
        return self.output / "rows"

    def noise_dir(self, variant: Variant) -> Path:
        """Results of the unpruned run under a variant."""
        return self.output / "noise" / variant.name

    def noise_config(self, variant: Variant) -> SweepConfig:
        """A sweep of the unpruned run alone (it is in every grid, so no method needs to be named)."""
        name = f"{self.rows.name}-{variant.name}"
        return self.rows.model_copy(update={"name": name, "methods": [], "model": _under(variant, self.rows)})


def make_plan(
    *,
    model: str | None = None,
    config: Path | None = None,
    pretrained: str | None = None,
    tasks: str | None = None,
    limit: int | None = None,
    methods: Sequence[str] = (),
    batch_sizes: str = BATCH_SIZES,
    attention: str = ATTENTION,
    output: Path | None = None,
) -> Plan:
    """Check a request and plan it; the arguments are the options of `vlm-pruner-eval reproduce`.

    Raises
    ------
    ConfigError
        Every problem of the request. Nothing has been loaded or written.
    """
    from vlm_pruner_eval.sweep.grid import expand, method_problems  # torch

    path = _file(model, config)
    loaded = sweep_config.load(path, overrides={} if limit is None else {"limit": limit}, check=method_problems)
    variants, problems = _variants(batch_sizes, attention)
    problems += [*_task_problems(tasks, loaded), *_method_problems(methods, loaded)]
    if pretrained is not None and (not pretrained.strip() or sentence(pretrained) != pretrained):
        got = "control characters or a token" if pretrained.strip() else "an empty text"
        problems.append(f"pretrained: got {got}, expected a checkpoint folder or a hub id; or leave it out.")
    if problems:
        raise ConfigError(problems)
    changes: dict[str, Any] = {"methods": [entry for entry in loaded.methods if not methods or entry.name in methods]}
    if tasks is not None:
        changes["tasks"] = _listed(tasks)
    if pretrained is not None:
        changes["model"] = loaded.model.model_copy(update={"pretrained": pretrained, "revision": None})
    rows = loaded.model_copy(update=changes)
    rows = rows.model_copy(update={"model": _under(variants[0], rows)})
    expand(rows)  # values of the methods' parameters are checked here
    name = model or rows.name
    folder = output if output is not None else Path("output") / "reproduce" / name
    Store(folder).check_writable()
    paper = PAPER_MODELS[model] if model else paper_model(rows.model.pretrained)
    section = rows.model
    reasons = incomparable(paper, model_id=section.id, pretrained=section.pretrained, protocol=section.protocol, limit=rows.limit)
    return Plan(name, rows, variants, paper.vlm if paper else None, tuple(reasons), folder)


def _under(variant: Variant, config: SweepConfig) -> sweep_config.ModelSection:
    return config.model.model_copy(update={"batch_size": variant.batch_size, "attn_implementation": variant.attention})


def _file(model: str | None, config: Path | None) -> Path:
    if (model is None) == (config is None):
        got = "neither" if model is None else "both"
        raise ConfigError(f"got {got} of --model and --config, expected one of them: a model of the paper, or a sweep file.")
    if config is not None:
        return config
    if model not in PAPER_MODELS:
        raise ConfigError(f"model: got {model!r}, which is none of the paper's; {closest(model, PAPER_MODELS)}")
    path = REPOSITORY / "configs" / "paper" / PAPER_MODELS[model].file
    if not path.is_file():
        raise ConfigError(
            f"model: {path} is not there, expected the sweep file of {model} beside the package: it is installed without its "
            "repository. Run from a clone (pip install -e .), or give a sweep file with --config FILE."
        )
    return path


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _variants(batch_sizes: str, attention: str) -> tuple[tuple[Variant, ...], list[str]]:
    """Every batch size under the first attention, then under the next: neighbours share what has to be loaded."""
    from vlm_pruner_eval.lmms.settings import ATTENTION as KNOWN

    sizes, kinds, problems = _listed(batch_sizes), _listed(attention), []
    for size in sizes:
        if not (size.isdecimal() and size.isascii() and len(size) <= _MOST_DIGITS and int(size) >= 1):
            problems.append(f"batch-sizes: got {short(size)}, expected whole numbers, 1 or more, such as {BATCH_SIZES}.")
    for kind in kinds:
        if kind not in KNOWN:
            problems.append(f"attention: got {kind!r}, which is unknown; {closest(kind, KNOWN)}")
    if "flash_attention_2" in kinds and not _has_flash_attention():
        problems.append("attention: got flash_attention_2, but flash-attn is not installed or sees no GPU; leave it out, or install it.")
    for name, values, example in (("batch-sizes", sizes, BATCH_SIZES), ("attention", kinds, ATTENTION)):
        if not values:
            problems.append(f"{name}: got nothing, expected a list such as {example}.")
        elif len(set(values)) < len(values):
            problems.append(f"{name}: got {','.join(values)}, expected each value once; remove the repeats.")
    if problems:
        return (), problems
    return tuple(Variant(int(size), kind) for kind in kinds for size in sizes), []


def _has_flash_attention() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return is_flash_attn_2_available()


def _task_problems(tasks: str | None, config: SweepConfig) -> Iterator[str]:
    if tasks is None:
        return
    wanted = _listed(tasks)
    if not wanted:
        yield "tasks: got nothing, expected a list such as gqa,pope; or leave it out."
    if len(set(wanted)) < len(wanted):
        yield f"tasks: got {','.join(wanted)}, expected each task once; remove the repeats."
    for task in wanted:
        if task not in config.tasks:
            yield f"tasks: got {task!r}, which the sweep file does not hold; {closest(task, config.tasks)}"


def _method_problems(methods: Sequence[str], config: SweepConfig) -> Iterator[str]:
    known = {entry.name for entry in config.methods}
    for method in methods:
        if method not in known:
            yield f"method: got {method!r}, which the sweep file does not hold; {closest(method, known)}"
