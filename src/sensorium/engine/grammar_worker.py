"""The process that checks constraints: ``python -m sensorium.engine.grammar_worker FOLDER VOCAB_SIZE SECONDS``.

Started by ``engine.grammars``, which sends constraints to its input and reads replies from its output. It holds the
vocabulary and forks a child for each constraint, ``MOST_CHILDREN`` at a time; a child has limits of processor time and
memory that the kernel enforces, so it ends whatever the grammar library is doing. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import sys
from collections import deque
from dataclasses import dataclass, field

from sensorium.engine.grammars import FRAME_BYTES, write_frame
from sensorium.errors import SensoriumError
from sensorium.params import StructuredOutputs
from sensorium.text.grammar import GrammarVocabulary

MOST_CHILDREN = 8
CHILD_BYTES = 1 << 30
"""Address space that a child may take beyond what it was forked with."""

WAITING_FACTOR = 10
"""How much longer than its processor time a child may take by the clock, on a busy machine."""

NICENESS = 10
"""Children give way to the server and to the engine."""

CHUNK = 1 << 16


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
        self._vocabulary: GrammarVocabulary | SensoriumError
        try:
            self._vocabulary = GrammarVocabulary.from_folder(folder, vocab_size)
        except SensoriumError as error:
            self._vocabulary = error
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
                            write_frame(out, ended.number, bytes(ended.reply) or b"{}")
                    elif data:
                        self._received += data
                        self._todo += _frames(self._received)
                    else:
                        self._end_children()
                        return
                while self._todo and len(self._children) < MOST_CHILDREN:
                    self._fork(*self._todo.popleft())

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
        if status:  # ended in the middle of a reply, or before it
            child.reply.clear()
        return child

    def _fork(self, number: int, job: bytes) -> None:
        readable, writable = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _limit(self._seconds)
                _write_all(writable, self._answer(job))
                status = 0
            finally:
                os._exit(status)
        os.close(writable)
        self._children[readable] = _Child(pid, number)
        self._selector.register(readable, selectors.EVENT_READ)

    def _answer(self, job: bytes) -> bytes:
        """The grammar of a constraint, or what is wrong with it. Runs in a child."""
        try:
            if isinstance(self._vocabulary, SensoriumError):
                raise self._vocabulary
            return json.dumps(
                {"grammar": self._vocabulary.check(StructuredOutputs(**json.loads(job)))}
            ).encode()
        except SensoriumError as error:
            return json.dumps({"message": error.message}).encode()

    def _end_children(self) -> None:
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)


def _limit(seconds: float) -> None:
    """Let the kernel end this process when it takes too much; what it writes to its log then is of no interest."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WAITING_FACTOR * seconds)
    with open("/proc/self/statm", encoding="ascii") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + CHILD_BYTES, now + CHILD_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


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
    Checker(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])).run(0, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
