"""``/v1/messages``: Anthropic's Messages API."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from sensorium.errors import located
from sensorium.server.anthropic.answer import MessagesAnswer
from sensorium.server.anthropic.protocol import CountBody, MessagesBody
from sensorium.server.anthropic.request import messages_prompt
from sensorium.server.context import ModelContext
from sensorium.server.http.body import read_model_body
from sensorium.server.http.disconnect import unless_disconnected
from sensorium.server.http.sse import TypedEventStream
from sensorium.server.openai.answers import check_generation, serving_request
from sensorium.server.openai.sampling import chat_params
from sensorium.server.payload import JsonResponse


def messages_router() -> APIRouter:
    """Return the router of messages."""
    router = APIRouter()

    @router.post("/v1/messages", response_model=None)
    async def create_message(request: Request) -> Response:
        """Answer a conversation in Anthropic's form."""
        _, answer = await read_model_body(
            request, MessagesBody, lambda context, body: _begin(context, request, body)
        )
        headers = answer.request.headers
        if answer.source.chat.stream:
            return TypedEventStream(answer.events(), headers, failed=answer.failed)
        message = await unless_disconnected(request.receive, answer.whole())
        return JsonResponse(message, headers=headers())

    @router.post("/v1/messages/count_tokens", response_model=None)
    async def count_tokens(request: Request) -> Response:
        """Count the tokens of what would be answered, with media placeholders expanded."""
        _, (context, found) = await read_model_body(
            request,
            CountBody,
            lambda context, body: (context, messages_prompt(context, request, body)),
        )
        with context.admission.enter(1), located(rename=found.rename):
            prepared = await unless_disconnected(
                request.receive, context.frontend.input_processor.prepare(found.prompt)
            )
        return JsonResponse({"input_tokens": len(prepared.token_ids)})

    return router


def _begin(context: ModelContext, request: Request, body: MessagesBody) -> MessagesAnswer:
    source = messages_prompt(context, request, body)
    chat, plan = source.chat, source.plan
    with located(rename=source.rename):
        model = check_generation(context, chat)
        defaults = context.frontend.input_processor.default_params
        params = chat_params(chat, defaults, plan.forced)
    serving = serving_request(request, chat, [source.prompt], params, plan.forced, source.rename)
    return MessagesAnswer(context, source, serving, model)
