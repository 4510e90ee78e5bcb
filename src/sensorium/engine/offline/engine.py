"""The engine of an ``LLM``, and all that prepares prompts for it and runs them."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, cast

from sensorium import forks
from sensorium.config import EngineConfig
from sensorium.engine.engine import Engine
from sensorium.engine.executor import build_engine
from sensorium.engine.offline.adapters import AdaptersOnDemand
from sensorium.engine.offline.batch import BatchInput, Result
from sensorium.engine.offline.progress import Progress
from sensorium.engine.offline.run import BatchRun, Output
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.engine.stats import EngineStats
from sensorium.errors import InvalidRequestError, SensoriumError
from sensorium.models import loader
from sensorium.models.loading.checkpoint import is_local
from sensorium.models.registry import resolve
from sensorium.multimodal.workers.event_loop import LoopThread
from sensorium.params import LoRARequest
from sensorium.tracing import Tracer


class _Making:
    """The making of an input processor in another thread, while weights are loaded."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._processor: InputProcessor | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._make, name=f"{forks.OWN_THREADS}processor")
        self._thread.start()

    def _make(self) -> None:
        try:
            self._processor = InputProcessor(
                self._config, trust_request_chat_template=True, package_files=True
            )
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raise the error if the making has failed so far."""
        if self._error is not None:
            raise self._error

    def wait(self) -> InputProcessor:
        """Return the processor when it is made, or raise the error of its making."""
        self._thread.join()
        self.check()
        assert self._processor is not None
        return self._processor

    def abandon(self) -> None:
        """Close the processor once it is made."""
        self._thread.join()
        if self._processor is not None:
            self._processor.close()


def _may_overlap(config: EngineConfig) -> bool:
    """Return whether the input processor may be made while the model is loaded.

    Weights that have to be downloaded wait, as they may be in vain. So do models of transformers,
    which changes torch's default dtype for the whole process while it makes one.
    """
    if not is_local(config.model.model):
        return False
    model = config.model
    found = loader.read_config(model.model, mmproj=model.mmproj, hf_overrides=model.hf_overrides)
    return resolve(found.config).quantizable


class OfflineEngine:
    """An engine in the caller's thread, with its input processor and the event loop of that.

    One batch runs at a time. Threads, processes and descriptors are released by ``close``, or when
    neither the object nor a generator of outputs is referenced any more.
    """

    def __init__(
        self,
        config: EngineConfig,
        engine: Engine,
        input_processor: InputProcessor,
        loop: LoopThread,
        tracer: Tracer,
    ) -> None:
        self.config = config
        self.engine = engine
        self.input_processor = input_processor
        self.loop = loop
        self.tracer = tracer
        self.request_numbers = itertools.count()
        self._made_in = forks.generation()
        input_processor.set_facts(engine.facts)
        self._adapters = AdaptersOnDemand(engine, config.lora.max_loras)
        closers = (loop.close, input_processor.close, tracer.close, engine.release)
        self._release = weakref.finalize(self, forks.release, self._made_in, *closers)
        self._in_use = threading.Lock()
        self._closed = False
        self._run: BatchRun | None = None

    @classmethod
    def build(cls, config: EngineConfig) -> OfflineEngine:
        """Load the model. Raises ConfigError and ForkedProcessError."""
        config.parallel.check_one_replica()
        forks.begin_computing()
        options = config.observability
        tracer = Tracer(options.trace_dir, options.otlp_traces_endpoint, config.model.model)
        making = _Making(config)
        try:
            if not _may_overlap(config):
                making.wait()
            engine = build_engine(config, proceed=making.check)
            processor = making.wait()
        except BaseException:
            making.abandon()
            tracer.close()
            making.check()  # what it says is about the configuration
            raise
        return cls(config, engine, processor, LoopThread("loop"), tracer)

    def close(self) -> None:
        """Free the model, and end its threads and processes."""
        if not self._closed:
            self._closed = True
            self._release()
            del self.engine, self._adapters

    def check_open(self) -> None:
        """Raise InvalidRequestError after ``close``, ForkedProcessError in a forked process."""
        forks.check_owner(self._made_in, "LLM")
        if self._closed:
            raise InvalidRequestError("This LLM has been closed; make a new one.")

    def stats(self) -> EngineStats:
        """Return the counters of the engine and of the media pipeline."""
        self.check_open()
        stats = self.engine.stats()
        stats.media = self.input_processor.media_stats()
        return stats

    def results(
        self, batch: BatchInput, use_tqdm: bool, stream: bool, convert: Callable[[Any], Result]
    ) -> list[Result] | Generator[Result, None, None]:
        """Run a batch: a generator of the outputs as they finish, or all of them in order."""
        if stream:
            return self._streamed(batch, use_tqdm, convert)
        return self.complete(batch, use_tqdm, convert)

    def complete(
        self, batch: BatchInput, use_tqdm: bool, convert: Callable[[Any], Result]
    ) -> list[Result]:
        """Run a batch and return its outputs in order; an error carries those that are complete."""
        outputs: list[Result | None] = [None] * (batch.total or 0)
        try:
            for index, output in self._finished(batch, use_tqdm):
                outputs += [None] * (index + 1 - len(outputs))
                outputs[index] = convert(output)
        except SensoriumError as error:
            error.outputs = outputs
            raise
        return cast("list[Result]", outputs)

    def updates(self, batch: BatchInput) -> Generator[tuple[int, Output], None, None]:
        """Run a batch and yield (index, output) whenever an output grows.

        Closing the generator ends the work.
        """
        if not self._in_use.acquire(blocking=False):
            raise InvalidRequestError(
                "This LLM is in the middle of another call: exhaust or close the stream that "
                "chat_stream or stream=True returned, or wait for the other thread."
            )
        try:
            self.check_open()
            if self._run is not None:  # another interrupt came while it cleaned up
                self._run.clean_up(whole=False)
            self._provide(batch.adapters)
            self._run = BatchRun(
                batch,
                self.engine,
                self.input_processor,
                self.loop,
                self.request_numbers,
                self.tracer,
                max_num_seqs=self.config.scheduler.max_num_seqs,
            )
            with closing(self._run.outputs()) as outputs:
                for output in outputs:
                    yield output
                    self.check_open()  # the caller may have closed it meanwhile
        finally:
            if self._run is not None and self._run.is_clean:
                self._run = None
            self._in_use.release()

    def _provide(self, requests: Sequence[LoRARequest]) -> None:
        """Load the adapters of a call, when no other one runs.

        Raises InvalidRequestError and ConfigError.
        """
        if requests:
            try:
                self._adapters.provide(requests)
            finally:
                self.input_processor.set_facts(self.engine.facts)

    def _streamed(
        self, batch: BatchInput, use_tqdm: bool, convert: Callable[[Any], Result]
    ) -> Generator[Result, None, None]:
        with closing(self._finished(batch, use_tqdm)) as finished:
            for _, output in finished:
                yield convert(output)

    def _finished(
        self, batch: BatchInput, use_tqdm: bool
    ) -> Generator[tuple[int, Output], None, None]:
        """Run a batch and yield (index, output) of each prompt when it is complete."""
        with (
            Progress(batch.total, shown=use_tqdm) as progress,
            closing(self.updates(batch)) as outputs,
        ):
            for index, output in outputs:
                if output.finished:
                    progress.done(output)
                    yield index, output
