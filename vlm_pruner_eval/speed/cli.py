"""`vlm-pruner-eval bench`: measured speed. A table for people, then one JSON object as the last line on stdout."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_pruner_eval.errors import ConfigError

BAD_INPUT = 2
WIDTH = 120

app = typer.Typer(no_args_is_help=True, help="Measure speed and memory on this machine; needs no model and no download.")


@app.callback()
def bench() -> None:
    """Keep `selection` a command of its own while it is the only one."""


@app.command()
def selection(
    methods: Annotated[str, typer.Option(help="Only these methods: a,b,c; default: all that have a rule.")] = "",
    sizes: Annotated[str, typer.Option(help="Numbers of visual tokens.")] = "576,1280,2304,2880",
    repeats: Annotated[int, typer.Option(help="Calls of each case in each of three rounds.")] = 8,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the JSON object to this file too.")] = None,
) -> None:
    """Time of selection and memory of every method, beside the broadcast cosine of the VLM-Pruner release. Exit code 2 for bad input."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notices on stderr; it reads this when torch is loaded
    from vlm_pruner_eval.speed import machine
    from vlm_pruner_eval.speed.selection import bench_selection

    try:
        with machine.threads(threads):
            result = bench_selection(
                [name.strip() for name in methods.split(",") if name.strip()],
                whole_numbers("--sizes", sizes),
                repeats,
                progress=lambda line: print(line, file=sys.stderr, flush=True),
            )
            print_selection(result)
            machine.write_json(result, out)
    except ConfigError as error:
        for problem in error.problems:
            print(f"vlm-pruner-eval: {problem}", file=sys.stderr)
        raise typer.Exit(BAD_INPUT) from None


def whole_numbers(option: str, text: str) -> list[int]:
    """The numbers of "576,1280".

    Raises
    ------
    ConfigError
        Something else than whole numbers with commas between them.
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option}: got {text!r}, expected whole numbers with commas between them, such as 576,1280.") from None


def print_selection(result: dict[str, Any]) -> None:
    """The rows as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

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


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
