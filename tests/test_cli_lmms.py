"""The plugin through lmms-eval's own, unmodified command line, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoints import write_tiny, write_tiny_llama

from vlm_pruner_eval.lmms.plugin import MODELS

pytestmark = pytest.mark.cli

LMMS_EVAL = [str(Path(sys.executable).with_name("lmms-eval"))]
MODULE = [sys.executable, "-m", "lmms_eval"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lmms_eval"]
N_DOCS = 6
PRUNED = "pretrained=minivlm,method=vlmpruner,pruning_rate=0.889"

SABOTAGE = """
from dataclasses import dataclass
from typing import ClassVar

import torch
from vlm_pruner_eval import Pruner


@dataclass(frozen=True, kw_only=True)
class Duplicates(Pruner):
    name: ClassVar[str] = "duplicates"
    on: str = ""

    def choose(self, tokens, keep):
        return torch.zeros(keep, dtype=torch.long) if self.on in tokens.sample_id else torch.arange(keep)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("environment")
    (folder / "sabotage_for_tests.py").write_text(SABOTAGE)
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return dict(os.environ) | quiet | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def run(
    command: list[str],
    environment: dict[str, str],
    output: Path,
    *,
    model_args: str,
    tasks: str = "digitscenes_read",
    model: str = "vlmpruner_llava",
) -> subprocess.CompletedProcess:
    arguments = ["--model", model, "--model_args", model_args, "--tasks", tasks, "--batch_size", "3", "--limit", str(N_DOCS)]
    return subprocess.run(
        [*command, *arguments, "--output_path", str(output), "--log_samples"],
        env=environment, cwd=output.parent, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def answers(output: Path) -> dict[int, object]:
    (path,) = output.rglob("*_samples_digitscenes_read.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(samples) == N_DOCS
    return {sample["doc_id"]: sample["filtered_resps"] for sample in samples}


@pytest.fixture(scope="module")
def single(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, Path]:
    """A command as users give it, and what it wrote."""
    output = tmp_path_factory.mktemp("single") / "out"
    return run(LMMS_EVAL, environment, output, model_args=PRUNED), output


def test_a_run_prints_and_writes_what_was_kept(single: tuple[subprocess.CompletedProcess, Path]) -> None:
    done, output = single
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = output.rglob("*_results.json")
    throughput = json.loads(path.read_text())["throughput"]
    assert (throughput["avg_kept_tokens"], throughput["avg_visual_tokens"]) == (64, 576)
    assert throughput["avg_prefill_ms"] > throughput["avg_selection_ms"] > 0
    assert "avg_kept_tokens" in done.stdout
    assert "digitscenes_read" in done.stdout
    assert len(answers(output)) == N_DOCS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_answer_the_same(single: tuple[subprocess.CompletedProcess, Path], environment: dict[str, str], tmp_path: Path) -> None:
    ranks = run(TORCHRUN, environment, tmp_path / "ranks", model_args=PRUNED)
    assert ranks.returncode == 0, ranks.stdout + ranks.stderr
    assert answers(tmp_path / "ranks") == answers(single[1])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
def test_another_family_runs_under_its_own_id(family: str, environment: dict[str, str], tmp_path: Path) -> None:
    model_args = f"pretrained={write_tiny(family, tmp_path / 'tiny')},method=vlmpruner,pruning_rate=8/9"
    done = run(LMMS_EVAL, environment, tmp_path / "out", model_args=model_args, model=f"vlmpruner_{family}")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "out").rglob("*_results.json")
    throughput = json.loads(path.read_text())["throughput"]
    assert throughput["avg_kept_tokens"] == pytest.approx(throughput["avg_visual_tokens"] / 9, abs=0.5)
    assert len(answers(tmp_path / "out")) == N_DOCS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "model_args", "tasks", "code", "sentence"),
    [
        ("method", "pretrained=minivlm,method=vlmprunner,pruning_rate=0.5", "digitscenes_read", 2, "did you mean 'vlmpruner'?"),
        ("task", "pretrained=minivlm", "digitscenes_red", 1, "Tasks not found: digitscenes_red"),
        ("checkpoint", "pretrained={llama}", "digitscenes_read", 2, "is a 'llama' checkpoint, expected llava for --model vlmpruner_llava"),
    ],
)
def test_bad_input_is_a_sentence_and_nothing_is_written(
    case: str, model_args: str, tasks: str, code: int, sentence: str, environment: dict[str, str], tmp_path: Path
) -> None:
    if case == "checkpoint":
        model_args = model_args.format(llama=write_tiny_llama(tmp_path / "llama"))
    done = run(LMMS_EVAL, environment, tmp_path / "out", model_args=model_args, tasks=tasks)
    assert done.returncode == code, done.stdout + done.stderr
    assert sentence in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "on", "sentence"),
    [
        (MODULE, "", f"{N_DOCS} of {N_DOCS} samples failed"),
        (TORCHRUN, "read/test/1/", "1 of 3 samples failed"),  # one sample of one rank: the other rank must not wait for it for ever
    ],
)
def test_a_method_that_answers_duplicates_leaves_no_results(
    command: list[str], on: str, sentence: str, environment: dict[str, str], tmp_path: Path
) -> None:
    model_args = "pretrained=minivlm,method=sabotage_for_tests:Duplicates,pruning_rate=0.889" + (f",on={on}" if on else "")
    done = run(command, environment, tmp_path / "out", model_args=model_args)
    assert done.returncode == 1, done.stdout + done.stderr
    assert sentence in done.stderr
    assert "PruningError" in done.stderr + done.stdout
    assert not list(tmp_path.rglob("*.json*"))


@pytest.mark.slow  # by default in this process, in test_lmms_plugin.py
@pytest.mark.parametrize("command", [LMMS_EVAL, MODULE])
def test_an_id_that_is_nearly_one_of_ours_is_refused(command: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    done = run(command, environment, tmp_path / "out", model_args="pretrained=minivlm", model="vlmpruner_lava")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "did you mean 'vlmpruner_llava'?" in done.stderr and "Traceback" not in done.stderr + done.stdout


@pytest.mark.slow
def test_lmms_eval_lists_the_models(environment: dict[str, str]) -> None:
    done = subprocess.run([*LMMS_EVAL, "models"], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert set(MODELS) <= set(done.stdout.split())
