"""tables/*.csv: one number a field, for spreadsheets and programs."""

from __future__ import annotations

import re
from typing import Any

from vlm_pruner_eval.report.tables.table import Table

_FORMULA = re.compile(r"\s*(?:[=+@]|-(?![\d.]))")


def comma_separated(table: Table) -> str:
    """Write a table as CSV: one line an item, empty fields without a number."""
    from pandas import DataFrame

    records = [{name: _field(value) for name, value in record.items()} for record in table.records()]
    return DataFrame(records, dtype=object).to_csv(index=False, lineterminator="\n")


def _field(value: Any) -> Any:
    """Join what is several; a spreadsheet takes text that begins like a formula for one, and carries it out."""
    if isinstance(value, (tuple, list)):
        value = " ".join(map(str, value))
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value
