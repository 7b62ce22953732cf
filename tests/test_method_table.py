from __future__ import annotations

import dataclasses
import subprocess
import sys

from vlm_pruner_eval.method_table import method_table
from vlm_pruner_eval.pruners import Pruner, list_pruners, pruner_class, settings_of


def test_the_table_read_from_the_sources_is_that_of_the_classes() -> None:
    assert method_table() == {name: settings_of(name) for name in list_pruners()}
    assert pruner_class("none").without_effect == {field.name for field in dataclasses.fields(Pruner)}


def test_listing_methods_imports_no_torch() -> None:
    code = "import sys; from vlm_pruner_eval import cli; cli.app(['list'], standalone_mode=False); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "vlmpruner" in done.stdout and "vlmpruner_qwen3_vl" in done.stdout
