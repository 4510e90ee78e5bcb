"""The engine's process: ``python -m sensorium.engine.serving.worker ADDRESS PARENT FOLDER ...``.

Started and stopped by ``engine.serving.client``: the address to connect to, the id of the process
that must stay alive, and the folders to remove when it does not.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import shutil
import sys
import time
from typing import TYPE_CHECKING

import zmq

from sensorium.engine import wire
from sensorium.engine.serving.adapter_reader import AdapterReader, expected
from sensorium.errors import SensoriumError, UnavailableError
from sensorium.kernels.cpu import threads
from sensorium.processes.start import begin_child, end_process

if TYPE_CHECKING:
    from sensorium.engine.engine import Engine

logger = logging.getLogger(__name__)

IDLE_POLL_MS = 1000
"""Interval at which an idle engine checks that its parent still lives."""

MESSAGES_BETWEEN_STEPS = 64
"""Most messages that are taken in while sequences wait for their next step."""

BYTES_BETWEEN_STEPS = 1 << 20
"""No more are taken in then after so many bytes of them."""


def main() -> int:
    """Connect to the frontend, load what it says, then serve until told to stop or left alone."""
    begin_child()
    address, parent, folders = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    context = zmq.Context(io_threads=1)
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(address)
    try:
        return _serve(socket, parent)
    finally:
        socket.close()
        context.term()
        if os.getppid() != parent:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)


def _serve(socket: zmq.Socket[bytes], parent: int) -> int:
    try:
        # Before torch, which the executor brings: its OpenMP library reads the policy when it is
        # loaded.
        threads.prepare()
        # Before the configuration comes: the frontend loads its own libraries meanwhile.
        from sensorium.engine.executor import build_engine
    except Exception as error:
        logger.exception("the engine could not start")
        # The frontend may not listen yet, and what is sent now would be lost with this process.
        _receive(socket, parent)
        return _fail(socket, error)
    message = _receive(socket, parent)
    if not isinstance(message, wire.Configure):
        return 1
    try:
        engine = build_engine(message.config, own_process=True)
    except SensoriumError as error:
        socket.send(wire.encode(wire.Failed(error.message, error.code, error.param)))
        return 1
    except Exception as error:
        logger.exception("the engine could not start")
        return _fail(socket, error)
    socket.send(wire.encode(wire.Ready(engine.facts)))
    watch = StepWatch(message.config.scheduler.engine_step_timeout)
    try:
        _Loop(socket, parent, watch, engine).run()
    except Exception:
        # Bookkeeping may be wrong now, and which sequences are intact is unknown: start afresh.
        logger.critical("the engine cannot go on; this process ends", exc_info=True)
        return 1
    finally:
        watch.rest()
    return 0


def _fail(socket: zmq.Socket[bytes], error: Exception) -> int:
    """Tell the frontend of an error that is no fault of the configuration; return the status."""
    text = f"The engine could not start: {type(error).__name__}: {error}"
    socket.send(wire.encode(wire.Failed(text, "internal_error")))
    return 1


def _receive(socket: zmq.Socket[bytes], parent: int) -> wire.ToEngine | None:
    """The next message; None when the parent has gone."""
    while not socket.poll(IDLE_POLL_MS):
        if os.getppid() != parent:
            return None
    return wire.decode_to_engine(socket.recv())


class StepWatch:
    """Watchdog that ends the process when a step takes longer than ``seconds``; 0: never.

    The stacks of all threads go to the log. The interpreter's own watchdog does it, which runs no
    Python, so a kernel that never ends and holds the GIL is caught as well. Setting it costs tens
    of microseconds, so it is not set again for steps that begin within a tenth of the time; it runs
    as much longer, so that no step is ended early. ``is_set``: it counts the time now.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._set_at = 0.0
        self.is_set = False

    def step_begins(self) -> None:
        """A step begins now."""
        now = time.monotonic()
        if self._seconds and not (self.is_set and now - self._set_at < self._seconds / 10):
            faulthandler.dump_traceback_later(self._seconds * 1.1, exit=True)
            self._set_at, self.is_set = now, True

    def rest(self) -> None:
        """No step begins for a while."""
        if self.is_set:
            faulthandler.cancel_dump_traceback_later()
            self.is_set = False


class _Loop:
    """The loop of the process: messages, then a step, or a blocking wait without work."""

    def __init__(
        self, socket: zmq.Socket[bytes], parent: int, watch: StepWatch, engine: Engine
    ) -> None:
        self._socket = socket
        self._parent = parent
        self._watch = watch
        self._engine = engine
        self._reader = AdapterReader(engine, self._tell_adapters)
        self._idle = zmq.Poller()
        self._idle.register(socket, zmq.POLLIN)
        self._idle.register(self._reader.fileno(), zmq.POLLIN)

    def run(self) -> None:
        """Serve until ``Stop`` comes or the parent goes."""
        try:
            self._run(self._engine)
        finally:
            self._reader.close()

    def _run(self, engine: Engine) -> None:
        while os.getppid() == self._parent:
            if not engine.has_work:
                self._watch.rest()
                if not self._wait():
                    return
            num_bytes = 0
            for _ in range(MESSAGES_BETWEEN_STEPS):
                if num_bytes >= BYTES_BETWEEN_STEPS or not self._socket.poll(0):
                    break
                data = self._socket.recv()
                num_bytes += len(data)
                if not self._handle(engine, wire.decode_to_engine(data)):
                    return
            self._watch.step_begins()  # other ranks may hang while they take an adapter
            self._reader.poll()
            if engine.has_work:
                self._watch.step_begins()
                updates = engine.step()
                if updates:
                    self._socket.send(wire.encode(wire.Updates(updates)))
            if not engine.has_work:
                engine.check_integrity()

    def _wait(self) -> bool:
        """Wait for a message, or for an adapter that has been read; False when the parent goes."""
        while not self._idle.poll(IDLE_POLL_MS):
            self._watch.step_begins()
            self._reader.poll()  # it may be late
            self._watch.rest()
            if os.getppid() != self._parent:
                return False
        return True

    def _handle(self, engine: Engine, message: wire.ToEngine) -> bool:
        """Act on one message; False when it says stop."""
        if isinstance(message, wire.Submit):
            self._submit(engine, message)
        elif isinstance(message, wire.Abort):
            for request_id in message.request_ids:
                engine.abort(request_id)
        elif isinstance(message, wire.AskStats):
            self._socket.send(wire.encode(wire.Stats(message.number, engine.stats())))
        elif isinstance(message, wire.AskEmbeddings):
            bits, dtype = engine.embeddings(message.digest)
            self._socket.send(wire.encode(wire.Embeddings(message.number, bits, dtype)))
        elif isinstance(message, wire.LoadAdapter):
            self._reader.begin(message)
        elif isinstance(message, wire.UnloadAdapter):
            self._unload(engine, message)
        return not isinstance(message, wire.Stop)

    def _unload(self, engine: Engine, message: wire.UnloadAdapter) -> None:
        failed = None
        self._watch.step_begins()
        try:
            engine.unload_adapter(message.name)
        except Exception as error:
            failed = expected(error)
        self._tell_adapters(message.number, failed)

    def _tell_adapters(self, number: int, error: SensoriumError | None) -> None:
        """Answer a change of adapters."""
        failed = None if error is None else wire.Failed(error.message, error.code, error.param)
        answer = wire.Adapters(number, self._engine.facts.adapters, failed)
        self._socket.send(wire.encode(answer))

    def _submit(self, engine: Engine, message: wire.Submit) -> None:
        try:
            features = tuple(shared.open() for shared in message.features)
            engine.add(message.request, features)
        except SensoriumError as error:
            self._refuse(message, error)
        except OSError:
            # Mostly the frontend gave the request up, and its features with it, before this message
            # was read.
            self._refuse(
                message, UnavailableError("The media of this request are gone; send it again.")
            )
        except Exception:
            logger.exception("a request could not be taken in")
            self._refuse(message, SensoriumError("The engine could not take this request in."))

    def _refuse(self, message: wire.Submit, error: SensoriumError) -> None:
        refused = wire.Refused(message.request.request_id, error.message, error.code, error.param)
        self._socket.send(wire.encode(refused))


if __name__ == "__main__":
    end_process(main())
