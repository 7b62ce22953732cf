"""Every family through the chat wrapper, on a tiny checkpoint with the family's own processor."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
from lmms_requests import GREEDY, request, set_batch_size, texts, to_messages
from PIL import Image
from thinning import only
from tiny_checkpoints import PROCESSORS, checkpoint

from vlm_pruner_eval import ConfigError, keep_count
from vlm_pruner_eval.lmms import PrunedModel, load
from vlm_pruner_eval.lmms import model as lmms_model
from vlm_pruner_eval.pruners.uniform import Uniform
from vlm_pruner_eval.vlms import Family, FamilySpec
from vlm_pruner_eval.vlms.internvl import InternVL

FAMILIES = sorted([*PROCESSORS, "llava_video"])
# the one method of this project in all families; each of the others, whose cuts are the hook's and not a family's, in two
PRUNED = [
    *((family, "vlmpruner", "2/3") for family in FAMILIES),
    *((family, ("fastv", "dart", "divprune", "vlmpruner")[i % 4], "8/9") for i, family in enumerate(FAMILIES)),
]
SIZES = [[(50, 100)], [(112, 80)], [(40, 140)], [(150, 160)], [(50, 100), (112, 80)], [], [(70, 64)]]  # of the images of each document
TWO_IMAGES, NO_IMAGE = 4, 5


@functools.cache
def documents() -> list[dict]:
    generator = torch.Generator().manual_seed(5)

    def picture(height: int, width: int) -> Image.Image:
        return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())

    return [{"question": f"Q{i}: what is it{'?' * (i % 3)}", "images": [picture(*size) for size in sizes]} for i, sizes in enumerate(SIZES)]


@functools.cache
def loaded(family: str) -> PrunedModel:
    model = load(f"vlmpruner_{family}", pretrained=checkpoint(family))
    model.context.keep_loaded = True
    return model


@pytest.fixture
def model(family: str) -> PrunedModel:
    model = loaded(family)
    model.task_dict = {"first": {"test": documents()}}
    model.configure("none")
    set_batch_size(model, 1)
    return model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def ask(model: PrunedModel, batch_size: int = 1) -> list[str]:
    """Answers to all documents; every sample must have one."""
    set_batch_size(model, batch_size)
    model.answers = []
    answers = texts(model, [request("first", i) for i in range(len(SIZES))])
    assert [answer.error for answer in model.answers] == [None] * len(SIZES)
    return answers


def prepared(model: PrunedModel, document: dict) -> dict[str, torch.Tensor]:
    """The inputs that transformers' own chat template makes of one document."""
    parts = [*({"type": "image", "image": image} for image in document["images"]), {"type": "text", "text": document["question"]}]
    chat = [{"role": "user", "content": parts}]
    inputs = model.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    return inputs


def plain(model: PrunedModel, document: dict) -> str:
    """What the unhooked model says."""
    inputs = prepared(model, document)
    output = model.model.generate(**inputs, max_new_tokens=GREEDY["max_new_tokens"], do_sample=False, pad_token_id=0)
    return model.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def scopes(family: str, model: PrunedModel, document: dict) -> list[int]:
    """Tokens of each budget scope of a document."""
    n_images = len(document["images"])
    if family in ("llava_onevision", "llava_video") and n_images > 1:
        vision = model.config.vision_config
        return [(vision.image_size // vision.patch_size) ** 2 + 1] * n_images  # base views, each closed by a newline token
    token = model.tokenizer.convert_tokens_to_ids(model.processor.image_token)
    alone = [int((prepared(model, document | {"images": [image]})["input_ids"] == token).sum()) for image in document["images"]]
    return [4] * (sum(alone) // 4) if family == "internvl" else alone


# ---- answers and records


def test_the_plain_method_answers_as_generate_does_and_rate_zero_as_the_plain_method(model: PrunedModel) -> None:
    expected = [plain(model, document) for document in documents()]
    assert len(set(expected)) > 3, "the tiny model must answer differently to different documents"
    assert ask(model) == ask(model, 4) == expected
    model.configure("vlmpruner", 0)
    assert ask(model, 4) == expected
    assert all(answer.record.n_kept == answer.record.n_visual for answer in model.answers)


@pytest.mark.parametrize(("family", "method", "rate"), only(PRUNED, PRUNED[len(FAMILIES) :]), indirect=["family"])
def test_batched_answers_equal_single_ones_and_what_was_asked_was_kept(family: str, model: PrunedModel, method: str, rate: str) -> None:
    found = [scopes(family, model, document) for document in documents()]
    expected = [(len(tokens), sum(tokens), *[sum(keep_count(n, rate) for n in tokens)] * 2) for tokens in found]
    model.configure(method, rate)
    answers = {}
    for size in (1, 4):
        answers[size] = ask(model, size)
        records = [answer.record for answer in model.answers]
        assert [(r.n_images, r.n_visual, r.n_asked, r.n_kept) for r in records] == expected
        assert [len(r.kept_positions) for r in records] == [n_kept for *_, n_kept in expected]
    assert answers[1] == answers[4]
    assert sorted({answer.batch_size for answer in model.answers}) == [3, 4]
    assert expected[NO_IMAGE] == (0, 0, 0, 0)


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"], indirect=True)
def test_pruning_changes_answers(model: PrunedModel) -> None:
    unpruned = ask(model)
    model.configure("vlmpruner", "8/9")
    pruned = ask(model)
    assert pruned != unpruned
    assert pruned[NO_IMAGE] == unpruned[NO_IMAGE]


def test_several_images_reach_the_model_in_order(family: str, model: PrunedModel) -> None:
    model.configure("uniform", "1/2")
    document = documents()[TWO_IMAGES]
    model.task_dict = {"first": {"test": [document, document | {"images": document["images"][::-1]}]}}
    one, other = texts(model, [request("first", i, options=GREEDY | {"max_new_tokens": 20}) for i in range(2)])
    assert one != other


@pytest.mark.parametrize("family", ["internvl", "llava_next", "qwen2_vl"], indirect=True)
def test_half_precision_leaves_grids_and_sizes_whole_numbers(family: str) -> None:
    half = load(
        f"vlmpruner_{family}", pretrained=checkpoint(family), dtype="bfloat16", batch_size=4, method="vlmpruner", pruning_rate="2/3"
    )
    half.task_dict = {"first": {"test": documents()}}
    assert half.dtype == torch.bfloat16
    ask(half, 4)
    for document, answer in zip(documents(), half.answers, strict=True):
        assert answer.record.n_kept == sum(keep_count(n, "2/3") for n in scopes(family, half, document))


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"], indirect=True)
def test_release_behaviour_of_a_family_passes_the_checks(family: str, model: PrunedModel) -> None:
    model.configure("vlmpruner", "2/3", official_quirks=True)
    assert ask(model) == ask(model, 4)
    for document, answer in zip(documents(), model.answers, strict=True):
        tokens = scopes(family, model, document)
        if family == "qwen2_vl":  # int() of the first image, and all of the others
            expected = sum(n if i else int(n / 3) for i, n in enumerate(tokens))
        else:
            expected = sum(keep_count(n, "2/3") for n in tokens)
        assert answer.record.n_asked == expected


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
def test_weights_that_are_tied_are_not_taken_for_missing_ones(family: str, tmp_path: Path) -> None:
    """Small checkpoints of most families hold no output matrix: it is the table of embeddings."""
    original = loaded(family).model
    config = type(original.config).from_dict(original.config.to_dict())
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    tied = type(original)._from_config(config)
    tied.load_state_dict({name: value for name, value in original.state_dict().items() if "lm_head" not in name}, strict=False)
    shutil.copytree(checkpoint(family), tmp_path, dirs_exist_ok=True)
    tied.save_pretrained(tmp_path)
    model = load(f"vlmpruner_{family}", pretrained=str(tmp_path))
    assert model.config.get_text_config().tie_word_embeddings
    assert torch.equal(model.model.lm_head.weight, original.get_input_embeddings().weight)


# ---- refusals


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"], indirect=True)
def test_a_hook_that_keeps_everything_is_caught_with_several_images(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lmms_model.prune
    monkeypatch.setattr(lmms_model, "prune", lambda hooked, pruner, **names: real(hooked, Uniform(pruning_rate=0), **names))
    model.configure("uniform", "8/9")
    assert texts(model, [request("first", TWO_IMAGES)]) == [""]
    assert "visual tokens were asked for, expected " in model.answers[0].error
    assert "at rate 8/9 (images or tiles: " in model.answers[0].error


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"], indirect=True)
@pytest.mark.parametrize("kind", ["video", "audio"])
def test_other_media_are_a_sentence(model: PrunedModel, kind: str) -> None:
    def with_media(document: dict) -> list[dict]:
        return [{"role": "user", "content": [{"type": kind, "url": "clip"}, {"type": "text", "text": "?"}]}]

    assert texts(model, [request("first", 0, messages=with_media)]) == [""]
    if kind in model.family.spec.media:
        assert "video clip: there is no such file" in model.answers[0].error
    else:
        assert f"holds 1 {kind} input(s), expected {' and '.join(model.family.spec.media)} only" in model.answers[0].error


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"], indirect=True)
def test_a_placeholder_in_a_question_is_a_sentence(model: PrunedModel) -> None:
    token = model.processor.image_token

    def with_placeholder(document: dict) -> list[dict]:
        (chat,) = to_messages(document)
        return [chat | {"content": [*chat["content"], {"type": "text", "text": f"Is {token} a word?"}]}]

    assert texts(model, [request("first", 0, messages=with_placeholder)]) == [""]
    n_images = len(model.task_dict["first"]["test"][0]["images"])
    assert f"got {n_images + 1} placeholders {token} for {n_images} image(s)" in model.answers[0].error


@pytest.mark.parametrize("family", ["llava_video", "qwen2_vl"], indirect=True)
def test_another_familys_checkpoint_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=rf"is a 'internvl' checkpoint, expected {family} for --model vlmpruner_{family}; choose"):
        load(f"vlmpruner_{family}", pretrained=checkpoint("internvl"))


class Bare(Family):
    """A family whose author forgot the pictures."""

    spec = FamilySpec("vlmpruner_bare", frozenset({"bare"}), "llava_hf")

    def layouts(self, core: object, kind: str, call: object) -> list:
        return []


def test_a_family_without_geometry_is_refused_before_a_checkpoint_is_looked_for() -> None:
    bare = type("VlmPrunerBare", (PrunedModel,), {"family": Bare(), "model_id": "vlmpruner_bare"})
    with pytest.raises(ConfigError, match=r"vlmpruner_bare has no geometry and no pictures, expected these methods of Bare in"):
        bare(pretrained="/nowhere")


def test_a_model_is_described_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> dict:
        raise ConfigError("geometry: not here")

    monkeypatch.setattr(InternVL, "geometry", broken)
    with pytest.raises(ConfigError, match="geometry: not here"):
        load("vlmpruner_internvl", pretrained=checkpoint("internvl"))
