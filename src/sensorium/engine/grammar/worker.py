"""The process that checks constraints: ``python -m sensorium.engine.grammar.worker FOLDER VOCAB_SIZE SECONDS``.

Started by ``engine.grammar.compiler``, which sends constraints to its input and reads replies from
its output. It holds the vocabulary and forks a child for each constraint, ``MOST_CHILDREN`` at a
time; a child has limits of processor time and memory that the kernel enforces, so it ends whatever
the grammar library is doing. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import sys
import traceback
from collections import deque
from dataclasses import dataclass, field
from typing import TextIO

from sensorium import environment
from sensorium.engine.grammar.compiler import (
    FRAME_BYTES,
    MOST_CHILDREN,
    WAITING_FACTOR,
    write_frame,
)
from sensorium.errors import ConfigError, SensoriumError
from sensorium.params import StructuredOutputs
from sensorium.processes.limits import limit_memory
from sensorium.processes.start import end_with, silence_libraries
from sensorium.text.grammar.grammar import GrammarVocabulary

logger = logging.getLogger(__name__)

CHILD_BYTES = 1 << 30
"""Memory that a child may take beyond what it was forked with."""

NICENESS = 10
"""Children give way to the server and to the engine."""

CHUNK = 1 << 16

TOO_MUCH = b"{}"
"""The reply for what takes more than it may; nothing at all is the reply for what was lost."""

_OUT_OF_MEMORY, _FAILED = 2, 3
_VERDICTS = (_OUT_OF_MEMORY, -signal.SIGPROF, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)
"""How a child ends that meets its limit of processor time or memory, as its exit code; the library aborts when it gets
no memory. Any other end, such as by the clock or for want of memory of the machine, says nothing about the
constraint."""


@dataclass(slots=True)
class _Child:
    """A constraint that is being compiled; ``reply`` is what has come of it."""

    pid: int
    number: int
    reply: bytearray = field(default_factory=bytearray)


class Checker:
    """Takes constraints from one descriptor, writes replies to another; one thread."""

    def __init__(self, folder: str, vocab_size: int, seconds: float) -> None:
        self._seconds = seconds
        self._vocabulary = _vocabulary(folder, vocab_size)
        self._selector = selectors.DefaultSelector()
        self._received = bytearray()
        self._todo: deque[tuple[int, bytes]] = deque()
        self._children: dict[int, _Child] = {}

    def run(self, source: int, target: int) -> None:
        """Work until ``source`` ends; what is under way then is ended, too."""
        self._selector.register(source, selectors.EVENT_READ)
        with open(target, "wb", closefd=False) as out:
            while True:
                for key, _ in self._selector.select():
                    data = os.read(key.fd, CHUNK)
                    if key.fd != source:
                        ended = self._take(key.fd, data)
                        if ended is not None:
                            write_frame(out, ended.number, bytes(ended.reply))
                    elif data:
                        self._received += data
                        self._todo += _frames(self._received)
                    else:
                        self._end_children()
                        return
                while self._todo and len(self._children) < MOST_CHILDREN:
                    number, job = self._todo.popleft()
                    try:
                        self._fork(number, job, (source, target))
                    except OSError as error:
                        logger.error("no process for a constraint: %s", error)
                        write_frame(out, number, b"")

    def _take(self, descriptor: int, data: bytes) -> _Child | None:
        """A piece of a child's reply; the child when that was its end."""
        child = self._children[descriptor]
        if data:
            child.reply += data
            return None
        self._selector.unregister(descriptor)
        os.close(descriptor)
        del self._children[descriptor]
        _, status = os.waitpid(child.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code in _VERDICTS:
            child.reply[:] = TOO_MUCH
        elif code not in (0, _FAILED):  # ended in the middle of a reply, or before it
            logger.error("a process for a constraint ended with status %d", code)
            child.reply.clear()
        return child

    def _fork(self, number: int, job: bytes, pipes: tuple[int, int]) -> None:
        """Start a child. Raises OSError when there can be none; ``pipes`` are not for it."""
        readable, writable = os.pipe()
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            os.close(readable)
            os.close(writable)
            raise
        if pid == 0:
            status = 1
            try:
                end_with(parent)
                for descriptor in (*pipes, *self._children, readable):
                    os.close(descriptor)
                status = self._work(job, writable)
            finally:
                os._exit(status)
        os.close(writable)
        self._children[readable] = _Child(pid, number)
        self._selector.register(readable, selectors.EVENT_READ)

    def _work(self, job: bytes, target: int) -> int:
        """Write the reply for a constraint within the limits; the exit status of the child in which this runs."""
        log = _limit(self._seconds)
        try:
            _write_all(target, self._answer(job))
            return 0
        except MemoryError:
            return _OUT_OF_MEMORY
        except BaseException as error:  # a panic of the library is no Exception
            _write_all(target, json.dumps({"failed": type(error).__name__}).encode())
            traceback.print_exc(file=log)
            log.flush()
            return _FAILED

    def _answer(self, job: bytes) -> bytes:
        """The grammar of a constraint, or what is wrong with it. Runs in a child."""
        try:
            if isinstance(self._vocabulary, SensoriumError):
                raise self._vocabulary
            grammar = self._vocabulary.check(StructuredOutputs(**json.loads(job)))
            return json.dumps({"grammar": grammar.text, "relaxed": grammar.relaxed}).encode()
        except SensoriumError as error:
            return json.dumps({"message": error.message, "param": error.param}).encode()

    def _end_children(self) -> None:
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)


def _vocabulary(folder: str, vocab_size: int) -> GrammarVocabulary | SensoriumError:
    """The vocabulary, or why there can be none: then that is the reply to every constraint."""
    try:
        return GrammarVocabulary.from_folder(folder, vocab_size)
    except SensoriumError as error:
        return error
    except Exception as error:
        logger.exception("the tokenizer cannot be used for structured outputs")
        return ConfigError(
            "Structured outputs are not available: this model's tokenizer cannot be used for them "
            f"({type(error).__name__})."
        )


def _limit(seconds: float) -> TextIO:
    """Let the kernel end this process when it takes too much; what libraries write to the log then is of no interest.
    Returns the log."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WAITING_FACTOR * seconds)
    limit_memory(CHILD_BYTES)
    os.nice(NICENESS)
    return silence_libraries()


def _frames(received: bytearray) -> list[tuple[int, bytes]]:
    """The whole messages at the beginning of ``received``, from which they are removed."""
    found = []
    while len(received) >= 2 * FRAME_BYTES:
        end = 2 * FRAME_BYTES + int.from_bytes(received[:FRAME_BYTES], "little")
        if len(received) < end:
            break
        number = int.from_bytes(received[FRAME_BYTES : 2 * FRAME_BYTES], "little")
        found.append((number, bytes(received[2 * FRAME_BYTES : end])))
        del received[:end]
    return found


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def main() -> int:
    """Serve the process that started this one."""
    # A terminal interrupts the whole process group: the frontend decides when to stop.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(
        level=environment.log_level(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    Checker(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])).run(0, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
