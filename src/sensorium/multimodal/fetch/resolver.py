"""From names to addresses to sockets, each checked by the guard on the way."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from sensorium.errors import OverloadedError
from sensorium.multimodal.fetch.guard import Guard

AddressInfo = tuple[Any, Any, int, str, tuple[Any, ...]]
"""As ``socket.getaddrinfo`` gives them: family, type, protocol, canonical name, socket address."""


class ForbiddenAddressError(OSError):
    """A socket was about to be connected to an address that the guard does not allow."""


class SystemResolver(AbstractResolver):
    """Asks the system, in threads of its own, one for each connection that may be open.

    A question cannot be taken back, and a name whose servers never answer holds its thread for long after its download
    was given up (as long as the system's resolver tries): with few threads, or with those of everyone else, it would
    hold up other names. When all are held no question waits: it is refused, at once and with a reason.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self.num_held = 0
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="sensorium-names")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """All addresses of a name. Raises OSError when there are none, OverloadedError when no thread is free."""
        with self._lock:
            if self.num_held == self._num_threads:
                raise OverloadedError(
                    "Too many names of hosts wait for an answer; try again later."
                )
            asked = self._pool.submit(_look_up, host, port, family)
            self.num_held += 1
        asked.add_done_callback(self._release)
        found = await asyncio.wrap_future(asked)
        return [_result(host, info) for info in found]

    def _release(self, _: object) -> None:
        with self._lock:
            self.num_held -= 1

    async def close(self) -> None:
        """See ``stop``."""
        self.stop()

    def stop(self) -> None:
        """Drop questions that have not begun; those that have end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class GuardedResolver(AbstractResolver):
    """The resolver of the HTTP client: the addresses that it returns have passed the guard."""

    def __init__(self, guard: Guard, resolver: AbstractResolver) -> None:
        self._guard = guard
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Resolve once and check every address. Raises MediaRefusedError, or OSError when there is no such host."""
        found = await self._resolver.resolve(host, port, family)
        self._guard.check_addresses(host, [entry["host"] for entry in found])
        return found

    async def close(self) -> None:
        """Close the resolver underneath."""
        await self._resolver.close()


def guarded_socket(guard: Guard) -> Callable[[AddressInfo], socket.socket]:
    """Makes the client's sockets, and looks at each address once more, right before it is connected to.

    What it makes raises ForbiddenAddressError for an address that the guard does not allow, and for a name: the client
    would look that up by itself.
    """

    def make(info: AddressInfo) -> socket.socket:
        family, kind, protocol, _, address = info
        if not guard.may_connect(address[0]):
            raise ForbiddenAddressError("address not allowed")
        return socket.socket(family=family, type=kind, proto=protocol)

    return make


def _look_up(host: str, port: int, family: socket.AddressFamily) -> list[AddressInfo]:
    return list(
        socket.getaddrinfo(
            host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
        )
    )


def _result(host: str, info: AddressInfo) -> ResolveResult:
    family, _, protocol, _, address = info
    scope = f"%{address[3]}" if len(address) > 3 and address[3] else ""
    return ResolveResult(
        hostname=host,
        host=address[0].partition("%")[0] + scope,
        port=address[1],
        family=family,
        proto=protocol,
        flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
    )
