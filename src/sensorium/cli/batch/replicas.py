"""``sensorium batch --replicas``: lines of a file through several engines on Ray."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from sensorium.cli.batch.journal import Journal
from sensorium.cli.batch.run import SOME_FAILED, STOPPED, Job, Run
from sensorium.config import ServedConfig
from sensorium.errors import UnavailableError
from sensorium.processes.start import STOPS
from sensorium.ray.cluster import ray_cluster, require_ray
from sensorium.server.batches.lines import BadLine
from sensorium.server.batches.runner import Outcome, refused

if TYPE_CHECKING:
    from sensorium.ray.data.batch import Replicas
    from sensorium.ray.data.source import Part

PARTS_AT_ONCE = 2
"""Parts of the input for each engine's lines at a time: their number bounds what is read ahead."""
MOST_PASSES = 3
"""Times that lines without an output are given to the engines."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Place of a run: ``address`` as in ``ray_cluster``, and the processes there."""

    address: str | None
    replicas: Replicas


class _Stopped(BaseException):
    """A signal asks the program to stop."""


def run_on_ray(job: Job, model: ServedConfig, cluster: Cluster) -> int:
    """Run a job on several engines; return the exit status.

    Raises ConfigError and UnavailableError.
    """
    require_ray()
    if cluster.address is None:
        _check_model(model)
    with job.source.open("rb") as file:
        run = Run(job, file)
        with run.journal() as journal:
            try:
                if not run.is_complete(journal):
                    _run_lines(run, journal, model, cluster)
            except _Stopped:
                return STOPPED
            finally:
                print(run.summary(journal), file=sys.stderr)
            if job.in_order:
                journal.sort()
            return SOME_FAILED if journal.num_failed else 0


def _check_model(model: ServedConfig) -> None:
    """Raise ConfigError for a model that is not there, before a cluster is started for it."""
    from sensorium.models import loader

    loader.read_config_of(model.engine.model)


def _run_lines(run: Run, journal: Journal, model: ServedConfig, cluster: Cluster) -> None:
    """Run all lines that have no output yet. Raises _Stopped at the first SIGINT or SIGTERM."""
    todo = _Todo(run, journal)
    with ray_cluster(cluster.address, num_cpus=cluster.replicas.needed_cpus), _signals():
        if cluster.address is None:
            from sensorium.ray.data.batch import share_of_cores

            engine = share_of_cores(model.engine, cluster.replicas.engines)
            model = dataclasses.replace(model, engine=engine)
        with run.progress(journal) as progress:
            for number in range(MOST_PASSES):
                before = journal.num_done
                for outcome in _outcomes(run, todo, journal, model, cluster.replicas, number):
                    if not journal.is_done(outcome.number):  # it may come again
                        journal.write(outcome.number, outcome.succeeded, outcome.text)
                        progress.add(outcome, journal)
                if run.is_complete(journal):
                    return
                if journal.num_done == before:
                    break
    raise UnavailableError("The engines left lines without an answer.")


def _outcomes(
    run: Run,
    todo: _Todo,
    journal: Journal,
    model: ServedConfig,
    replicas: Replicas,
    attempt: int,
) -> Iterator[Outcome]:
    from sensorium.ray.data.batch import outcomes

    size = 1 if attempt else max(1, math.ceil(replicas.rows / PARTS_AT_ONCE))
    parts = list(todo.parts(journal, size))
    if parts:
        job = run.job
        yield from outcomes(
            job.source,
            parts,
            model,
            replicas,
            most_bytes=job.max_line_bytes,
            is_made=job.is_made,
        )


class _Todo:
    """The lines that are requests, and where each begins. Memory: 8 bytes a line.

    Lines that are none get their output here.
    """

    def __init__(self, run: Run, journal: Journal) -> None:
        self._offsets = array("q", [-1]) * run.num_numbers
        for offset, line in run.lines_with_offsets():
            if isinstance(line, BadLine):
                if not journal.is_done(line.number):
                    outcome = refused(line)
                    journal.write(outcome.number, outcome.succeeded, outcome.text)
            else:
                self._offsets[line.number] = offset

    def parts(self, journal: Journal, size: int) -> Iterator[Part]:
        """Yield parts of ``size`` lines that have no output yet."""
        from sensorium.ray.data.source import Part

        numbers: list[int] = []
        for number, offset in enumerate(self._offsets):
            if offset >= 0 and not journal.is_done(number):
                numbers.append(number)
                if len(numbers) == size:
                    yield Part(self._offsets[numbers[0]], numbers[0], frozenset(numbers))
                    numbers = []
        if numbers:
            yield Part(self._offsets[numbers[0]], numbers[0], frozenset(numbers))


class _signals:
    """Context in which SIGINT and SIGTERM raise _Stopped, once."""

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._stop) for number in STOPS}

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        for one in STOPS:
            signal.signal(one, signal.SIG_IGN)
        raise _Stopped
