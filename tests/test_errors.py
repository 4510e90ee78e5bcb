"""Where errors are placed in a caller's request."""

from __future__ import annotations

import pytest

from sensorium.errors import (
    InvalidRequestError,
    OverloadedError,
    PlaceholderMismatchError,
    SensoriumError,
    located,
)


def placed(error: SensoriumError, *args: str, **keywords: object) -> SensoriumError:
    with pytest.raises(type(error)) as caught, located(*args, **keywords):  # type: ignore[arg-type]
        raise error
    return caught.value


def test_an_error_gets_its_place_unless_it_has_one() -> None:
    assert placed(InvalidRequestError("Wrong."), "prompt").param == "prompt"
    assert placed(InvalidRequestError("Wrong.", param="n"), "prompt").param == "n"


def test_an_error_of_the_server_gets_no_place_in_the_request() -> None:
    error = OverloadedError("Full.")
    error.retry_after = 7
    found = placed(error, "prompt")
    assert isinstance(found, OverloadedError)
    assert (found.param, found.retry_after) == (None, 7)


def test_an_error_that_several_wait_for_is_placed_for_each() -> None:
    shared = PlaceholderMismatchError("2 of 3.", "Add one.")
    first, second = placed(shared, "prompt"), placed(shared, "messages", prompt=1)
    assert isinstance(second, PlaceholderMismatchError)
    assert (shared.param, first.param, second.param) == (None, "prompt", "messages")
    assert (second.message, second.found) == ("Prompt 1: 2 of 3. Add one.", "2 of 3.")
    assert (str(second), second.index, shared.index) == (second.message, 1, None)


def test_the_callers_name_stands_in_the_message_too() -> None:
    error = InvalidRequestError("json is no schema, json.", param="json")
    found = placed(error, rename={"json": "response_format"}.__getitem__)
    assert (found.param, str(found)) == ("response_format", "response_format is no schema, json.")


def test_the_cause_of_an_error_is_kept() -> None:
    cause = KeyError("x")
    with pytest.raises(InvalidRequestError) as caught, located("prompt"):
        raise InvalidRequestError("Wrong.") from cause
    assert caught.value.__cause__ is cause
