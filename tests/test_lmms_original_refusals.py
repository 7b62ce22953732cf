"""Original checkpoints on disk: where tokens and tensors come from, and what is refused in a sentence."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from original_checkpoints import (
    copy_of,
    edit_config,
    llava_parts,
    llava_video_parts,
    loaded,
    parts_of,
    published,
    tensors_of,
    write_original,
    write_tensors,
)
from tiny_checkpoints import write_tiny_llava
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from vlm_pruner_eval import ConfigError
from vlm_pruner_eval.lmms.original_format.conversion import is_original

# ---- tokenizers


def sentencepiece_model() -> bytes:
    """A SentencePiece model as LLaVA-1.5's, whose spaces belong to the words behind them."""
    sentencepiece, runtime = pytest.importorskip("sentencepiece"), pytest.importorskip("google.protobuf.runtime_version")
    try:
        from sentencepiece import sentencepiece_model_pb2  # noqa: F401
    except (ImportError, runtime.VersionError) as error:
        pytest.skip(f"sentencepiece and protobuf do not go together here: {error}")
    corpus, model = ["A chat. USER: What is in it? ASSISTANT: a cat\nAnswer the question."] * 20, io.BytesIO()
    special = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "byte_fallback": True}
    kept = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, vocab_size=320, model_type="bpe", minloglevel=2, **special, **kept
    )
    return model.getvalue()


def test_a_tokenizer_model_is_read_and_splits_like_the_original(tmp_path: Path) -> None:
    folder, content = copy_of("llava", tmp_path), sentencepiece_model()
    for path in (*folder.glob("tokenizer*"), *folder.glob("special_tokens*")):
        path.unlink()
    (folder / "tokenizer.model").write_bytes(content)
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False, "pad_token": None}
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | words))
    (folder / "special_tokens_map.json").write_text(json.dumps(words | {"pad_token": "<unk>"}))
    parts = llava_parts()[0]
    n_words = 320
    larger = transformers.LlamaForCausalLM(transformers.LlamaConfig(**parts.language.config.to_dict() | {"vocab_size": n_words}))
    resized = tensors_of(parts, with_tower=True) | {
        name: larger.state_dict()[name] for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    write_tensors(folder, resized)
    edit_config(folder, vocab_size=n_words)
    tokenizer = loaded(folder, "llava").processor.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("USER: <image>\nWhat").input_ids)
    at = tokens.index("<image>")
    assert tokens[0] == "<s>"
    assert tokens[at + 1 : at + 3] in (["▁", "\n"], ["▁", "<0x0A>"]), "a piece behind an image begins as a text does"


def test_a_tokenizer_that_splits_unlike_the_original_is_refused(tmp_path: Path) -> None:
    """Spaces belong to the words behind them, but only the first piece of a prompt is given one to begin with."""
    folder = copy_of("llava", tmp_path)
    letters = ["<unk>", "<s>", "</s>", *map(chr, range(33, 127)), "\n", "▁"]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(letters)}, [], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"splits the text behind an image unlike LLaVA.*remove tokenizer\.json"):
        loaded(folder, "llava")


# ---- where weights come from


def test_the_tower_may_be_outside(tmp_path: Path) -> None:
    outside = loaded(write_original(tmp_path, *parts_of("llava_video"), with_tower=False), "llava_video")
    ours, theirs = outside.model.state_dict(), loaded(published("llava_video"), "llava_video").model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_dtype_is_that_asked_for() -> None:
    model = loaded(published("llava_video"), "llava_video", dtype="bfloat16").model
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_tied_tables_are_one(tmp_path: Path) -> None:
    parts, siglip = llava_video_parts(tie_word_embeddings=True)
    model = loaded(write_original(tmp_path, parts, siglip), "llava_video").model
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_one_file_without_index_and_tables_of_older_versions(tmp_path: Path) -> None:
    folder = copy_of("llava", tmp_path)
    for path in folder.glob("model*"):
        path.unlink()
    tables = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(26)[None],
    }
    torch.save(tensors_of(parts_of("llava")[0], with_tower=True) | tables, folder / "pytorch_model.bin")
    ours, theirs = (loaded(path, "llava", allow_bin=True).model.state_dict() for path in (folder, published("llava")))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- refusals


def test_hugging_faces_own_checkpoints_are_not_taken_for_originals(tmp_path: Path) -> None:
    assert not is_original(json.loads((write_tiny_llava(tmp_path) / "config.json").read_text()))
    for model_type in ("llava", "llava_video"):
        assert is_original(json.loads((published(model_type) / "config.json").read_text()))


def test_another_familys_original_is_refused() -> None:
    with pytest.raises(ConfigError, match="is a 'llava_video' checkpoint, expected llava for --model vlmpruner_llava;"):
        loaded(published("llava_video"), "llava")


@pytest.mark.parametrize(
    ("model_type", "changed", "message"),
    [
        ("llava", {"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type: got 'mlp3x_gelu' in config.json, expected 'mlp2x_gelu'"),
        ("llava", {"mm_projector_type": None}, "mm_projector_type: got None"),
        ("llava", {"image_aspect_ratio": "anyres"}, "image_aspect_ratio: got 'anyres' in config.json, expected 'square' or 'pad'"),
        ("llava", {"architectures": ["LlavaMptForCausalLM"]}, "architecture LlavaMptForCausalLM, expected LlavaLlamaForCausalLM or"),
        ("llava_video", {"mm_newline_position": "one_token"}, "mm_newline_position: got 'one_token' in config.json, expected 'grid'"),
        ("llava_video", {"mm_newline_position": None}, "mm_newline_position: got None"),
        ("llava_video", {"mm_spatial_pool_mode": "max"}, "mm_spatial_pool_mode: got 'max' in config.json, expected 'bilinear' or"),
        ("llava_video", {"image_aspect_ratio": "pad"}, "image_aspect_ratio: got 'pad' in config.json, expected anyres_max_9"),
        ("llava_video", {"vocab_size": None}, "config.json lacks vocab_size"),
    ],
)
def test_variants_that_turn_images_into_tokens_otherwise(tmp_path: Path, model_type: str, changed: dict, message: str) -> None:
    folder = copy_of(model_type, tmp_path)
    edit_config(folder, **changed)
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        loaded(folder, model_type)


def test_all_problems_of_a_configuration_are_told_at_once(tmp_path: Path) -> None:
    folder = copy_of("llava_video", tmp_path)
    edit_config(folder, mm_projector_type="linear", mm_newline_position="frame")
    with pytest.raises(ConfigError) as caught:
        loaded(folder, "llava_video")
    assert [name in str(caught.value) for name in ("mm_projector_type", "mm_newline_position")] == [True, True]


@pytest.mark.parametrize("name", ["/no/such/tower", "openai/no-such-tower-anywhere"])
def test_a_tower_that_is_not_there(tmp_path: Path, name: str) -> None:
    folder = copy_of("llava", tmp_path)
    edit_config(folder, mm_vision_tower=name)
    with pytest.raises(ConfigError, match=r"mm_vision_tower: .*Set mm_vision_tower in the checkpoint's config\.json to a folder"):
        loaded(folder, "llava")


def test_a_tower_of_another_kind(tmp_path: Path) -> None:
    folder = copy_of("llava", tmp_path)
    edit_config(folder, mm_vision_tower=str(published("llava_video").parent / "tower"))
    with pytest.raises(ConfigError, match="is a 'siglip_vision_model', expected a clip_vision_model for LlavaLlamaForCausalLM"):
        loaded(folder, "llava")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tower: (tower / "preprocessor_config.json").unlink(), "has no image processor"),
        (lambda tower: (tower / "model.safetensors").unlink(), r"tower holds no weights, expected model\.safetensors or"),
    ],
)
def test_a_tower_that_is_not_whole(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    folder = write_original(tmp_path, *llava_parts(), with_tower=False)
    spoil(tmp_path / "tower")
    with pytest.raises(ConfigError, match=message):
        loaded(folder, "llava")


@pytest.mark.parametrize("part", ["checkpoint", "tower"])
def test_pickled_weights_are_read_on_request_only(tmp_path: Path, part: str) -> None:
    parts, clip = llava_parts()
    folder = write_original(tmp_path, parts, clip, with_tower=False, as_bin=part == "checkpoint")
    if part == "tower":
        (tmp_path / "tower/model.safetensors").unlink()
        torch.save(clip.state_dict(), tmp_path / "tower/pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"has its weights as pytorch_model\.bin only.*add allow_bin=True to model_args"):
        loaded(folder, "llava")
    assert loaded(folder, "llava", allow_bin=True).model.config.model_type == "llava"


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    folder = write_original(tmp_path, *llava_parts(), as_bin=True)
    torch.save({"model.norm.weight": Path}, folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model-00001-of-00002\.bin can't be read \(Weights only load failed"):
        loaded(folder, "llava", allow_bin=True)


def test_pickled_weights_in_hugging_face_layout_are_read_on_request_only(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"weights of .* can't be read .* add allow_bin=True to model_args"):
        loaded(folder, "llava")
    again = loaded(folder, "llava", allow_bin=True).model
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda shard: shard.unlink(), r"lacks model-00002-of-00002\.safetensors of 2 weight files"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:2000]), r"model-00002-of-00002\.safetensors can't be read"),
        (lambda shard: shutil.copy(shard.with_name("model-00001-of-00002.safetensors"), shard), "holds .* twice"),
    ],
    ids=["missing", "truncated", "the wrong one"],
)
def test_shards_that_are_not_whole(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    folder = copy_of("llava_video", tmp_path)
    spoil(folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ConfigError, match=message):
        loaded(folder, "llava_video")


@pytest.mark.parametrize("content", ["", '{"weight_map": []}'])
def test_an_index_that_can_not_be_read(tmp_path: Path, content: str) -> None:
    folder = copy_of("llava", tmp_path)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match="can't be read as an index of shards"):
        loaded(folder, "llava")


def test_an_index_that_lists_more_than_a_shard_holds(tmp_path: Path) -> None:
    folder = copy_of("llava", tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"00001-of-00002\.safetensors lacks 1 tensors that the index lists"):
        loaded(folder, "llava")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x | {"model.vision_resampler.0.weight": torch.ones(2)},
            r"1 tensors that this model has no place for \(first: model\.vi",
        ),
        (lambda x: x | {"model.image_newline": torch.ones(32)}, r"no place for \(first: model\.image_newline"),
        (lambda x: x | {"model.layers.4.mlp.up_proj.weight": torch.ones(2)}, "no place for"),
        (
            lambda x: {name: weight for name, weight in x.items() if "model.layers.1.mlp" not in name},
            r"lacks 3 of the model's tensors \(first: mo",
        ),
        (lambda x: x | {"model.norm.weight": torch.ones(31)}, r"model\.norm\.weight of .* has shape \(31,\), expected \(32,\)"),
        (lambda x: x | {"lm_head.weight": torch.ones(7, 32)}, r"lm_head\.weight of .* has shape \(7, 32\), expected \(261, 32\)"),
    ],
    ids=["unknown", "LLaVA-NeXT's newline", "one layer more", "missing", "shape", "words"],
)
def test_tensors_fill_the_model_exactly_or_not_at_all(tmp_path: Path, change: Callable[[dict], dict], message: str) -> None:
    folder = copy_of("llava", tmp_path)
    write_tensors(folder, change(tensors_of(llava_parts()[0], with_tower=True)))
    with pytest.raises(ConfigError, match=message):
        loaded(folder, "llava")


def test_no_tokenizer(tmp_path: Path) -> None:
    folder = copy_of("llava", tmp_path)
    for path in (*folder.glob("tokenizer*"), *folder.glob("special_tokens*")):
        path.unlink()
    with pytest.raises(ConfigError, match=r"holds no tokenizer, expected tokenizer\.json or"):
        loaded(folder, "llava")


def test_a_tokenizer_that_can_not_be_read(tmp_path: Path) -> None:
    folder = copy_of("llava", tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"the tokenizer of .* can't be read \(.*tokenizer\.model needs the packages sentencepiece"):
        loaded(folder, "llava")
