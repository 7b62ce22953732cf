"""One door for golden files of the method zoo: feeds a file's inputs to the public methods, returns what the file calls its outputs.

``answer(method, arrays, meta)`` takes the arrays of a file as they are (float16 inputs are cast to float32 here) and its `meta`; the
folders' READMEs say which arrays are inputs, which are outputs, and what equality means.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

HERE = str(Path(__file__).parent)
if HERE not in sys.path:  # loaded by its path, from outside of these tests
    sys.path.insert(0, HERE)

Arrays = dict[str, np.ndarray]
Answer = Callable[[Arrays, Mapping[str, Any]], Arrays]

# module that answers for each folder of golden files, by a function of the folder's name
MODULES = {
    "zoo_vision": ("visionzip", "visionzip_next", "fastervlm", "vispruner", "scope", "prumerge", "hiprune", "holov"),
    "zoo_llm": ("sparsevlm", "pdrop", "vscan", "mustdrop"),
    "zoo_question": ("cdpruner", "trim"),
}


def answer(method: str, arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    """Outputs of a golden file, computed by the product from its inputs.

    Parameters
    ----------
    method
        Name of the file's folder.

    Raises
    ------
    KeyError
        No such folder is known.
    """
    module = {name: module for module, names in MODULES.items() for name in names}[method]
    function: Answer = getattr(importlib.import_module(module), method)
    inputs = {name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in arrays.items()}
    return function(inputs, meta)
