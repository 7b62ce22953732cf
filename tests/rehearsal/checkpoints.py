"""Tiny checkpoints under the names of the published ones, with random weights and answers of one token."""

from __future__ import annotations

import json
from pathlib import Path

from original_checkpoints import llava_video_parts, write_original
from tiny_checkpoints import write_tiny, write_tiny_llava

FAMILIES = {
    "llava-hf/llava-v1.6-vicuna-7b-hf": "llava_next",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2_vl",
    "Qwen/Qwen3-VL-4B-Instruct": "qwen3_vl",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "llava_onevision",
}


def write_checkpoints(root: Path) -> None:
    """Write all that configs/paper and suite_2026 name, but for the 13B model, which is run as the 7B one."""
    written = [write_tiny_llava(root / "llava-hf/llava-1.5-7b-hf", max_positions=4096)]
    written += [write_tiny(family, root / name) for name, family in FAMILIES.items()]
    video = root / "lmms-lab/LLaVA-Video-7B-Qwen2"
    made = write_original(root / "made", *llava_video_parts())
    video.parent.mkdir(parents=True)
    made.rename(video)
    for folder in [*written, video]:
        end_at_once(folder)


def end_at_once(checkpoint: Path) -> None:
    """Let every token end an answer: random weights would never say the one that should."""
    path, config = checkpoint / "generation_config.json", json.loads((checkpoint / "config.json").read_text())
    n_words = config["vocab_size"] if "vocab_size" in config else config["text_config"]["vocab_size"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": list(range(n_words))}))
