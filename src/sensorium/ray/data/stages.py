"""The two stages as Ray Data runs them: actors that take batches of rows, several at a time.

Ray runs a batch again when its actor is lost. What it makes then must come in the same order, since
some of it may have been handed on before: rows leave an actor in the order in which they came.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import pickle
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sensorium.config import MIB, EngineConfig
from sensorium.errors import ConfigError
from sensorium.models.needs import NVIDIA
from sensorium.multimodal.shared_memory import MEMORY_FOLDER, place_below
from sensorium.multimodal.workers.event_loop import LoopThread
from sensorium.processes.private_folder import PrivateFolder
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
    """Return a row as a cell of a table."""
    return pickle.dumps(row, pickle.HIGHEST_PROTOCOL)


def unpacked(cell: Any) -> Row:
    """Return the row in a cell, which is anything with the interface of buffers."""
    row: Row = pickle.loads(cell)
    return row


def table_of(rows: Sequence[Row]) -> pyarrow.Table:
    """Return rows as a table of one column."""
    import pyarrow

    cells = [packed(row) for row in rows]
    return pyarrow.table({COLUMN: pyarrow.array(cells, pyarrow.large_binary())})


def rows_of(table: pyarrow.Table) -> list[Row]:
    """Return the rows of a table."""
    return [unpacked(cell.as_buffer()) for cell in table.column(COLUMN)]


class Attempts:
    """Actor that counts what was begun and not ended, as its process was lost.

    Ray runs rows again, and starts processes again, without a limit. A row that ends its process
    each time must not do so for ever, nor take those along that ran beside it.
    """

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()
        self._alone: Counter[str] = Counter()
        self._starts: Counter[str] = Counter()

    def begin(self, keys: Sequence[str]) -> list[int]:
        """Count an attempt of each row; return how many there have been."""
        self._begun.update(keys)
        return [self._begun[key] for key in keys]

    def begin_alone(self, key: str) -> int:
        """Count an attempt of a row that runs alone; return how many there have been."""
        self._alone[key] += 1
        return self._alone[key]

    def end_alone(self, key: str) -> None:
        """Forget the attempts of a row that has run alone."""
        self._alone.pop(key, None)

    def end(self, keys: Sequence[str]) -> None:
        """Forget rows that are done."""
        for key in keys:
            self._begun.pop(key, None)
            self._alone.pop(key, None)

    def begin_start(self, stage: str) -> int:
        """Count a process of a stage that starts; return how many have started and not got ready.

        Some may be starting now.
        """
        self._starts[stage] += 1
        return self._starts[stage]

    def end_start(self, stage: str) -> None:
        """Note that a process of a stage is ready: what was lost before does not count any more."""
        self._starts.pop(stage, None)


class Preparation:
    """First stage in an actor. Rows that have a result pass.

    Rows that ran when a process was lost run again alone. ``num_processes``: those of the stage.

    Attributes:
        room: Room for the features of rows that are not handed on yet.
    """

    keeps_prompts = True

    def __init__(
        self, make: Callable[[], Stage], attempts: Any, threads: str | None, num_processes: int
    ) -> None:
        self._attempts = attempts
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
        for row in rows:
            task = tasks.get(row.key)
            num_bytes = 0 if task is None else self._loop.submit(_ended(task)).result()
            table = table_of([row])
            row.prompts = Prompts()
            self._loop.submit(self._left(num_bytes))
            yield table
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

    async def _left(self, num_bytes: int) -> None:
        """Give up what a row has held."""
        self.room.leave(num_bytes)

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
        if row.result is not None:
            row.work = None


class Answering(Preparation):
    """Second stage in an actor."""

    keeps_prompts = False


async def _told(reference: Any) -> Any:
    """Return what an actor answers."""
    return await asyncio.wrap_future(reference.future())


async def _ended(task: asyncio.Task[int]) -> int:
    """Return what a task of this event loop gives."""
    return await task


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
    for stage, make, pool in (
        (Preparation, prepare, preparing),
        (Answering, answer, answering),
    ):
        # One for each stage: the first may go on with a batch of which the second has rows already.
        rows = _mapped(rows, stage, (make, counted_attempts(), threads, pool.most), pool)
    return rows


def counted_attempts() -> Any:
    """Start the actor that counts attempts. Returns its handle."""
    import ray

    # Where its machine is lost, it starts again and has forgotten all, which does no harm.
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()


def _mapped(rows: Dataset, stage: type, arguments: tuple[Any, ...], pool: Pool) -> Dataset:
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
