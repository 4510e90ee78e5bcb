"""Runs the lines of a batch, several at a time, and hands on a line of output for each."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from sensorium.errors import UnavailableError
from sensorium.server.batches.calls import Caller, Reply
from sensorium.server.batches.lines import BadLine, Line, output_id
from sensorium.server.batches.slots import Slot, Slots

AGAIN = frozenset({408, 425, 429, 502, 503, 504})
"""Statuses of a server that may answer later."""
FIRST_WAIT, LONGEST_WAIT = 0.25, 15.0

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The output of a line, with its line end. ``succeeded``: it goes to the file of answers."""

    number: int
    succeeded: bool
    text: bytes
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


_usage = msgspec.json.Decoder(_Answer)


class LineRunner:
    """Runs the lines of one batch.

    Args:
        caller: Answers the requests.
        num_at_once: Lines that run at the same time.
        patience: Seconds for which a line is tried again while the server is not available.
        slots: Places for lines, to share a limit with other batches.
    """

    def __init__(
        self,
        caller: Caller,
        num_at_once: int,
        *,
        patience: float,
        slots: Slots | None = None,
    ) -> None:
        self._caller = caller
        self._num_at_once = num_at_once
        self._patience = patience
        self._slots = slots or Slots(num_at_once)
        self._reading = asyncio.Lock()
        self._is_read = False
        self.stopping = asyncio.Event()

    async def run(
        self, lines: Iterator[Line | BadLine], write: Callable[[Outcome], Awaitable[None]]
    ) -> None:
        """Run the lines until none is left, or ``stopping`` is set and those that run are done.

        Lines that wait for another attempt when ``stopping`` is set are not written. ``write``
        gets each output once, in no order, and is never cancelled. Raises what ``write`` raises,
        and UnavailableError when the server was away for too long; the line is then not written.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._num_at_once):
                    group.create_task(self._work(lines, write))
        except* Exception as errors:
            error: BaseException = errors
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None

    async def _work(
        self, lines: Iterator[Line | BadLine], write: Callable[[Outcome], Awaitable[None]]
    ) -> None:
        while not self.stopping.is_set():
            async with self._slots.slot() as slot:
                line = await self._next(lines)
                if line is None:
                    return
                outcome = (
                    refused(line) if isinstance(line, BadLine) else await self._outcome(line, slot)
                )
                if outcome is not None:
                    await _to_the_end(write(outcome))

    async def _next(self, lines: Iterator[Line | BadLine]) -> Line | BadLine | None:
        """Return the next line; None after the last, or when the batch is stopping."""
        async with self._reading:
            if self._is_read or self.stopping.is_set():
                return None
            # The thread would go on, and whoever reads the file next must not meet it.
            line = await _to_the_end(asyncio.to_thread(next, lines, None))
            self._is_read = line is None
            return line

    async def _outcome(self, line: Line, slot: Slot) -> Outcome | None:
        """Return the output of a line; while the server is not available, wait and try again.

        None for one that was to be tried again when the batch was stopped.
        """
        loop = asyncio.get_running_loop()
        ends, wait = loop.time() + self._patience, FIRST_WAIT
        while True:
            reply: Reply | None = None
            try:
                reply = await self._caller.call(line.url, line.body)
                if reply.status not in AGAIN or reply.is_final:
                    return answered(line, reply)
            except UnavailableError:
                if loop.time() >= ends:
                    raise
            if reply is not None and loop.time() >= ends:
                return answered(line, reply)
            least = 0.0 if reply is None or reply.retry_after is None else reply.retry_after
            # Lines that were refused together do not come back together.
            pause = max(min(least, LONGEST_WAIT), wait) * random.uniform(1.0, 1.5)
            slot.leave(len(line.body))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(pause, ends - loop.time()))):
                    await self.stopping.wait()
            if not self.stopping.is_set():
                await slot.take()
            if self.stopping.is_set():
                return None
            wait = min(2 * wait, LONGEST_WAIT)


async def _to_the_end(work: Awaitable[_Result]) -> _Result:
    """Return what ``work`` gives. Whoever is cancelled meanwhile waits until it has ended."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen: the cancellation goes first
        raise


def answered(line: Line, reply: Reply) -> Outcome:
    """Return the output for an answer."""
    try:
        usage = _usage.decode(reply.body).usage or _Usage()
    except (msgspec.MsgspecError, RecursionError):
        usage = _Usage()
    response = {"status_code": reply.status, "request_id": reply.request_id}
    body, error = _body(reply.body), None
    if body is None:
        error = {
            "code": "bad_answer",
            "message": f"The server answered {reply.status} without valid JSON.",
            "param": None,
            "line": line.number,
        }
    text = _line(line.number, line.custom_id, {**response, "body": body}, error)
    return Outcome(
        line.number,
        body is not None and reply.status == 200,
        text,
        usage.prompt_tokens or usage.input_tokens,
        usage.completion_tokens or usage.output_tokens,
    )


def refused(line: BadLine) -> Outcome:
    """Return the output for a line that is no request."""
    return Outcome(line.number, False, _line(line.number, line.custom_id, None, line.error()))


def _line(number: int, custom_id: str | None, response: Any, error: Any) -> bytes:
    entry = {
        "id": output_id(number),
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return msgspec.json.encode(entry) + b"\n"


def _body(raw: bytes) -> Any:
    """Return JSON as it is, in one line; None for what is no JSON."""
    try:
        if b"\n" in raw or b"\r" in raw:
            return msgspec.json.decode(raw)
        msgspec.json.decode(raw, type=msgspec.Raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return msgspec.Raw(raw)
