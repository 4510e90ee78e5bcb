"""Reading of adapters beside the steps of an engine."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sensorium.engine import wire
from sensorium.errors import SensoriumError, UnavailableError
from sensorium.forks import OWN_THREADS

if TYPE_CHECKING:
    from sensorium.engine.adapters import NamedAdapter
    from sensorium.engine.engine import Engine

logger = logging.getLogger(__name__)

READ_SECONDS = 240.0
"""Most time in which nothing more of an adapter is read."""
LONGEST_SECONDS = 3600.0
"""Most time that reading an adapter may take."""
MOST_ABANDONED = 3
"""Threads that hang in reading adapters which were given up; with as many, none is read."""
CLOSING_SECONDS = 1.0
"""Most time that closing waits for a thread that reads."""
_NICE = 10
"""Priority of the thread that reads, below those that run the model."""


@dataclass(slots=True, eq=False)
class _Reading:
    """An adapter that a thread reads: when that began, and went on last.

    number: that of the message. found: what was read, or the error; None until then.
    """

    number: int
    began: float
    went_on: float
    found: NamedAdapter | BaseException | None = None
    thread: threading.Thread | None = None

    @property
    def has_ended(self) -> bool:
        """True when there is nothing more to wait for."""
        return self.found is not None or self.thread is None or not self.thread.is_alive()


class AdapterReader:
    """Reads one adapter at a time in a thread, and gives it to the engine between two steps.

    ``poll`` is to be called between steps, and when ``fileno`` is readable. What the engine has
    then, and errors, go to ``answer`` with the number of the message.
    """

    def __init__(
        self,
        engine: Engine,
        answer: Callable[[int, SensoriumError | None], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._answer = answer
        self._clock = clock
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._wake, False)
        self._reading: _Reading | None = None
        self._abandoned: list[_Reading] = []

    def fileno(self) -> int:
        """Return a descriptor that is readable when an adapter has been read."""
        return self._wake

    def begin(self, message: wire.LoadAdapter) -> None:
        """Begin to read an adapter."""
        problem = self._obstacle()
        if problem:
            self._answer(message.number, UnavailableError(problem))
            return
        now = self._clock()
        reading = _Reading(message.number, now, now)
        reading.thread = threading.Thread(
            target=self._read, args=(message, reading), name=f"{OWN_THREADS}adapter", daemon=True
        )
        try:
            reading.thread.start()
        except RuntimeError:  # the system gives no more threads
            error = "There is no thread to read the adapter in; try again later."
            self._answer(message.number, UnavailableError(error))
            return
        self._reading = reading

    def poll(self) -> None:
        """Give the engine the adapter that has been read, if any, and answer."""
        for reading in [each for each in self._abandoned if each.has_ended]:
            self._abandoned.remove(reading)
            self._join(reading)
        current = self._reading
        if current is None:
            return
        if current.has_ended:
            self._join(current)
            self._reading = None
            self._answer(current.number, self._added(current.found))
        elif self._is_late(current):
            self._reading = None
            self._abandoned.append(current)
            logger.error("an adapter is given up: reading it takes too long")
            error = "The adapter is given up: reading it takes too long."
            self._answer(current.number, UnavailableError(error))

    def close(self) -> None:
        """Free the descriptors; those of a thread that still reads go with the process."""
        if self._reading is not None and self._reading.thread is not None:
            self._reading.thread.join(CLOSING_SECONDS)
        readings = [*self._abandoned, *([] if self._reading is None else [self._reading])]
        if any(each.thread is not None and each.thread.is_alive() for each in readings):
            return
        os.close(self._wake)
        os.close(self._waker)

    def _obstacle(self) -> str:
        """Return why no adapter can be read now, if that is so."""
        if self._reading is not None:
            return "Another adapter is being read; try again in a moment."
        if len(self._abandoned) >= MOST_ABANDONED:
            return f"{len(self._abandoned)} adapters cannot be read to their end; try again later."
        return ""

    def _is_late(self, reading: _Reading) -> bool:
        now = self._clock()
        return now - reading.went_on > READ_SECONDS or now - reading.began > LONGEST_SECONDS

    def _join(self, reading: _Reading) -> None:
        """Wait for a thread that ends, and take the byte that it has written."""
        if reading.thread is not None:
            reading.thread.join()
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 1)

    def _added(self, found: NamedAdapter | BaseException | None) -> SensoriumError | None:
        """Give the engine an adapter; return the error, if any."""
        if found is None:
            return expected(RuntimeError("the thread that read it has gone"))
        if isinstance(found, BaseException):
            return expected(found)
        try:
            self._engine.add_adapter(found)
        except Exception as error:
            return expected(error)
        return None

    def _read(self, message: wire.LoadAdapter, reading: _Reading) -> None:
        def progress() -> None:
            reading.went_on = self._clock()

        try:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
            reading.found = self._engine.read_adapter(
                message.name, message.path, message.folder, progress
            )
        except BaseException as error:  # also a panic of a library, which is no Exception
            reading.found = error
        finally:
            os.write(self._waker, b"\0")


def expected(error: BaseException) -> SensoriumError:
    """Return an error of adapters as a client gets it; log one that is a fault of ours."""
    if isinstance(error, SensoriumError):
        return error
    logger.error("an adapter could not be loaded or unloaded", exc_info=error)
    if isinstance(error, MemoryError):
        return UnavailableError("There is not enough memory for the adapter.")
    return SensoriumError(f"It failed: {type(error).__name__}.")
