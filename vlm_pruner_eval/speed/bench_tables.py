"""Tables for people of the benchmarks' results: the columns of the JSON that say most, see results/bench/README.md."""

from __future__ import annotations

from typing import Any

import pandas as pd

# benchmark -> list in its result -> fields of a line, dots between levels
COLUMNS = {
    "answering": {"rounds": "", "ratios": ""},
    "selection": {
        "rows": "device n_visual method pruning_rate n_kept select.ms select.noise yardstick_ratio select_batch.ms "
        "batch_yardstick_ratio peak_bytes",
        "yardstick": "device n_visual ms noise skipped",
    },
    "prefill": {
        "rows": "batch method pruning_rate n_kept ttft.ms llm_prefill.ms llm_prefill.noise selection_ms decode.ms",
        "rows, unpruned over pruned": "batch method pruning_rate ttft_speedup llm_speedup bound_speedup "
        "of_bound_speedup over_bound own_time.llm_speedup decode_speedup peak_extra_bytes",
        "limits": "batch matmul_tflops copy_gb_per_s",
        "overhead": "batch hook same_tokens prefill decode prefill_cpu decode_cpu",
    },
    "profile": {"rows": ""},
    "grid": {"rounds": "separate_ms together_ms"},
    "shared": {"rounds": "separate.wall_s separate.cpu_s shared.wall_s shared.cpu_s"},
}
FACTS = ("geometry", "image", "n_text", "layer", "config", "runs", "samples", "documents", "most_rows", "ratio", "different", "failed")


def print_result(result: dict[str, Any]) -> None:
    """Print a table for every list of the result, then its most important single values; no choice means all fields."""
    for title, chosen in COLUMNS[result["benchmark"]].items():
        table = pd.json_normalize(result[title.partition(",")[0]])
        if chosen:
            table = table.reindex(columns=[name for name in chosen.split() if name in table])
        lines = table if chosen else table.T  # a column for every case where there are many fields
        options = {"index": not chosen, "header": bool(chosen), "na_rep": "", "float_format": "{:.4g}".format}
        print(f"{title}\n{lines.to_string(**options)}\n")
    print(", ".join(f"{name}: {result[name]}" for name in FACTS if name in result))
