"""README is true: its blocks parse and mean something, its worked example prunes, its tree is the tree."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from lmms_eval.utils import simple_parse_args_string
from tiny_models import generate, prompts

from vlm_pruner_eval import VisualTokens, list_pruners, prune
from vlm_pruner_eval.hf_compat import cache_of
from vlm_pruner_eval.lmms import settings
from vlm_pruner_eval.lmms.plugin import MODELS
from vlm_pruner_eval.pruners.base import ALWAYS_THERE, OPTIONAL_FIELDS
from vlm_pruner_eval.sweep import config as sweep_config
from vlm_pruner_eval.sweep.grid import expand

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "vlm_pruner_eval/pruners/README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCKS if found == language]


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture
def my_methods(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The worked example, as the module that its first line names."""
    (source,) = [text for text in blocks("python") if text.startswith("# my_methods.py")]
    module = types.ModuleType("my_methods")
    monkeypatch.setitem(sys.modules, "my_methods", module)
    exec(compile(source, "my_methods.py", "exec"), module.__dict__)
    return module


def test_every_block_is_of_a_kind_that_is_checked_here():
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml", "text"}
    assert README.count("```") == 2 * len(BLOCKS)


@pytest.mark.parametrize("block", blocks("bash"))
def test_shell_blocks_parse(block):
    checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, timeout=10, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("command", commands())
def test_commands_name_things_that_exist(command, my_methods):
    words = [word for word in shlex.split(command) if word != "PYTHONPATH=."]
    for word in words:
        if word.endswith((".sh", ".yaml", ".py")):
            assert (ROOT / word).is_file(), f"README: {command!r} names {word}, which is not there"
    if words[0] == "lmms-eval":
        options = dict(zip(words[1::2], words[2::2], strict=True))
        assert options["--model"] in MODELS
        settings.parse(simple_parse_args_string(options["--model_args"]))
    elif words[0] == "vlm-pruner-eval":
        assert words[1] in {"sweep", "report", "show", "reproduce", "bench", "doctor", "list"}
    else:
        assert words[:1] == ["bash"]


@pytest.mark.parametrize("block", blocks("yaml"))
def test_sweep_files_are_valid(block):
    runs = expand(sweep_config.validate(yaml.safe_load(block)))
    assert runs[0].method == "none"
    assert len(runs) > 1


def test_the_python_example_runs(tiny_model, capsys):
    (example,) = [text for text in blocks("python") if text.startswith("from vlm_pruner_eval import get_pruner")]
    model, inputs = tiny_model("llava"), prompts("llava", [[4, "i0", 7]])
    exec(compile(example, "README.md", "exec"), {"model": model, "inputs": inputs | {"max_new_tokens": 1}})
    assert capsys.readouterr().out == "2 [27, 27, 13, 13, 13]\n"


def test_the_worked_example_prunes(tiny_model, my_methods):
    with prune(tiny_model("llava"), my_methods.LongestKeys(pruning_rate="2/3")) as ledger:
        out = generate(tiny_model("llava"), prompts("llava", [[4, "i0", 7]]), 2)
    record, keys = ledger.records[0], cache_of(out).layers[1].keys[0, :, 4:20].transpose(0, 1)
    assert sorted(record.order) == torch.linalg.vector_norm(keys, dim=-1).sum(1).topk(5).indices.sort().values.tolist()


def test_every_method_is_in_the_table_of_methods():
    for name in list_pruners():
        assert f"`{name}`" in README, f"README's table of methods lacks {name}"
        assert f"`{name}`" in PAGE, f"the page of the methods lacks {name}"


def test_the_tree_names_every_folder_and_nothing_that_is_not_there():
    (tree,) = [block for block in blocks("text") if block.startswith("vlm_pruner_eval/")]
    listed: set[str] = set()
    inside = ""
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        inside = inside if line.startswith(" ") else names[0]
        listed |= {inside + name if line.startswith(" ") else name for name in names}
    missing = sorted(path for path in listed if not (ROOT / path).exists())
    assert not missing, f"README's tree names what is not there: {missing}"
    folders = {f"vlm_pruner_eval/{file.parent.name}/" for file in (ROOT / "vlm_pruner_eval").glob("*/__init__.py")}
    assert not folders - listed, f"README's tree lacks {sorted(folders - listed)}"


def test_the_table_of_fields_is_that_of_the_class() -> None:
    rows = re.findall(r"^\| (`\w+`(?:; `\w+`)*) \| .* \| (yes|no) \|$", PAGE, flags=re.MULTILINE)
    named = {name: needed == "yes" for names, needed in rows for name in re.findall(r"`(\w+)`", names)}
    parts = set(re.findall(r"^\| `((?:vision|question)\.\w+)` \|", PAGE, flags=re.MULTILINE))
    fields = {field.name for field in dataclasses.fields(VisualTokens)} - {"_", "on_host"}
    assert set(named) == fields
    assert {name for name, needed in named.items() if needed} | parts == OPTIONAL_FIELDS
    assert {name for name, needed in named.items() if not needed} == {*ALWAYS_THERE, "vision", "question"}
