"""One run of ``sensorium batch``: lines of a file through a model, outputs into two files."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from sensorium import progress
from sensorium.cli.batch.journal import Journal
from sensorium.config import ServedConfig
from sensorium.errors import ConfigError
from sensorium.processes.start import STOPS
from sensorium.server.batches.calls import AppCaller, Caller
from sensorium.server.batches.lines import BadLine, Line, read_lines, survey
from sensorium.server.batches.runner import LineRunner, Outcome

STOPPED = 130
"""Exit status after Ctrl-C, as of a program that the signal ended."""
SOME_FAILED = 1


@dataclass(frozen=True, slots=True)
class Job:
    """The task of a run.

    Attributes:
        source: File of requests.
        answers: File for the outputs that succeeded.
        errors: File for the others.
        num_at_once: Lines that run at the same time.
        max_line_bytes: Longest line.
        patience: Seconds for which a line is tried again while the server is not available.
        in_order: Put the outputs into the order of the input at the end.
        overwrite: Forget the outputs of earlier runs.
        rerun_changed: Forget those of lines that have changed since.
        is_made: This program has written the file of requests, of images or the rows of a table.
    """

    source: Path
    answers: Path
    errors: Path
    num_at_once: int
    max_line_bytes: int
    patience: float
    in_order: bool
    overwrite: bool
    rerun_changed: bool
    is_made: bool = False


@asynccontextmanager
async def local_caller(models: Sequence[ServedConfig]) -> AsyncIterator[Caller]:
    """Give a caller of models whose engines run for the block. Raises ConfigError."""
    from sensorium.engine.serving.process import EngineProcess

    with EngineProcess() as process:
        process.start()
        # The engine does not wait for these.
        from sensorium.server.app import build_app
        from sensorium.server.models.start import served_models

        server = models[0].server
        served = served_models(models, server, process)
        app = build_app(served, server)
        try:
            await served.start()
            yield AppCaller(app, "", below=False)
        finally:
            await served.close()


def run_batch(job: Job, caller: AbstractAsyncContextManager[Caller]) -> int:
    """Run a job; return the exit status.

    ``caller`` is entered only where lines are left. Raises ConfigError and UnavailableError.
    """
    try:
        file = job.source.open("rb")
    except OSError as error:
        raise ConfigError(f"{str(job.source)!r} cannot be read: {error.strerror}.") from error
    with file:
        run = Run(job, file)
        with run.journal() as journal:
            try:
                if not run.is_complete(journal):
                    asyncio.run(run.main(journal, caller))
            finally:
                print(run.summary(journal), file=sys.stderr)
            if not run.is_complete(journal):
                return STOPPED
            if job.in_order:
                journal.sort()
            return SOME_FAILED if journal.num_failed else 0


class Run:
    """A run over an input. Raises ConfigError for an empty one."""

    def __init__(self, job: Job, file: BinaryIO) -> None:
        self.job = job
        self._file = file
        self._found = survey(file, job.max_line_bytes, is_made=job.is_made)
        self._runner: LineRunner | None = None
        if self._found.num_lines == 0:
            raise ConfigError(f"{str(job.source)!r} has no lines.")

    def journal(self) -> Journal:
        """Open the files of the output. Raises ConfigError."""
        job = self.job
        return Journal(
            job.answers,
            job.errors,
            self._found,
            overwrite=job.overwrite,
            rerun_changed=job.rerun_changed,
        )

    def is_complete(self, journal: Journal) -> bool:
        """Return true when every line has an output."""
        return journal.num_done >= self._found.num_lines

    async def main(self, journal: Journal, caller: AbstractAsyncContextManager[Caller]) -> None:
        """Run all lines that have no output yet.

        The first SIGINT or SIGTERM lets the lines that run be finished, the second ends them.
        Raises UnavailableError and ConfigError.
        """
        signals: asyncio.Queue[None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        for number in STOPS:
            loop.add_signal_handler(number, signals.put_nowait, None)
        working = asyncio.create_task(self._work(journal, caller))
        stopping = asyncio.create_task(self._stop(working, signals))
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await working
        finally:
            stopping.cancel()
            for number in STOPS:
                loop.remove_signal_handler(number)

    @property
    def num_numbers(self) -> int:
        """Return a number greater than those of all lines."""
        return len(self._found.marks)

    def lines_with_offsets(self) -> Iterator[tuple[int, Line | BadLine]]:
        """Yield all lines from the beginning, each with the place of its first byte."""
        starts = _Starts(self._file)
        for line in read_lines(cast(BinaryIO, starts), self._found, self.job.max_line_bytes):
            yield starts.of(line.number), line

    @contextlib.contextmanager
    def progress(self, journal: Journal) -> Iterator[Progress]:
        """Show how many lines are done, while the block runs."""
        total, done = self._found.num_lines, journal.num_done
        with progress.bar("Lines", total, unit="lines", keep=True, delay=0.0, initial=done) as bar:
            yield Progress(bar)

    def summary(self, journal: Journal) -> str:
        """Return a sentence on what was done, and how to go on where something is left."""
        job, total = self.job, self._found.num_lines
        num_good = journal.num_done - journal.num_failed
        text = f"{num_good} of {total} lines answered, in {str(job.answers)!r}"
        if journal.num_failed:
            text += f"; {journal.num_failed} failed, in {str(job.errors)!r}"
        if journal.num_done < total:
            text += f"; {total - journal.num_done} are left: the same command goes on with them"
        return f"{text}."

    async def _stop(self, working: asyncio.Task[None], signals: asyncio.Queue[None]) -> None:
        """Wait for signals, and end the work as they ask."""
        await signals.get()
        if self._runner is not None:
            self._runner.stopping.set()
            text = "Stopping: the lines that run are finished. Once more ends them at once."
            progress.TerminalBar.write(text, file=sys.stderr)
            await signals.get()
        working.cancel()

    async def _work(self, journal: Journal, caller: AbstractAsyncContextManager[Caller]) -> None:
        job = self.job
        async with caller as answers:
            self._runner = LineRunner(answers, job.num_at_once, patience=job.patience)
            with self.progress(journal) as shown:

                async def write(outcome: Outcome) -> None:
                    journal.write(outcome.number, outcome.succeeded, outcome.text)
                    shown.add(outcome, journal)

                await self._runner.run(self._todo(journal), write)

    def _todo(self, journal: Journal) -> Iterator[Line | BadLine]:
        for line in read_lines(self._file, self._found, self.job.max_line_bytes):
            if not journal.is_done(line.number):
                yield line


class Progress:
    """Bar of the lines that are done, with the failed ones and the rate of tokens."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._began = time.monotonic()
        self._num_tokens = 0

    def add(self, outcome: Outcome, journal: Journal) -> None:
        """Count a line whose output has been written."""
        self._num_tokens += outcome.num_output_tokens
        seconds = max(time.monotonic() - self._began, 1e-9)
        failed = f"failed {journal.num_failed}, " if journal.num_failed else ""
        rate = f"output {self._num_tokens / seconds:.1f} tok/s"
        self._bar.set_postfix_str(failed + rate, refresh=False)
        self._bar.update()


class _Starts:
    """A file that notes where each line begins that is read from its beginning."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._number = self._offset = self._start = 0
        self._at_start = True

    def seek(self, offset: int) -> int:
        """Go to the beginning."""
        self._number = self._offset = 0
        self._at_start = True
        return self._file.seek(offset)

    def readline(self, size: int) -> bytes:
        """Read a line, or a piece of a longer one."""
        line = self._file.readline(size)
        if self._at_start:
            self._number, self._start = self._number + 1, self._offset
        self._offset += len(line)
        self._at_start = line.endswith(b"\n")
        return line

    def of(self, number: int) -> int:
        """Return where the line that was read last begins, which has this number."""
        assert number == self._number
        return self._start
