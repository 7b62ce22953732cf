"""Scores given continuations behind a pruned prompt: what lmms-eval's tasks of type multiple_choice and loglikelihood ask for.

The prompt alone is read while visual tokens are pruned, exactly as before generating an answer, so the last token that a
method sees is the prompt's. The continuations then run over the pruned cache, one after another: all choices of a document
share one prefill. They are scored one document at a time, whatever the batch size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from lmms_eval.api.instance import Instance
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vlm_pruner_eval.hf_compat import cache_of, with_cache
from vlm_pruner_eval.hook import prune
from vlm_pruner_eval.lmms.log import Reading
from vlm_pruner_eval.lmms.planning import Generation
from vlm_pruner_eval.lmms.prompts import Request
from vlm_pruner_eval.lmms.scored_tasks import TOTAL
from vlm_pruner_eval.pruners import Pruner
from vlm_pruner_eval.store.answers import Answer
from vlm_pruner_eval.store.kept import Kept
from vlm_pruner_eval.vlms import family_of

# One token, thrown away: what is wanted is the cache of the prompt, and the logits behind its last token.
PREFILL = Generation(
    {"max_new_tokens": 1, "num_beams": 1, "do_sample": False, "use_cache": True, "return_dict_in_generate": True, "output_logits": True}
)


@dataclass(frozen=True)
class Score:
    """Sum of the natural log-probabilities of a continuation's `n_tokens`, and whether each was the likeliest one."""

    loglikelihood: float
    n_tokens: int
    is_greedy: bool


@dataclass(frozen=True)
class Target:
    """One loglikelihood request: a prompt, and the continuation to be scored behind it.

    Attributes
    ----------
    continuation
        The text (tasks of type multiple_choice), or a function from the document to it (type loglikelihood).
    choice
        Which of the document's continuations it is, from 0.
    total
        Whether the task divides by lengths itself.
    """

    request: Request
    continuation: str | Callable[[dict], str]
    choice: int
    total: bool

    @classmethod
    def of(cls, index: int, instance: Instance) -> Target:
        """Read an instance ``(ctx, continuation, doc_to_messages, doc_id, task, split)``."""
        context, continuation, to_messages, doc_id, task, split = instance.args
        asked = dataclasses.replace(instance, arguments=(context, to_messages, {}, doc_id, task, split))
        return cls(Request.of(index, asked, instance.idx), continuation, instance.idx, bool((instance.metadata or {}).get(TOTAL)))

    def text(self, document: Mapping) -> str:
        """The continuation of this document."""
        return self.continuation if isinstance(self.continuation, str) else self.continuation(document)

    def answer(self, text: str, score: Score, reading: Reading, images: tuple[str, ...] = (), question: str = "") -> Answer:
        """The record of a continuation that was scored; `reading` is the prefill that it shares with the other choices."""
        return Answer(
            *(self.request.task, self.request.split, self.request.doc_id, text),
            record=Kept.of(reading.records[0]),
            prefill_ms=sum(reading.prefill_ms),
            n_prompt_tokens=reading.n_prompt[0],
            n_new_tokens=score.n_tokens,
            batch_size=1,
            choice=self.choice,
            loglikelihood=score.loglikelihood,
            is_greedy=score.is_greedy,
            peak_bytes=reading.peak_bytes,
            images=images,
            question=question,
        )

    def failed(self, answer: Answer) -> Answer:
        """The record of a failure, with the choice that it stands for."""
        return dataclasses.replace(answer, choice=self.choice)

    def result(self, answer: Answer) -> tuple[float, bool]:
        """What lmms-eval's metrics take: (value, is_greedy).

        Its multiple_choice takes the SMALLEST value for the model's choice, as its own wrappers return the loss: the mean
        over the continuation's tokens, the logarithm of its perplexity. Where the task reports acc_norm, which divides by
        the characters of each choice, the value is the sum over the tokens. Tasks of type loglikelihood report
        exp(-mean(value)) as perplexity, so theirs is the log-likelihood itself. A failed sample is infinitely unlikely.
        """
        loglikelihood = -math.inf if answer.loglikelihood is None else answer.loglikelihood
        if callable(self.continuation):
            return loglikelihood, bool(answer.is_greedy)
        return -loglikelihood if self.total else -loglikelihood / (answer.n_new_tokens or 1), bool(answer.is_greedy)


def by_prompt(targets: Sequence[Target]) -> list[list[Target]]:
    """Targets that continue the same prompt: one document's choices, unless every choice is a question of its own."""
    groups: dict[tuple, list[Target]] = {}
    for target in targets:
        groups.setdefault((target.request.sample_id, target.request.to_messages), []).append(target)
    return list(groups.values())


def request_of(targets: Sequence[Target]) -> Request:
    """Return the request that stands for all `targets`, which continue the same prompt."""
    return dataclasses.replace(targets[0].request, continuations=tuple(target.continuation for target in targets))


def continuation_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str) -> list[int]:
    """The tokens of `continuation` behind `prompt`.

    Prompt and continuation are tokenised as one text, and the tokens beyond those of the prompt are taken. Where the tokenizer
    joins the two at the seam (":" and ")" into ":)"), the prompt must stay what the model is asked with, so the continuation
    is tokenised alone. White space in front of the continuation is dropped where the prompt ends in white space, as chat
    templates with a line for the role do.

    Raises
    ------
    ValueError
        A continuation without tokens: it has no likelihood.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    text = continuation.lstrip() if prompt[-1:].isspace() else continuation
    before, whole = ids(prompt), ids(prompt + text)
    found = whole[len(before) :] if whole[: len(before)] == before else ids(text)
    if not found:
        raise ValueError(f"got the continuation {continuation!r}, which has no tokens, expected some text; mend the document's choices.")
    return found


@torch.no_grad()
def score(model: nn.Module, pruner: Pruner, reading: Reading, continuations: Sequence[Sequence[int]]) -> list[Score]:
    """Score every continuation behind the one prompt of `reading`.

    Parameters
    ----------
    model
        The Hugging Face VLM that has just read the prompt.
    pruner
        The one that the prompt was read with.
    reading
        Of `PREFILL`. Its cache is extended and cut back for each continuation, and in the end is as it was.
    continuations
        Token ids.
    """
    output, scores = reading.output, []
    with prune(model, pruner):  # finds on the cache which tokens each layer still holds
        for ids in continuations:
            tokens = torch.tensor([list(ids)], device=output.logits[0].device)
            logits = output.logits[0]
            if len(ids) > 1:
                logits = torch.cat([logits, _follow(model, cache_of(output), tokens[:, :-1], reading.n_prompt[0])])
            scores.append(_scored(logits, tokens[0]))
    return scores


def _follow(model: nn.Module, cache: object, tokens: Tensor, n_prompt: int) -> Tensor:
    """Logits [n, vocabulary] behind each of `tokens` [1, n], which follow a prompt of `n_prompt` tokens in `cache`."""
    n = tokens.shape[1]
    positions = torch.arange(n_prompt, n_prompt + n, device=tokens.device)[None]
    if family_of(model).mrope:
        positions = (positions + model.model.rope_deltas.to(tokens.device)).expand(3, 1, n)
    mask = torch.ones(1, n_prompt + n, dtype=torch.long, device=tokens.device)
    logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, **with_cache(model.forward, cache)).logits
    for layer in cache.layers:  # not cache.crop, which takes all layers to be as long as the first
        layer.crop(-n)
    return logits[0]


def _scored(logits: Tensor, tokens: Tensor) -> Score:
    """Score of `tokens` [n] from the `logits` [n, vocabulary] in front of each."""
    logprobs = logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return Score(float(logprobs.double().sum()), len(tokens), bool((logits.argmax(-1) == tokens).all()))
