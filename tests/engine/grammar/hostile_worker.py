"""A fork server for constraints whose children do what a regular expression says.

``python -m tests.engine.grammar.hostile_worker DESCRIPTOR``.

The first message has a file to which each child adds a line, a file that a child may have to wait
for until nobody locks it, how often there is no process at first, and the processor time.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import signal
import sys
from collections.abc import Callable

from sensorium.engine.grammar import worker
from sensorium.engine.grammar.worker import CHILD_BYTES, work
from sensorium.processes.fork_server import begin_server, serve


def answer(log: str, gate: str, job: bytes) -> bytes:
    constraint = json.loads(job)["regex"]
    with open(log, "a") as file:
        file.write(f"{constraint}\n")
    match constraint:
        case "memory":
            bytes(2 * CHILD_BYTES)
        case "time":
            while True:
                pass
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "clock":
            os.kill(os.getpid(), signal.SIGALRM)
        case "exception":
            raise RuntimeError("a bug")
        case "descriptors":
            paths = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
            sockets = [path for path in paths if "socket:" in path]
            assert len(sockets) == 1, "it has sockets that are not its own"
    if constraint.startswith("wait"):
        with open(gate) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
    return json.dumps({"grammar": constraint, "relaxed": []}).encode()


def failing(fork: Callable[[], int], times: list[None]) -> int:
    if times:
        times.pop()
        raise BlockingIOError("no more processes")
    return fork()


if __name__ == "__main__":
    control, first = begin_server(sys.argv[1])
    log, gate, num_failures, seconds = json.loads(first or b"")
    # On a busy machine the clock is not to be the first.
    vars(worker)["WAITING_FACTOR"] = 60 / seconds
    os.fork = functools.partial(failing, os.fork, [None] * num_failures)
    answering = functools.partial(answer, log, gate)
    serve(control, functools.partial(work, answer=answering, seconds=seconds))
