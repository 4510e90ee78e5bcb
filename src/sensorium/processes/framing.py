"""Messages on a stream socket between processes of one machine."""

from __future__ import annotations

import errno
import socket
import time

MAX_FRAME_BYTES = 64 << 20
"""Longest message. Features are none: they lie in segments."""


def send_frame(to: socket.socket, message: bytes, payload: bytes = b"") -> None:
    """Send a message and what follows it; the receiver knows from the message how long that is."""
    to.sendall(len(message).to_bytes(4, "little") + message)
    if payload:
        to.sendall(payload)


def receive_frame(source: socket.socket, most: int = MAX_FRAME_BYTES) -> bytes | None:
    """The next message; None when the other side has closed.

    Raises OSError for one of more than ``most`` bytes.
    """
    head = receive_bytes(source, 4)
    if head is None:
        return None
    num_bytes = int.from_bytes(head, "little")
    if num_bytes > most:
        raise OSError(errno.EMSGSIZE, "a message is too long")
    return receive_bytes(source, num_bytes)


def receive_bytes(source: socket.socket, num_bytes: int) -> bytes | None:
    """Exactly so many bytes; None when the other side closes before they have come.

    The socket's timeout is one for all of them: raises TimeoutError.
    """
    seconds = source.gettimeout()
    deadline = None if seconds is None else time.monotonic() + seconds
    data = bytearray(num_bytes)
    view, got = memoryview(data), 0
    try:
        while got < num_bytes:
            count = source.recv_into(view[got:])
            if not count:
                return None
            got += count
            if deadline is not None and got < num_bytes:
                source.settimeout(max(0.001, deadline - time.monotonic()))
    finally:
        source.settimeout(seconds)
    return bytes(data)
