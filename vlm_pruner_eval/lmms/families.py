"""Classes that lmms-eval imports by name: one per family of `vlms/`, called VlmPruner and then as the family is."""

from __future__ import annotations

from vlm_pruner_eval.lmms.wrapper import family_class
from vlm_pruner_eval.vlms import by_model_id

globals().update({cls.__name__: cls for cls in map(family_class, by_model_id())})
