"""Several methods answered together: their answers, records and failures are those of separate runs, and only the times are missing."""

from __future__ import annotations

import functools
import gc
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import test_lmms_families
import test_lmms_video_runs
import tiny_models
import torch
from lmms_eval.models.model_utils import gen_metrics
from lmms_requests import GREEDY, documents, fresh_model, request, set_batch_size, tiny_llava
from test_hook_batches import REFUSED
from thinning import only
from tiny_checkpoints import PROCESSORS, checkpoint
from toy_pruners import PARAMETERS

from vlm_pruner_eval import ConfigError, PruningError, list_pruners
from vlm_pruner_eval.lmms import PrunedModel, load
from vlm_pruner_eval.lmms.shared_runs import Configuration, SharedRuns
from vlm_pruner_eval.prefix import SharedPrefix
from vlm_pruner_eval.store.answers import AnswerLog

FAMILIES = sorted(["llava", *PROCESSORS, "llava_video"])
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
NO_RATE = ("none", "blind")
AT_ONCE = ("divprune", "pool", "random", "uniform")  # cut at layer 0
LATER = ("fastv", "dart")
AT_TWO = ("vlmpruner", "fastv", "dart", "random", "uniform")  # cut at layer 2
OLDER = (*AT_TWO, "divprune", "pool", "downsample")  # those that `some` takes in turns
TAKEN = {"sparsevlm": ("2/3", "8/9")}  # rates, where a method does not take every one
TIMES = ("prefill_ms", "decode_ms", "peak_bytes")


def configurations(*rates: str, names: Sequence[str] = (*AT_TWO, "divprune", "pool")) -> dict[str, Configuration]:
    """Methods at every rate that they take, and those without a rate."""
    found = {name: Configuration(name, None) for name in NO_RATE}
    taken = [(name, rate) for name in names for rate in rates if rate in TAKEN.get(name, rates)]
    return found | {f"{name} {rate}": Configuration(name, rate, params_of(name)) for name, rate in taken}


def params_of(name: str) -> dict[str, object]:
    """What a method can't do without, or needs for the few layers of a tiny model."""
    return {"budget": "kept"} if name == "pdrop" else PARAMETERS.get(name, {})


def registered(family: str) -> list[str]:
    """Methods with a rate that a family takes."""
    others = (*REFUSED.get(family, ()), *(() if family in QWEN else ("downsample",)), *NO_RATE)
    return [name for name in list_pruners() if name not in others]


@functools.cache
def _loaded(family: str) -> PrunedModel:
    videos = {"max_frames_num": 6} if tiny_models.FAMILIES[family].videos else {}
    model = load(f"vlmpruner_{family}", pretrained=tiny_llava() if family == "llava" else checkpoint(family), **videos)
    model.context.keep_loaded = True
    return model


@pytest.fixture(params=only(FAMILIES, ["internvl", "llava", "llava_next", "llava_video", "qwen2_5_vl", "qwen3_vl"]))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model() -> PrunedModel:
    return fresh_model()


def answer(model: PrunedModel, key: str, chosen: Configuration, requests: list) -> tuple[list, list[dict]]:
    """Results and records of one run, as a sweep makes it."""
    model.configure(chosen.method, chosen.pruning_rate, **chosen.params)
    results = model.generate_until(requests)
    return results, [found.as_json() for found in model.answers]


def separately(model: PrunedModel, chosen: Mapping[str, Configuration], requests: list) -> dict[str, tuple[list, list[dict]]]:
    assert model.context.source is None
    return {key: answer(model, key, one, requests) for key, one in chosen.items()}


@contextmanager
def shared(model: PrunedModel, chosen: Mapping[str, Configuration]) -> Iterator[SharedRuns]:
    """Shared runs with logs in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        logs = {key: stack.enter_context(AnswerLog(Path(folder) / str(i), {"unit": key})) for i, key in enumerate(chosen)}
        stack.callback(setattr, model.context, "source", None)
        yield SharedRuns(model, chosen, logs)


def together(model: PrunedModel, chosen: Mapping[str, Configuration], requests: list) -> dict[str, tuple[list, list[dict]]]:
    found = {}
    with shared(model, chosen) as runs:
        for key, one in chosen.items():
            model.context.source = runs.source(key)
            found[key] = answer(model, key, one, requests)
    return found


def timeless(samples: list[dict]) -> list[dict]:
    """Samples without times, whatever these are."""
    return [
        {name: value for name, value in sample.items() if name not in (*TIMES, "batch_size")}  # rows of several runs may be one batch
        | {"record": {name: value for name, value in sample.get("record", {}).items() if name != "selection_ms"}}
        for sample in samples
    ]


def assert_same(found: dict[str, tuple[list, list[dict]]], expected: dict[str, tuple[list, list[dict]]]) -> None:
    assert list(found) == list(expected)
    for key, (results, samples) in found.items():
        assert results == expected[key][0], key
        assert timeless(samples) == timeless(expected[key][1]), key
        assert not any(name in sample for sample in samples for name in TIMES)
        assert all("record" not in sample or sample["record"]["selection_ms"] is None for sample in samples)


def some(family: str, *rates: str) -> dict[str, Configuration]:
    """VLM-Pruner, a method that cuts at layer 0 and one that cuts later, which take turns, at a rate that does; and those without one."""
    turn = FAMILIES.index(family)
    methods = ("vlmpruner", AT_ONCE[turn % len(AT_ONCE)], LATER[turn % len(LATER)], *(["downsample"] if family in QWEN else []))
    rate = rates[turn // 2 % len(rates)]
    return {name: Configuration(name, None) for name in NO_RATE} | {name: Configuration(name, rate) for name in methods}


# ---- answers and records
@pytest.mark.parametrize(
    ("is_all", "batch_size"), [(False, 4), *(pytest.param(True, size, marks=pytest.mark.slow) for size in (1, 4))], ids=str
)
def test_all_methods_answer_as_in_runs_of_their_own(family: str, is_all: bool, batch_size: int) -> None:
    model = _loaded(family)
    model.task_dict = {"first": {"test": test_lmms_families.documents()}}
    set_batch_size(model, batch_size)
    requests = [request("first", i) for i in range(len(test_lmms_families.SIZES))]
    if is_all:
        chosen = configurations("1/3", "8/9", names=registered(family))
    else:
        chosen = some(family, "1/3", "8/9")
        if family == "llava_next":
            chosen |= configurations("2/3", names=[name for name in registered(family) if name not in OLDER])
    expected = separately(model, chosen, requests)
    assert len({str(results) for results, _ in expected.values()}) > 2, "methods that all answer the same would prove nothing"
    assert_same(together(model, chosen, requests), expected)


@pytest.mark.parametrize("is_all", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", only(test_lmms_video_runs.FAMILIES, ["internvl", "llava_video", "qwen3_vl"]), indirect=True)
def test_videos(family: str, is_all: bool) -> None:
    model = _loaded(family)
    model.task_dict = {"clips": {"test": test_lmms_video_runs.documents()}}
    set_batch_size(model, 4)
    requests = [test_lmms_video_runs.asked(i) for i in range(len(test_lmms_video_runs.LENGTHS))]
    few = {name: one for name, one in some(family, "2/3").items() if name not in ("blind", "downsample", *AT_ONCE)}
    chosen = configurations("2/3", names=[name for name in registered(family) if name != "downsample"]) if is_all else few
    assert_same(together(model, chosen, requests), separately(model, chosen, requests))


def test_beams_and_groups_of_options(model: PrunedModel) -> None:
    requests = [request("first", i, options=GREEDY | ({"num_beams": 2} if i % 2 else {"until": ["?"]})) for i in range(7)]
    chosen = configurations("1/2", names=("vlmpruner", "fastv", "divprune"))
    assert_same(together(model, chosen, requests), separately(model, chosen, requests))


def test_pixels_are_read_once_and_the_tower_sees_them_once(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request("first", i) for i in range(7)]
    chosen = configurations("1/2", "3/4")
    calls = {"prompts": 0, "inputs": 0, "tower": 0}

    def counted(name: str, owner: object, method: str) -> None:
        original = getattr(owner, method)

        def wrapper(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, wrapper)

    counted("prompts", model.prompts, "render")
    counted("inputs", model, "_inputs")
    counted("tower", model.model.model.vision_tower, "forward")
    together(model, chosen, requests)
    assert calls == {"prompts": 7, "inputs": 2, "tower": 2}


def test_one_batch_is_kept_at_a_time(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref] = []
    keep = SharedPrefix._keep

    def noted(self: SharedPrefix, depth: int, output: torch.Tensor, cache: object) -> None:
        gc.collect()
        assert all(ref() is None for ref in held), "the prefix of the batch before is still there"
        keep(self, depth, output, cache)
        kept = self._kept[depth]
        seen.extend(weakref.ref(tensor) for tensor in (kept.states, *kept.cached[0]))

    def entered(self: SharedPrefix) -> SharedPrefix:
        held.extend(seen)
        seen.clear()
        return enter(self)

    seen: list[weakref.ref] = []
    enter = SharedPrefix.__enter__
    monkeypatch.setattr(SharedPrefix, "_keep", noted)
    monkeypatch.setattr(SharedPrefix, "__enter__", entered)
    set_batch_size(model, 2)
    together(model, {name: Configuration(name, "1/2") for name in ("fastv", "dart")}, [request("first", i) for i in range(7)])
    assert len(held) == 3 * 3, "of all batches but the last"
    gc.collect()
    assert [ref() for ref in (*held, *seen)] == [None] * 12


def test_throughput_has_counts_but_no_times(model: PrunedModel) -> None:
    gen_metrics.reset_logged_metrics()
    together(model, {"a": Configuration("fastv", "1/2"), "b": Configuration("uniform", "1/2")}, [request("first", i) for i in range(4)])
    summary = gen_metrics.summarize_logged_metrics()
    assert summary["avg_kept_tokens"] == 8
    assert "avg_prefill_ms" not in summary


# ---- rows of one batch
def calls_of(model: PrunedModel, monkeypatch: pytest.MonkeyPatch, most: int = 1000) -> list[int]:
    """Rows of each call of `generate` from now on; more than `most` do not fit into the memory."""
    generate, rows = model.model.generate, []

    def counted(**kwargs: object) -> object:
        rows.append(len(kwargs["input_ids"]))
        if rows[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(**kwargs)

    monkeypatch.setattr(model.model, "generate", counted)
    return rows


def test_methods_of_a_layer_decode_together(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    set_batch_size(model, 2)
    chosen = configurations("1/2", "3/4")
    rows = calls_of(model, monkeypatch)
    found = together(model, chosen, [request("first", i) for i in range(2)])
    # the unpruned run alone; at layer 0 pool, and by contiguous positions DivPrune and the blind run; ten that cut at layer 2
    assert sorted(rows) == [2, 4, 6, 20]
    assert {sample["batch_size"] for sample in found["fastv 1/2"][1]} == {20}


@pytest.mark.parametrize("most", only([1, 6, 10], [1, 6]))
def test_the_number_of_rows_is_bounded(model: PrunedModel, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    set_batch_size(model, 2)
    chosen = configurations("1/2", "3/4", names=("fastv", "uniform", "dart"))
    requests = [request("first", i) for i in range(4)]
    expected = separately(model, chosen, requests)
    rows, found = calls_of(model, monkeypatch), {}
    with shared(model, chosen) as runs:
        runs.rows = most
        for key, one in chosen.items():
            model.context.source = runs.source(key)
            found[key] = answer(model, key, one, requests)
    assert max(rows) == max(2, most)
    assert_same(found, expected)


def test_a_group_that_does_not_fit_into_the_memory_is_halved_for_good(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    set_batch_size(model, 2)
    chosen = configurations("1/2", "3/4", names=AT_TWO)
    requests = [request("first", i) for i in range(6)]
    expected = separately(model, chosen, requests)
    rows = calls_of(model, monkeypatch, most=8)
    assert_same(together(model, chosen, requests), expected)
    assert [n for n in rows if n > 8] == [20, 10, 10], "what did not fit once is not tried again with the next batch"


def test_a_failed_method_of_a_group_leaves_the_others_in_the_batch(model: PrunedModel) -> None:
    requests = [request("first", i) for i in range(5)]
    chosen = configurations("1/2", names=("fastv", "uniform", "divprune")) | {
        "sabotage": Configuration("toy_pruners:Sabotage", "1/2", {"on": "first/test/2"})
    }
    found = together(model, chosen, requests)
    assert_same(found, separately(model, chosen, requests))
    assert [key for key, (_, samples) in found.items() if any(sample.get("error") for sample in samples)] == ["sabotage"]


# ---- what is not shared
def test_sampled_answers_are_drawn_by_every_run_itself(model: PrunedModel) -> None:
    requests = [request("first", i, options=GREEDY | ({"temperature": 5.0, "do_sample": True} if i == 3 else {})) for i in range(5)]
    chosen = {name: Configuration(name, "1/2") for name in ("fastv", "uniform")}
    torch.manual_seed(3)
    expected = separately(model, {"fastv": chosen["fastv"]}, requests)
    found = {}
    with shared(model, chosen) as runs:
        for key, one in chosen.items():
            model.context.source = runs.source(key)
            torch.manual_seed(3)
            found[key] = answer(model, key, one, requests)
    assert found["fastv"][0] == expected["fastv"][0]
    for _, samples in found.values():
        assert ["prefill_ms" in sample for sample in samples] == [i == 3 for i in range(5)]


def test_other_requests_than_the_first_runs_are_refused(model: PrunedModel) -> None:
    chosen = {name: Configuration(name, "1/2") for name in ("fastv", "uniform")}
    requests = [request("first", i) for i in range(4)]
    with shared(model, chosen) as runs:
        model.context.source = runs.source("fastv")
        answer(model, "fastv", chosen["fastv"], requests)
        for other in (requests[:3], requests[::-1], [*requests[:3], request("first", 3, options=GREEDY | {"max_new_tokens": 4})]):
            model.context.source = runs.source("uniform")
            with pytest.raises(PruningError, match=r"run 'uniform' got . requests that are not those which were answered for all"):
                answer(model, "uniform", chosen["uniform"], other)


# ---- failures
@pytest.fixture
def failing() -> dict[str, Configuration]:
    sabotage = Configuration("toy_pruners:Sabotage", "1/2", {"on": "first/test/2"})
    return {"none": Configuration("none", None), "sabotage": sabotage, "fastv": Configuration("fastv", "1/2")}


def test_a_method_that_fails_on_a_sample_harms_no_other(model: PrunedModel, failing: dict[str, Configuration]) -> None:
    requests = [request("first", i) for i in range(7)]
    expected = separately(model, failing, requests)
    found = together(model, failing, requests)
    assert_same(found, expected)
    errors = {key: [i for i, sample in enumerate(samples) if sample.get("error")] for key, (_, samples) in found.items()}
    assert errors == {"none": [], "sabotage": [2], "fastv": []}
    assert "distinct" in found["sabotage"][1][2]["error"]


def test_a_method_that_always_fails_ends_its_own_run_only(model: PrunedModel) -> None:
    model.task_dict["first"]["test"] = documents(24, seed=0)
    requests = [request("first", i) for i in range(24)]
    chosen = {"sabotage": Configuration("toy_pruners:Sabotage", "1/2", {"on": "first"}), "fastv": Configuration("fastv", "1/2")}
    expected = separately(model, {"fastv": chosen["fastv"]}, requests)
    with shared(model, chosen) as runs:
        model.context.source = runs.source("sabotage")
        with pytest.raises(PruningError, match="16 of 16 samples failed"):
            answer(model, "sabotage", chosen["sabotage"], requests)
        assert len(model.answers) == 16
        model.context.source = runs.source("fastv")
        assert_same({"fastv": answer(model, "fastv", chosen["fastv"], requests)}, expected)


def test_a_document_that_can_not_be_read_fails_in_every_run(model: PrunedModel, failing: dict[str, Configuration]) -> None:
    def broken(document: dict) -> list[dict]:
        raise OSError("the image file is truncated")

    requests = [request("first", 0), request("first", 3, messages=broken), request("first", 1)]
    expected = separately(model, failing, requests)
    found = together(model, failing, requests)
    assert_same(found, expected)
    (error,) = {samples[1]["error"] for _, samples in found.values()}
    assert error.startswith("ValueError: first/test/3: a picture of this document can't be read whole (the image file is truncated)")


def test_a_batch_that_can_not_be_prepared_costs_the_broken_sample_only(model: PrunedModel, failing: dict[str, Configuration]) -> None:
    model.task_dict["first"]["test"][1]["question"] = "long " * 60
    requests = [request("first", i) for i in (0, 1, 3)]
    expected = separately(model, failing, requests)
    found = together(model, failing, requests)
    assert_same(found, expected)
    assert all("the model has 256 positions" in samples[1]["error"] for _, samples in found.values())


def test_a_rate_that_removes_nothing_is_refused_for_its_run(model: PrunedModel) -> None:
    chosen = {"fastv": Configuration("fastv", "1/2"), "nothing": Configuration("uniform", 0.01)}
    requests = [request("first", i) for i in range(3)]
    with shared(model, chosen) as runs:
        model.context.source = runs.source("fastv")
        answer(model, "fastv", chosen["fastv"], requests)
        model.context.source = runs.source("nothing")
        with pytest.raises(PruningError, match="none of the 3 samples with images lost a visual token"):
            answer(model, "nothing", chosen["nothing"], requests)


def test_an_interrupt_passes_and_leaves_nothing(model: PrunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {name: Configuration(name, "1/2") for name in ("fastv", "uniform")}
    expected = separately(model, chosen, [request("first", 0)])
    before = set(model.model.model.__dict__)

    def interrupted(*args: object, **kwargs: object) -> Iterator[None]:
        raise KeyboardInterrupt

    with shared(model, chosen) as runs:
        model.context.source = runs.source("fastv")
        with monkeypatch.context() as patch:
            patch.setattr(model.model, "generate", interrupted)
            with pytest.raises(KeyboardInterrupt):
                answer(model, "fastv", chosen["fastv"], [request("first", 0)])
        assert set(model.model.model.__dict__) == before
        assert_same({"fastv": answer(model, "fastv", chosen["fastv"], [request("first", 0)])}, {"fastv": expected["fastv"]})
    assert model.context.source is None
    assert separately(model, chosen, [request("first", 0)])["uniform"][0] == expected["uniform"][0]


def test_unknown_methods_and_wrong_rates_are_refused_at_once(model: PrunedModel) -> None:
    with pytest.raises(ConfigError, match="did you mean 'fastv'"):
        SharedRuns(model, {"a": Configuration("fastw", "1/2")}, {})
