"""Files whose content says what they are: each becomes one media item, or one image per page."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Protocol

from sensorium.config import MediaConfig
from sensorium.errors import (
    InvalidRequestError,
    MediaTooLargeError,
    MediaUndecodableError,
    TooManyItemsError,
    UnsupportedModalityError,
    located,
)
from sensorium.multimodal.cache import digest as digests
from sensorium.multimodal.decode.file_kind import KNOWN, kind_of
from sensorium.multimodal.fetch.budget import RequestBytes
from sensorium.multimodal.fetch.fetcher import Fetcher, is_data_url
from sensorium.multimodal.items import Document, FileRef, MediaRef, Modality, Page
from sensorium.multimodal.workers.threads import Workers

MOST_KNOWN = 1024
"""PDFs whose sizes of pages are remembered."""
_AT_ONCE = 4

Sizes = tuple[tuple[int, int], ...]


class Inspector(Protocol):
    """Reading of the sizes of a PDF's pages, away from the event loop."""

    async def inspect(self, source: bytes) -> list[tuple[int, int]]:
        """Return width and height in pixels of each page. Raises RequestError."""
        ...


class FileOpener:
    """Turns files into references to media items, for one model."""

    def __init__(
        self,
        config: MediaConfig,
        modalities: Sequence[Modality],
        fetcher: Fetcher,
        workers: Workers,
        inspector: Inspector,
    ) -> None:
        self._config = config
        self._offered = tuple(m for m in modalities if config.limit(m) != 0)
        self._fetcher = fetcher
        self._workers = workers
        self._inspector = inspector
        self._known: OrderedDict[bytes, Sizes] = OrderedDict()

    @asynccontextmanager
    async def opened(self, files: Sequence[FileRef]) -> AsyncIterator[list[list[MediaRef]]]:
        """Give the references to the media in each file; their bytes count until the block ends.

        Raises RequestError with the place of the file, OverloadedError and UnavailableError.
        """
        most = self._config.max_items_per_request
        if len(files) > most:
            raise TooManyItemsError(
                f"The request has {len(files)} files; at most {most} media items are allowed "
                "(--max-items-per-request).",
                param=files[most].param or None,
            )
        received = RequestBytes(self._config.max_request_media_bytes)
        slots = asyncio.Semaphore(_AT_ONCE)

        async def one(file: FileRef) -> list[MediaRef]:
            async with slots:
                with located(file.param or None):
                    return await self._open(file, received, held)

        with ExitStack() as held:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(file)) for file in files]
            except* Exception as errors:
                raise _first(errors) from None
            yield [task.result() for task in tasks]

    async def _open(self, file: FileRef, received: RequestBytes, held: ExitStack) -> list[MediaRef]:
        data, digest = await self._content(file, received, held)
        kind = kind_of(data, file.filename)
        if kind is None:
            raise MediaUndecodableError(
                f"{_named(file)} is not {KNOWN} in a format that is known here."
                if data
                else f"{_named(file)} is empty: 0 bytes."
            )
        if kind != "pdf":
            self._check_offered(kind, f"{_named(file)} is {_ARTICLES[kind]}")
            return [MediaRef(kind, "bytes", data, file.uuid, file.param, alone=True)]
        self._check_offered("image", f"{_named(file)} is a PDF, of which each page is an image")
        document = Document(data, digest, await self._sizes(data, digest))
        return [
            MediaRef(
                "image",
                "page",
                Page(document, index),
                None if file.uuid is None else f"{file.uuid}#page={index + 1}",
                file.param,
                alone=True,
            )
            for index in range(len(document.sizes))
        ]

    async def _content(
        self, file: FileRef, received: RequestBytes, held: ExitStack
    ) -> tuple[bytes, bytes]:
        """Return a file's bytes and their digest."""
        if file.file_id is not None and file.read is None:
            raise InvalidRequestError(
                "file_id names a file that was uploaded to a server (POST /v1/files); here give "
                "file_data, or file_url with a URL or a path."
            )
        if file.read is not None:
            self._check_size(file.num_bytes)
            received.add(file.num_bytes)
            self._hold(file.num_bytes, held)
            return await self._workers.run(_read, file.read)
        assert file.source is not None
        fetched = await self._fetcher.fetch(file.source, "document", received)
        self._check_size(len(fetched.data))
        received.add(len(fetched.data))
        if not is_data_url(file.source):
            self._hold(len(fetched.data), held)
        return fetched.data, fetched.digest

    def _hold(self, num_bytes: int, held: ExitStack) -> None:
        """Count bytes against those of all downloads. Raises OverloadedError."""
        self._fetcher.budget.change(num_bytes)
        held.callback(self._fetcher.budget.change, -num_bytes)

    def _check_size(self, num_bytes: int) -> None:
        most = self._config.max_media_bytes
        if num_bytes > most:
            raise MediaTooLargeError(
                f"The file has {num_bytes} bytes; at most {most} are allowed (--max-media-bytes)."
            )

    def _check_offered(self, modality: Modality, what: str) -> None:
        if modality not in self._offered:
            raise UnsupportedModalityError(
                f"{what}, and {modality} is not something this model takes here; it takes: "
                f"{', '.join(self._offered) or 'text only'}."
            )

    async def _sizes(self, data: bytes, digest: bytes) -> Sizes:
        """Return the sizes of a PDF's pages; a PDF that came before is not opened again."""
        known = self._known.get(digest)
        if known is None:
            known = tuple(await self._inspector.inspect(data))
            self._known[digest] = known
            while len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        with contextlib.suppress(KeyError):
            self._known.move_to_end(digest)
        return known


_ARTICLES: dict[Modality, str] = {"image": "an image", "video": "a video", "audio": "audio"}


def _named(file: FileRef) -> str:
    return f"The file {file.filename[:80]!r}" if file.filename else "The file"


def _read(read: Callable[[], bytes]) -> tuple[bytes, bytes]:
    data = read()
    return data, digests.encoded_digest(data)


def _first(errors: BaseExceptionGroup[Exception]) -> Exception:
    """Return the first error within a group."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error
