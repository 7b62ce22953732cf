"""MiniVLM: complete, read rightly by whatever transformers is installed, and able to answer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlm_pruner_eval import embedded
from vlm_pruner_eval.embedded import measure
from vlm_pruner_eval.errors import ConfigError


@pytest.fixture(scope="module")
def loaded():
    return measure.load_minivlm()


def test_paths_are_found_without_torch_or_transformers():
    code = (
        "import sys; from vlm_pruner_eval import embedded; embedded.minivlm_path(), embedded.tasks_path(); "
        "sys.exit(bool({'torch', 'transformers', 'lmms_eval'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "__init__.py"))
    for path in (embedded.minivlm_path, embedded.tasks_path, embedded.questions_path):
        with pytest.raises(ConfigError, match=r"missing .*install vlm-pruner-eval again"):
            path()


def test_checkpoint_is_small_and_every_weight_is_read(loaded):
    assert (embedded.minivlm_path() / "model.safetensors").stat().st_size <= 15e6
    model, _ = loaded
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_842_816
    assert not model.training


def test_auto_processor_gives_576_image_tokens_with_left_padding(loaded):
    model, processor = loaded
    rows = measure.read_questions("where")[:2]
    rows[1]["question"] = "is it ?"
    inputs = measure._inputs(processor, rows, image=True)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["pixel_values"].shape == (2, 3, 336, 336)
    assert ((inputs["input_ids"] == model.config.image_token_id).sum(1) == 576).all()
    assert inputs["attention_mask"][1, 0] == 0
    assert (inputs["attention_mask"][:, -1] == 1).all()
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"][0]


def test_rotary_theta_is_a_million(loaded):
    model, _ = loaded
    frequencies = model.model.language_model.rotary_emb.inv_freq
    expected = 1e6 ** (-torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(frequencies, expected, rtol=1e-5, atol=0)
    measure.check_rope_theta(model)


def test_a_wrong_theta_is_refused():
    model = LlavaForConditionalGeneration.from_pretrained(embedded.minivlm_path())
    model.model.language_model.rotary_emb.inv_freq = 1e4 ** (-torch.arange(0, 64, 2) / 64)
    with pytest.raises(ConfigError, match=r"rotates with theta 10000, its config says 1000000"):
        measure.check_rope_theta(model)


def test_weights_that_do_not_match_are_refused(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    for file in embedded.minivlm_path().iterdir():
        if file.suffix in {".json", ".jinja"}:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(embedded.minivlm_path() / "model.safetensors")
    del weights["multi_modal_projector.linear_1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(measure, "minivlm_path", lambda: tmp_path)
    with pytest.raises(ConfigError, match=r"did not match 1 weights.*linear_1"):
        measure.load_minivlm()


def test_one_image_fits_the_positions_and_two_do_not(loaded):
    model, _ = loaded
    assert 576 < model.config.text_config.max_position_embeddings == 1024 < 2 * 576


def test_it_looks_at_the_picture(loaded):
    model, processor = loaded
    seen = measure.measure("attribute", model, processor, limit=16, batch_size=8)
    guessed = measure.measure("attribute", model, processor, limit=16, batch_size=16, image=False)
    assert seen["n"] == guessed["n"] == 16
    assert seen["accuracy"] >= 0.85
    assert guessed["accuracy"] <= 0.5
    assert seen["accuracy"] == pytest.approx(sum(seen["by_subtype"].values()) / 2)
    assert set(seen["by_subtype"]) == {"colour", "digit"}


@pytest.mark.parametrize(("task", "metric", "expected"), [("exist", "f1", 0.0), ("pairs", "both_right", 0.0)])
def test_measure_scores_as_the_tasks_do(loaded, monkeypatch, task, metric, expected):
    monkeypatch.setattr(measure, "generate_answers", lambda model, processor, rows, batch_size, image: ["no"] * len(rows))
    always_no = measure.measure(task, *loaded, limit=20, batch_size=8)
    assert (always_no["accuracy"], always_no[metric]) == (0.5, expected)
    answers = iter([row["answer"] for row in measure.read_questions(task)[:20]])
    monkeypatch.setattr(measure, "generate_answers", lambda *_: answers)
    right = measure.measure(task, *loaded, limit=20, batch_size=8)
    assert (right["accuracy"], right[metric]) == (1.0, 1.0)


def test_answers_do_not_depend_on_the_batch(loaded):
    model, processor = loaded
    rows = measure.read_questions("pairs")[:3] + measure.read_questions("read")[:3]
    together = list(measure.generate_answers(model, processor, rows, batch_size=8))
    alone = list(measure.generate_answers(model, processor, rows, batch_size=1))
    assert together == alone
    assert len(set(together)) > 3


def test_an_unknown_task_is_refused():
    with pytest.raises(ConfigError, match="got 'color', expected one of exist"):
        measure.read_questions("color")


def test_the_processor_loads_by_its_generic_name():
    assert type(AutoProcessor.from_pretrained(embedded.minivlm_path())).__name__ == "LlavaProcessor"
