"""``/v1/batches``: files of requests that run below the others."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from sensorium.errors import InvalidRequestError
from sensorium.server.batches.lines import URLS
from sensorium.server.batches.store import Batch, BatchStore
from sensorium.server.context import context_of, tenant_of
from sensorium.server.http.body import read_body
from sensorium.server.http.paging import page_of, paged
from sensorium.server.openai.protocol import BatchBody
from sensorium.server.payload import JsonResponse

MOST_LISTED, USUALLY_LISTED = 100, 20
LONGEST_WINDOW = 30 * 86400
"""Seconds."""
MOST_METADATA, MOST_KEY_CHARS, MOST_VALUE_CHARS = 16, 64, 512

_UNITS = {"m": 60, "h": 3600, "d": 86400}


def batches_router() -> APIRouter:
    """Return the router of batches."""
    router = APIRouter()

    @router.post("/v1/batches", response_model=None)
    async def create_batch(request: Request) -> Response:
        """Begin a batch over an uploaded file."""
        body, seconds = await read_body(request, BatchBody, _checked)
        expires = body.output_expires_after
        batch = _store(request).create(
            tenant_of(request),
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            seconds=seconds,
            metadata=body.metadata,
            output_seconds=None if expires is None else expires.seconds,
        )
        return JsonResponse(batch.to_dict())

    @router.get("/v1/batches", response_model=None)
    async def list_batches(request: Request) -> Response:
        """List the batches of this API key."""
        page = page_of(request, default=USUALLY_LISTED, most=MOST_LISTED)
        batches = _store(request).of_tenant(tenant_of(request))
        return JsonResponse(paged(batches, page, lambda batch: batch.id, Batch.to_dict))

    @router.get("/v1/batches/{batch_id}", response_model=None)
    async def get_batch(request: Request, batch_id: str) -> Response:
        """Return the state of a batch."""
        return JsonResponse(_store(request).get(batch_id, tenant_of(request)).to_dict())

    @router.post("/v1/batches/{batch_id}/cancel", response_model=None)
    async def cancel_batch(request: Request, batch_id: str) -> Response:
        """Begin no more lines of a batch."""
        return JsonResponse(_store(request).cancel(batch_id, tenant_of(request)).to_dict())

    return router


def _store(request: Request) -> BatchStore:
    return context_of(request).batches


def _checked(body: BatchBody) -> int:
    """Check a body; return the seconds of its window. Raises InvalidRequestError."""
    if body.endpoint not in URLS:
        raise InvalidRequestError(
            f"endpoint must be one of {', '.join(URLS)}, got {body.endpoint[:80]!r}.",
            param="endpoint",
        )
    seconds = int(body.completion_window[:-1]) * _UNITS[body.completion_window[-1]]
    if not 1 <= seconds <= LONGEST_WINDOW:
        raise InvalidRequestError(
            f"completion_window must be from 1m to 30d, got {body.completion_window!r}.",
            param="completion_window",
        )
    for key, value in (body.metadata or {}).items():
        if len(key) > MOST_KEY_CHARS or len(value) > MOST_VALUE_CHARS:
            raise InvalidRequestError(
                f"Keys of metadata have at most {MOST_KEY_CHARS} characters, values "
                f"{MOST_VALUE_CHARS}.",
                param="metadata",
            )
    if len(body.metadata or {}) > MOST_METADATA:
        raise InvalidRequestError(
            f"metadata has {len(body.metadata or {})} entries; at most {MOST_METADATA} may be.",
            param="metadata",
        )
    return seconds
