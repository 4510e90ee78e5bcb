"""``POST /v1/embeddings``."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from sensorium.errors import InvalidRequestError
from sensorium.params import PoolingParams
from sensorium.server.context import ModelContext, priority_of, request_id_of
from sensorium.server.http.body import read_model_body
from sensorium.server.http.disconnect import unless_disconnected
from sensorium.server.openai.generation import usage_of_prompts
from sensorium.server.openai.pooling import (
    BATCH_SIZE,
    PooledOutput,
    PoolingRequest,
    pooled_outputs,
)
from sensorium.server.openai.prompts import chat_prompt, raw_prompts
from sensorium.server.openai.protocol import EmbeddingBody
from sensorium.server.payload import JsonResponse, encode

if TYPE_CHECKING:
    from sensorium.engine.prompts.types import Prompt


def embeddings_router() -> APIRouter:
    """Return the router of embeddings."""
    router = APIRouter()

    @router.post("/v1/embeddings", response_model=None)
    async def embeddings(request: Request) -> Response:
        """Return the embedding of each input, or of a conversation."""
        body, pooling = await read_model_body(
            request, EmbeddingBody, lambda context, body: _begin(context, request, body)
        )
        outputs = await unless_disconnected(request.receive, pooled_outputs(pooling))
        return JsonResponse(
            {
                "id": f"embd-{pooling.request_id}",
                "object": "list",
                "created": int(time.time()),
                "data": await _entries(outputs, body.encoding_format == "base64"),
                "model": pooling.model,
                "usage": usage_of_prompts(outputs, pooling.modalities),
            }
        )

    return router


def _begin(context: ModelContext, request: Request, body: EmbeddingBody) -> PoolingRequest:
    model = context.model_name(body.model)
    params = PoolingParams(dimensions=body.dimensions, normalize=body.normalize)
    context.frontend.input_processor.resolve_pooling(params)
    prompts = _prompts(context, request, body)
    request_id = request_id_of(request, body.request_id)
    priority = priority_of(request, body.priority)
    return PoolingRequest(context, model, params, prompts, request_id, priority)


def _prompts(context: ModelContext, request: Request, body: EmbeddingBody) -> Sequence[Prompt]:
    if (body.input is None) == (body.messages is None):
        raise InvalidRequestError(
            "Give either input or messages.", param="input" if body.input is None else "messages"
        )
    if body.messages is None:
        return raw_prompts(request, body)
    if body.truncate_prompt_tokens is not None:
        raise InvalidRequestError(
            "truncate_prompt_tokens works with input only: truncation could cut through the chat "
            "template or the media of a conversation. Shorten the messages instead.",
            param="truncate_prompt_tokens",
        )
    return [chat_prompt(context, request, body)]


async def _entries(outputs: Sequence[PooledOutput], as_base64: bool) -> list[msgspec.Raw]:
    """Return the entries of ``data``, each as JSON.

    Many long embeddings are written in batches, since writing them at once would hold the loop.
    """
    entries = []
    for index, output in enumerate(outputs):
        entry = {"object": "embedding", "index": index, "embedding": _values(output, as_base64)}
        entries.append(msgspec.Raw(encode(entry)))
        if len(entries) % BATCH_SIZE == 0:
            await asyncio.sleep(0)
    return entries


def _values(output: PooledOutput, as_base64: bool) -> str | list[float]:
    """Return numbers, or base64 of little-endian float32."""
    if as_base64:
        return base64.b64encode(output.outputs.astype("<f4", copy=False).tobytes()).decode()
    numbers: list[float] = output.outputs.tolist()
    return numbers
