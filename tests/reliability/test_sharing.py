"""A hundred requests at once for one URL.

One fetch, one decode, one encode, by counters and by the host's own log.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.reliability.asking import Answer, Service, flags, image, serving, text, until
from tests.reliability.listeners import Host
from tests.reliability.media import encoded, picture

NUM = 100
STAGE = re.compile(r'media_stage_items_total\{[^}]*stage="(\w+)"[^}]*\} (\S+)')


@pytest.fixture(scope="module")
def sharing_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The demo model, with times that make what "at once" means independent of this machine."""
    options = {
        "allowed_media_domains": ("localhost",),
        "image_fetch_timeout": 60.0,
        "media_url_reuse_seconds": 3600.0,
        "num_kv_blocks": 400,
    }
    with serving("demo", tmp_path_factory.mktemp("sharing"), flags(options)) as service:
        yield service


def stages(service: Service) -> dict[str, int]:
    """How many items each stage was done for."""
    page = str(service.request("GET", "/metrics", None).body)
    return {name: int(float(value)) for name, value in STAGE.findall(page)}


@pytest.mark.parametrize("host_is_slow", [True, False])
def test_a_hundred_requests_for_one_url(
    sharing_server: Service, media_host: Host, host_is_slow: bool
) -> None:
    """Whether the host answers after the last of them has come, or before most have."""
    service, path = sharing_server, f"/shared-{host_is_slow}"
    data = encoded(picture(seed=100 + host_is_slow))
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()

    def script(connection: socket.socket) -> None:
        if host_is_slow:
            until(lambda: service.counters()["media_loading"] >= NUM)
        connection.sendall(head + data)

    part = image(media_host.act(path, script))
    before = stages(service)
    answers: list[Answer] = []

    def ask() -> None:
        answers.append(service.ask(part, text("What is this?"), max_tokens=2))

    threads = [threading.Thread(target=ask) for _ in range(NUM)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status for answer in answers] == [200] * NUM
    assert len({answer.text for answer in answers}) == 1
    assert media_host.paths.count(path) == 1
    after = stages(service)
    assert {name: after[name] - before[name] for name in after} == dict.fromkeys(
        ("fetch", "decode", "preprocess", "encode"), 1
    )
