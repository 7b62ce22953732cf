"""Reports: the same records as Markdown and tables for people, JSON and CSV for programs, and the regression gate.

From a results directory to its report: `load` and `documents` read it, `rows` makes the lines of the table, `stats`, `efficiency` and
`paper` say what they mean, `sheets` lays tables out, `figures` and `show` draw, and `html`, `markdown`, `latex`, `tidy` and `terminal`
write all of it, each in one format. `build` calls them; `check` is the gate.
"""

from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.report.check import check, write_reference

__all__ = ["build", "check", "write_reference"]
