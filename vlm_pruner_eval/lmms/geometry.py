"""What a run's record says about its processor, so that tokens can be laid on images later, without the model."""

from __future__ import annotations

from typing import Any

from PIL import Image
from transformers import PretrainedConfig, ProcessorMixin

from vlm_pruner_eval.lmms.protocols import Protocol


def describe_geometry(config: PretrainedConfig, processor: ProcessorMixin, protocol: Protocol) -> dict[str, Any]:
    """The settings that decide which part of an image a visual token shows, in plain types; read by `report.geometry`.

    Returns
    -------
    dict
        ``family`` (the model type), and by family, in pixels: ``patch``, ``resize``, ``crop`` and ``pad`` of LLaVA-1.5;
        ``tile``, ``patch``, ``pinpoints`` (height, width) and ``max_tiles`` of tiled LLaVAs; ``temporal_patch`` (frames a token)
        of Qwen; ``tile``, ``min_tiles`` and ``max_tiles`` of InternVL.
    """
    family, vision, images = config.model_type, config.vision_config, processor.image_processor
    if family == "llava":
        return {
            "family": family,
            "patch": vision.patch_size,
            "resize": _size(images, "size") if images.do_resize else None,
            "crop": list(_size(images, "crop_size").values()) if getattr(images, "do_center_crop", False) else None,
            "pad": _is_square_after(protocol, processor) or bool(getattr(images, "do_pad", False)),
        }
    if family == "internvl":
        tiles = {"min_tiles": images.min_patches, "max_tiles": images.max_patches}
        return {"family": family, "tile": vision.image_size[0], **tiles}
    if hasattr(config, "image_grid_pinpoints"):
        ratio = getattr(config, "vision_aspect_ratio", None)  # "anyres_max_9"
        return {
            "family": family,
            "tile": vision.image_size,
            "patch": vision.patch_size,
            "pinpoints": [list(shape) for shape in config.image_grid_pinpoints],
            "max_tiles": None if ratio is None else int(ratio.rpartition("_")[2]),
        }
    return {"family": family, "temporal_patch": vision.temporal_patch_size}


def _size(images: object, name: str) -> dict[str, int]:
    """A size of an image processor; transformers has it as a mapping or as an object of its own."""
    found = dict(getattr(images, name))
    return {key: int(found[key]) for key in ("height", "width", "shortest_edge") if found.get(key) is not None}


def _is_square_after(protocol: Protocol, processor: ProcessorMixin) -> bool:
    """Whether the protocol pads: seen on an image, as protocols are functions."""
    return protocol.view(Image.new("RGB", (16, 8)), processor).size == (16, 16)
