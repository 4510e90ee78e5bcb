"""A fork server whose children answer each message.

``python -m tests.processes.forking DESCRIPTOR``.
"""

from __future__ import annotations

import os
import socket
import sys

from sensorium.processes.fork_server import begin_server, serve
from sensorium.processes.framing import receive_frame, send_frame


def work(connection: socket.socket) -> int:
    """Send back what comes, with the process id.

    ``exit N`` ends with this code, ``fail`` with an exception.
    """
    while (message := receive_frame(connection)) is not None:
        if message == b"fail":
            raise ValueError("as it was told")
        if message.startswith(b"exit"):
            return int(message[5:])
        send_frame(connection, message + b" %d" % os.getpid())
    return 0


if __name__ == "__main__":
    control, first = begin_server(sys.argv[1])
    assert first == b"first"
    serve(control, work)
