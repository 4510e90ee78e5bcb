"""Servers of others: answers that break off, are damaged or would control the terminal."""

from __future__ import annotations

import io
import re
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sensorium.cli.chat.remote import RemoteModel
from sensorium.cli.main import main
from sensorium.errors import SensoriumError, UnavailableError

OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
MODELS = OK + b'{"data": [{"id": "m"}]}'
PART = b'data: {"choices": [{"delta": {"content": "part"}}]}\n\n'
QUESTION = [{"role": "user", "content": "Hi"}]


@contextmanager
def server(
    answer: bytes, *, models: bytes = MODELS, reset: threading.Event | None = None
) -> Iterator[str]:
    """The address of a server that sends these bytes; it resets the connection at the event."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            head = b""
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                head += line
            size = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            self.rfile.read(int(size[1]) if size else 0)
            if head.startswith(b"GET"):
                self.wfile.write(models)
                return
            self.wfile.write(answer)
            if reset is not None:
                assert reset.wait(60)
                linger = struct.pack("ii", 1, 0)
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.request.close()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield "http://{}:{}".format(*listener.server_address)
        finally:
            listener.shutdown()
            thread.join()


def answer_of(url: str) -> str:
    return "".join(RemoteModel(url).stream(QUESTION, {}))


def test_other_spellings_of_a_stream_are_read() -> None:
    odd = b': comment\n\ndata:{"choices": null, "error": null}\n\ndata: {"choices": [{"delta": null}]}\n\n'
    with server(OK + odd + PART + b"data:[DONE]\n\n") as url:
        assert answer_of(url) == "part"


@pytest.mark.parametrize(
    "answer",
    [
        OK + PART,
        OK,
        CHUNKED + b"%x\r\n%b\r\n" % (len(PART), PART),
        CHUNKED + b"%x\r\n%b" % (len(PART) + 9, PART),
        CHUNKED + b"no size\r\n",
        OK + PART + b'data: {"choices": [\n\n',
        OK + PART + b"data: \xff\n\n",
        OK + PART + b"data: [1]\n\n",
        OK + PART + b'data: {"choices": [1]}\n\n',
        OK + b"data: " + b"[" * 100_000 + b"\n\n",
        OK + b"x" * 100_000,
        b"nonsense",
        b"",
    ],
)
def test_an_answer_that_is_not_whole_is_no_answer(answer: bytes) -> None:
    with server(answer) as url, pytest.raises(UnavailableError, match=re.escape(url)):
        answer_of(url)


def test_a_reset_connection_is_told() -> None:
    reset = threading.Event()
    with server(OK + PART, reset=reset) as url:
        answer = RemoteModel(url).stream(QUESTION, {})
        assert next(answer) == "part"
        reset.set()
        with pytest.raises(UnavailableError, match="broke off"):
            next(answer)


def test_a_chat_goes_on_after_a_broken_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("One\nTwo\n"))
    with server(OK + PART) as url:
        assert main(["chat", "--base-url", url]) == 0
    assert capsys.readouterr().err.count("before it was complete") == 2


@pytest.mark.parametrize("error", [b'"full"', b'{"message": "full"}', b'{"code": "full"}'])
def test_an_error_amid_a_stream_is_told(error: bytes) -> None:
    with server(OK + b'data: {"error": %b}\n\n' % error) as url:
        with pytest.raises(SensoriumError, match="full") as caught:
            answer_of(url)
        assert not isinstance(caught.value, UnavailableError)


@pytest.mark.parametrize("models", [OK + b"<html>", OK + b"[]", OK + b'{"data": [{}]}', OK + b"1"])
def test_what_lists_no_models_is_no_server_of_this_api(models: bytes) -> None:
    with server(b"", models=models) as url, pytest.raises(UnavailableError, match="no answer of"):
        RemoteModel(url)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_refusals_do_not_control_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = b"HTTP/1.1 500 Oh\r\nConnection: close\r\n\r\n\x1b]0;owned\x07"
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with server(b"", models=refusal) as url:
        assert main(["chat", "--base-url", url]) == 1
    assert "owned" in screen.getvalue()
    assert not set(screen.getvalue()) & set("\x1b\x07")
