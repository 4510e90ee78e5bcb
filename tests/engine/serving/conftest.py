"""The two ends of an engine's connection."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq

Sockets = tuple[zmq.Socket[bytes], zmq.Socket[bytes]]
"""That of the frontend, and that of the engine."""


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    context = zmq.Context()
    here, there = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    here.bind("inproc://engine")
    there.connect("inproc://engine")
    yield here, there
    here.close(0)
    there.close(0)
    context.term()
