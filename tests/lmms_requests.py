"""A loaded tiny LLaVA, documents and requests, shared by the tests of the chat wrapper."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch
from lmms_eval.api.instance import Instance
from PIL import Image
from tiny_checkpoints import write_tiny_llava

from vlm_pruner_eval.lmms import PrunedModel, load
from vlm_pruner_eval.lmms.failures import FailureLog

GREEDY = {"max_new_tokens": 5, "temperature": 0, "do_sample": False}


@functools.cache
def tiny_llava() -> str:
    """A checkpoint on disk, written once, removed when Python ends."""
    folder = tempfile.mkdtemp(prefix="tiny_llava_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(write_tiny_llava(Path(folder)))


@functools.cache
def _loaded() -> PrunedModel:
    model = load("vlmpruner_llava", pretrained=tiny_llava(), batch_size=4)
    model.context.keep_loaded = True
    return model


def fresh_model() -> PrunedModel:
    """The one shared model, as after loading, with documents of two tasks."""
    model = _loaded()
    model.configure("uniform", 0.5)
    model.context.refuses_failures = False
    model.failures = FailureLog()
    set_batch_size(model, 4)
    model.task_dict = {"first": {"test": documents(7, seed=0)}, "second": {"test": documents(7, seed=50), "val": documents(3, seed=90)}}
    return model


def set_batch_size(model: PrunedModel, size: int) -> None:
    model.settings = type(model.settings)(**vars(model.settings) | {"batch_size": size})


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (60, 70, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def documents(n: int, *, seed: int, n_images: int = 1) -> list[dict]:
    return [{"question": f"Q{seed + i}" + "?" * (3 * i % 5), "images": [picture(seed + i + k) for k in range(n_images)]} for i in range(n)]


def to_messages(document: dict) -> list[dict]:
    images = [{"type": "image", "url": image} for image in document["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": document["question"]}]}]


def request(
    task: str, doc_id: int, split: str = "test", options: dict | None = None, messages=to_messages, context=None, **metadata: object
) -> Instance:
    options = dict(GREEDY) if options is None else options
    arguments = ("x" * (doc_id % 3) if context is None else context, messages, options, doc_id, task, split)
    return Instance("generate_until", arguments, 0, metadata={"task": task, "doc_id": doc_id, "repeats": 1, **metadata})


def texts(model: PrunedModel, requests: list[Instance]) -> list[str]:
    return [result.text for result in model.generate_until(requests)]


def plain(model: PrunedModel, document: dict, **options: object) -> str:
    """What the unhooked model says to one document."""
    chat = [{"role": "user", "content": [*({"type": "image"} for _ in document["images"]), {"type": "text", "text": document["question"]}]}]
    prompt = model.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = model.processor(text=[prompt], images=document["images"] or None, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    output = model.model.generate(**inputs, **{"max_new_tokens": 5, "do_sample": False} | options)
    return model.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
