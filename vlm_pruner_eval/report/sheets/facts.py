"""Where the numbers of a report come from, as the lines of a table."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_pruner_eval.report.load import Results


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
    yield [
        "results version",
        str(record["config"].get("results_version", "older")) + (f", commit {where['git_commit']}" if where["git_commit"] else ""),
    ]
    command = where["command"].replace("`", "'")  # which would end the span of code
    yield ["made", f"{where['time']}, by `{command}`"]
