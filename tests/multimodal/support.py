"""A processor, pictures and servers for the tests of media."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from PIL import Image

from sensorium.config import MediaConfig
from sensorium.errors import InvalidEmbeddingsError, InvalidRequestError
from sensorium.multimodal.fetch.budget import RequestBytes
from sensorium.multimodal.fetch.fetcher import Fetcher
from sensorium.multimodal.items import Features, MediaItem, Modality
from sensorium.multimodal.processor import PlacedItem, Replacement
from sensorium.multimodal.workers.threads import ThreadWorkers


class FakeProcessor:
    """Features are the decoded pixels. Token 9 stands for an image, 8 for a video."""

    modalities: tuple[Modality, ...] = ("image",)
    placeholders: Mapping[str, tuple[int, ...]] = {"image": (9,), "video": (8,)}

    def __init__(self) -> None:
        self.num_calls = 0
        self.num_embeds = 4
        self.gate: threading.Event | None = None
        self.error: Exception | None = None
        self._lock = threading.Lock()

    markup = None

    def decoding(self, modality: Modality, options: Mapping[str, Any]) -> Any:
        return None

    def identity(self, modality: Modality, options: Mapping[str, Any], num_items: int = 1) -> bytes:
        return f"fake {sorted(options.items())}".encode()

    def check_options(self, options: Mapping[str, Any]) -> None:
        for name in options:
            if name != "scale":
                raise InvalidRequestError(f"no option {name!r}; there is 'scale'", param=name)

    def process(
        self, modality: Modality, data: np.ndarray, options: Mapping[str, Any], num_items: int = 1
    ) -> Features:
        with self._lock:
            self.num_calls += 1
        if self.gate is not None:
            assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        return Features(modality, {"pixels": data}, num_embeds=self.num_embeds)

    def embeddings(self, modality: Modality, source: Any, param: str) -> list[Features]:
        if isinstance(source, Mapping):
            source = source["image_embeds"]
        members = list(source) if source.ndim == 3 else [source]
        if any(member.shape[-1] != 8 for member in members):
            raise InvalidEmbeddingsError("the hidden size is 8", param=param)
        return [
            Features(modality, {"embeds": m.float().numpy()}, len(m), precomputed=True)
            for m in members
        ]

    def placeholder(self, modality: Modality) -> tuple[int, ...]:
        return self.placeholders[modality]

    def fill(self, modality: Modality) -> int | None:
        return None

    def placeholder_text(self, modality: Modality, number: int = 1) -> str:
        return f"<{modality}>"

    def replacement(self, features: Features, index: int = 0) -> Replacement:
        num = features.num_embeds
        return Replacement(self.placeholders[features.modality] * num, ((0, num),))

    def positions(
        self, token_ids: Sequence[int], items: Sequence[PlacedItem]
    ) -> tuple[np.ndarray, int] | None:
        return None


def item(num_embeds: int, modality: Modality = "image") -> MediaItem:
    """An item of a given length, with nothing in it."""
    return MediaItem(modality, bytes(32), Features(modality, {}, num_embeds))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def picture(width: int = 6, height: int = 4, seed: int = 0) -> Image.Image:
    """An RGB picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data_url(data: bytes, kind: str = "image/png") -> str:
    """The bytes as a base64 data: URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class MediaServer:
    """A real HTTP server on 127.0.0.1; ``paths`` holds the path of each request that came."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}
        self.paths: list[str] = []
        self.port = 0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def serve(self, path: str, body: bytes, **options: Any) -> None:
        """Answer ``path`` with ``body``."""

        async def handler(request: web.Request) -> web.Response:
            return web.Response(body=body, **options)

        self.handlers[path] = handler

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.paths.append(request.path)
        handler = self.handlers.get(request.path)
        return web.Response(status=404) if handler is None else await handler(request)


@asynccontextmanager
async def media_server() -> AsyncIterator[MediaServer]:
    """Run a ``MediaServer``."""
    server = MediaServer()
    app = web.Application()
    app.router.add_get("/{tail:.*}", server._handle)
    runner = web.AppRunner(app, shutdown_timeout=0.0, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.port = runner.addresses[0][1]
    try:
        yield server
    finally:
        await runner.cleanup()


class RawServer:
    """A TCP server that counts connections and writes ``answer`` to each, byte for byte.

    With ``keep_open`` it then never closes a connection by itself. ``gone`` is set when a client
    closes one.
    """

    def __init__(self, answer: bytes, keep_open: bool) -> None:
        self.answer = answer
        self.keep_open = keep_open
        self.num_connections = 0
        self.port = 0
        self.writers: list[asyncio.StreamWriter] = []
        self.gone = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.writers.append(writer)
        if self.answer:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self.answer)
            await writer.drain()
        if not self.keep_open:
            writer.close()
        with contextlib.suppress(ConnectionError):
            while await reader.read(1 << 16):
                pass
        self.gone.set()


@asynccontextmanager
async def raw_server(answer: bytes = b"", *, keep_open: bool = False) -> AsyncIterator[RawServer]:
    """Run a ``RawServer`` on 127.0.0.1."""
    server = RawServer(answer, keep_open)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        for writer in server.writers:
            writer.close()
        listener.close()


class FakeResolver(AbstractResolver):
    """Gives each name its addresses; a list of lists is given out one entry per question."""

    def __init__(self, answers: Mapping[str, list[list[str]]]) -> None:
        self.answers = {name: list(entries) for name, entries in answers.items()}
        self.questions: list[str] = []

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        self.questions.append(host)
        entries = self.answers.get(host)
        if not entries:
            raise OSError(None, "no such host")
        addresses = entries.pop(0) if len(entries) > 1 else entries[0]
        return [
            ResolveResult(hostname=host, host=a, port=port, family=2, proto=0, flags=0)
            for a in addresses
        ]

    async def close(self) -> None:
        return


class BytesFetcher:
    """A fetcher that gives bytes, each time from the host."""

    def __init__(
        self, workers: ThreadWorkers, resolver: FakeResolver | None = None, **config: Any
    ) -> None:
        config.setdefault("allowed_media_domains", ("127.0.0.1",))
        config.setdefault("media_url_reuse_seconds", 0.0)
        self.fetcher = Fetcher(
            MediaConfig(**config), workers, resolver=None if resolver is None else lambda: resolver
        )
        self.budget = self.fetcher.budget
        self.close = self.fetcher.close

    async def fetch(self, url: str, modality: Modality) -> bytes:
        return (await self.fetcher.fetch(url, modality, RequestBytes(1 << 40))).data
