"""Budgets in bytes: of all downloads until they are decoded, and of the media of one request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from sensorium.errors import MediaTooLargeError, OverloadedError


class ByteBudget:
    """Bounds the bytes of running downloads and of contents that requests hold. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._num_bytes = 0
        self._held: dict[bytes, tuple[int, int]] = {}  # digest: number of holders, bytes

    @property
    def num_bytes(self) -> int:
        """Bytes in use now."""
        return self._num_bytes

    @property
    def num_holders(self) -> int:
        """Calls of ``hold`` that no ``release`` has ended."""
        with self._lock:
            return sum(num_holders for num_holders, _ in self._held.values())

    @contextmanager
    def share(self, on_change: Callable[[int], None] = lambda num_bytes: None) -> Iterator[Share]:
        """Open the share of one download; ``on_change`` is called with its bytes at each change."""
        share = Share(self, on_change)
        try:
            yield share
        finally:
            share.end()

    def hold(self, digest: bytes, num_bytes: int) -> None:
        """Count a content until ``release``, once for all its holders. Raises OverloadedError."""
        with self._lock:
            num_holders, size = self._held.get(digest, (0, num_bytes))
            if not num_holders:
                self._add(size)
            self._held[digest] = (num_holders + 1, size)

    def release(self, digest: bytes) -> None:
        """End one ``hold``."""
        with self._lock:
            num_holders, size = self._held.pop(digest)
            if num_holders > 1:
                self._held[digest] = (num_holders - 1, size)
            else:
                self._num_bytes -= size

    def change(self, num_bytes: int) -> None:
        """Reserve bytes, or release some if ``num_bytes`` is negative. Raises OverloadedError."""
        with self._lock:
            self._add(num_bytes)

    def _add(self, num_bytes: int) -> None:
        if num_bytes > 0 and self._num_bytes + num_bytes > self.limit:
            raise OverloadedError(
                "Too many bytes of media are being downloaded or wait to be decoded; try again "
                "later (--max-media-bytes-in-flight)."
            )
        self._num_bytes += num_bytes


class Share:
    """The part of a budget that one download uses. Thread-safe."""

    def __init__(self, budget: ByteBudget, on_change: Callable[[int], None]) -> None:
        self._budget = budget
        self._on_change = on_change
        self._lock = threading.Lock()
        self._has_ended = False
        self.num_bytes = 0

    def change(self, num_bytes: int) -> None:
        """Reserve bytes before they are kept, or release some. Raises OverloadedError.

        Raises it also after ``end``, which stops a thread that still unpacks an abandoned download.
        """
        with self._lock:
            if self._has_ended:
                raise OverloadedError("The download was abandoned.")
            self._change(num_bytes)

    def reset(self) -> None:
        """Release all bytes, as before another attempt."""
        with self._lock:
            self._change(-self.num_bytes)

    def end(self) -> None:
        """Release all bytes, for good."""
        with self._lock:
            self._has_ended = True
            self._change(-self.num_bytes)

    def _change(self, num_bytes: int) -> None:
        # Told first, as who waits may be refused for good where others would only be for now.
        self._on_change(self.num_bytes + num_bytes)
        try:
            self._budget.change(num_bytes)
        except OverloadedError:
            self._on_change(self.num_bytes)
            raise
        self.num_bytes += num_bytes


class DownloadProgress:
    """Bytes of a running download, with listeners for its changes. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []
        self.num_bytes = 0

    def update(self, num_bytes: int) -> None:
        """Set the number of bytes, and call the listeners."""
        with self._lock:
            self.num_bytes = num_bytes
            for listener in self._listeners:
                listener()

    @contextmanager
    def watched(self, listener: Callable[[], None]) -> Iterator[None]:
        """Call ``listener`` at once and at every change, until the block ends."""
        with self._lock:
            self._listeners.append(listener)
            listener()
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(listener)


class RequestBytes:
    """Bounds the bytes of one request: contents it has, and downloads it waits for, as they come.

    A download may go on for other requests when this one is past a limit. Belongs to one event
    loop.

    Args:
        limit: Most bytes of all contents.
        limit_in_flight: Most bytes of those that count against the budget of all downloads: with
            more, waiting for others would not help.
    """

    def __init__(self, limit: int, limit_in_flight: int | None = None) -> None:
        self.limit = limit
        self.limit_in_flight = limit_in_flight
        self.num_bytes = 0
        self.num_in_flight = 0
        self._lock = threading.Lock()
        self._downloads: list[DownloadProgress] = []

    def add(self, num_bytes: int) -> None:
        """Count a content. Raises MediaTooLargeError past the limit."""
        self.num_bytes += num_bytes
        self._check()

    def add_in_flight(self, num_bytes: int) -> None:
        """Count a content against the limit of downloads. Raises MediaTooLargeError past it."""
        self.num_in_flight += num_bytes
        self._check()

    @asynccontextmanager
    async def waiting(self, download: DownloadProgress) -> AsyncIterator[None]:
        """Count a download that the block waits for. Raises MediaTooLargeError past a limit."""
        loop = asyncio.get_running_loop()
        passed: MediaTooLargeError | None = None
        has_left = False

        def check() -> None:  # runs in the thread of the download
            nonlocal passed
            if passed is None:
                passed = self._passed()
                if passed is not None:
                    loop.call_soon_threadsafe(end_wait)

        def end_wait() -> None:
            if not has_left:
                timeout.reschedule(loop.time())

        with self._lock:
            self._downloads.append(download)
        try:
            async with asyncio.timeout(None) as timeout:
                try:
                    with download.watched(check):
                        yield
                finally:
                    has_left = True
        except TimeoutError:
            if timeout.expired() and passed is not None:
                raise passed from None
            raise
        except OverloadedError:
            if passed is not None:
                raise passed from None
            raise
        finally:
            with self._lock:
                self._downloads.remove(download)

    @property
    def num_coming(self) -> int:
        """Bytes of contents and of running downloads."""
        return self.num_bytes + self._num_downloading()

    def _num_downloading(self) -> int:
        with self._lock:
            return sum(d.num_bytes for d in set(self._downloads))

    def _check(self) -> None:
        passed = self._passed()
        if passed is not None:
            raise passed

    def _passed(self) -> MediaTooLargeError | None:
        """Return the error for the limit that is passed, if one is."""
        coming = self._num_downloading()
        most, flag = self.limit, "--max-request-media-bytes"
        if self.num_bytes + coming <= most:
            if self.limit_in_flight is None or self.num_in_flight + coming <= self.limit_in_flight:
                return None
            most, flag = self.limit_in_flight, "--max-media-bytes-in-flight"
        return MediaTooLargeError(
            f"The media of the request have more than {most} bytes together, the limit ({flag})."
        )
