"""Needs of one sweep file: its model id, device, attention and checkpoint, looked up without downloading anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Finding
from vlm_pruner_eval.doctor.surroundings import GB, checkpoint_cache, free_bytes, offline_switches
from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.sweep.config import SweepConfig

_BYTES_A_PARAMETER = 2  # checkpoints of this size are stored in 16 bits
_INDEX = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}


def model_id(config: SweepConfig) -> Iterator[Finding]:
    """The model id of the file."""
    from vlm_pruner_eval.lmms.plugin import MODELS

    if config.model.id in MODELS:
        yield Finding("model id", OK, config.model.id)
    else:
        fix = f"Mend model.id; {closest(config.model.id, MODELS)}"
        yield Finding("model id", FAIL, f"{config.model.id} is unknown", fix)


def device(config: SweepConfig) -> Iterator[Finding]:
    """Device and attention backend of the file."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    from vlm_pruner_eval.lmms.settings import ATTENTION

    wanted = config.model.device
    attention = config.model.attn_implementation
    if wanted is not None and wanted.startswith("cuda") and not torch.cuda.is_available():
        found = f"the file asks for {wanted}, but torch sees no GPU"
        yield Finding("device", FAIL, found, "Mend that, or remove model.device.")
    if attention not in ATTENTION:
        fix = f"Mend it; {closest(attention, ATTENTION)}"
        yield Finding("attention of the file", FAIL, f"{attention} is unknown", fix)
    elif attention == "flash_attention_2" and not is_flash_attn_2_available():
        fix = "Install flash-attn for this torch and GPU, or set model.attn_implementation to sdpa."
        yield Finding("attention of the file", FAIL, "transformers can't use flash_attention_2 here", fix)
    else:
        yield Finding("attention of the file", OK, attention)


def checkpoint(config: SweepConfig) -> Iterator[Finding]:
    """Look for the checkpoint on this machine, whole."""
    from huggingface_hub import try_to_load_from_cache

    from vlm_pruner_eval.lmms.checkpoint import locate

    try:
        source = locate(config.model.pretrained)
    except ConfigError as error:
        yield Finding("checkpoint", FAIL, str(error), "Mend model.pretrained in the file.")
        return
    if Path(source).is_dir():
        yield _present(Path(source), bool(config.model.allow_bin))
        return
    revision = config.model.revision
    found = try_to_load_from_cache(source, "config.json", cache_dir=checkpoint_cache(), revision=revision)
    is_cached = isinstance(found, str)
    yield _present(Path(found).parent, bool(config.model.allow_bin)) if is_cached else _absent(source)


def _absent(name: str) -> Finding:
    if switches := offline_switches():
        fix = f"Unset {', '.join(switches)}, or download it before: `hf download {name}`."
        return Finding("checkpoint", FAIL, f"{name} is not in the cache, and nothing is downloaded", fix)
    found = f"{name} is not in the cache"
    size = _size_by_name(name)
    if size is not None:
        free = free_bytes(checkpoint_cache())
        found += f"; about {size / GB:.0f} GB by its name, {free / GB:.0f} GB are free"
        if size > free:
            return Finding("checkpoint", FAIL, found, "Free some, or set HF_HUB_CACHE to a folder on a larger disk.")
    fix = f"It is downloaded when the sweep begins (see that it fits), or now by `hf download {name}`."
    return Finding("checkpoint", WARN, found, fix)


def _size_by_name(name: str) -> float | None:
    """Bytes of the weights, if the name tells the billions of parameters."""
    billions = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z])", name.partition("/")[2], re.IGNORECASE)
    return float(billions[1]) * 1e9 * _BYTES_A_PARAMETER if billions else None


def _present(folder: Path, allow_bin: bool) -> Finding:
    again = f"Copy or download it again into {folder}, or mend model.pretrained."
    weights, listed = _weights(folder)
    missing = [name for name in ("config.json", *listed) if not (folder / name).is_file()]
    if missing or not weights:
        return Finding("checkpoint", FAIL, f"{folder} lacks {', '.join(missing) or 'weights'}", again)
    if weights[0].suffix == ".bin" and not allow_bin:
        fix = "Use a checkpoint with safetensors, or set allow_bin: true in the model section."
        return Finding("checkpoint", FAIL, f"{folder} has weights in .bin files only", fix)
    if cut := [file.name for file in weights if file.suffix == ".safetensors" and not _is_whole(file)]:
        return Finding("checkpoint", FAIL, f"{folder}: not whole: {', '.join(cut)}", again)
    size = sum(file.stat().st_size for file in weights)
    return Finding("checkpoint", OK, f"{folder}, {size / GB:.1f} GB of weights")


def _weights(folder: Path) -> tuple[list[Path], list[str]]:
    """Files of weights, and names of those that an index lists; safetensors before pickled ones."""
    for suffix, index in _INDEX.items():
        files = sorted(file for file in folder.iterdir() if file.suffix == suffix and file.is_file())
        if (folder / index).is_file():
            return files, sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
        if files:
            return files, []
    return [], []


def _is_whole(file: Path) -> bool:
    """Check that a safetensors file is as long as its header says: a copy that was cut is not."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            return True
    except SafetensorError:
        return False
