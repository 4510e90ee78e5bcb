"""Fork server for constraints: ``python -m sensorium.engine.grammar.worker DESCRIPTOR``.

Started by ``engine.grammar.compiler``. It holds the vocabulary and forks a child for each
constraint; a child has limits of processor time and memory that the kernel enforces, so it ends
whatever the grammar library is doing.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

from sensorium.engine.grammar.compiler import FAILED, OUT_OF_MEMORY, WAITING_FACTOR
from sensorium.errors import ConfigError, SensoriumError
from sensorium.params import StructuredOutputs
from sensorium.processes.fork_server import begin_server, serve
from sensorium.processes.framing import receive_frame, send_frame
from sensorium.processes.limits import limit_memory
from sensorium.processes.start import silence_libraries
from sensorium.text.grammar.grammar import GrammarVocabulary

logger = logging.getLogger(__name__)

CHILD_BYTES = 1 << 30
"""Memory that a child may take beyond what it was forked with."""

NICENESS = 10
"""Children give way to the server and to the engine."""


def work(connection: socket.socket, answer: Callable[[bytes], bytes], seconds: float) -> int:
    """Send the reply for one constraint, within the limits of a child; return the exit code."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WAITING_FACTOR * seconds)
    limit_memory(CHILD_BYTES)
    os.nice(NICENESS)
    log = silence_libraries()
    try:
        job = receive_frame(connection)
        if job is not None:
            send_frame(connection, answer(job))
        return 0
    except MemoryError:
        return OUT_OF_MEMORY
    except BaseException as error:  # a panic of the library is no Exception
        send_frame(connection, json.dumps({"failed": type(error).__name__}).encode())
        traceback.print_exc(file=log)
        log.flush()
        return FAILED


def _answer(vocabulary: GrammarVocabulary | SensoriumError, job: bytes) -> bytes:
    """Return the grammar of a constraint, or what is wrong with it, as JSON."""
    try:
        if isinstance(vocabulary, SensoriumError):
            raise vocabulary
        grammar = vocabulary.check(StructuredOutputs(**json.loads(job)))
        return json.dumps({"grammar": grammar.text, "relaxed": grammar.relaxed}).encode()
    except SensoriumError as error:
        return json.dumps({"message": error.message, "param": error.param}).encode()


def _vocabulary(folder: str, vocab_size: int) -> GrammarVocabulary | SensoriumError:
    """Return the vocabulary, or the error that answers every constraint."""
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


def main() -> int:
    """Read the vocabulary, then fork children until the parent hangs up."""
    control, first = begin_server(sys.argv[1])
    if first is None:
        return 0
    folder, vocab_size, seconds = json.loads(first)
    answer = functools.partial(_answer, _vocabulary(folder, vocab_size))
    serve(control, functools.partial(work, answer=answer, seconds=seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
