"""A Hugging Face hub on this machine: repositories from folders, downloads in ranges."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0de"


@dataclass
class FakeHub:
    """A server of repositories by name; a context manager.

    ``sizes`` are those that the hub claims for files, by name; ``breaks``: the next downloads of
    weights end after so many bytes each; ``num_shifted``: so many next parts begin elsewhere than
    was asked for; ``held``: files, of which the second half waits for an event.
    """

    repositories: dict[str, Path]
    sizes: dict[str, int] = field(default_factory=dict)
    breaks: list[int] = field(default_factory=list)
    num_shifted: int = 0
    held: dict[str, threading.Event] = field(default_factory=dict)
    ranges: list[str] = field(default_factory=list)
    downloaded: list[str] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing is logged."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        """Answer one request."""
        path = unquote(urlsplit(request.path).path).strip("/")
        for name, folder in self.repositories.items():
            if path.startswith(f"api/models/{name}"):
                rest = path.removeprefix(f"api/models/{name}").strip("/")
                return self._describe(request, name, folder, rest)
            if path.startswith(f"{name}/resolve/"):
                file = path.removeprefix(f"{name}/resolve/").partition("/")[2]
                if (folder / file).is_file():
                    return self._send_file(request, folder / file, file, body=body)
        missing = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        return _send(request, 404, b"{}", missing)

    def _describe(
        self, request: BaseHTTPRequestHandler, name: str, folder: Path, rest: str
    ) -> None:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if rest.startswith("tree/"):
            entries: Any = [self._entry(folder, file) for file in files]
        else:
            siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
            entries = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
            entries |= {"private": False, "disabled": False, "gated": False, "tags": []}
        _send(request, 200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _entry(self, folder: Path, file: Path) -> dict[str, Any]:
        name = str(file.relative_to(folder))
        size = self.sizes.get(name, file.stat().st_size)
        entry = {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(b"").hexdigest()}
        if _is_large(file):
            return {**entry, "lfs": {"oid": _etag(file), "size": size, "pointerSize": 134}}
        return {**entry, "oid": _etag(file)}

    def _send_file(
        self, request: BaseHTTPRequestHandler, file: Path, name: str, *, body: bool
    ) -> None:
        data = file.read_bytes()
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = request.headers.get("Range", "")
        start, status = 0, 200
        if body:
            self.downloaded.append(name)
        if body and asked:
            self.ranges.append(asked)
            start, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
            if self.num_shifted:
                self.num_shifted, start = self.num_shifted - 1, start - 1
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        if not body:
            return _send(request, 200, b"", headers, length=self.sizes.get(name, len(data)))
        if name in self.held:
            _send(request, status, rest[: len(rest) // 2], headers, length=len(rest))
            self.held[name].wait(60)
            with contextlib.suppress(OSError):  # the client may have left
                request.wfile.write(rest[len(rest) // 2 :])
            return None
        if self.breaks and name.endswith(".safetensors"):
            _send(request, status, rest[: self.breaks.pop(0)], headers, length=len(rest))
            request.close_connection = True
            return None
        return _send(request, status, rest, headers)


def _send(
    request: BaseHTTPRequestHandler,
    status: int,
    data: bytes,
    headers: dict[str, str],
    length: int | None = None,
) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(len(data) if length is None else length))
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(data)


def _is_large(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin")


def _etag(file: Path) -> str:
    kind = hashlib.sha256 if _is_large(file) else hashlib.sha1
    return kind(file.read_bytes()).hexdigest()
