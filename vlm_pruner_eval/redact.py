"""Text as it may be shown and kept: on one line, control characters spelled out, access tokens hidden."""

from __future__ import annotations

import os
import re
import reprlib

HIDDEN = "***"
# Characters that move the cursor, colour a terminal or turn the direction of writing, and halves of characters.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAKS = re.compile(r"[ \t]*[\r\n]\s*")
TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})")
_NAMED = re.compile(
    r"""(?ix)
    ( \b [a-z0-9_-]* (?: token | api[_-]?key | password | passwd | secret ) (?: ["']? \s* = \s* ["']? | ["'] \s* : \s* ["'] )
    | -- [a-z0-9_-]* (?: token | key | password | secret ) \s+ ["']?
    | \b bearer \s+ )
    (?! true\b | false\b | none\b ) [^\s"',;&@\[\](){}<>]{8,}
    """
)
_IN_ADDRESS = re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)")
_SECRET_NAME = re.compile(r"(TOKEN|API_?KEY|ACCESS_?KEY|PASSWORD|PASSWD|SECRET)$")
_SHORTEST_SECRET = 8  # a variable that holds "1" or "true" is a switch
_MOST_BITS = 256


def without_secrets(text: str) -> str:
    """Return the text with access tokens hidden: what looks like one, what is called one, and what the environment holds as one.

    Parameters
    ----------
    text
        A command line, a message or a traceback.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name.upper()):
            text = text.replace(value, HIDDEN)
    return _NAMED.sub(rf"\1{HIDDEN}", _IN_ADDRESS.sub(rf"\1{HIDDEN}", TOKEN.sub(HIDDEN, text)))


def spelled_out(text: str) -> str:
    r"""Return the text with control characters as escapes ("\x1b"), so that names and answers can't steer a terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def sentence(text: str) -> str:
    """Return a message as a user may see it: on one line, with nothing secret and nothing that steers a terminal in it."""
    return spelled_out(without_secrets(_BREAKS.sub(" ", text)))


def of_error(error: BaseException) -> str:
    """Return an exception as a sentence: its type and message.

    `tenacity` wraps lmms-eval's downloads and says of a failed one only that there was a last attempt: the exception of
    that attempt counts, and the first cause of it.
    """
    last = None
    while (attempt := _last_attempt(error if last is None else last)) is not None:
        last = attempt
    if last is None:
        return sentence(_named(error))
    first = last
    seen = {id(last)}
    while (cause := first.__cause__) is not None and id(cause) not in seen:
        seen.add(id(cause))
        first = cause
    text = _named(last)
    return sentence(text if str(first) in text else f"{text} (cause: {_named(first)})")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().removesuffix(":")


def _last_attempt(error: BaseException) -> BaseException | None:
    """Return the last exception of a call that was tried several times; None of other exceptions."""
    attempt = getattr(error, "last_attempt", None)
    return attempt.exception() if callable(getattr(attempt, "exception", None)) else None


class _Short(reprlib.Repr):
    """Short `repr`: a huge value must not flood a message, and Python refuses to write out numbers of thousands of digits."""

    def repr_int(self, value: int, level: int) -> str:
        return f"a whole number of {value.bit_length()} bits" if value.bit_length() > _MOST_BITS else repr(value)


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80


def short(value: object) -> str:
    """Return the `repr` of a value that a message quotes, cut to a line."""
    return _SHORT.repr(value)
