"""The arrows between modules point one way: a pruner never learns of a model, a config never needs torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vlm_pruner_eval"
NAME = "vlm_pruner_eval"
MOST_LINES = 350
# what a part may import of this package, and which outside packages it must not know
ALLOWED = {
    "shown": set(),
    "stdout": set(),
    "errors": {"shown"},
    "durable": {"errors"},
    "ending": {"durable", "errors"},
    "versions": {"errors"},
    "hf_compat": {"errors", "versions"},
    "selftest": {"errors", "versions", ""},
    "host": set(),
    "budget": {"errors", "shown"},
    "cost": set(),
    "types": {"errors", "host"},
    "ledger": {"budget"},
    "timing": set(),
    "pruners": {"pruners", "budget", "errors", "host", "shown", "types"},
    "vlms": {"vlms", "pruners", "budget", "errors", "hf_compat", "host", "types"},
    "probe": {"errors", "hf_compat"},
    "cut": {"errors", "hf_compat"},
    "unwrap": {"errors"},
    "eager": {"errors"},
    "guard": {"errors"},
    "installed": {"errors", "guard"},
    "batch_rows": {"errors", "timing", "vlms"},
    "refusals": {"cut", "errors", "hf_compat", "pruners", "types", "vlms"},
    "prefill": {"batch_rows", "cut", "errors", "ledger", "probe", "pruners", "refusals", "timing", "types", "vlms"},
    "hook": {"cut", "eager", "errors", "guard", "hf_compat", "host", "installed", "ledger"}
    | {"prefill", "probe", "pruners", "refusals", "unwrap", "vlms"},
    "prefix": {"cut", "errors", "hf_compat", "hook", "probe", "pruners", "vlms"},
    "bench": {"bench", "errors", "versions"},
    "store": {"store", "durable", "errors", "ledger", "shown"},
    "lmms": {"lmms", "store"}
    | {"prefix", "bench", "budget", "cost", "durable", "errors", "hook", "ledger", "pruners", "shown", "timing", "types"}
    | {"hf_compat", "versions", "vlms", ""},
    "sweep": {"sweep", "store", "lmms", "bench", "budget", "cost", "durable", "ending", "errors", "ledger", "pruners"}
    | {"selftest", "shown", "timing", "versions", ""},
    "speed": {
        "speed",
        "stdout",
        "bench",
        "budget",
        "cost",
        "ending",
        "errors",
        "hf_compat",
        "hook",
        "ledger",
        "lmms",
        "pruners",
        "shown",
        "sweep",
        "timing",
        "types",
        "vlms",
    }
    | {""},
    "report": {"report", "store", "stdout", "sweep", "budget", "cost", "errors", "shown", ""},
    "doctor": {"doctor", "stdout", "selftest", "versions", "bench", "errors", "lmms", "shown", "sweep", ""},
    "reproduce": {"reproduce", "report", "store", "sweep", "lmms", "pruners", "errors", "shown", ""},
}
# what a part of report may import of report: from reading over numbers to tables and pictures, and from those to formats
INSIDE_REPORT = {
    "current": set(),
    "printing": {"build", "contents", "current", "load", "writers"},
    "documents": set(),
    "shape": set(),
    "load": {"documents", "shape"},
    "rows": {"load"},
    "text": {"rows"},
    "stats": {"stats", "load", "rows"},
    "paper": {"paper", "load", "rows"},
    "geometry": {"geometry"},
    "tables": {"tables", "stats", "paper", "load", "rows", "text"},
    "contents": {"tables", "stats", "paper", "load", "rows"},
    "figures": {"figures", "stats", "load", "rows", "text"},
    "show": {"show", "geometry", "stats", "load"},
    "writers": {"writers", "contents", "tables", "figures", "show", "stats", "paper", "load", "rows", "text"},
    "check": {"load"},
    "build": {"writers", "contents", "figures", "show", "paper", "load"},
    "__init__": {"build", "check"},
}
FORBIDDEN = {
    "shown": {"torch", "transformers", "lmms_eval"},
    "stdout": {"torch", "transformers", "lmms_eval"},
    "errors": {"torch", "transformers", "lmms_eval"},
    "durable": {"torch", "transformers", "lmms_eval"},
    "budget": {"torch", "transformers", "lmms_eval"},
    "cost": {"torch", "transformers", "lmms_eval"},
    "types": {"transformers", "lmms_eval"},
    "ledger": {"transformers", "lmms_eval"},
    "pruners": {"transformers", "lmms_eval"},
    "vlms": {"lmms_eval"},
    "hook": {"lmms_eval"},
    "report": {"torch", "transformers", "lmms_eval"},
    "store": {"torch", "transformers", "lmms_eval"},
    "sweep.config": {"torch", "transformers", "lmms_eval"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in {"__init__", "__main__", "cli"})


def imported(path: Path, *, lazy: bool) -> set[str]:
    """Full names that a file imports; with `lazy`, also those inside functions."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazy else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; spell it out"
            in_package = (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if in_package else {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_arrow_points_up(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    assert parts[0] in ALLOWED, f"{parts[0]} is not in the house: say in this table what it may import"
    ours = {name.split(".")[1] for name in imported(path, lazy=True) if name.startswith(f"{NAME}.")}
    public = {"get_pruner", "prune", "keep_count", "__version__"}
    assert ours - public <= ALLOWED[parts[0]] - {""}, f"{path}: imports {sorted(ours - ALLOWED[parts[0]])}"
    outside = {name.split(".")[0] for name in imported(path, lazy=False)}
    for key in (parts[0], ".".join(parts)):
        assert not outside & FORBIDDEN.get(key, set()), f"{path} imports {sorted(outside & FORBIDDEN[key])}"


def test_the_table_would_notice(tmp_path):
    (tmp_path / "bad.py").write_text("import transformers\nfrom vlm_pruner_eval.sweep import grid\nfrom vlm_pruner_eval import hook\n")
    assert imported(tmp_path / "bad.py", lazy=True) == {"transformers", "vlm_pruner_eval.sweep.grid", "vlm_pruner_eval.hook"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "report").rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_arrow_points_up_inside_report(path):
    part = path.relative_to(PACKAGE / "report").with_suffix("").parts[0]
    assert part in INSIDE_REPORT, f"{part} is not in report: say in this table what it may import"
    ours = {name.split(".")[2] for name in imported(path, lazy=True) if name.startswith(f"{NAME}.report.")}
    assert ours <= INSIDE_REPORT[part], f"{path}: imports {sorted(ours - INSIDE_REPORT[part])}"


def test_every_part_of_report_has_a_name_of_its_own():
    """What was a file and is a package now must not be both: the package would hide the file."""
    names = [path.stem for path in (PACKAGE / "report").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert sorted(names) == sorted(INSIDE_REPORT)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short_enough_to_be_read_in_one_go(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES, f"{path}: longer than {MOST_LINES} lines; split it"


@pytest.mark.parametrize("module", [NAME, f"{NAME}.budget", f"{NAME}.cost", f"{NAME}.lmms.plugin", f"{NAME}.sweep.config", f"{NAME}.cli"])
def test_light_modules_do_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_data_files_are_installed_too() -> None:
    """setup.cfg ships data files of packages only: a folder without __init__.py would be missing from an installation."""
    data = [path for path in PACKAGE.rglob("*") if path.suffix in {".csv", ".jinja", ".json", ".parquet", ".safetensors", ".yaml"}]
    assert len(data) > 15
    assert not [str(path) for path in data if not (path.parent / "__init__.py").is_file()]
