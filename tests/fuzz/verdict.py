"""What an answer must be, whatever was sent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sensorium.errors import RequestError, SensoriumError, UnavailableError
from tests.fuzz.messages import leak_in
from tests.fuzz.requests import Sent


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP answer; ``status`` 0 when none came, and ``lost`` says why."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    lost: str = ""

    @property
    def code(self) -> str:
        """The error's code; empty without one."""
        if self.status in (0, 200):
            return ""
        try:
            return str(json.loads(self.body)["error"]["code"])
        except (ValueError, TypeError, KeyError):
            return ""


def _all_codes(cls: type[SensoriumError]) -> Iterator[tuple[str, int]]:
    yield cls.code, cls.status
    for below in cls.__subclasses__():
        yield from _all_codes(below)


CODES = {
    **dict(_all_codes(RequestError)),
    **dict(_all_codes(UnavailableError)),
    "not_found": 404,
    "method_not_allowed": 405,
}
"""Every code that a client may see, with its status."""

PLACED = frozenset(
    "media_undecodable invalid_embeddings media_not_cached media_refused media_fetch_failed "
    "media_fetch_timeout "
    "unsupported_modality".split()
)
"""Codes of errors that always have a place in the request."""

_WHOLE = (
    *("The JSON body is not valid", "The body must be a ", "The body is empty"),
    *("Content-Type must be", "This model generates text", "This model makes vectors"),
    "The model gave no usable distribution",
    *("The form", "The body is not a well-formed", "A part of the form", "The headers of a part"),
    "The fields of the form",
)
"""Beginnings of messages about a request as a whole, which have no place to point at."""

_STEP = re.compile(r"\[(\d+)\]|\.?([^.\[\]]+)")


ANTHROPIC = {"type", "error", "request_id"}
"""Members of an error's body on the paths of Anthropic's API."""


def what_is_wrong(sent: Sent, answer: Answer) -> str:
    """Why this must not be the answer to this request; empty when it may be."""
    if answer.lost:
        return f"no answer: {answer.lost}"
    if answer.status == 200:
        return _wrong_success(sent, answer)
    if answer.status == 400 and not answer.body.startswith(b"{"):
        return "" if sent.what == "further headers" else "a 400 that is no JSON"
    if answer.status >= 500 and answer.status != 503:
        return f"status {answer.status}"
    try:
        body = json.loads(answer.body)
    except ValueError:
        return f"an error that is no JSON: {answer.body[:80]!r}"
    members = {"error"} if not sent.path.startswith("/v1/messages") else ANTHROPIC
    if not isinstance(body, dict) or set(body) != members:
        return f"an error of another shape: {answer.body[:80]!r}"
    return wrong_error(sent, body["error"], answer.status)


def wrong_error(sent: Sent, error: Any, status: int | None = None) -> str:
    """What is wrong with the member ``error`` of an answer, or of an event of a stream (without
    a ``status``).
    """
    if not isinstance(error, dict) or set(error) != {"message", "type", "param", "code"}:
        return f"an error with other members: {error!r:.200}"
    code, message, param = error["code"], error["message"], error["param"]
    if code not in CODES or status not in (None, CODES[code]):
        return f"code {code!r} with status {status}"
    if not isinstance(message, str) or not message or len(message) > 2000:
        return f"a message of {len(str(message))} characters"
    leak = leak_in(message, sent.body.decode("utf-8", "replace") + sent.path)
    if leak:
        return f"a message with {leak}: {message[:300]!r}"
    if param is not None and not isinstance(param, str):
        return f"param {param!r}"
    if code in PLACED and (param is None or not _exists(_value_of(sent), param)):
        return f"{code} at {param!r}, which is no place in the request"
    if code == "invalid_request" and param is None and not message.startswith(_WHOLE):
        return f"invalid_request without a place: {message[:200]!r}"
    return ""


def _value_of(sent: Sent) -> Any:
    """What the body holds; None when it is no JSON for Python."""
    try:
        return sent.value if sent.value is not None else json.loads(sent.body)
    except (ValueError, RecursionError):
        return None


def _exists(value: Any, param: str) -> bool:
    """Whether ``messages[0].content[1].image_url`` names something in ``value`` (its last step
    may be missing there); True when nobody knows ``value``.
    """
    if value is None:
        return True
    for number, name in _STEP.findall(param):
        if number and isinstance(value, list) and int(number) < len(value):
            value = value[int(number)]
        elif name and isinstance(value, dict):
            value = value.get(name)
        elif number or not isinstance(value, dict | str | None):
            return False
    return True


def _wrong_success(sent: Sent, answer: Answer) -> str:
    if sent.method != "POST" or sent.path not in _MEMBERS:
        return ""
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        return _wrong_stream(sent, answer.body)
    try:
        body = json.loads(answer.body)
    except ValueError:
        return f"an answer that is no JSON: {answer.body[:80]!r}"
    missing = _MEMBERS[sent.path] - set(body)
    return f"an answer without {sorted(missing)}" if missing else ""


def _wrong_stream(sent: Sent, body: bytes) -> str:
    events = [event for event in body.decode().split("\n\n") if event]
    if not events or events[-1] != "data: [DONE]":
        return f"a stream that ends with {events[-1:]!r:.200}"
    for event in events[:-1]:
        value = json.loads(event.removeprefix("data: "))
        if "error" in value:
            return wrong_error(sent, value["error"])
    return ""


_MEMBERS = {
    "/v1/chat/completions": {"id", "choices", "usage", "model"},
    "/v1/completions": {"id", "choices", "usage", "model"},
    "/v1/embeddings": {"data", "usage", "model"},
    "/tokenize": {"tokens", "count"},
    "/detokenize": {"prompt"},
    "/v1/files": {"id", "object", "bytes", "filename", "purpose"},
    "/v1/batches": {"id", "object", "status", "request_counts"},
}
