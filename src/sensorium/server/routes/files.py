"""``/v1/files``: uploads that requests and batches name by their id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import BinaryIO
from urllib.parse import quote

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from sensorium.errors import InvalidRequestError
from sensorium.server.context import context_of, tenant_of
from sensorium.server.files.store import PURPOSES, FileStore, NewFile, StoredFile
from sensorium.server.http.multipart import FileSink, Form, read_form
from sensorium.server.http.paging import page_of, paged
from sensorium.server.payload import JsonResponse

SHORTEST_AGE, LONGEST_AGE = 3600, 30 * 86400
"""Seconds that OpenAI's API allows in ``expires_after``."""
MOST_LISTED = 10_000

_CHUNK_BYTES = 256 * 1024
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


def files_router() -> APIRouter:
    """Return the router of files."""
    router = APIRouter()

    @router.post("/v1/files", response_model=None)
    async def create_file(request: Request) -> Response:
        """Store an uploaded file."""
        upload = _Upload(context_of(request).files, tenant_of(request))
        try:
            stored = await upload.finish(await read_form(request, upload.begin))
        finally:
            upload.discard()
        return JsonResponse(stored.to_dict())

    @router.get("/v1/files", response_model=None)
    async def list_files(request: Request) -> Response:
        """List the files of this API key."""
        page = page_of(request, default=MOST_LISTED, most=MOST_LISTED, more=("purpose",))
        files = context_of(request).files.of_tenant(tenant_of(request))
        purpose = page.more.get("purpose")
        wanted = [file for file in files if purpose in (None, file.purpose)]
        return JsonResponse(paged(wanted, page, lambda file: file.id, StoredFile.to_dict))

    @router.get("/v1/files/{file_id}", response_model=None)
    async def get_file(request: Request, file_id: str) -> Response:
        """Return the facts of a file."""
        return JsonResponse(_found(request, file_id).to_dict())

    @router.delete("/v1/files/{file_id}", response_model=None)
    async def delete_file(request: Request, file_id: str) -> Response:
        """Delete a file."""
        await context_of(request).files.delete(file_id, tenant_of(request))
        return JsonResponse({"id": file_id, "object": "file", "deleted": True})

    @router.get("/v1/files/{file_id}/content", response_model=None)
    async def get_content(request: Request, file_id: str) -> Response:
        """Return the content of a file."""
        stored = _found(request, file_id)
        content = await asyncio.to_thread(stored.open)
        return StreamingResponse(
            _chunks(content),
            media_type="application/octet-stream",
            headers={
                "Content-Length": str(stored.num_bytes),
                "Content-Disposition": f"attachment; filename*=UTF-8''{quote(stored.filename)}",
                # What somebody uploaded is never shown as a page of this server.
                "X-Content-Type-Options": "nosniff",
                "Content-Security-Policy": "default-src 'none'; sandbox",
            },
        )

    return router


def _found(request: Request, file_id: str) -> StoredFile:
    return context_of(request).files.get(file_id, tenant_of(request))


async def _chunks(content: BinaryIO) -> AsyncIterator[bytes]:
    try:
        while chunk := await asyncio.to_thread(content.read, _CHUNK_BYTES):
            yield chunk
    finally:
        content.close()


class _Upload:
    """The file of one request, from its first byte to its place in the store."""

    def __init__(self, store: FileStore, tenant: str) -> None:
        self._store = store
        self._tenant = tenant
        self._file: NewFile | None = None

    async def begin(self) -> FileSink:
        """Create the file. Raises OverloadedError when there are too many."""
        self._file = self._store.create(self._tenant)
        return self._file

    async def finish(self, form: Form) -> StoredFile:
        """Check the fields and keep the file. Raises InvalidRequestError, OverloadedError."""
        if self._file is None or form.filename is None:
            raise InvalidRequestError(
                "The form has no file; send it as the field 'file'.", param="file"
            )
        for name in form.fields:
            if name not in _FIELDS:
                raise InvalidRequestError(
                    f"Unknown field {name[:80]!r}; known are file, {', '.join(_FIELDS)}.",
                    param=name[:80],
                )
        purpose = form.fields.get("purpose")
        if purpose not in PURPOSES:
            got = "nothing" if purpose is None else repr(purpose[:80])
            raise InvalidRequestError(
                f"purpose must be one of {', '.join(PURPOSES)}, got {got}.", param="purpose"
            )
        return await self._file.finish(form.filename, purpose, _seconds(form))

    def discard(self) -> None:
        """Remove what was written unless the file was kept."""
        if self._file is not None:
            self._file.discard()


def _seconds(form: Form) -> int | None:
    """Return the seconds of ``expires_after``; None without. Raises InvalidRequestError."""
    anchor = form.fields.get("expires_after[anchor]")
    seconds = form.fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequestError(
            "expires_after[anchor] must be 'created_at'.", param="expires_after[anchor]"
        )
    text = seconds or ""
    is_number = text.isascii() and text.isdigit() and len(text) < 10
    if not is_number or not SHORTEST_AGE <= int(text) <= LONGEST_AGE:
        raise InvalidRequestError(
            f"expires_after[seconds] must be an integer from {SHORTEST_AGE} to {LONGEST_AGE}, got "
            f"{text[:80]!r}.",
            param="expires_after[seconds]",
        )
    return int(text)
