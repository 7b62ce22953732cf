"""`vlm-pruner-eval show`: draw what methods kept of a document, or list the documents on which two of them differ."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.redact import spelled_out
from vlm_pruner_eval.report.load import Results, load_sweep
from vlm_pruner_eval.report.show.documents_shown import Document, find_place, label_of, pick_runs, read_documents
from vlm_pruner_eval.report.show.draw import draw
from vlm_pruner_eval.report.show.flips import Flips, drawable_first, find_flips
from vlm_pruner_eval.sweep.images import ImageStore, all_kept

WIDTH = 120
_MOST_LISTED = 40  # flips on the screen; all are in the JSON file


def show_document(
    directory: Path, doc: str, *, task: str | None, methods: list[str], rate: str | None, out: Path | None, console: Console
) -> Path:
    """Draw one document and print its question and answers; returns the path of the picture.

    Raises
    ------
    ConfigError
        No such document, method or rate, or nothing to draw.
    """
    results = load_sweep(directory)
    place = find_place(results, doc, task)
    runs = pick_runs(results, methods, rate)
    found = read_documents(results, runs, {(place.task, place.doc_id)}, place.doc_id)
    if not found:
        raise ConfigError(f"--doc: {place} was not answered; the sweep's limit is {results.config['limit']} documents a task.")
    picture = draw(results, found[0])
    path = _write(out or results.store.root / "show" / f"{_slug(str(place))}.png", picture)
    _print(console, found[0])
    return path


def show_flips(
    directory: Path, first: str, second: str, *, task: str | None, rate: str | None, n: int, out: Path | None, console: Console
) -> tuple[Flips, list[Path]]:
    """List the documents on which two runs flip, and draw the first `n` whose pictures were kept, both ways in turn.

    Returns
    -------
    The flips, and the paths of the pictures; flips.json stands beside them.

    Raises
    ------
    ConfigError
        As of `find_flips`.
    """
    results = load_sweep(directory)
    flips = find_flips(results, first, second, rate, task)
    folder = out or results.store.root / "show" / f"flips-{flips.first.key}-{flips.second.key}"
    listed = [dataclasses.asdict(flip) | {"place": str(flip.place)} for flip in flips.flips]
    _write(folder / "flips.json", (json.dumps(listed, indent=1, ensure_ascii=False) + "\n").encode())
    _print_flips(console, flips)
    return flips, [_write(folder / f"{_slug(name)}.png", draw(results, document)) for name, document in _drawable(results, flips, n)]


def _drawable(results: Results, flips: Flips, n: int) -> list[tuple[str, Document]]:
    runs, store = [flips.first, flips.second], ImageStore(results.store.root)
    wanted = {(flip.place.task, flip.place.doc_id) for flip in flips.flips}
    last = min(max((doc_id for _, doc_id in wanted), default=-1), results.config.get("gallery", 0) - 1)
    documents = {document.place: document for document in read_documents(results, runs, wanted, last)}
    kept = {place for place, document in documents.items() if all_kept(store, document.images)}
    chosen = drawable_first(flips.flips, kept)[:n]
    return [(f"{'right-wrong' if flip.to_wrong else 'wrong-right'}-{flip.place}", documents[flip.place]) for flip in chosen]


def _print(console: Console, document: Document) -> None:
    console.print(
        f"[bold]{_plain(str(document.place))}[/]\n{_plain(document.question)}\nexpected: {_plain(document.gold)}", highlight=False
    )
    table = Table("method", "kept", "answer", box=None, pad_edge=False)
    for reply in document.replies.values():
        table.add_row(_plain(reply.label), f"{len(reply.order)} of {reply.n_visual}", _plain(reply.verdict))
    console.print(table)


def _print_flips(console: Console, flips: Flips) -> None:
    first, second = label_of(flips.first), label_of(flips.second)
    n_wrong = sum(flip.to_wrong for flip in flips.flips)
    console.print(
        f"Of {flips.n_documents} documents, {n_wrong} are right with {escape(first)} and wrong with {escape(second)}, "
        f"{len(flips.flips) - n_wrong} the other way round.",
        highlight=False,
    )
    table = Table("", "document", escape(first), escape(second), box=None, pad_edge=False)
    for flip in flips.flips[:_MOST_LISTED]:
        table.add_row("right → wrong" if flip.to_wrong else "wrong → right", *map(_plain, (str(flip.place), flip.before, flip.after)))
    console.print(table)
    if len(flips.flips) > _MOST_LISTED:
        console.print(f"and {len(flips.flips) - _MOST_LISTED} more in flips.json", highlight=False)


def _plain(text: str) -> str:
    """Text of a document or a model, which neither the terminal nor rich may take for instructions."""
    return escape(spelled_out(text))


def _write(path: Path, content: bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"--out: {path} can't be written ({error}); choose another place.") from error
    return path


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
