"""Pictures for the report: documents that the methods answer differently, with what each of them kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.show.documents_shown import Document, pick_runs, read_documents
from vlm_pruner_eval.report.show.draw import SMALL, draw
from vlm_pruner_eval.sweep.images import ImageStore, all_kept


@dataclass(frozen=True)
class Picture:
    """A drawn document.

    Attributes
    ----------
    png
        The picture's bytes.
    title
        Which document, at which rate.
    alt
        What is to be seen, for those who don't see it.
    question, gold
        As asked, and as expected.
    answers
        By label: the answer and what it scored.
    """

    png: bytes
    title: str
    alt: str
    question: str
    gold: str
    answers: dict[str, str]


def gallery(results: Results, n: int = 6) -> list[Picture]:
    """Draw up to `n` documents at the sweep's largest rate, those first on which the methods disagree, from every task in turn.

    Returns
    -------
    list of Picture
        Empty where no picture was kept (``gallery: 0``, an older sweep, text only), or no pruned run is finished.
    """
    if not any(run.finished for run in results.runs):
        return []
    runs = pick_runs(results)
    store = ImageStore(results.store.root)
    n_kept = results.config.get("gallery", 0)  # older sweeps kept none
    if len(runs) < 2 or not n_kept:
        return []
    kept = [document for document in read_documents(results, runs, None, n_kept - 1) if all_kept(store, document.images)]
    return [picture(results, document) for document in itertools.islice(_in_turn(kept), n)]


def picture(results: Results, document: Document) -> Picture:
    """Draw one document, small."""
    drawn = draw(results, document, SMALL)
    kept = ", ".join(f"{reply.label} {len(reply.order)}" for reply in document.replies.values() if 0 < len(reply.order) < reply.n_visual)
    alt = f"The image of {document.place} once per method, all but the kept patches darkened. Patches kept: {kept or 'all'}."
    answers = {reply.label: reply.verdict for reply in document.replies.values()}
    return Picture(drawn, str(document.place), alt, document.question, document.gold, answers)


def disagreement(document: Document) -> tuple[int, int]:
    """How much the runs differ on a document: whether some are right and others wrong, then how many answers there are."""
    rights = {reply.is_right for reply in document.replies.values()} - {None}
    return len(rights), len({reply.answer for reply in document.replies.values()})


def _in_turn(documents: Sequence[Document]) -> Iterator[Document]:
    """One of every task, then the next of every task; within a task the most disputed first."""
    by_task: dict[str, list[Document]] = {}
    for document in sorted(documents, key=disagreement, reverse=True):  # stable: equal ones stay in their order
        by_task.setdefault(document.place.task, []).append(document)
    tasks = [by_task[task] for task in dict.fromkeys(document.place.task for document in documents)]
    for rank in range(max(map(len, tasks), default=0)):
        yield from (listed[rank] for listed in tasks if rank < len(listed))
