"""The arrows between modules point one way: a pruner never learns of a model, a config never needs torch."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "vlm_pruner_eval"
NAME = "vlm_pruner_eval"
MOST_LINES = 350
# what a part may import of this package, and which outside packages it must not know
ALLOWED = {
    "redact": set(),
    "stdout": set(),
    "errors": {"redact"},
    "durable": {"errors"},
    "exit_codes": {"durable", "errors"},
    "versions": {"errors"},
    "hf_compat": {"errors", "versions"},
    "selftest": {"errors", "versions", ""},
    "device_copy": set(),
    "budget": {"errors", "redact"},
    "cost": set(),
    "types": {"errors", "device_copy"},
    "ledger": {"budget"},
    "timing": set(),
    "kernels": {"kernels"},
    "pruners": {"pruners", "kernels", "budget", "errors", "device_copy", "redact", "types"},
    "vlms": {"vlms", "pruners", "budget", "errors", "hf_compat", "device_copy", "types"},
    "probe": {"errors", "hf_compat"},
    "cut": {"errors", "hf_compat"},
    "unwrap": {"errors"},
    "eager": {"errors"},
    "guard": {"errors"},
    "installed": {"errors", "guard", "probe", "vision_probe"},
    "batch_rows": {"errors", "pruners", "timing", "types", "vlms"},
    "tower_merging": {"pruners", "vlms"},
    "vision_probe": {"budget", "errors", "pruners", "tower_merging", "types", "vlms"},
    "encoding": {"hf_compat", "vision_probe", "vlms"},
    "refusals": {"cut", "errors", "hf_compat", "pruners", "types", "vision_probe", "vlms"},
    "clip_text": {"errors", "redact", "types"},
    "row_view": {"batch_rows", "clip_text", "cut", "probe", "types", "vision_probe", "vlms"},
    "prefill": {"batch_rows", "cut", "device_copy", "errors", "ledger", "probe", "pruners", "refusals", "row_view", "timing", "types"}
    | {"vision_probe", "vlms"},
    "layer_arguments": {"cut"},
    "hook": {
        "clip_text",
        "cut",
        "eager",
        "encoding",
        "layer_arguments",
        "errors",
        "guard",
        "hf_compat",
        "device_copy",
        "installed",
        "ledger",
    }
    | {"prefill", "probe", "pruners", "refusals", "unwrap", "vision_probe", "vlms"},
    "prefix": {"cut", "encoding", "errors", "hf_compat", "installed", "probe", "pruners", "vision_probe", "vlms"},
    "embedded": {"embedded", "errors", "versions"},
    "bench": {"embedded"},
    "lmms": {
        "lmms",
        "prefix",
        "embedded",
        "budget",
        "cost",
        "durable",
        "errors",
        "hook",
        "ledger",
        "pruners",
        "redact",
        "store",
        "timing",
        "types",
        "vision_probe",
    }
    | {"hf_compat", "versions", "vlms", ""},
    "method_table": {"pruners"},
    "store": {"store", "durable", "errors", "ledger", "redact"},
    "sweep": {"sweep", "store", "lmms", "embedded", "budget", "cost", "durable", "exit_codes", "errors", "ledger", "pruners"}
    | {"method_table", "selftest", "redact", "timing", "versions", "vlms", ""},
    "speed": {
        "speed",
        "stdout",
        "prefix",
        "embedded",
        "budget",
        "cost",
        "exit_codes",
        "errors",
        "hf_compat",
        "hook",
        "ledger",
        "lmms",
        "pruners",
        "redact",
        "store",
        "sweep",
        "timing",
        "types",
        "vlms",
    }
    | {""},
    "report": {"report", "stdout", "store", "sweep", "vlms", "budget", "cost", "errors", "redact", ""},
    "doctor": {"doctor", "stdout", "selftest", "versions", "embedded", "errors", "lmms", "redact", "sweep", ""},
    "reproduce": {"reproduce", "report", "store", "sweep", "lmms", "pruners", "errors", "redact", ""},
}
# what a part of report may import of report: from reading over numbers to tables and pictures, and from those to formats
INSIDE_REPORT = {
    "current": set(),
    "printing": {"build", "contents", "current", "load", "writers"},
    "answer_arrays": set(),
    "load": {"answer_arrays"},
    "rows": {"load"},
    "text": {"rows"},
    "stats": {"stats", "answer_arrays", "load", "rows"},
    "paper": {"paper", "load", "rows"},
    "geometry": {"geometry"},
    "tables": {"tables", "stats", "paper", "load", "rows", "text"},
    "contents": {"tables", "stats", "paper", "load", "rows"},
    "figures": {"figures", "stats", "load", "rows", "text"},
    "show": {"show", "answer_arrays", "geometry", "load"},
    "writers": {"writers", "contents", "tables", "figures", "show", "stats", "paper", "load", "rows", "text"},
    "check": {"load"},
    "build": {"writers", "contents", "figures", "show", "paper", "load"},
    "__init__": {"build", "check"},
}
FORBIDDEN = {
    "redact": {"torch", "transformers", "lmms_eval"},
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
FILES = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py"))}
PUBLIC = {"get_pruner", "prune", "keep_count", "__version__"}
ANY = {"__init__", "__main__", "cli"}  # at the top, which may import what they like


def imported(path: Path, *, lazy: bool) -> set[str]:
    """Full names that a file imports, for type checkers too; with `lazy`, also those inside functions."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazy else [node for top in tree.body for node in (top.body if isinstance(top, ast.If) else [top])]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; spell it out"
            in_package = (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if in_package else {node.module}
    return found


def arrows(names: set[str], of: str = NAME) -> set[str]:
    """The parts of `of` that are among these names."""
    return {name.removeprefix(f"{of}.").split(".")[0] for name in names if name.startswith(f"{of}.")}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Names that depend on each other in a circle, sorted; none if the arrows can be put in order."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return sorted(set(error.args[1]))
    return []


def test_no_circle_closes():
    """In the whole package, imports inside functions and for type checkers included."""
    paths = sorted(PACKAGE.rglob("*.py"))
    names = [".".join([NAME, *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__") for path in paths]
    known = set(names)
    found = {}
    for name, path in zip(names, paths, strict=True):
        modules = {full if full in known else full.rpartition(".")[0] for full in imported(path, lazy=True)}
        found[name] = (modules & known) - {name}
    assert "vlm_pruner_eval.vlms.family" in found["vlm_pruner_eval.vlms.parts.anyres"]
    assert circle(found) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c"]


def test_no_arrow_points_up():
    wrong = []
    for path, parts in FILES.items():
        if parts[0] in ANY:
            continue
        ours, outside = arrows(imported(path, lazy=True)) - PUBLIC, {name.split(".")[0] for name in imported(path, lazy=False)}
        wrong += [f"{path}: {parts[0]} is not in ALLOWED"] if parts[0] not in ALLOWED else []
        wrong += [f"{path}: imports {name}" for name in sorted(ours - ALLOWED.get(parts[0], set()))]
        forbidden = FORBIDDEN.get(parts[0], set()) | FORBIDDEN.get(".".join(parts), set())
        wrong += [f"{path}: imports {name}" for name in sorted(outside & forbidden)]
    assert wrong == []


def test_no_arrow_points_up_inside_report():
    wrong = []
    for path, parts in FILES.items():
        if parts[0] == "report":
            assert parts[1] in INSIDE_REPORT, f"{parts[1]} is not in report: say in this table what it may import"
            found = arrows(imported(path, lazy=True), f"{NAME}.report")
            wrong += [f"{path}: imports {name}" for name in sorted(found - INSIDE_REPORT[parts[1]])]
    assert wrong == []


def test_the_tables_would_notice(tmp_path):
    for_types = "if TYPE_CHECKING:\n    import transformers\n"
    (tmp_path / "bad.py").write_text(f"{for_types}from vlm_pruner_eval.sweep import grid\nfrom vlm_pruner_eval import hook\n")
    assert imported(tmp_path / "bad.py", lazy=False) == imported(tmp_path / "bad.py", lazy=True)
    names = imported(tmp_path / "bad.py", lazy=True)
    assert names == {"transformers", "vlm_pruner_eval.sweep.grid", "vlm_pruner_eval.hook"}
    assert arrows(names) == {"sweep", "hook"}


def test_every_part_of_report_has_a_name_of_its_own():
    """What was a file and is a package now must not be both: the package would hide the file."""
    names = [path.stem for path in (PACKAGE / "report").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert sorted(names) == sorted(INSIDE_REPORT)


def test_files_are_short_enough_to_be_read_in_one_go():
    assert [path for path in FILES if len(path.read_text().splitlines()) > MOST_LINES] == [], "split them"


def test_light_modules_do_not_load_torch():
    for part in (
        "",
        ".budget",
        ".cost",
        ".lmms.plugin",
        ".sweep.config",
        ".cli",
        ".report.geometry.views",
        ".store.folder",
        ".sweep.status",
    ):
        code = f"import sys, {NAME}{part}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0, part


def test_data_files_are_installed_too() -> None:
    """setup.cfg ships data files of packages only: a folder without __init__.py would be missing from an installation."""
    suffixes = {".csv", ".jinja", ".json", ".parquet", ".safetensors", ".typed", ".yaml"}
    data = [path for path in PACKAGE.rglob("*") if path.suffix in suffixes]
    assert {path.suffix for path in data} == suffixes
    assert not [str(path) for path in data if not (path.parent / "__init__.py").is_file()]


def test_every_file_has_a_name_of_its_own():
    times = Counter(path.name for path in FILES if path.name != "__init__.py")
    assert [name for name, n in times.items() if n > 1] == []
