"""Constraints become grammars in processes of their own, which end when one takes too long.

A schema of a few lines can keep the grammar library busy for ever, and nothing inside a process can stop it. So there
is one helper process (``engine.grammar_worker``), started at the first constraint, that forks a child for each; the
kernel ends a child that has used up its time. What a child lets through has been started once as the engine will start
it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import json
import subprocess
import sys
import threading
from collections import OrderedDict
from typing import IO, Any

from sensorium.engine.processes import child_environment
from sensorium.errors import InvalidRequestError, UnavailableError
from sensorium.params import StructuredOutputs
from sensorium.text.grammar import check_size, field_of

FRAME_BYTES = 4
"""Each message is its length and a job's number, both little-endian of so many bytes, and a JSON object."""

KEPT_CHARS = 1 << 24
"""Constraints and their grammars that are remembered, in characters."""

_Waiting = concurrent.futures.Future[str]


class GrammarCompiler:
    """Checks the constraints of requests, several at a time; the same one once. Used from any event loop.

    ``folder`` and ``vocab_size`` are the tokenizer's and the model's; ``seconds`` is the processor time for one.
    """

    def __init__(self, folder: str, vocab_size: int, *, seconds: float) -> None:
        self._arguments = (folder, str(vocab_size), repr(seconds))
        self._seconds = seconds
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._numbers = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        self._jobs: dict[int, _Waiting] = {}
        self._known: OrderedDict[bytes, _Waiting] = OrderedDict()

    async def compile(self, outputs: StructuredOutputs) -> str:
        """The grammar of a constraint, as text for ``GrammarVocabulary.matcher``.

        Raises InvalidRequestError, with the field as ``param``, for what is malformed, not supported, too large or
        takes too long, UnavailableError when the helper process died.
        """
        waiting = await asyncio.to_thread(self._submit, outputs)
        # Others may wait for the same one: who leaves must not take it along.
        result: asyncio.Future[str] = asyncio.wrap_future(waiting)
        reply = json.loads(await asyncio.shield(result))
        if "grammar" in reply:
            return str(reply["grammar"])
        name = f"structured_outputs.{field_of(outputs)}"
        if "message" in reply:
            raise InvalidRequestError(reply["message"], param=name)
        raise InvalidRequestError(
            f"{name} cannot be used: compiling it takes more than {self._seconds:g} seconds or too much memory; "
            "simplify it.",
            param=name,
        )

    def close(self) -> None:
        """End the helper process; constraints that are being compiled fail."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _submit(self, outputs: StructuredOutputs) -> _Waiting:
        """Send a constraint to the helper, unless it is known or under way."""
        check_size(outputs)
        job = _encoded(outputs)
        with self._lock:
            known = self._known.get(job)
            if known is not None:
                self._known.move_to_end(job)
                return known
            process = self._process = self._process or self._start()
            number = next(self._numbers)
            waiting = self._jobs[number] = self._known[job] = _Waiting()
        waiting.add_done_callback(lambda _: self._forget_some(job, waiting))
        try:
            # A lock of its own: the helper may wait until its replies are read, for which the other one is needed.
            with self._writing:
                write_frame(_pipe(process.stdin), number, job)
        except (OSError, ValueError):  # it has ended, and its reader may have noticed
            with self._lock:
                lost = self._jobs.pop(number, None)
            if lost is not None:
                lost.set_exception(_died())
        return waiting

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "sensorium.engine.grammar_worker", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(one_thread=True),
        )
        name = "sensorium-grammars"
        threading.Thread(target=self._read, args=(process,), name=name, daemon=True).start()
        return process

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        """Hand out replies until the helper ends; then all that it still had to do has failed."""
        replies = _pipe(process.stdout)
        while (frame := read_frame(replies)) is not None:
            with self._lock:
                waiting = self._jobs.pop(frame[0], None)
            if waiting is not None:
                waiting.set_result(frame[1].decode())
        with self._lock:
            if self._process is process:
                self._process = None
            lost, self._jobs = self._jobs, {}
        for waiting in lost.values():
            waiting.set_exception(_died())
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what it no longer read
                _pipe(pipe).close()

    def _forget_some(self, job: bytes, waiting: _Waiting) -> None:
        """Keep what was found out, within bounds; nothing of a helper that died."""
        with self._lock:
            if waiting.exception() is not None and self._known.get(job) is waiting:
                del self._known[job]
            done = [(j, w) for j, w in self._known.items() if w.done() and w.exception() is None]
            num_chars = sum(len(j) + len(w.result()) for j, w in done)
            for old, found in done:
                if num_chars <= KEPT_CHARS:
                    return
                num_chars -= len(old) + len(found.result())
                del self._known[old]


def write_frame(pipe: IO[bytes], number: int, payload: bytes) -> None:
    """Write one message."""
    head = len(payload).to_bytes(FRAME_BYTES, "little") + number.to_bytes(FRAME_BYTES, "little")
    pipe.write(head + payload)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> tuple[int, bytes] | None:
    """The next message, its number and its payload; None when the other side has gone."""
    head = pipe.read(2 * FRAME_BYTES)
    if len(head) < 2 * FRAME_BYTES:
        return None
    payload = pipe.read(int.from_bytes(head[:FRAME_BYTES], "little"))
    return int.from_bytes(head[FRAME_BYTES:], "little"), payload


def _encoded(outputs: StructuredOutputs) -> bytes:
    """A constraint as JSON, which has integers of any size."""
    fields: dict[str, Any] = {
        "json": outputs.json,
        "regex": outputs.regex,
        "choice": outputs.choice,
        "grammar": outputs.grammar,
        "json_object": outputs.json_object,
    }
    try:
        return json.dumps(fields).encode()
    except (ValueError, TypeError, RecursionError) as error:
        name = f"structured_outputs.{field_of(outputs)}"
        raise InvalidRequestError(f"{name} is not valid JSON: {error}.", param=name) from error


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _died() -> UnavailableError:
    return UnavailableError("The constraint could not be checked; try again.")
