"""Lets lmms-eval's tasks of type multiple_choice and loglikelihood ask a chat model.

lmms-eval 0.7.3 can't do that with any model: its chat tasks make requests for generated answers only, its evaluator turns
the pair (value, is_greedy) of every answer into text, and its metrics of type loglikelihood unpack the wrong list. The
first and the last are mended on the tasks of our models only, the second for that pair only, which nothing else returns.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from vlm_pruner_eval.errors import ConfigError

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.task import ConfigurableTask

TYPES = ("multiple_choice", "loglikelihood")
TOTAL = "vlm_pruner_eval_total"  # metadata of a request: its task divides by the length of each choice itself


def offer(loaded: dict) -> None:
    """Let every scored chat task in `loaded` (groups nested, as lmms-eval's task index answers) make requests.

    Raises
    ------
    ConfigError
        A metric that can't be computed rightly.
    """
    from lmms_eval.api.task import ConfigurableMessagesTask

    for value in loaded.values():
        task = value[1] if isinstance(value, tuple) else value
        if isinstance(task, dict):
            offer(task)
        elif isinstance(task, ConfigurableMessagesTask) and task.OUTPUT_TYPE in TYPES:
            _offer(task)


def _offer(task: ConfigurableTask) -> None:
    if "acc_mutual_info" in task.aggregation():
        raise ConfigError(
            f"{task.config.task}: metric_list: got acc_mutual_info, for which lmms-eval wants log-likelihoods, while its other metrics "
            "of multiple_choice want losses; remove it, acc and acc_norm are offered."
        )
    task.construct_requests = functools.partial(_requests, task)
    if task.OUTPUT_TYPE == "loglikelihood" and not callable(task.config.process_results):
        task.process_results = functools.partial(_process_results, task.process_results)


def _requests(task: ConfigurableTask, doc_id: int, ctx: str, **kwargs: object) -> list[Instance]:
    """The requests of one document ``(ctx, continuation, doc_to_messages, doc_id, task, split)``, one per choice."""
    from lmms_eval.api.task import ConfigurableTask

    made = ConfigurableTask.construct_requests(task, doc_id, ctx, **kwargs)
    return [_as_chat(task, instance) for instance in (made if isinstance(made, list) else [made])]


def _as_chat(task: ConfigurableTask, instance: Instance) -> Instance:
    context, continuation, _, *where = instance.arguments
    if callable(continuation):  # multiple_choice has put the delimiter in front itself
        continuation = functools.partial(_delimited, task.config.target_delimiter, continuation)
    to_messages = functools.partial(_messages, task, context) if task.multiple_input else task.doc_to_messages
    metadata = instance.metadata | {TOTAL: "acc_norm" in task.aggregation()}
    return dataclasses.replace(instance, arguments=(context, continuation, to_messages, *where), metadata=metadata)


def _delimited(delimiter: str, doc_to_target: Callable[[dict], object], document: dict) -> str:
    return f"{delimiter}{doc_to_target(document)}"


def _messages(task: ConfigurableTask, question: str, document: dict) -> list[dict]:
    """The chat of a task whose choices are questions: the document's images, and one of them."""
    from lmms_eval.api.task import ConfigurableMessagesTask

    return ConfigurableMessagesTask._build_user_turn(task.doc_to_visual(document), question)


def _process_results(process_results: Callable[..., dict], doc: dict, results: list, full_docs: object = None) -> dict:
    """`results` holds one pair per request, and there is one request; lmms-eval expects the pair itself."""
    (result,) = results
    return process_results(doc, result, full_docs=full_docs)


def keep_pairs() -> None:
    """Let pairs (value, is_greedy) through lmms-eval's `unwrap_generation_output`, which would make text of them."""
    from lmms_eval.api import instance

    original = instance.unwrap_generation_output
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def unwrap_generation_output(output: object) -> tuple:
        return (output, None) if _is_pair(output) else original(output)

    instance.unwrap_generation_output = unwrap_generation_output
    if evaluator := sys.modules.get("lmms_eval.evaluator"):
        evaluator.unwrap_generation_output = unwrap_generation_output


def _is_pair(output: object) -> bool:
    """A number and a truth value; lists come from lmms-eval's cache of answers."""
    return isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[0], float) and isinstance(output[1], bool)
