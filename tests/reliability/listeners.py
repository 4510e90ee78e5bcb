"""Hosts on this machine: one that must never be connected to, and one that serves media in every
wrong way.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Script = Callable[[socket.socket], None]
"""What the host does with a connection after it has read the request's head."""


class Host:
    """A host on 127.0.0.1 (and on ::1, where there is IPv6) that does to each path what a script
    says.

    ``paths``: of the requests that came, in order. ``num_connections`` counts also those that sent
    nothing.
    """

    def __init__(self) -> None:
        self.scripts: dict[str, Script] = {}
        self.paths: list[str] = []
        self.num_connections = 0
        self.closing = threading.Event()
        self._listeners = [socket.create_server(("127.0.0.1", 0))]
        self.port = int(self._listeners[0].getsockname()[1])
        try:
            self._listeners.append(socket.create_server(("::1", self.port), family=socket.AF_INET6))
        except OSError as error:
            print(f"no listener on ::1, so connections to it would go unseen: {error}")
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def url(self, path: str, host: str = "localhost") -> str:
        return f"http://{host}:{self.port}{path}"

    def serve(self, path: str, body: bytes, *headers: str, status: str = "200 OK") -> str:
        """Answer ``path`` with a body; returns its URL."""
        lines = [
            f"HTTP/1.1 {status}",
            f"Content-Length: {len(body)}",
            *headers,
            "Connection: close",
        ]
        return self.send(path, "\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def redirect(self, path: str, target: str, status: int = 302) -> str:
        """Send who asks for ``path`` to ``target``; returns its URL."""
        return self.serve(path, b"", f"Location: {target}", status=f"{status} Found")

    def send(self, path: str, *pieces: bytes) -> str:
        """Answer ``path`` with these bytes, and close; returns its URL."""

        def script(connection: socket.socket) -> None:
            for piece in pieces:
                connection.sendall(piece)

        return self.act(path, script)

    def act(self, path: str, script: Script) -> str:
        """Do ``script`` for ``path``; returns its URL."""
        self.scripts[path] = script
        return self.url(path)

    def drip(self, path: str, head: bytes, drop: bytes) -> str:
        """Answer ``path`` with a head and then ``drop`` again and again, slowly, until the
        client leaves.
        """

        def script(connection: socket.socket) -> None:
            connection.sendall(head)
            while not self.closing.wait(0.05):
                connection.sendall(drop)

        return self.act(path, script)

    def pour(self, path: str, head: bytes, piece: bytes) -> str:
        """Answer ``path`` with a head and then ``piece`` without end; returns its URL."""

        def script(connection: socket.socket) -> None:
            connection.sendall(head)
            while not self.closing.is_set():
                connection.sendall(piece)

        return self.act(path, script)

    def close(self) -> None:
        self.closing.set()
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self.num_connections += 1
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                piece = connection.recv(4096)
                if not piece:
                    return
                head += piece
            path = head.split(b" ", 2)[1].decode("latin-1")
            self.paths.append(path)
            script = self.scripts.get(path)
            if script is None:
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            else:
                script(connection)
            connection.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def host() -> Iterator[Host]:
    """Run a ``Host``."""
    running = Host()
    try:
        yield running
    finally:
        running.close()


class Internet:
    """Names and connections of this process, as a test wants them.

    ``names``: addresses that each name resolves to, one entry for each question, the last one for
    all that follow. ``moved``: public addresses to the ports on 127.0.0.1 that stand for them.
    ``connected``: what was connected to.
    """

    def __init__(self) -> None:
        self.names: dict[str, list[list[str]]] = {}
        self.moved: dict[str, int] = {}
        self.questions: list[str] = []
        self.connected: list[str] = []

    def install(self, monkeypatch: Any) -> None:
        """Take the place of the system's resolver and of ``connect``."""
        connect, resolve = socket.socket.connect, socket.getaddrinfo

        def connecting(own: socket.socket, address: Any) -> None:
            if not isinstance(address, tuple):
                return connect(own, address)
            self.connected.append(address[0])
            port = self.moved.get(address[0])
            return connect(own, address if port is None else ("127.0.0.1", port))

        def resolving(name: Any, port: Any, *rest: Any, **named: Any) -> Sequence[Any]:
            self.questions.append(name)
            entries = self.names.get(name)
            if entries is None:
                if name in ("localhost", "127.0.0.1", "::1"):
                    return list(resolve(name, port, *rest, **named))
                raise socket.gaierror(socket.EAI_NONAME, "unknown")
            addresses = entries.pop(0) if len(entries) > 1 else entries[0]
            return [_entry(address, port) for address in addresses]

        monkeypatch.setattr(socket.socket, "connect", connecting)
        monkeypatch.setattr(socket, "getaddrinfo", resolving)


def _entry(address: str, port: int) -> tuple[Any, ...]:
    if ":" in address:
        return (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
    return (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
