"""Connections to Ray, and what a cluster of one's own offers to others."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys

import psutil
import pytest

from sensorium.errors import ConfigError, UnavailableError
from sensorium.ray.cluster import found_address, ray_cluster


def listening(process: psutil.Process) -> set[str]:
    """Addresses at which a process and its children listen.

    Those of Ray Serve, which other tests may have started, are left out: see docs/security.md.
    """
    found = set()
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # some live for a moment only
            if one.cmdline()[:1] and one.cmdline()[0].startswith(("ray::Serve", "ray::Proxy")):
                continue
            connections = one.net_connections("inet")
            found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def test_a_cluster_of_ones_own_is_for_this_machine_alone(ray_address: str) -> None:
    found = listening(psutil.Process())
    assert found
    for text in found:
        address = ipaddress.ip_address(text)
        mapped = getattr(address, "ipv4_mapped", None)
        assert (mapped or address).is_loopback, text
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)


def test_a_connection_that_there_is_stays(ray_address: str) -> None:
    import ray

    with ray_cluster(None), ray_cluster("127.0.0.1:1"):
        assert ray.get_runtime_context().gcs_address == ray_address
    assert ray.is_initialized()


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "here", "127.0.0.1:port", ":1", ""])
def test_an_address_that_makes_no_sense(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        found_address(address)


def test_nothing_answers() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(UnavailableError, match="No cluster of Ray answers at"):
            found_address(f"127.0.0.1:{port}")


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "sensorium\[ray\]"'), ray_cluster():
        pass
