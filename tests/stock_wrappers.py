"""lmms-eval's stock wrappers on tiny checkpoints on the CPU, and ours beside them; imported where decord is."""

from __future__ import annotations

import atexit
import functools
import importlib
import io
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_requests import to_messages
from PIL import Image
from qwen_vl_utils import fetch_image
from tiny_checkpoints import write_tiny, write_tiny_llava
from transformers import GenerationConfig

from vlm_pruner_eval.lmms import PrunedModel, load

QWEN_SYSTEM = "You are a helpful assistant."
# In the manner of the published templates: a system turn by default in Qwen2-VL's and Qwen2.5-VL's, none in Qwen3-VL's.
TURNS = (
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
)
DEFAULT_SYSTEM = f"{{% if loop.first and message['role'] != 'system' %}}<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n{{% endif %}}"
ASSISTANT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
WITH_SYSTEM = f"{{% for message in messages %}}{DEFAULT_SYSTEM}{TURNS}{{% endfor %}}{ASSISTANT}"
WITHOUT_SYSTEM = f"{{% for message in messages %}}{TURNS}{{% endfor %}}{ASSISTANT}"

GREEDY = {"max_new_tokens": 8, "temperature": 0}


def _limits(patch: int) -> dict[str, int]:
    """The pixel limits of the tiny Qwen checkpoints, as arguments of the stock wrapper."""
    return {"min_pixels": 4 * (2 * patch) ** 2, "max_pixels": 36 * (2 * patch) ** 2}


def _as_it_is(image: Image.Image) -> Image.Image:
    return image


def _jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return Image.open(buffer).convert("RGB")


def _resized(patch: int, **limits: int) -> Callable[[Image.Image], Image.Image]:
    return lambda image: fetch_image({"image": image, **limits}, image_patch_size=patch)


@dataclass(frozen=True)
class Stock:
    """A stock wrapper: its class, arguments and contract, and what it does to a document before the processor sees it."""

    path: str
    arguments: dict[str, int] = field(default_factory=dict)
    template: str | None = None
    prepare: Callable[[Image.Image], Image.Image] = _as_it_is
    system: bool = False  # it puts a system turn before every chat
    simple: bool = False  # it is asked by doc_to_visual and a text; else by doc_to_messages


LLAVA, QWEN = "chat.llava_hf.LlavaHf", ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
STOCK = {
    "llava": Stock(LLAVA),
    "llava_next": Stock(LLAVA),
    "llava_onevision": Stock(LLAVA),
    "internvl": Stock("chat.internvl_hf.InternVLHf", {"max_patches": 4}),
    "qwen2_vl": Stock(
        "simple.qwen2_vl.Qwen2_VL",
        _limits(14),
        WITH_SYSTEM,
        lambda image: _resized(14, **_limits(14))(_jpeg(image)),
        simple=True,
    ),
    "qwen2_5_vl": Stock("chat.qwen2_5_vl.Qwen2_5_VL", _limits(14), WITH_SYSTEM, _resized(14)),
    "qwen3_vl": Stock("chat.qwen3_vl.Qwen3_VL", _limits(16), WITHOUT_SYSTEM, _resized(16), system=True),
    "qwen3_vl_moe": Stock("chat.qwen3_vl.Qwen3_VL", _limits(16), WITHOUT_SYSTEM, _resized(16), system=True),
}
FAMILIES = sorted(STOCK)


def picture(height: int, width: int, seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@functools.cache
def checkpoint(family: str) -> str:
    """A tiny checkpoint whose defaults for generation are, as many real ones', to sample and to punish repetition."""
    active = "_A1B" if family.endswith("_moe") else ""  # the stock Qwen3-VL looks for it in the name
    folder = Path(tempfile.mkdtemp(prefix=f"tiny_stock_{family}_", suffix=active))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_tiny_llava(folder) if family == "llava" else write_tiny(family, folder)
    if STOCK[family].template:
        assert (folder / "chat_template.jinja").is_file()
        (folder / "chat_template.jinja").write_text(STOCK[family].template)
    config = GenerationConfig.from_pretrained(folder)
    config.update(do_sample=True, temperature=3.0, top_k=50, repetition_penalty=1.05)
    config.save_pretrained(folder)
    return str(folder)


@functools.cache
def stock_model(family: str) -> object:
    module, _, name = STOCK[family].path.rpartition(".")
    stock_class = getattr(importlib.import_module(f"lmms_eval.models.{module}"), name)
    return stock_class(pretrained=checkpoint(family), device="cpu", device_map="cpu", **STOCK[family].arguments)


@functools.cache
def our_model(family: str) -> PrunedModel:
    """In the number type of the stock wrapper, which is written into it for half of the families."""
    dtype = str(stock_model(family).model.dtype).removeprefix("torch.")
    system = QWEN_SYSTEM if STOCK[family].system else None
    return load(f"vlmpruner_{family}", pretrained=checkpoint(family), dtype=dtype, protocol="hf", method="none", system_prompt=system)


@dataclass
class Side:
    """One of the two wrappers, with a note of every call of `generate`; with a `script`, the model says that."""

    model: object
    stock: Stock | None
    calls: list[dict] = field(default_factory=list)
    script: str | None = None

    def note_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Note the arguments of every call of `generate`."""
        generate = self.model.model.generate

        def noted(**kwargs: object) -> torch.Tensor:
            self.calls.append(kwargs)
            if self.script is None:
                return generate(**kwargs)
            generate(**kwargs | {"max_new_tokens": 1})  # our hook must see a prefill
            said = self.model.tokenizer.encode(self.script, add_special_tokens=False)
            return torch.cat([kwargs["input_ids"], torch.tensor([[*said, self.model.tokenizer.eos_token_id]])], 1)

        monkeypatch.setattr(self.model.model, "generate", noted)

    def ask(self, docs: Sequence[dict], options: Sequence[dict] | dict = GREEDY, messages: Callable = to_messages) -> list[str]:
        """Answers to all documents in one call; one generate call each."""
        self.model.task_dict = {"first": {"test": docs}}
        self.calls.clear()
        each = [options] * len(docs) if isinstance(options, dict) else options
        simple = self.stock is not None and self.stock.simple
        requests = []
        for i, (doc, wanted) in enumerate(zip(docs, each, strict=True)):
            middle = (dict(wanted), lambda doc: doc["images"]) if simple else (messages, dict(wanted))
            arguments = (doc["question"], *middle, i, "first", "test")
            requests.append(Instance("generate_until", arguments, 0, metadata={"task": "first", "doc_id": i, "repeats": 1}))
        answers = [getattr(answer, "text", answer) for answer in self.model.generate_until(requests)]
        assert len(self.calls) == len(docs), "a document never reached generate"
        return answers
