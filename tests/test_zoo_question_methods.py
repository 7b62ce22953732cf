"""CDPruner and TRIM: effects against slow loops written from the papers, invariants, and odd inputs."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlm_pruner_eval import ConfigError, Pruner, PruningError, Selection, Stage, VisualTokens, get_pruner, keep_count
from vlm_pruner_eval.types import QuestionTokens, VisionTokens

METHODS = ("cdpruner", "trim")
C, D, E = 7, 50, 6  # channels before and behind the projector, and of the text tower
PROJECTION = torch.randn(C, D, generator=torch.Generator().manual_seed(9))


def project(states: Tensor) -> Tensor:
    """A projector that is not linear, so that a mean before it is none behind it."""
    return (states @ PROJECTION).tanh()


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image of several views, and a question in some rows."""

    seed: int
    counts: tuple[int, ...]
    rows: int = 2
    coarse: bool = False
    image: str | None = "an image"

    def views(self) -> list[VisualTokens]:
        generator = torch.Generator().manual_seed(self.seed)

        def numbers(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator)
            return values.round() if self.coarse else values

        text = numbers(self.rows, E)
        views = []
        for i, count in enumerate(self.counts):
            states = numbers(count, C)
            question = QuestionTokens(
                image_embeddings=numbers(count, D), text_embeddings=numbers(3, D), clip_image=numbers(count, E), clip_text=text
            )
            vision = VisionTokens(states=states, project=project)
            hidden = numbers(count, D)
            sample = f"view {i}"
            views.append(VisualTokens(hidden, grid=(1, count), vision=vision, question=question, image=self.image, sample_id=sample))
        return views


SCENES = st.builds(
    Scene,
    seed=st.integers(0, 10**6),
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple),
    rows=st.integers(0, 3),
    coarse=st.booleans(),
)


def method(name: str, **parameters: object) -> Pruner:
    return get_pruner(name, **{"pruning_rate": 0.5, "text_tower": "a folder"} | parameters)


def with_question(view: VisualTokens, **tensors: Tensor) -> VisualTokens:
    return dataclasses.replace(view, question=dataclasses.replace(view.question, **tensors))


def with_states(view: VisualTokens, states: Tensor) -> VisualTokens:
    return dataclasses.replace(view, vision=dataclasses.replace(view.vision, states=states))


def own(selection: Selection) -> list[int]:
    """Tokens of the image among the places of an answer, ascending."""
    merged = [] if selection.merged is None else selection.merged.tolist()
    return sorted({*selection.order.tolist()} - {*merged})


# ---- the papers as slow loops
def relevances(views: list[VisualTokens]) -> list[np.ndarray]:
    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))

    raw = []
    for view in views:
        image, text = view.question.clip_image.double().numpy(), view.question.clip_text.double().numpy()
        raw.append(np.array([np.mean([-cosine(patch, row) for row in text]) for patch in image]))
    low, high = min(map(min, raw)), max(map(max, raw))
    return [(values - low + 1e-6) / (high - low) for values in raw]


def largest_determinants(view: VisualTokens, relevance: np.ndarray, keep: int) -> list[int]:
    """By determinants themselves: each step takes the token with which that of the chosen ones is largest."""
    unit = view.hidden_states.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    chosen: list[int] = []
    for _ in range(keep):
        volumes = [-math.inf if j in chosen else np.linalg.slogdet(kernel[np.ix_([*chosen, j], [*chosen, j])])[1] for j in range(len(unit))]
        chosen.append(int(np.argmax(np.round(volumes, 9))))  # of equal ones the first
    return chosen


@pytest.mark.parametrize("seed", range(4))
def test_cdpruner_takes_the_largest_determinant(seed: int):
    views = Scene(seed, (20, 12, 30), rows=1 + seed % 3).views()
    got = method("cdpruner").select_batch(views, [9, 12, 5])
    for view, relevance, selection in zip(views, relevances(views), got, strict=True):
        assert selection.order.tolist() == largest_determinants(view, relevance, len(selection.order))
        assert not selection.quirks and selection.hidden_states is None


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rows", [1, 3])
def test_trim_and_cdpruner_prefer_what_the_question_is_least_like(name: str, rows: int):
    """The sign of the releases."""
    (view,) = Scene(3, (8,), rows=rows).views()
    aligned = view.question.clip_text.mean(0, keepdim=True) * torch.linspace(-1, 1, 8)[:, None]
    got = method(name).select(with_question(view, clip_image=aligned), 2)
    assert got.order[0] == 0 if name == "trim" else got.order[0] < 4  # the cosine of four is the same


@pytest.mark.parametrize("seed", range(4))
def test_trim_keeps_the_lowest_products_and_the_mean_of_the_others(seed: int):
    views = Scene(seed, (20, 12), rows=1).views()
    for view, selection in zip(views, method("trim").select_batch(views, [6, 12]), strict=True):
        n = len(selection.order)
        scores = [float(patch @ view.question.clip_text[0]) for patch in view.question.clip_image]
        if n == view.n_visual:  # nothing is dropped
            assert selection.hidden_states is selection.merged is None and "all_kept" in selection.quirks
            continue
        kept = sorted(sorted(range(view.n_visual), key=scores.__getitem__)[: n - 1])
        assert own(selection) == kept and n == 6
        dropped = [view.vision.states[i] for i in range(view.n_visual) if i not in kept]
        mean = project(torch.stack(dropped).mean(0, keepdim=True))
        torch.testing.assert_close(selection.hidden_states, torch.cat([view.hidden_states[kept], mean]))


def test_the_mean_is_the_last_row_wherever_its_place_is():
    (view,) = Scene(5, (9,), rows=1).views()
    order = torch.tensor([8, 7, 0, 5, 1, 2, 3, 4, 6])
    image = torch.empty(9, E)
    image[order] = torch.arange(9.0)[:, None] * view.question.clip_text  # the first are the least like the question
    selection = method("trim").select(with_question(view, clip_image=image), 5)
    assert own(selection) == [0, 5, 7, 8] and len(selection.keep) == 5
    assert selection.hidden_states[:4].equal(view.hidden_states[[0, 5, 7, 8]])


# ---- shares and counts
def outlier_share(views: list[VisualTokens]) -> Fraction:
    scores = []
    for view in views:
        products = [-float(patch.double() @ view.question.clip_text[0].double()) for patch in view.question.clip_image]
        powers = [math.exp(value - max(products)) for value in products]
        scores += [power / sum(powers) for power in powers]
    first, third = np.percentile(scores, [25, 75])
    return Fraction(sum(score > third + 1.5 * (third - first) for score in scores), len(scores))


@pytest.mark.parametrize("quirks", [False, True])
def test_the_adaptive_share_is_that_of_all_views(quirks: bool):
    views = Scene(2, (40, 40, 15), rows=1).views()
    pruner = method("trim", adaptive=True, official_quirks=quirks)
    share = outlier_share(views)
    assert pruner.decides_count() and share not in {outlier_share([view]) for view in views}, "or the scene shows nothing"
    for view, selection in zip(views, pruner.select_batch(views, [1, 2, 3]), strict=True):
        assert len(own(selection)) == int(view.n_visual * share) and len(selection.order) == int(view.n_visual * share) + 1


def test_the_release_truncates_its_share_in_floating_point():
    """Of 2,880 tokens 161 counts of outliers lose one."""
    views = Scene(0, (2880,)).views()
    sane, released = (method("trim", official_quirks=quirks) for quirks in (False, True))
    kept = [(sane._shared(views, n)[0], released._shared(views, n)[0]) for n in range(2881)]
    assert [exact for exact, _ in kept] == [*range(2881)]
    assert sum(fewer == exact - 1 for exact, fewer in kept) == 161 and all(exact - fewer in (0, 1) for exact, fewer in kept)


@pytest.mark.parametrize(
    ("rate", "n_visual", "n_kept"),
    [("8/9", 576, 64), ("2/3", 576, 192), (1 - 1 / 3, 576, 192), (0.825, 576, 100), (0.71, 100, 28), (0, 9, 9)],
)
def test_the_release_keeps_the_truncated_share_and_the_mean(rate: object, n_visual: int, n_kept: int):
    """0.29 of 100 are 28 to it, since ``100 * 0.29`` is below 29."""
    pruner = method("trim", pruning_rate=rate, official_quirks=True)
    assert pruner.default_keep(n_visual) == pruner.keep_at(Stage(0, 0.5), n_visual) == n_kept
    (view,) = Scene(1, (n_visual,)).views()
    assert len(pruner.select(view).order) == min(n_visual, n_kept + 1)
    sane = method("trim", pruning_rate=rate)
    assert len(sane.select(view).order) == keep_count(n_visual, rate) and not sane.decides_count()


def test_the_release_rounds_what_the_projector_reads_to_half_precision():
    (view,) = Scene(4, (30,), rows=1).views()
    view = with_states(view, view.vision.states * 100)
    got = method("trim", official_quirks=True).select(view, 10)
    kept = own(got)
    dropped = [i for i in range(30) if i not in kept]
    rows = torch.cat([view.vision.states[kept], view.vision.states[dropped].mean(0, keepdim=True)])
    torch.testing.assert_close(got.hidden_states, project(rows.half().float()))
    assert not torch.allclose(got.hidden_states, project(rows), atol=1e-6)


# ---- what must hold
@given(scene=SCENES, keep_of_1000=st.integers(0, 1000), name=st.sampled_from(METHODS), stand_in=st.booleans())
def test_the_answer(scene: Scene, keep_of_1000: int, name: str, stand_in: bool):
    """As many as asked, each once, in range; the inputs as they were."""
    views = scene.views()
    before = [(view.hidden_states.clone(), view.question.clip_image.clone(), view.vision.states.clone()) for view in views]
    keeps = [round(count * keep_of_1000 / 1000) for count in scene.counts]
    pruner = method(name, **({"text_tower": "llm"} if stand_in else {}))
    for view, keep, selection in zip(views, keeps, pruner.select_batch(views, keeps), strict=True):
        assert len(selection.order) == len({*selection.order.tolist()}) == keep
        assert {*selection.order.tolist()} <= {*range(view.n_visual)}
        if selection.hidden_states is not None:
            assert selection.hidden_states.shape == (keep, D) and len(selection.merged) == 1
    for view, (hidden, image, states) in zip(views, before, strict=True):
        assert view.hidden_states.equal(hidden) and view.question.clip_image.equal(image) and view.vision.states.equal(states)


@given(scene=SCENES, name=st.sampled_from(METHODS), adaptive=st.booleans())
def test_with_official_quirks_too_each_token_is_there_once(scene: Scene, name: str, adaptive: bool):
    pruner = method(name, official_quirks=True, **({"adaptive": adaptive} if name == "trim" else {}))
    for view, selection in zip(scene.views(), pruner.select_batch(scene.views()), strict=True):
        assert len(selection.order) == len({*selection.order.tolist()}) and {*selection.order.tolist()} <= {*range(view.n_visual)}


@given(scene=SCENES, scale=st.sampled_from([0.25, 8.0]))
def test_cdpruner_does_not_see_lengths(scene: Scene, scale: float):
    views = scene.views()
    longer = [
        dataclasses.replace(with_question(view, clip_image=view.question.clip_image * scale), hidden_states=view.hidden_states * scale)
        for view in views
    ]
    for one, other in zip(method("cdpruner").select_batch(views), method("cdpruner").select_batch(longer), strict=True):
        assert one.order.equal(other.order) and one.quirks == other.quirks


@given(scene=SCENES)
def test_a_prefix_of_the_order_is_the_choice_of_fewer(scene: Scene):
    views = scene.views()
    whole = method("cdpruner").select_batch(views, [*scene.counts])
    half = method("cdpruner").select_batch(views, [count // 2 for count in scene.counts])
    for view, all_, few in zip(views, whole, half, strict=True):
        assert all_.order[: len(few.order)].equal(few.order) and sorted(all_.order.tolist()) == [*range(view.n_visual)]


# ---- views
@pytest.mark.parametrize("name", METHODS)
def test_views_of_an_image_are_scaled_together_and_images_are_not(name: str):
    parameters = {"adaptive": True} if name == "trim" else {}
    pruner = method(name, **parameters)
    views = Scene(2, (40, 40), rows=1).views()
    views[1] = with_question(views[1], clip_image=views[1].question.clip_image * 0.1 + views[1].question.clip_text)  # much alike
    together = pruner.select_batch(views, [10, 10])
    alone = [pruner.select(view, 10) for view in views]
    assert any(not one.order.equal(other.order) for one, other in zip(together, alone, strict=True))
    for names in ((None, None), ("first", "second")):
        apart = [dataclasses.replace(view, image=image) for view, image in zip(views, names, strict=True)]
        for one, other in zip(pruner.choose_batch(apart, [10, 10]), alone, strict=True):
            assert one.order.equal(other.order)


def test_trim_says_that_other_views_would_be_lost():
    got = method("trim").select_batch(Scene(1, (9, 9, 9)).views(), [4, 4, 4])
    assert ["base_view_only" in one.quirks for one in got] == [False, True, True]


# ---- odd inputs
def test_constant_relevance_counts_as_one_for_all():
    """The release divides by zero, and NaN takes the first two tokens in turns."""
    (view,) = Scene(6, (12,), rows=1).views()
    view = with_question(view, clip_image=view.question.clip_text.expand(12, -1) * 2)
    got = method("cdpruner").select(view, 5)
    assert got.quirks == {"constant_relevance"}
    assert got.order.tolist() == largest_determinants(view, np.ones(12), 5)
    released = method("cdpruner", official_quirks=True)
    assert released.select(view, 5).order.tolist() == [0, 1] and released.decides_count()
    assert released.select(view, 1).order.tolist() == [0]


@pytest.mark.parametrize("rank", [1, 4])
def test_behind_the_rank_the_rest_comes_by_relevance(rank: int):
    (view,) = Scene(7, (20,), rows=1).views()
    generator = torch.Generator().manual_seed(rank)
    states = torch.randn(20, rank, generator=generator) @ torch.randn(rank, D, generator=generator)
    view = dataclasses.replace(view, hidden_states=states)
    (relevance,) = relevances([view])
    got = method("cdpruner").select(view, 11)
    assert got.quirks == {"noise"}
    assert got.order[:rank].tolist() == largest_determinants(view, relevance, rank)
    rest = sorted({*range(20)} - {*got.order[:rank].tolist()}, key=lambda i: -relevance[i])
    assert got.order[rank:].tolist() == rest[: 11 - rank]
    assert not method("cdpruner").select(view, rank).quirks
    released = method("cdpruner", official_quirks=True).select(view, 11)
    assert released.order[:rank].equal(got.order[:rank]) and released.quirks == {"noise"}


def test_copies_of_a_token_are_taken_last():
    (view,) = Scene(8, (6,), rows=1).views()
    twice = dataclasses.replace(
        with_question(view, clip_image=view.question.clip_image.repeat(2, 1)),
        hidden_states=view.hidden_states.repeat(2, 1),
        grid=(1, 12), coords=None, ids=None, n_original=None,
    )  # fmt: skip
    got = method("cdpruner").select(twice, 12)
    distinct = got.order[:5] % 6  # all but the least relevant one, which is worth less than rounding noise
    assert len({*distinct.tolist()}) == 5 and got.quirks == {"noise"}
    assert got.order[0] < 6


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("quirks", [False, True])
def test_one_token(name: str, quirks: bool):
    (view,) = Scene(9, (1,)).views()
    got = method(name, official_quirks=quirks).select(view, 1)
    assert got.order.tolist() == [0] and got.hidden_states is None
    assert method(name, official_quirks=quirks and name == "cdpruner").select(view, 0).order.tolist() == []


def test_trim_may_keep_the_mean_alone():
    (view,) = Scene(9, (6,)).views()
    for got in (method("trim").select(view, 1), method("trim", official_quirks=True).select(view, 0)):
        assert own(got) == [] and got.quirks == {"none_kept"}
        torch.testing.assert_close(got.hidden_states, project(view.vision.states.mean(0, keepdim=True)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_is_computed_in_float32(name: str):
    (view,) = Scene(10, (30,)).views()
    half = dataclasses.replace(
        with_question(view, clip_image=view.question.clip_image.half(), clip_text=view.question.clip_text.half()),
        hidden_states=view.hidden_states.half(),
    )
    half = with_states(half, half.vision.states.half())
    whole = dataclasses.replace(
        with_question(half, clip_image=half.question.clip_image.float(), clip_text=half.question.clip_text.float()),
        hidden_states=half.hidden_states.float(),
    )
    got = method(name).select(half, 9)
    assert got.order.equal(method(name).select(whole, 9).order)
    assert got.hidden_states is None or got.hidden_states.dtype == torch.float16


# ---- the text side
@pytest.mark.parametrize("name", METHODS)
def test_the_text_tower_has_to_be_named(name: str):
    for given_ in ({}, {"text_tower": None}):
        with pytest.raises(ConfigError, match=r"text_tower=openai/clip-vit-large-patch14-336.*text_tower=llm is the adapted stand-in"):
            get_pruner(name, pruning_rate=0.5, **given_)
    for wrong in ("", 3, ["a"]):
        with pytest.raises(ConfigError, match=r"text_tower: got .* expected a path, a hub name, or 'llm'"):
            get_pruner(name, pruning_rate=0.5, text_tower=wrong)


@pytest.mark.parametrize("name", METHODS)
def test_the_stand_in_reads_the_language_models_embeddings(name: str):
    (view,) = Scene(11, (20,)).views()
    by_tower, stand_in = method(name), method(name, text_tower="llm")
    assert "question.clip" in by_tower.needs and by_tower.needs - {"question.clip"} == stand_in.needs - {"question.embeddings"}
    assert dataclasses.replace(stand_in, pruning_rate=0.25).needs == stand_in.needs and type(by_tower).needs == by_tower.needs
    as_tower = with_question(view, clip_image=view.question.image_embeddings, clip_text=view.question.text_embeddings)
    assert stand_in.select(view, 7).order.equal(by_tower.select(as_tower, 7).order)
    without = dataclasses.replace(view, question=QuestionTokens(clip_image=view.question.clip_image, clip_text=view.question.clip_text))
    with pytest.raises(PruningError, match=r"needs 'question.embeddings', got None"):
        stand_in.select(without, 7)
    without = dataclasses.replace(view, question=dataclasses.replace(view.question, clip_image=None))
    with pytest.raises(PruningError, match=r"needs 'question.clip', got None"):
        by_tower.select(without, 7)
    assert stand_in.select(without, 7).order.shape == (7,)


@pytest.mark.parametrize("name", METHODS)
def test_defaults(name: str):
    pruner = method(name)
    assert (pruner.layer, pruner.scope, pruner.positions) == (0, "per_view", "auto") and pruner.joint_views
    assert pruner.stages(32) == (Stage(0, 0.5),)
