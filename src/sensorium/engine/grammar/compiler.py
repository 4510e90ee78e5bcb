"""Compiles constraints to grammars in processes of their own, which end when one takes too long.

A schema of a few lines can keep the grammar library busy for ever, and nothing inside a process can
stop it. So a fork server (``engine.grammar.worker``), started at the first constraint, forks a
child for each; the kernel ends a child that has used up its time. What a child lets through has
been started once as the engine will start it. A limited number is compiled at a time; other
constraints wait here, for a limited time, and are dropped when no request wants them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import signal
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass

from sensorium import forks
from sensorium.errors import InvalidRequestError, OverloadedError, UnavailableError
from sensorium.params import StructuredOutputs
from sensorium.processes.fork_server import ForkServer, ForkServerCommand
from sensorium.processes.framing import receive_frame, send_frame
from sensorium.processes.start import child_environment, python_module
from sensorium.text.grammar.grammar import check_size, field_of, json_field
from sensorium.text.grammar.library import Grammar

logger = logging.getLogger(__name__)

MOST_CHILDREN = 8
"""Constraints that are compiled at a time."""

WAITING_FACTOR = 20
"""Extra time by the clock that a constraint may take beyond its processor time, on a busy machine;
as long it may wait for its turn."""

STARTING_SECONDS = 60.0
"""Seconds that the fork server, which reads a vocabulary first, may take for anything but
compiling."""

KEPT_CHARS = 1 << 24
"""Constraints and their grammars that are remembered, in characters; also the constraints that
wait."""

ENTRY_CHARS = 2048
"""Size of an entry besides its characters."""

OUT_OF_MEMORY, FAILED = 2, 3
"""Exit codes of a child: it got no memory; the library failed, which is in the reply."""

_LIMIT_CODES = (OUT_OF_MEMORY, -signal.SIGPROF, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)
"""Exit codes of a child that meets its limit of processor time or memory; the library aborts
when it gets no memory. Any other end, such as by the clock or for want of memory of the machine,
says nothing about the constraint."""

_TOO_MUCH = "{}"
"""The reply for a constraint that meets a limit."""

_LOST = "The constraint could not be checked; try again."


def grammar_server(folder: str, vocab_size: int, seconds: float) -> ForkServerCommand:
    """Return the command of the fork server of a tokenizer and a vocabulary size.

    It holds what is needed to compile; each constraint may take so many seconds.
    """
    return ForkServerCommand(
        python_module("sensorium.engine.grammar.worker"),
        child_environment(one_thread=True),
        json.dumps([folder, vocab_size, seconds]).encode(),
    )


@dataclass(slots=True)
class _Compilation:
    """A constraint that waits or is being compiled, and how many requests want it."""

    task: asyncio.Task[str]
    num_wanting: int = 0
    sent: bool = False


class GrammarCompiler:
    """Checks the constraints of requests, several at a time; the same one once.

    Used from one event loop.

    ``server``: see ``grammar_server``. ``seconds``: the processor time for one, which the server
    has been told. The processes end with ``close``, or when this object is gone.
    """

    def __init__(self, server: ForkServerCommand, *, seconds: float) -> None:
        self._seconds = seconds
        self._reply_seconds = WAITING_FACTOR * seconds + STARTING_SECONDS
        self._closed = False
        self.server = ForkServer(
            server,
            name="process for constraints",
            refusal=_LOST,
            answer_seconds=self._reply_seconds,
        )
        weakref.finalize(
            self, forks.release, forks.generation(), self.server.kill, self.server.close
        )
        self._slots = asyncio.Semaphore(MOST_CHILDREN)
        self._under_way: dict[bytes, _Compilation] = {}
        self._waiting_chars = 0
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._known_chars = 0

    async def compile(self, outputs: StructuredOutputs) -> Grammar:
        """Return the grammar of a constraint, whose text is for ``GrammarVocabulary.matcher``.

        Raises InvalidRequestError, with the field as ``param``, for what is malformed, not
        supported, too large or takes too long, OverloadedError when too many wait, UnavailableError
        when a process died.
        """
        job = await asyncio.to_thread(_encoded, outputs)
        is_new = job not in self._known
        reply = json.loads(await self._reply(job))
        if "grammar" in reply:
            grammar = Grammar(reply["grammar"], tuple(reply["relaxed"]), json_field(outputs))
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
        """End the processes; constraints that are being compiled fail, and so do new ones."""
        self._closed = True
        self.server.kill()
        self.server.close()

    @property
    def num_pending(self) -> int:
        """Number of different constraints that wait or are being compiled."""
        return len(self._under_way)

    async def _reply(self, job: bytes) -> str:
        """Return the reply for a constraint.

        A caller that is cancelled drops it if it was the last, and only while the constraint waits.
        """
        known = self._known.get(job)
        if known is not None:
            self._known.move_to_end(job)
            return known
        work = self._under_way.get(job) or self._put(job)
        work.num_wanting += 1
        try:
            return await asyncio.shield(work.task)
        except UnavailableError as error:  # a copy for each, for raising adds a trace
            raise type(error)(error.message) from error
        finally:
            work.num_wanting -= 1
            if not work.num_wanting and not work.sent and self._under_way.get(job) is work:
                self._remove(job)
                work.task.cancel()

    def _put(self, job: bytes) -> _Compilation:
        """Let a constraint wait for its turn. Raises OverloadedError."""
        num_chars = len(job) + ENTRY_CHARS
        if self._waiting_chars + num_chars > max(KEPT_CHARS, num_chars):
            raise _overloaded()
        work = self._under_way[job] = _Compilation(asyncio.create_task(self._compiled(job)))
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
        """Return a child's reply. Raises UnavailableError when there is none in time."""
        if self._closed:
            raise UnavailableError("The server is shutting down; send the request again.")
        reply: Future[str] = Future()
        # Not a thread of the loop's pool: one that waits must hold up neither other work nor the
        # end of the program.
        thread = threading.Thread(
            target=_compile,
            args=(self.server, job, self._reply_seconds, reply),
            name=f"{forks.OWN_THREADS}grammars",
            daemon=True,
        )
        try:
            thread.start()
            async with asyncio.timeout(self._reply_seconds):
                return await asyncio.wrap_future(reply)
        except TimeoutError:
            logger.error("the process that compiles constraints does not answer; it is ended")
            self.server.kill()
            raise UnavailableError(_LOST) from None
        except RuntimeError as error:
            logger.error("no thread can be started to compile a constraint: %s", error)
            raise UnavailableError(_LOST) from error

    def _keep(self, job: bytes, reply: str) -> None:
        """Remember a reply, within bounds."""
        self._known[job] = reply
        self._known_chars += len(job) + len(reply) + ENTRY_CHARS
        while self._known_chars > KEPT_CHARS:
            old, found = self._known.popitem(last=False)
            self._known_chars -= len(old) + len(found) + ENTRY_CHARS


def _compile(server: ForkServer, job: bytes, seconds: float, reply: Future[str]) -> None:
    """Let a new child work on a constraint, and wait for its reply.

    Does not know the compiler, which may go first.
    """
    try:
        child = server.spawn()
        if not reply.set_running_or_notify_cancel():  # the server took too long for it
            child.kill()
            child.connection.close()
            return
        text = None
        with child.connection as connection, contextlib.suppress(OSError):
            connection.settimeout(seconds)
            send_frame(connection, job)
            text = receive_frame(connection)
        reply.set_result(_verdict(text, child.wait()))
    except Exception as error:
        if not isinstance(error, UnavailableError):
            logger.error("a constraint could not be compiled: %s", error)
            error = UnavailableError(_LOST)
        with contextlib.suppress(InvalidStateError):
            reply.set_exception(error)


def _verdict(reply: bytes | None, code: int | None) -> str:
    """Return the reply of a child that ended with this exit code.

    Raises UnavailableError for one that was lost.
    """
    if code in _LIMIT_CODES:
        return _TOO_MUCH
    if reply is None or code not in (0, FAILED):
        if code is not None:
            logger.error("a process for a constraint ended with status %d", code)
        raise UnavailableError(_LOST)
    return reply.decode()


def _encoded(outputs: StructuredOutputs) -> bytes:
    """Return a constraint as JSON, which has integers of any size."""
    check_size(outputs)
    fields = {f.name: getattr(outputs, f.name) for f in dataclasses.fields(outputs)}
    try:
        return json.dumps(fields).encode()
    except (ValueError, TypeError, RecursionError) as error:
        name = f"structured_outputs.{field_of(outputs)}"
        raise InvalidRequestError(f"{name} is not valid JSON: {error}.", param=name) from error


def _overloaded() -> OverloadedError:
    return OverloadedError("Too many constraints wait to be compiled; try again in a moment.")
