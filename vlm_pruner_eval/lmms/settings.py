"""The arguments of a run (lmms-eval's --model_args), checked all at once before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from vlm_pruner_eval.budget import Rate, parse_rate
from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.lmms.plugin import MODELS
from vlm_pruner_eval.pruners import Pruner, get_pruner, parameters, pruner_class
from vlm_pruner_eval.redact import short, spelled_out
from vlm_pruner_eval.vlms import FamilySpec, by_model_id
from vlm_pruner_eval.vlms.family import PIXEL_SETTINGS, VIDEO_SETTINGS

DTYPES = ("auto", "float32", "float16", "bfloat16")
ATTENTION = ("sdpa", "eager", "flash_attention_2")
PROTOCOLS = tuple(dict.fromkeys(name for family in by_model_id().values() for name in family.spec.protocols))
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|npu|hpu)(:\d{1,3})?", re.ASCII)
# What git allows in the name of a branch or tag, and the hub with it.
REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_TEXTS = ("pretrained", "revision", "device", "dtype", "attn_implementation", "protocol", "system_prompt")
_MOST, _MOST_WORKERS = 2**31 - 1, 64
COUNTS = ("batch_size", "workers", "max_frames_num", "min_pixels", "max_pixels")  # whole numbers


@dataclass(frozen=True)
class Settings:
    """Settings of loading and asking a checkpoint; the method is kept apart, since it can be switched on a loaded model.

    Attributes
    ----------
    pretrained
        A folder, a hub id, or "minivlm" (the embedded checkpoint).
    revision
        Branch, tag or commit of a hub id.
    dtype
        "auto": float32 on CPU, the checkpoint's own on a GPU.
    device
        Default: this process's GPU, or the CPU if there is none.
    batch_size
        Prompts per generate call.
    workers
        Threads that read and decode documents while the model answers earlier ones; 0: none. No answer depends on it. None: 2 if
        a GPU answers, 0 on a CPU, whose cores the model itself is timed on.
    protocol
        Whose prompt and image handling; "hf" is the checkpoint's own chat template and processor, "paper" that of the
        VLM-Pruner paper's numbers (families that have one say so), "paper_two_tiles" its second reading for LLaVA-NeXT, whose
        images have at most two tiles, so that newline tokens are among the 2,304 that the paper states.
    max_frames_num
        Frames picked of each video, at most; None: what is usual for the family.
    min_pixels, max_pixels
        Qwen's bounds on the size of an image, and of each frame of a video; None: the checkpoint's.
    system_prompt
        A system turn put before every chat that has none; None: what the checkpoint's template does by itself.
    allow_bin
        True if weights may be read from pickled .bin files in the absence of safetensors.
    """

    pretrained: str
    revision: str | None = None
    dtype: str = "auto"
    attn_implementation: str = "sdpa"
    device: str | None = None
    batch_size: int = 1
    workers: int | None = None
    protocol: str = "hf"
    max_frames_num: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    system_prompt: str | None = None
    allow_bin: bool = False


def parse(model_args: Mapping[str, object]) -> tuple[Settings, str, Pruner]:
    """Check everything that can be checked without loading a checkpoint.

    Returns
    -------
    The settings, the method's name, and the pruner.

    Raises
    ------
    ConfigError
        With all problems found: unknown names (and the closest known one), wrong types, values out of range.
    """
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in model_args.items() if name in names}
    params = {name: value for name, value in model_args.items() if name not in names | {"method", "pruning_rate"}}
    method, problems = model_args.get("method", "none"), []
    try:
        known = names | {"method"} | set(parameters(pruner_class(method)))
        problems += [f"{_plain(name)}: unknown argument; {closest(name, known)}" for name in params if name not in known]
        pruner = build_pruner(method, model_args.get("pruning_rate"), {name: params[name] for name in params if name in known})
    except ConfigError as error:
        problems += error.problems
    problems += _setting_problems(given)
    if problems:
        raise ConfigError(problems)
    return Settings(**given | {name: int(given[name]) for name in COUNTS if given.get(name) is not None}), method, pruner


def build_pruner(method: str, pruning_rate: Rate | None, params: Mapping[str, object]) -> Pruner:
    """`get_pruner`, refusing a method that would not prune or would prune by an unstated rate.

    Raises
    ------
    ConfigError
        A rate that is missing, or one above 0 for the plain model; and whatever `get_pruner` finds.
    """
    if pruning_rate is None:
        pruning_rate = parameters(pruner_class(method))["pruning_rate"]
    if pruning_rate is dataclasses.MISSING:
        raise ConfigError(
            f"pruning_rate: missing, but method={method} needs it; 8/9 keeps 64 of 576 tokens. The plain model is method=none."
        )
    if method == "none" and parse_rate(pruning_rate) != 0:
        raise ConfigError(
            f"pruning_rate: got {short(pruning_rate)} with method=none, which prunes nothing; "
            "name a method (method=vlmpruner), or leave the rate out."
        )
    return get_pruner(method, pruning_rate=pruning_rate, **params)


def resolve(parsed: Settings, spec: FamilySpec) -> Settings:
    """Return the settings as a family runs them, with its default number of frames and what the protocol fixes.

    Raises
    ------
    ConfigError
        A protocol or a setting that the family does not have, or a setting that the protocol fixes.
    """
    if parsed.protocol not in spec.protocols:
        why = "it is a reading of another family's numbers" if "paper" in spec.protocols else spec.why_no_paper
        raise ConfigError(
            f"protocol: got {parsed.protocol!r}, expected {' or '.join(spec.protocols)} for {spec.model_id}: {why}; "
            "protocol=hf is the checkpoint's own prompt and image handling."
        )
    fixed, problems = spec.protocols[parsed.protocol].fixes, []
    for name in sorted(VIDEO_SETTINGS | PIXEL_SETTINGS):
        value = getattr(parsed, name)
        if value is not None and name not in spec.takes:
            takers = ", ".join(model_id for model_id, family in by_model_id().items() if name in family.spec.takes)
            problems.append(f"{name}: got {value}, expected none for {spec.model_id}, which has no such setting; {takers} have it.")
        elif value is not None and name in fixed:
            problems.append(
                f"{name}: got {value}, but protocol={parsed.protocol} means {fixed[name]} on {spec.model_id}; "
                "leave it out, or use protocol=hf."
            )
    if parsed.system_prompt is not None and parsed.protocol != "hf":
        problems.append(
            f"system_prompt: got {parsed.system_prompt!r}, but protocol={parsed.protocol} has its own; leave it out, or use protocol=hf."
        )
    if problems:
        raise ConfigError(problems)
    defaults = {"max_frames_num": spec.frames} if "max_frames_num" in spec.takes and parsed.max_frames_num is None else {}
    return dataclasses.replace(parsed, **defaults, **fixed)


def named_problems(given: Mapping[str, object]) -> list[str]:
    """Names among the settings of a model that nothing is known by; `id` is a model id of lmms-eval's --model."""
    problems = []
    choices = {"id": MODELS, "dtype": DTYPES, "attn_implementation": ATTENTION, "protocol": PROTOCOLS}
    for name, known in choices.items():
        value = given.get(name)
        if isinstance(value, str) and value not in known:
            problems.append(f"{name}: got {short(value)}; {closest(value, known)}")
    for name, form, expected in (
        ("device", DEVICE, "cpu, cuda or cuda:0 and so on"),
        ("revision", REVISION, "a branch, tag or commit: letters, digits, '.', '_', '-' and '/', without '..'"),
    ):
        value = given.get(name)
        if isinstance(value, str) and not form.fullmatch(value):
            problems.append(f"{name}: got {short(value)}, expected {expected}.")
    return problems


def _setting_problems(given: Mapping[str, object]) -> list[str]:
    problems = []
    if "pretrained" not in given:
        problems.append("pretrained: missing, expected a folder with a checkpoint, a hub id, or minivlm (the embedded one).")
    for name in _TEXTS:
        value = given.get(name, "text")
        if not (isinstance(value, str) or (value is None and name in ("revision", "device", "system_prompt"))):
            problems.append(
                f"{name}: got {short(value)} ({type(value).__name__}), expected text; lmms-eval turns text that reads as a number into one."
            )
        elif value is not None and (not value.strip() or spelled_out(value) != value) and name in ("pretrained", "system_prompt"):
            problems.append(f"{name}: got {short(value)}, expected text without control characters, and not empty.")
    problems += named_problems(given)
    for name in COUNTS:
        value, bounds = given.get(name, 1), (0, _MOST_WORKERS) if name == "workers" else (1, _MOST)
        if not (_is_count(value, *bounds) or (value is None and name != "batch_size")):
            expected = f"from 0 to {_MOST_WORKERS}" if name == "workers" else "1 or more"
            hint = "; automatic sizes are not offered." if name == "batch_size" else "."
            problems.append(f"{name}: got {short(value)}, expected a whole number, {expected}{hint}")
    if not isinstance(given.get("allow_bin", False), bool):
        problems.append(f"allow_bin: got {short(given['allow_bin'])}, expected True or False.")
    least, most = given.get("min_pixels"), given.get("max_pixels")
    if _is_count(least) and _is_count(most) and int(least) > int(most):
        problems.append(f"min_pixels: got {least}, expected at most max_pixels, which is {most}.")
    return problems


def _is_count(value: object, least: int = 1, most: int = _MOST) -> bool:
    if isinstance(value, str) and value.isdecimal() and value.isascii() and len(value) <= len(str(_MOST)):
        value = int(value)
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _plain(name: str) -> str:
    return name if name.isidentifier() and len(name) <= 80 else short(name)


def from_command_line(arg_string: str | Mapping[str, object], additional: Mapping[str, object] | None) -> dict[str, object]:
    """Join --model_args with lmms-eval's own --batch_size, --max_batch_size and --device.

    Raises
    ------
    ConfigError
        Text that is not ``name=value,name=value``, or an argument given twice with different values.
    """
    from lmms_eval.utils import _smart_comma_split, simple_parse_args_string

    try:
        if isinstance(arg_string, str):
            names = [part.split("=", 1)[0] for part in _smart_comma_split(arg_string.strip())]
            merged = simple_parse_args_string(arg_string)
        else:
            names, merged = [], dict(arg_string)
    except ValueError:  # no "=", or digits that make no number
        raise ConfigError(f"model_args: got {short(arg_string)}, expected name=value pairs, separated by commas.") from None
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise ConfigError([f"{_plain(name)}: is given {names.count(name)} times in model_args; give it once." for name in repeated])
    for name, value in (additional or {}).items():
        is_default = value is None or (name == "batch_size" and str(value) == "1")
        if name not in merged:
            if value is not None:
                merged[name] = value
        elif not is_default and str(merged[name]) != str(value):
            raise ConfigError(f"{_plain(name)}: got {short(merged[name])} in model_args and {short(value)} beside it; give it once.")
    return merged
