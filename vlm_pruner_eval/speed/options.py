"""What the commands of `bench` share: options and lists of numbers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.shown import short

_MOST_DIGITS, _MOST_SIDE_DIGITS = 9, 5

GeometryName = Annotated[str, typer.Option(help="llava-1.5-7b, llava-1.5-13b, llava-next-7b, qwen2-vl-7b, 100m or mini.")]
BatchSizes = Annotated[str, typer.Option(help="Batch sizes.")]
TextTokens = Annotated[int, typer.Option(help="Words of the prompt around the image.")]
NewTokens = Annotated[int, typer.Option(help="Tokens to generate.")]
Repeats = Annotated[int, typer.Option(help="Answers of each case in each of three rounds.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: float16 on a GPU, float32 on a CPU.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU if there is one.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]


def writable(out: Path | None) -> Path | None:
    """Refuse a file that can't be written before anything is measured."""
    if out is None:
        return None
    nearest = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if os.path.isdir(out) or not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"{out} can't be written: a folder, or in none that can be; choose another place.")
    return out


Out = Annotated[Path | None, typer.Option(help="Write the JSON object to this file too.", callback=writable)]


def words(text: str) -> list[str]:
    """The parts of "a,b,c"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def whole_numbers(option: str, text: str) -> list[int]:
    """The numbers of "576,1280".

    Raises
    ------
    ConfigError
        Something else than whole numbers with commas between them.
    """
    try:
        return [_whole(part) for part in words(text)]
    except ValueError:
        raise ConfigError(f"{option}: got {short(text)}, expected whole numbers with commas between them, such as 8,16.") from None


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"{len(text)} characters, expected at most {_MOST_DIGITS}")
    return int(text)


def pixels(option: str, text: str) -> tuple[int, int]:
    """Width and height of "4000x3000".

    Raises
    ------
    ConfigError
        Something else.
    """
    width, cross, height = text.partition("x")
    if not (cross and all(side.isascii() and side.isdecimal() and len(side) <= _MOST_SIDE_DIGITS for side in (width, height))):
        raise ConfigError(f"{option}: got {short(text)}, expected a width and a height in pixels, such as 4000x3000.")
    return int(width), int(height)


def progress(line: str) -> None:
    """Tell how far a benchmark is; stdout is for its result."""
    print(line, file=sys.stderr, flush=True)
