"""From a sweep file to its list of runs; a run's identity is a hash of its resolved configuration (see also `identity`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from vlm_pruner_eval.budget import rate_at_layer_average
from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.method_table import built_in_methods
from vlm_pruner_eval.redact import short
from vlm_pruner_eval.store.schema import Grid, RunHead, RunLine
from vlm_pruner_eval.sweep import identity
from vlm_pruner_eval.sweep.config import ENTRY_KEYS, MethodEntry, SweepConfig, canonical_rate
from vlm_pruner_eval.vlms import by_model_id

UNPRUNED = "none"
_MOST_RUNS = 10_000
_LONGEST_KEY = 200  # with its hash a folder's name, which most file systems end at 255 bytes
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]")
RATELESS = frozenset({"blind"})  # keeps no visual token, so a rate means nothing to it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One row of the grid: the loaded model under one method, rate and seed. It does not depend on tasks and limit.

    Attributes
    ----------
    key
        Readable name, unique in a sweep and stable over versions.
    run_id
        `key` and the first ten hexadecimal digits of the hash of `config`.
    label
        Text for tables.
    method, pruning_rate, params
        What `PrunedModel.configure` is called with; params as the user gave them, with the seed.
    seed
        Seed of a method that draws random numbers, else None.
    config
        The resolved configuration, with every parameter of the method, defaults included.
    changed
        The parameters that differ from the method's defaults.
    asked_rate
        The sweep file's rate under which tables list the run; `pruning_rate` but for iso-compute rows.
    iso_layer
        Of an iso-compute row: the layer of the methods that it matches in compute.
    """

    key: str
    run_id: str
    label: str
    method: str
    pruning_rate: str | float | None
    params: dict[str, Any]
    seed: int | None
    config: dict[str, Any]
    changed: dict[str, Any]
    asked_rate: str | float | None
    iso_layer: int | None = None

    @property
    def line(self) -> RunLine:
        """What the report needs to know of a run that may not have happened."""
        fields = ("key", "run_id", "label", "method", "pruning_rate", "seed", "changed", "asked_rate", "iso_layer")
        return RunLine(**{name: getattr(self, name) for name in fields}, parameters=self.config["parameters"])

    @property
    def head(self) -> RunHead:
        """run.json."""
        return RunHead(run=self.line, config=self.config)


def grid_of(config: SweepConfig, runs: Sequence[Run], folders: dict[str, str] | None = None) -> Grid:
    """Content of sweep.json; `folders` of `unit_folders`, if it was asked before."""
    units = unit_folders(config) if folders is None else folders
    return Grid(name=config.name, config=config.model_dump(), runs=[run.line for run in runs], units=units)


def unit_folders(config: SweepConfig) -> dict[str, str]:
    """Task -> name of its folder in every run's, in the order of the sweep file.

    A task that is not of this package has a digest of its files behind its name: edited ones are answered anew, and the old answers stay.
    """
    sources = identity.task_sources(config.tasks, config.include_path)
    return {task: "-".join(filter(None, (_UNFIT.sub("-", task), sources.get(task)))) for task in config.tasks}


def expand(config: SweepConfig) -> list[Run]:
    """All runs of a sweep: the unpruned one first, then methods x rates x seeds.

    Raises
    ------
    ConfigError
        Unknown methods or parameters, values out of range, runs that are there twice: all at once.
    """
    n_runs = sum(len(entry.seeds or (0,)) for entry in config.methods) * len(config.rates)
    if n_runs > _MOST_RUNS:
        raise ConfigError(f"methods: rates and seeds make {n_runs} runs, expected at most {_MOST_RUNS}; split them into several files.")
    problems: list[str] = []
    runs = [_make_run(config, label="unpruned", method=UNPRUNED)]
    for index, (entry, label) in enumerate(zip(config.methods, _labels(config.methods), strict=True)):
        try:
            runs += _runs_of(config, entry, label)
        except ConfigError as error:
            problems += [f"methods[{index}]: {problem}" for problem in error.problems]
    problems += [*_duplicates(runs), *budget_mixtures(config.model.id, ((run.key, run.method, run.config["parameters"]) for run in runs))]
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return runs


def method_problems(raw: dict[str, Any]) -> list[str]:
    """Unknown names in the raw mapping of a sweep file, which may have other problems as well: methods, parameters, model settings."""
    from vlm_pruner_eval.lmms.settings import named_problems
    from vlm_pruner_eval.pruners import parameters, pruner_class

    model = raw["model"] if isinstance(raw.get("model"), dict) else {}
    model = {name: value for name, value in model.items() if name != "dtype"}  # the schema lists those
    problems = [f"model.{problem}" for problem in named_problems(model)]
    entries = raw.get("methods")
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        given = entry if isinstance(entry, dict) else {"name": entry}
        if not isinstance(given.get("name"), str):
            continue  # the schema says so
        try:
            known = {*ENTRY_KEYS, *parameters(pruner_class(given["name"]))}
        except ConfigError as error:
            problems += [f"methods[{index}]: {problem}" for problem in error.problems]
            continue
        name = given["name"]
        problems += [
            f"methods[{index}]: {name}: unknown parameter {short(key)}; {closest(key, known)}" for key in given if key not in known
        ]
    return problems


def budget_mixtures(model_id: str, runs: Iterable[tuple[str, str, dict[str, Any]]]) -> Iterator[str]:
    """A sentence for each budget rule in which runs (key, method, parameters) of one table differ from its first pruned run.

    One table has one scope of the budget, and either kept or layer-averaged counts. Where nothing precedes the cut (layer 0), both
    counts are the same, and methods with several cuts have a schedule of their own, so only their scope is compared. Budgets a view and
    an image are one where an image has one view. Rows without a budget don't count.
    """
    family = by_model_id().get(model_id)
    one_view = {} if family is None or family.spec.tiled else {"per_view": "per_image"}
    first: dict[str, tuple[str, str]] = {}
    for key, method, parameters in runs:
        if method == UNPRUNED or method in RATELESS:
            continue
        has_schedule = "layer" not in built_in_methods().get(method, {"layer"})
        for name in ("scope",) if has_schedule or parameters.get("layer") == 0 else ("scope", "budget"):
            value = one_view.get(parameters.get(name), parameters.get(name))
            other, expected = first.setdefault(name, (key, value))
            if value != expected:
                yield (
                    f"{key}: has {name} {value}, but {other} has {expected}; a table does not mix the two meanings of a budget: "
                    "put them into separate sweep files and folders."
                )


def rate_percent(rate: str | float | None) -> float | None:
    """A rate as a percentage of tokens removed."""
    return None if rate is None else float(Fraction(rate)) * 100


def run_hash(config: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a resolved configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _labels(entries: Sequence[MethodEntry]) -> list[str]:
    """Return the labels of entries; of several without one, which would have one name, those with parameters are told apart by them."""
    times = Counter((entry.shown, bool(entry.seeds)) for entry in entries if entry.label is None)
    return [_label(entry, is_alone=entry.label is not None or times[entry.shown, bool(entry.seeds)] == 1) for entry in entries]


def _label(entry: MethodEntry, *, is_alone: bool) -> str:
    if is_alone or not entry.parameters:
        return entry.shown
    return f"{entry.shown} {', '.join(f'{name}={value}' for name, value in entry.parameters.items())}"


def _runs_of(config: SweepConfig, entry: MethodEntry, label: str) -> Iterator[Run]:
    from vlm_pruner_eval.pruners import parameters, pruner_class  # torch: only where a grid is really built

    known = parameters(pruner_class(entry.name))
    if entry.name == UNPRUNED:
        raise ConfigError("got none, but the unpruned run is always in the grid; leave it out.")
    if "pruning_rate" in entry.parameters:
        raise ConfigError("pruning_rate: the rates of a sweep stand in pruning_rates (or keep_tokens); leave it out here.")
    if "seed" in known and entry.seeds and "seed" in entry.parameters:
        raise ConfigError("got both seed and seeds, expected one of them.")
    if entry.seeds and "seed" not in known:
        raise ConfigError(f"seeds: method {entry.name} draws no random numbers (it has no parameter seed); leave seeds out.")
    seeds = entry.seeds or ((entry.parameters.get("seed", config.seed),) if "seed" in known else (None,))
    rates = [None] if entry.name in RATELESS else config.rates
    problems: list[str] = []
    if entry.iso_layer is not None and (entry.name in RATELESS or (layer := entry.parameters.get("layer", known.get("layer"))) != 0):
        got = "it has no rate" if entry.name in RATELESS else f"it prunes at layer {layer}"
        raise ConfigError(
            f"iso_layer: got method {entry.name}, but {got}; expected a method that prunes at layer 0 (others take budget: layer_average)."
        )
    for rate in rates:
        for seed in seeds:
            params = dict(entry.parameters) if seed is None else entry.parameters | {"seed": seed}
            try:
                yield _make_run(config, label=label, method=entry.name, asked_rate=rate, params=params, seed=seed, entry=entry)
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(dict.fromkeys(problems))


def _make_run(
    config: SweepConfig,
    *,
    label: str,
    method: str,
    asked_rate: str | float | None = None,
    params: dict[str, Any] | None = None,
    seed: int | None = None,
    entry: MethodEntry | None = None,
) -> Run:
    params, rate, iso_layer = params or {}, asked_rate, entry.iso_layer if entry else None
    many = entry is not None and bool(entry.seeds)  # the seed tells runs apart, so it is part of the key
    parts = (_slug(label), _slug(str(asked_rate)) if asked_rate is not None else "", f"seed{seed}" if many else "")
    key = "-".join(part for part in parts if part)
    if len(key) > _LONGEST_KEY:
        raise ConfigError(f"label: names a run by {len(key)} characters, expected at most {_LONGEST_KEY}; give the method a shorter label.")
    if iso_layer is not None:
        rate = canonical_rate(rate_at_layer_average(asked_rate, iso_layer, config.model.layers))
    resolved = {
        "model": config.model.model_dump(exclude={"visual_tokens", "layers", "workers"}),
        "method": method,
        "pruning_rate": rate,
        "parameters": _every_parameter(method, rate, params),
        "seed": config.seed,
        "results_version": identity.RESULTS_VERSION,
        "sources": _method_source(method),
    }
    return Run(
        key=key,
        run_id=f"{key}-{run_hash(resolved)[:10]}",
        label=label,
        method=method,
        pruning_rate=rate,
        params=params,
        seed=seed,
        config=resolved,
        changed=_changed(method, resolved["parameters"]),
        asked_rate=asked_rate,
        iso_layer=iso_layer,
    )


def _every_parameter(method: str, rate: str | float | None, params: dict[str, Any]) -> dict[str, Any]:
    from vlm_pruner_eval.pruners import get_pruner

    pruner = get_pruner(method, pruning_rate=0 if rate is None else rate, **params)
    values = dataclasses.asdict(pruner)
    values.pop("pruning_rate")
    return {name: str(value) if isinstance(value, Fraction) else value for name, value in values.items()}


def _method_source(method: str) -> dict[str, str]:
    from vlm_pruner_eval.pruners import pruner_class

    source = identity.method_source(pruner_class(method))
    return {} if source is None else {"method": source}


def _changed(method: str, values: dict[str, Any]) -> dict[str, Any]:
    """Parameters that differ from the method's defaults."""
    from vlm_pruner_eval.pruners import parameters, pruner_class

    defaults = parameters(pruner_class(method))
    return {name: value for name, value in values.items() if name in defaults and value != defaults[name]}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower().replace("/", "of")).strip("-.") or "run"


def _duplicates(runs: list[Run]) -> list[str]:
    """Runs that would compute the same thing twice, or that tables could not tell apart."""
    problems, by_hash, by_key = [], {}, {}
    for run in runs:
        same = by_hash.setdefault(run_hash(run.config), run)
        if same is not run:
            problems.append(f"methods: {run.key!r} and {same.key!r} are the same run; remove one.")
        twin = by_key.setdefault(run.key, run)
        if twin is not run and same is run:
            problems.append(f"methods: two different runs are both named {run.key!r}; give one of them its own label.")
    return problems
