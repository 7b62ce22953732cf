"""Exceptions as sentences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tenacity import RetryError, retry, stop_after_attempt

from vlm_pruner_eval.doctor.finding import FAIL, findings
from vlm_pruner_eval.redact import of_error


@retry(stop=stop_after_attempt(2))
def download() -> None:
    """Fails as lmms-eval's download does without the network."""
    try:
        raise ConnectionError("the hub\ncan't be reached with hf_abcdefghijklmnopqrst")
    except ConnectionError as error:
        raise ValueError("Couldn't find cache for lmms-lab/GQA") from error


@retry(stop=stop_after_attempt(1))
def twice() -> None:
    download()


@pytest.mark.parametrize("call", [download, twice])
def test_a_retried_call_tells_what_it_failed_of(call: Callable) -> None:
    with pytest.raises(RetryError) as raised:
        call()
    expected = "ValueError: Couldn't find cache for lmms-lab/GQA (cause: ConnectionError: the hub can't be reached with ***)"
    assert of_error(raised.value) == expected
    (finding,) = findings([("data", call)])
    assert (finding.status, finding.found) == (FAIL, expected)


def test_other_errors_tell_their_type_and_message() -> None:
    assert of_error(ValueError("a\n b")) == "ValueError: a b"
    assert of_error(KeyError()) == "KeyError"
