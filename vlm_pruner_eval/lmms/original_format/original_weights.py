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
from torch import Tensor, nn
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


@dataclass(frozen=True)
class Source:
    """Where files are read from.

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
                f"pretrained: {name} of {self.label} can't be had ({str(error).strip().splitlines()[0]}). "
                "A hub id needs the network or a copy in the cache."
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
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path.name} can't be read ({reason}), expected a whole weight file; fetch it again.") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"{path.name} holds a {type(content).__name__}, expected a dictionary of tensors by name.")
    yield from content.items()


def fill(model: PreTrainedModel, weights: Source, tower: str, *, n_words: int, device: torch.device) -> None:
    """Fill a model whose parameters are on the meta device, in the model's dtype; the tower's tensors may lie in its own folder.

    The placeholder tokens of images and videos take rows behind the checkpoint's words, where its tables have no spare ones.
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
    _Filling(model, weights.label, n_words, device).run(weights, Source(tower, tower, allow_bin=weights.allow_bin))


class _Filling:
    def __init__(self, model: PreTrainedModel, label: str, n_words: int, device: torch.device):
        self.model, self.label, self.n_words, self.device = model, label, n_words, device
        self.left = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.all = set(self.left)
        self.unknown: list[str] = []
        # some versions of transformers have one module more between a tower and its layers
        self.inside = "vision_model." if hasattr(model.model.vision_tower, "vision_model") else ""
        self.is_tied = bool(model.config.tie_word_embeddings)
        self.n_layers = model.config.vision_config.num_hidden_layers if model.config.model_type == "llava_video" else None

    def run(self, weights: Source, tower: Source) -> None:
        has_tower = False
        for name, tensor in weights.tensors():
            has_tower |= name.startswith(TOWER_PREFIX)
            self._take(name, self._target(name), tensor)
        if not has_tower:
            for name, tensor in tower.tensors():
                if not name.startswith(BESIDE_THE_TOWER):
                    self._take(name, self._tower_target(name), tensor)
        if self.is_tied:
            self.model.tie_weights()
            self.left.discard("lm_head.weight")
        self._check()

    def _target(self, name: str) -> str | None:
        """The model's name of a checkpoint's tensor; "" for one that is not needed, None for an unknown one."""
        if COMPUTED.search(name) or (self.is_tied and name == "lm_head.weight"):
            return ""
        if name.startswith(TOWER_PREFIX):
            return self._tower_target(name.removeprefix(TOWER_PREFIX))
        for before, after in RENAMED.items():
            if name.startswith(before):
                return after + name.removeprefix(before)
        return None

    def _tower_target(self, name: str) -> str | None:
        inner = name.removeprefix("vision_model.")
        if COMPUTED.search(name) or (self.n_layers is not None and inner.startswith(("head.", f"encoder.layers.{self.n_layers}."))):
            return ""  # LLaVA-Video runs SigLIP without its head and its last layer
        return f"model.vision_tower.{self.inside}{inner}"

    def _take(self, name: str, target: str | None, tensor: Tensor) -> None:
        if target == "":
            return
        if target not in self.all:
            self.unknown.append(name)
            return
        if target not in self.left:
            raise ConfigError(f"pretrained: {self.label} holds {name} twice, expected every tensor once; fetch the checkpoint again.")
        owner_name, _, leaf = target.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        shape = tuple(getattr(owner, leaf).shape)
        if target in WORD_TABLES and len(tensor) == self.n_words < shape[0]:
            mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(shape[0] - self.n_words, -1)])
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"pretrained: {name} of {self.label} has shape {tuple(tensor.shape)}, expected {shape} by config.json; "
                "the two do not belong together."
            )
        setattr(owner, leaf, nn.Parameter(tensor.to(self.device, self.model.dtype, copy=True)))
        self.left.remove(target)

    def _check(self) -> None:
        if self.unknown:
            raise ConfigError(
                f"pretrained: {self.label} holds {len(self.unknown)} tensors that this model has no place for (first: "
                f"{', '.join(sorted(self.unknown)[:3])}); expected the names of LLaVA-1.5 or LLaVA-Video as released."
            )
        if self.left:
            raise ConfigError(
                f"pretrained: {self.label} lacks {len(self.left)} of the model's tensors (first: {', '.join(sorted(self.left)[:3])}); "
                "expected a complete checkpoint."
            )
