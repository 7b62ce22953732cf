"""The doctor with a sweep file: checkpoints and data sets as the hub's cache, `datasets` and copying by hand leave them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lmms_eval.tasks import TaskManager
from safetensors.torch import save_file
from sweep_standin import make_config

from vlm_pruner_eval.doctor import data_sets, surroundings, sweep_file
from vlm_pruner_eval.doctor.data_sets import DataSet
from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Finding
from vlm_pruner_eval.sweep.config import SweepConfig


def only(found: Iterable[Finding], name: str) -> Finding:
    (finding,) = [finding for finding in found if finding.name == name]
    return finding


def config(*tasks: str, **model: object) -> SweepConfig:
    section = {"id": "vlmpruner_llava", "pretrained": "minivlm", "visual_tokens": 576}
    return make_config(model=section | model, tasks=list(tasks or ("digitscenes_read",)))


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Empty caches, no token, downloads allowed: what a test does not say is not taken from this machine."""
    for name in (*surroundings.OFFLINE, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LMMS_EVAL_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


# ---- model id, device, attention
def test_an_unknown_model_id() -> None:
    (finding,) = sweep_file.model_id(config(id="vlmpruner_lava"))
    assert finding.status == FAIL and "did you mean 'vlmpruner_llava'?" in finding.fix
    assert [finding.status for finding in sweep_file.model_id(config())] == [OK]


def test_a_device_and_an_attention_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [finding.status for finding in sweep_file.device(config(device="cpu"))] == [OK]
    found = list(sweep_file.device(config(device="cuda:1", attn_implementation="flash_attention_2")))
    assert only(found, "device").found == "the file asks for cuda:1, but torch sees no GPU"
    assert only(found, "attention of the file").status == FAIL
    finding = only(sweep_file.device(config(attn_implementation="spda")), "attention of the file")
    assert finding.status == FAIL and "did you mean 'sdpa'?" in finding.fix


# ---- checkpoints
def write_weights(folder: Path, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.zeros(100), "b": torch.ones(3, 4)}, folder / name, metadata={"format": "pt"})
    return folder / name


def look(pretrained: str | Path, **more: object) -> Finding:
    return only(sweep_file.checkpoint(config(pretrained=str(pretrained), **more)), "checkpoint")


def test_a_checkpoint_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    assert look(folder).status == FAIL and "holds no config.json" in look(folder).found
    (folder / "config.json").write_text("{}")
    assert look(folder).found == f"{folder} lacks weights"
    (folder / "pytorch_model.bin").write_bytes(b"0")
    assert "weights in .bin files only" in look(folder).found
    assert look(folder, allow_bin=True).status == OK
    weights = write_weights(folder)
    assert look(folder).status == OK
    whole = weights.read_bytes()
    for size in (len(whole) - 1, 12, 3):
        weights.write_bytes(whole[:size])
        assert look(folder).found == f"{folder}: not whole: model.safetensors", f"cut to {size} bytes"
    assert look("minivlm").status == OK


def test_a_checkpoint_of_which_a_part_is_missing(tmp_path: Path) -> None:
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    write_weights(tmp_path / "mine", parts[0])
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "mine" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": parts[0], "b": parts[1]}}))
    assert look(tmp_path / "mine").found == f"{tmp_path / 'mine'} lacks {parts[1]}"
    write_weights(tmp_path / "mine", parts[1])
    assert look(tmp_path / "mine").status == OK


def test_a_checkpoint_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    hub = tmp_path / "hub" / "models--some--model"
    snapshot, blob = hub / "snapshots" / "abc", hub / "blobs" / "123"
    assert look("some/model").status == WARN
    for folder in (snapshot, blob.parent, hub / "refs"):
        folder.mkdir(parents=True)
    (hub / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").symlink_to(blob)
    assert look("some/model").found == f"{snapshot} lacks weights", "the link leads nowhere: the download was interrupted"
    write_weights(tmp_path / "elsewhere").rename(blob)
    assert look("some/model").status == OK
    assert look("some/model", revision="v2").status == WARN, "another revision was asked for"


def test_a_checkpoint_that_has_to_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look("llava-hf/llava-1.5-7b-hf").status == WARN
    assert "; about 14 GB by its name, " in look("llava-hf/llava-1.5-7b-hf").found
    monkeypatch.setattr(sweep_file, "free_bytes", lambda folder: 13_000_000_000)
    assert look("llava-hf/llava-1.5-7b-hf").status == FAIL
    assert look("some/model").status == WARN
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert look("some/model").found == "some/model is not in the cache, and nothing is downloaded"
    assert "HF_HUB_OFFLINE" in look("some/model").fix


@pytest.mark.parametrize("pretrained", ["./nowhere", "/nowhere/model", "no folder", "a/b/c"])
def test_what_is_neither_a_folder_nor_an_id_of_the_hub(pretrained: str) -> None:
    assert look(pretrained).status == FAIL and f"there is nothing at {pretrained}" in look(pretrained).found


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen/Qwen2-VL-7B-Instruct", 7), ("a/b-0.5b", 0.5), ("OpenGVLab/InternVL3-8B-hf", 8), ("7b/model", None), ("a/v4bits", None)],
)
def test_sizes_by_name(name: str, billions: float | None) -> None:
    assert sweep_file._size_by_name(name) == (None if billions is None else billions * 2e9)


# ---- tasks and their data sets
@pytest.fixture
def one_index(monkeypatch: pytest.MonkeyPatch, index: TaskManager) -> None:
    """The doctor gets that index instead of a new one each time."""
    monkeypatch.setattr("lmms_eval.tasks.TaskManager", lambda **arguments: index)


@pytest.mark.usefixtures("one_index")
def test_an_unknown_task() -> None:
    (finding,) = data_sets.tasks(config("poppe"))
    assert finding.status == FAIL and "did you mean" in finding.found


@pytest.mark.usefixtures("one_index")
def test_a_task_says_what_it_needs_and_what_stops_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = list(data_sets.tasks(config("pope", "digitscenes_read", "digitscenes")))
    assert only(found, "task pope").status == FAIL and "with a hub token only: lmms-lab-encoder/POPE" in only(found, "task pope").found
    assert only(found, "task digitscenes_read").status == only(found, "task digitscenes").status == OK
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdefghij")
    assert only(data_sets.tasks(config("pope")), "task pope") == Finding(
        "task pope",
        WARN,
        "not prepared: lmms-lab-encoder/POPE",
        "It is downloaded and prepared when the sweep begins; see that it fits, and that the hub can be reached.",
    )
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    finding = only(data_sets.tasks(config("pope")), "task pope")
    assert finding.status == FAIL and "and nothing is downloaded" in finding.found and "HF_DATASETS_OFFLINE" in finding.fix


class Index:
    """lmms-eval's index, of tasks that are written out."""

    def __init__(self, **task_index: dict[str, object]):
        self.task_index = task_index


def test_data_sets_of_groups_and_of_what_they_hold() -> None:
    video = {"dataset_path": "a/v", "dataset_name": "x", "dataset_kwargs": {"token": True, "video": True, "cache_dir": "v"}}
    index = Index(
        all={"task": ["one", "two", {"group": "inside", "task": ["three"]}, {"task": "one", "limit": 3}]},
        one={"task": "one", "dataset_path": "a/one"},
        two={"task": "two", **video},
        three={"task": "three", "dataset_path": "squad"},
        local={"task": "local", "dataset_path": "parquet"},
        folder={"task": "folder", "dataset_path": "/"},
        wrong={"task": ["one", "four"]},
    )
    assert list(data_sets.data_sets("all", index)) == [DataSet("a/one"), DataSet("a/v", "x", True, "v"), DataSet("squad"), DataSet("a/one")]
    assert list(data_sets.data_sets("local", index)) == list(data_sets.data_sets("folder", index)) == []
    with pytest.raises(ValueError, match="holds four, which lmms-eval does not know"):
        list(data_sets.data_sets("wrong", index))


@pytest.mark.usefixtures("one_index")
def test_pictures_that_a_task_loads_itself_are_data_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """GQA's task file names the questions; a function of it loads the pictures."""
    questions, pictures = (DataSet("lmms-lab-encoder/GQA", f"testdev_balanced_{part}", token=True) for part in ("instructions", "images"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(data_sets, "is_prepared", lambda data: data == questions)
    finding = only(data_sets.tasks(config("gqa")), "task gqa")
    assert (finding.status, finding.found) == (FAIL, f"not prepared: {pictures}, and nothing is downloaded")
    monkeypatch.setattr(data_sets, "is_prepared", lambda data: data in (questions, pictures))
    assert only(data_sets.tasks(config("gqa")), "task gqa").status == OK


def test_loads_are_found_in_functions_of_the_same_file(tmp_path: Path) -> None:
    source = """
import datasets
from datasets import load_dataset

def prompt(doc):
    return _more()

def _more():
    datasets.load_dataset("a/one", name="part", split="test", token=True)
    prompt(None)

def elsewhere(doc):
    load_dataset("a/two")
    load_dataset(doc["path"])
    load_dataset("a/three", doc["part"])

if __name__ == "__main__":
    load_dataset("a/four")
"""
    (tmp_path / "utils.py").write_text(source)
    (tmp_path / "one.yaml").write_text("task: one\ndoc_to_text: !function utils.prompt\nprocess_docs: !function utils.elsewhere\n")
    found = list(data_sets._loaded_besides(str(tmp_path / "one.yaml")))
    assert found == [DataSet("a/one", "part", token=True), DataSet("a/two")]


def prepare(cache: Path, folder: str, part: str) -> None:
    """Tables as `datasets` itself prepares them, under the name that it gives to a data set of the hub."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    cache.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"q": ["a", "b"]}), cache / "test.parquet")
    files = {"test": [str(cache / "test.parquet")]}
    builder = Parquet(cache_dir=str(cache), dataset_name="ScienceThing", config_name=part, data_files=files, hash="0" * 40)
    builder.download_and_prepare()
    own = Path(builder.cache_dir).relative_to(cache).parts[0]
    assert folder.endswith(f"___{own}"), "datasets names its folders otherwise now"
    (cache / own).rename(cache / folder)


def test_a_data_set_that_was_prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = DataSet("some-lab/ScienceThing", "ScienceThing-IMG", token=True)
    assert not data_sets.is_prepared(wanted)
    prepare(tmp_path / "datasets", "some-lab___science_thing", "ScienceThing-IMG")
    assert data_sets.is_prepared(wanted)
    assert data_sets.is_prepared(DataSet("some-lab/ScienceThing"))
    assert not data_sets.is_prepared(DataSet("some-lab/ScienceThing", "full"))
    assert not data_sets.is_prepared(DataSet("other-lab/ScienceThing"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert data_sets._data("task x", [wanted]).status == OK, "neither token nor network is needed"
    (table,) = (tmp_path / "datasets").rglob("*.arrow")
    table.parent.rename(table.parent.with_name("1.incomplete"))
    assert not data_sets.is_prepared(wanted), "the preparation was interrupted"


def test_videos_are_data_too(tmp_path: Path) -> None:
    wanted = DataSet("some-lab/ScienceThing", videos="clips")
    prepare(tmp_path / "datasets", "some-lab___science_thing", "default")
    assert not data_sets.is_prepared(wanted)
    (tmp_path / "clips").mkdir()
    assert not data_sets.is_prepared(wanted)
    (tmp_path / "clips" / "1.mp4").write_bytes(b"0")
    assert data_sets.is_prepared(wanted)
