"""From lmms-eval's requests to prompts and generation options, and from generated ids back to an answer."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from lmms_eval.api.instance import Instance
from lmms_eval.protocol import ChatMessages
from loguru import logger
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from vlm_pruner_eval.lmms.pictures import EXPECTED, loaded, whole_files
from vlm_pruner_eval.lmms.pictures import as_rgb as _as_rgb
from vlm_pruner_eval.lmms.settings import Settings
from vlm_pruner_eval.lmms.videos import Video, open_video
from vlm_pruner_eval.vlms.family import PromptProtocol

WINDOW_BATCHES = 8  # batches whose images are held in memory, so that prompts of like length meet in one batch
SAMPLING = ("temperature", "top_p", "top_k")
MEDIA = ("image", "video", "audio")
QUESTION_CHARACTERS = 1000  # of a record: prompts with whole documents in them would fill a disk
FILLED_IN = ["\n\n"]  # what lmms-eval puts into `until` of every task that names no stop string
PASSED_ON = ("max_new_tokens", "num_beams", "repetition_penalty", "length_penalty")


@dataclass(frozen=True)
class Request:
    """One lmms-eval request with its place in the call, so that answers go back in the order of the questions."""

    index: int
    task: str
    split: str
    doc_id: int
    to_messages: object
    options: Mapping[str, object]
    length: int
    is_padding: bool
    nth: int = 0

    @classmethod
    def of(cls, index: int, instance: Instance, nth: int = 0) -> Request:
        """Read an instance ``(ctx, doc_to_messages, gen_kwargs, doc_id, task, split)``; its gen_kwargs are copied.

        `nth`: how many requests about the same document came before.
        """
        context, to_messages, options, doc_id, task, split = instance.args
        # torchrun ranks with fewer documents repeat their last one, so that all ranks run equally often
        is_padding = bool((instance.metadata or {}).get("__padding_only__"))
        return cls(index, task, split, doc_id, to_messages, dict(options), len(context), is_padding, nth)

    @property
    def sample_id(self) -> str:
        """``task/split/doc_id``."""
        return f"{self.task}/{self.split}/{self.doc_id}"

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that tell it from other questions about its document."""
        options = json.dumps(self.options, sort_keys=True, default=str)
        identity = json.dumps([self.task, self.split, self.doc_id, self.nth, options, self.length])
        return hashlib.sha256(identity.encode()).hexdigest()[:8]


def requests_of(instances: Sequence[Instance]) -> list[Request]:
    """Read the instances of one call, in order."""
    before: Counter[tuple] = Counter()
    requests = []
    for index, instance in enumerate(instances):
        place = tuple(instance.args[-3:])  # doc_id, task, split
        requests.append(Request.of(index, instance, before[place]))
        before[place] += 1
    return requests


@dataclass(frozen=True)
class Prompt:
    """A request made ready: the rendered chat, and its images and videos, each in order."""

    request: Request
    text: str
    images: list[Image.Image]
    videos: list[Video] = field(default_factory=list)
    image_digests: list[str] = field(default_factory=list)
    originals: list[Image.Image] = field(default_factory=list)  # before the protocol; the same objects where it changes nothing
    question: str = ""
    continuations: list[str] = field(default_factory=list)  # to be scored behind it

    @property
    def digests(self) -> tuple[str, ...]:
        """Content hashes of the images and videos; a video that has not been read yet is read for it."""
        return (*self.image_digests, *(video.digest for video in self.videos))

    @property
    def n_frames(self) -> tuple[int, ...]:
        """Frames of each video."""
        return tuple(video.n_frames for video in self.videos)


def build(
    request: Request,
    task_dict: Mapping,
    processor: ProcessorMixin,
    kinds: Collection[str],
    protocol: PromptProtocol,
    settings: Settings,
    in_turn: AbstractContextManager[None] | None = None,
) -> Prompt:
    """Look the document up by the request's OWN task and split, and render it.

    Parameters
    ----------
    kinds
        Media that the model family takes, out of "image" and "video".
    settings
        `max_frames_num` and `system_prompt` are read.
    in_turn
        Open while what documents may have in common is touched, where prompts are built in several threads: the task's own code,
        and pictures that it hands over without having read them.

    Raises
    ------
    ValueError
        A document with media that the family does not take, or that can't be read whole.
    """
    with _reading(request):
        document = task_dict[request.task][request.split][request.doc_id]  # `datasets` decodes its pictures here
    with in_turn or nullcontext():
        messages = _messages_of(request, document)
        media = {kind: [part for message in messages.messages for part in message.content if part.type == kind] for kind in MEDIA}
        for kind, found in media.items():
            if found and kind not in kinds:
                raise ValueError(
                    f"{request.sample_id} holds {len(found)} {kind} input(s), expected {' and '.join(kinds)} only for this model."
                )
        for part in media["image"]:
            if isinstance(part.url, Image.Image):
                loaded(part.url)
    images = [_as_rgb(part.url) for part in media["image"]]
    return Prompt(
        request,
        protocol.render(_with_system(messages.to_hf_messages(), settings.system_prompt), processor),
        [protocol.view(image, processor) for image in images],
        [open_video(part.url, settings.max_frames_num, part.start_time, part.end_time) for part in media["video"]],
        [image_digest(image) for image in images],
        images,
        _text_of(messages)[:QUESTION_CHARACTERS],
    )


@contextmanager
def _reading(request: Request) -> Iterator[None]:
    """Have files read whole or not at all while a task's own code reads them; what Pillow has against one becomes a sentence."""
    try:
        with whole_files():
            yield
    except OSError as error:
        if error.errno is not None:  # not about a file's content
            raise
        raise ValueError(f"{request.sample_id}: a picture of this document can't be read whole ({error}); {EXPECTED}") from error


def _messages_of(request: Request, document: Mapping) -> ChatMessages:
    try:
        with _reading(request):
            return ChatMessages(messages=request.to_messages(document))
    except SystemExit as error:  # how some tasks say that a video was not downloaded
        raise ValueError(f"{request.sample_id}: the task gave up on this document ({error}).") from error


def _text_of(messages: ChatMessages) -> str:
    """What a person reads of a chat: its text, without media and the marks of a template."""
    return "\n".join(part.text for message in messages.messages for part in message.content if part.type == "text")


def _with_system(messages: list[dict], sentence: str | None) -> list[dict]:
    """The chat with a system turn before it, unless it has one or none is asked for."""
    if sentence is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": [{"type": "text", "text": sentence}]}, *messages]


def image_digest(image: Image.Image) -> str:
    """First 16 hexadecimal digits of the SHA-256 of an image's size and RGB pixels, before any protocol crops or pads it."""
    digest = hashlib.sha256(f"{image.width}x{image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Generation:
    """Arguments of ``model.generate``, and the strings at which an answer ends."""

    kwargs: Mapping[str, object]
    stops: tuple[str, ...] = field(default=())

    @property
    def n_beams(self) -> int:
        """Rows per prompt."""
        return self.kwargs["num_beams"]

    def cut(self, text: str) -> str:
        """`text` up to the first stop string."""
        return text[: min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=len(text))]


@dataclass(frozen=True)
class Defaults:
    """What a family does where a task says nothing, so that its answers are those of lmms-eval's own wrapper.

    Attributes
    ----------
    new_tokens
        The longest answer, in tokens.
    stops_at_blank_line
        Whether an answer ends at the stop string that lmms-eval fills in; of its own wrappers only Qwen2-VL's does.
    """

    new_tokens: int = 1024
    stops_at_blank_line: bool = False


def generation(options: Mapping[str, object], defaults: Defaults = Defaults()) -> Generation:  # frozen
    """Map a task's generation_kwargs to `generate`'s; greedy unless a temperature above 0 or do_sample asks for sampling."""
    temperature = options.get("temperature")
    samples = bool(options.get("do_sample", temperature is not None)) and temperature != 0
    kwargs = {"max_new_tokens": defaults.new_tokens, "num_beams": 1, "do_sample": samples}
    kwargs |= {name: options[name] for name in PASSED_ON if options.get(name) is not None}
    kwargs |= {name: options[name] for name in SAMPLING if samples and options.get(name) is not None}
    stops = options.get("until") or ()
    if stops == FILLED_IN and not defaults.stops_at_blank_line:
        stops = ()
    unread = sorted(set(options) - {*PASSED_ON, *SAMPLING, "do_sample", "until"})
    if unread:
        logger.warning(f"vlm_pruner_eval: generation_kwargs {', '.join(unread)} have no meaning for this model and are not used.")
    return Generation(kwargs, (stops,) if isinstance(stops, str) else tuple(stop for stop in stops if stop))


def windows(asked: Sequence[Request], batch_size: int, defaults: Defaults) -> Iterator[tuple[Generation, list[Request]]]:
    """Requests with equal generation options, longest question first, in windows of a few batches.

    Long prompts come first so that a batch that does not fit into memory fails at once, not after hours.
    """
    groups: dict[str, list[Request]] = {}
    for request in asked:
        groups.setdefault(json.dumps(request.options, sort_keys=True, default=str), []).append(request)
    for requests in groups.values():
        options = generation(requests[0].options, defaults)
        requests.sort(key=lambda request: -request.length)
        for start in range(0, len(requests), batch_size * WINDOW_BATCHES):
            yield options, requests[start : start + batch_size * WINDOW_BATCHES]


def batches(prompts: list[Prompt], batch_size: int) -> Iterator[list[Prompt]]:
    """Batches of prompts of like length: more frames and images first, then longer text.

    Videos of one batch have equally many frames, which the families that stack them need.
    """
    prompts = sorted(prompts, key=lambda prompt: (prompt.n_frames, len(prompt.images), len(prompt.text)), reverse=True)
    for _, group in itertools.groupby(prompts, key=lambda prompt: prompt.n_frames):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]


def count_new(new_ids: Tensor, eos_ids: Collection[int]) -> int:
    """Tokens that one row [n] really generated: up to and with its first end token; the rest is padding."""
    ends = [at for at, token in enumerate(new_ids.tolist()) if token in eos_ids]
    return ends[0] + 1 if ends else len(new_ids)
