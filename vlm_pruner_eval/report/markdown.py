"""report.md: the tables and everything needed to read them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.tables import PLUMBING, Row, is_plumbing

_LEGEND = (
    "Scores with 95 % intervals (percentile bootstrap over documents, 1000 resamples, pairs kept together; several seeds: mean ± "
    "standard deviation over seeds). Where every document scored the same, the Wilson interval. "
    "Relative Avg = 100 × mean over benchmarks of score / unpruned score, equal weights "
    "(arXiv 2512.02700). Tokens: visual tokens a prompt, asked for and measured from the tensors, and the measured count averaged over "
    "all decoder layers. Prefill: the language model and the selection, without the vision tower, of one batch; median "
    "(interquartile range)."
)


def markdown(results: Results, rows: list[Row]) -> str:
    """The whole report as Markdown."""
    tasks = results.tasks
    parts = [f"# {results.name}", *([f"**{PLUMBING}**"] if is_plumbing(tasks) else []), *_remarks(results, rows)]
    parts += ["## Scores", table(_scores(rows, tasks)), _LEGEND, "![Score against pruning rate](accuracy_vs_rate.png)"]
    parts += ["## Tokens and time", table(_efficiency(rows))]
    parts += ["## Where these numbers come from", table(facts(results))]
    return "\n\n".join(parts) + "\n"


def _scores(rows: list[Row], tasks: list[str]) -> Iterator[list[str]]:
    names = text.short_names(tasks)
    yield ["method", *(names[task] for task in tasks), "relative Avg"]
    for heading, group in groupby(rows, key=lambda row: row.heading):
        yield [f"*{heading}*", *[""] * (len(tasks) + 1)]
        for row in group:
            scores = [_joined(text.cell_lines(row, row.cells.get(task))) for task in tasks]
            yield [row.label, *scores, _joined((text.number(row.relative.value), f"± {row.relative.sd:.1f}" if row.relative.sd else ""))]


def _joined(lines: tuple[str, str]) -> str:
    first, second = lines
    if not second:
        return first
    return f"{first} {second}" if second.startswith("±") else f"{first} [{second}]"


def _efficiency(rows: list[Row]) -> Iterator[list[str]]:
    yield ["method", "removed", "status", "tokens asked", "tokens kept", "layer-averaged", "prefill ms", "selection ms", "quirks"]
    for row in rows:
        measured = [text.spread(row.asked), text.spread(row.kept), text.number(row.layer_averaged)]
        times = [text.time_ms(row.prefill_ms), text.time_ms(row.selection_ms)]
        yield [row.label, row.heading.replace(" removed", ""), row.status, *measured, *times, text.quirks(row.quirks)]


def _remarks(results: Results, rows: list[Row]) -> Iterator[str]:
    for note in results.notes:
        yield f"Note: {note}"
    missing = [run.key for run in results.runs if run.record is None]
    if missing:
        yield f"Not run yet: {', '.join(missing)}."
    problems = [problem for row in rows for problem in row.problems]
    if problems:
        yield "Failed runs (nothing of them is in an average):\n\n" + "\n".join(f"- {_one_line(problem)}" for problem in problems)


def facts(results: Results) -> Iterator[list[str]]:
    """Lines of a table about where the numbers come from: model, settings, versions, device; the first is its head."""
    config, model = results.config, results.config["model"]
    yield ["what", "value"]
    yield ["model", f"{model['id']}, {model['pretrained']}" + (f" @ {model['revision']}" if model["revision"] else "")]
    yield ["protocol", model["protocol"]]
    yield ["dtype, attention, batch size", f"{model['dtype']}, {model['attn_implementation']}, {model['batch_size']}"]
    yield ["tasks", ", ".join(config["tasks"])]
    yield ["questions a task", "all" if config["limit"] is None else f"the first {config['limit']}"]
    yield ["seed", str(config["seed"])]
    if not results.records:
        return
    record = results.records[0]
    where = record["provenance"]
    metrics = {task: (scores["main"], scores.get("note", "none")) for task, scores in record["tasks"].items()}
    yield [
        "metric (documents)",
        ", ".join(f"{task}: {main['metric']} ({main['n']})" if main else f"{task}: {note}" for task, (main, note) in metrics.items()),
    ]
    yield ["processor", where["processor"]]
    loaded = {name: value for name, value in where["model"].items() if name in ("device", "dtype", "commit") and value is not None}
    yield ["as loaded", ", ".join(f"{name} {value}" for name, value in loaded.items()) + f", {where['threads']} CPU threads"]
    yield ["versions", ", ".join(f"{name} {version}" for name, version in where["versions"].items())]
    yield ["code", record["config"]["code"] + (f", commit {where['git_commit']}" if where["git_commit"] else "")]
    yield ["made", f"{where['time']}, by `{where['command']}`"]


def table(lines: Iterator[list[str]]) -> str:
    """A Markdown table; the first line is its head."""
    head, *body = [[_one_line(value).replace("|", "\\|") for value in line] for line in lines]
    rule = ["---"] + ["---:" if len(head) > 2 else "---"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def _one_line(value: str) -> str:
    return " ".join(value.split())
