"""Client of a running server; uses the standard library only."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

from sensorium.errors import ConfigError, SensoriumError, UnavailableError

TIMEOUT_SECONDS = 600.0
_WRONG_FORM = (ValueError, RecursionError, LookupError, TypeError, AttributeError)
"""Errors of reading what is no JSON, or none of the expected form."""


class Thought(str):
    """A piece of what a reasoning model thinks before its answer."""

    __slots__ = ()


class RemoteModel:
    """A model behind an OpenAI-compatible API; ``base_url`` may end in ``/v1``."""

    def __init__(
        self, base_url: str, *, model: str | None = None, api_key: str | None = None
    ) -> None:
        url = urlsplit(base_url if "//" in base_url else f"http://{base_url}")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"--base-url must be an http(s) address, got {base_url!r}.")
        self._url = url
        path = url.path.rstrip("/")
        self._prefix = path if path.endswith("/v1") else f"{path}/v1"
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.name = model or self._first_model()

    def stream(
        self, messages: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]
    ) -> Iterator[str]:
        """Yield the answer piece by piece; what comes before it as ``Thought``.

        Raises:
            SensoriumError: the server refused the request or failed; its message is included.
            UnavailableError: the answer broke off or cannot be read.
        """
        body = {"model": self.name, "messages": list(messages), "stream": True, **sampling}
        with closing(self._connection()) as connection:
            response = self._send(connection, "POST", "/chat/completions", json.dumps(body))
            with self._reading():
                for line in response:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[len(b"data:") :].strip()
                    if data == b"[DONE]":
                        return
                    yield from pieces_of(json.loads(data))
        raise UnavailableError(f"{self._server} ended the answer before it was complete.")

    def close(self) -> None:
        """Do nothing: no connection is kept between two answers."""

    def _first_model(self) -> str:
        with closing(self._connection()) as connection:
            response = self._send(connection, "GET", "/models", None)
            with self._reading():
                answer = json.loads(response.read())
                models = [card["id"] for card in answer.get("data", [])]
        if not models:
            raise ConfigError("The server lists no model; name one with --model.")
        return str(models[0])

    def _connection(self) -> http.client.HTTPConnection:
        secure = self._url.scheme == "https"
        cls = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return cls(self._url.hostname or "", self._url.port, timeout=TIMEOUT_SECONDS)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: str | None
    ) -> http.client.HTTPResponse:
        try:
            data = None if body is None else body.encode()
            connection.request(method, f"{self._prefix}{path}", data, self._headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"{self._server} does not answer ({error}).") from error
        if response.status != 200:
            with self._reading():
                refusal = response.read()
            raise _refusal(response.status, refusal)
        return response

    @property
    def _server(self) -> str:
        return f"{self._url.scheme}://{self._url.netloc}"

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what goes wrong while an answer is read into UnavailableError."""
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"{self._server} broke off its answer ({error}).") from error
        except _WRONG_FORM as error:
            raise UnavailableError(
                f"{self._server} sent something that is no answer of an OpenAI-compatible API."
            ) from error


def pieces_of(chunk: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of a chunk. Raises SensoriumError for one that is an error."""
    if chunk.get("error"):
        error = chunk["error"]
        known = error.get("message") if isinstance(error, Mapping) else None
        raise SensoriumError(str(known or error))
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if thought:
            yield Thought(thought)
        yield str(delta.get("content") or "")


def _refusal(status: int, body: bytes) -> SensoriumError:
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode("utf-8", "replace")
    return SensoriumError(f"The server answered {status}: {message}")
