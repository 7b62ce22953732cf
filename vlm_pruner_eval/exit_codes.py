"""Exit codes of commands, and sentences for errors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from vlm_pruner_eval.durable import stopped
from vlm_pruner_eval.errors import ConfigError, PruningError, StoppedError

P = ParamSpec("P")
FAILED, BAD_INPUT = 1, 2


def sentences(command: Callable[P, None]) -> Callable[P, None]:
    """Map ConfigError to exit code 2 and run failures to 1, each printed as one line on stderr, without a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ConfigError as error:
            raise _end(BAD_INPUT, *error.problems) from None
        except (StoppedError, PruningError) as error:
            raise _end(FAILED, error) from None
        except OSError as error:
            if full := stopped(error):
                raise _end(FAILED, full) from None
            raise

    return run


def _end(code: int, *problems: object) -> typer.Exit:
    for problem in problems:
        print(f"vlm-pruner-eval: {problem}", file=sys.stderr)
    return typer.Exit(code)
