"""Tell if the report of a results directory is newer than all that it is made of."""

from __future__ import annotations

import itertools
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_LAST_WRITTEN = ("report.md", "report.json", "report.html", "tables/scores.csv")


def current_report(results_dir: Path) -> Path | None:
    """Return the report of a sweep, or None if records, noise floor or this package changed since it was written."""
    written = [results_dir / name for name in _LAST_WRITTEN]
    if not all(path.is_file() and path.stat().st_size for path in written):
        return None
    made_of = itertools.chain(
        [results_dir / "sweep.json"], results_dir.glob("*.json"), results_dir.glob("runs/*/*/record.json"), _PACKAGE.rglob("*.*")
    )
    sources = [path for path in made_of if path not in written and "__pycache__" not in path.parts]
    newest = max(path.stat().st_mtime_ns for path in sources)
    return written[0] if newest <= min(path.stat().st_mtime_ns for path in written) else None
