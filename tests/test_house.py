"""The arrows between modules point one way: a pruner never learns of a model, a config never needs torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vlm_pruner_eval"
NAME = "vlm_pruner_eval"
# what a part may import of this package, and which outside packages it must not know
ALLOWED = {
    "errors": set(),
    "budget": {"errors"},
    "cost": set(),
    "types": {"errors"},
    "ledger": {"budget"},
    "timing": set(),
    "pruners": {"pruners", "budget", "errors", "types"},
    "vlms": {"vlms", "pruners", "budget", "errors", "types"},
    "probe": set(),
    "cut": {"errors"},
    "prefill": {"cut", "errors", "ledger", "probe", "pruners", "timing", "types", "vlms"},
    "hook": {"cut", "errors", "ledger", "prefill", "probe", "pruners", "vlms"},
    "prefix": {"cut", "errors", "hook", "probe", "pruners", "vlms"},
    "bench": {"bench", "errors"},
    "lmms": {"lmms", "prefix", "bench", "budget", "cost", "errors", "hook", "ledger", "pruners", "timing", "types", "vlms", ""},
    "sweep": {"sweep", "lmms", "bench", "budget", "cost", "errors", "ledger", "pruners", "timing", ""},
    "speed": {"speed", "bench", "budget", "cost", "errors", "hook", "ledger", "lmms", "pruners", "sweep", "timing", "types", "vlms", ""},
    "report": {"report", "sweep", "budget", "cost", "errors", ""},
    "reproduce": {"reproduce", "report", "sweep", "lmms", "pruners", "errors", ""},
}
FORBIDDEN = {
    "errors": {"torch", "transformers", "lmms_eval"},
    "budget": {"torch", "transformers", "lmms_eval"},
    "cost": {"torch", "transformers", "lmms_eval"},
    "types": {"transformers", "lmms_eval"},
    "ledger": {"transformers", "lmms_eval"},
    "pruners": {"transformers", "lmms_eval"},
    "vlms": {"lmms_eval"},
    "hook": {"lmms_eval"},
    "report": {"torch", "transformers", "lmms_eval"},
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
            found |= {node.module} if node.module != NAME else {f"{NAME}.{alias.name}" for alias in node.names}
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
    assert imported(tmp_path / "bad.py", lazy=True) == {"transformers", "vlm_pruner_eval.sweep", "vlm_pruner_eval.hook"}


@pytest.mark.parametrize("module", [NAME, f"{NAME}.budget", f"{NAME}.cost", f"{NAME}.lmms.plugin", f"{NAME}.sweep.config", f"{NAME}.cli"])
def test_light_modules_do_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_data_files_are_installed_too() -> None:
    """setup.cfg ships data files of packages only: a folder without __init__.py would be missing from an installation."""
    data = [path for path in PACKAGE.rglob("*") if path.suffix in {".csv", ".jinja", ".json", ".parquet", ".safetensors", ".yaml"}]
    assert len(data) > 15
    assert not [str(path) for path in data if not (path.parent / "__init__.py").is_file()]
