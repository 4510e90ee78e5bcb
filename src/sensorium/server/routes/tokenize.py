"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sensorium.engine.prompts.types import RawPrompt
from sensorium.errors import InvalidRequestError
from sensorium.server.context import ModelContext
from sensorium.server.http.body import read_model_body
from sensorium.server.http.disconnect import unless_disconnected
from sensorium.server.openai.prompts import chat_prompt, media_options
from sensorium.server.openai.protocol import DetokenizeBody, TokenizeBody
from sensorium.server.payload import JsonResponse, json_response

if TYPE_CHECKING:
    from sensorium.engine.prompts.types import Prompt


def tokenize_router() -> APIRouter:
    """Return the router of tokenization."""
    router = APIRouter()

    @router.post("/tokenize", response_model=None)
    async def tokenize(request: Request) -> Response:
        """Return the token ids that the engine would get, with media placeholders expanded."""
        body, (context, prompt) = await read_model_body(
            request, TokenizeBody, lambda context, body: (context, _prompt(context, request, body))
        )
        with context.admission.enter(1):
            prepared = await unless_disconnected(
                request.receive, context.frontend.input_processor.prepare(prompt)
            )
        ids = list(prepared.token_ids)
        answer: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": context.frontend.max_model_len,
            "tokens": ids,
            "prompt": prepared.text,
            "token_strs": None,
            "modality_tokens": dict(prepared.num_item_tokens),
        }
        if not body.return_token_strs:
            return JsonResponse(answer)
        text = context.frontend.input_processor.tokenizer.token_text
        return await json_response(
            lambda: {**answer, "token_strs": [text(token_id) for token_id in ids]}, len(ids)
        )

    @router.post("/detokenize", response_model=None)
    async def detokenize(request: Request) -> Response:
        """Return the text of token ids, special tokens included."""
        _, text = await read_model_body(request, DetokenizeBody, _text)
        return JsonResponse({"prompt": text})

    return router


def _text(context: ModelContext, body: DetokenizeBody) -> str:
    tokenizer = context.frontend.input_processor.tokenizer
    tokenizer.check_ids(body.tokens, "tokens")
    return tokenizer.decode(body.tokens)


def _prompt(context: ModelContext, request: Request, body: TokenizeBody) -> Prompt:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError(
            "Give either prompt or messages.", param="prompt" if body.prompt is None else "messages"
        )
    if body.messages is not None:
        return chat_prompt(context, request, body, body.tools)
    adds = True if body.add_special_tokens is None else body.add_special_tokens
    return RawPrompt(text=body.prompt, media=media_options(request, body), add_special_tokens=adds)
