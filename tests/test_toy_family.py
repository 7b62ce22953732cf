"""Adding a family takes one file in vlms/ and one entry in tests/tiny_models.py: shown with one that lies among the tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
# registered; answers as plain generate does, singly and in batches, and prunes as asked; its tokens found on the pixels
SHOWN = "vipllava and (found_by_its_type or plain_method or batched_answers or was_painted)"
FILES = ("test_vlms.py", "test_lmms_families.py", "test_report_geometry.py")


def test_the_tests_of_every_family_hold_for_a_new_one_without_another_line() -> None:
    """In a process of its own: a registration can't be taken back. The plugin toy_family.py makes the two additions."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "toy_family", "-k", SHOWN]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, *(str(TESTS / file) for file in FILES)], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 8
    assert "skipped" not in done.stdout
