"""One cluster of Ray for all tests of this folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from sensorium.ray.cluster import local_cluster


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Address of a cluster that this process is connected to."""
    before = (os.getpgrp(), signal.getsignal(signal.SIGTERM))
    with local_cluster(num_cpus=4, object_store_bytes=200 << 20) as address:
        assert (os.getpgrp(), signal.getsignal(signal.SIGTERM)) == before
        yield address
