"""Results of benchmarks as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 160


def print_selection(result: dict[str, Any]) -> None:
    """The rows as a table."""
    columns = ("device", "V", "method", "removed", "kept", "select ms", "IQR", "noise", "yardstick x", "plain x", "peak MB", "in [V, V]")
    table = Table(*columns, box=None, pad_edge=False)
    for row in result["rows"]:
        select = row["select"]
        table.add_row(
            row["device"],
            str(row["n_visual"]),
            escape(row["method"]),
            f"{row['pruning_rate']:.1%}",
            str(row["n_kept"]),
            f"{select['ms']:.2f}",
            f"{select['iqr_ms']:.2f}",
            f"{select['noise']:.0%}",
            _times(row["yardstick_ratio"]),
            _times(row["plain_ratio"]),
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['peak_in_matrices']:.2f}",
        )
    console = Console(width=WIDTH)
    console.print(table)
    for yardstick in result["yardstick"]:
        shown = f"{yardstick['ms']:.0f} ms" if yardstick["ms"] is not None else f"not run: {yardstick['skipped']}"
        console.print(f"yardstick on {yardstick['device']}, {yardstick['n_visual']} tokens: {shown}", highlight=False, markup=False)
    console.print(
        "yardstick x: the release's broadcast cosine over select. plain x: a plain formulation of the same rule over the rule alone. "
        "Peak: tensors made during select, its answer included, also as a multiple of a [V, V] float32 matrix.",
        highlight=False,
        markup=False,
    )


def print_prefill(result: dict[str, Any]) -> None:
    """The rows as a table, then the limits and the overhead."""
    columns = ("batch", "method", "removed", "kept", "TTFT ms", "LLM ms", "select ms", "decode ms", "noise", "KV MB", "peak MB")
    table = Table(*columns, "TTFT x", "LLM x", "bound x", "of it", "over", "own x", "over", box=None, pad_edge=False)
    for row in result["rows"]:
        table.add_row(
            *(str(row["batch"]), escape(row["method"]), row["pruning_rate"] or "", str(row["n_kept"])),
            *(f"{row['ttft']['ms']:.1f}", f"{row['llm_prefill']['ms']:.1f}", f"{row['selection_ms']:.1f}", f"{row['decode']['ms']:.2f}"),
            *(f"{row['llm_prefill']['noise']:.0%}", f"{row['kv_bytes'] / 1e6:.1f}", f"{row['peak_extra_bytes'] / 1e6:.0f}"),
            *(f"{row['ttft_speedup']:.2f}", f"{row['llm_speedup']:.2f}", f"{row['bound_speedup']:.2f}", f"{row['of_bound_speedup']:.0%}"),
            f"{row['over_bound']:.2f}",
            *(f"{own[name]:.2f}" if (own := row["own_time"]) else "" for name in ("llm_speedup", "over_bound")),
        )
    console = Console(width=WIDTH)
    console.print(table)
    for limit in result["limits"]:
        rates = f"{limit['matmul_tflops']:.3f} TFLOP/s in matrix products, {limit['copy_gb_per_s']:.1f} GB/s"
        _say(console, f"limits at batch {limit['batch']}: {rates}")
    for line in result["overhead"]:
        of_process = f"of the process's own time {line['prefill_cpu'] - 1:+.1%} and {line['decode_cpu'] - 1:+.1%}"
        same = "same tokens" if line["same_tokens"] else "OTHER TOKENS"
        _say(
            console,
            f"hook that prunes nothing ({line['hook']}, batch {line['batch']}): prefill {line['prefill'] - 1:+.1%}, "
            f"decode {line['decode'] - 1:+.1%}; {of_process}; {same}",
        )
    _say(
        console,
        f"{result['geometry']}: {result['image']}, {result['n_text']} words. x: unpruned over pruned, medians of pairs. bound: least time "
        "by matrix products and weights; of it: speed-up over the bound's; over: time over bound. LLM: prefill of the language model, "
        "selection in it; own: the same in the process's own time. Peak: beyond the weights.",
    )


def print_profile(result: dict[str, Any]) -> None:
    """A column for every case, a line for every part with its share of the time to the first token."""
    rows = result["rows"]
    table = Table("ms", *(escape(f"batch {row['batch']} {row['method']}") for row in rows), box=None, pad_edge=False)
    for part in rows[0]["parts_ms"]:
        shown = (
            f"{ms:.2f}" if part.startswith("decode") else f"{ms:.1f} ({ms / row['ttft_ms']:.0%})"
            for row in rows
            for ms in [row["parts_ms"][part]]
        )
        table.add_row(part, *shown)
    table.add_row("time to first token", *(f"{row['ttft_ms']:.1f}" for row in rows))
    console = Console(width=WIDTH)
    console.print(table)
    _say(console, f"{result['geometry']}: {result['image']}, {result['n_text']} words; K = {result['layer']}.")


def print_questions(result: dict[str, Any]) -> None:
    """A line for every batch size and number of threads."""
    columns = "batch", "workers", "questions/s", "x of batch 1", "x of workers", "noise", "prefill ms", "answers that differ"
    table = Table(*columns, "kept sets that differ", box=None, pad_edge=False)
    for row in result["rows"]:
        differ = str(row["answers_that_differ"]), str(row["kept_sets_that_differ"])
        speed = f"{row['questions_per_s']:.2f}", f"{row['speedup']:.2f}", f"{row['workers_speedup']:.2f}", f"{row['noise']:.0%}"
        table.add_row(str(row["batch_size"]), str(row["workers"]), *speed, f"{row['prefill_ms']:.1f}", *differ)
    Console(width=WIDTH).print(table)


def print_shared(result: dict[str, Any]) -> None:
    """A line for every round, then what differs."""
    table = Table("round", "separate s", "shared s", "shared / separate", box=None, pad_edge=False)
    for number, timed in enumerate(result["rounds"], start=1):
        times = [timed[way]["wall_s"] for way in ("separate", "shared")]
        table.add_row(str(number), *(f"{time:.0f}" for time in times), f"{times[1] / times[0]:.2f}")
    console = Console(width=WIDTH)
    console.print(table)
    _say(
        console,
        f"{result['config']}: {result['runs']} runs, {result['samples']} answers in each round; median ratio {result['ratio']:.2f}; "
        f"{result['different']} answers or scores differ, {result['failed']} runs failed.",
    )


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
