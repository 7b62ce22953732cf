"""Alias of `vlm_pruner_eval.embedded`, under the name that it had."""

from vlm_pruner_eval.embedded import minivlm_path, questions_path, tasks_path  # noqa: F401
