"""Which frames of a video are picked, that these are the ones decoded, and what is said of videos that can't be read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from loguru import logger
from PIL import Image
from tiny_videos import all_frames, pictures, write_video

from vlm_pruner_eval.lmms import video_files
from vlm_pruner_eval.lmms.videos import LOOSE_FRAMES_FPS, open_video, uniform


@pytest.mark.parametrize(
    ("first", "last", "at_most", "expected"),
    [
        (0, 99, 7, (0, 16, 33, 49, 66, 82, 99)),
        (0, 99, 2, (0, 99)),
        (0, 99, 1, (0,)),
        (0, 2, 8, (0, 1, 2)),
        (10, 14, 3, (10, 12, 14)),
        (5, 5, 4, (5,)),
    ],
)
def test_frames_are_spread_evenly_from_the_first_to_the_last(first: int, last: int, at_most: int, expected: tuple[int, ...]) -> None:
    assert uniform(first, last, at_most) == expected


# ---- files
FILES = [("clip.mp4", "mpeg4"), ("clip.mkv", "mpeg4"), ("clip.avi", "mpeg4"), ("clip.ts", "mpeg2video"), ("clip.gif", "gif")]


@pytest.mark.parametrize(("name", "codec"), FILES)
@pytest.mark.parametrize("at_most", [1, 7, 100])
def test_the_picked_frames_are_the_ones_decoded(tmp_path: Path, name: str, codec: str, at_most: int) -> None:
    path = write_video(tmp_path / name, pictures(100), codec=codec)
    video = open_video(path, at_most)
    assert (video.n_total, video.fps, video.indices) == (100, 10.0, uniform(0, 99, at_most))
    assert np.array_equal(video.frames(), all_frames(path)[list(video.indices)])
    assert video.metadata() == {"total_num_frames": 100, "fps": 10.0, "duration": 10.0, "frames_indices": list(video.indices)}


def test_a_long_file_is_not_decoded_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, decoded, real = write_video(tmp_path / "long.mp4", pictures(400)), [], video_files._shown
    monkeypatch.setattr(video_files, "_shown", lambda *args: (decoded.append(1) or shown for shown in real(*args)))
    video = open_video(str(path), 4)
    assert not decoded, "the number of frames is known without decoding"
    assert np.array_equal(video.frames(), all_frames(path)[list(video.indices)])
    assert len(decoded) <= 4 * 12


def test_a_jump_that_lands_behind_its_picture_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, calls = write_video(tmp_path / "clip.mp4", pictures(60)), video_files._shown, []

    def late(*args: object) -> Iterator:
        """As after a jump in a format without an exact index."""
        calls.append(args)
        return itertools.islice(real(*args), 3 if len(calls) == 2 else 0, None)

    monkeypatch.setattr(video_files, "_shown", late)
    frames = open_video(path, 2, None, 5.0).frames()
    assert len(calls) == 3, "from the start, after the jump, from the start again"
    assert np.array_equal(frames, all_frames(path)[[0, 50]])


@pytest.mark.parametrize(
    ("start_s", "end_s", "expected"),
    [(2.0, 4.0, (20, 30, 40)), (None, 1.0, (0, 5, 10)), (9.0, None, (90, 94, 99)), (9.5, 99.0, (95, 97, 99))],
)
def test_a_part_of_a_video(tmp_path: Path, start_s: float | None, end_s: float | None, expected: tuple[int, ...]) -> None:
    path = write_video(tmp_path / "clip.mp4", pictures(100))
    video = open_video(path, 3, start_s, end_s)
    assert video.indices == expected
    assert np.array_equal(video.frames(), all_frames(path)[list(expected)])


# ---- folders and lists
def test_a_folder_of_images_is_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    frames = pictures(12)
    for i, pixels in enumerate(frames):
        Image.fromarray(pixels).save(tmp_path / f"frame_{i}.png")
    (tmp_path / "frame_99.txt").write_text("not an image")
    video = open_video(tmp_path, 12)
    assert (video.n_total, video.fps) == (12, LOOSE_FRAMES_FPS)
    assert np.array_equal(video.frames(), frames)


@pytest.mark.parametrize("form", ["images", "array", "arrays", "paths"])
def test_lists_of_frames(tmp_path: Path, form: str) -> None:
    frames = pictures(5)
    images = [Image.fromarray(pixels) for pixels in frames]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    source = {"images": images, "array": frames, "arrays": list(frames), "paths": [str(tmp_path / f"{i}.png") for i in range(5)]}[form]
    video = open_video(source, 3)
    assert video.indices == (0, 2, 4)
    assert np.array_equal(video.frames(), frames[::2])
    assert video.sampled_fps == pytest.approx(3 / 5 * LOOSE_FRAMES_FPS)


# ---- what can't be read


def _sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _half(path: Path) -> Path:
    content = write_video(path, pictures(40)).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BROKEN = {
    "missing": (lambda folder: folder / "none.mp4", "there is no such file or folder; download"),
    "url": (lambda folder: "https://a.b/c.mp4", "there is no such file or folder; download"),
    "empty file": (lambda folder: _file(folder / "a.mp4", b""), "can't be decoded .* expected a whole file"),
    "text": (lambda folder: _file(folder / "a.mp4", b"not a video at all " * 99), "can't be decoded .* expected a whole file"),
    "half a file": (lambda folder: _half(folder / "a.mp4"), "can't be decoded .* expected a whole file"),
    "sound": (lambda folder: _sound(folder / "a.wav"), "has no video stream"),
    "empty folder": (lambda folder: folder, "got no frame, expected one or more"),
    "empty list": (lambda folder: [], "got no frame, expected one or more"),
    "number": (lambda folder: 7, "got a int, expected a file, a folder of images, or a list or array of frames"),
    "table": (lambda folder: {"frames": []}, "got a dict, expected a file"),
    "two sizes": (lambda folder: [*pictures(1), *pictures(1, 32)], r"different shapes \(\(32, 64, 3\) and \(48, 64, 3\)\)"),
    "numbers": (
        lambda folder: pictures(2).astype(np.float32),
        r"got an array \[48, 64, 3\] of float32, expected",
    ),
    "lost frame": (lambda folder: [str(folder / "0.png")], "a frame can't be used .* there is no such file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_can_not_be_read_is_a_sentence(tmp_path: Path, case: str) -> None:
    make, sentence = BROKEN[case]
    with pytest.raises(ValueError, match=sentence):
        open_video(make(tmp_path), 8).frames()


def test_a_part_outside_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"got the part from 5\.0 s to 9\.0 s, expected one within its 2\.0 s"):
        open_video(pictures(6), 8, 5.0, 9.0)


def test_a_file_that_breaks_off_is_a_sentence_unless_it_is_the_last_second(tmp_path: Path) -> None:
    whole, seen = write_video(tmp_path / "clip.mp4", pictures(100)), []
    much, little = open_video(whole, 5), open_video(whole, 5, None, 8.1)
    write_video(whole, pictures(75))
    with pytest.raises(ValueError, match="breaks off after 4 of the 5 frames to be read; expected a whole file"):
        much.frames()
    handler = logger.add(lambda message: seen.append(str(message)), level="WARNING")
    try:
        frames = little.frames()
    finally:
        logger.remove(handler)
    assert np.array_equal(frames, all_frames(whole)[[0, 20, 40, 60, 74]])
    assert "its last pictures can't be decoded" in seen[0]
