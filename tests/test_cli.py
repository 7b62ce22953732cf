from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from loguru import logger
from sweep_standin import Behaviour, StandIn, task_manager, write_tasks
from typer.testing import CliRunner

from vlm_pruner_eval import __version__
from vlm_pruner_eval.cli import app
from vlm_pruner_eval.doctor import installation
from vlm_pruner_eval.lmms import plugin
from vlm_pruner_eval.report import printing

ROOT = Path(__file__).parent.parent
GOOD = {
    "name": "tiny",
    "model": {"id": "vlmpruner_llava", "pretrained": "somewhere/tiny", "visual_tokens": 36},
    "tasks": ["tiny_mean", "tiny_pairs"],
    "pruning_rates": ["2/3"],
    "methods": ["vlmpruner", "blind"],
    "limit": 4,
}


@pytest.fixture(autouse=True)
def clean_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in an empty folder, and what they set in the environment is undone."""
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    logger.remove()  # the command's sink is the runner's stderr, which is closed by now
    logger.add(sys.stderr)


@pytest.fixture
def behaviour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Behaviour:
    """A stand-in model and the tiny tasks in place of the real ones; the returned object says how it misbehaves."""
    chosen, tasks = Behaviour(), task_manager(write_tasks(tmp_path / "tasks"))
    monkeypatch.setattr("vlm_pruner_eval.lmms.families.load", lambda *args, **kwargs: StandIn(chosen))
    monkeypatch.setattr("lmms_eval.tasks.TaskManager", lambda **kwargs: tasks)
    return chosen


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    return path


def last_json(result: Result) -> dict[str, Any]:
    """The document of a command with --json, which is all that it prints."""
    return json.loads(result.stdout)


def test_a_sweep_ends_with_table_and_paths_or_with_json(tmp_path: Path, behaviour: Behaviour) -> None:
    told = call("sweep", write(tmp_path), "--json")
    assert told.exit_code == 0, told.output
    summary = last_json(told)
    assert summary == {"runs": 3, "skipped": 0, "failed": 0, "left": 0, "report": "output/tiny/report.md"}
    assert Path(summary["report"]).read_text().startswith("# tiny")
    assert len(told.stdout.splitlines()) == 1
    result = call("sweep", write(tmp_path), "--output", "again")
    assert result.exit_code == 0 and "{" not in result.stdout
    assert "66.7 %" in result.stdout
    for kind in ("report.json", "tables", "accuracy_vs_rate.png", "accuracy_vs_rate.svg"):
        assert f"again/{kind}" in result.stdout
    shown = call("sweep", write(tmp_path))
    assert shown.exit_code == 0 and "3 finished" in shown.stdout and "output/tiny/report.md" in shown.stdout
    again = call("sweep", write(tmp_path), "--json")
    assert (again.exit_code, last_json(again)["skipped"]) == (0, 3)


def test_output_goes_where_it_is_told(tmp_path: Path, behaviour: Behaviour) -> None:
    assert last_json(call("sweep", write(tmp_path, output="from_file"), "--json"))["report"] == "from_file/report.md"
    assert last_json(call("sweep", write(tmp_path, output="from_file"), "--output", "told", "--json"))["report"] == "told/report.md"
    limited = call("sweep", write(tmp_path), "--output", "short", "--limit", "2")
    assert json.loads(Path("short/sweep.json").read_text())["config"]["limit"] == 2
    assert limited.exit_code == 0


def test_a_failed_run_is_exit_code_1_and_the_report_is_there(tmp_path: Path, behaviour: Behaviour) -> None:
    behaviour.fail = {("vlmpruner", 0)}
    result = call("sweep", write(tmp_path), "--json")
    assert result.exit_code == 1
    assert last_json(result)["failed"] == 1
    assert "samples failed" in result.output
    assert "failed" in Path("output/tiny/report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ["vlmprunr"]}, "methods[0]: method: got 'vlmprunr', which is unknown; did you mean 'vlmpruner'?"),
        ({"methods": [{"name": "vlmpruner", "pivot": 3}]}, "methods[0]: vlmpruner: unknown parameter 'pivot'; did you mean 'pivots'?"),
        ({"methods": [{"name": "vlmpruner", "threshold_step": 0}]}, "methods[0]: vlmpruner: threshold_step: got 0"),
        ({"pruning_rates": [1.5]}, "pruning_rates[0]: got 1.5, expected a number in [0, 1)"),
        ({"pruning_rates": ["much"]}, "pruning_rates[0]: got 'much', expected a number in [0, 1)"),
        ({"tasks": ["tiny_mea"]}, "tasks: got 'tiny_mea', which lmms-eval does not know; did you mean 'tiny_mean'?"),
        ({"taks": ["tiny_mean"]}, "taks: is an unknown key; did you mean 'tasks'?"),
        ({"methods": ["fastv"]}, "fastv-2of3: layer: got 99, expected 0 to 3."),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(tmp_path: Path, behaviour: Behaviour, changes: dict[str, Any], sentence: str) -> None:
    behaviour.refuse = {"fastv"}
    result = call("sweep", write(tmp_path, **changes), "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr
    assert "Traceback" not in result.output
    assert os.listdir(".") == []


def test_a_limit_is_checked_as_in_the_file(tmp_path: Path) -> None:
    result = call("sweep", write(tmp_path), "--limit", "0")
    assert result.exit_code == 2
    assert "limit: got 0 (int), expected a whole number of questions per task" in result.output


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"pretrained": "no/such/folder/anywhere"}, "no/such/folder/anywhere"),
        ({"id": "vlmpruner_lava"}, "did you mean 'vlmpruner_llava'?"),
        ({"pretrained": "minivlm", "protocol": "papr"}, "protocol: got 'papr'"),
        ({"pretrained": "minivlm", "device": "abacus"}, "device: got 'abacus'"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_refused(
    tmp_path: Path, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch, model: dict[str, str], sentence: str
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "here")
    tasks = task_manager(tmp_path / "tasks")
    monkeypatch.setattr("lmms_eval.tasks.TaskManager", lambda **kwargs: tasks)
    result = call("sweep", write(tmp_path, model=GOOD["model"] | model))
    assert result.exit_code == 2, result.output
    assert sentence in result.output
    assert os.listdir(".") == []


def test_a_dry_run_shows_the_grid_and_writes_nothing(tmp_path: Path, behaviour: Behaviour) -> None:
    result = call("sweep", write(tmp_path), "--dry-run")
    assert result.exit_code == 0
    assert os.environ["TQDM_DISABLE"] == "1"
    line = last_json(call("sweep", write(tmp_path), "--dry-run", "--json"))
    assert (line["runs"], line["tasks"], line["dry_run"], line["left"]) == (3, 2, True, 3)
    assert "12 of 36" in result.stdout
    assert os.listdir(".") == []


def test_report_writes_references_and_finds_regressions(tmp_path: Path, behaviour: Behaviour) -> None:
    config = write(tmp_path)
    assert call("sweep", config, "--output", "a").exit_code == 0
    assert call("report", "a", "--write-reference", "reference.json").exit_code == 0
    passed = call("report", "a", "--check", "reference.json", "--json")
    assert (passed.exit_code, last_json(passed)) == (0, {"check": "reference.json", "problems": 0})
    behaviour.other_kept = 1
    call("sweep", config, "--output", "b")
    failed = call("report", "b", "--check", "reference.json", "--json")
    assert (failed.exit_code, last_json(failed)["problems"]) == (1, 1)
    assert "regression: vlmpruner-2of3: 2 of 8 kept sets differ" in failed.output


def test_report_rewrites_and_shows_the_tables(tmp_path: Path, behaviour: Behaviour) -> None:
    call("sweep", write(tmp_path), "--output", "a")
    Path("a/report.md").unlink()
    result = call("report", "a")
    assert result.exit_code == 0
    assert "vlmpruner" in result.stdout and "{" not in result.stdout
    assert Path("a/report.md").exists()
    told = last_json(call("report", "a", "--json"))
    assert told["report"] == "a/report.md" and all(Path(path).exists() for path in told["files"].values())
    nothing = call("report", "nowhere")
    assert nothing.exit_code == 2
    assert "nowhere: holds no sweep" in nothing.output
    assert not Path("nowhere").exists()


def test_list_shows_methods_models_and_tasks() -> None:
    result = call("list")
    assert result.exit_code == 0
    for text in ("vlmpruner", "threshold_step=0.1", "divprune", "vlmpruner_llava", "digitscenes_pairs"):
        assert text in result.stdout
    told = last_json(call("list", "--json"))
    assert told["methods"]["none"] == {}, "no parameter of the plain model has an effect"
    assert "pruning_rate" not in told["methods"]["blind"] and "pruning_rate" in told["methods"]["downsample"]


def test_list_shows_every_task_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What doctor counts; a task that is added later is listed by being there."""
    told = last_json(call("list", "--json"))["tasks"]
    assert {"textvqa_val_ocr", "ok_vqa_val2014_plain", "mme_total", "pope_splits", "seedbench_image", "digitscenes"} <= set(told)
    (finding,) = installation.packaged_tasks()
    assert finding.found == f"lmms-eval knows {len(told)}" and f"packaged tasks ({len(told)})" in call("list").stdout
    (tmp_path / "new_task.yaml").write_text("task: new_task\n")
    monkeypatch.setattr(plugin, "task_folders", lambda: (tmp_path,))
    assert plugin.packaged_tasks() == ["new_task"]


def test_the_version_is_one_line_and_needs_none_of_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from vlm_pruner_eval.cli import main; sys.argv[1:] = ['--version']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers', 'lmms_eval'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    line, loaded = done.stdout.splitlines()
    assert loaded == "[]" and line.startswith(f"vlm-pruner-eval {__version__}, torch {metadata.version('torch')}, transformers ")

    def version(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    assert "torch is not installed, transformers 1, lmms-eval 1" in call("--version").stdout


def test_with_json_what_libraries_print_goes_to_stderr(tmp_path: Path, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(printing, "write_and_print", lambda directory, out: print("a library says") or {"md": directory / "report.md"})
    result = call("sweep", write(tmp_path), "--json")
    assert last_json(result)["failed"] == 0 and "a library says" in result.stderr


@pytest.mark.slow  # scripts/test.sh makes the sweep of configs/ci.yaml and holds it against its reference
def test_minivlm_from_file_to_table(tmp_path: Path) -> None:
    """The real thing, small: the embedded checkpoint on the embedded benchmark through lmms-eval."""
    model = {"id": "vlmpruner_llava", "pretrained": "minivlm", "batch_size": 4, "device": "cpu"}
    tasks = ["digitscenes_exist", "digitscenes_pairs"]
    config = write(tmp_path, model=model, tasks=tasks, pruning_rates=["8/9"], methods=["vlmpruner"], limit=6)
    result = call("sweep", config, "--json")
    assert result.exit_code == 0, result.output
    assert last_json(result)["runs"] == 2
    report = json.loads(Path("output/tiny/report.json").read_text())
    unpruned, pruned = report["rows"]
    assert (unpruned["kept"]["mean"], pruned["asked"]["mean"], pruned["kept"]["mean"]) == (576.0, 64.0, 64.0)
    assert pruned["layer_averaged"] == pytest.approx((2 * 576 + 3 * 64) / 5)
    assert set(pruned["cells"]) == set(tasks)
    assert pruned["cells"]["digitscenes_exist"]["n"] == 6
    assert pruned["prefill_ms"]["median"] > 0
    assert "no evidence about which method is better" in " ".join(call("report", "output/tiny").stdout.split())
    assert call("report", "output/tiny", "--write-reference", "r.json").exit_code == 0
    Path("output/tiny/sweep.json").rename("sweep.json")
    again = call("sweep", config, "--output", "again")
    assert again.exit_code == 0
    assert call("report", "again", "--check", "r.json").exit_code == 0


@pytest.mark.slow
@pytest.mark.cli
def test_a_sweep_silences_the_progress_bars_of_libraries() -> None:
    """In a fresh process, since a bar's library reads the environment once, when it is imported."""
    code = (
        "import io; from typer.testing import CliRunner; from vlm_pruner_eval.cli import app; "
        f"assert CliRunner().invoke(app, ['sweep', {str(ROOT / 'configs' / 'ci.yaml')!r}, '--dry-run']).exit_code == 0; "
        "from tqdm import tqdm; screen = io.StringIO(); list(tqdm(range(3), file=screen)); print(repr(screen.getvalue()))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "''\n"), done.stderr


@pytest.mark.cli
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "usage"),
        (["{root}/broken.yaml", "--json"], 2, "is not valid YAML"),
        pytest.param(["{root}/sweep.yaml", "--dry-run", "--json"], 0, '"runs": 3', marks=pytest.mark.slow),
    ],
)
def test_the_script_hands_on_arguments_and_exit_codes(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    surroundings = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    write(tmp_path, tasks=["digitscenes_read"])
    (tmp_path / "broken.yaml").write_text("name: [")
    command = ["bash", str(ROOT / "scripts" / "sweep.sh"), *(argument.format(root=tmp_path) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=surroundings)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert code == 0 or done.stdout == ""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ["{root}/configs/quickstart.yaml", "--output", "{root}/output/quickstart"]),
        (["--full"], ["{root}/configs/quickstart.yaml", "--output", "{root}/output/quickstart_full", "--no-share-prefix"]),
        (["there"], ["{root}/configs/quickstart.yaml", "--output", "there"]),
        (["/tmp/ci", "my.yaml"], ["my.yaml", "--output", "/tmp/ci"]),
        (["--full", "there", "my.yaml"], ["my.yaml", "--output", "there", "--no-share-prefix"]),
    ],
)
def test_the_quickstart_asks_for_this_sweep_in_the_callers_folder(tmp_path: Path, given: list[str], expected: list[str]) -> None:
    root, here = tmp_path / "a copy", tmp_path / "here"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "quickstart.sh", root / "scripts")
    (root / "scripts" / "_venv.bash").write_text("ensure_venv() { pwd > installed_in; }\n")
    command = root / ".venv" / "bin" / "vlm-pruner-eval"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\npwd\nfor each in "$@"; do echo "$each"; done\n')
    command.chmod(0o755)
    shown = subprocess.run(["bash", root / "scripts" / "quickstart.sh", *given], cwd=here, capture_output=True, text=True, check=True)
    has_one = shutil.which("nvidia-smi") is not None or os.cpu_count() == 1 or len(given) == 2 or "--full" in given
    on_a_cpu = [] if has_one else ["--processes", "2"]
    assert shown.stdout.splitlines() == [str(here), "sweep", *(argument.format(root=root) for argument in expected), *on_a_cpu]
    assert (root / "installed_in").read_text().strip() == str(root)


def test_scripts_name_an_interpreter_that_does_not_fit(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo "Python 3.9.1"; else exit 1; fi\n')
    old.chmod(0o755)
    script = "source scripts/_venv.bash && find_python"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"PYTHON": str(old)}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Got Python 3.9.1 at {old}, expected Python 3.10 to 3.13" in done.stderr
