"""The pictures that a sweep keeps: which, how small, and under which name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lmms_requests import fresh_model, request, texts, tiny_llava
from PIL import Image
from sweep_standin import make_config
from tiny_videos import pictures, write_video

from vlm_pruner_eval import ConfigError
from vlm_pruner_eval.lmms import load
from vlm_pruner_eval.lmms.prompts import QUESTION_CHARACTERS, Prompt, image_digest
from vlm_pruner_eval.lmms.videos import open_video
from vlm_pruner_eval.sweep.config import validate
from vlm_pruner_eval.sweep.grid import expand
from vlm_pruner_eval.sweep.images import LONGEST_FRAME_PX, LONGEST_PX, MOST_FRAMES, ImageStore, Keeper, all_kept


def half_red(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), "blue")
    image.paste((255, 0, 0), (0, 0, width // 2, height))
    return image


def test_an_image_is_kept_small_with_its_own_size(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    store.save_image("ab", half_red(2000, 500))
    store.save_image("cd", half_red(60, 40))
    large, small = store.read("ab"), store.read("cd")
    assert (large.width, large.height, large.n_frames, large.frames) == (2000, 500, None, (0,))
    assert large.images[0].size == (LONGEST_PX, LONGEST_PX // 4)
    assert small.images[0].size == (60, 40)
    red, blue = large.images[0].getpixel((10, 10)), large.images[0].getpixel((LONGEST_PX - 10, 10))
    assert red[0] > 230 and red[2] < 30 and blue[2] > 230 and blue[0] < 30
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["ab.jpg", "cd.jpg"]
    assert all_kept(store, ["ab", "cd"]) and not all_kept(store, ["ab", "ef"]) and not all_kept(store, [])


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    store.save_image("ab", half_red(60, 40))
    before = store.path("ab").stat().st_mtime_ns
    store.save_image("ab", half_red(10, 10))
    assert store.path("ab").stat().st_mtime_ns == before
    assert store.read("ab").width == 60


@pytest.mark.parametrize("n", [1, 3, MOST_FRAMES, 30])
def test_of_a_video_some_frames_are_kept_the_first_and_the_last_among_them(tmp_path: Path, n: int) -> None:
    frames = np.stack([np.full((60, 512, 3), 8 * t, dtype=np.uint8) for t in range(n)])
    store = ImageStore(tmp_path)
    store.save_video("ab", frames)
    found = store.read("ab")
    assert (found.width, found.height, found.n_frames) == (512, 60, n)
    assert len(found.frames) == len(found.images) == min(n, MOST_FRAMES)
    assert found.frames[0] == 0 and found.frames[-1] == n - 1
    for frame, image in zip(found.frames, found.images, strict=True):
        assert image.size == (LONGEST_FRAME_PX, LONGEST_FRAME_PX * 60 // 512)
        assert abs(image.getpixel((100, 10))[0] - 8 * frame) < 6


def test_pictures_that_are_not_there_or_not_ours_are_a_sentence(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    with pytest.raises(ConfigError, match=r"was not kept; a sweep keeps those of its first documents \(`gallery: 24`"):
        store.read("ab")
    half_red(8, 8).save((tmp_path / "images").mkdir() or store.path("ab"))
    with pytest.raises(ConfigError, match="can't be read as a kept picture"):
        store.read("ab")
    store.path("cd").write_text("no picture")
    with pytest.raises(ConfigError, match="can't be read as a kept picture"):
        store.read("cd")


def test_only_the_first_documents_of_a_task_are_kept(tmp_path: Path) -> None:
    store, images = ImageStore(tmp_path), [half_red(20 + i, 20) for i in range(4)]
    keep = Keeper(store, 2)
    for doc_id, image in enumerate(images):
        keep(Prompt(SimpleNamespace(doc_id=doc_id), "", [image], [], [image_digest(image)], [image]))
    assert [store.has(image_digest(image)) for image in images] == [True, True, False, False]


def test_videos_are_kept_under_the_hash_that_stands_with_the_answer(tmp_path: Path) -> None:
    path, store = write_video(tmp_path / "a.mp4", pictures(12)), ImageStore(tmp_path)
    Keeper(store, 1)(Prompt(SimpleNamespace(doc_id=0), "", [], [open_video(path, 6)]))
    found = store.read(open_video(path, 6).digest)
    assert (found.width, found.height, found.n_frames) == (64, 48, 6)


def test_a_model_hands_over_every_prompt_and_records_question_and_hashes(tmp_path: Path) -> None:
    model, store = fresh_model(), ImageStore(tmp_path)
    model.context.on_prompt = Keeper(store, 2)
    try:
        texts(model, [request("first", i) for i in range(4)])
    finally:
        model.context.on_prompt = None
    documents = model.task_dict["first"]["test"]
    assert [answer.question for answer in model.answers] == [document["question"] for document in documents[:4]]
    assert [list(answer.images) for answer in model.answers] == [[image_digest(document["images"][0])] for document in documents[:4]]
    assert [all_kept(store, answer.images) for answer in model.answers] == [True, True, False, False]
    assert store.read(model.answers[0].images[0]).images[0].size == documents[0]["images"][0].size


def test_long_questions_are_cut() -> None:
    model = fresh_model()

    def long(document: dict) -> list[dict]:
        parts = [{"type": "text", "text": "why" + "?" * 30}, {"type": "text", "text": "x" * QUESTION_CHARACTERS}]
        return [{"role": "user", "content": parts}]

    prompt = model.prompt_of(model_request(long))
    assert prompt.question.startswith("why???") and "\nxx" in prompt.question
    assert len(prompt.question) == QUESTION_CHARACTERS


def model_request(messages: object) -> object:
    from vlm_pruner_eval.lmms.prompts import Request

    return Request.of(0, request("first", 0, messages=messages))


def test_what_is_kept_is_the_image_before_the_protocol_pads_it(tmp_path: Path) -> None:
    model, store = load("vlmpruner_llava", pretrained=tiny_llava(), protocol="paper"), ImageStore(tmp_path)
    image = half_red(70, 40)
    model.task_dict = {"first": {"test": [{"question": "what", "images": [image]}]}}
    keep = Keeper(store, 1)
    prompt = model.prompt_of(model_request(lambda document: [{"role": "user", "content": [{"type": "image", "url": image}]}]))
    keep(prompt)
    assert prompt.images[0].size == (70, 70)
    assert store.read(image_digest(image)).images[0].size == (70, 40)
    assert model.describe()["geometry"]["pad"] is True


def test_the_gallery_is_no_part_of_a_runs_identity() -> None:
    ids = [[run.run_id for run in expand(make_config(gallery=n))] for n in (0, 24)]
    assert ids[0] == ids[1]
    with pytest.raises(ConfigError, match="gallery: got -1 "):
        make_config(gallery=-1)
    assert validate(make_config().model_dump(exclude_none=True) | {"methods": ["blind"]}).gallery == 24
