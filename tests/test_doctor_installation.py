"""The doctor on the installation: another Python, versions, copies, torch builds, a plugin that is not there, files that were changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import vlm_pruner_eval
from vlm_pruner_eval import embedded, versions
from vlm_pruner_eval.doctor import installation
from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Finding, findings

CHECKOUT = Path(vlm_pruner_eval.__file__).parent.parent


def only(found: Iterable[Finding], name: str) -> Finding:
    (finding,) = [finding for finding in found if finding.name == name]
    return finding


def pretend_installed(monkeypatch: pytest.MonkeyPatch, folder: Path, *requires: str, version: str = vlm_pruner_eval.__version__) -> Path:
    """Metadata of another installation of the package, found before the real one; returns their folder."""
    info = folder / f"vlm_pruner_eval-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", "Name: vlm-pruner-eval", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n")
    monkeypatch.syspath_prepend(str(folder))
    return info


# ---- installation
def test_a_newer_release_is_a_warning_and_one_that_is_known_not_to_work_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = pretend_installed(monkeypatch, tmp_path, "transformers>=4.57,<5.25", "filelock>=3.16,<4.3")
    for name, version in (("transformers", "7.0"), ("filelock", "4.3.1")):
        (info.parent / f"{name}-{version}.dist-info").mkdir()
        (info.parent / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    newer, broken = installation.required()
    assert newer.status == WARN and newer.found.endswith("found 7.0: newer than tested")
    assert broken.status == FAIL and "known not to work, as lmms-eval 0.7.3 imports filelock._api" in broken.found
    (lock,) = installation.lock()
    assert lock.status == WARN and "filelock 4.3.1 (locked: " in lock.found and "requirements.lock" in lock.fix


def test_the_self_test_is_part_of_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.status for finding in installation.self_test()] == [OK, OK]
    monkeypatch.setitem(sys.modules, "filelock._api", None)
    monkeypatch.setattr("vlm_pruner_eval.prefill.Prefill.enter_layer", lambda self, i, hidden, *args: hidden)
    late, hook = installation.self_test()
    assert late.status == hook.status == FAIL
    assert "filelock._api" in late.found and "the stage in front of decoder layer 2 never ran" in hook.found and "install" in late.fix


def test_versions_are_held_against_the_packages_own_ranges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    extra = "pytest<1; extra == 'test'"
    info = pretend_installed(monkeypatch, tmp_path, "transformers>=99,<100", "no-such-package-here>=1", "numpy>=1", "torch>=2", extra)
    torch_info = info.parent / "torch-2.99.0.dev20300101.dist-info"
    torch_info.mkdir()
    (torch_info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.99.0.dev20300101\n")
    found = list(installation.required())
    old = only(found, "transformers")
    assert old.status == FAIL and old.found.startswith("tested with >=99,<100, found ") and old.found.endswith(": older than supported")
    assert old.fix == "Install a tested version: pip install 'transformers>=99,<100'."
    assert only(found, "no-such-package-here").found == "tested with >=1, found nothing: not installed"
    assert only(found, "numpy").status == OK
    nightly = only(found, "torch")
    assert nightly.status == OK and "found 2.99.0.dev20300101: ok" in nightly.found, "a nightly build is in the range"
    assert not any(finding.name == "pytest" for finding in found), "what only tests need is not missed"


def test_the_copy_that_is_imported_is_the_one_that_was_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = pretend_installed(monkeypatch, tmp_path / "site-packages")
    direct = info / "direct_url.json"
    direct.write_text(json.dumps({"url": CHECKOUT.as_uri(), "dir_info": {"editable": True}}))
    assert only(installation.source(), "source").status == OK
    direct.write_text(json.dumps({"url": (tmp_path / "other").as_uri(), "dir_info": {"editable": True}}))
    assert only(installation.source(), "source").found == f"{CHECKOUT} is imported, but {tmp_path / 'other'} is installed"
    direct.unlink()
    (info / "RECORD").write_text("vlm_pruner_eval/embedded/__init__.py,,\nvlm_pruner_eval/__init__.py,,\n")
    assert only(installation.source(), "source").found == f"{CHECKOUT} is imported, but {tmp_path / 'site-packages'} is installed"


def test_an_installation_that_has_aged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = pretend_installed(monkeypatch, tmp_path / "a", "numpy>=1", version="0.0.1")
    (info / "direct_url.json").write_text(json.dumps({"url": CHECKOUT.as_uri(), "dir_info": {"editable": True}}))
    finding = only(installation.source(), "source")
    assert finding.status == WARN and finding.found == f"{vlm_pruner_eval.__version__} is imported, but installed as 0.0.1"


def test_a_checkout_that_was_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (installation, versions):
        monkeypatch.setattr(module, "DISTRIBUTION", "vlm-pruner-eval-that-nobody-installed")
    assert only(installation.source(), "source").fix == installation.REINSTALL
    assert [finding.status for finding in findings([("versions", installation.required)])] == [FAIL]


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> Iterable[None]:
    """It can be imported anew in the test, from where the test says."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    sys.modules.pop("torchvision", None)


@pytest.mark.usefixtures("without_torchvision")
@pytest.mark.parametrize(
    ("code", "status", "what"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", FAIL, "operator torchvision::nms does not exist"),
        ("__version__ = '0.29.0+cu001'", WARN, "for different devices"),
        ("__version__ = '0.29.0'", OK, "fit together"),
    ],
)
def test_a_torchvision_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, status: str, what: str) -> None:
    (tmp_path / "torchvision.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch, "__version__", torch.__version__.partition("+")[0] + "+cpu")
    (finding,) = installation.torch_and_torchvision()
    assert finding.status == status and what in finding.found


# ---- what the package brings
def test_a_plugin_that_is_not_registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_installed(monkeypatch, tmp_path)  # without entry points
    (finding,) = installation.plugin()
    assert (finding.status, finding.fix) == (FAIL, installation.REINSTALL)


def test_a_model_id_that_lmms_eval_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_pruner_eval.lmms import plugin

    monkeypatch.setitem(plugin.MODELS, "vlmpruner_new", "nowhere.New")
    (finding,) = installation.plugin()
    assert finding.found == "lmms-eval does not know vlmpruner_new"


def test_a_plugin_that_can_not_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval logs that and goes on without our models."""
    from vlm_pruner_eval.lmms import plugin, scored_tasks

    monkeypatch.setitem(plugin.MODELS, "vlmpruner_new", "nowhere.New")
    monkeypatch.delattr(scored_tasks, "keep_pairs")
    (finding,) = findings([("plugin", installation.plugin)])
    assert finding.status == FAIL and "has no attribute 'keep_pairs'" in finding.found


def test_packaged_tasks_that_lmms_eval_does_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.tasks import TaskManager

    assert only(installation.packaged_tasks(), "packaged tasks").status == OK
    monkeypatch.setattr(TaskManager, "initialize_tasks", TaskManager.initialize_tasks.__wrapped__)
    finding = only(installation.packaged_tasks(), "packaged tasks")
    assert finding.status == FAIL and "digitscenes_read" in finding.found and "pope_splits" in finding.found


@pytest.mark.parametrize(("locate", "name"), [("minivlm_path", "embedded checkpoint"), ("questions_path", "embedded questions")])
def test_embedded_files_that_were_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, locate: str, name: str) -> None:
    source = embedded.minivlm_path() / "model.safetensors" if locate == "minivlm_path" else embedded.questions_path()
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    copy = tmp_path / source.name
    copy.write_bytes(content)
    assert {finding.status for finding in installation.embedded()} == {OK}
    monkeypatch.setattr(embedded, locate, lambda: tmp_path if locate == "minivlm_path" else copy)
    finding = only(installation.embedded(), name)
    assert finding.status == FAIL and f"{copy} is not what was packed" in finding.found


def test_embedded_files_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "__init__.py"))
    found = list(installation.embedded())
    assert [finding.status for finding in found] == [FAIL, FAIL]
    assert "missing config.json" in found[0].found and "missing test.parquet" in found[1].found
