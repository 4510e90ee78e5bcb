"""Constraints become grammars in processes of their own, which end when one takes too long.

A schema of a few lines can keep the grammar library busy for ever, and nothing inside a process can stop it. So there
is one helper process (``engine.grammar.worker``), started at the first constraint, that forks a child for each; the
kernel ends a child that has used up its time. What a child lets through has been started once as the engine will start
it. No more is sent to the helper than it works on; the rest waits here, for a limited time, as long as somebody wants
it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import logging
import subprocess
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import IO, Any

from sensorium import forks
from sensorium.errors import InvalidRequestError, OverloadedError, UnavailableError
from sensorium.multimodal.workers.background import release
from sensorium.params import StructuredOutputs
from sensorium.processes.start import child_environment, interrupts_held, python_module
from sensorium.text.grammar.grammar import check_size, field_of
from sensorium.text.grammar.library import Grammar

logger = logging.getLogger(__name__)

FRAME_BYTES = 4
"""Each message is its length and a job's number, both little-endian of so many bytes, and a JSON object."""

MOST_CHILDREN = 8
"""Constraints that the helper compiles at a time."""

WAITING_FACTOR = 20
"""How much longer than its processor time a constraint may take by the clock, on a busy machine; as long it may wait
for its turn."""

STARTING_SECONDS = 60.0
"""How long the helper, which reads a vocabulary first, may take for anything but compiling."""

KEPT_CHARS = 1 << 24
"""Constraints and their grammars that are remembered, in characters; also the constraints that wait."""

ENTRY_CHARS = 2048
"""What an entry takes besides its characters."""


@dataclass(slots=True)
class _Work:
    """A constraint that waits or is being compiled, and how many requests want it."""

    task: asyncio.Task[str]
    num_wanting: int = 0
    sent: bool = False


class GrammarCompiler:
    """Checks the constraints of requests, several at a time; the same one once. Used from one event loop.

    ``folder`` and ``vocab_size`` are the tokenizer's and the model's; ``seconds`` is the processor time for one. The
    helper ends with ``close``, or when this object is gone.
    """

    def __init__(self, folder: str, vocab_size: int, *, seconds: float) -> None:
        self._arguments = (folder, str(vocab_size), repr(seconds))
        self._seconds = seconds
        self._lock = threading.Lock()
        self._closed = False
        self._helper: _Helper | None = None
        self._end_helper: weakref.finalize[..., Any] | None = None
        self._slots = asyncio.Semaphore(MOST_CHILDREN)
        self._under_way: dict[bytes, _Work] = {}
        self._waiting_chars = 0
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._known_chars = 0

    async def compile(self, outputs: StructuredOutputs) -> Grammar:
        """The grammar of a constraint, whose text is for ``GrammarVocabulary.matcher``.

        Raises InvalidRequestError, with the field as ``param``, for what is malformed, not supported, too large or
        takes too long, OverloadedError when too many wait, UnavailableError when the helper process died.
        """
        job = await asyncio.to_thread(_encoded, outputs)
        is_new = job not in self._known
        reply = json.loads(await self._reply(job))
        if "grammar" in reply:
            grammar = Grammar(reply["grammar"], tuple(reply["relaxed"]))
            for warning in grammar.warnings if is_new else ():
                logger.warning("%s", warning)
            return grammar
        name = f"structured_outputs.{field_of(outputs)}"
        if "message" in reply:
            raise InvalidRequestError(reply["message"], param=reply["param"] or name)
        if "failed" in reply:
            what = f"the grammar library failed with it ({reply['failed']})"
        else:
            what = f"compiling it takes more than {self._seconds:g} seconds or too much memory"
        raise InvalidRequestError(f"{name} cannot be used: {what}; simplify it.", param=name)

    def close(self) -> None:
        """End the helper process; constraints that are being compiled fail, and so do new ones."""
        with self._lock:
            self._closed = True
            helper, self._helper = self._helper, None
        if helper is not None:
            helper.end()
            helper.process.wait()

    async def _reply(self, job: bytes) -> str:
        """What is known of a constraint, or comes of it. Who leaves takes it along only when nobody else wants it and
        it has not begun."""
        known = self._known.get(job)
        if known is not None:
            self._known.move_to_end(job)
            return known
        work = self._under_way.get(job) or self._put(job)
        work.num_wanting += 1
        try:
            return await asyncio.shield(work.task)
        except UnavailableError as error:  # one each: who raises it adds its own trace
            raise type(error)(error.message) from error
        finally:
            work.num_wanting -= 1
            if not work.num_wanting and not work.sent and self._under_way.get(job) is work:
                self._remove(job)
                work.task.cancel()

    def _put(self, job: bytes) -> _Work:
        """Let a constraint wait for its turn. Raises OverloadedError."""
        num_chars = len(job) + ENTRY_CHARS
        if self._waiting_chars + num_chars > max(KEPT_CHARS, num_chars):
            raise _overloaded()
        work = self._under_way[job] = _Work(asyncio.create_task(self._compiled(job)))
        self._waiting_chars += num_chars
        return work

    def _remove(self, job: bytes) -> None:
        del self._under_way[job]
        self._waiting_chars -= len(job) + ENTRY_CHARS

    async def _compiled(self, job: bytes) -> str:
        work = self._under_way[job]
        try:
            try:
                async with asyncio.timeout(WAITING_FACTOR * self._seconds):
                    await self._slots.acquire()
            except TimeoutError:
                raise _overloaded() from None
            work.sent = True
            try:
                reply = await self._asked(job)
            finally:
                self._slots.release()
        finally:
            if self._under_way.get(job) is work:
                self._remove(job)
        self._keep(job, reply)
        return reply

    async def _asked(self, job: bytes) -> str:
        """The helper's reply. Raises UnavailableError when it died, or says nothing for so long that it is ended."""
        reply: concurrent.futures.Future[str] = concurrent.futures.Future()
        reply.set_running_or_notify_cancel()  # who gives up waiting does not cancel it
        try:
            async with asyncio.timeout(WAITING_FACTOR * self._seconds + STARTING_SECONDS):
                await asyncio.to_thread(self._send, job, reply)
                return await asyncio.wrap_future(reply)
        except TimeoutError:
            logger.error("the process that compiles constraints does not answer; it is ended")
            with self._lock:
                helper, self._helper = self._helper, None
            if helper is not None:
                helper.end()
            raise _lost() from None
        except RuntimeError as error:  # no thread to send it
            logger.error("a constraint cannot be sent to the process that compiles it: %s", error)
            raise _lost() from error

    def _send(self, job: bytes, reply: concurrent.futures.Future[str]) -> None:
        with self._lock:
            if self._closed:
                raise UnavailableError("The server is shutting down; send the request again.")
            if self._helper is None or not self._helper.alive:
                try:
                    self._helper = _Helper(self._arguments)
                except (OSError, RuntimeError) as error:
                    logger.error("the process that compiles constraints cannot start: %s", error)
                    raise _lost() from error
                if self._end_helper is not None:
                    self._end_helper.detach()
                self._end_helper = weakref.finalize(
                    self, release, forks.generation(), self._helper.end
                )
            helper = self._helper
        helper.send(job, reply)

    def _keep(self, job: bytes, reply: str) -> None:
        """Remember what was found out, within bounds."""
        self._known[job] = reply
        self._known_chars += len(job) + len(reply) + ENTRY_CHARS
        while self._known_chars > KEPT_CHARS:
            old, found = self._known.popitem(last=False)
            self._known_chars -= len(old) + len(found) + ENTRY_CHARS


class _Helper:
    """The helper process and what it has not answered; usable from several threads. Its reader does not know the
    compiler, which may go first.

    Raises OSError or RuntimeError when it cannot be started.
    """

    def __init__(self, arguments: tuple[str, ...]) -> None:
        self.alive = True
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._numbers = itertools.count()
        self._replies: dict[int, concurrent.futures.Future[str]] = {}
        with interrupts_held():
            self.process = subprocess.Popen(
                python_module("sensorium.engine.grammar.worker", *arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=child_environment(one_thread=True),
            )
        try:
            threading.Thread(target=self._read, name="sensorium-grammars", daemon=True).start()
        except RuntimeError:
            self.end()
            self._reap()
            raise

    def end(self) -> None:
        """End the process; all that it still had to do fails."""
        self.process.kill()

    def send(self, job: bytes, reply: concurrent.futures.Future[str]) -> None:
        """Let it work on a constraint; ``reply`` fails when it has ended."""
        with self._lock:
            number = next(self._numbers)
            alive = self.alive
            if alive:
                self._replies[number] = reply
        try:
            if not alive:
                raise BrokenPipeError
            # A lock of its own: the helper may wait until its replies are read, for which the other one is needed.
            with self._writing:
                write_frame(_pipe(self.process.stdin), number, job)
        except (OSError, ValueError):  # it has ended, and its reader may have noticed
            with self._lock:
                unread = self._replies.pop(number, None) is not None
            if unread or not alive:
                reply.set_exception(_lost())

    def _read(self) -> None:
        """Hand out replies until the helper ends; then all that it still had to do has failed."""
        replies = _pipe(self.process.stdout)
        while (frame := read_frame(replies)) is not None:
            with self._lock:
                reply = self._replies.pop(frame[0], None)
            if reply is None:
                continue
            if frame[1]:
                reply.set_result(frame[1].decode())
            else:
                reply.set_exception(_lost())
        with self._lock:
            self.alive = False
            lost, self._replies = self._replies, {}
        for reply in lost.values():
            reply.set_exception(_lost())
        self._reap()

    def _reap(self) -> None:
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what it no longer read
                _pipe(pipe).close()


def write_frame(pipe: IO[bytes], number: int, payload: bytes) -> None:
    """Write one message."""
    head = len(payload).to_bytes(FRAME_BYTES, "little") + number.to_bytes(FRAME_BYTES, "little")
    pipe.write(head + payload)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> tuple[int, bytes] | None:
    """The next message, its number and its payload, which is empty for a constraint that was lost; None when the other
    side has gone, be it in the middle of a message."""
    head = pipe.read(2 * FRAME_BYTES)
    if len(head) < 2 * FRAME_BYTES:
        return None
    num_bytes = int.from_bytes(head[:FRAME_BYTES], "little")
    payload = pipe.read(num_bytes)
    if len(payload) < num_bytes:
        return None
    return int.from_bytes(head[FRAME_BYTES:], "little"), payload


def _encoded(outputs: StructuredOutputs) -> bytes:
    """A constraint as JSON, which has integers of any size."""
    check_size(outputs)
    fields = {f.name: getattr(outputs, f.name) for f in dataclasses.fields(outputs)}
    try:
        return json.dumps(fields).encode()
    except (ValueError, TypeError, RecursionError) as error:
        name = f"structured_outputs.{field_of(outputs)}"
        raise InvalidRequestError(f"{name} is not valid JSON: {error}.", param=name) from error


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _lost() -> UnavailableError:
    return UnavailableError("The constraint could not be checked; try again.")


def _overloaded() -> OverloadedError:
    return OverloadedError("Too many constraints wait to be compiled; try again in a moment.")
