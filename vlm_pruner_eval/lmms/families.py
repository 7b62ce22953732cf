"""Classes that lmms-eval imports by name: one per family of `vlms/`, called VlmPruner and then as the family is."""

from __future__ import annotations

import functools

from vlm_pruner_eval.lmms.model import PrunedModel
from vlm_pruner_eval.vlms import by_model_id, family_named


@functools.cache
def family_class(model_id: str) -> type[PrunedModel]:
    """Return the class behind one of our lmms-eval ids.

    Raises
    ------
    ConfigError
        An unknown id.
    """
    family = family_named(model_id)
    attributes = {"family": family, "model_id": model_id, "__doc__": family.__doc__, "__module__": __name__}
    return type(f"VlmPruner{type(family).__name__}", (PrunedModel,), attributes)


def load(model_id: str, **model_args: object) -> PrunedModel:
    """Load a model by its lmms-eval id, for use from Python: problems are exceptions, and the process is never ended.

    Parameters
    ----------
    model_id
        As after ``lmms-eval --model``, e.g. "vlmpruner_llava".
    model_args
        As in ``--model_args``: pretrained, method, pruning_rate, batch_size, dtype and so on.

    Raises
    ------
    ConfigError
        An unknown id, or arguments that can't be run.
    """
    return family_class(model_id)(**model_args)


globals().update({cls.__name__: cls for cls in map(family_class, by_model_id())})
