"""The doctor: every check is driven into what it looks for by a real cause, and nothing that is broken breaks the list."""

from __future__ import annotations

import http.client
import json
import os
import resource
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_standin import make_config
from typer.testing import CliRunner

from vlm_pruner_eval import cli
from vlm_pruner_eval.doctor import examine, surroundings
from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Finding, findings

QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.yaml")
SECRET = "hf_ThisMustNeverBeSeenAnywhere"
CONFIG = make_config(model={"id": "vlmpruner_llava", "pretrained": "minivlm", "visual_tokens": 576}, tasks=["digitscenes_read"])


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may have one that the torch of these tests can't use."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def only(found: Iterable[Finding], name: str) -> Finding:
    (finding,) = [finding for finding in found if finding.name == name]
    return finding


def pretend_driver(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """An nvidia-smi that does what the shell script says, and nothing else on the PATH."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def write_broken(folder: Path, package: str, sentence: str) -> None:
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(f"raise ImportError({sentence!r})")


# ---- the list
def test_here_nothing_but_the_network_is_missing_and_nothing_is_written(tmp_path: Path) -> None:
    found = list(examine.examine(CONFIG, tmp_path / "out"))
    assert [finding for finding in found if finding.status == FAIL] == []
    names = {finding.name for finding in found}
    assert names >= {"source", "torch", "torch and torchvision", "plugin", "packaged tasks", "embedded checkpoint"}
    assert names >= {"embedded questions", "GPU", "hub", "hub token", "checkpoint cache", "data set cache", "results"}
    assert names >= {"model id", "attention of the file", "checkpoint", "task digitscenes_read"}
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on() -> None:
    def broken() -> Iterable[Finding]:
        raise ImportError("libcudart.so.13:\n cannot open shared object file")

    found = list(findings([("a", broken), ("b", lambda: [Finding("b", OK, "fine")])]))
    assert [(finding.name, finding.status) for finding in found] == [("a", FAIL), ("b", OK)]
    assert found[0].found == "ImportError: libcudart.so.13: cannot open shared object file"


@pytest.mark.parametrize(("status", "fix"), [(FAIL, ""), (WARN, ""), (OK, "Do something.")])
def test_all_but_what_is_well_has_a_fix(status: str, fix: str) -> None:
    with pytest.raises(ValueError, match="expected a fix unless all is well"):
        Finding("x", status, "found", fix)


def test_tokens_in_messages_of_others_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a-token-that-looks-like-nothing")
    (found,) = findings([("a", lambda: [Finding("a", WARN, f"{SECRET} a-token-that-looks-like-nothing", "Mend it.")])])
    assert found.found == "*** ***"


# ---- devices
def test_a_gpu_that_torch_can_not_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [(finding.name, finding.status) for finding in surroundings.devices()] == [("GPU", WARN)]
    pretend_driver(monkeypatch, tmp_path, "echo 'A card, with commas, 123.45, 5 MiB, 80000 MiB'")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = list(surroundings.devices())
    assert only(found, "driver").found == "A card, with commas, driver 123.45, 5 MiB of 80000 MiB in use"
    assert only(found, "GPU").status == FAIL and "can do CUDA 13.0" in only(found, "GPU").fix
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = only(surroundings.devices(), "GPU")
    assert finding.status == FAIL and finding.fix.startswith("Install a build with CUDA")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert only(surroundings.devices(), "GPU").status == WARN, "as the user wants it"


@pytest.mark.parametrize(("script", "problem"), [("echo no driver >&2; exit 9", "ends with code 9: no driver"), ("exit 0", "lists no GPU")])
def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, problem: str) -> None:
    pretend_driver(monkeypatch, tmp_path, script)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = list(surroundings.devices())
    assert only(found, "driver") == Finding("driver", WARN, f"nvidia-smi is there, but {problem}", only(found, "driver").fix)
    assert only(found, "GPU").status == WARN


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class About:
        name, total_memory, major, minor = "A card", 80e9, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: About)
    assert only(surroundings.devices(), "cuda:0").found.startswith("A card, 80 GB, compute capability 9.0")


# ---- surroundings
def test_the_token_is_looked_for_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert only(surroundings.hub(), "hub token") == Finding("hub token", OK, "there")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    stored = tmp_path / "token"
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(stored))
    assert only(surroundings.hub(), "hub token").status == WARN
    stored.write_text(SECRET)
    assert only(surroundings.hub(), "hub token") == Finding("hub token", OK, "there")


def test_offline_switches_are_named_and_a_mirrors_password_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in surroundings.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://me:open-sesame@mirror.example/hub")
    asked: list[str] = []
    monkeypatch.setattr(surroundings.urllib.request, "urlopen", lambda request, timeout: asked.append(request.full_url) or nullcontext())
    assert only(surroundings.hub(), "hub") == Finding("hub", OK, "mirror.example answers, and downloads are allowed")
    assert asked == ["https://mirror.example/hub"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert only(surroundings.hub(), "hub").status == OK
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert only(surroundings.hub(), "hub").found == "nothing is downloaded: HF_DATASETS_OFFLINE set"


def test_the_cache_of_data_sets_is_the_one_that_lmms_eval_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "theirs")
    monkeypatch.delenv("LMMS_EVAL_DATASETS_CACHE", raising=False)
    assert only(surroundings.caches(), "data set cache").found.startswith(f"{tmp_path / 'theirs'}, ")
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "own"))
    assert only(surroundings.caches(), "data set cache").found.startswith(f"{tmp_path / 'own'}, ")


def test_folders_that_can_not_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (finding,) = surroundings.output(tmp_path / "new" / "out")
    assert finding.status == OK and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(surroundings, "LITTLE_OUTPUT_GB", 1e9)
    assert [finding.status for finding in surroundings.output(tmp_path)] == [WARN]
    (finding,) = surroundings.output(Path("/proc/nowhere"))
    assert finding.status == FAIL and "/proc/nowhere can't be written" in finding.found
    (tmp_path / "file").write_text("mine")
    (finding,) = surroundings.output(tmp_path / "file" / "out")
    assert finding.found == f"{tmp_path / 'file' / 'out'} can't be written (Not a directory)"


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    """The kernel cuts the write short, as it does on a full disk and at a quota; free bytes and permissions say that all is well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        (finding,) = surroundings.output(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert finding.status == FAIL and finding.found == f"{tmp_path} can't be written (File too large)"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, OK),
        (urllib.error.HTTPError("https://hub.example", 403, "forbidden", {}, None), OK),
        (urllib.error.URLError("Name or service not known"), WARN),
        (TimeoutError("timed out"), WARN),
        (http.client.BadStatusLine("nonsense"), WARN),
        ("hangs", WARN),
    ],
)
def test_a_hub_that_can_not_be_reached_is_said_so(error: Any, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def urlopen(request: object, timeout: float) -> nullcontext:
        if error == "hangs":
            over.wait(20)  # as the look-up of a name may
        elif error is not None:
            raise error
        return nullcontext()

    for name in surroundings.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(surroundings, "HUB_TIMEOUT_S", 0.2)
    monkeypatch.setattr(surroundings.urllib.request, "urlopen", urlopen)
    found = only(surroundings.hub(), "hub")
    over.set()
    assert found.status == status and ("HF_HUB_OFFLINE=1" in found.fix) == (status == WARN)


# ---- the command
def test_failures_are_exit_code_1_and_a_bad_file_2(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["doctor", "--output", "/proc/nowhere", "--json"])
    assert done.exit_code == 1
    parsed = json.loads(done.stdout)
    assert parsed["fail"] == 1 and parsed["ok"] > 15
    assert [finding["name"] for finding in parsed["findings"] if finding["status"] == "fail"] == ["results"]
    lines = CliRunner().invoke(cli.app, ["doctor", "--output", "/proc/nowhere"]).stdout.splitlines()
    place = [line.startswith("fail  results: /proc/nowhere can't be written") for line in lines].index(True)
    assert lines[place + 1].startswith("      Mend that"), "a line is not broken, and the remedy stands below it"
    assert lines[-1].endswith(", 1 to mend")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\n")
    assert CliRunner().invoke(cli.app, ["doctor", str(bad)]).exit_code == 2


def doctor(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vlm_pruner_eval", "doctor", *arguments]
    environment = {**os.environ, "HF_TOKEN": SECRET, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert SECRET not in done.stdout + done.stderr and "Traceback" not in done.stderr
    return done


@pytest.mark.slow
@pytest.mark.cli
def test_the_real_command_where_all_is_well(tmp_path: Path) -> None:
    done = doctor({}, QUICKSTART, "--output", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stdout
    last = json.loads(done.stdout)
    assert last["fail"] == 0 and all(bool(finding["fix"]) == (finding["status"] != "ok") for finding in last["findings"])
    assert not (tmp_path / "out").exists()


@pytest.mark.cli
@pytest.mark.parametrize(
    ("package", "suffers"),
    [
        ("torch", {"torch and torchvision", "GPU"}),
        pytest.param("lmms_eval", {"plugin", "packaged tasks"}, marks=pytest.mark.slow),
        pytest.param("yaml", {"sweep file"}, marks=pytest.mark.slow),
    ],
)
def test_the_real_command_without_a_package(tmp_path: Path, package: str, suffers: set[str]) -> None:
    write_broken(tmp_path, package, f"{package} was torn apart")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = doctor({"PYTHONPATH": path}, QUICKSTART, "--output", str(tmp_path / "out"), "--json")
    assert done.returncode == 1
    last = json.loads(done.stdout)
    torn = {finding["name"] for finding in last["findings"] if f"{package} was torn apart" in finding["found"]}
    assert torn >= suffers and last["ok"] > 10
