"""Reports: the same records as Markdown and tables for people, JSON and CSV for programs, and the regression gate.

From a results directory to its report: `load` and `documents` read it, `rows` makes the lines of the table with their costs, `stats` and
`paper` compare them, and `contents` holds the outcome. `tables` is the only layout: `tables/columns.py` has an entry for every column,
`tables/layout.py` the lines and the words of every table. `writers` walk these tables, a file for each format; `figures` and `show`
draw. `build` calls them; `check` is the gate.
"""

from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.report.check import check, write_reference

__all__ = ["build", "check", "write_reference"]
