"""A batch on several engines: lines of a file in, outputs in the order in which they come."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.data import DataContext
from ray.exceptions import RayError

from sensorium.config import EngineConfig, ServedConfig
from sensorium.errors import ConfigError, UnavailableError
from sensorium.processes import cores
from sensorium.ray.cluster import quiet
from sensorium.ray.data.lines import LineAnswer, LinePreparation
from sensorium.ray.data.source import LinesDatasource, Part
from sensorium.ray.data.stages import Pool, rows_of, through_stages
from sensorium.ray.logs import losses_logged
from sensorium.server.batches.runner import Outcome
from sensorium.server.batches.urls import without_secrets

if TYPE_CHECKING:
    from ray.data import Dataset

READ_AT_ONCE = 2
_OF_CONFIG = ("ConfigError", "UnsupportedModelError")
_ERROR = re.compile(r"sensorium\.errors\.(\w+): (.+)")


@dataclass(frozen=True, slots=True)
class Replicas:
    """Processes of a run.

    Attributes:
        engines: Engines.
        preparing: Processes that prepare prompts and media.
        rows: Lines that each engine has at a time.
        num_cpus, num_gpus: What Ray reserves for each engine.
    """

    engines: int
    preparing: int
    rows: int
    num_cpus: float = 1.0
    num_gpus: float = 0.0

    @property
    def needed_cpus(self) -> int:
        """CPUs that a cluster must have for all of them, and for reading."""
        return int(self.engines * max(1.0, self.num_cpus)) + self.preparing + READ_AT_ONCE

    @property
    def pools(self) -> tuple[Pool, Pool]:
        """Pools of the two stages."""
        n, m = self.engines, self.preparing
        rows = max(1, -(-self.rows * n // m))
        return Pool(m, m, rows, 1.0), Pool(n, n, self.rows, self.num_cpus, self.num_gpus)


def share_of_cores(config: EngineConfig, num_engines: int) -> EngineConfig:
    """Return the options of one of several engines on this machine: each has its share of cores."""
    model = config.model
    if model.num_threads is not None or num_engines < 2:
        return config
    threads = max(1, cores.find().engine_threads().number // num_engines)
    return dataclasses.replace(config, model=dataclasses.replace(model, num_threads=threads))


def outcomes(
    path: Path,
    parts: Sequence[Part],
    model: ServedConfig,
    replicas: Replicas,
    *,
    most_bytes: int,
    is_made: bool = False,
) -> Iterator[Outcome]:
    """Yield the outputs of lines, which the connected cluster runs.

    Lines whose engine was away for too long have none, and a line may come again when a process was
    lost. ``is_made``: this program has written the lines.

    Raises:
        ConfigError: The model cannot be loaded.
        UnavailableError: The cluster failed.
    """
    quiet()
    logging.getLogger("ray.data").setLevel(logging.CRITICAL + 1)  # what it raises is reported here
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = ray.data.read_datasource(
        LinesDatasource(path, parts, most_bytes, is_made=is_made),
        override_num_blocks=len(parts),
        concurrency=min(READ_AT_ONCE, len(parts)),
    )
    preparing, answering = replicas.pools
    prepare = functools.partial(LinePreparation, model)
    answer = functools.partial(LineAnswer, model)
    results = through_stages(rows, prepare, answer, preparing, answering)
    try:
        with losses_logged():
            yield from _results(results)
    except RayError as error:
        raise _cause(error) from error


def _results(rows: Dataset) -> Iterator[Any]:
    for table in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for row in rows_of(table):
            if row.result is not None:
                yield row.result


def _cause(error: RayError) -> ConfigError | UnavailableError:
    """Return the error of ours that Ray reports, or one that says what Ray says."""
    message = without_secrets(str(error))
    found = [(name, text) for name, text in _ERROR.findall(message) if name in _OF_CONFIG]
    if found:
        return ConfigError(found[-1][1])
    return UnavailableError(f"The cluster could not go on: {message[-2000:]}")
