"""Tokens on pixels: an image is painted white in one place, and the real processor and model say which token sees it.

The vision towers are made local (nothing of one patch reaches another), so that a token changes only with its own pixels.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import pytest
import tiny_models
import torch
import transformers
from lmms_requests import tiny_llava
from PIL import Image, ImageDraw
from tiny_checkpoints import PROCESSORS
from torch import Tensor, nn

from vlm_pruner_eval import ConfigError, get_pruner, prune
from vlm_pruner_eval.report.geometry.views import Box, Medium, views
from vlm_pruner_eval.vlms import family_of
from vlm_pruner_eval.vlms.family import HF, PromptProtocol
from vlm_pruner_eval.vlms.internvl import tile_arrangement
from vlm_pruner_eval.vlms.llava import PAPER
from vlm_pruner_eval.vlms.parts.anyres import best_pinpoint

MIXERS = re.compile(r"(attn|attention)\.(out_proj|proj|projection_layer)\.|(mlp|ffn)\.(fc2|down_proj|linear_fc2)\.")
SIZES = [(100, 150), (230, 120)]  # (width, height): higher than wide, and wider than high
TILE = 62  # of 4 x 14 pixels that the tower sees, and 6 that it does not
PINPOINTS = [[TILE * rows, TILE * cols] for rows in range(1, 5) for cols in range(1, 5)]


@dataclass(frozen=True)
class Eyes:
    """A model and its processor; what is done to an image before."""

    model: nn.Module
    processor: transformers.ProcessorMixin
    protocol: PromptProtocol = HF

    def geometry(self) -> dict:
        config = self.model.config
        return {"family": config.model_type, **family_of(self.model).geometry(config, self.processor, self.protocol)}

    @torch.no_grad()
    def look(self, *images: Image.Image) -> tuple[Tensor, list[list[int]]]:
        """Visual embeddings [n_visual, D] of a prompt with these images, and the layouts that its record has."""
        prompt = f"{self.processor.image_token}\n" * len(images) + "what"
        pictures = [self.protocol.view(image, self.processor) for image in images]
        inputs = self.processor(text=[prompt], images=[pictures], return_tensors="pt")
        inputs.pop("token_type_ids", None)
        seen: list[Tensor] = []
        handle = self.model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
        )
        try:
            with prune(self.model, get_pruner("none", pruning_rate=0)) as ledger:
                self.model(**inputs)
        finally:
            handle.remove()
        visual = family_of(self.model).is_visual(self.model.config, inputs["input_ids"])[0]
        return seen[0][visual], ledger.records[0].layouts


def local(model: nn.Module) -> nn.Module:
    """Let every block of the vision tower add nothing to its input."""
    silenced = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"vision_tower|visual", name) and MIXERS.search(name):
                parameter.zero_()
                silenced += 1
    assert silenced, "no vision tower found"
    return model.eval()


def _onevision_of_62_pixels() -> Eyes:
    config = tiny_models.FAMILIES["llava_onevision"].config()
    config.vision_config.image_size, config.image_grid_pinpoints = TILE, PINPOINTS
    config.vision_aspect_ratio = "anyres_max_9"
    processor = PROCESSORS["llava_onevision"]()
    processor.image_processor.size = {"height": TILE, "width": TILE}
    processor.image_processor.image_grid_pinpoints = PINPOINTS
    processor.vision_aspect_ratio = "anyres_max_9"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlavaOnevisionForConditionalGeneration._from_config(config)
    return Eyes(local(model), processor)


@functools.cache
def eyes(name: str) -> Eyes:
    if name.startswith("llava_crop") or name.startswith("llava_pad"):
        model = transformers.LlavaForConditionalGeneration.from_pretrained(tiny_llava())
        processor = transformers.LlavaProcessor.from_pretrained(tiny_llava())
        return Eyes(local(model), processor, PAPER if name == "llava_pad" else HF)
    if name == "onevision_62":
        return _onevision_of_62_pixels()
    return Eyes(local(tiny_models.build(name)), PROCESSORS[name]())


FAMILIES = sorted([*PROCESSORS, "llava_crop", "llava_pad", "onevision_62"])


def black(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size)


def painted(size: tuple[int, int], box: Box, *, at: tuple[float, float], share: float) -> Image.Image:
    """White in the part of `box` whose middle is `at` (shares of its sides) and whose sides are `share` of the box's."""
    image, (left, top, right, bottom) = black(size), box
    x, y = left + at[0] * (right - left), top + at[1] * (bottom - top)
    dx, dy = (right - left) * share / 2, (bottom - top) * share / 2
    ImageDraw.Draw(image).rectangle((x - dx, y - dy, x + dx, y + dy), fill="white")
    return image


def inside(box: Box, size: tuple[int, int]) -> bool:
    return box[0] >= -0.5 and box[1] >= -0.5 and box[2] <= size[0] + 0.5 and box[3] <= size[1] + 0.5


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_token_that_changes_is_the_one_whose_rectangle_was_painted(name: str, size: tuple[int, int]) -> None:
    found = eyes(name)
    before, layouts = found.look(black(size))
    pictures = views(found.geometry(), [Medium(*size)], layouts)
    tokens = [token for view in pictures for token in view.boxes]
    assert len(tokens) == len(set(tokens)) and set(tokens) <= set(range(len(before)))
    for view in pictures:
        own = sorted(token for token, box in view.boxes.items() if inside(box, size))
        assert len(own) >= min(7, len(view.boxes))
        for token in own[:: max(1, len(own) // 8)]:
            for at in ((0.25, 0.25), (0.75, 0.75)):
                after, _ = found.look(painted(size, view.boxes[token], at=at, share=0.34))
                change = (after - before).norm(dim=-1)
                assert max(own, key=lambda index: float(change[index])) == token, f"{view.title}: token {token} at {at}"


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "internvl"])
def test_rectangles_cover_the_image_once_in_each_view(name: str) -> None:
    found, size = eyes(name), (170, 110)
    _, layouts = found.look(black(size))
    for view in views(found.geometry(), [Medium(*size)], layouts):
        area = sum((right - left) * (bottom - top) for left, top, right, bottom in view.boxes.values())
        assert area == pytest.approx(size[0] * size[1], rel=0.2), view.title  # border is cut off in whole patches
        assert len(set(view.boxes.values())) == len(view.boxes)
        for left, top, right, bottom in view.boxes.values():
            assert view.canvas[0] - 0.01 <= left < right <= view.canvas[2] + 0.01
            assert view.canvas[1] - 0.01 <= top < bottom <= view.canvas[3] + 0.01


def test_shrunk_tiles_have_fewer_tokens_than_patches_and_lie_evenly() -> None:
    found, size = eyes("onevision_62"), (230, 230)
    before, layouts = found.look(black(size))
    assert layouts[0][1:3] == [12, 12], "4 x 4 tiles of 4 x 4 patches are more than 9 tiles may have"
    _, tiles = views(found.geometry(), [Medium(*size)], layouts)
    for token in sorted(tiles.boxes)[::11]:  # of its neighbours' patches, too, so only its middle is its own
        change = (found.look(painted(size, tiles.boxes[token], at=(0.5, 0.5), share=0.34))[0] - before).norm(dim=-1)
        assert max(tiles.boxes, key=lambda index: float(change[index])) == token


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "llava_next"])
def test_several_images_each_have_their_own(name: str) -> None:
    sizes = [(150, 100), (90, 140)]
    found = eyes(name)
    before, layouts = found.look(*map(black, sizes))
    pictures = views(found.geometry(), [Medium(*size) for size in sizes], layouts)
    assert {view.medium for view in pictures} == {0, 1}
    for view in pictures:
        token = sorted(view.boxes)[len(view.boxes) // 2]
        images = [black(size) for size in sizes]
        images[view.medium] = painted(sizes[view.medium], view.boxes[token], at=(0.5, 0.5), share=0.5)
        change = (found.look(*images)[0] - before).norm(dim=-1)
        assert max(view.boxes, key=lambda index: float(change[index])) == token
        others = [index for other in pictures if other.medium != view.medium for index in other.boxes]
        assert float(change[others].max()) == 0


def test_padding_is_outside_the_image_and_cropped_parts_have_no_token() -> None:
    size = (150, 100)
    for name in ("llava_pad", "llava_crop"):
        found = eyes(name)
        (view,) = views(found.geometry(), [Medium(*size)], found.look(black(size))[1])
        left, top, right, bottom = zip(*view.boxes.values(), strict=True)
        if name == "llava_pad":
            assert (min(left), min(top), max(right), max(bottom)) == pytest.approx((0, -25, 150, 125), abs=0.5)
            assert view.canvas == pytest.approx((0, -25, 150, 125), abs=0.5)
        else:
            assert (min(left), min(top), max(right), max(bottom)) == pytest.approx((25, 0, 125, 100), abs=1)
            assert view.canvas == (0, 0, 150, 100)


def test_choices_of_tiles_are_those_of_the_processors() -> None:
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    generator = torch.Generator().manual_seed(3)
    for height, width in torch.randint(20, 900, (200, 2), generator=generator).tolist():
        assert best_pinpoint((height, width), PINPOINTS) == tuple(select_best_resolution((height, width), PINPOINTS))
        cols, rows = get_optimal_tiled_canvas((height, width), (TILE, TILE), 1, 12)
        assert tile_arrangement((height, width), TILE, 1, 12) == (rows, cols)


# ---- videos: no processor of images has a say in them
VIDEO = Medium(64, 48, n_frames=4, is_video=True)
TILED = {"tile": 56, "patch": 14, "pinpoints": [[56, 56]], "max_tiles": 9}


@pytest.mark.parametrize(
    ("geometry", "layouts", "frames"),
    [
        ({"family": "llava_onevision", **TILED}, [(17, 2, 2, 4)], [0, 1, 2, 3]),
        ({"family": "llava_video", **TILED}, [(24, 2, 2, 4)], [0, 1, 2, 3]),
        ({"family": "qwen2_vl", "temporal_patch": 2}, [(12, 2, 3, 2)], [0, 2]),
        ({"family": "internvl", "tile": 56, "min_tiles": 1, "max_tiles": 4}, [(4, 2, 2, 1)] * 4, [0, 1, 2, 3]),
    ],
    ids=["onevision", "llava_video", "qwen", "internvl"],
)
def test_frames_of_a_video_are_views_of_their_own(geometry: dict, layouts: list[tuple], frames: list[int]) -> None:
    found = views(geometry, [VIDEO], layouts)
    assert [view.frame for view in found] == frames
    _, rows, cols, _ = layouts[0]
    for view in found:
        assert len(view.boxes) == rows * cols
        first = view.boxes[min(view.boxes)]
        assert first == pytest.approx((0, 0, 64 / cols, 48 / rows))
    newlines = set(range(sum(layout[0] for layout in layouts))) - {token for view in found for token in view.boxes}
    expected = {"llava_onevision": {16}, "llava_video": set(range(2, 24, 3))}
    assert newlines == expected.get(geometry["family"], set())


@pytest.mark.parametrize(("side", "seen"), [(2, 4 / 5), (3, 1.0)])
def test_an_odd_row_of_patches_is_in_no_token_where_frames_are_pooled_by_averages(side: int, seen: float) -> None:
    """Five patches a side: 2 x 2 tokens are averages of four patches each, 3 x 3 tokens show all."""
    medium = Medium(70, 70, n_frames=1, is_video=True)
    geometry = {"family": "llava_video", "tile": 70, "patch": 14, "pinpoints": [[70, 70]], "max_tiles": 9}
    (view,) = views(geometry, [medium], [(side * (side + 1), side, side, 1)])
    assert view.boxes[max(view.boxes)][2:] == pytest.approx((70 * seen, 70 * seen))


def test_layouts_agree_with_the_families_own_coordinates() -> None:
    """`Layout.shape` of LLaVA-Video's newline after every row, and of LLaVA-NeXT's two views."""
    model = tiny_models.build("llava_video")
    layout = family_of(model).layouts(model.model, "video", {"pixel_values_videos": torch.zeros(1, 3, 3, 56, 56)})[0]
    assert layout.shape == (3 * 2 * 3, 2, 2, 3)
    (first, *_) = views({"family": "llava_video", **TILED}, [Medium(64, 48, 3, True)], [layout.shape])
    cells = layout.coords[sorted(first.boxes)]
    assert cells.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]


@pytest.mark.parametrize(
    ("geometry", "media", "layouts", "sentence"),
    [
        ({"family": "florence"}, [VIDEO], [(4, 2, 2, 1)], "got the family 'florence', expected one of glm_ocr, internvl, llava"),
        ({}, [VIDEO], [(4, 2, 2, 1)], "got the family None"),
        ({"family": "qwen2_vl"}, [Medium(10, 10)], [], "layouts of 0 images and videos, expected 1"),
        ({"family": "qwen2_vl"}, [Medium(10, 10)], [(4, 2, 2, 1)] * 2, "1 layouts are left over"),
        ({"family": "qwen2_vl"}, [Medium(10, 10)], [(5, 2, 2, 1)], "makes 4 tokens, but the record has 5"),
        ({"family": "qwen2_vl", "temporal_patch": 2}, [VIDEO], [(12, 2, 2, 3)], "has 3 x 2 frames, but the video 4"),
        ({"family": "llava_video", **TILED}, [VIDEO], [(18, 2, 2, 3)], "has 3 frames, but the video 4"),
        ({"family": "llava_next", **TILED, "max_tiles": None}, [Medium(56, 56)], [(28, 4, 2, 2)], "makes 36 tokens, but the record has 28"),
        ({"family": "internvl", "tile": 56, "min_tiles": 1, "max_tiles": 4}, [Medium(100, 50)], [(4, 2, 2, 1)], "makes 3 tiles"),
    ],
)
def test_what_does_not_fit_is_a_sentence(geometry: dict, media: list[Medium], layouts: list[tuple], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        views(geometry, media, layouts)
