"""Base of the model families: facts of a family, places of its visual tokens in the prompt and on the pixels.

Every start of lmms-eval and every report imports the files of families, so these import torch and transformers inside
functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.vlms.parts.layout import Layout, Scope

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn
    from transformers import PretrainedConfig, ProcessorMixin

    from vlm_pruner_eval.pruners.base import Pruner
    from vlm_pruner_eval.types import Stage
    from vlm_pruner_eval.vlms.parts.boxes import Medium, Picture, Shape
    from vlm_pruner_eval.vlms.parts.towers import Tower

PIXEL_SETTINGS = frozenset({"min_pixels", "max_pixels"})
VIDEO_SETTINGS = frozenset({"max_frames_num"})
NO_SCRIPT = "the script behind the paper's numbers of this family was not released, so its prompt and image handling are not known"

# Arguments of one call of ``get_image_features`` / ``get_video_features``, by name.
FeatureCall = Mapping[str, Any]
# (owner, attribute, wrapper(original, cut, *args, **kwargs)); cut = the sequence the current layer sees, or None.
InstancePatch = tuple[object, str, Callable[..., Any]]


# ---- prompts
def chat_template(messages: Sequence[dict[str, Any]], processor: ProcessorMixin) -> str:
    """Render a chat with the checkpoint's own template."""
    text: str = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text


@dataclass(frozen=True)
class PromptProtocol:
    """Prompt and image handling of a run; the default is the checkpoint's own.

    A protocol changes scores by points, so it is part of every run's identity, and tables never mix protocols.

    Attributes
    ----------
    render : (messages, processor) -> text
        Prompt of one chat in Hugging Face form.
    view : (image, processor) -> image
        Applied to an RGB image before the checkpoint's processor has it.
    prepare : (config, processor) -> None
        Changes a loaded checkpoint, once.
    fixes
        Settings that belong to the protocol, so that they can't be given beside it.
    new_tokens
        The longest answer, in tokens, if a task names none; None: the family's.
    """

    render: Callable[[Sequence[dict[str, Any]], ProcessorMixin], str] = chat_template
    view: Callable[[Image.Image, ProcessorMixin], Image.Image] = lambda image, processor: image
    prepare: Callable[[PretrainedConfig, ProcessorMixin], None] = lambda config, processor: None
    fixes: Mapping[str, object] = field(default_factory=dict)
    new_tokens: int | None = None


HF = PromptProtocol()


@dataclass(frozen=True)
class FamilySpec:
    """Facts that a VLM family states about itself.

    Attributes
    ----------
    model_id
        Name after ``lmms-eval --model``.
    model_types
        Hugging Face ``model_type`` of its checkpoints.
    stock_prompt
        The id of lmms-eval's own wrapper, under which tasks look up prompts.
    media
        Kinds of media in a prompt, of "image" and "video".
    bounds_pixels
        True if images have any size, between the settings `min_pixels` and `max_pixels`.
    frames
        Frames picked of a video, at most, unless `max_frames_num` says otherwise.
    new_tokens
        The longest answer, in tokens, if a task names none.
    stops_at_blank_line
        True if an answer ends at the stop string that lmms-eval fills in; of its own wrappers only Qwen2-VL's does.
    protocols
        By name; "hf" is the checkpoint's own prompt and image handling.
    why_no_paper
        The reason for having no protocol "paper".
    mrope
        True if positions are multi-dimensional.
    tiled
        True if an image has several views, so that a budget a view is another one than a budget an image.
    """

    model_id: str
    model_types: frozenset[str]
    stock_prompt: str
    media: tuple[str, ...] = ("image",)
    bounds_pixels: bool = False
    frames: int = 32
    new_tokens: int = 1024
    stops_at_blank_line: bool = False
    protocols: Mapping[str, PromptProtocol] = field(default_factory=lambda: {"hf": HF})
    why_no_paper: str = "the paper has no numbers of this family"
    mrope: bool = False
    tiled: bool = False

    @property
    def takes(self) -> frozenset[str]:
        """Settings of a run that not every family has."""
        return (VIDEO_SETTINGS if "video" in self.media else frozenset()) | (PIXEL_SETTINGS if self.bounds_pixels else frozenset())


# ---- where its tokens are
class SeenTokens(Protocol):
    """The shortened sequence that a layer sees."""

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """On a device: `index` [B, L'], positions in the prompt, and `valid` [B, L'], False for fillers."""


class Family:
    """A VLM family: one file of this folder, registered by lying there.

    A subclass has a `spec` and says `layouts`, `geometry` and `pictures`; the other methods are for families that need them.
    """

    spec: ClassVar[FamilySpec]

    @property
    def mrope(self) -> bool:
        """True if positions are multi-dimensional."""
        return self.spec.mrope

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of media with placeholder tokens of their own."""
        return self.spec.media

    # ---- in the prompt
    def layouts(self, core: nn.Module, kind: str, call: FeatureCall) -> list[Layout]:
        """Layouts of the images (or videos) that one call of ``get_{kind}_features`` encodes, in order."""
        raise NotImplementedError

    def refuse(self, config: PretrainedConfig) -> str | None:
        """Return a sentence if a checkpoint of this model type can't be pruned, else None."""
        return None

    def keep(self, pruner: Pruner, stage: Stage, n_visual: int, scope: int) -> int:
        """Tokens kept after `stage` of the row's scope number `scope`; a family's release count (official_quirks) goes here."""
        return pruner.keep_at(stage, n_visual)

    def release_layout(self, layout: Layout) -> Layout:
        """Layout that the released code takes `layout` for (official_quirks)."""
        return layout

    def patches(self, core: nn.Module) -> list[InstancePatch]:
        """Methods of the model that must know which tokens were cut (DeepStack); most families have none."""
        return []

    def tower(self, core: nn.Module) -> Tower | None:
        """The vision tower, for methods that look at it; None if nothing is known of it."""
        return None

    def token_id(self, config: PretrainedConfig, kind: str) -> int | None:
        """Return the placeholder token of images or videos in input_ids."""
        from vlm_pruner_eval import hf_compat

        return hf_compat.token_id(config, kind)

    def is_visual(self, config: PretrainedConfig, input_ids: Tensor) -> Tensor:
        """Bool [B, L]: which tokens of input_ids are visual."""
        import torch

        ids = [token for kind in self.kinds if (token := self.token_id(config, kind)) is not None]
        return torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))

    def scopes(self, config: PretrainedConfig, input_ids: Tensor, layouts: Mapping[str, list[Layout]]) -> list[list[Scope]]:
        """Images and videos of every row of `input_ids` [B, L], which is on the CPU, in prompt order.

        Tokens are given to images by COUNT, in order: two images can touch, and a video's tokens can be interrupted
        by text. Beams and returned sequences repeat each row's images, as generate() repeats its input_ids.

        Raises
        ------
        PruningError
            Placeholder tokens that do not match the encoded images.
        """
        from vlm_pruner_eval.vlms.parts.scopes import assign

        rows: list[list[Scope]] = [[] for _ in input_ids]
        for kind in self.kinds:
            token = self.token_id(config, kind)
            if token is not None and bool((input_ids == token).any()):
                for row, found in zip(rows, assign(input_ids == token, layouts.get(kind, []), kind), strict=True):
                    row.extend(found)
        return [sorted(row, key=lambda scope: int(scope.positions[0])) for row in rows]

    # ---- on the pixels
    def geometry(self, config: PretrainedConfig, processor: ProcessorMixin, protocol: PromptProtocol) -> dict[str, Any]:
        """Settings that decide which part of an image a token shows, in plain types; a run's record keeps them for `pictures`."""
        raise NotImplementedError

    def pictures(self, geometry: Mapping[str, Any], medium: Medium, layouts: Sequence[Shape]) -> tuple[int, list[Picture]]:
        """Lay the tokens of an image or video on its pixels: arithmetic, no model.

        Parameters
        ----------
        geometry
            As `geometry` gave it.
        layouts
            `Layout.shape` of this medium and of those behind it.

        Returns
        -------
        (int, list)
            Layouts that belong to the medium, and its pictures.

        Raises
        ------
        ConfigError
            Layouts that this medium can't have had.
        """
        raise NotImplementedError

    def check_complete(self) -> None:
        """Refuse a file of a family that does not say everything that a run needs, before anything is loaded.

        Raises
        ------
        ConfigError
            A method that is missing.
        """
        missing = [name for name in ("layouts", "geometry", "pictures") if getattr(type(self), name) is getattr(Family, name)]
        if missing:
            raise ConfigError(
                f"model: {self.spec.model_id} has no {' and no '.join(missing)}, expected these methods of {type(self).__name__} in its "
                "file in vlm_pruner_eval/vlms/; without them no record can say which part of an image a token shows."
            )


def unknown_family(model_type: object, known: frozenset[str]) -> ConfigError:
    """Return the error for a model that no file of this folder knows."""
    return ConfigError(
        f"model: got model_type {model_type!r}, which can't be pruned yet; known: {', '.join(sorted(known))}. "
        "A new family is one file in vlm_pruner_eval/vlms/."
    )
