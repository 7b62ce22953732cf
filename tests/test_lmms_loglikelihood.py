"""Scores of given continuations: equal to full forwards, to decoding step by step, and to asking one by one."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence

import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_requests import fresh_model, picture, set_batch_size, tiny_llava, to_messages
from PIL import Image
from test_lmms_failures import sabotage
from thinning import only
from tiny_checkpoints import N_IMAGE_TOKENS, PROCESSORS, checkpoint
from tiny_models import IMAGE, VIDEO, VISION_END, VISION_START
from tiny_videos import pictures
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from vlm_pruner_eval.lmms import PrunedModel, load
from vlm_pruner_eval.lmms.loglikelihood import PREFILL, Target, by_prompt, continuation_ids, score
from vlm_pruner_eval.lmms.planning import Generation
from vlm_pruner_eval.lmms.scored_tasks import TOTAL

FAMILIES = sorted(["llava", "llava_video", *PROCESSORS])
CHOICES = [" yes", " y", " no, two", " a red one on the left"]
PRUNED = [("uniform", "2/3"), ("vlmpruner", "8/9"), ("fastv", "8/9"), ("dart", "8/9"), ("divprune", "8/9"), ("blind", None)]
# every family and every method by default, not each with each
BEHIND = only(
    [(family, *one) for family in FAMILIES for one in PRUNED],
    [(family, *PRUNED[i % len(PRUNED)]) for i, family in enumerate(FAMILIES)],
)
CLOSE = 1e-4


def target(i: int, continuation: object, choice: int = 0, *, task: str = "first", messages=to_messages, **metadata: object) -> Instance:
    metadata = {"task": task, "doc_id": i, "repeats": 1, **metadata}
    return Instance("loglikelihood", ("", continuation, messages, i, task, "test"), choice, metadata=metadata)


def choices(i: int, texts: Sequence[str] = CHOICES, **kwargs: object) -> list[Instance]:
    return [target(i, text, choice, **kwargs) for choice, text in enumerate(texts)]


@functools.cache
def _loaded(family: str) -> PrunedModel:
    model = load(f"vlmpruner_{family}", pretrained=tiny_llava() if family == "llava" else checkpoint(family))
    model.context.keep_loaded = True
    images = [[picture(1)], [picture(2), picture(3)], [], []]
    questions = ["what is it?", "and these", "no image?", "what moves?"]
    model.task_dict = {"first": {"test": [{"question": q, "images": found} for q, found in zip(questions, images, strict=True)]}}
    return model


def with_video(document: dict) -> list[dict]:
    clip = [Image.fromarray(frame) for frame in pictures(4)]
    return [{"role": "user", "content": [{"type": "video", "url": clip}, {"type": "text", "text": document["question"]}]}]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny(family: str) -> PrunedModel:
    model = _loaded(family)
    model.configure("none")
    return model


@pytest.fixture
def model() -> PrunedModel:
    return fresh_model()


def scored(model: PrunedModel, requests: list[Instance]) -> list[tuple[float, bool]]:
    """What is answered; no request may fail."""
    model.answers = []
    results = model.loglikelihood(requests)
    assert [answer.error for answer in model.answers] == [None] * len(requests)
    return results


def rendered(model: PrunedModel, document: dict) -> str:
    chat = [{"role": "user", "content": [*({"type": "image"} for _ in document["images"]), {"type": "text", "text": document["question"]}]}]
    return model.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def full_forward(model: PrunedModel, document: dict, ids: list[int]) -> tuple[float, bool]:
    """Log-likelihood of `ids` behind a document's prompt, and whether it is greedy, in one forward of the unhooked model."""
    images = [document["images"]] if document["images"] else None
    inputs = model.processor(text=[rendered(model, document)], images=images, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    new, n = torch.tensor([ids]), inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(new)], 1)
    with torch.no_grad():
        logits = model.model(**inputs).logits[0, n - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, new.T).sum()), bool((logits.argmax(-1) == new[0]).all())


# ---- scores


def test_without_pruning_scores_are_those_of_a_full_forward(tiny: PrunedModel) -> None:
    texts = tiny.task_dict["first"]["test"]
    results = scored(tiny, [one for i in range(3) for one in choices(i)])
    assert len({value for value, _ in results}) == len(results)
    for answer, (value, _) in zip(tiny.answers, results, strict=True):
        document = texts[answer.doc_id]
        text = answer.answer.lstrip() if rendered(tiny, document)[-1].isspace() else answer.answer
        ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
        expected, _ = full_forward(tiny, document, ids)
        assert answer.loglikelihood == pytest.approx(expected, abs=CLOSE * len(ids))
        assert value == pytest.approx(-expected / len(ids), abs=CLOSE)
        assert (answer.n_new_tokens, answer.answer) == (len(ids), CHOICES[answer.choice])


@pytest.mark.parametrize(("family", "method", "rate"), BEHIND, indirect=["family"])
def test_behind_a_pruned_prompt_scores_are_those_of_decoding_step_by_step(tiny: PrunedModel, method: str, rate: str | None) -> None:
    never = {"suppress_tokens": [IMAGE, VIDEO, VISION_START, VISION_END], "max_new_tokens": 5, "min_new_tokens": 5}
    options = Generation(dict(PREFILL.kwargs) | never)
    tiny.configure(method, rate)
    asked = [target(0, "x"), target(1, "x"), *([target(3, "x", messages=with_video)] if "video" in tiny.family.spec.media else [])]
    for one in asked:
        prompt = tiny.prompt_of(Target.of(0, one).request)
        decoded = tiny.read(tiny.prepare([prompt]), options)
        ids = decoded.output.sequences[0, decoded.width :].tolist()
        steps = torch.cat(decoded.output.logits)  # as they were before tokens were suppressed
        expected = float(steps.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum())
        assert len(ids) == 5
        found = score(tiny.model, tiny.pruner, tiny.read(tiny.prepare([prompt]), PREFILL), [ids, ids[:2], ids])
        assert found[0].loglikelihood == pytest.approx(expected, abs=CLOSE)
        assert found[0].is_greedy == (steps.argmax(-1).tolist() == ids)
        assert found[0] == found[2], "one continuation must leave no trace for the next"
        assert found[0].loglikelihood < found[1].loglikelihood


def test_pruning_changes_scores_of_prompts_with_images_only(tiny: PrunedModel) -> None:
    requests = [one for i in range(3) for one in choices(i)]
    unpruned = scored(tiny, requests)
    tiny.configure("vlmpruner", 0)
    assert scored(tiny, requests) == unpruned
    tiny.configure("vlmpruner", "8/9")
    pruned = scored(tiny, requests)
    assert all(one != other for one, other in zip(pruned[:8], unpruned[:8], strict=True))
    assert pruned[8:] == unpruned[8:]
    assert all(answer.record.n_kept < answer.record.n_visual for answer in tiny.answers[:8])


def test_the_greedy_answer_is_greedy_and_the_likeliest(model: PrunedModel) -> None:
    for method in ("none", "uniform"):
        model.configure(method, None if method == "none" else "3/4")
        reading = model.read(model.prepare([model.prompt_of(Target.of(0, target(0, "x")).request)]), PREFILL)
        likeliest = reading.output.sequences[0, -1:].tolist()
        found = score(model.model, model.pruner, reading, [likeliest, [likeliest[0] - 1]])
        assert [one.is_greedy for one in found] == [True, False]
        assert found[0].loglikelihood > found[1].loglikelihood


# ---- one prefill a document


@pytest.mark.parametrize("method", ["none", "uniform", "divprune"])
def test_choices_share_a_prefill_and_equal_separate_ones(model: PrunedModel, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    model.configure(method, None if method == "none" else "3/4")
    requests = [one for pair in zip(*(choices(i) for i in (4, 1, 2)), strict=True) for one in pair]  # documents interleaved
    calls, generate = [], model.model.generate
    monkeypatch.setattr(model.model, "generate", lambda **inputs: calls.append(1) or generate(**inputs))
    together = scored(model, requests)
    assert len(calls) == 3
    assert [(answer.doc_id, answer.choice) for answer in model.answers] == [(one.args[3], one.idx) for one in requests]
    alone = [scored(model, [one])[0] for one in requests]
    assert len(calls) == 3 + len(requests)
    assert together == alone
    set_batch_size(model, 1)
    assert scored(model, requests) == together


def test_choices_with_prompts_of_their_own_are_read_apart(model: PrunedModel) -> None:
    def shouting(document: dict) -> list[dict]:
        return to_messages(document | {"question": document["question"].upper() + "!"})

    asked = [target(0, " yes", 0), target(0, " yes", 1, messages=shouting), target(0, " no", 2), target(0, " yes", 0, task="second")]
    assert [len(group) for group in by_prompt([Target.of(i, one) for i, one in enumerate(asked)])] == [2, 1, 1]
    results = scored(model, asked)
    assert results == [scored(model, [one])[0] for one in asked]
    assert len({results[0], results[1], results[3]}) == 3


# ---- what lmms-eval is told


def test_values_are_what_each_kind_of_task_wants(model: PrunedModel) -> None:
    text = " three words here"
    asked = [target(0, text), target(0, text, **{TOTAL: True}), target(0, lambda document: text)]
    mean, total, loglikelihood = (value for value, _ in scored(model, asked))
    assert loglikelihood == -total == model.answers[0].loglikelihood < 0
    assert mean == pytest.approx(total / len(text))
    assert [answer.answer for answer in model.answers] == [text] * 3


def test_a_continuation_may_depend_on_the_document(model: PrunedModel) -> None:
    asked = [target(i, lambda document: " " + document["question"]) for i in (0, 1)]
    scored(model, asked)
    assert [answer.answer for answer in model.answers] == [" " + document["question"] for document in model.task_dict["first"]["test"][:2]]


def test_every_request_has_a_record_of_what_was_kept(model: PrunedModel) -> None:
    scored(model, [*choices(0), *choices(3)])
    assert len(model.answers) == 8
    for answer in model.answers:
        assert (answer.record.n_visual, answer.record.n_asked, answer.record.n_kept) == (N_IMAGE_TOKENS, 8, 8)
        assert answer.record.kv_lengths == [answer.n_prompt_tokens] * 2 + [answer.n_prompt_tokens - 8] * 2
        assert answer.record.sample_id == answer.sample_id == f"first/test/{answer.doc_id}"
        assert answer.prefill_ms > 0
        assert (answer.batch_size, answer.decode_ms) == (1, None)
        plain = json.loads(json.dumps(answer.as_json()))
        assert (plain["choice"], plain["loglikelihood"], plain["is_greedy"]) == (answer.choice, answer.loglikelihood, answer.is_greedy)
    assert len({answer.prefill_ms for answer in model.answers}) == 2


def test_padding_requests_of_a_rank_are_scored_and_not_recorded(model: PrunedModel) -> None:
    results = model.loglikelihood([target(0, " yes"), target(0, " yes", __padding_only__=True)])
    assert results[0] == results[1]
    assert len(model.answers) == 1


# ---- the seam between prompt and continuation


def joining_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({"<unk>": 0, "A": 1, ":": 2, ")": 3, " ": 4, "\n": 5, ":)": 6}, [(":", ")")], unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_the_tokens_beyond_the_prompt_are_taken() -> None:
    tokenizer = joining_tokenizer()
    assert continuation_ids(tokenizer, "A:", " A") == [4, 1]
    assert continuation_ids(tokenizer, "A:", ")A") == [3, 1], "the prompt stays [A, :] though the tokenizer would join its end"
    assert continuation_ids(tokenizer, "A:\n", " A") == [1]
    assert continuation_ids(tokenizer, "A:\n", "A ") == [1, 4]
    with pytest.raises(ValueError, match="got the continuation '  ', which has no tokens"):
        continuation_ids(tokenizer, "A:\n", "  ")


# ---- failures


def test_a_failed_document_costs_no_other_and_all_its_choices(model: PrunedModel) -> None:
    requests = [one for i in range(4) for one in choices(i)]
    expected = scored(model, requests)
    sabotage(model, "first/test/2")
    results = model.loglikelihood(requests)
    assert results == [*expected[:8], *[(math.inf, False)] * 4, *expected[12:]]
    failed = model.answers[8:12]
    assert [answer.choice for answer in failed] == [0, 1, 2, 3]
    assert all(answer.error.startswith("PruningError: ") and answer.record is None for answer in failed)
    assert [answer.error for answer in model.answers if answer not in failed] == [None] * 12


def test_a_failed_sample_of_type_loglikelihood_is_infinitely_unlikely(model: PrunedModel) -> None:
    def broken(document: dict) -> str:
        raise KeyError("answer")

    assert model.loglikelihood([target(0, broken)]) == [(-math.inf, False)]
    assert model.answers[0].error == "KeyError: 'answer'"


def test_a_continuation_must_fit_behind_the_prompt(model: PrunedModel) -> None:
    n_prompt = len("USER: Q0 ASSISTANT:") + N_IMAGE_TOKENS
    n_left = 256 - n_prompt
    assert scored(model, [target(0, "x" * n_left)])
    model.answers = []
    model.loglikelihood([target(0, "x" * (n_left + 1))])
    assert "got a prompt of 257 tokens" in model.answers[0].error
    assert "the model has 256 positions" in model.answers[0].error
