"""Bad input of the lmms-eval wrapper: each a sentence, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import write_tiny_llama, write_tiny_llava

from vlm_pruner_eval import ConfigError
from vlm_pruner_eval.lmms import load, prompts, settings
from vlm_pruner_eval.lmms.checkpoint import load_checkpoint, locate
from vlm_pruner_eval.lmms.families import VlmPrunerLlava

NAN = float("nan")


# what can be written in --model_args is in bad_model_args.py; here is what only Python can say, and the closest match
@pytest.mark.parametrize(
    ("model_args", "sentences"),
    [
        ({"pretrained": "x", "metod": "fastv"}, ["metod: unknown argument; did you mean 'method'?"]),
        ({"pretrained": "x", "method": "vlmprunner", "pruning_rate": 0.5}, ["'vlmprunner', which is unknown; did you mean 'vlmpruner'?"]),
        ({"pretrained": "x", "dtype": "float15"}, ["dtype: got 'float15'; did you mean 'float16'?"]),
        ({"pretrained": "x", "dtype": NAN}, ["dtype: got nan (float), expected text"]),
        ({"pretrained": "x", "batch_size": None}, ["batch_size: got None, expected a whole number, 1 or more"]),
        ({"pretrained": "x", "min_pixels": 1.5}, ["min_pixels: got 1.5, expected a whole number, 1 or more."]),
        ({"pretrained": "x", "max_pixels": -1}, ["max_pixels: got -1, expected a whole number, 1 or more."]),
        ({"pretrained": "x", "workers": -1}, ["workers: got -1, expected a whole number, from 0 to 64."]),
        ({"pretrained": "x", "workers": 65}, ["workers: got 65, expected a whole number, from 0 to 64."]),
        # all of them at once
        (
            {"dtype": "f", "batch_size": -1, "method": "fastv", "pruning_rate": 2},
            ["pretrained: missing", "dtype: got", "batch_size: got", "pruning_rate: got 2"],
        ),
    ],
)
def test_each_problem_is_a_sentence(model_args: dict, sentences: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        settings.parse(model_args)
    for sentence in sentences:
        assert sentence in str(error.value)
    assert len(error.value.problems) == len(sentences)


def test_good_arguments_are_parsed() -> None:
    parsed, method, pruner = settings.parse({"pretrained": "x", "method": "dart", "pruning_rate": "8/9", "layer": 3, "batch_size": "8"})
    assert (parsed.batch_size, parsed.dtype, parsed.protocol, method) == (8, "auto", "hf", "dart")
    assert (pruner.pruning_rate, pruner.layer) == ("8/9", 3)
    sizes = {"max_frames_num": "16", "min_pixels": 784, "max_pixels": 784, "allow_bin": True}
    parsed = settings.parse({"pretrained": "x", **sizes})[0]
    assert (parsed.max_frames_num, parsed.min_pixels, parsed.max_pixels, parsed.allow_bin) == (16, 784, 784, True)
    assert [settings.parse({"pretrained": "x", "workers": n})[0].workers for n in (0, "0", 3, None)] == [0, 0, 3, None]
    parsed = settings.parse({"pretrained": "x", "max_frames_num": None})[0]
    assert (parsed.max_frames_num, parsed.min_pixels, parsed.max_pixels, parsed.allow_bin) == (None, None, None, False)
    assert settings.parse({"pretrained": "x"})[1] == "none"
    assert settings.parse({"pretrained": "x", "method": "blind"})[2].name == "blind"
    assert settings.parse({"pretrained": "x", "method": "none", "pruning_rate": 0})[2].name == "none"


@pytest.mark.parametrize(
    ("arg_string", "additional", "expected"),
    [
        ("pretrained=a,batch_size=8", {"batch_size": 1, "device": None, "max_batch_size": None}, {"pretrained": "a", "batch_size": 8}),
        ("pretrained=a", {"batch_size": "4", "device": "cpu"}, {"pretrained": "a", "batch_size": "4", "device": "cpu"}),
        ("pretrained=a,batch_size=8", {"batch_size": "8"}, {"pretrained": "a", "batch_size": 8}),
        ({"pretrained": "a", "pruning_rate": "8/9"}, None, {"pretrained": "a", "pruning_rate": "8/9"}),
        ("", {}, {}),
    ],
)
def test_command_line_arguments_are_joined(arg_string: object, additional: dict | None, expected: dict) -> None:
    assert settings.from_command_line(arg_string, additional) == expected


@pytest.mark.parametrize(
    ("arg_string", "additional", "sentence"),
    [
        ("pretrained=a,batch_size=8", {"batch_size": "4"}, "batch_size: got 8 in model_args and '4' beside it"),
        ("pretrained=a,device=cpu", {"device": "cuda"}, "device: got 'cpu' in model_args and 'cuda' beside it"),
        ("pretrained=a", {"max_batch_size": 64}, "max_batch_size: unknown argument"),
    ],
)
def test_bad_command_line_arguments_are_config_errors(arg_string: str, additional: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        VlmPrunerLlava.create_from_arg_string(arg_string, additional)
    assert sentence in str(refused.value)


def test_lmms_eval_builds_a_model_that_refuses_failures(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path)
    model = VlmPrunerLlava.create_from_arg_string(
        f"pretrained={folder},method=random,pruning_rate=0.5", {"batch_size": "2", "device": "cpu"}
    )
    assert (model.context.refuses_failures, model.batch_size, model.device, model.rank, model.world_size) == (
        True,
        2,
        torch.device("cpu"),
        0,
        1,
    )
    assert load("vlmpruner_llava", pretrained=str(folder)).context.refuses_failures is False


# ---- settings that not every family has
QWEN = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe")
VIDEO_TAKERS = ("internvl", "llava_onevision", "llava_video", *QWEN)


@pytest.mark.parametrize(
    ("model_id", "given", "takers"),
    [
        ("vlmpruner_llava", {"max_frames_num": 8}, VIDEO_TAKERS),
        ("vlmpruner_llava_next", {"max_frames_num": 8}, VIDEO_TAKERS),
        ("vlmpruner_internvl", {"min_pixels": 8}, QWEN),
        ("vlmpruner_llava_video", {"max_pixels": 8}, QWEN),
    ],
)
def test_a_setting_of_other_families_is_refused_with_their_names(model_id: str, given: dict, takers: tuple[str, ...]) -> None:
    ((name, value),) = given.items()
    with pytest.raises(ConfigError) as error:
        load(model_id, pretrained="x", **given)
    names = ", ".join(f"vlmpruner_{taker}" for taker in takers)
    assert str(error.value) == f"{name}: got {value}, expected none for {model_id}, which has no such setting; {names} have it."


def test_all_settings_that_a_family_lacks_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        load("vlmpruner_llava", pretrained="x", max_frames_num=8, min_pixels=8, max_pixels=9)
    assert [problem.split(":")[0] for problem in error.value.problems] == ["max_frames_num", "max_pixels", "min_pixels"]


# ---- checkpoints


def test_an_unknown_id_names_the_closest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'vlmpruner_llava'"):
        load("vlmpruner_lava", pretrained="x")


def test_minivlm_is_the_embedded_checkpoint() -> None:
    assert json.loads(Path(locate("minivlm"), "config.json").read_text())["model_type"] == "llava"


def test_another_kind_of_checkpoint_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"is a 'llama' checkpoint, expected llava for --model vlmpruner_llava"):
        load("vlmpruner_llava", pretrained=str(folder))


def test_a_checkpoint_without_chat_template_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        load("vlmpruner_llava", pretrained=str(folder))


def test_a_tokenizer_without_pad_token_pads_with_its_end_token(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    parsed, *_ = settings.parse({"pretrained": str(folder)})
    processor = load_checkpoint(parsed, torch.device("cpu"), {"llava"}, "vlmpruner_llava").processor
    assert (processor.tokenizer.pad_token, processor.tokenizer.padding_side) == ("</s>", "left")


@pytest.mark.parametrize(("device", "sentence"), [("gpu", "expected cpu, cuda or cuda:0"), ("cuda", "torch sees no GPU here")])
def test_a_device_that_is_not_there_is_a_sentence(device: str, sentence: str, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=sentence):
        load("vlmpruner_llava", pretrained=str(tmp_path), device=device)


def test_a_system_turn_is_put_before_chats_that_have_none() -> None:
    asked = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    told = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *asked]
    assert prompts._with_system(asked, "Be brief.") == told
    assert prompts._with_system(told, "Be kind.") == told
    assert prompts._with_system(asked, None) == asked
