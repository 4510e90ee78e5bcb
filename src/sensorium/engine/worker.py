"""The engine's process: ``python -m sensorium.engine.worker ADDRESS``. Started and stopped by ``engine.client``."""

from __future__ import annotations

import logging
import os
import signal
import sys

import zmq

from sensorium.engine import wire
from sensorium.engine.engine import Engine
from sensorium.errors import SensoriumError

logger = logging.getLogger(__name__)

IDLE_POLL_MS = 1000
"""How often an idle engine looks whether its parent still lives."""


def main() -> int:
    """Connect to the frontend, load what it says, then serve until told to stop or left alone."""
    # The terminal's interrupt reaches the whole process group: the frontend decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(
        level=os.environ.get("SENSORIUM_LOG_LEVEL", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    parent = os.getppid()
    context = zmq.Context(io_threads=1)
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(sys.argv[1])
    try:
        return _serve(socket, parent)
    finally:
        socket.close()
        context.term()


def _serve(socket: zmq.Socket[bytes], parent: int) -> int:
    message = _receive(socket, parent)
    if not isinstance(message, wire.Configure):
        return 1
    try:
        from sensorium.engine.executor import build_engine

        engine = build_engine(message.config)
    except SensoriumError as error:
        socket.send(wire.encode(wire.Failed(error.message, error.code, error.param)))
        return 1
    except Exception as error:
        logger.exception("the engine could not start")
        text = f"The engine could not start: {type(error).__name__}: {error}"
        socket.send(wire.encode(wire.Failed(text, "internal_error")))
        return 1
    socket.send(wire.encode(wire.Ready(engine.facts)))
    loop = _Loop(socket, parent)
    loop.run(engine)
    return 0


def _receive(socket: zmq.Socket[bytes], parent: int) -> wire.ToEngine | None:
    """The next message; None when the parent has gone."""
    while not socket.poll(IDLE_POLL_MS):
        if os.getppid() != parent:
            return None
    return wire.decode_to_engine(socket.recv())


class _Loop:
    """Takes messages between steps; a step when there is work, a blocking wait when there is none."""

    def __init__(self, socket: zmq.Socket[bytes], parent: int) -> None:
        self._socket = socket
        self._parent = parent

    def run(self, engine: Engine) -> None:
        """Serve until ``Stop`` comes or the parent goes."""
        while True:
            if not engine.has_work:
                message = _receive(self._socket, self._parent)
                if message is None or not self._handle(engine, message):
                    return
            while self._socket.poll(0):
                if not self._handle(engine, wire.decode_to_engine(self._socket.recv())):
                    return
            if engine.has_work:
                updates = engine.step()
                if updates:
                    self._socket.send(wire.encode(wire.Updates(updates)))
            if not engine.has_work:
                engine.check_integrity()

    def _handle(self, engine: Engine, message: wire.ToEngine) -> bool:
        """Act on one message; False when it says stop."""
        if isinstance(message, wire.Submit):
            self._submit(engine, message)
        elif isinstance(message, wire.Abort):
            for request_id in message.request_ids:
                engine.abort(request_id)
        elif isinstance(message, wire.AskStats):
            self._socket.send(wire.encode(wire.Stats(message.number, engine.stats())))
        return not isinstance(message, wire.Stop)

    def _submit(self, engine: Engine, message: wire.Submit) -> None:
        try:
            engine.add(message.request, message.features)
        except SensoriumError as error:
            refused = wire.Refused(
                message.request.request_id, error.message, error.code, error.param
            )
            self._socket.send(wire.encode(refused))


if __name__ == "__main__":
    sys.exit(main())
