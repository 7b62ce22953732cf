"""Self-test of an installation, about two seconds: late imports of lmms-eval, and a pruned answer against a slow one.

The model is a random LLaVA of four layers, made from a configuration: nothing is read from the disk or downloaded.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_pruner_eval import versions
from vlm_pruner_eval.errors import PruningError, StoppedError

# Modules of lmms-eval whose functions import further ones when an evaluation has begun.
_LATE = ("lmms_eval.evaluator", "lmms_eval.api.task", "lmms_eval.api.metrics")
_IMAGE, _PAD = 90, 0
_LAYER, _N_LAYERS, _SIDE = 2, 4, 4
_NEW_TOKENS = 3
_TOLERANCE = 1e-3  # of the largest logit, in float32


def run() -> None:
    """Run the self-test.

    Raises
    ------
    StoppedError
        With the part that failed, why, and the packages that are not as they were tested.
    """
    for name, step in STEPS.items():
        try:
            step()
        except Exception as error:  # whatever a release of another project breaks
            raise StoppedError(f"{failure(name, error)}. {versions.mend()}") from error


def failure(name: str, error: Exception) -> str:
    """Return the sentence for a part of the self-test that failed."""
    strange = versions.not_as_tested()
    blame = f"not as tested: {'; '.join(strange)}" if strange else "all required packages are within the tested ranges"
    reason = f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"self-test of {name} failed ({reason}); {blame}"


# ---- lmms-eval
def late_imports() -> str:
    """Import what lmms-eval imports only when an evaluation has begun, and let it lock a file."""
    names = [name for module in _LATE for name in _imported_in_functions(module)]
    for name in names:
        importlib.import_module(name)
    evaluator = importlib.import_module("lmms_eval.evaluator")
    if hasattr(evaluator, "_enable_reentrant_filelocks"):  # changes filelock's classes, as every evaluation does first
        evaluator._enable_reentrant_filelocks()
    import filelock

    with tempfile.TemporaryDirectory() as folder, filelock.FileLock(Path(folder) / "lock"):
        return f"{len(names)} modules that it imports late are there"


def _imported_in_functions(module: str) -> Iterator[str]:
    """Modules that the functions of a module import, without those that it can do without (inside `try`)."""
    found = importlib.util.find_spec(module)
    for function in ast.walk(ast.parse(Path(found.origin).read_text(encoding="utf-8"))):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        optional = {node for attempt in ast.walk(function) if isinstance(attempt, ast.Try) for node in ast.walk(attempt)}
        for node in ast.walk(function):
            if node not in optional and isinstance(node, ast.Import):
                yield from (name.name for name in node.names)
            elif node not in optional and isinstance(node, ast.ImportFrom) and node.level == 0:
                yield node.module


# ---- the hook
def hook() -> str:
    """Prune two prompts of unequal length by two methods, and hold the logits of the answers against a recomputation.

    The recomputation runs the whole sequence through every layer; layers from K on may not look at what was dropped.

    Raises
    ------
    PruningError
        Another number of tokens was kept than asked, or the logits differ.
    """
    from vlm_pruner_eval import get_pruner

    model = _tiny_llava()
    inputs = _prompts()
    worst = 0.0
    with _one_thread():
        for name, params in (("fastv", {}), ("vlmpruner", {"merge": False})):
            worst = max(worst, _difference(model, inputs, get_pruner(name, pruning_rate="2/3", layer=_LAYER, **params)))
    return f"pruned answers equal the slow recomputation (largest relative difference {worst:.1g})"


def _difference(model, inputs: dict, pruner) -> float:
    """Largest difference of the logits of a pruned answer from the recomputed ones, as a share of the largest logit."""
    import torch

    from vlm_pruner_eval import keep_count, prune

    length = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS}
    with torch.no_grad(), prune(model, pruner) as ledger:
        answer = model.generate(**inputs, **length, do_sample=False, return_dict_in_generate=True, output_logits=True)
    # the number that was asked
    kept = [record.n_kept for record in ledger.records]
    asked = keep_count(_SIDE**2, pruner.pruning_rate)
    if kept != [asked, asked]:
        raise PruningError(f"{pruner.name}: kept {kept} visual tokens, expected {asked} for each of two prompts.")
    # the logits of the definition
    slow = _recompute(model, inputs, answer.sequences, [record.kept_positions for record in ledger.records])
    fast = torch.stack(answer.logits, 1)
    found = float((fast - slow).abs().max() / slow.abs().max())
    if not found < _TOLERANCE:
        raise PruningError(f"{pruner.name}: the logits of the pruned answer are off the slow recomputation by {found:.2g} (relative).")
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: for a model this small, more of them wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tiny_llava() -> object:
    import torch
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": _N_LAYERS, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=sizes | {"model_type": "clip_vision_model", "image_size": 8 * _SIDE, "patch_size": 8},
        text_config=sizes | {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 128},
        image_token_index=_IMAGE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
        with torch.no_grad():
            for parameter in model.parameters():  # large enough that a wrong mask or position shows
                if parameter.dim() >= 2:
                    parameter.normal_(std=1.6 / parameter[0].numel() ** 0.5)
    model.generation_config = transformers.GenerationConfig(pad_token_id=_PAD, eos_token_id=None)
    return model.eval()


def _prompts() -> dict:
    """Two prompts with an image each; the first one is padded on the left."""
    import torch

    image = [_IMAGE] * _SIDE**2
    rows = [[1, 5, *image, 7, 8], [1, 9, 11, *image, 12, 13, 14, 15]]
    length = max(map(len, rows))
    ids = torch.tensor([[_PAD] * (length - len(row)) + row for row in rows])
    pixels = torch.randn(2, 3, 8 * _SIDE, 8 * _SIDE, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (ids != _PAD).long(), "pixel_values": pixels}


def _recompute(model, inputs: dict, sequences, kept: list[list[int]]):
    """Logits [B, n, vocabulary] in front of the new tokens of `sequences` [B, L + n], without cache, cut or our hook."""
    import torch

    n_prompt = inputs["input_ids"].shape[1]
    attended = torch.cat([inputs["attention_mask"], torch.ones(len(sequences), sequences.shape[1] - n_prompt, dtype=torch.long)], 1)
    seen = attended.bool() & (sequences != _IMAGE)
    for row, positions in zip(seen, kept, strict=True):
        row[positions] = True
    causal = torch.ones(sequences.shape[1], sequences.shape[1]).tril().bool()
    allowed = causal[None, None] & seen[:, None, None, :]
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)

    def narrow(module: object, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"attention_mask": bias}

    layers = model.model.language_model.layers[_LAYER:]
    handles = [layer.register_forward_pre_hook(narrow, with_kwargs=True) for layer in layers]
    positions = (attended.cumsum(-1) - 1).clamp(min=0)
    pixels = inputs["pixel_values"]
    try:
        with torch.no_grad():
            whole = model(input_ids=sequences, attention_mask=attended, position_ids=positions, pixel_values=pixels, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return whole.logits[:, n_prompt - 1 : -1]


STEPS: dict[str, Callable[[], str]] = {"lmms-eval": late_imports, "hook": hook}  # each raises, or says what was seen
