"""What must never happen: code from data, files outside the results, secrets in records, reports that act on their reader."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from report_sweeps import edit_answers
from rich.console import Console
from sweep_standin import StandIn, make_config, task_manager, write_tasks
from tiny_checkpoints import write_tiny_llava
from typer.testing import CliRunner

import vlm_pruner_eval
from vlm_pruner_eval.cli import app
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.lmms import load
from vlm_pruner_eval.lmms.plugin import exit_with
from vlm_pruner_eval.redact import HIDDEN, sentence, spelled_out, without_secrets
from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.report.writers.latex import escape as latex_escape
from vlm_pruner_eval.report.writers.markdown import inert, table
from vlm_pruner_eval.sweep import grid, hub_code, opening
from vlm_pruner_eval.sweep.provenance import command_line
from vlm_pruner_eval.sweep.runner import run_sweep

PACKAGE = Path(vlm_pruner_eval.__file__).parent
TOKEN = "hf_" + "Ab1" * 12


def test_packaged_tasks_trust_no_remote_code_and_name_no_other_folder() -> None:
    files = sorted(PACKAGE.rglob("tasks/*.yaml"))
    assert len(files) > 8
    for path in files:
        text = path.read_text()
        assert "trust_remote_code" not in text, path
        for data in re.findall(r"\.\./\S+", text):
            assert (path.parent / data).resolve().is_relative_to(PACKAGE), path


# ---- datasets and checkpoints that bring code
def test_a_task_that_runs_code_from_the_hub_is_refused_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tasks(tmp_path / "tasks")
    plain = yaml.safe_load((folder / "tiny_mean.yaml").read_text().replace("!function", ""))
    trusting = plain | {"task": "trusting", "dataset_kwargs": {"trust_remote_code": True}}
    (folder / "trusting.yaml").write_text(yaml.safe_dump(trusting))
    (folder / "group.yaml").write_text(yaml.safe_dump({"group": "mixed", "task": ["tiny_mean", "trusting"]}))
    tasks = task_manager(folder)
    config = make_config(tasks=["tiny_mean", "mixed"])
    opening.check_tasks(config, tasks)  # the installed datasets can't run scripts
    monkeypatch.setattr(hub_code.metadata, "version", lambda package: "3.6.0")
    with pytest.raises(ConfigError, match="tasks: trusting runs code that comes with its dataset") as refused:
        opening.check_tasks(config, tasks)
    assert len(refused.value.problems) == 1
    monkeypatch.setenv(hub_code.SWITCH, "1")
    opening.check_tasks(config, tasks)


def test_code_beside_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder, marker = write_tiny_llava(tmp_path), tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    for name, kinds in (("config.json", ("AutoConfig", "AutoModelForImageTextToText")), ("processor_config.json", ("AutoProcessor",))):
        path = folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(content | {"auto_map": dict.fromkeys(kinds, "own.Own")}))
    load("vlmpruner_llava", pretrained=str(folder), device="cpu")
    assert not marker.exists()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    with pytest.raises(ConfigError, match="pretrained: "):
        load("vlmpruner_llava", pretrained=str(folder), device="cpu")
    assert not marker.exists()


class Payload:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.marker, "w")


@pytest.mark.parametrize("allow_bin", [False, True])
def test_code_in_a_pickled_checkpoint_is_not_run(tmp_path: Path, allow_bin: bool) -> None:
    folder, marker = write_tiny_llava(tmp_path), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"weights|Weights") as refused:
        load("vlmpruner_llava", pretrained=str(folder), device="cpu", allow_bin=allow_bin)
    assert not marker.exists()
    assert allow_bin or isinstance(refused.value, ConfigError)


# ---- secrets
SECRETS = [
    f"sweep a.yaml --token {TOKEN}", f"pretrained=x,token={TOKEN}", f"'{TOKEN}'", f"Authorization: Bearer {TOKEN}",
    "--hf-token abcdefgh12345", "api_key=abcdefgh12345", "OPENAI_API_KEY='abcdefgh12345'", '{"password": "abcdefgh12345"}',
    "https://me:abcdefgh12345@host/x", "Bearer abcdefgh12345", "key sk-abcdefgh12345abcdefgh12345",
]  # fmt: skip
NO_SECRETS = [
    "sweep configs/a.yaml --limit 20", "first: token 4 of 576", "token: unknown argument; did you mean 'x'?", "max_new_tokens=1024",
    "--text-tokens 640000000", "http://host:8080/path", "pretrained=hf-internal/tiny,method=fastv", "dataset_kwargs: token: true",
    "token=true", "hf_home", "sk-learn", "got 'keep_tokens', expected",
]  # fmt: skip


def test_what_looks_like_a_secret_is_hidden_and_other_text_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"HF_TOKEN": "1", "MY_SECRET": ""})
    for text in SECRETS:
        shown = without_secrets(text)
        assert HIDDEN in shown and TOKEN not in shown and "abcdefgh12345" not in shown, text
    for text in NO_SECRETS:
        assert without_secrets(text) == sentence(text) == text


def test_values_of_the_environment_are_hidden_whatever_they_look_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_API_KEY", "plain words here")
    assert without_secrets("got plain words here.") == f"got {HIDDEN}."
    assert ConfigError("x: got 'plain words here'.").problems == (f"x: got '{HIDDEN}'.",)


def test_the_recorded_command_holds_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lmms-eval", "--model_args", f"pretrained=x,token={TOKEN}", "--token", "abcdefgh12345"])
    assert command_line() == f"lmms-eval --model_args pretrained=x,token={HIDDEN} --token {HIDDEN}"


def test_what_ends_the_process_holds_no_token(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        exit_with(f"401 for {TOKEN} \x1b[31m", code=1)
    assert capsys.readouterr().err == f"vlm_pruner_eval: 401 for {HIDDEN} \\x1b[31m\n"


class Refusing(StandIn):
    """A model whose hub says no, and says it with the token."""

    def generate_until(self, requests: list[Any]) -> list[Any]:
        if self.method == "vlmpruner":
            raise RuntimeError(f"401 Client Error for https://user:{TOKEN}@hub/x with {os.environ['HF_TOKEN']} \x1b[2J")
        return super().generate_until(requests)


def test_no_file_of_a_sweep_holds_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "a-secret-of-another-form"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setattr(sys, "argv", ["vlm-pruner-eval", "sweep", "x.yaml", "--token", TOKEN, f"--key={secret}"])
    screen = io.StringIO()
    config = make_config(methods=["vlmpruner", "blind"], limit=4)
    tasks = task_manager(write_tasks(tmp_path / "tasks"))
    out = tmp_path / "out"
    outcome = run_sweep(config, out, console=Console(file=screen), load=lambda *args, **kwargs: Refusing(), task_manager=tasks)
    assert outcome.failed == 1
    build(out)
    kept = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file()) + screen.getvalue().encode()
    assert b"401 Client Error" in kept
    assert b"vlm-pruner-eval sweep x.yaml --token" in kept
    assert TOKEN.encode() not in kept
    assert secret.encode() not in kept
    assert b"\x1b" not in screen.getvalue().encode()


# ---- places
@given(st.text(max_size=60))
def test_any_label_becomes_a_name_that_leads_nowhere(label: str) -> None:
    assert re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", grid._slug(label))


def test_a_sweep_with_hostile_names_writes_into_its_folder_only(tmp_path: Path) -> None:
    labels = ["../../up", "/etc/passwd", "..", "a/../../b", "C:\\x", "$(touch pwned)", "`touch pwned2`", "-rf", "~root"]
    methods = [{"name": "fastv", "layer": 2 + index, "label": label} for index, label in enumerate(labels)]
    config = make_config(methods=methods, limit=2, pruning_rates=["2/3"])
    out = tmp_path / "a" / "b" / "out"
    tasks = task_manager(write_tasks(tmp_path / "tasks"))
    before = {path for path in tmp_path.rglob("*") if out not in path.parents}
    run_sweep(config, out, console=Console(file=io.StringIO()), load=lambda *args, **kwargs: StandIn(), task_manager=tasks)
    build(out)
    assert len(list(out.glob("runs/*/run.json"))) == len(labels) + 1
    after = {path for path in tmp_path.rglob("*") if out not in path.parents and path not in (out, out.parent, out.parent.parent)}
    assert {path for path in after - before if "__pycache__" not in path.parts} == set()


# ---- reports
HOSTILE = [
    "<script>alert(1)</script>",
    "a|b\\|c",
    r"\input{/etc/passwd}$x_1^2$%#&~",
    "[red]x[/red][link=http://e]",
    "[x](javascript:alert(1))",
]
HOSTILE += ["![x](http://e/x.png)", "=HYPERLINK(1)", "`x` **y**", "<img src=x onerror=alert(1)>", "@SUM(1)", "-2+3*cmd", "{{7*7}}{% raw %}"]
ANSWER = '<script>alert(2)</script> \x1b[31mred\x1b]0;title\x07 [bold]x[/bold] | \\input{x} =1+1 "quoted"'


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of methods with hostile labels, whose answers, questions and targets are hostile as well."""
    root = tmp_path_factory.mktemp("hostile")
    methods = [{"name": "fastv", "layer": 2 + index, "label": label} for index, label in enumerate(HOSTILE)]
    config = make_config(methods=methods, limit=6, pruning_rates=["2/3"])
    tasks = task_manager(write_tasks(root / "tasks"))
    run_sweep(config, root / "out", console=Console(file=io.StringIO()), load=lambda *args, **kwargs: StandIn(), task_manager=tasks)
    for path in root.glob("out/runs/*/*/answers.jsonl"):
        edit_answers(path, lambda row: row.update(answer=f"{row['answer']} {ANSWER}", question=ANSWER))
        scores = [json.loads(line) for line in (path.parent / "scores.jsonl").read_text().splitlines()]
        changed = [score | {"answer": f"{score['answer']} {ANSWER}", "target": ANSWER} for score in scores]
        (path.parent / "scores.jsonl").write_text("".join(json.dumps(score) + "\n" for score in changed))
    build(root / "out")
    return root / "out"


def test_the_page_runs_nothing(hostile: Path) -> None:
    page = (hostile / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r"<script|<img src=x|onerror=alert\(1\)>|javascript:alert\(1\)[\"']", page)
    assert "{{7*7}}" in page


def test_markdown_holds_no_html_no_link_and_no_further_column(hostile: Path) -> None:
    text = (hostile / "report.md").read_text(encoding="utf-8")
    assert "&lt;script>alert(1)&lt;/script>" in text
    assert not re.search(r"<[a-zA-Z/!?]", text)
    links = re.findall(r"!?\[[^\]]*\]\([^)]*\)", text)
    assert links
    assert all(re.fullmatch(r"!\[[^\]]*\]\([a-z_]+\.png\)", link) for link in links), "the figures alone"
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in block.splitlines()}
        assert len(columns) == 1, block


def test_inert_leaves_ordinary_text_alone() -> None:
    for text in ("p < 0.05", "a <= b", "35.1 [30.0–40.0]", "**bold** 3", "x -> y"):
        assert inert(text) == text
    assert table([["a", "b"], ["x|y", "z\\"]]).splitlines()[2] == "| x\\|y | z\\\\ |"


def test_latex_is_text(hostile: Path) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in hostile.glob("tables/*.tex"))
    assert r"\textbackslash{}input\{/etc/passwd\}\$x\_1\textasciicircum{}2\$\%\#\&" in text
    assert r"\input" not in text
    for character in "&%$#_{}~^\\":
        assert latex_escape(character) != character


def test_spreadsheets_find_no_formula(hostile: Path) -> None:
    files = [*hostile.glob("tables/*.csv")]
    cells = [cell for path in files for line in csv.reader(path.open(encoding="utf-8", newline="")) for cell in line]
    assert "'=HYPERLINK(1)" in cells
    assert "'@SUM(1)" in cells
    assert not [cell for cell in cells if re.match(r"\s*[=@+]|\s*-[^\d.]", cell)]


def test_the_terminal_shows_names_and_answers_as_they_are(hostile: Path) -> None:
    for arguments in (["report", str(hostile)], ["show", str(hostile), "--flips", "unpruned", "[red]x[/red][link=http://e]", "--n", "0"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", result.output)
        assert "[red]x[/red]" in "".join(re.sub(r"[│|]", "", result.output).split())
    assert "[bold]x[/bold]" in result.output.replace("\n", "")
    assert "\\x1b" in result.output


def test_control_characters_are_spelled_out_and_lines_joined() -> None:
    assert spelled_out("a\x1b[31m\u202eb\x00\ud800\tc\n") == "a\\x1b[31m\\u202eb\\x00\\ud800\tc\n"
    assert sentence("one\r\n   two\x07") == "one two\\x07"
    assert ConfigError(["a\nb", "c"]).problems == ("a b", "c")


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    yield
    assert not Path("pwned").exists()
