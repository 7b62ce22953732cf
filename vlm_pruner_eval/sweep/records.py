"""What a run leaves behind, computed from its answers: kept tokens, times, digests of the kept sets, failures."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from vlm_pruner_eval.cost import DecoderShape, kv_bytes, literature_flops, prefill_flops


def kept_digest(record: dict[str, Any] | None) -> str | None:
    """SHA-256 of WHICH visual tokens a sample kept; None without a record.

    The set, never the order: another processor changes the order in about 1 of 12 images and the set in none. Positions are
    taken relative to the first kept one, because left padding shifts a whole row with the composition of its batch.
    """
    if record is None:
        return None
    positions = record["kept_positions"]
    relative = [position - positions[0] for position in positions]
    return hashlib.sha256(json.dumps([sorted(record["order"]), relative]).encode()).hexdigest()


def answer_digest(answer: str) -> str:
    """SHA-256 of an answer's text."""
    return hashlib.sha256(answer.encode()).hexdigest()


def run_digest(samples: Iterable[dict[str, Any]]) -> str:
    """SHA-256 over the kept sets of all documents, sorted by task and document."""
    entries = sorted((sample["task"], sample["doc_id"], kept_digest(sample["record"]) or "") for sample in samples)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def summarise_tokens(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Visual tokens over the samples that had images: there, asked for, kept, and averaged over layers."""
    records = [sample["record"] for sample in _prefills(samples) if sample["record"]["n_visual"] > 0]
    quirks = Counter(quirk for record in records for quirk in record["quirks"])
    return {
        "samples_with_images": len(records),
        "n_visual": _spread(record["n_visual"] for record in records),
        "asked": _spread(record["n_asked"] for record in records),
        "kept": _spread(record["n_kept"] for record in records),
        "layer_averaged": _spread(record["layer_averaged"] for record in records),
        "layers": sorted({record["layer"] for record in records if record["layer"] is not None}),
        "quirks": dict(sorted(quirks.items())),
    }


def summarise_times(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and interquartile range in milliseconds; prefill is a whole batch's, decode a step's, selection a sample's.

    `decoded_tokens_per_s`: rows of the batch over the time of a decoding step.
    """
    prefills = _prefills(samples)
    rates = [1000.0 * sample["batch_size"] / sample["decode_ms"] for sample in samples if sample["batch_size"] and sample["decode_ms"]]
    return {
        "prefill_ms": _median([sample["prefill_ms"] for sample in prefills]),
        "decode_ms": _median([sample["decode_ms"] for sample in samples]),
        "selection_ms": _median([sample["record"]["selection_ms"] for sample in prefills]),
        "decoded_tokens_per_s": _median(rates),
        "batch_sizes": sorted({sample["batch_size"] for sample in samples if sample["batch_size"]}),
    }


def is_untimed(samples: Iterable[dict[str, Any]]) -> bool:
    """Whether any answer was computed together with other runs', so that its time is unknown."""
    return any(sample["prefill_ms"] is None and sample["error"] is None for sample in samples)


def without_times(times: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run that shared work with others: its times are no measure of anything, only its batches are its own."""
    return dict.fromkeys(times) | {"batch_sizes": times["batch_sizes"]}


def summarise_memory(samples: Sequence[dict[str, Any]], model: dict[str, Any]) -> dict[str, Any]:
    """What the prompts with images cost the language model, from the real length of every layer; mean, min and max over prompts.

    Parameters
    ----------
    samples
        Of one run.
    model
        ``PrunedModel.describe()``: `shape` (a `DecoderShape` by field) and `dtype` are read.

    Returns
    -------
    dict
        `flops` and `literature_flops` of the prefill with one position of logits, and `kv_bytes_counted`: None where `model` has
        no shape. `kv_bytes_measured`: a prompt's share of its batch's cache, so padding counts. `peak_bytes`: the most that the
        device held while a batch was answered, weights included; None where it was not measured (CPU).
    """
    records = [sample["record"] for sample in _prefills(samples) if sample["record"]["n_visual"] > 0]
    peaks = [sample["peak_bytes"] for sample in samples if sample.get("peak_bytes") is not None]
    measured = [record["kv_bytes"] for record in records if record.get("kv_bytes") is not None]
    found = {"kv_bytes_measured": _spread(measured), "peak_bytes": max(peaks, default=None)}
    if model.get("shape") is None:
        return dict.fromkeys(("flops", "literature_flops", "kv_bytes_counted")) | found
    shape, bytes_per_value = DecoderShape(**model["shape"]), 4 if model["dtype"] == "float32" else 2
    lengths = [record["kv_lengths"] for record in records]
    return {
        "flops": _spread(prefill_flops(shape, of_layers, logits=1) for of_layers in lengths),
        "literature_flops": _spread(literature_flops(shape, of_layers) for of_layers in lengths),
        "kv_bytes_counted": _spread(kv_bytes(shape, of_layers, bytes_per_value) for of_layers in lengths),
    } | found


def _prefills(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One sample per prompt that was read: all choices of a document carry the record of the one prefill that they share."""
    known = (sample for sample in samples if sample["record"] is not None)
    return list({(sample["task"], sample["doc_id"], sample["prefill_ms"]): sample for sample in known}.values())


def failures(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers that carry an error."""
    return [{key: sample[key] for key in ("task", "doc_id", "error")} for sample in samples if sample["error"]]


def missing_answers(samples: Iterable[dict[str, Any]], logged: dict[str, Sequence[dict[str, Any]]]) -> list[str]:
    """Documents that were scored but of which an answer (or a choice) is missing or there twice: a sentence each task."""
    answered: dict[tuple[str, Any], Counter] = {}
    for sample in samples:
        answered.setdefault((sample["task"], sample["doc_id"]), Counter())[sample.get("choice")] += 1
    problems = []
    for task, rows in logged.items():
        documents = {row["doc_id"]: len(row["resps"]) for row in rows}  # one response per request of the document
        wrong = sorted(doc for doc, n in documents.items() if list(answered.get((task, doc), {}).values()) != [1] * n)
        if wrong:
            problems.append(f"{task}: {len(wrong)} of {len(documents)} documents have no answer of their own (first: document {wrong[0]}).")
    return problems


def _spread(values: Iterable[float]) -> dict[str, float] | None:
    listed = list(values)
    return {"mean": sum(listed) / len(listed), "min": min(listed), "max": max(listed)} if listed else None


def _median(values: Sequence[float | None]) -> dict[str, float] | None:
    from vlm_pruner_eval.timing import median_iqr  # torch: the report reads digests from here and does without it

    known = [value for value in values if value is not None]
    if not known:
        return None
    median, iqr = median_iqr(known)
    return {"median": median, "iqr": iqr, "n": len(known)}
