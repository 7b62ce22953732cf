"""Stand-ins of the benchmarks with pictures: names, configurations, splits, columns, types and spellings of the published data sets.

Pictures and questions are made here; spellings that scoring depends on (categories, question types, "nan" options) are the real ones.
"""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets import Image as ImageColumn
from PIL import Image, ImageDraw

Rows = list[dict[str, Any]]
Repository = dict[str, dict[str, tuple[Rows, Features]]]  # by configuration and split

TEXT, INT8, INT16, INT32, INT64 = (Value(kind) for kind in ("string", "int8", "int16", "int32", "int64"))
FLOAT, REAL, TRUTH = Value("float64"), Value("float32"), Value("bool")
PICTURE = ImageColumn()
MME_COGNITION = ("code_reasoning", "text_translation", "numerical_calculation", "commonsense_reasoning")
MME_PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
OCR_TYPES = {
    "Regular Text Recognition": "IIIT5K",
    "Irregular Text Recognition": "svtp",
    "Artistic Text Recognition": "WordArt",
    "Handwriting Recognition": "IAM",
    "Digit String Recognition": "ORAND",
    "Non-Semantic Text Recognition": "NonSemanticText",
    "Scene Text-centric VQA": "STVQA",
    "Doc-oriented VQA": "docVQA",
    "Key Information Extraction": "FUNSD",
    "Handwritten Mathematical Expression Recognition": "HME100k",
}
MMSTAR = {
    "coarse perception": "image scene and topic",
    "fine-grained perception": "object counting",
    "instance reasoning": "single-instance reasoning",
    "logical reasoning": "code & sequence reasoning",
    "science & technology": "biology & chemistry & physics",
    "math": "geometry",
}


def texts(*names: str) -> dict[str, Value]:
    return dict.fromkeys(names, TEXT)


@functools.cache
def picture(seed: int, size: tuple[int, int] = (320, 240), mode: str = "RGB") -> dict[str, Any]:
    """A picture of coloured boxes as a parquet cell holds it: the bytes of a file, in a mode that pictures of the hub have."""
    draw = random.Random(seed)
    image = Image.new("RGB", size, tuple(draw.randrange(100, 250) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(5):
        left, top = draw.randrange(size[0]), draw.randrange(size[1])
        box = (left, top, left + draw.randrange(1, size[0]), top + draw.randrange(1, size[1]))
        pen.rectangle(box, fill=tuple(draw.randrange(256) for _ in range(3)))
    content = io.BytesIO()
    image.convert(mode).save(content, "JPEG" if mode in ("RGB", "L", "CMYK") else "PNG")
    return {"bytes": content.getvalue(), "path": f"{seed}.jpg"}


# ---- the paper's nine benchmarks
def gqa() -> Repository:
    """Questions and pictures in two configurations; two questions show the same picture."""
    pictures = [{"id": f"n{1613 + i}", "image": picture(i, mode=mode)} for i, mode in enumerate(("RGB", "L", "RGB"))]
    answers = ("yes", "no", "left", "Red", "table")
    questions = [
        {"id": f"20{k}", "imageId": f"n{1613 + k % 3}", "question": "What is on the table?", "answer": answer, "fullAnswer": "It is."}
        | {"isBalanced": True, "groups": {"global": None, "local": "13-weather"}, "entailed": "[]", "equivalent": "[]"}
        | {"types": {"structural": "verify", "semantic": "global", "detailed": "weatherVerify"}, "semanticStr": "select: scene"}
        for k, answer in enumerate(answers)
    ]
    nested = {"groups": texts("global", "local"), "types": texts("structural", "semantic", "detailed")}
    plain = texts("id", "imageId", "question", "answer", "fullAnswer", "entailed", "equivalent", "semanticStr")
    return {
        "testdev_balanced_instructions": {"testdev": (questions, Features({**plain, "isBalanced": TRUTH, **nested}))},
        "testdev_balanced_images": {"testdev": (pictures, Features({"id": TEXT, "image": PICTURE}))},
    }


def mmbench() -> Repository:
    """Three questions with 4, 2 and 3 options, as many turns of each under index + turn x 1,000,000, missing options as the text "nan"."""
    names, rows = ["the cup", "the dog", "the tree", "the road"], []
    categories = (("image_scene", "coarse_perception"), ("ocr", "finegrained_perception (instance-level)"))
    for turn in range(4):
        for k, n in enumerate((4, 2, 3)):
            if turn >= n:
                continue
            shown = names[turn:n] + names[:turn] + ["nan"] * (4 - n)
            category, level = categories[k % 2]
            rows.append(
                {"index": 241 + k + turn * 1_000_000, "question": "What is in the middle?", "answer": "ABCD"[-turn % n], "split": "dev"}
                | {"hint": "nan" if k else "Read the passage.\nThen answer.", "category": category, "L2-category": level, "comment": "nan"}
                | dict(zip("ABCD", shown, strict=True))
                | {"image": picture(100 + k, mode="RGBA" if k else "RGB"), "source": "scienceqa_img"}
            )
    features = {"index": INT64, **texts("question", "hint", "answer", *"ABCD", "category"), "image": PICTURE}
    features = Features(features | texts("source", "L2-category", "comment", "split"))
    return {
        "en": {"dev": (rows, features), "test": ([rows[0] | {"answer": None, "split": "test"}], features)},
        "cn": {"dev": (rows, features)},
    }


def mme() -> Repository:
    """One picture a category with a pair of questions; one question has two spaces before its last sentence, as some real ones have."""
    rows = []
    for i, category in enumerate((*MME_COGNITION, *MME_PERCEPTION)):
        spaces = "  " if category == "color" else " "
        rows += [
            {"question_id": f"{category}/000{i}.png", "image": picture(200 + i), "answer": answer, "category": category}
            | {"question": f"Is there a {thing} in this image?{spaces}Please answer yes or no."}
            for thing, answer in (("cup", "Yes"), ("dog", "No"))
        ]
    return {"default": {"test": (rows, Features({**texts("question_id", "question", "answer", "category"), "image": PICTURE}))}}


def pope() -> Repository:
    rows = [
        {"id": str(2 * i + k), "question_id": str(k + 1), "question": "Is there a snowboard in the image?", "answer": ("yes", "no")[k % 2]}
        | {"image_source": f"COCO_val2014_{k // 2:012d}", "image": picture(300 + k // 2), "category": category}
        for i, category in enumerate(("adversarial", "popular", "random"))
        for k in range(2)
    ]
    features = Features({**texts("id", "question_id", "question", "answer", "image_source", "category"), "image": PICTURE})
    splits = {name: ([row for row in rows if row["category"] == name], features) for name in ("adversarial", "popular", "random")}
    return {"default": {"test": (rows, features)}, "Full": splits}


def scienceqa() -> Repository:
    """Two to five choices, with and without a hint, in pictures of any mode and shape."""
    kinds = (((375, 214), "RGBA"), ((151, 116), "RGB"), ((85, 38), "P"), ((101, 312), "LA"))
    choices = ["Maryland", "New Hampshire", "Rhode Island", "Vermont", "Maine"]
    rows = [
        {"image": picture(400 + k, size, mode), "question": "What is the name of the colony?", "choices": choices[: k + 2], "answer": k}
        | {"hint": "" if k % 2 else "The passage describes a map.\nRead it.", "task": "closed choice", "grade": "grade5"}
        | {"subject": "social science", "topic": "us-history", "category": "Colonial America", "skill": "", "lecture": "", "solution": ""}
        for k, (size, mode) in enumerate(kinds)
    ]
    words = texts("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    features = Features({"image": PICTURE, "question": TEXT, "choices": List(TEXT), "answer": INT8, **words})
    full = [rows[0], rows[1] | {"image": None}]
    return {
        "ScienceQA-IMG": dict.fromkeys(("train", "validation", "test"), (rows, features)),
        "ScienceQA-FULL": dict.fromkeys(("train", "validation", "test"), (full, features)),
    }


def textvqa() -> Repository:
    """OCR tokens with punctuation, and a picture without any."""

    def rows(split: str) -> Rows:
        answers = [""] * 10 if split == "test" else ["dakota"] * 6 + ["dakota digital"] * 3 + ["the dakota."]
        words = (["DAKOTA", "o$1.99", "RE.SAVEMORE,"], [], ["DIGITAL"])
        return [
            {"image_id": f"{k:016x}", "question_id": 34602 + k, "question": "what is the brand of this camera?", "ocr_tokens": found}
            | {"question_tokens": ["what", "is"], "image": picture(500 + k, (512, 384)), "image_width": 1024, "image_height": 768}
            | {"flickr_original_url": "u", "flickr_300k_url": "u", "answers": answers, "image_classes": ["Camera"], "set_name": split}
            for k, found in enumerate(words)
        ]

    plain = texts("image_id", "question", "flickr_original_url", "flickr_300k_url", "set_name")
    lists = dict.fromkeys(("question_tokens", "answers", "image_classes", "ocr_tokens"), List(TEXT))
    features = Features({**plain, **lists, **dict.fromkeys(("question_id", "image_width", "image_height"), INT32), "image": PICTURE})
    return {"default": {split: (rows(split), features) for split in ("train", "validation", "test")}}


def ocrbench() -> Repository:
    """A question of every type; formulas are compared without spaces; some pictures are smaller than a patch is wide."""
    rows = [
        {"dataset": source, "question": "what is written in the image?", "question_type": kind}
        | {"answer": ["\\frac { 1 } { 2 }"] if source == "HME100k" else ["$5", "5 dollars"] if "VQA" in kind else ["CENTRE"]}
        | {"image": picture(600 + i, ((100, 32), (31, 12), (425, 550))[i % 3], ("RGB", "L", "P")[i % 3])}
        for i, (kind, source) in enumerate(OCR_TYPES.items())
    ]
    features = Features({**texts("dataset", "question", "question_type"), "answer": List(TEXT), "image": PICTURE})
    return {"default": {"test": (rows, features)}}


def seed() -> Repository:
    """Four questions about a picture, and one about eight frames of a video."""
    rows = [
        {"answer": "ABCD"[k % 4], "choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four", "data_id": f"{k}_1"}
        | {"data_type": "video" if k == 2 else "image", "question": "How many towels are in the image?", "question_id": str(k)}
        | {
            "question_type_id": 10 if k == 2 else 1,
            "image": [picture(700 + k)] * (8 if k == 2 else 1),
            "segment": [0, 12] if k == 2 else [],
        }
        for k in range(5)
    ]
    words = texts("answer", "choice_a", "choice_b", "choice_c", "choice_d", "data_id", "data_type", "question", "question_id")
    features = Features({**words, "question_type_id": INT16, "image": List(PICTURE), "segment": List(INT64)})
    return {"default": {"test": (rows, features)}}


def okvqa() -> Repository:
    """The most frequent answer has four of ten votes."""
    votes = ["race", "race", "motocross", "motocross", "ride", "racing", "race", "race", "yes", "2"]
    rows = [
        {"question_id": str(2971475 + k), "image": picture(800 + k), "question": "What sport can you use this for?", "answers": votes}
        | {"question_type": "four", "answer_type": "other"}
        for k in range(3)
    ]
    features = Features({**texts("question_id", "question", "question_type", "answer_type"), "image": PICTURE, "answers": List(TEXT)})
    return {"default": {"val2014": (rows, features)}}


# ---- suite_2026
def chartqa() -> Repository:
    rows = [
        {"type": ("human_test", "augmented_test")[k % 2], "question": "How many bars are red?", "answer": ("14", "0.57", "Yes")[k % 3]}
        | {"image": picture(900 + k, (425, 300))}
        for k in range(4)
    ]
    return {"default": {"test": (rows, Features({**texts("type", "question", "answer"), "image": PICTURE}))}}


def docvqa() -> Repository:
    """Two data sets under one name: scanned pages, and tall graphics; their test splits have no answers."""
    page = {"question": "What is the value in 1975?", "question_types": ["figure"], "docId": 14465, "ucsf_document_id": "pybv0228"}
    page |= {"ucsf_document_page_no": "81", "data_split": "val"}
    pages = [page | {"questionId": str(k), "image": picture(1000 + k, (425, 550), "L"), "answers": ["0.28", ".28"]} for k in range(3)]
    graphic = {"question": "Which has the most users?", "answer_type": ["single span"], "image_url": "u", "operation/reasoning": []}
    graphic |= {"ocr": "{}", "data_split": "val"}
    graphics = [graphic | {"questionId": str(k), "image": picture(1050 + k, (150, 600)), "answers": ["facebook"]} for k in range(3)]
    shared = {**texts("questionId", "question", "data_split"), "image": PICTURE, "answers": List(TEXT)}
    of_page = {"question_types": List(TEXT), "docId": INT64, **texts("ucsf_document_id", "ucsf_document_page_no")}
    of_graphic = {"answer_type": List(TEXT), "operation/reasoning": List(TEXT), **texts("image_url", "ocr")}

    def splits(rows: Rows, features: Features) -> dict[str, tuple[Rows, Features]]:
        return {"validation": (rows, features), "test": ([rows[0] | {"answers": None}], features)}

    return {"DocVQA": splits(pages, Features(shared | of_page)), "InfographicVQA": splits(graphics, Features(shared | of_graphic))}


def mmstar() -> Repository:
    """A question of each of the six capabilities."""
    rows = [
        {"index": k, "question": "Which one is it?\nOptions: A: cup, B: dog, C: tree, D: road", "image": picture(1100 + k)}
        | {"answer": "ABCD"[k % 4], "category": category, "l2_category": part}
        | {"meta_info": {"source": "MMBench", "split": "val", "image_path": f"images/{k}.jpg"}}
        for k, (category, part) in enumerate(MMSTAR.items())
    ]
    words = texts("question", "answer", "category", "l2_category")
    features = Features({"index": INT64, **words, "image": PICTURE, "meta_info": texts("source", "split", "image_path")})
    return {"val": {"val": (rows, features)}}


def refcoco() -> Repository:
    """A box in pixels (left, top, width, height) with one or two sentences, each of which becomes a question."""
    rows = [
        {
            "question_id": str(k),
            "image": picture(1200 + k),
            "question": "Please caption the area.",
            "answer": ["left person", "man"][: k + 1],
        }
        | {"segmentation": [10.0, 10.0, 60.0, 10.0, 60.0, 90.0], "bbox": [10.0, 10.0, 50.0, 80.0], "iscrowd": 0, "file_name": f"{k}.jpg"}
        for k in range(2)
    ]
    features = Features(
        {**texts("question_id", "question", "file_name"), "image": PICTURE, "answer": List(TEXT), "iscrowd": INT8}
        | dict.fromkeys(("segmentation", "bbox"), List(REAL))
    )
    return {"default": dict.fromkeys(("val", "test", "testA", "testB"), (rows, features))}


def ai2d() -> Repository:
    rows = [
        {"question": "which of these define dairy item", "options": ["c", "D", "b", "a"], "answer": str(k), "image": picture(1300 + k)}
        for k in range(4)
    ]
    return {"default": {"test": (rows, Features({**texts("question", "answer"), "options": List(TEXT), "image": PICTURE}))}}


REPOSITORIES: dict[str, Callable[[], Repository]] = {
    "lmms-lab-encoder/GQA": gqa,
    "lmms-lab-encoder/MMBench": mmbench,
    "lmms-lab-encoder/MME": mme,
    "lmms-lab-encoder/POPE": pope,
    "lmms-lab-encoder/ScienceQA": scienceqa,
    "lmms-lab-encoder/textvqa": textvqa,
    "echo840/OCRBench": ocrbench,
    "lmms-lab-encoder/SEED-Bench": seed,
    "lmms-lab-encoder/OK-VQA": okvqa,
    "lmms-lab-encoder/ChartQA": chartqa,
    "lmms-lab-encoder/DocVQA": docvqa,
    "Lin-Chen/MMStar": mmstar,
    "lmms-lab-encoder/RefCOCO": refcoco,
    "lmms-lab-encoder/ai2d": ai2d,
}


def write_repository(folder: Path, repository: Repository) -> None:
    """Parquet files and a card that lists them, as `push_to_hub` leaves a data set."""
    card = ["---", "configs:"]
    for name, splits in repository.items():
        card += [f"- config_name: {name}", "  data_files:"]
        inside = folder / ("data" if name == "default" else name)
        inside.mkdir(parents=True)
        for split, (rows, features) in splits.items():
            Dataset.from_list(rows, features=features).to_parquet(str(inside / f"{split}-00000-of-00001.parquet"))
            card += [f"  - split: {split}", f"    path: {inside.relative_to(folder)}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def write_pictures(root: Path) -> None:
    for name, made in REPOSITORIES.items():
        write_repository(root / name, made())
