"""`scripts/bench.sh`: what it asks for, on a machine with a GPU and on one without, is what the commands know."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer

from vlm_pruner_eval.speed.bench_commands import app

ROOT = Path(__file__).parent.parent
# an interpreter that answers the script's questions about the machine, and writes down what it is asked to measure
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then
  case "$2" in *{absent}*) exit 1;; esac
  exit 0
fi
echo "$*" >> "{log}"
{then}
"""


def asked(folder: Path, absent: str, then: str = "echo {}", parts: Sequence[str] = ()) -> tuple[int, list[list[str]]]:
    """Exit code and commands."""
    python, log = folder / "python", folder / "asked"
    python.write_text(PYTHON.replace("{absent}", absent).replace("{log}", str(log)).replace("{then}", then))
    python.chmod(0o755)
    command = ["bash", str(ROOT / "scripts" / "bench.sh"), str(folder / "out"), *parts]
    environment = os.environ | {"BENCH_PYTHON": str(python)}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60, check=False)
    lines = log.read_text().splitlines() if log.exists() else []
    return done.returncode, [shlex.split(line) for line in lines]


def names(commands: list[list[str]]) -> list[str]:
    return [Path(command[-1]).stem for command in commands]


def test_without_a_gpu(tmp_path: Path) -> None:
    code, commands = asked(tmp_path, absent="cuda")
    assert code == 0
    assert names(commands) == [
        "selection_cpu",
        *("prefill_mini_cpu", "profile_mini_cpu", "prefill_100m_cpu", "profile_100m_cpu", "grid_mini_cpu", "profile_llava-1.5-7b_cpu"),
        *("answering_mini_cpu", "shared_prefix_cpu"),
    ]


def test_with_a_gpu_but_without_lmms_eval(tmp_path: Path) -> None:
    code, commands = asked(tmp_path, absent="lmms_eval")
    assert code == 0
    models = ("llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "qwen2-vl-7b")
    of_models = [f"{what}_{model}_gpu" for model in models for what in ("prefill", "profile")]
    assert names(commands) == ["selection_gpu", *of_models, "grid_llava-1.5-7b_gpu"]


def test_parts_are_asked_for_by_name(tmp_path: Path) -> None:
    code, commands = asked(tmp_path, "cuda", parts=["grid", "selection"])
    assert (code, names(commands)) == (0, ["selection_cpu", "grid_mini_cpu"])
    (tmp_path / "asked").unlink()
    assert asked(tmp_path, "cuda", parts=["selektion"]) == (2, [])


@pytest.mark.parametrize("absent", ["cuda", "lmms_eval"])
def test_the_commands_know_every_option(tmp_path: Path, absent: str) -> None:
    _, commands = asked(tmp_path, absent)
    bench = typer.main.get_command(app)
    for command in commands:
        assert command[:3] == ["-m", "vlm_pruner_eval", "bench"]
        name, options = command[3], command[4:]
        assert bench.commands[name].make_context(name, list(options)).params


def test_what_fails_ends_it(tmp_path: Path) -> None:
    code, commands = asked(tmp_path, absent="cuda", then="exit 3")
    assert code == 3 and len(commands) == 1
