"""What a run's settings mean for one model family: which it takes, what it takes them for by default, what a protocol fixes."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING

from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.lmms.plugin import MODELS
from vlm_pruner_eval.lmms.settings import Settings

if TYPE_CHECKING:
    from vlm_pruner_eval.lmms.wrapper import PrunedModel

VIDEO_SETTINGS = frozenset({"max_frames_num"})
PIXEL_SETTINGS = frozenset({"min_pixels", "max_pixels"})


def family_class(model_id: str) -> type[PrunedModel]:
    """The class behind one of our lmms-eval ids.

    Raises
    ------
    ConfigError
        An unknown id.
    """
    if model_id not in MODELS:
        raise ConfigError(f"model: got {model_id!r}, which is unknown; {closest(model_id, MODELS)}")
    module, _, name = MODELS[model_id].rpartition(".")
    return getattr(importlib.import_module(module), name)


def resolve(parsed: Settings, family: type[PrunedModel]) -> Settings:
    """The settings as `family` runs them, with its default number of frames and what the protocol fixes.

    Raises
    ------
    ConfigError
        A protocol or a setting that the family does not have, or a setting that the protocol fixes.
    """
    if parsed.protocol not in family.protocols:
        why = "it is a reading of another family's numbers" if "paper" in family.protocols else family.why_no_paper
        raise ConfigError(
            f"protocol: got {parsed.protocol!r}, expected {' or '.join(family.protocols)} for {family.model_id}: {why}; "
            "protocol=hf is the checkpoint's own prompt and image handling."
        )
    fixed, problems = family.protocols[parsed.protocol].fixes, []
    for name in sorted(VIDEO_SETTINGS | PIXEL_SETTINGS):
        value = getattr(parsed, name)
        if value is not None and name not in family.takes:
            takers = ", ".join(model_id for model_id in MODELS if name in family_class(model_id).takes)
            problems.append(f"{name}: got {value}, expected none for {family.model_id}, which has no such setting; {takers} have it.")
        elif value is not None and name in fixed:
            problems.append(
                f"{name}: got {value}, but protocol={parsed.protocol} means {fixed[name]} on {family.model_id}; "
                "leave it out, or use protocol=hf."
            )
    if parsed.system_prompt is not None and parsed.protocol != "hf":
        problems.append(
            f"system_prompt: got {parsed.system_prompt!r}, but protocol={parsed.protocol} has its own; leave it out, or use protocol=hf."
        )
    if problems:
        raise ConfigError(problems)
    defaults = {"max_frames_num": family.default_frames} if "max_frames_num" in family.takes and parsed.max_frames_num is None else {}
    return dataclasses.replace(parsed, **defaults, **fixed)
