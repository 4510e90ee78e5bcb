"""Batches of all tenants: created, run below other requests, and remembered for a while."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

from sensorium.config import ServerConfig
from sensorium.errors import (
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    SensoriumError,
    counted,
)
from sensorium.server.batches.calls import Caller
from sensorium.server.batches.isolation import Gate
from sensorium.server.batches.lines import (
    BLANK_FACTOR,
    BadLine,
    Line,
    Survey,
    read_lines,
    survey,
)
from sensorium.server.batches.runner import LineRunner, Outcome, refused
from sensorium.server.batches.slots import Slots
from sensorium.server.files.store import FileStore, NewFile

MOST_ERRORS = 100
"""Bad lines that a failed batch names."""
OUTPUT_PURPOSE = "batch_output"
_RETRY_SECONDS = 60
_CHECKED_AT_ONCE = 2
_LATE_AT_ONCE = 256

Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
_ENDED = frozenset({"failed", "completed", "expired", "cancelled"})
_TIMES = (
    *("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"),
)

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Batch:
    """One batch. ``times``: when it came into each of its states, seconds since 1970."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    metadata: Mapping[str, str] | None = None
    output_seconds: int | None = None
    status: Status = "validating"
    times: dict[str, int] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None
    num_total: int = 0
    num_completed: int = 0
    num_failed: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    runner: LineRunner | None = None

    @property
    def has_ended(self) -> bool:
        """True when nothing of it runs any more."""
        return self.status in _ENDED

    def to_dict(self) -> dict[str, Any]:
        """Return the batch object of the API."""
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **{f"{name}_at": self.times.get(name) for name in _TIMES},
            "request_counts": {
                "total": self.num_total,
                "completed": self.num_completed,
                "failed": self.num_failed,
            },
            "usage": {
                "input_tokens": self.num_prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": self.num_output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            },
            "metadata": self.metadata,
        }


class BatchStore:
    """The batches of all tenants, bounded in number. Belongs to one event loop.

    ``caller_of`` makes what answers the requests of a tenant; ``num_at_once`` requests of all
    batches run at a time.
    """

    def __init__(
        self,
        config: ServerConfig,
        files: FileStore,
        caller_of: Callable[[str], Caller],
        num_at_once: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._files = files
        self._caller_of = caller_of
        self._num_at_once = num_at_once
        self._clock = clock
        self._slots = Slots(num_at_once)
        self._gate = Gate()
        # Long inputs take a while, and what else needs threads does not wait for them.
        self._checking = ThreadPoolExecutor(_CHECKED_AT_ONCE, "sensorium-batches")
        self._batches: dict[str, Batch] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def create(
        self,
        tenant: str,
        *,
        endpoint: str,
        input_file_id: str,
        completion_window: str,
        seconds: int,
        metadata: Mapping[str, str] | None = None,
        output_seconds: int | None = None,
    ) -> Batch:
        """Begin a batch that may take ``seconds``.

        Raises NotFoundError, InvalidRequestError for a file of another purpose, and
        OverloadedError when too many batches run.
        """
        stored = self._files.get(input_file_id, tenant, "input_file_id")
        if stored.purpose != "batch":
            raise InvalidRequestError(
                f"The input of a batch must be uploaded with the purpose 'batch'; this file has "
                f"{stored.purpose!r}.",
                param="input_file_id",
            )
        file = stored.open()
        try:
            self._make_room(tenant)
        except OverloadedError:
            file.close()
            raise
        now = int(self._clock())
        batch = Batch(
            id=f"batch_{secrets.token_hex(16)}",
            tenant=tenant,
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=completion_window,
            created_at=now,
            expires_at=now + seconds,
            metadata=metadata,
            output_seconds=output_seconds,
        )
        self._batches[batch.id] = batch
        task = asyncio.create_task(self._run(batch, file))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return batch

    def get(self, batch_id: str, tenant: str) -> Batch:
        """Return a batch. Raises NotFoundError, also for another tenant's."""
        found = self._batches.get(batch_id)
        if found is None or found.tenant != tenant:
            raise NotFoundError(f"There is no batch {batch_id[:80]!r}.")
        return found

    def of_tenant(self, tenant: str) -> list[Batch]:
        """Return the batches of a tenant, oldest first."""
        return [batch for batch in self._batches.values() if batch.tenant == tenant]

    def cancel(self, batch_id: str, tenant: str) -> Batch:
        """Begin no more lines of a batch; those that run are finished. Raises as ``get``.

        Raises InvalidRequestError for one that has ended.
        """
        batch = self.get(batch_id, tenant)
        if batch.has_ended or batch.status == "finalizing":
            raise InvalidRequestError(
                f"The batch is {batch.status} and cannot be cancelled any more."
            )
        if batch.status != "cancelling":
            self._enter(batch, "cancelling")
            if batch.runner is not None:
                batch.runner.stopping.set()
        return batch

    async def close(self) -> None:
        """End all batches; what they have written is lost."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._checking.shutdown(wait=False, cancel_futures=True)

    def _make_room(self, tenant: str) -> None:
        """Forget the oldest ended batch of the tenant, if need be. Raises OverloadedError.

        Where the others have taken the room, it is one of those who have more than the tenant.
        """
        most, share = self._config.max_batches, self._config.share_of(self._config.max_batches)
        held = Counter(batch.tenant for batch in self._batches.values())
        if len(self._batches) < most and held[tenant] < share:
            return
        own = [batch for batch in self.of_tenant(tenant) if batch.has_ended]
        others = [
            batch
            for batch in self._batches.values()
            if batch.has_ended and held[batch.tenant] > held[tenant]
        ]
        if own:
            del self._batches[own[0].id]
        elif held[tenant] < share and others:
            del self._batches[max(others, key=lambda batch: held[batch.tenant]).id]
        else:
            raise self._full(held[tenant], share)

    def _full(self, num_held: int, share: int) -> OverloadedError:
        most = self._config.max_batches
        error = OverloadedError(
            f"{num_held} of your batches are running; at most {share} may (--max-batches). "
            "Try again later."
            if num_held >= share
            else f"There are {len(self._batches)} batches; at most {most} may be "
            "(--max-batches). Try again later."
        )
        error.retry_after = _RETRY_SECONDS
        return error

    def _enter(self, batch: Batch, status: Status) -> None:
        batch.status = status
        batch.times[status] = int(self._clock())

    async def _run(self, batch: Batch, file: BinaryIO) -> None:
        """Run a batch from its first line to its files."""
        try:
            with contextlib.closing(file):
                found = await self._validated(batch, file)
                if found is not None:
                    await self._lines(batch, file, found)
        except SensoriumError as error:
            self._fail(batch, [{**error.to_dict(), "line": None}])
        except Exception:
            logger.exception("the batch %s failed", batch.id)
            self._fail(batch, [{"code": "internal_error", "message": "The batch failed."}])

    def _fail(self, batch: Batch, errors: list[dict[str, Any]]) -> None:
        batch.errors = [*errors, *batch.errors]
        self._enter(batch, "failed")

    async def _validated(self, batch: Batch, file: BinaryIO) -> Survey | None:
        """Check all lines before any runs; None for a batch that has ended by then."""
        most_bytes = self._config.max_body_bytes
        most = self._config.max_batch_lines
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._checking, survey, file, most_bytes, most)
        batch.num_total = found.num_lines
        if not found.is_whole or not found.num_lines:
            message = (
                "The input file has no lines."
                if found.is_whole
                else f"The input file has more than {most} lines (--max-batch-lines), or more than "
                f"{BLANK_FACTOR * most} with its blank ones."
            )
            code = "empty_file" if found.is_whole else "too_many_lines"
            self._fail(batch, [{"code": code, "message": message, "param": None, "line": None}])
            return None
        lines = read_lines(file, found, most_bytes, batch.endpoint)
        bad = await loop.run_in_executor(self._checking, _bad_lines, lines)
        if batch.status == "cancelling":
            self._enter(batch, "cancelled")
            return None
        if bad:
            self._fail(batch, [line.error() for line in bad])
            return None
        return found

    async def _lines(self, batch: Batch, file: BinaryIO, found: Survey) -> None:
        """Run the lines of a valid input, and make the files of its output known."""
        self._enter(batch, "in_progress")
        async with _Output(self._files, batch) as output:
            try:
                ended = await self._written(batch, file, found, output)
                await output.finish()
            except SensoriumError:  # no room for more: what is stored is kept
                await output.finish(partly=True)
                raise
        self._enter(batch, ended)

    async def _written(
        self, batch: Batch, file: BinaryIO, found: Survey, output: _Output
    ) -> Status:
        """Run the lines; return the status in which the batch ends."""
        left = max(0.0, batch.expires_at - self._clock())
        batch.runner = LineRunner(
            self._caller_of(batch.tenant),
            min(self._num_at_once, found.num_lines),
            patience=math.inf,  # the window ends the batch
            slots=self._slots,
            gate=self._gate,
        )
        lines = read_lines(file, found, self._config.max_body_bytes, batch.endpoint)
        ended: Status = "completed"
        try:
            async with asyncio.timeout(left):
                await batch.runner.run(lines, output.write)
        except TimeoutError:
            ended = "expired"
        if batch.status == "cancelling":
            return "cancelled"
        self._enter(batch, "finalizing")  # it cannot be cancelled any more
        if ended == "expired":
            await self._expire(batch, file, found, output)
        return ended

    async def _expire(self, batch: Batch, file: BinaryIO, found: Survey, output: _Output) -> None:
        """Write an error for each line that was not reached in time."""
        lines = read_lines(file, found, self._config.max_body_bytes, batch.endpoint)
        while late := await asyncio.to_thread(_late_lines, lines, output.written):
            for line in late:
                await output.write(refused(line))


def _late_lines(lines: Iterator[Line | BadLine], written: set[int]) -> list[BadLine]:
    """Return errors for the next lines that have no output."""
    late = (
        BadLine(
            line.number,
            line.custom_id,
            "batch_expired",
            f"Line {line.number} was not run before the completion window ended.",
        )
        for line in lines
        if line.number not in written
    )
    return list(itertools.islice(late, _LATE_AT_ONCE))


def _bad_lines(lines: Iterator[Line | BadLine]) -> list[BadLine]:
    """Return the first lines that are no requests."""
    bad: list[BadLine] = []
    for line in lines:
        if isinstance(line, BadLine):
            bad.append(line)
            if len(bad) == MOST_ERRORS:
                break
    return bad


class _Output:
    """The two files of a batch's output, each created with its first line."""

    def __init__(self, files: FileStore, batch: Batch) -> None:
        self._files = files
        self._batch = batch
        self._open: dict[bool, NewFile] = {}
        self._lock = asyncio.Lock()
        self.written: set[int] = set()

    async def __aenter__(self) -> _Output:
        return self

    async def __aexit__(self, *error: object) -> None:
        for file in self._open.values():
            file.discard()  # unless it is finished

    async def write(self, outcome: Outcome) -> None:
        """Append a line and count it. Raises OverloadedError, MediaTooLargeError."""
        async with self._lock:
            file = self._open.get(outcome.succeeded)
            if file is None:
                file = self._files.create(self._batch.tenant)
                self._open[outcome.succeeded] = file
            await file.write(outcome.text)
        batch = self._batch
        self.written.add(outcome.number)
        batch.num_completed += outcome.succeeded
        batch.num_failed += not outcome.succeeded
        batch.num_prompt_tokens += outcome.num_prompt_tokens
        batch.num_output_tokens += outcome.num_output_tokens

    async def finish(self, *, partly: bool = False) -> None:
        """Make the files known by their ids.

        ``partly``: without the lines that the disk did not take; these are counted no longer, and
        an error of the batch. Raises OverloadedError.
        """
        batch = self._batch
        for succeeded, file in list(self._open.items()):
            name = f"{batch.id}_{'output' if succeeded else 'error'}.jsonl"
            try:
                stored = await file.finish(name, OUTPUT_PURPOSE, batch.output_seconds)
            except OverloadedError:
                if not partly:
                    raise
                self._lose(succeeded, file.without_rest().count(b"\n"))
                stored = await file.finish(name, OUTPUT_PURPOSE, batch.output_seconds)
            del self._open[succeeded]
            if succeeded:
                batch.output_file_id = stored.id
            else:
                batch.error_file_id = stored.id

    def _lose(self, succeeded: bool, num_lines: int) -> None:
        """Count lines no longer, which were to be in a file."""
        if not num_lines:
            return
        batch, what = self._batch, "answers" if succeeded else "errors"
        batch.num_completed -= num_lines * succeeded
        batch.num_failed -= num_lines * (not succeeded)
        lost = f"{counted(num_lines, 'line')} could not be stored and left out of the {what}."
        batch.errors.append({"code": "lines_lost", "message": lost, "param": None, "line": None})
