"""A client that leaves, at whatever stage its request is, takes all of its work along and
nothing else.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.reliability.asking import Client, Service, flags, image, serving, text, until, video
from tests.reliability.listeners import Host
from tests.reliability.media import encoded, endless_clip, picture, picture_url

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
    with serving("demo", tmp_path_factory.mktemp("patient"), flags(OPTIONS)) as service:
        yield service


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


LONG: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True, "stream": True, "temperature": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_the_media_server_is_slow(
    patient: Service, media_host: Host, stream: bool
) -> None:
    """The download ends with the client, not with its deadline of minutes.

    The slow host sees its connection closed.
    """
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
    """What is decoded for nobody is ended long before it would be done."""
    client = Client(patient, video(endless_clip()), text("What?"))
    until(lambda: "media_workers_busy" in busy(patient), lambda: str(busy(patient)))
    client.leave()


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
    until(lambda: b"data:" in client.read())
    client.leave()


def test_leaving_at_any_moment(patient: Service) -> None:
    """Forty clients leave after a while that grows from nothing to a whole answer.

    Within the body, the preparation, the encoder's step, the prompt's, the answer's.
    """
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
