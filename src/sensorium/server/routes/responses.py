"""``/v1/responses``: OpenAI's Responses API."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from sensorium.errors import InvalidRequestError, located
from sensorium.server.context import ModelContext, context_of, tenant_of
from sensorium.server.http.body import LARGE_BODY, read_model_body
from sensorium.server.http.disconnect import unless_disconnected
from sensorium.server.http.sse import TypedEventStream
from sensorium.server.openai.answers import check_generation, serving_request
from sensorium.server.openai.sampling import chat_params
from sensorium.server.payload import JsonResponse
from sensorium.server.responses import background
from sensorium.server.responses.answer import ResponseAnswer
from sensorium.server.responses.items import is_reference
from sensorium.server.responses.listing import Page
from sensorium.server.responses.protocol import InputBody, InputTokensBody, ResponsesBody
from sensorium.server.responses.request import (
    ResponsePrompt,
    response_prompt,
    sampling_fields,
)
from sensorium.server.responses.store import Given

_STREAMED = ("1", "true", "True")
_LARGE_INPUT = 256 * 1024
"""Bytes of a body from which on its input is not encoded in the event loop."""


def responses_router() -> APIRouter:
    """Return the router of responses."""
    router = APIRouter()
    _add_creation(router)
    _add_stored(router)
    return router


def _add_creation(router: APIRouter) -> None:
    """Add the routes that take a body."""

    @router.post("/v1/responses", response_model=None)
    async def create_response(request: Request) -> Response:
        """Answer a text or a list of items."""
        body, answer = await read_model_body(
            request,
            ResponsesBody,
            lambda context, body: _begin(context, request, body),
            is_large=lambda body, num_bytes: _is_large(request, body, num_bytes),
        )
        if body.background:
            return JsonResponse(background.start(answer))
        headers = answer.request.headers
        if body.stream:
            return TypedEventStream(answer.events(), headers, failed=answer.failed)
        response = await unless_disconnected(request.receive, answer.whole())
        return JsonResponse(response, headers=headers())

    @router.post("/v1/responses/input_tokens", response_model=None)
    async def count_input_tokens(request: Request) -> Response:
        """Count the tokens of what would be answered, with media placeholders expanded."""
        _, (context, found) = await read_model_body(
            request,
            InputTokensBody,
            lambda context, body: (context, _prompt(context, request, body)),
            is_large=lambda body, num_bytes: _is_large(request, body, num_bytes),
        )
        work = _num_tokens(context, found)
        number = await unless_disconnected(request.receive, work)
        return JsonResponse({"object": "response.input_tokens", "input_tokens": number})


def _add_stored(router: APIRouter) -> None:
    """Add the routes of stored responses."""

    @router.get("/v1/responses/{response_id}", response_model=None)
    async def get_response(request: Request, response_id: str) -> Response:
        """Return a stored response."""
        context = context_of(request)
        if request.query_params.get("stream", "") in _STREAMED:
            raise InvalidRequestError(
                "A stored response cannot be streamed; leave stream out.", param="stream"
            )
        return JsonResponse(context.responses.get(tenant_of(request), response_id))

    @router.delete("/v1/responses/{response_id}", response_model=None)
    async def delete_response(request: Request, response_id: str) -> Response:
        """Delete a stored response; one that is being made in the background is cancelled."""
        context, tenant = context_of(request), tenant_of(request)
        await background.cancel(context, tenant, response_id)
        context.responses.delete(tenant, response_id)
        return JsonResponse({"id": response_id, "object": "response", "deleted": True})

    @router.post("/v1/responses/{response_id}/cancel", response_model=None)
    async def cancel_response(request: Request, response_id: str) -> Response:
        """Cancel a response that is being made in the background."""
        context, tenant = context_of(request), tenant_of(request)
        if not context.responses.get(tenant, response_id)["background"]:
            raise InvalidRequestError(
                "Only responses with background=true can be cancelled; close the connection of "
                "others.",
                param="response_id",
            )
        await background.cancel(context, tenant, response_id)
        return JsonResponse(context.responses.get(tenant, response_id))

    @router.get("/v1/responses/{response_id}/input_items", response_model=None)
    async def list_input_items(request: Request, response_id: str) -> Response:
        """List the items that a stored response is an answer to."""
        store, tenant = context_of(request).responses, tenant_of(request)
        page = Page.of(request.query_params)

        def listed() -> Response:
            return JsonResponse(page.cut(store.input_items(tenant, response_id)))

        if store.history_bytes(tenant, response_id) < LARGE_BODY:
            return listed()
        return await asyncio.to_thread(listed)


def _begin(context: ModelContext, request: Request, body: ResponsesBody) -> ResponseAnswer:
    stored = _is_stored(context, body)
    if body.background and body.stream:
        raise InvalidRequestError(
            "A response in the background cannot be streamed; leave stream or background out.",
            param="stream",
        )
    made = _prompt(context, request, body)
    with located(rename=made.rename):
        model = check_generation(context, made.chat)
        defaults = context.frontend.input_processor.default_params
        params = chat_params(made.chat, defaults, made.plan.forced)
    serving = serving_request(
        request, made.chat, [made.prompt], params, made.plan.forced, made.rename
    )
    given = Given.of(made.items, made.last) if stored else None
    return ResponseAnswer(context, tenant_of(request), body, made, serving, model, given)


def _is_stored(context: ModelContext, body: ResponsesBody) -> bool:
    """Return true when the response is to be stored. Raises InvalidRequestError when it cannot."""
    wanted = body.store is not False
    if body.background and not wanted:
        raise InvalidRequestError(
            "background needs store: the response could not be fetched otherwise.",
            param="background",
        )
    if wanted and not context.responses.enabled:
        if body.store or body.background:
            raise InvalidRequestError(
                "This server stores no responses (--response-store-entries 0); set store to false.",
                param="store",
            )
        return False
    return wanted


def _prompt(context: ModelContext, request: Request, body: InputBody) -> ResponsePrompt:
    context.check_generates()
    fields = sampling_fields(body) if isinstance(body, ResponsesBody) else {}
    return response_prompt(context, request, body, **fields)


def _is_large(request: Request, body: InputBody, num_bytes: int) -> bool:
    """Return true when a body, or what is stored of its conversation, takes a while to handle."""
    if num_bytes >= _LARGE_INPUT:
        return True
    if isinstance(body.input, list) and any(map(is_reference, body.input)):
        return True
    store = context_of(request).responses
    return store.history_bytes(tenant_of(request), body.previous_response_id) >= LARGE_BODY


async def _num_tokens(context: ModelContext, found: ResponsePrompt) -> int:
    with located(rename=found.rename), context.admission.enter(1):
        prepared = await context.frontend.input_processor.prepare(found.prompt)
    return len(prepared.token_ids)
