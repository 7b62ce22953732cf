"""Files that a user names: read only if they are ordinary files of a sensible size, parsed only if they can't blow up."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.redact import TOKEN, short, spelled_out

MOST_BYTES = 128 * 1024  # of a sweep file, of which the longest shipped one has 3 KB
MOST_VALUES = 5_000  # with anchors written out
MOST_CHARACTERS = 4_000  # of a text
MOST_BITS = 63  # of a whole number


def read_text(path: Path, *, most_bytes: int, advice: str) -> str:
    """The text of an ordinary file; a device or a pipe would never end, or never begin.

    Parameters
    ----------
    advice
        What to do, the end of the sentence.

    Raises
    ------
    ConfigError
        Not there, not a file, too long, or not UTF-8.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "a device or a pipe"
            raise ConfigError(f"{path}: can't be read as a text file (it is {what}); {advice}")
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise ConfigError(f"{path}: can't be read as a text file (got more than {most_bytes} bytes, expected at most that); {advice}")
        return content.decode("utf-8-sig")
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: bytes that are no text, here or in the path
        raise ConfigError(f"{path}: can't be read as a text file ({error}); {advice}") from error


def read_yaml(path: Path, *, advice: str) -> tuple[Any, list[str]]:
    """The value of a YAML file, and the keys that are there twice, a sentence each (YAML itself lets the last one win).

    Raises
    ------
    ConfigError
        What `read_text` refuses, what is not YAML, and what no program should unfold: anchors that contain themselves or stand for
        thousands of values, other keys than text, control characters, huge numbers and texts, access tokens.
    """
    text = read_text(path, most_bytes=MOST_BYTES, advice=advice)
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is not None and (problems := _unfoldable(node)):
                raise ConfigError([f"{path}: {problem}" for problem in problems])
            repeated = [f"{path}: {problem}" for problem in _repeated_keys(node, "", set())]
            raw = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except ConfigError:
        raise
    # The others are what PyYAML's constructors raise for values that their tags or forms do not fit, such as `!!bool x`.
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        where = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path}: is not valid YAML ({where}); mend it there.") from error
    if problems := list(_hostile(raw, "")):
        raise ConfigError([*repeated, *(f"{path}: {problem}" for problem in problems)])
    return raw, repeated


def _unfoldable(node: yaml.Node) -> list[str]:
    problems: list[str] = []
    _count(node, "", {}, set(), problems)
    return problems[:1]  # what holds a bomb is as large


def _count(node: yaml.Node, path: str, counted: dict[int, int], above: set[int], problems: list[str]) -> int:
    """Values that a node stands for: anchors multiply, and a dozen lines can mean billions."""
    if id(node) in above:
        problems.append(f"{path}: holds an anchor that contains itself; write the values out.")
        return 0
    if id(node) not in counted:
        above.add(id(node))
        total = 1 + sum(_count(child, at, counted, above, problems) for at, child in _children(node, path))
        above.remove(id(node))
        if total > MOST_VALUES:
            problems.append(
                f"{path or 'the file'}: stands for more than {MOST_VALUES} values with its anchors written out; expected at most that."
            )
        counted[id(node)] = total
    return counted[id(node)]


def _children(node: yaml.Node, path: str) -> Iterator[tuple[str, yaml.Node]]:
    """What a node is made of, with key paths."""
    if isinstance(node, yaml.SequenceNode):
        yield from ((f"{path}[{index}]", child) for index, child in enumerate(node.value))
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = joined(path, key.value if isinstance(key, yaml.ScalarNode) else "?")
            yield from ((name, key), (name, value))


def _repeated_keys(node: yaml.Node | None, path: str, seen: set[int]) -> Iterator[str]:
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in first and key.value != "<<":
                yield f"{joined(path, key.value)}: is given twice (lines {first[key.value]} and {line}); keep one."
            first.setdefault(key.value, line)
    for at, child in _children(node, path):
        yield from _repeated_keys(child, at, seen)


def _hostile(value: object, path: str) -> Iterator[str]:
    """Values that no key of a sweep file can mean, and that messages, file names or terminals could not bear."""
    if isinstance(value, dict):
        for key, held in value.items():
            if not isinstance(key, str):
                yield f"{path or 'the file'}: has the key {short(key)} ({type(key).__name__}), expected text; put quotes around it."
                continue
            yield from _bad_text(key, f"{path or 'the file'}: the key {short(key)}")
            yield from _hostile(held, joined(path, key))
    elif isinstance(value, (list, tuple)):
        for index, held in enumerate(value):
            yield from _hostile(held, f"{path}[{index}]")
    elif isinstance(value, str):
        yield from _bad_text(value, f"{path or 'the file'}: the text")
    elif isinstance(value, int) and value.bit_length() > MOST_BITS:
        yield f"{path or 'the file'}: got a whole number of {value.bit_length()} bits, expected at most {MOST_BITS}."


def _bad_text(text: str, what: str) -> Iterator[str]:
    if len(text) > MOST_CHARACTERS:
        yield f"{what} has {len(text)} characters, expected at most {MOST_CHARACTERS}."
    if spelled_out(text) != text:
        yield f"{what} holds control characters; remove them."
    if TOKEN.search(text):
        yield f"{what} looks like an access token, which records would show; put it into the environment (HF_TOKEN) instead."


def joined(path: str, key: str) -> str:
    """A key path, one key longer; a key that is no plain name is quoted."""
    shown = key if key and len(key) <= 80 and key.isprintable() and not set(key) & set(".[]: ") else short(key)
    return f"{path}.{shown}" if path else shown
