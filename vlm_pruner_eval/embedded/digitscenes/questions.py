"""Questions about scenes, in the 51 words that MiniVLM knows, and the balanced draw of a task's questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_pruner_eval.embedded.digitscenes.scenes import CELLS, COLOURS, Scene
from vlm_pruner_eval.errors import ConfigError


@dataclass(frozen=True)
class Question:
    """A question and its right answer.

    `subtype` is what a task balances; a yes question and a no question on the same fact share their `pair`.
    """

    text: str
    answer: str
    subtype: str


Item = tuple[Question, ...]  # what is drawn at once: one question, or the two of a pair
Offer = Callable[[Scene, np.random.RandomState], list[Item]]


def _once(values: Sequence[object]) -> set[object]:
    return {value for value, count in Counter(values).items() if count == 1}


def _pick(values: Sequence, rng: np.random.RandomState) -> object:
    return values[rng.randint(len(values))]


def offer_exist(scene: Scene, rng: np.random.RandomState) -> list[Item]:
    """Is there a digit: one question on every digit, present or absent."""
    present = {item.digit for item in scene.objects}
    return [
        (Question(f"is there a {digit} ?", "yes" if digit in present else "no", "present" if digit in present else "absent"),)
        for digit in range(10)
    ]


def offer_attribute(scene: Scene, rng: np.random.RandomState) -> list[Item]:
    """The colour of a digit that stands there once; the digit of a colour that is used once."""
    digits, colours = _once([item.digit for item in scene.objects]), _once([item.colour for item in scene.objects])
    found = [Question(f"what colour is the {item.digit} ?", item.colour, "colour") for item in scene.objects if item.digit in digits]
    found += [Question(f"what digit is {item.colour} ?", str(item.digit), "digit") for item in scene.objects if item.colour in colours]
    return [(question,) for question in found]


def offer_where(scene: Scene, rng: np.random.RandomState) -> list[Item]:
    """The digit in a cell that holds exactly one; the subtype is the cell."""
    cells = _once([item.cell for item in scene.objects])
    alone = [item for item in scene.objects if item.cell in cells]
    return [(Question(f"what digit is in the {item.cell} ?", str(item.digit), item.cell),) for item in alone]


def offer_count(scene: Scene, rng: np.random.RandomState) -> list[Item]:
    """Ask for the number of digits; the subtype is the answer."""
    count = str(len(scene.objects))
    return [(Question("how many digits are there ?", count, count),)]


def offer_read(scene: Scene, rng: np.random.RandomState) -> list[Item]:
    """The number on the plate; the subtype is its length."""
    return [(Question("what is the number ?", scene.number, f"{len(scene.number)} digits"),)]


def offer_pairs(scene: Scene, rng: np.random.RandomState) -> list[Item]:
    """A yes and a no question on one fact: a digit's colour, a digit's cell, or the count.

    The wrong colour or cell belongs to another object of the scene where there is one, and the wrong count is off by one:
    a model has to look at the right object to tell.
    """
    digits = _once([item.digit for item in scene.objects])
    pairs = []
    for item in scene.objects:
        if item.digit not in digits:
            continue
        colour = _pick(_others(item.colour, [other.colour for other in scene.objects], tuple(COLOURS)), rng)
        pairs.append(_pair(f"is the {item.digit} {{}} ?", item.colour, colour, "colour"))
        cell = _pick(_others(item.cell, [other.cell for other in scene.objects], CELLS), rng)
        pairs.append(_pair(f"is the {item.digit} in the {{}} ?", item.cell, cell, "position"))
    count = len(scene.objects)
    pairs.append(_pair("are there {} digits ?", count, count + _pick((-1, 1), rng), "count"))
    return pairs


def _others(own: str, near: Sequence[str], every: Sequence[str]) -> list[str]:
    return [value for value in near if value != own] or [value for value in every if value != own]


def _pair(text: str, right: object, wrong: object, subtype: str) -> Item:
    return Question(text.format(right), "yes", subtype), Question(text.format(wrong), "no", subtype)


def draw(scenes: Sequence[Scene], offer: Offer, quotas: dict[str, int], rng: np.random.RandomState) -> list[tuple[int, Item]]:
    """Draw a task's questions, as spread over the scenes as the quotas allow.

    Parameters
    ----------
    scenes
        Every scene is asked once before any scene is asked twice.
    offer
        What can be asked about a scene.
    quotas
        How many items of each subtype.
    rng
        Source of every choice.

    Returns
    -------
    (index of the scene, item), subtype by subtype in blocks: every block holds each subtype once (in random order), so that
    any first part of the list is balanced to within one item.

    Raises
    ------
    ConfigError
        The scenes do not offer enough questions of a subtype.
    """
    offers = [offer(scene, rng) for scene in scenes]
    drawn: dict[str, list[tuple[int, Item]]] = {subtype: [] for subtype in quotas}
    while missing := {subtype: quota - len(drawn[subtype]) for subtype, quota in quotas.items() if quota > len(drawn[subtype])}:
        asked_before = sum(map(len, drawn.values()))
        for index in rng.permutation(len(scenes)):
            open_items = [item for item in offers[index] if missing.get(item[0].subtype)]
            if not open_items:
                continue
            most = max(missing[item[0].subtype] for item in open_items)
            item = _pick([item for item in open_items if missing[item[0].subtype] == most], rng)
            offers[index].remove(item)
            missing[item[0].subtype] -= 1
            drawn[item[0].subtype].append((int(index), item))
        if sum(map(len, drawn.values())) == asked_before:
            raise ConfigError(f"quotas: {missing} questions more than {len(scenes)} scenes offer; make more scenes or lower the quotas.")
    return _interleaved(drawn, rng)


def _interleaved(drawn: dict[str, list[tuple[int, Item]]], rng: np.random.RandomState) -> list[tuple[int, Item]]:
    """Shuffle within each subtype, then take one of each in turn, in random order."""
    shuffled = [[items[i] for i in rng.permutation(len(items))] for items in drawn.values()]
    ordered = []
    for turn in range(max(map(len, shuffled))):
        block = [items[turn] for items in shuffled if turn < len(items)]
        ordered += [block[i] for i in rng.permutation(len(block))]
    return ordered
