"""The regression gate: counts, kept sets, answers and scores of a sweep against a reference file, document by document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.load import Results, RunResult, load_sweep
from vlm_pruner_eval.store.files import write_atomic
from vlm_pruner_eval.store.schema import FINISHED, to_json
from vlm_pruner_eval.store.summaries import Spread
from vlm_pruner_eval.sweep.records import answer_digest
from vlm_pruner_eval.sweep.text_files import read_text

_DIGITS = 8  # 32 bits a document: a chance match is no worry, and the file stays small
_SETTINGS = ("id", "pretrained", "revision", "dtype", "protocol", "attn_implementation")

# Documents a run. Another processor rounds differently: it can tip a near tie in a score, and now and then an answer.
# A score follows from the answers: where no answer of a task differs, its score may not differ either.
TOLERANCE = {"kept_sets_same_processor": 0, "kept_sets_other_processor": 2, "answers": 2, "score_at_equal_answers": 0.0}
_ROUNDING = 1e-6
_MOST_BYTES = 2**30  # of a reference: a line of 20 bytes for each document of each run


def write_reference(results_dir: Path | str, path: Path | str) -> Path:
    """Make the reference file of a finished sweep; the tolerance of a file that is there already is kept.

    Raises
    ------
    ConfigError
        Runs that failed or did not happen: a reference must be complete.
    """
    results, path = load_sweep(results_dir), Path(path)
    unfinished = [f"{run.key} ({run.status})" for run in results.runs if run.status != FINISHED]
    if unfinished:
        raise ConfigError(f"{results_dir}: got unfinished runs ({', '.join(unfinished)}), expected a complete sweep; run it again.")
    tolerance = _read(path)["tolerance"] if path.exists() else TOLERANCE
    reference = {"what": "kept sets and answers, eight hexadecimal digits each, by run, task and document", "tolerance": tolerance}
    reference |= {"results_version": _results_version(results)}
    reference |= {"processor": _processor(results), "settings": _settings(results), "measured": _measured(results)}
    reference["runs"] = _digests(results)
    try:
        write_atomic(path, _compact(reference))
    except OSError as error:
        raise ConfigError(f"{path}: can't be written ({error}); choose another file.") from error
    return path


def check(results_dir: Path | str, reference_path: Path | str) -> list[str]:
    """Compare a sweep with a reference.

    Returns
    -------
    list of str
        Every difference beyond the reference's tolerance, one sentence each; empty when all is well.

    Raises
    ------
    ConfigError
        Files that can't be read, or a sweep with other settings: the two can't be compared.
    """
    results, reference = load_sweep(results_dir), _read(Path(reference_path))
    settings = _settings(results)
    different = [
        f"{name}: the sweep has {settings.get(name)!r}, the reference {value!r}; compare sweeps of one configuration."
        for name, value in reference["settings"].items()
        if settings.get(name) != value
    ]
    if different:
        raise ConfigError(different)
    problems = [f"{run.key}: is {run.status}, expected finished." for run in results.runs if run.status != FINISHED]
    if (version := _results_version(results)) != reference.get("results_version"):
        problems.append(
            f"results version: the sweep has {version}, the reference {reference.get('results_version')}; where that was meant, write the "
            "reference again with --write-reference."
        )
    ours = _digests(results)
    in_grid = {run.key for run in results.runs}
    problems += [f"{key}: is in the reference and not in the sweep." for key in reference["runs"] if key not in in_grid]
    problems += [f"{key}: is in the sweep and not in the reference." for key in ours if key not in reference["runs"]]
    same = _processor(results) == reference["processor"]
    for key, tasks in ours.items():
        problems += _differences(key, tasks, reference["runs"].get(key), reference["tolerance"], same_processor=same)
    for key, mine in _measured(results).items():
        if key in reference["measured"] and key in reference["runs"]:
            problems += _other_counts(key, mine, reference["measured"][key], same_processor=same)
            problems += _other_scores(
                key,
                mine["scores"],
                reference["measured"][key]["scores"],
                _changed_tasks(ours[key], reference["runs"][key]),
                reference["tolerance"],
            )
    return problems


def _results_version(results: Results) -> int | None:
    return results.records[0].config.get("results_version") if results.records else None


def _differences(
    key: str, ours: dict[str, Any], theirs: dict[str, Any] | None, tolerance: dict[str, int], *, same_processor: bool
) -> Iterator[str]:
    if theirs is None:
        return
    mine = {(task, doc): value for task, docs in ours.items() for doc, value in docs.items()}
    expected = {(task, doc): value for task, docs in theirs.items() for doc, value in docs.items()}
    if mine.keys() != expected.keys():
        yield f"{key}: {len(mine.keys() ^ expected.keys())} documents are on one side only; expected the same documents."
    for part, name, allowed in (
        (0, "kept sets", tolerance["kept_sets_same_processor" if same_processor else "kept_sets_other_processor"]),
        (1, "answers", tolerance["answers"]),
    ):
        changed = [at for at in sorted(mine.keys() & expected.keys()) if mine[at].split(":")[part] != expected[at].split(":")[part]]
        if len(changed) > allowed:
            where = ", ".join(f"{task} {doc}" for task, doc in changed[:5]) + (", ..." if len(changed) > 5 else "")
            processor = "the same processor and torch" if same_processor else "another processor or torch"
            yield f"{key}: {len(changed)} of {len(mine)} {name} differ from the reference (at most {allowed} may, on {processor}): {where}."


def _other_counts(key: str, ours: dict[str, Any], theirs: dict[str, Any], *, same_processor: bool) -> Iterator[str]:
    """What was asked is arithmetic; what was kept may hang on rounding where a release misbehaves, so elsewhere it is not compared."""
    for name in ("asked", "kept") if same_processor else ("asked",):
        mine, expected = ours[name] or 0.0, theirs[name] or 0.0
        if abs(mine - expected) > _ROUNDING:
            yield f"{key}: {name} {mine:g} visual tokens a prompt on average, the reference {expected:g}."


def _other_scores(key: str, ours: dict[str, Any], theirs: dict[str, Any], changed: set[str], tolerance: dict[str, float]) -> Iterator[str]:
    allowed = tolerance["score_at_equal_answers"]
    for task in sorted(ours.keys() & theirs.keys() - changed):
        both = ours[task], theirs[task]
        if both[0] != both[1] and (None in both or abs(both[0] - both[1]) > allowed + _ROUNDING):
            yield (
                f"{key}: {task} scores {both[0]}, the reference {both[1]}, though no answer differs (at most {allowed:g} may): "
                "the scoring changed."
            )


def _changed_tasks(ours: dict[str, dict[str, str]], theirs: dict[str, dict[str, str]]) -> set[str]:
    """Tasks of which an answer differs, or a document is missing."""
    answers = [{task: {doc: value.split(":")[1] for doc, value in docs.items()} for task, docs in side.items()} for side in (ours, theirs)]
    return {task for task in answers[0].keys() | answers[1].keys() if answers[0].get(task) != answers[1].get(task)}


def _measured(results: Results) -> dict[str, dict[str, Any]]:
    """By run: visual tokens asked for and kept (mean), and the score of every task."""
    return {
        run.key: {
            **{name: spread and spread.mean for name, spread in _spreads(run)},
            "scores": run.scores,
        }
        for run in results.runs
        if run.finished
    }


def _digests(results: Results) -> dict[str, dict[str, dict[str, str]]]:
    """By run, task and document: "kept:answer"."""
    digests: dict[str, dict[str, dict[str, str]]] = {}
    for run in results.runs:
        if not run.finished:
            continue
        tasks: dict[str, dict[str, str]] = {}
        for answer in results.each_answer(run.run_id):
            kept = answer.record.digest if answer.record else "0" * _DIGITS
            text = answer_digest(answer.answer)
            tasks.setdefault(answer.task, {})[str(answer.doc_id)] = f"{kept[:_DIGITS]}:{text[:_DIGITS]}"
        digests[run.key] = dict(sorted(tasks.items()))
    return digests


def _spreads(run: RunResult) -> Iterator[tuple[str, Spread | None]]:
    tokens = run.record.tokens
    yield "asked", tokens.asked
    yield "kept", tokens.kept


def _settings(results: Results) -> dict[str, Any]:
    model = {name: results.config["model"][name] for name in _SETTINGS}
    return model | {"tasks": results.tasks, "limit": results.config["limit"], "seed": results.config["seed"]}


def _processor(results: Results) -> str:
    """Processor and torch version: both decide how sums are rounded."""
    made = [unit.provenance for record in results.records for unit in record.units.values()]
    return "; ".join(sorted({f"{one.processor}, torch {one.versions['torch']}" for one in made}))


def _read(path: Path) -> dict[str, Any]:
    """A reference file.

    Raises
    ------
    ConfigError
        Not there, not JSON, or not made by `write_reference`.
    """
    advice = "make one with `report DIR --write-reference FILE`."
    try:
        reference = json.loads(read_text(path, most_bytes=_MOST_BYTES, advice=advice))
    except ConfigError as error:
        raise ConfigError(f"{path}: can't be read as a reference: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: can't be read as a reference ({error}); {advice}") from error
    wanted = {"tolerance", "processor", "settings", "measured", "runs"}
    if not isinstance(reference, dict) or not wanted <= reference.keys() or not _is_reference(reference):
        raise ConfigError(
            f"{path}: is not a reference file: expected {', '.join(sorted(wanted))}; delete it and make one with --write-reference."
        )
    return reference


def _is_reference(reference: dict[str, Any]) -> bool:
    """Tell if its parts have the form that the comparison goes through."""
    tolerance, measured = reference["tolerance"], reference["measured"]
    if not all(isinstance(reference[name], dict) for name in ("tolerance", "settings", "measured", "runs")):
        return False
    allowed = [tolerance.get(name) for name in TOLERANCE]
    documents = [docs for tasks in reference["runs"].values() for docs in (tasks.values() if isinstance(tasks, dict) else [None])]
    digests = [value for docs in documents for value in (docs.values() if isinstance(docs, dict) else [None])]
    return (
        all(type(value) in (int, float) and value >= 0 for value in allowed)
        and all(
            isinstance(held, dict) and {"asked", "kept"} <= held.keys() and isinstance(held.get("scores"), dict)
            for held in measured.values()
        )
        and all(_is_number(value) for held in measured.values() for value in (held["asked"], held["kept"], *held["scores"].values()))
        and all(isinstance(value, str) and value.count(":") == 1 for value in digests)
    )


def _is_number(value: object) -> bool:
    return value is None or type(value) in (int, float)


def _compact(reference: dict[str, Any]) -> str:
    """JSON with one line a run and task, so that a changed document shows as one changed line in a diff."""
    head = to_json({key: value for key, value in reference.items() if key != "runs"}).removesuffix("\n}")
    runs = []
    for key, tasks in reference["runs"].items():
        lines = ",\n".join(f"   {json.dumps(task)}: {json.dumps(docs)}" for task, docs in tasks.items())
        runs.append(f"  {json.dumps(key)}: {{\n{lines}\n  }}")
    return f'{head},\n "runs": {{\n' + ",\n".join(runs) + "\n }\n}\n"
