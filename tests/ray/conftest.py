"""One cluster of Ray for all tests of this folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from sensorium.ray.cluster import local_cluster
from tests.e2e.serving import Server


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Address of a cluster that this process is connected to."""
    before = (os.getpgrp(), signal.getsignal(signal.SIGTERM))
    with local_cluster(num_cpus=4, object_store_bytes=200 << 20) as address:
        assert (os.getpgrp(), signal.getsignal(signal.SIGTERM)) == before
        yield address


@pytest.fixture(scope="module")
def server(
    ray_address: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The demo on that cluster, with the ``FLAGS`` of the module."""
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    started = Server("demo", log, (*request.module.FLAGS, "--ray-address", ray_address))
    yield started
    assert started.stop(signal.SIGINT) == 0, log.read_text()
