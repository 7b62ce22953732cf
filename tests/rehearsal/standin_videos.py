"""Stand-ins of the video benchmarks of Table 4, with videos of a second: in folders, in zip files, in a tar file of two parts."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import av
import numpy as np
from datasets import Features, List
from standins import FLOAT, INT64, TEXT, texts, write_repository

# the folder of every task of MVBench, as lmms-eval has them
MVBENCH = {
    **dict.fromkeys(("object_interaction", "action_sequence", "action_prediction"), "star/Charades_segment"),
    **dict.fromkeys(("moving_count", "moving_direction", "moving_attribute"), "clevrer/video_validation"),
    **dict.fromkeys(("counterfactual_inference", "object_existence"), "clevrer/video_validation"),
    **dict.fromkeys(("character_order", "object_shuffle", "state_change", "action_count"), "perception/videos"),
    "action_localization": "sta/sta_video_segment",
    "fine_grained_pose": "nturgbd_convert",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "scene_transition": "scene_qa/video",
    "action_antonym": "ssv2_video_mp4",
    "unexpected_action": "FunQA_test/test",
}
MLVU_TASKS = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning")
N_FRAMES, RATE = 24, 8


def video(seed: int) -> bytes:
    """Squares of changing colours, 80 x 64 pixels."""
    squares = np.random.default_rng(seed).integers(0, 256, (N_FRAMES, 8, 10, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.height, stream.width = squares.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in squares:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    return content.getvalue()


def mvbench(folder: Path, content: bytes) -> None:
    """A json file a task, and the videos unpacked beside them; the real ones are on a branch of their own."""
    card = ["---", "configs:"]
    (folder / "json").mkdir(parents=True)
    for name, place in MVBENCH.items():
        row = {"video": f"{name}.mp4", "question": "What happened?", "candidates": ["The cup.", "The dog."], "answer": "The dog."}
        row |= {"start": 0.5, "end": 2.5, "fps": 3} if name == "episodic_reasoning" else {}
        (folder / "json" / f"{name}.json").write_text(json.dumps([row]))
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / row["video"]).write_bytes(content)
        card += [f"- config_name: {name}", f"  data_files: json/{name}.json"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def mlvu(folder: Path, content: bytes) -> None:
    question = "What is it?\n(A) cup\n(B) dog\n(C) tree\n(D) road"
    rows = [
        {"video_name": f"{kind}.mp4", "duration": 480.0, "question": question, "candidates": ["cup", "dog", "tree", "road"]}
        | {"answer": "ABCD"[k % 4], "task_type": kind, "question_id": f"{kind}_{k}"}
        for k, kind in enumerate(MLVU_TASKS)
    ]
    plain = texts("video_name", "question", "answer", "task_type", "question_id")
    write_repository(folder, {"mlvu": {"test": (rows, Features({**plain, "duration": FLOAT, "candidates": List(TEXT)}))}})
    with zipfile.ZipFile(folder / "video_part_1.zip", "w") as archive:
        for row in rows:
            archive.writestr(row["video_name"], content)


def videomme(folder: Path, content: bytes) -> None:
    """Three questions about each of two videos."""
    options = ["A. Apples.", "B. Candles.", "C. Berries.", "D. All alike."]
    rows = [
        {"video_id": f"00{k // 3 + 1}", "duration": ("short", "medium", "long")[k % 3], "domain": "Knowledge", "options": options}
        | {"sub_category": "Humanity & History", "url": "u", "videoID": f"fFjv93ACGo{k // 3}", "question_id": f"00{k // 3 + 1}-{k % 3 + 1}"}
        | {"task_type": "Counting Problem", "question": "How many cups are there?", "answer": "ABCD"[k % 4]}
        for k in range(6)
    ]
    plain = texts("video_id", "duration", "domain", "sub_category", "url", "videoID", "question_id", "task_type", "question", "answer")
    write_repository(folder, {"videomme": {"test": (rows, Features({**plain, "options": List(TEXT)}))}})
    with zipfile.ZipFile(folder / "videos_chunked_01.zip", "w") as archive:
        for name in {row["videoID"] for row in rows}:
            archive.writestr(f"data/{name}.mp4", content)


def longvideobench(folder: Path, content: bytes) -> None:
    """Five option columns, "N/A" where there are fewer, and one tar file in two parts."""
    options = ["promise", "run", "sit"]
    rows = [
        {"video_id": f"86CxyhFV9M{k}", "id": f"86CxyhFV9M{k}_0", "video_path": f"86CxyhFV9M{k}.mp4", "subtitle_path": f"{k}_en.json"}
        | {"correct_choice": k % 3, "question": "Which subtitles appear?", "duration": 3.0, "duration_group": (15, 60, 600, 3600)[k]}
        | {f"option{i}": option for i, option in enumerate([*options, "stand" if k % 2 else "N/A", "N/A"])}
        | {"question_category": "TOS", "topic_category": "NP-News-Programs", "starting_timestamp_for_subtitles": 0.0}
        for k in range(4)
    ]
    words = ("video_id", "id", "video_path", "subtitle_path", "question", *(f"option{i}" for i in range(5)))
    features = {**texts(*words, "question_category", "topic_category"), "correct_choice": INT64, "duration_group": INT64}
    features = Features(features | dict.fromkeys(("duration", "starting_timestamp_for_subtitles"), FLOAT))
    hidden = [row | {"correct_choice": -1} for row in rows]
    write_repository(folder, {"default": {"validation": (rows, features), "test": (hidden, features)}})
    whole = packed({f"videos/{row['video_path']}": content for row in rows})
    half = len(whole) // 2
    (folder / "videos.tar.part.aa").write_bytes(whole[:half])
    (folder / "videos.tar.part.ab").write_bytes(whole[half:])
    (folder / "subtitles.tar").write_bytes(packed({f"subtitles/{row['subtitle_path']}": b"[]" for row in rows}))


def packed(files: dict[str, bytes]) -> bytes:
    """The bytes of a tar file."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, inside in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(inside)
            archive.addfile(entry, io.BytesIO(inside))
    return content.getvalue()


REPOSITORIES = {
    "OpenGVLab/MVBench": mvbench,
    "sy1998/MLVU_dev": mlvu,
    "lmms-eval/Video-MME": videomme,
    "longvideobench/LongVideoBench": longvideobench,
}


def write_videos(root: Path) -> None:
    content = video(0)
    for name, write in REPOSITORIES.items():
        write(root / name, content)
