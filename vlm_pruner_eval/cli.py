"""The command line `vlm-pruner-eval`. Light to import; torch is loaded by commands that need it."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.exit_codes import FAILED, sentences
from vlm_pruner_eval.speed.bench_commands import app as bench_app
from vlm_pruner_eval.stdout import AsJson, Stdout, stdout
from vlm_pruner_eval.sweep.commands import command_with

if TYPE_CHECKING:
    from vlm_pruner_eval.sweep.config import SweepConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Evaluate visual-token pruning in vision-language models.",
)
app.add_typer(bench_app, name="bench")
sweep_app = typer.Typer()  # commands beside `sweep FILE`


def main() -> None:
    """Entry point of the console script."""
    app()


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(versions_line())
        raise typer.Exit


def versions_line() -> str:
    """Return the versions of this package and of what answers depend on, on one line; imports none of them."""
    from vlm_pruner_eval import __version__

    found = [f"vlm-pruner-eval {__version__}"]
    for package in ("torch", "transformers", "lmms-eval"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} is not installed")
    return ", ".join(found)


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and end.")] = False,
) -> None:
    """Evaluate visual-token pruning in vision-language models."""


@sweep_app.command("status")
@sentences
def sweep_status(
    directory: Annotated[Path, typer.Argument(help="A results directory written by `sweep`.")],
    as_json: AsJson = False,
) -> None:
    """Show how far a sweep is: every run's state and answers, and which process is at work. Exit code 2 if there is no sweep."""
    from vlm_pruner_eval.sweep.status import print_status, read_status

    with stdout(as_json) as out:
        found = read_status(directory)
        print_status(out.console(), found)
        out.add(found.as_json())


@app.command(cls=command_with(sweep_app))
@sentences
def sweep(
    config: Annotated[Path, typer.Argument(help="A sweep file (YAML), for example configs/quickstart.yaml.")],
    output: Annotated[Path | None, typer.Option(help="Results directory; default: the file's `output`, else ./output/NAME.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per task, instead of the file's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the grid and stop: nothing is loaded or written.")] = False,
    share_prefix: Annotated[
        bool | None,
        typer.Option(help="Compute what precedes the cuts once for all runs: same answers, sooner, without times; default: the file's."),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run those that failed, and only those.")] = False,
    rerun: Annotated[str | None, typer.Option(metavar="METHOD", help="Answer a method's runs anew, besides what is left.")] = None,
    executor: Annotated[str | None, typer.Option(help="What makes the runs: local (default), one process per visible GPU; or ray.")] = None,
    processes: Annotated[int | None, typer.Option(help="So many processes on this machine, whatever GPUs there are.")] = None,
    address: Annotated[str | None, typer.Option(help="With --executor ray: a cluster that runs (auto, HOST:PORT).")] = None,
    todo: Annotated[Path | None, typer.Option(hidden=True)] = None,
    as_json: AsJson = False,
) -> None:
    """Run a sweep, go on where it stopped, write and print the report. Exit code 1 if a run failed, 2 for bad input.

    The same command, given several times or on several machines that see the results directory, shares the work: each process takes
    what no other one holds. `sweep status DIRECTORY` shows how far a sweep is.
    """
    how = {"executor": executor, "processes": processes, "todo": todo, "address": address}
    overrides = {name: value for name, value in {"share_prefix": share_prefix, "limit": limit}.items() if value is not None}
    with stdout(as_json) as out:
        from vlm_pruner_eval.report import printing
        from vlm_pruner_eval.sweep import early
        from vlm_pruner_eval.sweep import main as sweep_main

        def refuse(unchecked: SweepConfig) -> None:
            if todo is None and not dry_run:
                early.refuse(unchecked, output or _output_of(unchecked))

        loaded = _load(config, overrides, refuse)
        directory = output or _output_of(loaded)
        if dry_run:
            _preview(loaded, directory, out)
            return
        asked = sweep_main.Request(loaded, directory, retry_failed, rerun, **how)
        ended = sweep_main.run(
            asked, functools.partial(printing.write_and_print, out=out), functools.partial(printing.print_finished, out=out)
        )
        out.add(ended.summary)
        if ended.code:
            raise typer.Exit(ended.code)


def _load(path: Path, overrides: dict[str, Any], refuse: Callable[[SweepConfig], None]) -> SweepConfig:
    """A checked sweep file; `refuse` is asked about one without faults of form, before methods are imported, which takes seconds."""
    from vlm_pruner_eval import versions
    from vlm_pruner_eval.sweep.progress import quieten

    versions.check(lambda text: print(f"vlm-pruner-eval: {text}", file=sys.stderr))  # before anything is imported that may be broken
    quieten()  # first: progress bars read the environment when their library is imported, which torch does
    from vlm_pruner_eval.sweep import config as sweep_config
    from vlm_pruner_eval.sweep.grid import method_problems

    unchecked = None
    with contextlib.suppress(ConfigError):  # reported below, together with the methods' problems
        unchecked = sweep_config.load(path, overrides=overrides)
    if unchecked is not None:
        refuse(unchecked)
    return sweep_config.load(path, overrides=overrides, check=method_problems)


def _preview(config: SweepConfig, directory: Path, out: Stdout) -> None:
    from vlm_pruner_eval.sweep.preview import preview, print_preview

    seen = preview(config, directory)
    print_preview(out.console(), seen)
    out.add(seen.as_json())


@app.command()
@sentences
def report(
    directory: Annotated[Path | None, typer.Argument(help="A results directory written by `sweep`.")] = None,
    check: Annotated[Path | None, typer.Option(help="Compare with this reference file; exit code 1 on a regression.")] = None,
    write_reference: Annotated[Path | None, typer.Option(help="Write a reference file from a finished sweep.")] = None,
    recompute_paper: Annotated[
        bool, typer.Option("--recompute-paper", help="Derive every printed average of the paper again; needs no results.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write and print the report of a results directory, or use it as a regression gate."""
    with stdout(as_json) as out:
        if recompute_paper:
            _recompute(out)
        if directory is None:
            if recompute_paper and check is None and write_reference is None:
                return
            raise ConfigError("report: got no results directory, expected the folder that `vlm-pruner-eval sweep` wrote.")
        if write_reference is not None:
            _write_reference(directory, write_reference, out)
        if check is not None:
            _check(directory, check, out)
        if check is None and write_reference is None:
            from vlm_pruner_eval.report.printing import write_and_print

            paths = write_and_print(directory, out)
            out.add({"report": str(paths["md"]), "files": {kind: str(path) for kind, path in paths.items()}})


def _write_reference(directory: Path, path: Path, out: Stdout) -> None:
    from vlm_pruner_eval import report as reports

    written = reports.write_reference(directory, path)
    out.line(f"reference: {written}")
    out.add({"reference": str(written)})


def _check(directory: Path, reference: Path, out: Stdout) -> None:
    from vlm_pruner_eval import report as reports

    problems = reports.check(directory, reference)
    for problem in problems:
        print(f"regression: {problem}", file=sys.stderr)
    if problems:
        print("If answers were meant to change: raise RESULTS_VERSION in vlm_pruner_eval/sweep/identity.py.", file=sys.stderr)
    out.add({"check": str(reference), "problems": len(problems)})
    if problems:
        raise typer.Exit(FAILED)
    out.line(f"{reference}: no difference.")


@app.command()
@sentences
def show(
    directory: Annotated[Path, typer.Argument(help="A results directory written by `sweep`.")],
    doc: Annotated[str | None, typer.Option(help="A document: TASK/SPLIT/ID, or ID with --task.")] = None,
    flips: Annotated[tuple[str, str] | None, typer.Option(help="List the documents that two methods answer right and wrong.")] = None,
    task: Annotated[str | None, typer.Option(help="The document's task; with --flips only this task's documents.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these methods: a,b,c")] = None,
    rate: Annotated[str | None, typer.Option(help="The pruning rate; default: the largest of the sweep.")] = None,
    n: Annotated[int, typer.Option("--n", min=0, help="With --flips: how many documents to draw.")] = 8,
    out: Annotated[Path | None, typer.Option(help="The picture (with --flips: the folder); default: in DIRECTORY/show.")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw what each method kept of a document, in the order of selection, with its answers. Reads records; needs no model."""
    from vlm_pruner_eval.report.show import show_commands as show_cli

    if (doc is None) == (flips is None):
        raise ConfigError("show: expected either --doc TASK/SPLIT/ID, which draws a document, or --flips METHOD METHOD, which compares.")
    if methods is not None and flips is not None:
        raise ConfigError("--methods: got it with --flips, which compares the two methods that it names; leave it out.")
    with stdout(as_json) as printed:
        console = printed.console(show_cli.WIDTH)
        if doc is not None:
            named = [name for name in (methods or "").split(",") if name.strip()]
            paths = [show_cli.show_document(directory, doc, task=task, methods=named, rate=rate, out=out, console=console)]
            printed.add({"picture": str(paths[0])})
        else:
            found, paths = show_cli.show_flips(directory, *flips, task=task, rate=rate, n=n, out=out, console=console)
            printed.add({"documents": found.n_documents, "flips": len(found.flips), "pictures": [str(path) for path in paths]})
        for path in paths:
            printed.line(str(path))


@app.command()
@sentences
def reproduce(
    model: Annotated[str | None, typer.Option(help="A model of the paper, for example llava-1.5-7b.")] = None,
    config: Annotated[Path | None, typer.Option(help="A sweep file (YAML) instead of a model of the paper.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only the rows of this method; may be given several times.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="A checkpoint instead of the file's.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks of the file: gqa,pope")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per task, instead of the file's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Results directory; default: ./output/reproduce/NAME.")] = None,
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes of the noise floor; the rows use the first.")] = "1,16",
    attention: Annotated[str, typer.Option(help="Attention kernels of the noise floor; the rows use the first.")] = "sdpa,eager",
    anyway: Annotated[bool, typer.Option("--anyway", help="Run the pruned rows even if the unpruned row does not reproduce.")] = False,
    as_json: AsJson = False,
) -> None:
    """Reproduce a table of the paper: the unpruned model's noise floor, a gate on its scores, then release and sane rows.

    Finished runs are skipped. Exit code 1 if the unpruned row does not reproduce or a run failed, 2 for bad input.
    """
    with stdout(as_json) as out:
        asked = {"model": model, "config": config, "pretrained": pretrained, "tasks": tasks, "limit": limit, "methods": method or ()}
        _reproduce(asked | {"batch_sizes": batch_sizes, "attention": attention, "output": output}, anyway, out)


def _reproduce(asked: dict[str, Any], anyway: bool, out: Stdout) -> None:
    from vlm_pruner_eval.sweep.progress import quieten

    quieten()
    from vlm_pruner_eval.reproduce.plan import make_plan

    plan = make_plan(**asked)  # refused before the rest is imported, which takes a while
    print(f"{plan.name}: loading transformers and lmms-eval ...", file=sys.stderr, flush=True)
    from vlm_pruner_eval.reproduce.report import print_summary, write
    from vlm_pruner_eval.reproduce.run import reproduce as run_stages

    done = run_stages(plan, anyway=anyway)
    paths = write(done)
    print_summary(out.console(100), done)
    for kind, path in paths.items():
        out.line(f"{kind:5s}{path}")
    counts = {name: getattr(done.counts, name) for name in ("runs", "skipped", "failed")}
    out.add({"gate": done.gate.status, **counts, "rows": done.rows is not None, "report": str(paths["md"])})
    if done.failed:
        raise typer.Exit(FAILED)


@app.command()
@sentences
def doctor(
    config: Annotated[Path | None, typer.Argument(help="A sweep file (YAML) whose checkpoint, tasks and data are looked up, too.")] = None,
    output: Annotated[Path | None, typer.Option(help="The results directory; default: as of `sweep`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Look for what would get into the way of a sweep, and say how to mend it. Downloads nothing.

    Exit code 1 if anything fails, 2 for a bad sweep file.
    """
    from vlm_pruner_eval.doctor.examine import run

    with stdout(as_json) as out:
        if not run(config, output, out):
            raise typer.Exit(FAILED)


@app.command("list")
@sentences
def list_(as_json: AsJson = False) -> None:
    """Show the methods with their parameters, the model ids, and the packaged tasks."""
    from vlm_pruner_eval.lmms.plugin import MODELS, packaged_tasks
    from vlm_pruner_eval.method_table import descriptions, method_table

    known = method_table()
    about = descriptions()
    with stdout(as_json) as out:
        console = out.console()
        table = Table("method", "what it keeps; parameters and defaults", box=None, pad_edge=False)
        for name, parameters in known.items():
            shown = ", ".join(parameter if value is None else f"{parameter}={value}" for parameter, value in parameters.items())
            table.add_row(escape(name), "\n".join(filter(None, [escape(about.get(name, "")), f"[dim]{escape(shown)}[/]"])))
        console.print(table)
        console.print(f"\nmodel ids: {', '.join(sorted(MODELS))}", highlight=False, soft_wrap=True)
        tasks = packaged_tasks()
        console.print(f"packaged tasks ({len(tasks)}): {', '.join(tasks)}", highlight=False, soft_wrap=True)
        console.print("All other tasks of lmms-eval can be used too; `lmms-eval tasks list` shows them.", highlight=False, soft_wrap=True)
        out.add({"methods": known, "about": about, "models": sorted(MODELS), "tasks": tasks})


def _output_of(config: SweepConfig) -> Path:
    return Path(config.output or Path("output") / config.name)


def _recompute(out: Stdout) -> None:
    from vlm_pruner_eval.report.paper.printed import read_printed
    from vlm_pruner_eval.report.paper.recompute import recompute_averages, recompute_lines

    printed = read_printed()
    for line in recompute_lines(printed):
        out.line(line)
    rows = recompute_averages(printed)
    out.add({"averages": len(rows), "match": sum(row.matches for row in rows)})
