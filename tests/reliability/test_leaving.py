"""A client that leaves, at whatever stage its request is, takes all of its work along and nothing else."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.serving import Server
from tests.reliability.asking import CHAT, Service, flags, image, text
from tests.reliability.listeners import Host
from tests.reliability.media import data_url, encoded, picture, picture_url

OPTIONS: dict[str, Any] = {
    "allowed_media_domains": ("localhost",),
    "image_fetch_timeout": 300,
    "grammar_timeout": 0.3,
    "max_num_seqs": 1,
    "num_kv_blocks": 200,
}
BUSY = (
    *("num_requests_running", "num_requests_waiting", "mm_held_requests", "kv_cache_usage_perc"),
    *("media_loading", "media_waiting", "media_workers_busy"),
)
"""Gauges that are 0 when there is no work."""


@pytest.fixture(scope="module")
def patient_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    server = Server("demo", tmp_path_factory.mktemp("patient") / "log", flags(OPTIONS))
    try:
        yield Service(server)
    finally:
        assert server.stop() == 0


@pytest.fixture
def patient(patient_server: Service) -> Iterator[Service]:
    """A server that runs one sequence at a time, and waits for media as long as it takes."""
    yield patient_server
    patient_server.is_well()
    until(lambda: not busy(patient_server), lambda: str(busy(patient_server)))


def busy(service: Service) -> dict[str, float]:
    """The gauges that show work."""
    found = {name.partition("{")[0]: value for name, value in service.counters().items()}
    return {name: found[name] for name in BUSY if found[name]}


def until(happened: Callable[[], Any], what: Callable[[], str] = str) -> None:
    """Wait until something is the case."""

    async def wait() -> None:
        async with asyncio.timeout(60):
            while not await asyncio.to_thread(happened):
                await asyncio.sleep(0.01)

    try:
        asyncio.run(wait())
    except TimeoutError:
        raise AssertionError(f"it never came to that: {what()}") from None


class Client:
    """A connection with one request on it, which nobody waits for."""

    def __init__(self, service: Service, *content: Any, **fields: Any) -> None:
        body = {"messages": [{"role": "user", "content": list(content)}], **fields}
        data = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(data)}\r\n\r\n"
        host, port = service.server.url.removeprefix("http://").split(":")
        self._connection = socket.create_connection((host, int(port)), 60)
        self._connection.sendall(head.encode() + data)

    def read(self) -> bytes:
        return self._connection.recv(65536)

    def leave(self) -> None:
        self._connection.close()


LONG: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True, "stream": True, "temperature": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_the_media_server_is_slow(
    patient: Service, media_host: Host, stream: bool
) -> None:
    """The download ends with the client, not with its deadline of minutes: the slow host sees its connection closed."""
    closed = threading.Event()

    def dawdle(connection: socket.socket) -> None:
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
            while connection.recv(4096):
                pass  # nothing comes until the other side closes
        except OSError:
            pass
        closed.set()

    path = f"/slow-{stream}.png"
    url = media_host.act(path, dawdle)
    client = Client(patient, image(url), text("What?"), stream=stream)
    until(lambda: path in media_host.paths)
    client.leave()
    assert closed.wait(60), "the download went on without a client"


def test_one_of_two_that_wait_for_a_download_leaves(patient: Service, media_host: Host) -> None:
    """The other one gets its picture: of one download."""
    go = threading.Event()
    data = encoded(picture(seed=71))

    def gated(connection: socket.socket) -> None:
        go.wait(60)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

    url = media_host.act("/gated.png", gated)
    leaving = Client(patient, image(url), text("What?"))
    until(lambda: "/gated.png" in media_host.paths)
    staying = Client(patient, image(url), text("What?"), max_tokens=2)
    until(lambda: patient_loading(patient) >= 2)
    leaving.leave()
    until(lambda: patient_loading(patient) == 1)
    go.set()
    assert b" 200 " in staying.read().split(b"\r\n")[0]
    assert media_host.paths.count("/gated.png") == 1
    staying.leave()


def patient_loading(service: Service) -> float:
    return busy(service).get("media_loading", 0)


def test_leaving_while_media_are_decoded(patient: Service) -> None:
    for seed in range(20):
        large = encoded(picture(3500, 3000, seed), "PNG", compress_level=1)
        client = Client(patient, image(data_url(large)), text("What?"))
        seen = False
        while not seen and busy(patient):
            seen = "media_workers_busy" in busy(patient)
        client.leave()
        if seen:
            return
    raise AssertionError("decoding was too quick to be seen")


def test_leaving_the_queue(patient: Service) -> None:
    clients = [Client(patient, image(picture_url(n)), text("a"), **LONG) for n in range(12)]
    until(lambda: busy(patient).get("num_requests_waiting", 0) >= 3, lambda: str(busy(patient)))
    before = patient.counters()["generation_tokens_total"]
    for client in clients:
        client.leave()
    until(lambda: not busy(patient), lambda: str(busy(patient)))
    after = patient.counters()["generation_tokens_total"]
    assert after - before < 3 * LONG["max_tokens"], "what waited was computed all the same"


@pytest.mark.parametrize("more", [{}, {"n": 4}, {"structured_outputs": {"regex": "[a-z]{500}"}}])
def test_leaving_amid_the_answer(patient: Service, more: dict[str, Any]) -> None:
    client = Client(patient, image(picture_url()), text("a"), **LONG, **more)
    while b"data:" not in client.read():
        pass
    client.leave()


def test_leaving_at_any_moment(patient: Service) -> None:
    """Forty clients leave after a while that grows from nothing to a whole answer: within the body, the preparation,
    the encoder's step, the prompt's, the answer's."""
    turns = 40
    for number in range(turns):
        client = Client(
            patient, image(picture_url(100 + number, 200, 160)), text("word " * 300), max_tokens=8
        )
        for _ in range(number // 4):
            patient.request("GET", "/health", None)
        client.leave()


def test_leaving_within_a_constraint_that_never_compiles(patient: Service) -> None:
    pattern = [{"properties": {"a": {"type": "string", "pattern": f".*{i}.*"}}} for i in range(200)]
    client = Client(patient, text("a"), structured_outputs={"json": {"allOf": pattern}})
    patient.request("GET", "/health", None)
    client.leave()
    assert patient.ask(text("a"), structured_outputs={"regex": "abc"}, max_tokens=8).text == "abc"
