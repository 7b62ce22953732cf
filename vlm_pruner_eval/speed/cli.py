"""`vlm-pruner-eval bench`: measured speed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_pruner_eval.ending import FAILED, sentences
from vlm_pruner_eval.speed.options import (
    BatchSizes,
    Device,
    Dtype,
    GeometryName,
    NewTokens,
    Out,
    Repeats,
    TextTokens,
    Threads,
    pixels,
    progress,
    whole_numbers,
    words,
)
from vlm_pruner_eval.stdout import AsJson, Stdout, stdout

app = typer.Typer(no_args_is_help=True, help="Measure speed and memory on this machine; needs no model and no download.")


@app.command()
@sentences
def selection(
    methods: Annotated[str, typer.Option(help="Only these methods: a,b,c; default: all that have a rule.")] = "",
    sizes: Annotated[str, typer.Option(help="Numbers of visual tokens.")] = "576,1280,2304,2880",
    repeats: Annotated[int, typer.Option(help="Calls of each case in each of three rounds.")] = 8,
    threads: Threads = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time of selection and memory of every method, beside the broadcast cosine of the VLM-Pruner release. Exit code 2 for bad input."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notices on stderr; it reads this when torch is loaded
    from vlm_pruner_eval.speed import machine, show
    from vlm_pruner_eval.speed.selection import bench_selection

    with stdout(as_json) as printed, machine.threads(threads):
        result = bench_selection(words(methods), whole_numbers("--sizes", sizes), repeats, progress=progress)
        _give(result, out, printed, show.print_selection)


@app.command()
@sentences
def prefill(
    geometry: GeometryName = "mini",
    methods: Annotated[str, typer.Option(help="Methods: a,b,c")] = "vlmpruner,divprune",
    rates: Annotated[str, typer.Option(help="Pruning rates.")] = "0.667,0.889",
    batch_sizes: BatchSizes = "1,8",
    text_tokens: TextTokens = 64,
    new_tokens: NewTokens = 8,
    repeats: Repeats = 3,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time to first token, prefill, decoding and memory of a model of real size with random weights, beside the machine's limit."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notices on stderr; it reads this when torch is loaded
    from vlm_pruner_eval.speed import machine, show
    from vlm_pruner_eval.speed.prefill import bench_prefill

    options = _options(batch_sizes, text_tokens, new_tokens, repeats, dtype, device)
    with stdout(as_json) as printed, machine.threads(threads):
        result = bench_prefill(geometry, words(methods), words(rates), **options, progress=progress)
        _give(result, out, printed, show.print_prefill)


@app.command()
@sentences
def profile(
    geometry: GeometryName = "mini",
    method: Annotated[str, typer.Option(help="The method that prunes.")] = "vlmpruner",
    rate: Annotated[str, typer.Option(help="The pruning rate.")] = "0.889",
    batch_sizes: BatchSizes = "1",
    text_tokens: TextTokens = 64,
    new_tokens: NewTokens = 8,
    repeats: Repeats = 3,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Where the time of an answer goes: vision, layers before and behind the cut, selection, decoding, the host."""
    from vlm_pruner_eval.speed import machine, show
    from vlm_pruner_eval.speed.prefill import bench_profile

    options = _options(batch_sizes, text_tokens, new_tokens, repeats, dtype, device)
    with stdout(as_json) as printed, machine.threads(threads):
        result = bench_profile(geometry, method, rate, **options)
        _give(result, out, printed, show.print_profile)


@app.command()
@sentences
def questions(
    batch_sizes: BatchSizes = "1,4,8,16",
    method: Annotated[str, typer.Option(help="The method that prunes; none: the plain model.")] = "vlmpruner",
    rate: Annotated[str, typer.Option(help="The pruning rate; not used by none and blind.")] = "8/9",
    limit: Annotated[int, typer.Option(help="Questions of each of the six tasks.")] = 8,
    workers: Annotated[str, typer.Option(help="Threads that make prompts ahead of the model; the first is compared with.")] = "0,2",
    image_size: Annotated[str, typer.Option(help="Enlarge the pictures, for example to 4000x3000, so that decoding counts.")] = "",
    device: Device = None,
    threads: Threads = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Questions per second of the embedded model through the lmms-eval wrapper. Exit code 1 if a batch answers differently from batch 1."""
    from vlm_pruner_eval.speed import machine, show
    from vlm_pruner_eval.speed.questions import bench_questions

    asked = None if method in {"none", "blind"} else rate
    with stdout(as_json) as printed, machine.threads(threads):
        options = {
            "workers": whole_numbers("--workers", workers),
            "image_size": pixels("--image-size", image_size) if image_size else None,
            **{"method": method, "rate": asked, "limit": limit, "device": device, "progress": progress},
        }
        result = bench_questions(whole_numbers("--batch-sizes", batch_sizes), **options)
        _give(result, out, printed, show.print_questions)
        if not result["same_answers"]:
            raise typer.Exit(FAILED)


@app.command()
@sentences
def shared(
    config: Annotated[Path, typer.Option(help="The sweep file whose grid is measured.")] = Path("configs/quickstart.yaml"),
    limit: Annotated[int, typer.Option(help="Questions per task.")] = 20,
    rounds: Annotated[int, typer.Option(help="How often both ways are run; the median ratio is reported.")] = 3,
    threads: Threads = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time a sweep whose runs share what precedes their cuts beside separate runs. Exit code 1 if a run failed or an answer differs."""
    from vlm_pruner_eval.sweep.progress import quieten

    quieten()
    from vlm_pruner_eval.speed import machine, show
    from vlm_pruner_eval.speed.shared import bench_shared
    from vlm_pruner_eval.sweep import config as sweep_config
    from vlm_pruner_eval.sweep.grid import method_problems

    loaded = sweep_config.load(config, overrides={"limit": limit}, check=method_problems)
    with stdout(as_json) as printed, machine.threads(threads):
        result = bench_shared(loaded, rounds, progress=progress)
        _give(result, out, printed, show.print_shared)
        if result["failed"] or result["different"]:
            raise typer.Exit(FAILED)


def _give(result: dict[str, Any], out: Path | None, printed: Stdout, show: Callable[[dict[str, Any]], None]) -> None:
    """Write the result into the file that was named, and print it: a table, or the JSON document."""
    from vlm_pruner_eval.speed import machine

    if not printed.as_json:
        show(result)
    machine.write_json(result, out)
    printed.add(result)


def _options(batch_sizes: str, n_text: int, n_new: int, repeats: int, dtype: str | None, device: str | None) -> dict[str, Any]:
    sizes = {"batch_sizes": whole_numbers("--batch-sizes", batch_sizes), "n_text": n_text, "n_new": n_new, "repeats": repeats}
    return {**sizes, "dtype": dtype, "device": device}
