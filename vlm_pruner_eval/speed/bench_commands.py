"""`vlm-pruner-eval bench`: measured speed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.exit_codes import FAILED, sentences
from vlm_pruner_eval.redact import short
from vlm_pruner_eval.stdout import AsJson, stdout

app = typer.Typer(no_args_is_help=True, help="Measure speed and memory here; needs no model and no download.")


@app.callback()
def bench() -> None:
    """Silence the profiler's notices on stderr; torch reads this when it is loaded."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def _writable(out: Path | None) -> Path | None:
    """Refuse a file that can't be written before anything is measured."""
    if out is None:
        return None
    nearest = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if out.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"{out} can't be written: a folder, or in none that can be; choose another place.")
    return out


GeometryName = Annotated[str, typer.Option(help="llava-1.5-7b, llava-1.5-13b, llava-next-7b, qwen2-vl-7b, 100m, mini.")]
BatchSizes = Annotated[str, typer.Option(help="Batch sizes.")]
TextTokens = Annotated[int, typer.Option(help="Words of the prompt around the image.")]
NewTokens = Annotated[int, typer.Option(help="Tokens to generate.")]
Repeats = Annotated[int, typer.Option(help="Answers of each case in each of three rounds.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16, bfloat16; default: float16 on a GPU, else float32.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU if there is one.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
Out = Annotated[Path | None, typer.Option(help="Write the JSON object to this file too.", callback=_writable)]


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
    """Time and memory of every method's selection, beside the broadcast cosine of the VLM-Pruner release."""
    from vlm_pruner_eval.speed.bench_selection import bench_selection

    numbers = _whole_numbers("--sizes", sizes)
    _measure(lambda: bench_selection(_words(methods), numbers, repeats), threads, out, as_json)


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
    """Time to first token, prefill, decoding, memory of a model of real size, beside the machine's limit."""
    from vlm_pruner_eval.speed.bench_prefill import bench_prefill
    from vlm_pruner_eval.speed.bench_setup import Setup

    prompt = {"n_text": text_tokens, "n_new": new_tokens, "batch_sizes": _whole_numbers("--batch-sizes", batch_sizes)}
    setup = Setup(geometry=geometry, **prompt, repeats=repeats, dtype=dtype, device=device)
    _measure(lambda: bench_prefill(setup, _words(methods), _words(rates)), threads, out, as_json)


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
    """Parts of the time of an answer: vision, layers before and behind the cut, selection, decoding, the host."""
    from vlm_pruner_eval.speed.bench_prefill import bench_profile
    from vlm_pruner_eval.speed.bench_setup import Setup

    prompt = {"n_text": text_tokens, "n_new": new_tokens, "batch_sizes": _whole_numbers("--batch-sizes", batch_sizes)}
    setup = Setup(geometry=geometry, **prompt, repeats=repeats, dtype=dtype, device=device)
    _measure(lambda: bench_profile(setup, method, rate), threads, out, as_json)


@app.command()
@sentences
def grid(
    geometry: GeometryName = "mini",
    methods: Annotated[str, typer.Option(help="Methods: a,b,c; default: all that prune inside the model.")] = "",
    rates: Annotated[str, typer.Option(help="Pruning rates.")] = "2/3,7/9,8/9",
    documents: Annotated[int, typer.Option(help="Batches of prompts.", min=1)] = 4,
    batch_size: Annotated[int, typer.Option(help="Documents of a batch.", min=1)] = 1,
    rows: Annotated[int, typer.Option(help="Most rows of a batch of several methods.", min=1)] = 64,
    text_tokens: TextTokens = 64,
    new_tokens: NewTokens = 8,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time of a grid of methods over the same documents: one generate for each, beside one for all that cut alike."""
    from vlm_pruner_eval.speed.bench_grid import METHODS, bench_grid
    from vlm_pruner_eval.speed.bench_setup import Setup

    setup = Setup(geometry=geometry, n_text=text_tokens, n_new=new_tokens, batch_sizes=[batch_size], dtype=dtype, device=device)
    _measure(lambda: bench_grid(setup, _words(methods) or METHODS, _words(rates), documents, rows), threads, out, as_json)


@app.command()
@sentences
def shared(
    config: Annotated[Path, typer.Option(help="The sweep file with the grid.")] = Path("configs/quickstart.yaml"),
    limit: Annotated[int, typer.Option(help="Questions per task.")] = 20,
    rounds: Annotated[int, typer.Option(help="Rounds of both ways; the median ratio is reported.")] = 3,
    threads: Threads = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time a sweep with a shared prefix beside separate runs. Exit code 1 if a run failed or an answer differs."""
    from vlm_pruner_eval.sweep.progress import quieten

    quieten()
    from vlm_pruner_eval.speed.bench_shared import bench_shared
    from vlm_pruner_eval.sweep import config as sweep_config
    from vlm_pruner_eval.sweep.grid import method_problems

    loaded = sweep_config.load(config, overrides={"limit": limit}, check=method_problems)
    result = _measure(lambda: bench_shared(loaded, rounds), threads, out, as_json)
    if result["failed"] or result["different"]:
        raise typer.Exit(FAILED)


@app.command()
@sentences
def answering(
    geometry: GeometryName = "mini",
    checkpoint: Annotated[Path, typer.Option(help="Folder for the random checkpoint: 14 GB for llava-1.5-7b in float16.")] = Path("output"),
    task: Annotated[str, typer.Option(help="A packaged task.")] = "digitscenes_read",
    limit: Annotated[int, typer.Option(help="Questions.", min=1)] = 96,
    batch_size: Annotated[int, typer.Option(help="Questions of a batch.", min=1)] = 8,
    methods: Annotated[str, typer.Option(help="Methods beside the unpruned model: a,b,c.")] = "vlmpruner,fastv,divprune",
    rate: Annotated[str, typer.Option(help="The pruning rate.")] = "8/9",
    rounds: Annotated[int, typer.Option(help="Rounds; the median ratio is reported.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of the checkpoint.")] = "float16",
    threads: Threads = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Seconds that lmms-eval takes to answer, pruned beside unpruned, end to end. Exit code 1 if a run failed."""
    from vlm_pruner_eval.sweep.progress import quieten

    quieten()
    from vlm_pruner_eval.speed.bench_answering import bench_answering, write_checkpoint
    from vlm_pruner_eval.sweep.config import validate

    path = write_checkpoint(geometry, checkpoint, dtype)
    model = {"id": "vlmpruner_llava", "pretrained": str(path), "batch_size": batch_size}
    raw = {"name": "answering", "model": model, "tasks": [task], "limit": limit, "pruning_rates": [rate], "methods": _words(methods)}
    result = _measure(lambda: bench_answering(validate(raw), rounds), threads, out, as_json)
    if result["failed"]:
        raise typer.Exit(FAILED)


def _measure(run: Callable[[], dict[str, Any]], n_threads: int, out: Path | None, as_json: bool) -> dict[str, Any]:
    """Run a benchmark with so many threads; write its result into the file that was named, and print it.

    Raises
    ------
    ConfigError
        The file can't be written.
    """
    from vlm_pruner_eval.speed.bench_tables import print_result
    from vlm_pruner_eval.speed.measuring import threads

    with stdout(as_json) as printed, threads(n_threads):
        result = run()
        if not as_json:
            print_result(result)
        printed.add(result)
        if out is not None:
            try:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--out: {out} can't be written ({error}); choose another place.") from error
    return result


def _words(text: str) -> list[str]:
    """Return the parts of "a,b,c"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _whole_numbers(option: str, text: str) -> list[int]:
    """Return the numbers of "576,1280".

    Raises
    ------
    ConfigError
        Something else than whole numbers with commas between them.
    """
    parts = _words(text)
    if not all(re.fullmatch("-?[0-9]{1,9}", part) for part in parts):
        raise ConfigError(f"{option}: got {short(text)}, expected whole numbers with commas between, such as 8,16.")
    return [int(part) for part in parts]
