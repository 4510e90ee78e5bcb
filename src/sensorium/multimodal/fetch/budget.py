"""Bytes of downloads: of all together, while they come and until they are decoded, and of the request that waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from sensorium.errors import MediaTooLargeError, OverloadedError


class ByteBudget:
    """At most ``limit`` bytes of downloads at a time: unfinished ones, and contents that requests hold. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._num_bytes = 0
        self._held: dict[bytes, tuple[int, int]] = {}  # digest: number of holders, bytes

    @property
    def num_bytes(self) -> int:
        """Bytes that are taken now."""
        return self._num_bytes

    @property
    def num_holders(self) -> int:
        """Calls of ``hold`` that no ``release`` has ended."""
        with self._lock:
            return sum(num_holders for num_holders, _ in self._held.values())

    @contextmanager
    def share(self, on_change: Callable[[int], None] = lambda num_bytes: None) -> Iterator[Share]:
        """A share for one download, which ends with it. ``on_change`` is told how many bytes it has."""
        share = Share(self, on_change)
        try:
            yield share
        finally:
            share.end()

    def hold(self, digest: bytes, num_bytes: int) -> None:
        """Count a content once, however many hold it, until each has called ``release``. Raises OverloadedError."""
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
        """Take bytes, or give some back when ``num_bytes`` is negative. Raises OverloadedError."""
        with self._lock:
            self._add(num_bytes)

    def _add(self, num_bytes: int) -> None:
        if num_bytes > 0 and self._num_bytes + num_bytes > self.limit:
            raise OverloadedError(
                "Too many bytes of media are being downloaded or wait to be decoded; try again later "
                "(--max-media-bytes-in-flight)."
            )
        self._num_bytes += num_bytes


class Share:
    """What one download has of a budget. Thread-safe."""

    def __init__(self, budget: ByteBudget, on_change: Callable[[int], None]) -> None:
        self._budget = budget
        self._on_change = on_change
        self._lock = threading.Lock()
        self._has_ended = False
        self.num_bytes = 0

    def change(self, num_bytes: int) -> None:
        """Take bytes before they are kept, or give some back. Raises OverloadedError; also once the share has ended,
        which stops a thread that goes on unpacking for a download that was given up."""
        with self._lock:
            if self._has_ended:
                raise OverloadedError("The download was given up.")
            self._change(num_bytes)

    def give_back(self) -> None:
        """Give all back, as before another attempt."""
        with self._lock:
            self._change(-self.num_bytes)

    def end(self) -> None:
        """Give all back, for good."""
        with self._lock:
            self._has_ended = True
            self._change(-self.num_bytes)

    def _change(self, num_bytes: int) -> None:
        self._budget.change(num_bytes)
        self.num_bytes += num_bytes
        self._on_change(self.num_bytes)


class DownloadProgress:
    """How much of a download is there; it tells those who wait for it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []
        self.num_bytes = 0

    def update(self, num_bytes: int) -> None:
        """Note how many bytes are there now."""
        with self._lock:
            self.num_bytes = num_bytes
            for listener in self._listeners:
                listener()

    @contextmanager
    def told(self, listener: Callable[[], None]) -> Iterator[None]:
        """Call ``listener`` at once and after every change; never any more when the block has been left."""
        with self._lock:
            self._listeners.append(listener)
            listener()
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(listener)


class RequestBytes:
    """Bytes of one request: of contents that are there, and of downloads that it waits for, as they come.

    The downloads of a request that is past ``limit`` may go on for others. Belongs to one event loop.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_bytes = 0
        self._lock = threading.Lock()
        self._arrivals: list[DownloadProgress] = []

    def add(self, num_bytes: int) -> None:
        """Count a content. Raises MediaTooLargeError past the limit."""
        self.num_bytes += num_bytes
        if self.num_bytes > self.limit:
            raise self._too_large()

    @asynccontextmanager
    async def waiting(self, arrival: DownloadProgress) -> AsyncIterator[None]:
        """Count what comes while the block waits. Raises MediaTooLargeError as soon as that is past the limit."""
        loop = asyncio.get_running_loop()
        is_over = has_left = False

        def look() -> None:  # in whatever thread the bytes come
            nonlocal is_over
            if not is_over and self.num_coming > self.limit:
                is_over = True
                loop.call_soon_threadsafe(ring)

        def ring() -> None:
            if not has_left:
                alarm.reschedule(loop.time())

        with self._lock:
            self._arrivals.append(arrival)
        try:
            async with asyncio.timeout(None) as alarm:
                try:
                    with arrival.told(look):
                        yield
                finally:
                    has_left = True
        except TimeoutError:
            if alarm.expired():
                raise self._too_large() from None
            raise
        finally:
            with self._lock:
                self._arrivals.remove(arrival)

    @property
    def num_coming(self) -> int:
        """Bytes that are there or come now."""
        with self._lock:
            return self.num_bytes + sum(arrival.num_bytes for arrival in set(self._arrivals))

    def _too_large(self) -> MediaTooLargeError:
        return MediaTooLargeError(
            f"The media of the request have more than {self.limit} bytes together, "
            "the limit (--max-request-media-bytes)."
        )
