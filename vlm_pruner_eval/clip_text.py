"""The text side of a CLIP checkpoint, for methods that compare the question with the visual tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm_pruner_eval.errors import ConfigError, PruningError
from vlm_pruner_eval.redact import short
from vlm_pruner_eval.types import QuestionTokens

ROW = 77  # ids that a CLIP text tower reads at once
OLD_END = 2  # end token that old CLIP configurations name, whatever the tokenizer's is
CLOSINGS = (
    "\nAnswer the question using a single word or phrase.",
    "\nAnswer with the option's letter from the given choices directly.",
)


def question_only(prompt: str) -> str:
    """Return the text of a prompt without the sentence at its end that says in what form to answer; this is what CDPruner reads."""
    for closing in CLOSINGS:
        prompt = prompt.removesuffix(closing)
    return prompt


def blanked(prompt: str, image: str = "<image>") -> str:
    """Return the text of a prompt with a blank for each image; this is what TRIM reads."""
    return prompt.replace(image, " ")


def segments(ids: Tensor, row: int = ROW) -> tuple[Tensor, Tensor]:
    """Cut the ids of a text into rows; the last one is filled up with zeros.

    Parameters
    ----------
    ids : Tensor [n] int64
        Start and end token included, so that only the last row has an end token.
    row
        Ids of a row.

    Returns
    -------
    Tensor [M, row] int64 of ids, M = (n - 1) // row + 1, and Tensor [M, row] int64, 1 at an id and 0 behind the last.

    Paper: arXiv 2506.10967, as released.
    """
    n_rows = (len(ids) - 1) // row + 1
    room = n_rows * row - len(ids)
    filled = torch.nn.functional.pad(ids, (0, room)).view(n_rows, row)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, room)).view(n_rows, row)
    return filled, mask


def pooled_positions(ids: Tensor, end: int) -> Tensor:
    """Position in each row of ids [M, n] whose state stands for the row: Tensor [M] int64.

    The first end token, or position 0 in a row without one; in old configurations, whose end token is 2, that of the largest id.
    """
    if end == OLD_END:
        return ids.argmax(1)
    return (ids == end).int().argmax(1)


def embedded(states: Tensor, question: str, path: str, *, whole: bool) -> QuestionTokens:
    """Visual tokens and question in the space of the CLIP checkpoint at `path`.

    Parameters
    ----------
    states : Tensor [V, C]
        Of the vision tower's last layer but one.
    question
        Text of the prompt, without template.
    whole
        Read all of it as far as it fits into one row, as TRIM does; else the question alone in as many rows as it takes.
    """
    tower = _tower_at(path, states.device)
    text = tower.encode(blanked(question), truncated=True) if whole else tower.encode(question_only(question))
    return QuestionTokens(clip_image=tower.project(states), clip_text=text)


def load_towers(pruners: Sequence[Any], core: nn.Module) -> None:
    """Load the text towers that methods name, which are kept, so that what is wrong with one is said before anything is answered.

    Raises
    ------
    ConfigError
        A checkpoint that can't be loaded, or that belongs to another vision tower.
    """
    for path in {pruner.text_tower for pruner in pruners if "question.clip" in pruner.needs}:
        tower = _tower_at(path, next(core.parameters()).device)
        width = core.config.vision_config.hidden_size
        if tower.width != width:
            raise ConfigError(_other_width(path, width, tower.width))


def _other_width(path: str, got: int, expected: int) -> str:
    return (
        f"text_tower={short(path)}: the model's vision tower has {got} channels, but this CLIP checkpoint's has {expected}; name the "
        "checkpoint that the vision tower comes from, or pass text_tower=llm."
    )


@functools.lru_cache(maxsize=2)
def _tower_at(path: str, device: torch.device) -> TextTower:
    """A tower for all prompts of a run, and of the runs after it."""
    return TextTower(path, device=device)


_LAYERS = ("vision_model.encoder", "vision_model.embeddings", "vision_model.pre_layrnorm", "logit_scale")  # not read


class TextTower:
    """Text tower, projections and last norm of the vision tower of a CLIP checkpoint.

    Parameters
    ----------
    path
        Folder or hub name of the CLIP checkpoint that the model's vision tower comes from.
    device, dtype
        Of the weights, and of what is returned.

    Raises
    ------
    ConfigError
        A checkpoint that can't be loaded, is not a CLIP model, or lacks weights of the text side.
    """

    def __init__(self, path: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        self.path = path
        clip, self._tokenizer = _loaded(path, dtype)
        # the layers of the vision tower, which the model has itself, are let go
        self._text = clip.text_model.to(device).eval()
        self._text_projection = clip.text_projection.to(device)
        self._norm = clip.vision_model.post_layernorm.to(device)
        self._visual_projection = clip.visual_projection.to(device)
        self._row: int = clip.config.text_config.max_position_embeddings
        self._end: int = clip.config.text_config.eos_token_id

    @property
    def width(self) -> int:
        """C, channels of the vision tower whose states this tower projects."""
        return int(self._norm.normalized_shape[0])

    def ids(self, text: str, *, truncated: bool = False) -> Tensor:
        """Ids [n] int64 with start and end token; `truncated` to one row, the end token included."""
        how: dict[str, Any] = {"truncation": True, "max_length": self._row} if truncated else {"verbose": False}
        return torch.tensor(self._tokenizer(text, **how)["input_ids"], dtype=torch.int64)

    @torch.no_grad()
    def encode(self, text: str, *, truncated: bool = False) -> Tensor:
        """Embeddings [M, E] of a text, one for each row of ids, which the tower reads by itself.

        Parameters
        ----------
        text
            For CDPruner `question_only`, for TRIM `blanked` of the prompt.
        truncated
            Leave out what is behind the first row, as TRIM does: M = 1.
        """
        ids, mask = segments(self.ids(text, truncated=truncated), self._row)
        ids = ids.to(self._visual_projection.weight.device)
        states = self._text(input_ids=ids, attention_mask=mask.to(ids.device)).last_hidden_state
        pooled = states[torch.arange(len(ids), device=ids.device), pooled_positions(ids, self._end)]
        embeddings: Tensor = self._text_projection(pooled)
        return embeddings

    @torch.no_grad()
    def project(self, states: Tensor) -> Tensor:
        """Embeddings [N, E] of states [N, C] of the vision tower's last layer but one.

        Raises
        ------
        PruningError
            States of another width.
        """
        if states.shape[-1] != self.width:
            raise PruningError(_other_width(self.path, states.shape[-1], self.width))
        weight = self._visual_projection.weight
        embeddings: Tensor = self._visual_projection(self._norm(states.to(weight.device, weight.dtype)))
        return embeddings


def _loaded(path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """CLIP model and tokenizer of a checkpoint."""
    from transformers import AutoConfig, AutoTokenizer, CLIPModel

    wanted = "expected a folder or hub name of a CLIP checkpoint with its tokenizer, such as openai/clip-vit-large-patch14-336"
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        clip, info = CLIPModel.from_pretrained(path, dtype=dtype, output_loading_info=True) if kind == "clip" else (None, {})
        tokenizer = AutoTokenizer.from_pretrained(path) if clip else None
    except (OSError, ValueError, LookupError, ImportError, RuntimeError) as error:
        why = f"{type(error).__name__}: {short(str(error))}"
        raise ConfigError(f"text_tower: {short(path)} can't be loaded, {wanted}; {why}") from error
    if clip is None:
        raise ConfigError(f"text_tower: {short(path)} is a checkpoint of type {short(kind)}, {wanted}.")
    # parts that would be made up
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(_LAYERS))
    if missing:
        raise ConfigError(f"text_tower: {short(path)} lacks {len(missing)} weights, {missing[0]} among them; {wanted}.")
    known = len(tokenizer)
    room = clip.config.text_config.vocab_size
    if not room / 2 <= known <= room:  # without its files a tokenizer is made that knows two tokens
        raise ConfigError(f"text_tower: {short(path)} has a tokenizer of {known} tokens for a model of {room}, {wanted}.")
    return clip, tokenizer
