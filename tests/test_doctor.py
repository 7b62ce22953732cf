"""The doctor: every check is driven into what it looks for by a real cause, and nothing that is broken breaks the list."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from sweep_standin import make_config
from typer.testing import CliRunner

from vlm_pruner_eval import cli
from vlm_pruner_eval.doctor import installation, surroundings, sweep_file
from vlm_pruner_eval.doctor.examine import examine
from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Finding, findings

SECRET = "hf_ThisMustNeverBeSeenAnywhere"


def only(found: Iterable[Finding], name: str) -> Finding:
    (finding,) = [finding for finding in found if finding.name == name]
    return finding


def config(**model: object):
    section = {"id": "vlmpruner_llava", "pretrained": "minivlm", "visual_tokens": 576}
    return make_config(model=section | model, tasks=["digitscenes_read"])


# ---- the list
def test_here_nothing_fails_and_nothing_is_written(tmp_path: Path) -> None:
    found = list(examine(config(), tmp_path / "out"))
    assert [finding for finding in found if finding.status == FAIL] == []
    names = {finding.name for finding in found}
    assert names >= {"python", "torch", "plugin", "embedded checkpoint", "hub token", "results", "checkpoint", "task digitscenes_read"}
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on() -> None:
    def broken() -> Iterable[Finding]:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    found = list(findings([("a", broken), ("b", lambda: [Finding("b", OK, "fine")])]))
    assert [(finding.name, finding.status) for finding in found] == [("a", FAIL), ("b", OK)]
    assert found[0].found == "ImportError: libcudart.so.13: cannot open shared object file"


@pytest.mark.parametrize(("status", "fix"), [(FAIL, ""), (WARN, ""), (OK, "Do something.")])
def test_all_but_what_is_well_has_a_fix(status: str, fix: str) -> None:
    with pytest.raises(ValueError, match="expected a fix exactly where not all is well"):
        Finding("x", status, "found", fix)


# ---- installation
def test_versions_are_held_against_the_packages_own_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    real = installation.metadata.version

    def version(name: str) -> str:
        if name == "pandas":
            raise installation.metadata.PackageNotFoundError(name)
        return {"transformers": "4.51.3", "torch": "2.14.0.dev20260101"}.get(name) or real(name)

    monkeypatch.setattr(installation.metadata, "version", version)
    found = list(installation.versions())
    old = only(found, "transformers")
    assert old.status == FAIL and old.found.startswith("4.51.3, tested ")
    assert old.fix.startswith("Install a tested version: pip install 'transformers<6") and ">=4.57" in old.fix
    assert only(found, "pandas").found.startswith("not installed")
    assert only(found, "torch").status == OK, "a nightly build is in the range"
    assert not any(finding.name == "pytest" for finding in found), "what only tests need is not missed"


def test_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.platform, "python_version", lambda: "3.9.18")
    (finding,) = installation.python()
    assert finding.status == FAIL and "3.9.18, tested" in finding.found


def test_a_torchvision_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = installation.torch_and_torchvision()
    assert finding.status == FAIL and "operator torchvision::nms does not exist" in finding.found
    sys.modules.pop("torchvision", None)


def test_a_plugin_that_is_not_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.metadata, "entry_points", lambda group: [])
    (finding,) = installation.plugin()
    assert (finding.status, finding.fix) == (FAIL, installation.REINSTALL)


def test_a_model_id_that_lmms_eval_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_pruner_eval.lmms import plugin

    monkeypatch.setitem(plugin.MODELS, "vlmpruner_new", "nowhere.New")
    (finding,) = installation.plugin()
    assert finding.found == "lmms-eval does not know vlmpruner_new"


def test_an_embedded_checkpoint_that_was_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vlm_pruner_eval import bench

    whole = (bench.minivlm_path() / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    monkeypatch.setattr(bench, "minivlm_path", lambda: tmp_path)
    finding = only(installation.embedded(), "embedded checkpoint")
    assert finding.status == FAIL and f"holds {len(whole) - 100} bytes, its header says {len(whole)}" in finding.found


def test_another_copy_than_the_installed_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class File(type(Path())):
        def locate(self) -> Path:
            return self

    installed = File(tmp_path / "site-packages" / "vlm_pruner_eval" / "__init__.py")
    monkeypatch.setattr(installation.metadata, "files", lambda name: [installed])
    (finding,) = installation.source()
    assert finding.status == WARN and f"but {tmp_path / 'site-packages'} is installed" in finding.found


# ---- surroundings
def test_no_gpu_is_a_warning_and_one_that_torch_can_not_use_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(surroundings.devices(), "GPU").status == WARN
    driver = tmp_path / "nvidia-smi"
    driver.write_text("")
    driver.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "torch can't use it" in only(surroundings.devices(), "GPU").found
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = only(surroundings.devices(), "GPU")
    assert finding.status == FAIL and finding.fix.startswith("Install a CUDA build")


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class About:
        name, total_memory, major, minor = "A card", 80e9, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: About)
    assert only(surroundings.devices(), "cuda:0").found.startswith("A card, 80 GB, compute capability 9.0")


def test_a_flash_attention_that_can_not_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "flash_attn.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert only(surroundings.attention(), "flash_attn").status == WARN


def test_the_token_is_looked_for_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert only(surroundings.hub(), "hub token") == Finding("hub token", OK, "there")
    assert SECRET not in "".join(str(finding) for finding in examine(config(), tmp_path))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert only(surroundings.hub(), "hub token").status == WARN


def test_offline_switches_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in surroundings.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    assert only(surroundings.hub(), "hub").status == OK
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert only(surroundings.hub(), "hub").status == OK
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert only(surroundings.hub(), "hub").found == "nothing is downloaded: HF_DATASETS_OFFLINE set"


def test_folders_that_are_full_or_can_not_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (finding,) = surroundings.output(tmp_path / "new" / "out")
    assert finding.status == OK and not (tmp_path / "new").exists()
    monkeypatch.setattr(surroundings, "LITTLE_OUTPUT_GB", 1e9)
    assert [finding.status for finding in surroundings.output(tmp_path)] == [WARN]
    (finding,) = surroundings.output(Path("/proc/nowhere"))
    assert finding.status == FAIL and "/proc/nowhere can't be written" in finding.found
    (tmp_path / "file").write_text("mine")
    (finding,) = surroundings.output(tmp_path / "file" / "out")
    assert finding.status == FAIL


# ---- a sweep file
def test_checkpoints_in_a_folder(tmp_path: Path) -> None:
    def look(**more: object) -> Finding:
        return only(sweep_file.checkpoint(config(pretrained=str(tmp_path), **more)), "checkpoint")

    assert look().found == f"{tmp_path} lacks config.json and weights"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"0")
    assert "weights in .bin files only" in look().found
    assert look(allow_bin=True).status == OK
    (tmp_path / "model.safetensors").write_bytes(b"0")
    assert look().status == OK


def test_checkpoints_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    from huggingface_hub import try_to_load_from_cache

    real = try_to_load_from_cache
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: real(*args, cache_dir=tmp_path, **kwargs))
    assert only(sweep_file.checkpoint(config(pretrained="some/model")), "checkpoint").status == WARN
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    assert "lacks weights" in only(sweep_file.checkpoint(config(pretrained="some/model")), "checkpoint").found
    (snapshot / "model.safetensors").write_bytes(b"0")
    assert only(sweep_file.checkpoint(config(pretrained="some/model")), "checkpoint").status == OK
    assert only(sweep_file.checkpoint(config(pretrained="no folder")), "checkpoint").status == FAIL


def test_tasks_and_their_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    asked = config().model_copy(update={"tasks": ("pope", "digitscenes_read")})
    found = list(sweep_file.tasks(asked))
    missing = only(found, "task pope")
    assert missing.status == WARN and "POPE" in missing.found
    assert only(found, "task digitscenes_read").status == OK
    name = missing.found.removeprefix("not in the cache: ")
    (tmp_path / "hub" / f"datasets--{name.replace('/', '--')}" / "snapshots" / "abc").mkdir(parents=True)
    assert only(sweep_file.tasks(asked), "task pope").status == OK
    (finding,) = sweep_file.tasks(config().model_copy(update={"tasks": ("poppe",)}))
    assert finding.status == FAIL and "did you mean" in finding.found


def test_an_unknown_model_id() -> None:
    (finding,) = sweep_file.model_id(config(id="vlmpruner_lava"))
    assert finding.status == FAIL and "did you mean 'vlmpruner_llava'?" in finding.fix


# ---- the command
def test_failures_are_exit_code_1_and_a_bad_file_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["doctor", "--output", "/proc/nowhere"])
    assert done.exit_code == 1
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["fail"] == 1 and last["ok"] > 15
    assert [finding["name"] for finding in last["findings"] if finding["status"] == "fail"] == ["results"]
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\n")
    assert CliRunner().invoke(cli.app, ["doctor", str(bad)]).exit_code == 2


@pytest.mark.cli
def test_the_real_command_without_a_package(tmp_path: Path) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise ImportError('transformers was torn apart')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_TOKEN": SECRET}
    command = [sys.executable, "-m", "vlm_pruner_eval", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "transformers was torn apart" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["fail"] >= 1
    assert SECRET not in done.stdout + done.stderr
