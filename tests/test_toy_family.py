"""Adding a family takes one file in vlms/ and one entry in tests/tiny_models.py, as for one that lies among the tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
# registered; answers as plain generate does, singly and in batches, and prunes as asked; its tokens found on the pixels
SHOWN = {
    "test_the_family_of_a_model_is_found_by_its_type",
    "test_the_plain_method_answers_as_generate_does_and_rate_zero_as_the_plain_method",
    "test_batched_answers_equal_single_ones_and_what_was_asked_was_kept",
    "test_the_token_that_changes_is_the_one_whose_rectangle_was_painted",
}
FILES = ("test_vlms.py", "test_lmms_families.py", "test_report_geometry.py")


def test_the_tests_of_every_family_hold_for_a_new_one_without_another_line() -> None:
    """In a process of its own: a registration can't be taken back. The plugin toy_family.py makes the two additions."""
    options = ["-v", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "toy_family", "-k", f"vipllava and ({' or '.join(SHOWN)})"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", *options, *(str(TESTS / file) for file in FILES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout
    assert set(re.findall(r"::(\w+)\[.*vipllava.*\] PASSED", done.stdout)) == SHOWN
