"""Reports: the same records as Markdown and tables for people, JSON and CSV for programs, and the regression gate."""

from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.report.check import check, write_reference

__all__ = ["build", "check", "write_reference"]
