"""What LLaVA-1.5 and LLaVA-Video compute, restated slowly from the published behaviour of their authors' code."""

from __future__ import annotations

import math

import numpy as np
import torch
from original_checkpoints import PATCH, TILE, Parts
from PIL import Image
from torch import Tensor, nn

from vlm_pruner_eval.lmms.checkpoint import Checkpoint

SIDE = TILE // PATCH


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def tower_features(parts: Parts, pixels: Tensor) -> Tensor:
    """[n, tokens, D] of views [n, 3, TILE, TILE]: what the last layer but one gives, without a final norm, projected."""
    seen = []
    handle = parts.tower.encoder.layers[-2].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        parts.tower(pixels)
    handle.remove()
    states = seen[0] if isinstance(seen[0], Tensor) else seen[0][0]
    if parts.newline is None:  # CLIP's first token is not of the image
        states = states[:, 1:]
    with torch.no_grad():
        return parts.projector(states)


def video_features(parts: Parts, pixels: Tensor) -> Tensor:
    """[frames * 3 * 4, D] of frames: pooled to 3 x 3, then frame by frame, row by row, each row with the newline behind it."""
    frames = tower_features(parts, pixels).view(-1, SIDE, SIDE, 32).permute(0, 3, 1, 2)
    small = nn.functional.interpolate(frames, size=(3, 3), mode="bilinear").permute(0, 2, 3, 1)
    tokens = []
    for frame in small:
        for row in frame:
            tokens += [*row, parts.newline]
    return torch.stack(tokens)


def averaged_features(parts: Parts, pixels: Tensor) -> Tensor:
    """[frames * 2 * 3, D]: means of 2 x 2 patches, of 5 x 5 the last row and column left out, each row with the newline behind it."""
    frames = tower_features(parts, pixels).view(-1, SIDE, SIDE, 32)
    tokens = []
    for frame in frames:
        for row in range(2):
            tokens += [frame[2 * row : 2 * row + 2, 2 * col : 2 * col + 2].mean((0, 1)) for col in range(2)] + [parts.newline]
    return torch.stack(tokens)


def best_size(image: Image.Image, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Of sizes (width, height), the one that keeps most of the image, and of those the one that wastes least; the first of equals."""

    def merit(size: tuple[int, int]) -> tuple[int, int]:
        scale = min(size[0] / image.width, size[1] / image.height)
        kept = min(int(image.width * scale) * int(image.height * scale), image.width * image.height)
        return kept, kept - size[0] * size[1]

    return max(sizes, key=merit)


def prepared(image: Image.Image) -> Tensor:
    """[3, TILE, TILE] as the original's SigLIP processor: resized without cropping, values in [-1, 1]."""
    resized = np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy((resized / 255 - 0.5) / 0.5).permute(2, 0, 1)


def anyres_views(image: Image.Image, sizes: list[tuple[int, int]]) -> Tensor:
    """[1 + tiles, 3, TILE, TILE]: the whole image, and the tiles of the image scaled into the middle of the best size."""
    width, height = best_size(image, sizes)
    scale = min(width / image.width, height / image.height)
    inner = min(math.ceil(image.width * scale), width), min(math.ceil(image.height * scale), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(inner, Image.Resampling.BICUBIC), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    tiles = [canvas.crop((x, y, x + TILE, y + TILE)) for y in range(0, height, TILE) for x in range(0, width, TILE)]
    return torch.stack([prepared(view) for view in (image, *tiles)])


def image_features(parts: Parts, image: Image.Image, views: Tensor, sizes: list[tuple[int, int]], most_tiles: int) -> Tensor:
    """Base view, then the tiles joined, without their padding, shrunk if there are many, each row with the newline behind it."""
    base, *tiles = tower_features(parts, views).view(-1, SIDE, SIDE, 32)
    across = best_size(image, sizes)[0] // TILE
    whole = torch.cat([torch.cat(tiles[i : i + across], 1) for i in range(0, len(tiles), across)])
    rows, cols = whole.shape[:2]
    if image.width / image.height > cols / rows:
        cut = (rows - int(image.height * cols / image.width)) // 2
        whole = whole[cut : rows - cut]
    else:
        cut = (cols - int(image.width * rows / image.height)) // 2
        whole = whole[:, cut : cols - cut]
    rows, cols = whole.shape[:2]
    times = math.sqrt(rows * cols / (most_tiles * SIDE**2))
    if times > 1.1:
        size = (int(rows // times), int(cols // times))
        whole = nn.functional.interpolate(whole.permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)
    return torch.cat([base.flatten(0, 1), *(torch.cat([row, parts.newline[None]]) for row in whole)])


def original_embeds(parts: Parts, text: str, features: list[Tensor]) -> Tensor:
    """[1, L, D]: the pieces of a prompt between its media tokenized apart, with the features in between."""
    first, *rest = [parts.tokenizer(piece).input_ids for piece in text.replace("<video>", "<image>").split("<image>")]
    begin = parts.tokenizer.bos_token_id
    embedded = [parts.language.get_input_embeddings()(torch.tensor(first))]
    for piece, states in zip(rest, features, strict=True):
        ids = piece[begin is not None and piece[:1] == [begin] :]
        embedded += [states, parts.language.get_input_embeddings()(torch.tensor(ids))]
    return torch.cat(embedded)[None].detach()


def assert_same(checkpoint: Checkpoint, inputs: dict[str, Tensor], parts: Parts, embeds: Tensor) -> list[int]:
    """The language model is given the same states, and says the same; returns its answer."""
    seen, model = [], checkpoint.model
    first = model.model.language_model.layers[0]
    handle = first.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        ours = model.generate(**inputs, **options)
        handle.remove()
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        theirs = parts.language.generate(inputs_embeds=embeds, attention_mask=mask, eos_token_id=2, **options)
    assert seen[0].shape == embeds.shape
    torch.testing.assert_close(seen[0], embeds, atol=2e-5, rtol=0)
    answer = ours.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert answer == theirs.sequences[0].tolist()
    n_rows = theirs.logits[0].shape[1]
    torch.testing.assert_close(torch.stack(ours.logits)[..., :n_rows], torch.stack(theirs.logits), atol=1e-3, rtol=0)
    return answer
