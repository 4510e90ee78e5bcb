"""Files whose content says what they are: a media item each, or images and texts of pages."""

from __future__ import annotations

import asyncio
import contextlib
import re
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
from sensorium.multimodal.items import (
    Document,
    FileRef,
    MediaRef,
    Modality,
    Page,
    PageFacts,
)
from sensorium.multimodal.workers.threads import Workers

MOST_KNOWN = 1024
"""PDFs whose pages are remembered."""
MOST_KNOWN_CHARS = 1 << 22
"""Characters of text of all PDFs that are remembered."""
MOST_NAME_CHARS = 100
"""Characters of a file's name that stand before its text in a prompt."""
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_AT_ONCE = 4

Pages = tuple[PageFacts, ...]


class Inspector(Protocol):
    """Reading of the facts of a PDF's pages, away from the event loop."""

    async def inspect(self, source: bytes) -> list[PageFacts]:
        """Return the facts of each page. Raises RequestError."""
        ...


class FileOpener:
    """Turns files into references to media items and texts, for one model."""

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
        self._known: OrderedDict[bytes, Pages] = OrderedDict()
        self._num_known_chars = 0

    @asynccontextmanager
    async def opened(self, files: Sequence[FileRef]) -> AsyncIterator[list[list[MediaRef | str]]]:
        """Give the media and texts in each file; their bytes count until the block ends.

        Raises RequestError with the place of the file, OverloadedError and UnavailableError.
        """
        most = self._config.max_items_per_request
        if len(files) > most:
            raise TooManyItemsError(
                f"The request has {len(files)} files; at most {most} media items are allowed "
                "(--max-items-per-request).",
                param=files[most].param or None,
            )
        received = RequestBytes(
            self._config.max_request_media_bytes, self._config.max_media_bytes_in_flight
        )
        slots = asyncio.Semaphore(_AT_ONCE)

        async def one(file: FileRef) -> list[MediaRef | str]:
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

    async def _open(
        self, file: FileRef, received: RequestBytes, held: ExitStack
    ) -> list[MediaRef | str]:
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
        pages = await self._pages(data, digest)
        return _parts(file, Document(data, digest, tuple(page[:2] for page in pages)), pages)

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
            self._hold(file.num_bytes, received, held)
            return await self._workers.run(_read, file.read)
        assert file.source is not None
        fetched = await self._fetcher.fetch(file.source, "document", received)
        self._check_size(len(fetched.data))
        received.add(len(fetched.data))
        if not is_data_url(file.source):
            self._hold(len(fetched.data), received, held)
        return fetched.data, fetched.digest

    def _hold(self, num_bytes: int, received: RequestBytes, held: ExitStack) -> None:
        """Count bytes against those of all downloads.

        Raises OverloadedError, and MediaTooLargeError where waiting would not help.
        """
        received.add_in_flight(num_bytes)
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

    async def _pages(self, data: bytes, digest: bytes) -> Pages:
        """Return the facts of a PDF's pages; a PDF that came before is not opened again."""
        known = self._known.get(digest)
        if known is None:
            known = tuple(await self._inspector.inspect(data))
            self._remember(digest, known)
        with contextlib.suppress(KeyError):
            self._known.move_to_end(digest)
        return known

    def _remember(self, digest: bytes, pages: Pages) -> None:
        if digest in self._known:  # of another request meanwhile
            return
        self._known[digest] = pages
        self._num_known_chars += _num_chars(pages)
        while len(self._known) > MOST_KNOWN or self._num_known_chars > MOST_KNOWN_CHARS:
            self._num_known_chars -= _num_chars(self._known.popitem(last=False)[1])


_ARTICLES: dict[Modality, str] = {"image": "an image", "video": "a video", "audio": "audio"}


def _num_chars(pages: Pages) -> int:
    return sum(len(page.text) for page in pages)


def _parts(file: FileRef, document: Document, pages: Pages) -> list[MediaRef | str]:
    """Return the image of each page, and after it the text of those that have one."""
    name = _UNPRINTABLE.sub(" ", file.filename).strip()[:MOST_NAME_CHARS]
    parts: list[MediaRef | str] = []
    for index, page in enumerate(pages):
        uuid = None if file.uuid is None else f"{file.uuid}#page={index + 1}"
        source = Page(document, index)
        parts.append(MediaRef("image", "page", source, uuid, file.param, alone=True))
        if page.text:
            of_file = f" of {name}" if name else ""
            parts.append(f"Text of page {index + 1}{of_file}:\n{page.text}")
    return parts


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
