"""From lmms-eval's requests to prompts and generation options, and from generated ids back to an answer."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from lmms_eval.api.instance import Instance
from lmms_eval.protocol import ChatMessages
from PIL import Image
from transformers import ProcessorMixin

from vlm_pruner_eval.lmms.pictures import EXPECTED, loaded, whole_files
from vlm_pruner_eval.lmms.pictures import as_rgb as _as_rgb
from vlm_pruner_eval.lmms.settings import Settings
from vlm_pruner_eval.lmms.videos import Video, open_video
from vlm_pruner_eval.vlms.family import PromptProtocol

MEDIA = ("image", "video", "audio")
QUESTION_CHARACTERS = 1000  # of a record: prompts with whole documents in them would fill a disk


@dataclass(frozen=True)
class Request:
    """One lmms-eval request with its place in the call, so that answers go back in the order of the questions.

    `continuations` are to be scored behind the prompt: texts, or functions from the document to them.
    """

    index: int
    task: str
    split: str
    doc_id: int
    to_messages: object
    options: Mapping[str, object]
    length: int
    is_padding: bool
    nth: int = 0
    continuations: tuple[str | Callable[[Mapping], str], ...] = ()

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
class Chat:
    """Question of a task about a document, before it is rendered: messages, their images, videos and audio, and continuations."""

    messages: ChatMessages
    media: Mapping[str, list]
    continuations: list[str]


@dataclass(frozen=True)
class Prompt:
    """A request made ready: the rendered chat, and its images and videos, each in order."""

    request: Request
    text: str
    images: list[Image.Image]
    videos: list[Video] = field(default_factory=list)
    image_digests: list[str] = field(default_factory=list)
    originals: list[Image.Image] = field(default_factory=list)  # before the protocol; the same objects where it changes nothing
    asked: str = ""  # text of the chat, without media and template
    continuations: list[str] = field(default_factory=list)  # to be scored behind it

    @property
    def question(self) -> str:
        """What was asked, as far as records hold it."""
        return self.asked[:QUESTION_CHARACTERS]

    @property
    def digests(self) -> tuple[str, ...]:
        """Content hashes of the images and videos; a video that has not been read yet is read for it."""
        return (*self.image_digests, *(video.digest for video in self.videos))

    @property
    def n_frames(self) -> tuple[int, ...]:
        """Frames of each video."""
        return tuple(video.n_frames for video in self.videos)


class PromptMaker:
    """Makes prompts of requests in three steps, of which the second is the task's own code.

    Parameters
    ----------
    kinds
        Media that the model family takes, out of "image" and "video".
    settings
        `max_frames_num` and `system_prompt` are read.
    """

    def __init__(self, processor: ProcessorMixin, protocol: PromptProtocol, kinds: Collection[str], settings: Settings):
        self._processor, self._protocol, self._kinds, self._settings = processor, protocol, kinds, settings

    def look_up(self, request: Request, task_dict: Mapping) -> Mapping:
        """Find the document by the request's OWN task and split; `datasets` decodes its pictures here. Any thread may call this.

        Raises
        ------
        ValueError
            A picture that can't be read whole.
        """
        with _reading(request):
            return task_dict[request.task][request.split][request.doc_id]

    def ask(self, request: Request, document: Mapping) -> Chat:
        """Ask the task for the chat and the continuations of a document, and read the pictures that it left unread.

        Documents may have pictures and a random state in common, so that this is called in the order of the requests, one at a time.

        Raises
        ------
        ValueError
            A document with media that the family does not take, or that can't be read whole.
        """
        messages = _messages_of(request, document)
        media = {kind: [part for message in messages.messages for part in message.content if part.type == kind] for kind in MEDIA}
        for kind, found in media.items():
            if found and kind not in self._kinds:
                raise ValueError(
                    f"{request.sample_id} holds {len(found)} {kind} input(s), expected {' and '.join(self._kinds)} only for this model."
                )
        for part in media["image"]:
            if isinstance(part.url, Image.Image):
                loaded(part.url)
        texts = [text if isinstance(text, str) else text(document) for text in request.continuations]
        return Chat(messages, media, texts)

    def render(self, request: Request, chat: Chat) -> Prompt:
        """Render a chat as the protocol has it, and open its images and videos. Any thread may call this.

        Raises
        ------
        ValueError
            A video that can't be read.
        """
        images = [_as_rgb(part.url) for part in chat.media["image"]]
        messages = _with_system(chat.messages.to_hf_messages(), self._settings.system_prompt)
        frames = self._settings.max_frames_num
        return Prompt(
            request,
            self._protocol.render(messages, self._processor),
            [self._protocol.view(image, self._processor) for image in images],
            [open_video(part.url, frames, part.start_time, part.end_time) for part in chat.media["video"]],
            [image_digest(image) for image in images],
            images,
            _text_of(chat.messages),
            chat.continuations,
        )

    def make(self, request: Request, task_dict: Mapping) -> Prompt:
        """Take all three steps."""
        return self.render(request, self.ask(request, self.look_up(request, task_dict)))


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
