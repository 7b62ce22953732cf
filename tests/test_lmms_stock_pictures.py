"""Pictures in every mode as lmms-eval's stock wrappers show them to their models, held against what ours is shown.

The stock classes run as they are up to `generate`. A picture is shown alike if the stock wrapper makes the same pixels of it as of
the RGB image that ours makes of it. Where not, it is on purpose, and both are pinned: `DIFFERENT` says why.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("decord", reason="lmms-eval's stock wrappers import decord, which it does not install by itself")
pytest.importorskip("qwen_vl_utils", reason="lmms-eval's stock Qwen wrappers resize images with qwen_vl_utils")

from picture_modes import KINDS
from PIL import Image
from stock_wrappers import FAMILIES, QWEN, STOCK, Side, stock_model
from transformers.image_transforms import convert_to_rgb

from vlm_pruner_eval.lmms.pictures import as_rgb

LEVEL = 1 / 255 / 0.26  # one of 256 brightness levels after normalization, about
ALIKE, APART = 4 * LEVEL, 20 * LEVEL  # on average over a picture; the stock Qwen2-VL compresses every one as a JPEG
EVERY, QWEN2_5, QWEN2 = set(FAMILIES), set(QWEN), {"qwen2_vl"}
UPPER_BITS = ("I;16", "I;16B", "16 bit PNG", "16 bit TIFF", "16 bit, tRNS", "I of 16 bits")
DIFFERENT = {
    # Pillow's conversion clips 16 bits at 255, so that all but the darkest of a scan is white
    **dict.fromkeys(UPPER_BITS, EVERY),
    # neither the processors nor qwen_vl_utils see that these are transparent, and show the colour behind
    **dict.fromkeys(("P, RGBA palette", "RGBa"), EVERY),
    # qwen_vl_utils puts RGBA on white, and leaves all else to Pillow, which leaves transparency out
    **dict.fromkeys(("LA", "PA", "P, tRNS bytes"), QWEN2_5),
    # the stock Qwen2-VL makes a JPEG of every image, which leaves transparency out
    **dict.fromkeys(("RGBA", "RGBA, half", "P, tRNS byte", "P, tRNS of a GIF", "RGB, tRNS", "L, tRNS"), QWEN2),
    # a photo of a phone that was held upright lies on its side
    "EXIF orientation": EVERY,
}
FAILS = {"La"}  # Pillow has no conversion to RGB: the stock run ends, or goes on without the image
COMPOSES = np.asarray(convert_to_rgb(Image.new("RGBA", (1, 1)))).mean() == 255  # transformers before 5 made it black

pytestmark = pytest.mark.skipif(not COMPOSES, reason="this version of transformers leaves transparency out in every family")


# of each way to prepare an image (by the processor alone, by qwen_vl_utils, by a JPEG first) one family here, the others under --all
USUAL = ("llava", "qwen2_vl", "qwen2_5_vl")


@pytest.fixture(params=[name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def stock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Side:
    """A stock wrapper whose model is not run."""
    side = Side(stock_model(request.param), STOCK[request.param])

    def noted(**kwargs: object) -> torch.Tensor:
        side.calls.append(kwargs)
        return torch.cat([kwargs["input_ids"], kwargs["input_ids"][:, :1]], 1)

    monkeypatch.setattr(side.model.model, "generate", noted)
    return side


def shown(side: Side, image: Image.Image) -> torch.Tensor:
    """The pixels of one image on their way into the model."""
    side.ask([{"question": "Q", "images": [image]}])
    return side.calls[0]["pixel_values"].float()


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean distance; infinite for pictures of different shapes."""
    return float((first - second).abs().mean()) if first.shape == second.shape else float("inf")


def test_a_mode_is_shown_as_the_stock_wrapper_shows_it_unless_that_is_wrong(stock: Side) -> None:
    family = next(name for name in FAMILIES if STOCK[name] is stock.stock)
    side = 32 if family.startswith("qwen3_vl") else 28  # of a merged patch, so that nothing is resized
    found = {}
    for name, kind in KINDS.items():
        if kind.seen and name not in FAILS:
            ours = shown(stock, as_rgb(kind.make(2 * side, 4 * side)))
            theirs = shown(stock, kind.make(2 * side, 4 * side))
            found[name] = apart(theirs, ours)
    expected = {name for name, families in DIFFERENT.items() if family in families}
    assert {name for name, distance in found.items() if distance > ALIKE} == expected
    assert min(found[name] for name in expected) > APART, "a difference is none of rounding"


def test_a_mode_that_pillow_does_not_convert_ends_the_stock_run_or_loses_the_image(stock: Side) -> None:
    try:
        stock.ask([{"question": "Q", "images": [KINDS["La"].make(56, 112)]}])
    except ValueError as error:
        assert "conversion from La" in str(error)
    else:
        assert "pixel_values" not in stock.calls[0]
