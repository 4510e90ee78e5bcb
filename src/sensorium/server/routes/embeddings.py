"""``POST /v1/embeddings``."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from sensorium.errors import InvalidRequestError
from sensorium.outputs import PoolingRequestOutput
from sensorium.params import PoolingParams
from sensorium.server.admission import Place
from sensorium.server.context import ServingContext, context_of, request_id_of
from sensorium.server.http.body import read_body
from sensorium.server.http.disconnect import unless_disconnected
from sensorium.server.openai.prompts import chat_prompt, raw_prompts
from sensorium.server.openai.protocol import EmbeddingBody
from sensorium.server.payload import JsonResponse, encode

if TYPE_CHECKING:
    from sensorium.engine.prompts.types import Prompt

Vector = PoolingRequestOutput[np.ndarray]

AT_ONCE = 16
"""Inputs that are tokenized and sent, or vectors that are written, before other tasks of the event loop get their
turn."""


def embeddings_router() -> APIRouter:
    """The route of vectors."""
    router = APIRouter()

    @router.post("/v1/embeddings", response_model=None)
    async def embeddings(request: Request) -> Response:
        """The vector of each input, or of a conversation."""
        context = context_of(request)
        body, begun = await read_body(
            request, EmbeddingBody, lambda body: _begin(context, request, body)
        )
        model, params, prompts = begun
        request_id = request_id_of(request, body.request_id)
        work = _vectors(context, prompts, params, request_id, body.priority or 0)
        outputs = await unless_disconnected(request.receive, work)
        data = await _written(outputs, body.encoding_format == "base64")
        return JsonResponse(
            {
                "id": f"embd-{request_id}",
                "object": "list",
                "created": int(time.time()),
                "data": data,
                "model": model,
                "usage": _usage(outputs, context.frontend.modalities),
            }
        )

    return router


class _Begun(NamedTuple):
    """A request as far as it goes without the engine."""

    model: str
    params: PoolingParams
    prompts: Sequence[Prompt]


def _begin(context: ServingContext, request: Request, body: EmbeddingBody) -> _Begun:
    model = context.check_model(body.model)
    params = PoolingParams(dimensions=body.dimensions, normalize=body.normalize)
    context.frontend.check_pooling(params)
    return _Begun(model, params, _prompts(context, request, body))


def _prompts(context: ServingContext, request: Request, body: EmbeddingBody) -> Sequence[Prompt]:
    if (body.input is None) == (body.messages is None):
        raise InvalidRequestError(
            "Give either input or messages.", param="input" if body.input is None else "messages"
        )
    if body.messages is None:
        return raw_prompts(request, body)
    if body.truncate_prompt_tokens is not None:
        raise InvalidRequestError(
            "truncate_prompt_tokens works with input; a conversation is not cut, which could tear its template or its "
            "media apart. Shorten its messages.",
            param="truncate_prompt_tokens",
        )
    return [chat_prompt(context, request, body)]


async def _vectors(
    context: ServingContext,
    prompts: Sequence[Prompt],
    params: PoolingParams,
    request_id: str,
    priority: int,
) -> list[Vector]:
    """The vectors of all prompts, in order. The first error of any of them ends all."""

    async def one(prompt: Prompt, place: Place) -> Vector:
        output = await context.frontend.embed(
            prompt, params, request_id=context.engine_id(request_id), priority=priority
        )
        place.leave()
        return output

    with context.admission.enter(len(prompts), "input") as places:
        tasks: list[asyncio.Task[Vector]] = []
        try:
            for prompt, place in zip(prompts, places, strict=True):
                tasks.append(asyncio.create_task(one(prompt, place)))
                if len(tasks) % AT_ONCE == 0:
                    await asyncio.sleep(0)
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _written(outputs: Sequence[Vector], as_base64: bool) -> list[msgspec.Raw]:
    """The entries of an answer, each as JSON: many long vectors are not written at one go."""
    entries = []
    for index, output in enumerate(outputs):
        entry = {"object": "embedding", "index": index, "embedding": _values(output, as_base64)}
        entries.append(msgspec.Raw(encode(entry)))
        if len(entries) % AT_ONCE == 0:
            await asyncio.sleep(0)
    return entries


def _values(output: Vector, as_base64: bool) -> str | list[float]:
    """Numbers, or base64 of little-endian float32."""
    if as_base64:
        return base64.b64encode(output.outputs.astype("<f4", copy=False).tobytes()).decode()
    numbers: list[float] = output.outputs.tolist()
    return numbers


def _usage(outputs: Sequence[Vector], modalities: Sequence[str]) -> dict[str, Any]:
    num_tokens = sum(output.usage.prompt_tokens for output in outputs)
    details = {"cached_tokens": sum(output.num_cached_tokens for output in outputs)}
    for modality in modalities:
        details[f"{modality}_tokens"] = sum(
            output.num_item_tokens.get(modality, 0) for output in outputs
        )
    return {
        "prompt_tokens": num_tokens,
        "total_tokens": num_tokens,
        "prompt_tokens_details": details,
    }
