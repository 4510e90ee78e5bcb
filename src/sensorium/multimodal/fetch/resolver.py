"""Resolution of host names to addresses and sockets that the guard has checked."""

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
"""One result of ``socket.getaddrinfo``: family, type, protocol, canonical name, socket address."""


class ForbiddenAddressError(OSError):
    """A socket was about to be connected to an address that the guard does not allow."""


class SystemResolver(AbstractResolver):
    """Looks names up with the system's resolver, in one thread per possible connection.

    A lookup cannot be cancelled. If the servers of a name never answer, it holds its thread until
    the system's resolver gives up, long after its download was abandoned; in threads shared with
    other work it would delay that work. When all threads are held, a lookup is refused at once.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self.num_held = 0
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="sensorium-names")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return all addresses of a name. Raises OSError if there are none, or OverloadedError."""
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
        """Stop, as ``stop`` does."""
        self.stop()

    def stop(self) -> None:
        """Drop lookups that have not begun; those that have begun end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class GuardedResolver(AbstractResolver):
    """Resolver of the HTTP client, which returns only addresses that have passed the guard."""

    def __init__(self, guard: Guard, resolver: AbstractResolver) -> None:
        self._guard = guard
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Resolve once and check all addresses. Raises MediaRefusedError or OSError."""
        found = await self._resolver.resolve(host, port, family)
        self._guard.check_addresses(host, [entry["host"] for entry in found])
        return found

    async def close(self) -> None:
        """Close the resolver below."""
        await self._resolver.close()


def guarded_socket(guard: Guard) -> Callable[[AddressInfo], socket.socket]:
    """Return the client's factory of sockets, which checks each address again before a connection.

    It raises ForbiddenAddressError for an address that the guard does not allow, and for a name,
    which the client would look up by itself.
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
