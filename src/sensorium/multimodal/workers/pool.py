"""Decoding and preprocessing of items, in worker processes or in threads, as the pipeline sees it.

Workers are forked in milliseconds from a fork server that is started once
(``processes.fork_server``). What runs in them is ``multimodal.workers.decode_worker``; the threads
that wait for them are in ``multimodal.workers.crew``.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from sensorium.config import MediaConfig
from sensorium.multimodal.decode.document import inspect_pages
from sensorium.multimodal.decode.loaders import DecodeJob, InspectJob, Prepared, prepare
from sensorium.multimodal.items import MODALITIES, Features, Modality, PageFacts
from sensorium.multimodal.processor import Processor
from sensorium.multimodal.shared_memory import SharedArrays, SharedArraysFolder
from sensorium.multimodal.workers.crew import NOT_NOW, Crew, DecodeTask, Worker
from sensorium.multimodal.workers.messages import Done, Inspected
from sensorium.multimodal.workers.threads import ThreadWorkers, default_num_workers
from sensorium.processes.fork_server import ForkServer, ForkServerCommand

START_SECONDS = 180.0
"""Seconds that the fork server may take to import what the model's processor needs."""


@dataclass(frozen=True, slots=True)
class DecoderStats:
    """``num_busy``: items being decoded now, ``num_waiting``.

    Items that wait for a worker, ``num_worker_restarts``: workers that died or were killed, and
    replaced, since the start.
    """

    num_busy: int = 0
    num_waiting: int = 0
    num_worker_restarts: int = 0


class Decoders(Protocol):
    """Decoding of items away from the event loop; usable from several loops at once."""

    async def prepare(self, job: DecodeJob, source: Any) -> Prepared:
        """Return the features of an item. Cancelling the caller ends the work.

        Raises RequestError, OverloadedError and UnavailableError, and NoRoomError where there is no
        room for the features.
        """
        ...

    async def inspect(self, source: bytes) -> list[PageFacts]:
        """Return the facts of each page of a PDF. Raises as ``prepare``."""
        ...

    def stats(self) -> DecoderStats:
        """Return the counters of now."""
        ...

    def close(self) -> None:
        """Free the workers. Nothing may be waiting."""
        ...


class ThreadDecoders:
    """Decoding in threads of this process, without isolation.

    No limits hold but those of the formats.

    For objects of the caller, which are decoded already, and for tests.
    """

    def __init__(self, workers: ThreadWorkers, config: MediaConfig, processor: Processor) -> None:
        self._workers = workers
        self._config = config
        self._processor = processor

    async def prepare(self, job: DecodeJob, source: Any) -> Prepared:
        """See ``Decoders.prepare``."""
        return await self._workers.run(prepare, job, source, self._config, self._processor)

    async def inspect(self, source: bytes) -> list[PageFacts]:
        """See ``Decoders.inspect``."""
        return await self._workers.run(inspect_pages, source, self._config)

    def stats(self) -> DecoderStats:
        """Return zeros: the threads count nothing."""
        return DecoderStats()

    def close(self) -> None:
        """Do nothing: the threads belong to another object."""


class ProcessDecoders:
    """Decodes encoded files in worker processes.

    Features come back in ``folder``, which this owns from now on.

    ``config.num_media_workers`` of them work at a time for each modality, so that no image waits
    for a long video; each within ``media_worker_memory_gb`` and ``media_decode_timeout``, or
    ``document_timeout`` for a PDF to be inspected. None is there before there is work for it.
    """

    def __init__(
        self, command: ForkServerCommand, config: MediaConfig, folder: SharedArraysFolder
    ) -> None:
        self.num_workers = config.num_media_workers or default_num_workers()
        self.server = ForkServer(
            command, name="media worker", refusal=NOT_NOW, answer_seconds=START_SECONDS
        )
        self._folder = folder
        self._crews = {
            modality: Crew(self.server, self.num_workers, config) for modality in MODALITIES
        }
        self._futures: set[Future[Done | Inspected]] = set()

    def start(self) -> None:
        """Start a first worker in the background, before the first item needs it."""
        self._crews["image"].submit(Worker.start)

    async def prepare(self, job: DecodeJob, source: bytes) -> Prepared:
        """See ``Decoders.prepare``."""
        task = DecodeTask(job, source, self._folder.new_path())
        done = await self._reply(task, job.modality)
        assert isinstance(done, Done)
        # Made here: futures refer to each other in circles, and would keep the file until these are
        # collected.
        arrays = SharedArrays(task.path, done.specs, owned=True)
        features = Features(job.modality, arrays, done.num_embeds, done.meta, done.precomputed)
        return Prepared(features, done.decode_seconds, done.decoded_bytes, done.preprocess_seconds)

    async def inspect(self, source: bytes) -> list[PageFacts]:
        """See ``Decoders.inspect``."""
        task = DecodeTask(InspectJob(), source, self._folder.new_path())
        reply = await self._reply(task, "image")
        assert isinstance(reply, Inspected)
        return reply.pages

    async def _reply(self, task: DecodeTask, modality: Modality) -> Done | Inspected:
        future = self._crews[modality].submit(task.run)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task.leave(future)
            raise

    def stats(self) -> DecoderStats:
        """See ``Decoders.stats``."""
        workers = [worker for crew in self._crews.values() for worker in crew.workers]
        num_busy = sum(worker.is_busy for worker in workers)
        return DecoderStats(
            num_busy,
            max(0, len(self._futures) - num_busy),
            sum(worker.num_deaths for worker in workers),
        )

    def close(self) -> None:
        """See ``Decoders.close``."""
        for crew in self._crews.values():
            crew.close(wait=False)
        self.server.close()  # ends what runs
        for crew in self._crews.values():
            crew.close(wait=True)
        self._folder.close()
