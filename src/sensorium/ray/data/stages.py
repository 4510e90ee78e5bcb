"""The two stages as Ray Data runs them: actors that take batches of rows, several at a time."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import pickle
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sensorium.config import EngineConfig
from sensorium.errors import ConfigError
from sensorium.models.needs import NVIDIA
from sensorium.multimodal.shared_memory import MEMORY_FOLDER, place_below
from sensorium.multimodal.workers.event_loop import LoopThread
from sensorium.processes.private_folder import PrivateFolder
from sensorium.ray.data.fronts import Prompts
from sensorium.ray.data.lines import Stage

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset

COLUMN = "row"
MOST_ATTEMPTS = 4
"""Times that a row is run at most while its process is lost each time."""
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
        is_lost: Its process was lost again and again; it is not run any more.
    """

    work: Any
    given: Any = None
    prompts: Prompts = field(default_factory=Prompts)
    result: Any = None
    key: str = field(default_factory=lambda: secrets.token_hex(8))
    is_lost: bool = False


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
    """Actor that counts how often rows were begun and not ended, as their process was lost.

    Ray runs them again without a limit; a row that ends its process each time must not do so
    forever.
    """

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, keys: Sequence[str]) -> list[int]:
        """Count an attempt of each row; return how many there have been."""
        self._begun.update(keys)
        return [self._begun[key] for key in keys]

    def end(self, keys: Sequence[str]) -> None:
        """Forget rows that are done."""
        for key in keys:
            self._begun.pop(key, None)


class Preparation:
    """First stage in an actor. Rows that have a result pass."""

    keeps_prompts = True

    def __init__(self, make: Callable[[], Stage], attempts: Any, threads: str | None) -> None:
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
        self._error: ConfigError | None = None
        try:
            self._loop.submit(self._stage.start()).result()
        except ConfigError as error:  # Ray would begin and report a long story of it
            self._error = error

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """Run the rows of a batch at the same time."""
        import ray

        if self._error is not None:
            raise self._error
        rows = rows_of(batch)
        open_rows = [row for row in rows if row.result is None and not row.is_lost]
        keys = [row.key for row in open_rows]
        for row, number in zip(open_rows, ray.get(self._attempts.begin.remote(keys)), strict=True):
            row.is_lost = number > MOST_ATTEMPTS
        self._loop.submit(self._run_all(open_rows)).result()
        self._attempts.end.remote(keys)
        return table_of(rows)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._loop.submit(self._stage.close()).result()
            self._loop.close()
            self._folder.close()

    async def _run_all(self, rows: Sequence[Row]) -> None:
        await asyncio.gather(*(self._run(row) for row in rows if not row.is_lost))

    async def _run(self, row: Row) -> None:
        row.result = await self._stage.run(row.work, row.prompts)
        if row.result is not None:
            row.work = None
        if row.result is not None or not self.keeps_prompts:
            row.prompts = Prompts()


class Answering(Preparation):
    """Second stage in an actor."""

    keeps_prompts = False


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
    import ray

    threads = os.environ.get(_THREADS)
    attempts = ray.remote(num_cpus=0)(Attempts).remote()
    for stage, make, pool in (
        (Preparation, prepare, preparing),
        (Answering, answer, answering),
    ):
        rows = _mapped(rows, stage, (make, attempts, threads), pool)
    return rows


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
