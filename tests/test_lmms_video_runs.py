"""Videos through the chat wrapper: every family that takes them, on files and lists of frames, alone and beside images."""

from __future__ import annotations

import atexit
import functools
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from lmms_requests import GREEDY, request, set_batch_size, texts
from PIL import Image
from thinning import only
from tiny_checkpoints import PROCESSORS, checkpoint
from tiny_videos import all_frames, pictures, write_video

from vlm_pruner_eval import ConfigError, PruningError, keep_count
from vlm_pruner_eval.lmms import PrunedModel, load
from vlm_pruner_eval.lmms.inputs import move_inputs
from vlm_pruner_eval.lmms.prompts import Request
from vlm_pruner_eval.vlms import family_named

FAMILIES = [name for name in sorted([*PROCESSORS, "llava_video"]) if "video" in family_named(f"vlmpruner_{name}").spec.media]
QWEN = [name for name in FAMILIES if name.startswith("qwen")]
RATES = [("vlmpruner", 0), ("vlmpruner", "2/3"), ("vlmpruner", "8/9"), ("fastv", "8/9")]
# every family by default, with one method and rate each
BATCHED = only([(family, *one) for family in FAMILIES for one in RATES], [(family, *RATES[1 + i % 3]) for i, family in enumerate(FAMILIES)])
MAX_FRAMES = 6
LENGTHS = [[40], [5], [1], [5, 5], [30], [40], [], []]  # frames of the videos of each document
FILE, _, LONE, _, OTHER_FILE, MIXED, IMAGE_ONLY, NO_MEDIA = range(8)


@functools.cache
def clip(n: int, seed: int) -> Path:
    return write_video(Path(_folder()) / f"{n}_{seed}.mp4", pictures(n, seed=seed))


@functools.cache
def _folder() -> str:
    folder = tempfile.mkdtemp(prefix="tiny_videos_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def documents() -> list[dict]:
    image = Image.fromarray(pictures(1, 60, 90, seed=9)[0])
    listed = [Image.fromarray(frame) for frame in pictures(5, seed=1)]
    return [
        {"videos": [str(clip(40, 0))], "images": []},
        {"videos": [listed], "images": []},
        {"videos": [pictures(1, seed=2)], "images": []},
        {"videos": [pictures(5, seed=3), listed], "images": []},
        {"videos": [str(clip(30, 4))], "images": []},
        {"videos": [str(clip(40, 0))], "images": [image]},
        {"videos": [], "images": [image]},
        {"videos": [], "images": []},
    ]


def to_messages(document: dict) -> list[dict]:
    parts = [{"type": kind, "url": item} for kind in ("image", "video") for item in document[f"{kind}s"]]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": f"What{'?' * len(parts)}"}]}]


def asked(i: int, **options: object):
    return request("clips", i, options=GREEDY | options, messages=to_messages)


@functools.cache
def _loaded(family: str) -> PrunedModel:
    model = load(f"vlmpruner_{family}", pretrained=checkpoint(family), max_frames_num=MAX_FRAMES)
    model.context.keep_loaded = True
    return model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> PrunedModel:
    model = _loaded(family)
    model.configure("none")
    model.context.refuses_failures = False
    model.task_dict = {"clips": {"test": documents()}}
    set_batch_size(model, 1)
    return model


def inputs_of(model: PrunedModel, i: int) -> dict[str, torch.Tensor]:
    return move_inputs(model._inputs([model.prompt_of(Request.of(0, asked(i)))]), model.device, model.dtype)


def video_scopes(family: str, n_frames: int) -> list[int]:
    """Tokens of each budget scope of a video of 64 x 48 pixels, restated from the families' papers."""
    if family == "internvl":
        return [4] * n_frames  # a frame is a tile
    if family == "llava_onevision":
        return [4 * n_frames + 1]
    if family == "llava_video":
        return [n_frames * 3 * (3 + 1)]  # 5 x 5 patches pooled to 3 x 3, every row closed
    return [math.ceil(n_frames / 2) * 4]  # two frames make one; 2 x 2 merged patches


def scopes(family: str, model: PrunedModel, i: int) -> list[int]:
    """Tokens of each budget scope of document `i`, its image first."""
    found = [n for length in LENGTHS[i] for n in video_scopes(family, min(MAX_FRAMES, length))]
    if documents()[i]["images"]:
        ids = inputs_of(model, IMAGE_ONLY)["input_ids"]
        n_image = int((ids == model.tokenizer.convert_tokens_to_ids(model.processor.image_token)).sum())
        found = [*([4] * (n_image // 4) if family == "internvl" else [n_image]), *found]
    return found


def ask(model: PrunedModel, batch_size: int) -> list[str]:
    set_batch_size(model, batch_size)
    model.answers = []
    answers = texts(model, [asked(i) for i in range(len(documents()))])
    assert [answer.error for answer in model.answers] == [None] * len(answers)
    return answers


@pytest.mark.parametrize(("family", "method", "rate"), BATCHED, indirect=["family"])
def test_batched_answers_equal_single_ones_and_what_was_asked_was_kept(family: str, model: PrunedModel, method: str, rate: str) -> None:
    found = [scopes(family, model, i) for i in range(len(LENGTHS))]
    expected = [(len(tokens), sum(tokens), sum(keep_count(n, rate) for n in tokens)) for tokens in found]
    model.configure(method, rate)
    answers = {}
    for size in (1, 4):
        answers[size] = ask(model, size)
        assert [(a.record.n_images, a.record.n_visual, a.record.n_kept) for a in model.answers] == expected
    assert answers[1] == answers[4]
    assert len(set(answers[1])) > 4, "the tiny model must answer differently to different documents"
    assert max(answer.batch_size for answer in model.answers) > 1


@pytest.mark.parametrize("family", only(FAMILIES, ["internvl", "qwen3_vl"]), indirect=True)
def test_rate_zero_changes_no_answer_and_pruning_does(model: PrunedModel) -> None:
    plain = ask(model, 1)
    model.configure("vlmpruner", 0)
    assert ask(model, 1) == plain
    model.configure("vlmpruner", "8/9")
    assert ask(model, 1) != plain


def test_the_frames_that_reach_the_model_are_those_of_the_file(family: str, model: PrunedModel) -> None:
    """A file, and an array of its frames picked by hand, are the same pixels to the model."""
    picked = all_frames(clip(40, 0))[[0, 7, 15, 23, 31, 39]]
    other = all_frames(clip(40, 0))[[0, 7, 15, 23, 31, 38]]
    model.task_dict = {"clips": {"test": [{"videos": [video], "images": []} for video in (str(clip(40, 0)), picked, other)]}}
    name = "pixel_values" if family == "internvl" else "pixel_values_videos"
    of_file, of_array = (inputs_of(model, i)[name] for i in range(2))
    assert torch.equal(of_file, of_array)
    assert not torch.equal(of_file, inputs_of(model, 2)[name])
    n_pictures = {"internvl": 6, "qwen2_vl": 3 * 16, "qwen2_5_vl": 3 * 16, "qwen3_vl": 3 * 16, "qwen3_vl_moe": 3 * 16}.get(family, 1)
    assert of_file.shape[0] == n_pictures
    assert family not in ("llava_onevision", "llava_video") or of_file.shape[1] == 6


def test_more_frames_are_more_tokens_and_the_default_is_in_the_description(family: str) -> None:
    model = load(f"vlmpruner_{family}", pretrained=checkpoint(family))
    assert model.describe()["max_frames_num"] == (64 if family == "llava_video" else 32)
    assert _loaded(family).describe()["max_frames_num"] == MAX_FRAMES
    model.task_dict = {"clips": {"test": documents()}}
    texts(model, [asked(OTHER_FILE, max_new_tokens=1)])
    # Qwen3-VL's own bound is for all frames together: 36 tokens in this checkpoint, so that each pair of frames shrinks to one
    assert model.answers[0].record.n_visual == (15 if family.startswith("qwen3_vl") else sum(video_scopes(family, 30)))


# ---- Qwen: times
@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
def test_qwen3_reads_the_true_times_of_the_frames(model: PrunedModel) -> None:
    text = model.tokenizer.decode(inputs_of(model, FILE)["input_ids"][0])
    pad = model.processor.video_token
    # frames 0, 7, 15, 23, 31, 39 of 10 a second, two by two
    shown = "".join(f"<{time:.1f} seconds><|vision_start|>{pad * 4}<|vision_end|>" for time in (0.35, 1.9, 3.5))
    assert text == f"<|im_start|>user\n{shown}What?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_qwen2_5_gets_the_seconds_of_two_frames_unrounded(dtype: str) -> None:
    model = load("vlmpruner_qwen2_5_vl", pretrained=checkpoint("qwen2_5_vl"), max_frames_num=7, dtype=dtype)
    model.task_dict = {"clips": {"test": documents()}}
    inputs = inputs_of(model, FILE)
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([2 / (7 / 40 * 10)], rel=1e-6)
    assert inputs["pixel_values_videos"].dtype == model.dtype
    assert inputs["video_grid_thw"].tolist() == [[4, 4, 4]]


# ---- Qwen: pixels
@pytest.mark.parametrize("family", QWEN)
def test_bounds_on_pixels_are_those_of_images_and_of_every_frame(family: str) -> None:
    side = 32 if family.startswith("qwen3_vl") else 28
    model = load(f"vlmpruner_{family}", pretrained=checkpoint(family), max_frames_num=4, min_pixels=20 * side**2, max_pixels=25 * side**2)
    assert (model.describe()["min_pixels"], model.describe()["max_pixels"]) == (20 * side**2, 25 * side**2)
    model.task_dict = {"clips": {"test": documents()}}
    for i, name in ((IMAGE_ONLY, "image_grid_thw"), (FILE, "video_grid_thw"), (LONE, "video_grid_thw")):
        _, rows, cols = inputs_of(model, i)[name][0].tolist()
        assert 20 <= rows * cols / 4 <= 25
    texts(model, [asked(MIXED)])
    assert (model.answers[0].error, model.answers[0].record.n_images) == (None, 2)


@pytest.mark.parametrize("family", QWEN)
def test_one_bound_leaves_the_other_as_it_is(family: str) -> None:
    side = 32 if family.startswith("qwen3_vl") else 28
    model = load(f"vlmpruner_{family}", pretrained=checkpoint(family), min_pixels=30 * side**2)
    model.task_dict = {"clips": {"test": documents()}}
    _, rows, cols = inputs_of(model, IMAGE_ONLY)["image_grid_thw"][0].tolist()
    own = _loaded(family).processor.image_processor.size["longest_edge"]
    assert 30 <= rows * cols / 4 <= own / side**2
    with pytest.raises(ConfigError, match=f"beside the checkpoint's own bounds are {own + 1} and {own}; give both"):
        load(f"vlmpruner_{family}", pretrained=checkpoint(family), min_pixels=own + 1)


# ---- what fails, and what it costs
def _gives_up(document: dict) -> list[dict]:
    sys.exit("video path:/data/x.mp4 does not exist, please check")


@pytest.mark.parametrize("family", only(FAMILIES, ["llava_video", "qwen2_vl"]), indirect=True)
def test_a_video_that_can_not_be_read_costs_no_other_sample(model: PrunedModel, tmp_path: Path) -> None:
    expected = texts(model, [asked(FILE), asked(OTHER_FILE)])
    cut = write_video(tmp_path / "cut.avi", pictures(40))
    cut.write_bytes(b"RIFF" + bytes(500))
    model.task_dict = {
        "clips": {"test": [*documents(), {"videos": [str(tmp_path / "no.mp4")], "images": []}, {"videos": [str(cut)], "images": []}]}
    }
    set_batch_size(model, 4)
    given_up = request("clips", NO_MEDIA, messages=_gives_up)
    model.answers = []
    assert texts(model, [asked(FILE), asked(8), asked(9), given_up, asked(OTHER_FILE)]) == [expected[0], "", "", "", expected[1]]
    errors = [answer.error for answer in model.answers]
    assert "no.mp4: there is no such file" in errors[1]
    assert "cut.avi: can't be decoded" in errors[2]
    assert errors[3].endswith("the task gave up on this document (video path:/data/x.mp4 does not exist, please check).")
    model.context.refuses_failures = True
    with pytest.raises(PruningError, match="1 of 2 samples failed"):
        texts(model, [asked(FILE), asked(8)])


@pytest.mark.parametrize("family", only(FAMILIES, ["internvl", "qwen2_5_vl"]), indirect=True)
def test_a_file_that_breaks_while_it_is_decoded_costs_no_other_of_its_batch(family: str, model: PrunedModel, tmp_path: Path) -> None:
    shrinking = write_video(tmp_path / "clip.mp4", pictures(40))
    model.task_dict = {"clips": {"test": [*documents(), {"videos": [str(shrinking)], "images": []}]}}
    expected = texts(model, [asked(FILE)])
    set_batch_size(model, 4)
    real = model._inputs
    model._inputs = lambda batch: (write_video(shrinking, pictures(8)), real(batch))[1]  # between opening and decoding
    model.answers = []
    try:
        assert texts(model, [asked(FILE), asked(8)]) == [expected[0], ""]
    finally:
        del model._inputs
    assert "breaks off after 3 of the 6 frames" in model.answers[1].error


def test_a_prompt_of_too_many_frames_is_a_sentence(family: str) -> None:
    model = load(f"vlmpruner_{family}", pretrained=checkpoint(family), max_frames_num=1000)
    limit = 60 if family in QWEN else 300  # under multi-dimensional positions two frames take one
    model.config.get_text_config().max_position_embeddings = limit
    model.task_dict = {"clips": {"test": [{"videos": [pictures(160)], "images": []}]}}
    assert texts(model, [asked(0)]) == [""]
    sentence = rf"got a prompt of (\d+) tokens .* takes (\d+) positions, but the model has {limit} positions; .* a smaller max_frames_num"
    n_tokens, n_positions = map(int, re.search(sentence, model.answers[0].error).groups())
    assert n_tokens > 300
    assert n_positions > limit
    model.config.get_text_config().max_position_embeddings = n_positions
    model.answers = []
    texts(model, [asked(0)])
    assert model.answers[0].error is None


def test_videos_of_unequal_length_in_one_prompt(family: str, model: PrunedModel) -> None:
    model.task_dict = {"clips": {"test": [{"videos": [pictures(3), pictures(4)], "images": []}]}}
    texts(model, [asked(0)])
    if family in QWEN:
        assert (model.answers[-1].error, model.answers[-1].record.n_visual) == (None, 4 * (2 + 2))
    else:
        assert "got videos of 3 and 4 frames in one prompt, expected equally many" in model.answers[-1].error


@pytest.mark.parametrize("family", only(FAMILIES, ["llava_onevision", "qwen2_vl"]), indirect=True)
def test_prompts_with_unequal_videos_do_not_meet_in_a_batch(model: PrunedModel) -> None:
    model.task_dict = {"clips": {"test": [{"videos": [pictures(n, seed=n)], "images": []} for n in (3, 5, 3, 5, 3)]}}
    alone = texts(model, [asked(i) for i in range(5)])
    set_batch_size(model, 4)
    model.answers = []
    assert texts(model, [asked(i) for i in range(5)]) == alone
    assert [answer.batch_size for answer in model.answers] == [3, 2, 3, 2, 3]
