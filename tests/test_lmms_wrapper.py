"""The chat wrapper on a tiny random LLaVA: order, look-ups, batches, what is recorded, loading."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from lmms_eval.models.model_utils import gen_metrics
from lmms_requests import GREEDY, documents, fresh_model, plain, request, set_batch_size, texts, tiny_llava
from tiny_checkpoints import N_IMAGE_TOKENS, write_tiny_llava

from vlm_pruner_eval import ConfigError
from vlm_pruner_eval.lmms import PrunedModel, load, planning


@pytest.fixture
def model() -> PrunedModel:
    return fresh_model()


# ---- answers


def test_method_none_answers_as_the_plain_model_in_order(model: PrunedModel) -> None:
    model.configure("none")
    asked = [("second", "test", 3), ("first", "test", 5), ("second", "val", 2), ("first", "test", 0), ("second", "test", 6)]
    expected = [plain(model, model.task_dict[task][split][i]) for task, split, i in asked]
    assert len(set(expected)) > 2, "the tiny model must answer differently to different documents"
    assert texts(model, [request(task, i, split) for task, split, i in asked]) == expected
    assert [(a.task, a.split, a.doc_id, a.answer) for a in model.answers] == [
        (*where, text) for where, text in zip(asked, expected, strict=True)
    ]
    assert all(a.record.n_kept == a.record.n_visual == N_IMAGE_TOKENS for a in model.answers)


def test_documents_of_one_batch_are_looked_up_by_their_own_task_and_split(model: PrunedModel) -> None:
    mixed = [request("first", 1), request("second", 1), request("second", 1, "val"), request("first", 2)]
    alone = [texts(model, [one])[0] for one in mixed]
    assert len(set(alone[:3])) > 1
    assert texts(model, mixed) == alone
    assert {a.batch_size for a in model.answers[-4:]} == {4}


@pytest.mark.parametrize("method", ["uniform", "random", "fastv", "blind"])
def test_batched_answers_equal_single_ones(model: PrunedModel, method: str) -> None:
    model.task_dict["first"]["test"] = [*documents(4, seed=3), *documents(2, seed=30, n_images=2), {"question": "no image", "images": []}]
    answers = {}
    for size in (1, 4):
        set_batch_size(model, size)
        model.configure(method, None if method == "blind" else "3/4")
        answers[size] = texts(model, [request("first", i) for i in range(7)])
    assert answers[1] == answers[4]
    kept = [(a.record.n_images, a.record.n_visual, a.record.n_kept) for a in model.answers]
    share = 0 if method == "blind" else N_IMAGE_TOKENS // 4
    assert kept == [(1, 16, share)] * 4 + [(2, 32, 2 * share)] * 2 + [(0, 0, 0)]


def test_pruning_changes_answers_and_configure_forgets_them(model: PrunedModel) -> None:
    requests = [request("first", i) for i in range(7)]
    model.configure("none")
    unpruned = texts(model, requests)
    model.configure("blind")
    assert model.answers == []
    assert texts(model, requests) != unpruned


def test_generation_options_are_grouped_and_never_written_to(model: PrunedModel) -> None:
    options = [{"max_new_tokens": 2, "until": ["\n"]}, {"max_new_tokens": 5, "until": "\n"}] * 2
    before = copy.deepcopy(options)
    results = model.generate_until([request("first", i, options=options[i]) for i in range(4)])
    assert options == before
    assert [result.token_counts.output_tokens for result in results] == [2, 5, 2, 5]


def test_stop_strings_end_the_answer(model: PrunedModel) -> None:
    whole = texts(model, [request("first", 0)])[0]
    stop = whole[len(whole) // 2]
    assert texts(model, [request("first", 0, options=GREEDY | {"until": ["never there", stop]})])[0] == whole[: whole.index(stop)]


def test_beams_have_a_record_per_prompt(model: PrunedModel) -> None:
    requests = [request("first", i, options=GREEDY | {"num_beams": 2}) for i in range(3)]
    together = texts(model, requests)
    assert [a.sample_id for a in model.answers] == [f"first/test/{i}" for i in range(3)] == [a.record.sample_id for a in model.answers]
    assert together == [texts(model, [one])[0] for one in requests]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 0, "do_sample": True}, {"do_sample": False}),
        ({}, {"do_sample": False, "max_new_tokens": 1024, "num_beams": 1}),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False}),
        ({"temperature": None, "do_sample": True, "top_k": 5}, {"do_sample": True, "top_k": 5}),
        ({"max_new_tokens": None}, {"do_sample": False, "max_new_tokens": 1024}),
    ],
)
def test_generation_options(options: dict, expected: dict) -> None:
    kwargs = planning.generation(options).kwargs
    assert {name: kwargs[name] for name in expected} == expected
    assert expected["do_sample"] or not {"temperature", "top_p", "top_k"} & set(kwargs)


def test_greedy_answers_warn_of_nothing_and_the_checkpoints_sampling_is_not_mixed_in(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True, "temperature": 0.3, "top_p": 0.5, "top_k": 1}))
    model = load("vlmpruner_llava", pretrained=str(folder))
    model.task_dict = {"first": {"test": documents(1, seed=0)}}
    seen: list[str] = []
    handler = logging.Handler(level=logging.WARNING)
    handler.emit = lambda record: seen.append(record.getMessage())
    logger, verbosity = transformers.logging.get_logger("transformers"), transformers.logging.get_verbosity()
    logger.addHandler(handler)
    transformers.logging.set_verbosity_warning()
    try:
        greedy = texts(model, [request("first", 0)] * 2)
        hot = {texts(model, [request("first", 0, options=GREEDY | {"temperature": 50.0, "do_sample": True})])[0] for _ in range(4)}
    finally:
        transformers.logging.set_verbosity(verbosity)
        logger.removeHandler(handler)
    assert seen == []
    assert greedy == [plain(model, model.task_dict["first"]["test"][0])] * 2
    assert len(hot) > 1, "top_k=1 of the checkpoint would make every sample greedy"


# ---- what is recorded


def test_records_say_what_was_kept_and_how_long_it_took(model: PrunedModel) -> None:
    gen_metrics.reset_logged_metrics()
    model.generate_until([request("first", i) for i in range(4)])
    for answer in model.answers:
        assert (answer.record.n_visual, answer.record.n_asked, answer.record.n_kept) == (16, 8, 8)
        assert answer.record.kv_lengths == [answer.n_prompt_tokens] * 2 + [answer.n_prompt_tokens - 8] * 2
        assert (answer.n_new_tokens, answer.batch_size, answer.error) == (5, 4, None)
        assert answer.prefill_ms > 0
        assert answer.decode_ms > 0
        assert json.loads(json.dumps(answer.as_json()))["record"]["n_kept"] == 8
    summary = gen_metrics.summarize_logged_metrics()
    assert (summary["avg_kept_tokens"], summary["avg_visual_tokens"], summary["total_gen_tokens"]) == (8, 16, 20)
    assert summary["avg_prefill_ms"] > summary["avg_selection_ms"] > 0


def test_padding_requests_of_a_rank_are_answered_and_not_recorded(model: PrunedModel) -> None:
    results = model.generate_until([request("first", 0), request("first", 0, __padding_only__=True)])
    assert results[0].text == results[1].text
    assert len(model.answers) == 1


def test_an_answer_that_ends_early_counts_its_own_tokens() -> None:
    assert planning.count_new(torch.tensor([7, 8, 2, 3, 3]), {2}) == 3
    assert planning.count_new(torch.tensor([7, 8]), {2}) == 2


def test_describe_and_repr_name_every_parameter(model: PrunedModel) -> None:
    model.configure("vlmpruner", "8/9", threshold=0.7)
    described = model.describe()
    assert (described["method"], described["dtype"], described["device"], described["protocol"]) == ("vlmpruner", "float32", "cpu", "hf")
    assert described["params"]["threshold"] == 0.7
    assert described["params"]["pruning_rate"] == "8/9"
    one = repr(model)
    model.configure("vlmpruner", "8/9", threshold=0.6)
    assert repr(model) != one
    assert json.dumps(described)


def test_clean_frees_the_weights_unless_they_are_kept() -> None:
    model = load("vlmpruner_llava", pretrained=tiny_llava())
    model.context.keep_loaded = True
    model.clean()
    assert model.model.config.model_type == "llava"
    model.context.keep_loaded = False
    model.clean()
    with pytest.raises(AttributeError):
        _ = model.model


# ---- loading and configuring


def test_the_checkpoints_own_dtype_only_where_asked() -> None:
    assert load("vlmpruner_llava", pretrained=tiny_llava()).dtype == torch.float32
    half = load(
        "vlmpruner_llava", pretrained=tiny_llava(), dtype="bfloat16", attn_implementation="eager", method="uniform", pruning_rate=0.5
    )
    assert half.model.dtype == torch.bfloat16
    assert half.config.get_text_config()._attn_implementation == "eager"
    half.task_dict = {"first": {"test": documents(2, seed=0)}}
    half.generate_until([request("first", 0), request("first", 1)])
    assert [a.record.n_kept for a in half.answers] == [8, 8]


def test_a_layer_that_the_model_lacks_is_refused_and_the_former_method_stays(model: PrunedModel) -> None:
    model.generate_until([request("first", 0)])
    with pytest.raises(ConfigError, match="layer: got 4, expected 0 to 3"):
        model.configure("uniform", 0.5, layer=4)
    with pytest.raises(ConfigError, match="pruning_rate: missing"):
        model.configure("uniform")
    assert model.method == "uniform"
    assert len(model.answers) == 1


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["num_hidden_layers"] = 5
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="lacks 9 of the model's tensors"):
        load("vlmpruner_llava", pretrained=str(folder))


def test_the_stop_string_that_lmms_eval_fills_in_is_one_for_families_whose_stock_wrapper_heeds_it() -> None:
    for until, stops in ((["\n\n"], ()), (["\n"], ("\n",)), (["\n\n", "."], ("\n\n", "."))):
        assert planning.generation({"until": until}).stops == stops
    assert planning.generation({"until": ["\n\n"]}, planning.Defaults(stops_at_blank_line=True)).stops == ("\n\n",)
    assert planning.generation({}, planning.Defaults(new_tokens=128)).kwargs["max_new_tokens"] == 128
