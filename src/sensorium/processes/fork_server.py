"""Processes forked from a fork server, one process that has imported what they need.

Both sides of it.

A fork server has one thread and does nothing but fork, kill and wait. Its parent talks to each
child through a socket of the child's own. Children end with the fork server, which ends when its
parent hangs up.

Control protocol, on a stream socket: ``SPAWN`` comes with the descriptor of the child's socket and
is answered with the child's process id, or ``NO_CHILD``; ``WAIT`` comes with a process id and is
answered with the exit code; ``KILL`` comes with a process id and has no answer. Numbers are 4
bytes, little-endian. ``RETIRE``: another fork server takes over.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sensorium.errors import UnavailableError
from sensorium.processes.framing import receive_bytes, receive_frame, send_frame
from sensorium.processes.start import begin_child, end_with, interrupts_held

SPAWN, KILL, WAIT, RETIRE = b"s", b"k", b"w", b"r"
NUMBER_BYTES = 4
NO_CHILD = 0
"""The answer in place of a process id when the system has no further process or memory."""
STOP_SECONDS = 5.0
"""Time that a fork server gets to end by itself."""
_MOMENT = 0.2

logger = logging.getLogger(__name__)


def begin_server(descriptor: str) -> tuple[socket.socket, bytes | None]:
    """Begin a fork server's process.

    Return its control socket and the first message, None if the parent has gone.
    """
    begin_child()
    control = socket.socket(fileno=int(descriptor))
    return control, receive_frame(control)


def serve(control: socket.socket, work: Callable[[socket.socket], int]) -> bool:
    """Fork, kill and wait for children until the parent hangs up, then kill those that are left.

    ``work`` runs in a child with the child's socket and returns the exit code. Call this in a
    process with one thread. Returns False when another fork server takes over.
    """
    gc.collect()
    gc.freeze()  # pages of objects that nobody changes stay shared with the children
    children: set[int] = set()  # not waited for, so that their numbers are still their own
    killed: set[int] = set()
    command = b""
    with contextlib.suppress(ConnectionError):  # the parent ended with something unread
        while True:
            command, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            ended = {child for child in killed if os.waitpid(child, os.WNOHANG)[0] == child}
            killed -= ended
            children -= ended
            if command == SPAWN:
                child = _fork(control, descriptors[0], work)
                if child != NO_CHILD:
                    children.add(child)
                control.sendall(_encoded(child))
            elif command == KILL:
                child = _decoded(receive_bytes(control, NUMBER_BYTES) or b"")
                if child in children:
                    os.kill(child, signal.SIGKILL)
                    killed.add(child)
            elif command == WAIT:
                child = _decoded(receive_bytes(control, NUMBER_BYTES) or b"")
                code = -signal.SIGKILL
                if child in children:
                    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    children.remove(child)
                    killed.discard(child)
                control.sendall(_encoded(code))
            else:
                break
    for child in children:
        os.kill(child, signal.SIGKILL)
    return command != RETIRE


def _fork(control: socket.socket, descriptor: int, work: Callable[[socket.socket], int]) -> int:
    """Fork a child that works with the socket ``descriptor``.

    Return its process id or ``NO_CHILD``.
    """
    parent = os.getpid()
    with socket.socket(fileno=descriptor) as connection:
        try:
            child = os.fork()
        except OSError as error:
            logger.error("a worker process cannot be forked: %s", error.strerror)
            return NO_CHILD
        if child == 0:
            code = 1
            try:
                end_with(parent)
                control.close()
                code = work(connection)
            except Exception:
                logger.exception("a worker process failed")
            finally:
                os._exit(code)
    return child


@dataclass(frozen=True, slots=True)
class ForkServerCommand:
    """Command that starts a fork server: program, environment and first message.

    The number of the control socket's descriptor is added to the program's arguments.
    """

    program: tuple[str, ...]
    environment: Mapping[str, str]
    message: bytes


class _Running:
    """The process of a fork server, and the control socket to it.

    Raises OSError when it cannot start.
    """

    def __init__(self, command: ForkServerCommand, answer_seconds: float) -> None:
        self._asking = threading.Lock()
        """Held from a question to its answer."""
        self.control, theirs = socket.socketpair()
        try:
            with theirs, interrupts_held():
                self.process = subprocess.Popen(
                    [*command.program, str(theirs.fileno())],
                    env=dict(command.environment),
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                )
        except BaseException:
            self.control.close()
            raise
        self.control.settimeout(answer_seconds)
        with contextlib.suppress(OSError):  # it has ended already; the first question will tell
            send_frame(self.control, command.message)

    def ask(self, question: bytes, descriptors: Sequence[int] = ()) -> int:
        """Return the answer to a question.

        Raises OSError when there is none; the process ends then.
        """
        with self._asking:
            try:
                socket.send_fds(self.control, [question], descriptors)
                answer = receive_bytes(self.control, NUMBER_BYTES)
                if answer is None:
                    raise ConnectionError("the fork server has ended")
            except OSError:
                self.hang_up()  # a late answer would be taken for that of the next question
                raise
        return _decoded(answer)

    def hang_up(self) -> None:
        """End the connection; a thread that waits for an answer notices at once."""
        with contextlib.suppress(OSError):  # the other side has done so
            # Closing is not enough where the caller's program forked.
            self.control.shutdown(socket.SHUT_RDWR)

    def stop(self, last_word: bytes = b"") -> None:
        """End the process and its children."""
        with contextlib.suppress(OSError):
            self.control.send(last_word, socket.MSG_DONTWAIT)
        self.hang_up()
        with self._asking:  # until no thread waits for an answer any more
            self.control.close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Child:
    """A process that a fork server has forked, and the socket to it."""

    def __init__(self, connection: socket.socket, process_id: int, server: _Running) -> None:
        self.connection = connection
        self.process_id = process_id
        self._server = server

    def kill(self) -> None:
        """Kill the process, and return without waiting for its end. Usable from any thread."""
        with contextlib.suppress(OSError):  # a server that has ended took its children along
            self._server.control.send(KILL + _encoded(self.process_id), socket.MSG_DONTWAIT)

    def wait(self) -> int | None:
        """Wait for a process that is about to end.

        Return its exit code, None when the fork server has ended.
        """
        try:
            return self._server.ask(WAIT + _encoded(self.process_id))
        except OSError:
            return None

    def server_has_ended(self) -> bool:
        """Return True if the fork server ends now, which takes all its children along."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._server.process.wait(_MOMENT)
        return self._server.process.returncode is not None


class ForkServer:
    """A fork server, started when its first child is wanted and again when it has died.

    Thread-safe.

    ``name``: what its children are, for the log. ``refusal``: the message of the error when there
    can be none. ``answer_seconds``: how long an answer may take, the start of the fork server
    included.
    """

    def __init__(
        self, command: ForkServerCommand, *, name: str, refusal: str, answer_seconds: float
    ) -> None:
        self._command = command
        self._name = name
        self._refusal = refusal
        self._answer_seconds = answer_seconds
        self._running: _Running | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        """Held to start and to stop the process."""

    @property
    def process_id(self) -> int | None:
        """Process id of the fork server; None when none has been started, or it was closed."""
        running = self._running
        return None if running is None else running.process.pid

    def spawn(self) -> Child:
        """Return a new child. Raises UnavailableError."""
        for _ in range(2):
            running = None
            try:
                running = self._started()
                return self._spawn(running)
            except OSError as error:
                logger.debug("no %s could be forked: %s", self._name, error)
                self._retire(running)
        if not self._is_closed:
            logger.error("no %s can be started; earlier lines may say why", self._name)
        raise UnavailableError(self._refusal)

    def kill(self) -> None:
        """Kill the process and its children; the next ``spawn`` starts another one."""
        running = self._running
        if running is not None:
            running.process.kill()

    def close(self) -> None:
        """End the process and its children, for good."""
        self._is_closed = True
        running = self._running
        if running is not None:
            running.hang_up()
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            running.stop()

    def _started(self) -> _Running:
        with self._lock:
            if self._is_closed:
                raise OSError("the fork server has been closed")
            if self._running is None:
                self._running = _Running(self._command, self._answer_seconds)
            return self._running

    def _spawn(self, running: _Running) -> Child:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process_id = running.ask(SPAWN, [theirs.fileno()])
            if process_id == NO_CHILD:
                raise UnavailableError(self._refusal)
        except BaseException:
            ours.close()
            raise
        return Child(ours, process_id, running)

    def _retire(self, running: _Running | None) -> None:
        """Stop a process that does not answer any more, unless another thread has done so."""
        with self._lock:
            if running is not None and running is self._running:
                self._running = None
                running.stop(RETIRE)


def _encoded(number: int) -> bytes:
    return number.to_bytes(NUMBER_BYTES, "little", signed=True)


def _decoded(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)
