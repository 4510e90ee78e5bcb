"""The two stages as Ray Data runs them: actors that take batches of rows, several at a time.

Ray runs a batch again when its actor is lost. Some of what it makes then may have been handed on
before: rows leave an actor in the order in which they came, and of the same size (``attempts.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import pickle
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sensorium.config import MIB, EngineConfig
from sensorium.errors import ConfigError
from sensorium.models.needs import NVIDIA
from sensorium.multimodal.shared_memory import MEMORY_FOLDER, place_below
from sensorium.multimodal.workers.event_loop import LoopThread
from sensorium.processes.private_folder import PrivateFolder
from sensorium.ray.data.attempts import counted_attempts
from sensorium.ray.data.fronts import Prompts
from sensorium.ray.data.lines import Stage
from sensorium.ray.data.room import Room
from sensorium.server.batches.isolation import MOST_ALONE, Gate

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset

logger = logging.getLogger(__name__)

COLUMN = "row"
MOST_STARTS = 4
"""Times that the processes of a stage may be lost while they start, for each of them."""
HELD_BYTES = 512 * MIB
"""Bytes of features that a process holds at most, but for one row that has more by itself."""
LOST = "process_lost"
"""Code of the error of a row whose process was lost."""
_LOST_MESSAGE = f"The process was lost each of the {MOST_ALONE} times that it ran this row alone."
_GREW = (
    "The row ran again, as its process was lost when some rows beside it had been handed on. It "
    "has more bytes than the first time, for which there is no place any more."
)
SPARE_BYTES, SPARE_SHARE = 1024, 0.125
"""Room for what another attempt has more: bytes, and a share of the row."""
DIVIDED_SHARE = 0.5
"""Share of the bytes at which Ray divides what a task makes: with less it is one block for sure."""
_UNFORESEEN = "internal_error"
_THREADS = "OMP_NUM_THREADS"
_CALLS_AT_ONCE = 8
"""Batches into which the rows of an engine are divided, so that one slow row holds up few."""


@dataclass(slots=True)
class Row:
    """A row between the stages.

    Attributes:
        work: The request.
        given: What belongs to it and is only passed on.
        prompts: Its prompts, once they are prepared.
        result: What has become of it; None if nothing yet.
        key: Name of the row.
    """

    work: Any
    given: Any = None
    prompts: Prompts = field(default_factory=Prompts)
    result: Any = None
    key: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(frozen=True, slots=True)
class Pool:
    """Processes of a stage.

    Attributes:
        least, most: Number of processes.
        rows: Rows that each has at a time.
        num_cpus, num_gpus: What Ray reserves for each.
    """

    least: int
    most: int
    rows: int
    num_cpus: float
    num_gpus: float = 0.0

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return max(1, math.ceil(self.rows / _CALLS_AT_ONCE))

    @property
    def num_calls(self) -> int:
        """Batches that a process has at a time."""
        return max(1, math.ceil(self.rows / self.batch_size))


def packed(row: Row) -> bytes:
    """Return a row as a cell of a table, without the request where that has a result."""
    row = row if row.result is None else replace(row, work=None)
    return pickle.dumps(row, pickle.HIGHEST_PROTOCOL)


def unpacked(cell: Any) -> Row:
    """Return the row in a cell, anything with the interface of buffers; more may follow it."""
    row: Row = pickle.loads(cell)
    return row


def table_of(rows: Sequence[Row]) -> pyarrow.Table:
    """Return rows as a table of one column."""
    return _table_of_cells([packed(row) for row in rows])


def _table_of_cells(cells: Sequence[bytes]) -> pyarrow.Table:
    import pyarrow

    return pyarrow.table({COLUMN: pyarrow.array(cells, pyarrow.large_binary())})


def rows_of(table: pyarrow.Table) -> list[Row]:
    """Return the rows of a table."""
    return [unpacked(cell.as_buffer()) for cell in table.column(COLUMN)]


class Preparation:
    """First stage in an actor. Rows that have a result pass.

    Rows that ran when a process was lost run again alone.

    Args:
        make: Returns the work of the stage.
        attempts: Handle of the ``Attempts`` of the stage.
        threads: Value of ``OMP_NUM_THREADS``; unset if None.
        num_processes: Processes of the stage.
        block_bytes: Bytes at which Ray divides what a task makes into blocks; None if it does not.

    Attributes:
        room: Room for the features of rows that are not handed on yet.
    """

    keeps_prompts = True

    def __init__(
        self,
        make: Callable[[], Stage],
        attempts: Any,
        threads: str | None,
        num_processes: int,
        block_bytes: int | None,
    ) -> None:
        self._attempts = attempts
        self._least_divided = math.inf if block_bytes is None else DIVIDED_SHARE * block_bytes
        # Ray sets it to the number of reserved CPUs; the driver's counts, or none.
        os.environ.pop(_THREADS, None)
        if threads is not None:
            os.environ[_THREADS] = threads
        # Ray kills actors, too, after which nobody else would remove what lies there.
        self._folder = PrivateFolder(_memory_folder(), "sensorium-ray-")
        place_below(self._folder.path)
        self._loop = LoopThread("stage")
        self._stage = make()
        self._gate = Gate()
        self.room = Room(HELD_BYTES if self.keeps_prompts else math.inf)
        self._error: ConfigError | None = self._started(MOST_STARTS * num_processes)

    def __call__(self, batch: pyarrow.Table) -> Iterator[pyarrow.Table]:
        """Run the rows of a batch at the same time; yield each when it and those before are done.

        What they hold counts until then.
        """
        if self._error is not None:
            raise self._error
        rows = rows_of(batch)
        keys = [row.key for row in rows if row.result is None]
        running = self._loop.submit(self._begun([row for row in rows if row.result is None]))
        tasks = dict(zip(keys, running.result(), strict=True))
        try:
            for row in rows:
                if row.key in tasks:
                    self._loop.submit(_ended(tasks[row.key])).result()
                table = self._table(row)
                row.prompts = Prompts()
                self._leave([tasks.pop(row.key)] if row.key in tasks else [])
                yield table
        finally:
            # What is left when Ray wants no more, or something was raised. Nobody waits for it:
            # an abandoned generator may be ended in any thread, that of the loop among them.
            self._leave(list(tasks.values()))
            self._attempts.end.remote(keys)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._loop.submit(self._stage.close()).result()
            self._loop.close()
            self._folder.close()

    def _started(self, most_starts: int) -> ConfigError | None:
        """Start the stage; return what is wrong, of which Ray would begin and tell a long story."""
        name = type(self).__name__
        if self._attempts.begin_start.remote(name).future().result() > most_starts:
            return ConfigError(
                "The processes that run the model are lost whenever they start: the machine may "
                "have too little memory for as many of them."
            )
        try:
            self._loop.submit(self._stage.start()).result()
        except ConfigError as error:
            return error
        self._attempts.end_start.remote(name)
        return None

    async def _begun(self, rows: Sequence[Row]) -> list[asyncio.Task[int]]:
        """Begin to run rows, in their order."""
        begun = await _told(self._attempts.begin.remote([row.key for row in rows]))
        return [
            asyncio.create_task(self._run(row, is_suspect=number > 1))
            for row, number in zip(rows, begun, strict=True)
        ]

    async def _run(self, row: Row, *, is_suspect: bool) -> int:
        """Run a row; return the bytes that it holds.

        The room comes before the gate: who waits for room holds nobody up who has some.
        """
        async with self.room.entered() as entered:
            if is_suspect:
                async with self._gate.alone():
                    await self._run_alone(row)
            else:
                async with self._gate.beside():
                    await self._find_result(row)
            if row.result is not None or not self.keeps_prompts:
                row.prompts = Prompts()
            entered.num_bytes = row.prompts.num_bytes
        return entered.num_bytes

    def _leave(self, tasks: Sequence[asyncio.Task[int]]) -> None:
        """End tasks of rows that run still, and give up what rows hold, as soon as may be."""
        if not tasks:
            return

        async def left() -> None:
            for task in tasks:
                task.cancel()
            for found in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(found, int):
                    self.room.leave(found)

        with contextlib.suppress(RuntimeError):  # the actor itself has ended
            self._loop.submit(left())

    def _table(self, row: Row) -> pyarrow.Table:
        """Return a row as a table of as many bytes as in the first attempt.

        Where it has more now, it goes without its prompts, which the next stage can prepare, or
        becomes an error. Raises RuntimeError if even that is too large, which ends the run.
        """
        cell = packed(row)
        wanted = self._size(row, len(cell))
        if wanted is None:
            return _table_of_cells([cell])
        if len(cell) > wanted and row.result is None:
            cell = packed(replace(row, prompts=Prompts()))
        if len(cell) > wanted:
            result = self._stage.failed(row.work, LOST, _GREW)
            cell = packed(replace(row, prompts=Prompts(), result=result))
        if len(cell) > wanted:
            raise RuntimeError(f"{_GREW} Run it again with fewer rows at a time (batch_size).")
        return _table_of_cells([cell.ljust(wanted, b"\0")])

    def _size(self, row: Row, num_bytes: int) -> int | None:
        """Return the bytes that a row's cell of ``num_bytes`` must have; None for any."""
        with_spare = num_bytes + int(SPARE_SHARE * num_bytes) + SPARE_BYTES
        asked = self._attempts.size.remote(_task_id(), row.key, with_spare, self._least_divided)
        size: int | None = asked.future().result()
        return size

    async def _run_alone(self, row: Row) -> None:
        """Run a row whose process was lost before, unless it was so too often."""
        if await _told(self._attempts.begin_alone.remote(row.key)) > MOST_ALONE:
            row.result = self._stage.failed(row.work, LOST, _LOST_MESSAGE)
        else:
            await self._find_result(row)
        self._attempts.end_alone.remote(row.key)

    async def _find_result(self, row: Row) -> None:
        try:
            row.result = await self._stage.run(row.work, row.prompts)
        except Exception as error:
            logger.exception("a row could not be run")
            message = f"An unforeseen {type(error).__name__}: the log of the process says more."
            row.result = self._stage.failed(row.work, _UNFORESEEN, message)


class Answering(Preparation):
    """Second stage in an actor."""

    keeps_prompts = False


async def _told(reference: Any) -> Any:
    """Return what an actor answers."""
    return await asyncio.wrap_future(reference.future())


async def _ended(task: asyncio.Task[int]) -> int:
    """Return what a task of this event loop gives."""
    return await task


def _task_id() -> str:
    """Return the id of the task of Ray in this thread, which is the same when it runs again."""
    import ray

    # Asked for its context, Ray would start a cluster where there is none.
    return str(ray.get_runtime_context().get_task_id()) if ray.is_initialized() else ""


def _memory_folder() -> str:
    return str(MEMORY_FOLDER) if os.access(MEMORY_FOLDER, os.W_OK) else ""


def gpus_of(config: EngineConfig) -> float:
    """Return the GPUs that an engine with these options uses."""
    device = config.model.device
    is_gpu = NVIDIA.exists() if device == "auto" else device != "cpu"
    return float(config.parallel.tensor_parallel_size if is_gpu else 0)


def through_stages(
    rows: Dataset,
    prepare: Callable[[], Stage],
    answer: Callable[[], Stage],
    preparing: Pool,
    answering: Pool,
) -> Dataset:
    """Return rows with results, or without one where an engine was away for too long."""
    threads = os.environ.get(_THREADS)
    block_bytes = rows.context.target_max_block_size
    for stage, make, pool in (
        (Preparation, prepare, preparing),
        (Answering, answer, answering),
    ):
        # One for each stage: the first may go on with a batch of which the second has rows already.
        rows = mapped(
            rows, stage, (make, counted_attempts(), threads, pool.most, block_bytes), pool
        )
    return rows


def mapped(rows: Dataset, stage: type, arguments: tuple[Any, ...], pool: Pool) -> Dataset:
    """Return rows after a stage, whose actors are made of ``arguments``."""
    from ray.data import ActorPoolStrategy

    return rows.map_batches(
        stage,
        fn_constructor_args=arguments,
        batch_size=pool.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=pool.least,
            max_size=pool.most,
            max_concurrent_calls_per_actor=pool.num_calls,
            max_tasks_in_flight_per_actor=pool.num_calls + 1,
            enable_true_multi_threading=True,
        ),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        udf_modifying_row_count=False,
    )
