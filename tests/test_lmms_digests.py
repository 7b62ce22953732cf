"""The content hashes of images and videos that every answer carries: statistics draw documents that share one together."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from lmms_eval.api.instance import Instance
from lmms_requests import fresh_model, picture, request, to_messages
from PIL import Image
from tiny_videos import pictures, write_video

from vlm_pruner_eval.lmms import PrunedModel, video_files
from vlm_pruner_eval.lmms.prompts import image_digest
from vlm_pruner_eval.lmms.videos import open_video


@pytest.fixture
def model() -> PrunedModel:
    return fresh_model()


def test_a_digest_is_of_size_and_pixels() -> None:
    image = picture(0)
    expected = hashlib.sha256(b"70x60 " + np.asarray(image).tobytes()).hexdigest()[:16]
    assert image_digest(image) == expected == image_digest(image.copy())
    assert len({image_digest(one) for one in (image, picture(1), image.transpose(Image.Transpose.ROTATE_90), image.resize((60, 70)))}) == 4


@pytest.mark.parametrize("method", ["none", "vlmpruner", "blind"])
def test_answers_carry_the_digests_of_their_own_images_under_every_method(model: PrunedModel, method: str) -> None:
    shared = picture(7)
    documents = [
        {"question": "a", "images": [shared]},
        {"question": "longer", "images": [picture(8), shared]},
        {"question": "b", "images": []},
    ]
    model.task_dict["first"]["test"] = documents
    model.configure(method, "3/4" if method == "vlmpruner" else None)
    model.generate_until([request("first", i) for i in range(3)])
    expected = [tuple(image_digest(image) for image in document["images"]) for document in documents]
    assert [answer.images for answer in model.answers] == expected
    assert model.answers[1].as_json()["images"] == expected[1]


def test_a_grey_image_and_its_rgb_copy_are_one(model: PrunedModel) -> None:
    grey = picture(3).convert("L")
    model.task_dict["first"]["test"] = [{"question": "a", "images": [grey]}, {"question": "b", "images": [grey.convert("RGB")]}]
    model.generate_until([request("first", i) for i in range(2)])
    assert model.answers[0].images == model.answers[1].images != ()


def test_scored_choices_carry_them_too(model: PrunedModel) -> None:
    asked = [
        Instance("loglikelihood", ("", text, to_messages, 2, "first", "test"), i, metadata={"task": "first", "doc_id": 2, "repeats": 1})
        for i, text in enumerate([" yes", " no"])
    ]
    model.loglikelihood(asked)
    (image,) = model.task_dict["first"]["test"][2]["images"]
    assert [answer.images for answer in model.answers] == [(image_digest(image),)] * 2


def test_a_video_has_the_digest_of_its_picked_frames_and_is_not_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reads, real = write_video(tmp_path / "clip.mp4", pictures(40)), [], video_files._decode
    monkeypatch.setattr(video_files, "_decode", lambda *args: reads.append(1) or real(*args))
    video = open_video(path, 4)
    frames = video.frames()
    assert video.digest == hashlib.sha256(f"{frames.shape} ".encode() + frames.tobytes()).hexdigest()[:16]
    assert len(reads) == 1
    again = open_video(path, 4)
    assert again.digest == video.digest  # not read yet: it is read for it
    assert open_video(path, 5).digest != video.digest
