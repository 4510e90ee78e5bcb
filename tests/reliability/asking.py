"""One way to ask a served model and one in this process, so that a case can be tried on both."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sensorium import SamplingParams
from sensorium.errors import SensoriumError
from tests.e2e.serving import Server
from tests.parts import Parts

CHAT = "/v1/chat/completions"
PLAIN = {"max_tokens": 4, "temperature": 0}
PAUSE = 0.01
"""Seconds between two looks at something that is waited for."""
SECRETS = re.compile(
    r"0x[0-9a-f]{4,}|/(?:tmp|dev|home|root|usr|var|etc|proc)\b|\b127\.|::1|localhost|\b169\.254\b|\b10\.0\.|"
    r"object at|BytesIO|Traceback|Errno|site-packages|PIL\.\w+\.|/sensorium/",
    re.IGNORECASE,
)
"""What no message to a client may hold: addresses of memory and of hosts, paths, the inside of
libraries."""


@dataclass(frozen=True)
class Answer:
    """Status and body of an answer; of an exception those that it would have over HTTP."""

    status: int
    body: Any

    @property
    def error(self) -> dict[str, Any]:
        assert self.status != 200, self.body
        return dict(self.body["error"])

    @property
    def text(self) -> str:
        assert self.status == 200, self.body
        return str(self.body["choices"][0]["message"]["content"])

    def is_refusal(self, status: int, code: str, param: str | None) -> None:
        """Check an error: its status, code and place, and that its message gives nothing away."""
        error = self.error
        assert (self.status, error["code"], error["param"]) == (status, code, param), error
        self.is_discreet()

    def is_discreet(self) -> None:
        """Check that an error, if it is one, is of the 4xx kind and tells nothing of the inside."""
        if self.status == 200:
            return
        assert 400 <= self.status < 500, self.body
        message = self.error["message"]
        assert message
        assert not SECRETS.search(message), message


class Service:
    """A running server. Its connections are kept, one per thread."""

    def __init__(self, server: Server, keys: tuple[str, ...] = ()) -> None:
        self.server = server
        self.keys = keys
        self._parts = urlsplit(server.url)
        self._local = threading.local()
        self._good = self.good_answer()

    def request(self, method: str, path: str, body: bytes | None, key: str | None = None) -> Answer:
        """One request; a connection that the server has closed meanwhile is opened anew."""
        headers = {"Content-Type": "application/json"}
        if self.keys or key:
            headers["Authorization"] = f"Bearer {key or self.keys[0]}"
        for attempt in range(2):
            connection = self._connection(new=attempt > 0)
            try:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                data = response.read()
            except (http.client.HTTPException, ConnectionError):
                if attempt:
                    raise
                continue
            return Answer(response.status, _decoded(data))
        raise AssertionError("not reached")

    def post(self, path: str, body: Any, key: str | None = None) -> Answer:
        return self.request("POST", path, json.dumps(body).encode(), key)

    def chat(self, messages: list[Any], key: str | None = None, **fields: Any) -> Answer:
        """Ask with whole messages."""
        return self.post(CHAT, {"messages": messages, **PLAIN, **fields}, key)

    def ask(self, *content: Any, key: str | None = None, **fields: Any) -> Answer:
        """Ask with one message of these parts."""
        return self.chat([{"role": "user", "content": list(content)}], key, **fields)

    def counters(self) -> dict[str, float]:
        """The metrics by name, without prefix; those of a name with several labels summed."""
        found: dict[str, float] = {}
        for line in str(self.request("GET", "/metrics", None).body).splitlines():
            if line and not line.startswith("#"):
                sample, _, value = line.rpartition(" ")
                name = sample.partition("{")[0].partition(":")[2]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def good_answer(self) -> tuple[Any, str]:
        """Token ids and text of the answer to a good request."""
        answer = self.ask(text("What can you do?"), return_token_ids=True)
        return answer.body["choices"][0]["token_ids"], answer.text

    def is_well(self) -> None:
        """Check that the process lives and answers a good request as it did at first."""
        assert self.server.process.poll() is None
        assert self.good_answer() == self._good

    def _connection(self, new: bool) -> http.client.HTTPConnection:
        held: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if held is None or new:
            if held is not None:
                held.close()
            held = http.client.HTTPConnection(str(self._parts.hostname), self._parts.port, 120)
            self._local.connection = held
        return held


@contextlib.contextmanager
def serving(
    model: str, folder: Path, options: Sequence[str], keys: tuple[str, ...] = ()
) -> Iterator[Service]:
    """Run a server with these flags, whose log lies in ``folder``; it must end well."""
    server = Server(model, folder / "log", options)
    try:
        yield Service(server, keys)
    finally:
        status = server.stop()
    assert status == 0


class Client:
    """A connection with one request on it, which nobody waits for."""

    def __init__(self, service: Service, *content: Any, **fields: Any) -> None:
        body = {"messages": [{"role": "user", "content": list(content)}], **fields}
        data = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(data)}\r\n\r\n"
        parts = urlsplit(service.server.url)
        self._connection = socket.create_connection((str(parts.hostname), int(parts.port or 0)), 60)
        self._connection.sendall(head.encode() + data)

    def read(self) -> bytes:
        return self._connection.recv(65536)

    def leave(self) -> None:
        self._connection.close()


class Offline:
    """An ``LLM``, asked like a server; exceptions become the answers that a server would give."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.llm = parts.llm
        self._good = self.ask(text("What can you do?")).text

    def chat(self, messages: list[Any], **fields: Any) -> Answer:
        """Ask with whole messages."""
        own = {k: v for k, v in fields.items() if k == "mm_processor_kwargs"}
        params = {k: v for k, v in {**PLAIN, **fields}.items() if k not in own}
        return self._answer(
            lambda: self.llm.chat(messages, SamplingParams(**params), use_tqdm=False, **own)
        )

    def ask(self, *content: Any, **fields: Any) -> Answer:
        """Ask with one message of these parts."""
        return self.chat([{"role": "user", "content": list(content)}], **fields)

    def generate(self, prompt: Any, **fields: Any) -> Answer:
        """Complete a prompt as ``LLM.generate`` takes it."""
        params = SamplingParams(**{**PLAIN, **fields})
        return self._answer(lambda: self.llm.generate(prompt, params, use_tqdm=False))

    def is_well(self) -> None:
        """Check that a good request is answered as it was at first."""
        assert self.ask(text("What can you do?")).text == self._good

    def _answer(self, call: Any) -> Answer:
        try:
            output = call()[0]
        except SensoriumError as error:
            return Answer(error.status, {"error": error.to_dict()})
        sample = output.outputs[0]
        choice = {
            "message": {"content": sample.text},
            "token_ids": list(sample.token_ids),
            "logprobs": sample.logprobs,
        }
        return Answer(200, {"choices": [choice], "prompt_token_ids": output.prompt_token_ids})


def _decoded(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")


def until(happened: Callable[[], Any], what: Callable[[], str] = str, seconds: float = 300) -> None:
    """Wait until something is the case, and no longer than ``seconds``.

    ``what`` says what is there instead.
    """
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"it never came to that: {what()}"
        time.sleep(PAUSE)


# --- parts of messages ----------------------------------------------------------------------------


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(url: str | None, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": None if url is None else {"url": url}, **more}


def video(url: str | None, **more: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": None if url is None else {"url": url}, **more}


def audio(url: str | None, **more: Any) -> dict[str, Any]:
    return {"type": "audio_url", "audio_url": None if url is None else {"url": url}, **more}


def place(part: dict[str, Any], index: int = 0) -> str:
    """Where an error says that a part of the first message is."""
    return f"messages[0].content[{index}].{part['type']}"


def flags(options: dict[str, Any]) -> list[str]:
    """Keywords of ``LLM`` as flags of ``sensorium serve``."""
    found: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            found.append(flag)
        elif isinstance(value, tuple):
            found += [flag, *map(str, value)]
        elif isinstance(value, dict):
            found += [flag, json.dumps(value)]
        else:
            found += [flag, str(value)]
    return found


def log_of(service: Service) -> str:
    """What the server has written to its log."""
    return Path(service.server.log).read_text()
