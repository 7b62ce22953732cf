"""The sweep file: schema, and every problem of a file in one ConfigError. Never imports torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlm_pruner_eval.budget import parse_rate
from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.redact import short
from vlm_pruner_eval.sweep.text_files import joined, read_yaml

_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)
# lmms-eval scores these by a language model, and by a random letter where none is reachable (the groups hold mmbench_en_dev).
_DRAWS_LETTERS = ("mmbench_en_dev", "mmbench_en_dev_lite", "mmbench_en", "mmbench")
_MOST = 2**31 - 1  # of a whole number that counts something
_LONGEST_NAME = 100  # of a folder
PAPERS = ("vlm_pruner", "dart", "sparsevlm", "divprune", "cdpruner", "zoo_prune", "fastv_readme")  # whose printed numbers are there
SHARED_ROWS = {"cuda": 64, "cpu": 8}  # 64 rows of a 7B model, 250 tokens each: 8 GB of cache; a CPU gains nothing beyond 8
_MOST_SEED = 2**32 - 1  # numpy takes no larger one


def inside(folder: str) -> str:
    """A folder named by a file, which may come from someone else: under the current folder, never elsewhere.

    Raises
    ------
    ConfigError
        A path that leaves the current folder.
    """
    parts = re.split(r"[/\\]", folder)
    if not parts[0].strip() or parts[0].startswith("~") or ".." in parts or ":" in parts[0] or max(map(len, parts)) > _LONGEST_NAME:
        raise ConfigError(
            f"got {short(folder)}, expected a folder under the current one, with names of at most {_LONGEST_NAME} characters and without "
            "'..': a file does not decide about other places; name them with --output on the command line."
        )
    return folder


def _one_line(text: str) -> str:
    if not text.strip() or "\n" in text:
        raise ConfigError(f"got {short(text)}, expected text on one line.")
    return text


def _known_paper(name: str) -> str:
    if name not in PAPERS:
        raise ConfigError(f"got {short(name)}, a paper whose numbers are not there; {closest(name, PAPERS)}")
    return name


def canonical_rate(rate: object) -> str | float:
    """Text of an exact fraction in lowest terms ("2/3"), or the float itself: what is hashed and handed to a method.

    Raises
    ------
    ConfigError
        Not a rate in [0, 1).
    """
    value = parse_rate(rate)
    return str(value) if isinstance(value, Fraction) else value


Count = Annotated[int, Field(ge=1, le=_MOST)]
Line = Annotated[str, AfterValidator(_one_line)]
FolderInside = Annotated[str, AfterValidator(inside)]


class ModelSection(BaseModel):
    """The checkpoint and how it is run."""

    model_config = _STRICT

    id: str = Field(description="a model id such as vlmpruner_llava (`vlm-pruner-eval list` shows them)")
    pretrained: Line = Field(max_length=1000, description="a checkpoint folder, a hub id, or minivlm (the embedded one)")
    revision: str | None = Field(None, description="a branch, tag or commit of the hub checkpoint, or null")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field("auto", description="one of auto, float32, float16, bfloat16")
    batch_size: Count = Field(1, description="a whole number, 1 or more")
    workers: int | None = Field(
        None, ge=0, le=64, description="a whole number of threads that read documents ahead, 0 to 64, or null: 2 with a GPU, 0 without"
    )
    protocol: str = Field("hf", min_length=1, description="a protocol name such as hf (the checkpoint's own chat template)")
    attn_implementation: str = Field("sdpa", min_length=1, description="an attention backend such as sdpa or eager")
    device: str | None = Field(None, description="a device such as cpu or cuda:0, or null for the first GPU if there is one")
    visual_tokens: Count | None = Field(None, description="the visual tokens of one image, for example 576 for LLaVA-1.5")
    layers: Count | None = Field(None, description="the decoder layers of the language model, for example 32 for LLaVA-1.5-7B")
    max_frames_num: Count | None = Field(None, description="a whole number of frames a video, 1 or more, or null for the model's own")
    min_pixels: Count | None = Field(None, description="a whole number of pixels of an image, 1 or more, or null for the model's own")
    max_pixels: Count | None = Field(None, description="a whole number of pixels of an image, 1 or more, or null for the model's own")
    system_prompt: str | None = Field(None, min_length=1, description="a system turn put before every chat, or null")
    allow_bin: bool | None = Field(None, description="true to load weights from .bin files as well, or null (no)")


ENTRY_KEYS = ("name", "label", "seeds", "iso_layer")  # all other keys of a method's mapping are parameters of the method


class MethodEntry(BaseModel):
    """One line of `methods`: a name, or a mapping with name, label, seeds, iso_layer and any parameter of the method.

    `iso_layer: 2` makes the iso-compute row of a method that prunes before the first layer: at every rate it keeps, in all layers,
    as many tokens as a method that prunes at layer 2 keeps on average over the layers.
    """

    model_config = _STRICT

    name: str = Field(min_length=1, description="a method name, or package.module:Class")
    label: Line | None = Field(None, max_length=60, description="text for the tables, at most 60 characters")
    seeds: tuple[Annotated[int, Field(ge=-_MOST, le=_MOST)], ...] | None = Field(
        None, min_length=1, description="a list of whole numbers such as [0, 1, 2]"
    )
    iso_layer: Count | None = Field(None, description="the layer, 1 or more, of the methods to match in compute, or null")
    parameters: dict[str, Any] = Field(default_factory=dict, description="parameters of the method, by name")

    @model_validator(mode="before")
    @classmethod
    def _split(cls, data: object) -> object:
        if isinstance(data, str):
            return {"name": data, "parameters": {}}
        if not isinstance(data, dict):
            return data
        own = {key: value for key, value in data.items() if key in ENTRY_KEYS}
        if isinstance(own.get("seeds"), list):
            own["seeds"] = tuple(own["seeds"])
        return own | {"parameters": {key: value for key, value in data.items() if key not in own}}

    @property
    def shown(self) -> str:
        """The label, or the name where there is none."""
        return self.label or (self.name if self.iso_layer is None else f"{self.name} (iso-compute)")


class SweepConfig(BaseModel):
    """A sweep file. Exactly one of `pruning_rates` and `keep_tokens` is given."""

    model_config = _STRICT

    name: str = Field(
        pattern=rf"^[A-Za-z0-9][A-Za-z0-9._-]{{0,{_LONGEST_NAME - 1}}}$",
        description=f"letters, digits, '.', '_' and '-', at most {_LONGEST_NAME} (it names a folder)",
    )
    model: ModelSection = Field(description="a mapping with at least id and pretrained")
    tasks: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1, description="a list of at least one lmms-eval task name")
    include_path: str | None = Field(None, min_length=1, description="a folder with task files of your own, or null")
    pruning_rates: list[Annotated[Any, AfterValidator(canonical_rate)]] | None = Field(
        None, min_length=1, description="a list of rates in [0, 1), for example [2/3, 0.778, 8/9]"
    )
    keep_tokens: list[Count] | None = Field(
        None, min_length=1, description="a list of token counts, 1 or more each, for example [192, 128, 64]"
    )
    methods: list[MethodEntry] = Field(min_length=1, description="a list of method names, or mappings with a name and parameters")
    limit: Count | None = Field(None, description="a whole number of questions per task, 1 or more, or null for all")
    seed: int = Field(0, ge=0, le=_MOST_SEED, description="a whole number, 0 or more")
    share_prefix: bool = Field(False, description="true or false: whether runs read every batch together, which leaves no times to report")
    shared_rows: Count | None = Field(
        None,
        description="the most rows of a batch of several runs, 1 or more, or null: 64 on a GPU, 8 without, 1 under protocol=paper",
    )
    paper: Annotated[str, AfterValidator(_known_paper)] = Field(
        PAPERS[0], description=f"the paper whose printed numbers stand beside the rows: {', '.join(PAPERS)}"
    )
    gallery: int = Field(24, ge=0, le=_MOST, description="a whole number of documents per task whose pictures are kept, 0 for none")
    output: FolderInside | None = Field(None, description="a folder for the results, or null")

    def rows_together(self, device: str) -> int:
        """`shared_rows` on a kind of device; the paper's protocol fixes the batches, so that its runs are not joined unless asked."""
        default = 1 if self.model.protocol.startswith("paper") else SHARED_ROWS.get(device, SHARED_ROWS["cpu"])
        return self.shared_rows or default

    @property
    def rates(self) -> list[str | float]:
        """Pruning rates in order; a token count k of V becomes the exact fraction 1 - k / V."""
        if self.pruning_rates is not None:
            return list(self.pruning_rates)
        return [str(1 - Fraction(keep, self.model.visual_tokens)) for keep in self.keep_tokens]


def load(
    path: str | Path, *, overrides: dict[str, Any] | None = None, check: Callable[[dict[str, Any]], list[str]] | None = None
) -> SweepConfig:
    """Read and validate a sweep file.

    Parameters
    ----------
    path
        The YAML file.
    overrides
        Top-level keys that replace the file's, from the command line.
    check
        Looks at the raw mapping for problems that this module can't know (`grid.method_problems`: methods need torch), so that
        they are reported with the others.

    Raises
    ------
    ConfigError
        Every problem of the file, one sentence each, with key paths: unreadable file, malformed or empty YAML, repeated or
        unknown keys, wrong types or values, contradictions between keys.
    """
    path = Path(path)
    raw, repeated = read_yaml(path, advice="give the path of a YAML sweep file.")
    if not isinstance(raw, dict):
        got = "an empty file" if raw is None else f"{type(raw).__name__} {short(raw)}"
        raise ConfigError(f"{path}: got {got}, expected a mapping with the keys name, model, tasks, pruning_rates and methods.")
    if check is not None:
        repeated += [f"{path}: {problem}" for problem in check(raw)]
    return validate(raw | (overrides or {}), more=repeated, where=f"{path}: ")


def validate(raw: dict[str, Any], *, more: list[str] | None = None, where: str = "") -> SweepConfig:
    """Validate a mapping as a sweep file.

    Parameters
    ----------
    raw
        What the YAML file holds.
    more
        Problems found before, to be reported with the others.
    where
        Put before every sentence, for example the path of the file.

    Raises
    ------
    ConfigError
        All problems at once.
    """
    problems, config = list(more or []), None
    try:
        config = SweepConfig.model_validate(raw)
    except ValidationError as error:
        problems += [where + _sentence(item) for item in error.errors()]
    problems += [where + problem for problem in _contradictions(raw)]
    if problems or config is None:
        raise ConfigError(problems)
    return config


def _contradictions(raw: dict[str, Any]) -> Iterator[str]:
    """Problems between keys, looked for in the raw mapping so that they are reported with the others."""
    rates, counts = raw.get("pruning_rates"), raw.get("keep_tokens")
    if (rates is None) == (counts is None):
        got = "both pruning_rates and keep_tokens" if rates is not None else "neither pruning_rates nor keep_tokens"
        yield f"got {got}, expected exactly one of them: how much to remove, or how many tokens to keep."
    model = raw.get("model") if isinstance(raw.get("model"), dict) else {}
    total = model.get("visual_tokens")
    if counts is not None and total is None:
        yield "keep_tokens: needs model.visual_tokens, the tokens of one image (576 for LLaVA-1.5); add it, or use pruning_rates."
    if isinstance(counts, list) and type(total) is int:
        for keep in counts:
            if type(keep) is int and keep > total:
                yield f"keep_tokens: got {keep}, expected at most model.visual_tokens = {total}."
    yield from _iso_problems(raw.get("methods"), model.get("layers"))
    low, high = model.get("min_pixels"), model.get("max_pixels")
    if type(low) is int and type(high) is int and low > high:
        yield f"model.min_pixels: got {low}, expected at most model.max_pixels = {high}."
    tasks = raw.get("tasks") if isinstance(raw.get("tasks"), list) else []
    for task in tasks if str(model.get("protocol")).startswith("paper") else []:
        if task in _DRAWS_LETTERS:
            yield (
                f"tasks: got {task!r} with model.protocol {model['protocol']}, but it asks a language model about answers that it can't "
                "read, and without a key draws a letter at random; use mmbench_en_dev_static, which scores by rules alone."
            )
    for key in ("tasks", "keep_tokens", "pruning_rates"):
        values = raw.get(key) if isinstance(raw.get(key), list) else []
        for value, times in Counter(_comparable(value) for value in values).items():
            if times > 1:
                yield f"{key}: got {value} {times} times, expected each value once; remove the repeats."


def _iso_problems(methods: object, layers: object) -> Iterator[str]:
    """`iso_layer` needs the number of layers to average over."""
    for index, entry in enumerate(methods if isinstance(methods, list) else []):
        layer = entry.get("iso_layer") if isinstance(entry, dict) else None
        if layer is None:
            continue
        if layers is None:
            yield f"methods[{index}].iso_layer: needs model.layers, the decoder layers of the model (32 for LLaVA-1.5-7B); add it."
        elif type(layers) is int and type(layer) is int and layer >= layers:
            yield f"methods[{index}].iso_layer: got {layer}, expected 1 to {layers - 1} for a model of {layers} layers."


def _comparable(value: object) -> str:
    """One text for equal values: 1/2 and 0.5 are the same rate."""
    try:
        return str(float(parse_rate(value)))
    except ConfigError:  # a count, or no number at all
        return short(value)


def _sentence(error: dict[str, Any]) -> str:
    """One pydantic error as: key path, what was got, what was expected, what to do."""
    loc = error["loc"]
    path = ""
    for part in loc:
        path = f"{path}[{part}]" if isinstance(part, int) else joined(path, part)
    path = path or "the file"
    if error["type"] == "extra_forbidden":
        return f"{path}: is an unknown key; {closest(loc[-1], _section(loc[:-1]))}"
    if error["type"] == "value_error":
        own = error["ctx"]["error"]
        return f"{path}: {str(own).removeprefix('pruning_rate: ')}"
    expected = _expected(loc)
    if error["type"] == "missing":
        return f"{path}: is missing; expected {expected}."
    most = error.get("ctx", {}).get("le")
    return (
        f"{path}: got {short(error['input'])} ({type(error['input']).__name__}), expected {expected}{f', at most {most}' if most else ''}."
    )


def _section(loc: tuple[int | str, ...]) -> list[str]:
    return sorted(ModelSection.model_fields if loc[:1] == ("model",) else SweepConfig.model_fields)


def _expected(loc: tuple[int | str, ...]) -> str:
    """The description of the deepest known field on the way to an error."""
    fields: dict[str, Any] = SweepConfig.model_fields
    description = "the keys of a sweep file"
    for part in loc:
        if isinstance(part, int) or part not in fields:
            continue
        description = fields[part].description
        fields = {"model": ModelSection, "methods": MethodEntry}[part].model_fields if part in ("model", "methods") else {}
    return description
