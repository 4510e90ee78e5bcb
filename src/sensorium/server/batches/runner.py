"""Runs the lines of a batch, several at a time, and hands on a line of output for each."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from sensorium.errors import NOT_LOADED, UnavailableError
from sensorium.server.batches.calls import Caller, Reply
from sensorium.server.batches.isolation import (
    FIRST_WAIT,
    LATER,
    LONGEST_WAIT,
    Deaths,
    Gate,
    in_turn,
)
from sensorium.server.batches.lines import BadLine, Line, output_id
from sensorium.server.batches.slots import Slot, Slots

AGAIN = frozenset({408, 425, 429, 502, 503, 504})
"""Statuses of a server that may answer later."""
LAST_CALLS = 60.0
"""Seconds that calls which still run have when the server has been away for too long."""
LONGEST_ASKED = 300.0
"""Seconds for which a server may ask to be left alone; after them it is asked again."""
MOST_ASIDE = 256
"""Lines that one batch puts aside at most while they wait for another attempt."""
MOST_FAILED = 3
"""Attempts of a line whose model cannot be loaded."""
_UNAVAILABLE, _TIMEOUT = 503, 504
_MOST_NAMED = 64

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


class _Error(msgspec.Struct):
    code: str | int | None = None
    message: str | None = None


class _Refusal(msgspec.Struct):
    error: _Error | str | None = None


_usage = msgspec.json.Decoder(_Answer)
_refusal = msgspec.json.Decoder(_Refusal)


@dataclass(slots=True, eq=False)
class _Task:
    """A line that is being run: since when, its next pause, how often its model or engine failed.

    ``last_call``: number of the last call of the run that was open when the line's time was over.
    """

    line: Line | BadLine
    slot: Slot
    since: float
    wait: float = 0.0
    num_failed: int = 0
    deaths: Deaths = field(default_factory=Deaths)
    last_call: int | None = None
    is_aside: bool = False


class LineRunner:
    """Runs the lines of one batch.

    A line that the server refuses for now is put aside, so that others, of other models perhaps,
    go on meanwhile. One that it keeps refusing gets no output: the run ends, to be gone on with
    later. Lines that ran when an engine ended are tried again alone, so that the one that ends it
    fails and the others do not.

    Args:
        caller: Answers the requests.
        num_at_once: Lines that run at the same time.
        patience: Seconds for which a line is tried again while the server answers no other either.
        slots: Places for lines, to share a limit with other batches.
        gate: Shared by batches of one server, so that a suspect runs apart from all their lines.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        caller: Caller,
        num_at_once: int,
        *,
        patience: float,
        slots: Slots | None = None,
        gate: Gate | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._caller = caller
        self._gate = gate or Gate()
        self._num_at_once = num_at_once
        self._patience = patience
        self._slots = slots or Slots(num_at_once)
        self._clock = clock
        self._reading = asyncio.Lock()
        self._is_read = False
        self._aside: list[tuple[float, int, _Task]] = []
        """Lines that wait for another attempt, by its time."""
        self._numbers = itertools.count()
        self._was_aside = False
        self._answered_at = float("-inf")
        self._failed: set[str] = set()
        """Messages on models that could not be loaded again and again."""
        self._open: dict[int, asyncio.Timeout] = {}
        """Calls that run, by numbers that grow."""
        self._given_up: UnavailableError | None = None
        self._is_away = False
        self.stopping = asyncio.Event()

    async def run(
        self, lines: Iterator[Line | BadLine], write: Callable[[Outcome], Awaitable[None]]
    ) -> None:
        """Run the lines until none is left, or ``stopping`` is set and those that run are done.

        Lines that wait for another attempt when ``stopping`` is set are not written. ``write``
        gets each output once, in no order, and is never cancelled. Raises what ``write`` raises,
        and UnavailableError when the server was away or refused all lines for too long: what still
        ran by then is written, and what it refused is not. Of a server that is away, what still
        runs after ``LAST_CALLS`` seconds is not written either.
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
        finally:
            for _, _, task in self._aside:
                task.slot.give_back()
            self._aside.clear()
        if self._given_up is not None:
            raise self._given_up

    async def _work(
        self, lines: Iterator[Line | BadLine], write: Callable[[Outcome], Awaitable[None]]
    ) -> None:
        while (task := await self._next(lines)) is not None:
            try:
                await task.slot.take()
                outcome = await self._outcome(task)
                if outcome is not None:
                    await _to_the_end(write(outcome))
            finally:
                if not task.is_aside:
                    task.slot.give_back()

    async def _next(self, lines: Iterator[Line | BadLine]) -> _Task | None:
        """Return the next line; None when none is left, or the batch is stopping.

        A line that waits for another attempt goes when it is its time, in turn with new ones.
        """
        while not self.stopping.is_set():
            task = self._due() if self._is_read or not self._was_aside else None
            self._was_aside = task is not None
            if task is None and not self._is_read:
                task = await self._read(lines)
            if task is not None:
                return task
            if self._is_read and not self._aside:
                return None
            if self._is_read:
                await self._pause(self._aside[0][0] - self._clock())
        return None

    def _due(self) -> _Task | None:
        """Return the line that was put aside and is to be tried again now."""
        if not self._aside or self._aside[0][0] > self._clock():
            return None
        _, _, task = heapq.heappop(self._aside)
        task.is_aside = False
        return task

    async def _read(self, lines: Iterator[Line | BadLine]) -> _Task | None:
        """Return the next line of the input, which has a slot; None after the last."""
        slot = self._slots.slot()
        task = None
        try:
            await slot.take()
            async with self._reading:
                if not self._is_read and not self.stopping.is_set():
                    # The thread would go on, and whoever reads the file next must not meet it.
                    line = await _to_the_end(asyncio.to_thread(next, lines, None))
                    self._is_read = line is None
                    if line is not None:
                        task = _Task(line, slot, self._clock(), FIRST_WAIT)
        finally:
            if task is None:
                slot.give_back()
        return task

    async def _outcome(self, task: _Task) -> Outcome | None:
        """Return the output of a line; while the server is not available, wait and try again.

        None for one that was put aside, or was to be tried again when the batch was stopped.
        """
        line = task.line
        if isinstance(line, BadLine):
            return refused(line)
        while not self.stopping.is_set():
            reply: Reply | None = None
            try:
                reply = await self._call(line, task.deaths)
            except UnavailableError as error:
                if self._clock() >= self._ends(task):
                    self._give_up(error, is_away=True)
                    return None
            if reply is not None and self._is_final(task, reply):
                return answered(line, reply)
            if reply is not None and self._is_over(task):
                self._give_up(_refusal_of(line, reply))
                return None
            pause = self._pause_after(task, reply)
            has_left = task.slot.leave(len(line.body))
            others_may_run = reply is not None and reply.status == _UNAVAILABLE
            if has_left and others_may_run and len(self._aside) < MOST_ASIDE:
                task.is_aside = True
                entry = self._clock() + pause, next(self._numbers), task
                heapq.heappush(self._aside, entry)
                return None
            await self._pause(pause)
            if not self.stopping.is_set():
                await task.slot.take()
        return None

    async def _call(self, line: Line, deaths: Deaths) -> Reply:
        """Return the answer to a line in its turn. Raises UnavailableError when none comes."""
        number = next(self._numbers)
        limit = self._open[number] = asyncio.timeout(None)
        try:
            async with limit:
                return await in_turn(self._caller, self._gate, deaths, line.url, line.body)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise UnavailableError("The server was away for too long.") from error
        finally:
            del self._open[number]

    def _pause_after(self, task: _Task, reply: Reply | None) -> float:
        """Return the seconds to wait before the next attempt, no fewer than the server asks for."""
        # Lines that were refused together do not come back together.
        pause = task.wait * random.uniform(1.0, 1.5)
        task.wait = min(2 * task.wait, LONGEST_WAIT)
        left = self._ends(task) - self._clock()
        if left > 0:
            pause = min(pause, left)
        asked = 0.0 if reply is None or reply.retry_after is None else reply.retry_after
        return max(pause, min(asked, LONGEST_ASKED))

    def _is_final(self, task: _Task, reply: Reply) -> bool:
        """Return whether a line is not to be tried again after this answer."""
        if reply.status not in AGAIN or reply.is_final:
            self._answered_at = self._clock()
            return True
        if self._has_failed(task, reply):
            return True
        if reply.status in LATER or (reply.status == _TIMEOUT and _error_of(reply) is None):
            return False  # the second comes from a proxy, which knows nothing of the request
        return self._clock() >= self._ends(task)

    def _is_over(self, task: _Task) -> bool:
        """Return whether a refused line is not to be tried again, as nothing is answered any more.

        Answers may take longer than the patience: calls that are open when the time of the line is
        over may still be answered, and then it has more time.
        """
        if self._clock() < self._ends(task):
            task.last_call = None
            return False
        if task.last_call is None:
            task.last_call = max(self._open, default=-1)
        return min(self._open, default=math.inf) > task.last_call

    def _give_up(self, error: UnavailableError, *, is_away: bool = False) -> None:
        """End the run by this error when the lines that run are finished.

        Where the server is away, they have ``LAST_CALLS`` seconds for that.
        """
        self._given_up = self._given_up or error
        self.stopping.set()
        if is_away and not self._is_away:
            self._is_away = True
            end = asyncio.get_running_loop().time() + LAST_CALLS
            for limit in self._open.values():
                limit.reschedule(end)

    def _has_failed(self, task: _Task, reply: Reply) -> bool:
        """Return whether the model of a line could not be loaded in several attempts."""
        if reply.status != _UNAVAILABLE:
            return False
        error = _error_of(reply)
        message = "" if error is None else error.message or ""
        if error is None or error.code != "engine_unavailable" or NOT_LOADED not in message:
            return False
        task.num_failed += 1
        if task.num_failed >= MOST_FAILED and len(self._failed) < _MOST_NAMED:
            self._failed.add(message)
        return task.num_failed >= MOST_FAILED or message in self._failed

    def _ends(self, task: _Task) -> float:
        """Return when a line that the server keeps refusing is given up.

        While the server answers others, the model of this one may have to wait for them.
        """
        return max(task.since, self._answered_at) + self._patience

    async def _pause(self, seconds: float) -> None:
        """Wait, but not longer than until the batch is stopped."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                await self.stopping.wait()


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
            "message": f"The server answered {reply.status} without a JSON object.",
            "param": None,
            "line": line.number,
        }
    text = _line(line, {**response, "body": body}, error)
    return Outcome(
        line.number,
        body is not None and reply.status == 200,
        text,
        usage.prompt_tokens or usage.input_tokens,
        usage.completion_tokens or usage.output_tokens,
    )


def _error_of(reply: Reply) -> _Error | None:
    """Return the error that an API has answered; None for what is none, as the page of a proxy."""
    try:
        error = _refusal.decode(reply.body).error
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return _Error(message=error) if isinstance(error, str) else error


def _refusal_of(line: Line, reply: Reply) -> UnavailableError:
    """Return the error that ends a run whose lines the server keeps refusing."""
    error = _error_of(reply)
    said = f": {error.message:.300}" if error is not None and error.message else "."
    return UnavailableError(
        f"Line {line.number} was refused again and again with {reply.status}{said}"
    )


def refused(line: BadLine) -> Outcome:
    """Return the output for a line that is no request."""
    return Outcome(line.number, False, _line(line, None, line.error()))


def _line(line: Line | BadLine, response: Any, error: Any) -> bytes:
    entry = {
        "id": output_id(line.number, line.digest),
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
    return msgspec.json.encode(entry) + b"\n"


def _body(raw: bytes) -> Any:
    """Return a JSON object as it is, in one line; None for anything else."""
    if not raw.lstrip().startswith(b"{"):
        return None
    try:
        if b"\n" in raw or b"\r" in raw:
            return msgspec.json.decode(raw)
        msgspec.json.decode(raw, type=msgspec.Raw)
        raw.decode()
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return msgspec.Raw(raw)
