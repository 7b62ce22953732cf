"""Tensors of checkpoints in LLaVA's original format: read shard by shard, renamed, and each of the model's filled exactly once."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from vlm_pruner_eval.errors import ConfigError

FORMATS = ("model.safetensors", "pytorch_model.bin")
TOWER_PREFIX = "model.vision_tower.vision_tower."
# prefixes in a checkpoint, and in the model
RENAMED = {
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.image_newline": "model.image_newline",
    "model.layers.": "model.language_model.layers.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.norm.": "model.language_model.norm.",
    "lm_head.": "lm_head.",
}
COMPUTED = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")  # tables that older versions saved, too
BESIDE_THE_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
WORD_TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")


def first_line(error: Exception) -> str:
    """First line of an exception's message, or its type if it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__


@dataclass(frozen=True)
class Source:
    """Folder or hub id that files are read from.

    Attributes
    ----------
    place
        A folder or a hub id.
    label
        What messages call it.
    allow_bin
        Whether pickled .bin files may be read.
    """

    place: str
    label: str
    revision: str | None = None
    allow_bin: bool = False

    def file(self, name: str) -> Path | None:
        """The path of one file, fetched if need be; None when there is no such file.

        Raises
        ------
        ConfigError
            A hub id that can't be reached.
        """
        try:
            found = cached_file(self.place, name, revision=self.revision, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise ConfigError(
                f"pretrained: {name} of {self.label} can't be had ({first_line(error)}). A hub id needs the network or a copy in the cache."
            ) from error
        return None if found is None else Path(found)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by name, on the CPU; one shard is open at a time.

        Raises
        ------
        ConfigError
            No weights, .bin files without `allow_bin`, shards that are missing, broken, or lack what the index lists.
        """
        for path, listed in self._shards().items():
            names = set()
            for name, tensor in _read(path):
                names.add(name)
                yield name, tensor
            if listed - names:
                raise ConfigError(
                    f"{self.label}: {path.name} lacks {len(listed - names)} tensors that the index lists in it (first: "
                    f"{min(listed - names)}); fetch the checkpoint again."
                )

    def _shards(self) -> dict[Path, set[str]]:
        """Weight files, and the tensors that an index promises of each."""
        for name in FORMATS:
            index = self.file(f"{name}.index.json")
            single = None if index else self.file(name)
            if not (index or single):
                continue
            if name.endswith(".bin") and not self.allow_bin:
                raise ConfigError(
                    f"{self.label} has its weights as {name} only, a pickle, which is read on request only: add allow_bin=True to "
                    "model_args (code in it is refused even then), or convert it to safetensors."
                )
            return self._indexed(index) if index else {single: set()}
        raise ConfigError(f"{self.label} holds no weights, expected {' or '.join(FORMATS)}, alone or in shards with an index.json.")

    def _indexed(self, index: Path) -> dict[Path, set[str]]:
        shards: dict[str, set[str]] = {}
        try:
            for tensor, shard in json.loads(index.read_text())["weight_map"].items():
                shards.setdefault(shard, set()).add(tensor)
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{self.label}: {index.name} can't be read as an index of shards; fetch it again.") from error
        paths = {shard: self.file(shard) for shard in sorted(shards)}
        if missing := [shard for shard, path in paths.items() if path is None]:
            raise ConfigError(f"{self.label} lacks {', '.join(missing)} of {len(paths)} weight files, which its index names; fetch them.")
        return {paths[shard]: names for shard, names in shards.items()}


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    yield name, file.get_tensor(name)
            return
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path.name} can't be read ({first_line(error)}), expected a whole weight file; fetch it again.") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"{path.name} holds a {type(content).__name__}, expected a dictionary of tensors by name.")
    yield from content.items()


def fill(model: PreTrainedModel, weights: Source, tower: str, *, n_words: int, device: torch.device) -> None:
    """Fill a model whose parameters are on the meta device, in the model's dtype; the tower's tensors may lie in its own folder.

    The placeholder tokens of images and videos take rows behind the checkpoint's words, if its tables have no spare ones.
    Such a row is the mean of all words' rows: what it holds as input is replaced by image features, and its score as output is
    the mean of all scores, which never is the highest.

    Parameters
    ----------
    n_words
        Rows of the checkpoint's tables of words.

    Raises
    ------
    ConfigError
        Tensors that are unknown, there twice, missing, or of another shape than the configuration says.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    state: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, found in _with_tower(weights, Source(tower, tower, allow_bin=weights.allow_bin)):
        target = _target(model, name)
        if target == "":
            continue
        if target not in shapes:
            unknown.append(name)
            continue
        if target in state:
            raise ConfigError(f"pretrained: {weights.label} holds {name} twice, expected every tensor once; fetch the checkpoint again.")
        tensor = _with_placeholders(found, n_words, shapes[target][0]) if target in WORD_TABLES else found
        if tuple(tensor.shape) != shapes[target]:
            raise ConfigError(
                f"pretrained: {name} of {weights.label} has shape {tuple(tensor.shape)}, expected {shapes[target]} by config.json; "
                "the two do not belong together."
            )
        state[target] = tensor.to(device, model.dtype, copy=True)
    _check(unknown, sorted(set(shapes) - set(state) - _tied(model)), weights.label)
    model.load_state_dict(state, strict=False, assign=True)
    if _tied(model):
        model.tie_weights()


def _with_tower(weights: Source, tower: Source) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a checkpoint, and of its tower's own folder if the checkpoint has none of them."""
    has_tower = False
    for name, tensor in weights.tensors():
        has_tower |= name.startswith(TOWER_PREFIX)
        yield name, tensor
    if not has_tower:
        for name, tensor in tower.tensors():
            if not name.startswith(BESIDE_THE_TOWER):
                yield TOWER_PREFIX + name, tensor


def _with_placeholders(table: Tensor, n_words: int, n_rows: int) -> Tensor:
    """A table of words with rows for placeholder tokens behind them, if it has just the words."""
    if not len(table) == n_words < n_rows:
        return table
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(n_rows - n_words, -1)])


def _tied(model: PreTrainedModel) -> set[str]:
    """Parameters that are another one under a second name."""
    return {"lm_head.weight"} if model.config.tie_word_embeddings else set()


def _target(model: PreTrainedModel, name: str) -> str | None:
    """Name in the model of a checkpoint's tensor; "" of one that is not needed, None of an unknown one."""
    if COMPUTED.search(name) or name in _tied(model):
        return ""
    if not name.startswith(TOWER_PREFIX):
        return next((after + name.removeprefix(before) for before, after in RENAMED.items() if name.startswith(before)), None)
    inner = name.removeprefix(TOWER_PREFIX).removeprefix("vision_model.")
    dropped = f"encoder.layers.{model.config.vision_config.num_hidden_layers}."
    if model.config.model_type == "llava_video" and inner.startswith(("head.", dropped)):
        return ""  # LLaVA-Video runs SigLIP without its head and its last layer
    # some versions of transformers have one module more between a tower and its layers
    between = "vision_model." if hasattr(model.model.vision_tower, "vision_model") else ""
    return f"model.vision_tower.{between}{inner}"


def _check(unknown: list[str], missing: list[str], label: str) -> None:
    if unknown:
        raise ConfigError(
            f"pretrained: {label} holds {len(unknown)} tensors that this model has no place for (first: "
            f"{', '.join(sorted(unknown)[:3])}); expected the names of LLaVA-1.5 or LLaVA-Video as released."
        )
    if missing:
        raise ConfigError(
            f"pretrained: {label} lacks {len(missing)} of the model's tensors (first: {', '.join(missing[:3])}); "
            "expected a complete checkpoint."
        )
