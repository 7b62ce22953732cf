"""Loads a checkpoint and its processor, or says in a sentence why it can't be used."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.lmms.original_format.conversion import is_original, load_original, model_type_of
from vlm_pruner_eval.lmms.original_format.original_weights import Source, first_line
from vlm_pruner_eval.lmms.settings import Settings


@dataclass(frozen=True)
class Checkpoint:
    """A model in evaluation mode on its device, and the processor that goes with it."""

    model: PreTrainedModel
    processor: ProcessorMixin


def load_checkpoint(settings: Settings, device: torch.device, model_types: Collection[str], model_id: str) -> Checkpoint:
    """Load weights and processor, after the configuration has been found to fit; Hugging Face's layout, or LLaVA's original one.

    Parameters
    ----------
    model_types
        Hugging Face ``model_type`` names that the wrapper takes.
    model_id
        The wrapper's name, for messages.

    Raises
    ------
    ConfigError
        No such checkpoint, another family's, one without chat template, or weights that do not fill the model.
    """
    source, where = locate(settings.pretrained), {"revision": settings.revision, "trust_remote_code": False}
    raw = _read_config(PretrainedConfig.get_config_dict, source, settings, where)[0]
    # float16 and bfloat16 are slow on most CPUs, and emulated on some
    dtype = settings.dtype if settings.dtype != "auto" or device.type != "cpu" else "float32"
    if is_original(raw):
        _check_model_type(model_type_of(raw), settings, model_types, model_id)
        weights = Source(source, settings.pretrained, settings.revision, settings.allow_bin)
        model, processor = load_original(raw, weights, dtype=dtype, attention=settings.attn_implementation, device=device)
    else:
        config = _read_config(AutoConfig.from_pretrained, source, settings, where)
        _check_model_type(config.model_type, settings, model_types, model_id)
        processor = _processor(source, settings, where)
        model = _model(source, config, settings, dtype, where)
    _pad_left(processor)
    _forget_sampling(model)
    return Checkpoint(model.to(device).eval(), processor)


def _check_model_type(found: str, settings: Settings, model_types: Collection[str], model_id: str) -> None:
    if found not in model_types:
        raise ConfigError(
            f"pretrained: {settings.pretrained} is a {found!r} checkpoint, expected {' or '.join(sorted(model_types))} "
            f"for --model {model_id}; choose the --model of its family, or another checkpoint."
        )


def _model(source: str, config: PretrainedConfig, settings: Settings, dtype: str, where: dict) -> PreTrainedModel:
    """A checkpoint in Hugging Face layout, none of whose tensors may be left random."""
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            source,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=settings.attn_implementation,
            use_safetensors=None if settings.allow_bin else True,
            weights_only=True,
            output_loading_info=True,
            **where,
        )
    except OSError as error:
        advice = "" if settings.allow_bin else " Pickled .bin weights are read on request only: add allow_bin=True to model_args."
        raise ConfigError(f"pretrained: the weights of {settings.pretrained} can't be read ({first_line(error)}).{advice}") from error
    lacking = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if lacking:
        raise ConfigError(
            f"pretrained: {settings.pretrained} lacks {len(lacking)} of the model's tensors or has them in other shapes, so they would "
            f"be random (first: {lacking[0]}); expected a complete checkpoint in Hugging Face layout."
        )
    return model


def _forget_sampling(model: PreTrainedModel) -> None:
    """Tasks alone decide about sampling: the checkpoint's defaults would be warned about when greedy, and mixed in when not."""
    blank = GenerationConfig()
    for name in ("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p"):
        setattr(model.generation_config, name, getattr(blank, name))


def locate(pretrained: str) -> str:
    """A folder that exists, or a hub id; "minivlm" is the embedded checkpoint.

    Raises
    ------
    ConfigError
        Text that reads as a path, with nothing there.
    """
    if pretrained == "minivlm":
        from vlm_pruner_eval.embedded import minivlm_path

        return str(minivlm_path())
    path = os.path.expanduser(pretrained)  # os.path: text that can be no path is nothing that exists, not an exception
    if os.path.lexists(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise ConfigError(f"pretrained: {pretrained} holds no config.json, expected the folder of a Hugging Face checkpoint.")
        return path
    if pretrained.startswith((".", "~", os.sep)) or pretrained.count("/") != 1:
        raise ConfigError(
            f"pretrained: there is nothing at {pretrained}, expected the folder of a checkpoint, a hub id (owner/name), or minivlm."
        )
    return pretrained


def decoder_layers(pretrained: str, revision: str | None = None) -> int | None:
    """Decoder layers of the language model, as config.json has them; of a hub id that file alone is downloaded.

    Returns
    -------
    int or None
        None where the file can't be read or does not say: who loads the weights then says why.

    Raises
    ------
    ConfigError
        Text that reads as a path, with nothing there.
    """
    source, where = locate(pretrained), {"revision": revision, "trust_remote_code": False}
    try:
        raw, _ = PretrainedConfig.get_config_dict(source, **where)
        if is_original(raw):
            return raw.get("num_hidden_layers")
        return getattr(AutoConfig.from_pretrained(source, **where).get_text_config(decoder=True), "num_hidden_layers", None)
    except (OSError, ValueError):  # `load_checkpoint` reads the same file, and refuses in a sentence
        return None


def _read_config(read: Callable, source: str, settings: Settings, where: dict) -> Any:
    try:
        return read(source, **where)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"pretrained: the configuration of {settings.pretrained} can't be read ({first_line(error)}). "
            "A hub id needs the network or a copy in the cache; a folder needs a config.json that transformers knows."
        ) from error


def _processor(source: str, settings: Settings, where: dict) -> ProcessorMixin:
    try:
        processor = AutoProcessor.from_pretrained(source, **where)
    except (OSError, ValueError) as error:
        raise ConfigError(f"pretrained: the processor of {settings.pretrained} can't be read ({first_line(error)}).") from error
    if not isinstance(processor, ProcessorMixin):
        raise ConfigError(
            f"pretrained: {settings.pretrained} has a {type(processor).__name__} alone, expected a processor of images and text."
        )
    if not processor.chat_template:
        raise ConfigError(
            f"pretrained: {settings.pretrained} has no chat template, which protocol=hf prompts with; expected a chat_template.jinja."
        )
    return processor


def _pad_left(processor: ProcessorMixin) -> None:
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
