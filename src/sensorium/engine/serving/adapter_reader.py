"""Reading of adapters beside the steps of an engine."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from sensorium.engine import wire
from sensorium.errors import SensoriumError, UnavailableError
from sensorium.forks import OWN_THREADS

if TYPE_CHECKING:
    from sensorium.engine.adapters import NamedAdapter
    from sensorium.engine.engine import Engine

logger = logging.getLogger(__name__)

READ_SECONDS = 240.0
"""Most time that reading an adapter may take."""
CLOSING_SECONDS = 1.0
"""Most time that closing waits for a thread that reads."""
_NICE = 10
"""Priority of the thread that reads, below those that run the model."""


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
        self._thread: threading.Thread | None = None
        self._waiting: int | None = None
        self._deadline = 0.0
        self._found: NamedAdapter | Exception | None = None

    def fileno(self) -> int:
        """Return a descriptor that is readable when an adapter has been read."""
        return self._wake

    def begin(self, message: wire.LoadAdapter) -> None:
        """Begin to read an adapter."""
        if self._thread is not None:
            self._answer(
                message.number,
                UnavailableError("Another adapter is being read; try again in a moment."),
            )
            return
        self._waiting = message.number
        self._deadline = self._clock() + READ_SECONDS
        self._found = None
        self._thread = threading.Thread(
            target=self._read, args=(message,), name=f"{OWN_THREADS}adapter", daemon=True
        )
        self._thread.start()

    def poll(self) -> None:
        """Give the engine the adapter that has been read, if any, and answer."""
        thread = self._thread
        if thread is None:
            return
        if self._found is None:
            if self._waiting is not None and self._clock() > self._deadline:
                self._give_up(self._waiting)
            return
        thread.join()
        os.read(self._wake, 1)
        found, number = self._found, self._waiting
        self._thread = self._found = self._waiting = None
        if number is not None:  # else nobody waits for it any more
            self._answer(number, self._added(found))

    def close(self) -> None:
        """Free the descriptors; those of a thread that still reads go with the process."""
        if self._thread is not None:
            self._thread.join(CLOSING_SECONDS)
            if self._thread.is_alive():
                return
        os.close(self._wake)
        os.close(self._waker)

    def _give_up(self, number: int) -> None:
        self._waiting = None
        logger.error("an adapter could not be read in %g s", READ_SECONDS)
        error = f"The adapter could not be read in {READ_SECONDS:g} seconds."
        self._answer(number, UnavailableError(error))

    def _added(self, found: NamedAdapter | Exception) -> SensoriumError | None:
        """Give the engine an adapter; return the error, if any."""
        try:
            if isinstance(found, Exception):
                raise found
            self._engine.add_adapter(found)
        except Exception as error:
            return expected(error)
        return None

    def _read(self, message: wire.LoadAdapter) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        found: NamedAdapter | Exception
        try:
            found = self._engine.read_adapter(message.name, message.path, message.folder)
        except Exception as error:
            found = error
        self._found = found
        os.write(self._waker, b"\0")


def expected(error: Exception) -> SensoriumError:
    """Return an error of adapters as a client gets it; log one that is a fault of ours."""
    if isinstance(error, SensoriumError):
        return error
    logger.error("an adapter could not be loaded or unloaded", exc_info=error)
    if isinstance(error, MemoryError):
        return UnavailableError("There is not enough memory for the adapter.")
    return SensoriumError(f"It failed: {type(error).__name__}.")
