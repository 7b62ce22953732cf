"""What one sweep file needs: its model id, device, attention and checkpoint, looked up without downloading anything."""

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
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def model_id(config: SweepConfig) -> Iterator[Finding]:
    """The model id of the file."""
    from vlm_pruner_eval.lmms.plugin import MODELS

    if config.model.id in MODELS:
        yield Finding("model id", OK, config.model.id)
    else:
        yield Finding("model id", FAIL, f"{config.model.id} is unknown", f"Mend model.id; {closest(config.model.id, MODELS)}")


def device(config: SweepConfig) -> Iterator[Finding]:
    """Whether the device and the attention backend of the file can be had here."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    from vlm_pruner_eval.lmms.settings import ATTENTION

    wanted, attention = config.model.device, config.model.attn_implementation
    if wanted is not None and wanted.startswith("cuda") and not torch.cuda.is_available():
        yield Finding("device", FAIL, f"the file asks for {wanted}, but torch sees no GPU", "Mend that, or remove model.device.")
    if attention not in ATTENTION:
        yield Finding("attention of the file", FAIL, f"{attention} is unknown", f"Mend it; {closest(attention, ATTENTION)}")
    elif attention == "flash_attention_2" and not is_flash_attn_2_available():
        fix = "Install flash-attn for this torch and GPU, or set model.attn_implementation to sdpa."
        yield Finding("attention of the file", FAIL, "transformers can't use flash_attention_2 here", fix)
    else:
        yield Finding("attention of the file", OK, attention)


def checkpoint(config: SweepConfig) -> Iterator[Finding]:
    """Whether the checkpoint is on this machine, whole."""
    from vlm_pruner_eval.lmms.checkpoint import locate

    try:
        source = locate(config.model.pretrained)
    except ConfigError as error:
        yield Finding("checkpoint", FAIL, str(error), "Mend model.pretrained in the file.")
        return
    folder = Path(source) if Path(source).is_dir() else _cached(source, config.model.revision)
    yield _absent(source) if folder is None else _present(folder, bool(config.model.allow_bin))


def _cached(name: str, revision: str | None) -> Path | None:
    """The snapshot of a hub checkpoint in the cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", cache_dir=checkpoint_cache(), revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _absent(name: str) -> Finding:
    if switches := offline_switches():
        fix = f"Unset {', '.join(switches)}, or download it before: `hf download {name}`."
        return Finding("checkpoint", FAIL, f"{name} is not in the cache, and nothing is downloaded", fix)
    found, size, free = f"{name} is not in the cache", _size_by_name(name), free_bytes(checkpoint_cache())
    if size is None:
        return Finding("checkpoint", WARN, found, "It is downloaded when the sweep begins; see that it fits.")
    found += f"; about {size / GB:.0f} GB by its name, {free / GB:.0f} GB are free"
    if size > free:
        return Finding("checkpoint", FAIL, found, "Free some, or set HF_HUB_CACHE to a folder on a larger disk.")
    return Finding("checkpoint", WARN, found, f"It is downloaded when the sweep begins, or now by `hf download {name}`.")


def _size_by_name(name: str) -> float | None:
    """Bytes of the weights, if the name tells the billions of parameters."""
    billions = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z])", name.partition("/")[2], re.IGNORECASE)
    return float(billions[1]) * 1e9 * _BYTES_A_PARAMETER if billions else None


def _present(folder: Path, allow_bin: bool) -> Finding:
    again = f"Copy or download it again into {folder}, or mend model.pretrained."
    weights, missing = _weights(folder)
    missing = [name for name in ("config.json", *missing) if not (folder / name).is_file()]
    if missing or not weights:
        return Finding("checkpoint", FAIL, f"{folder} lacks {', '.join(missing) or 'weights'}", again)
    if all(file.suffix == ".bin" for file in weights) and not allow_bin:
        fix = "Use a checkpoint with safetensors, or set allow_bin: true in the model section."
        return Finding("checkpoint", FAIL, f"{folder} has weights in .bin files only", fix)
    cut = [file.name for file in weights if file.suffix == ".safetensors" and not is_whole(file)]
    if cut:
        return Finding("checkpoint", FAIL, f"{folder}: not whole: {', '.join(cut)}", again)
    size = sum(file.stat().st_size for file in weights)
    return Finding("checkpoint", OK, f"{folder}, {size / GB:.1f} GB of weights")


def _weights(folder: Path) -> tuple[list[Path], list[str]]:
    """Files of weights, and names of those that an index lists; safetensors before pickled ones."""
    for suffix, index in zip((".safetensors", ".bin"), _INDEX, strict=True):
        files = sorted(file for file in folder.iterdir() if file.suffix == suffix and file.is_file())
        if (folder / index).is_file():
            return files, sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
        if files:
            return files, []
    return [], []


def is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says: a copy that was cut is not."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 + length:
            return False
        header = json.loads(stream.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)
