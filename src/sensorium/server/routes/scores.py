"""``POST /v1/score`` and ``POST /v1/rerank``: similarities of texts and media by embeddings."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from sensorium.errors import InvalidRequestError, located
from sensorium.params import PoolingParams
from sensorium.server.context import ModelContext, priority_of, request_id_of
from sensorium.server.http.body import read_model_body
from sensorium.server.http.disconnect import unless_disconnected
from sensorium.server.openai.generation import usage_of_prompts
from sensorium.server.openai.pooling import PooledOutput, PoolingRequest, pooled_outputs
from sensorium.server.openai.prompts import chat_prompt, raw_prompts
from sensorium.server.openai.protocol import EmbeddingBody, RerankBody, ScoreBody, ScoringBody
from sensorium.server.payload import JsonResponse, abbreviate

if TYPE_CHECKING:
    from sensorium.engine.prompts.types import Prompt

BodyT = TypeVar("BodyT", bound=ScoringBody)

_CHAT_PLACE = "messages[0].content"
_FIRST_PART = re.compile(r"^\[0\]")
_SIDES = (("text_1", "data_1", "queries"), ("text_2", "data_2", "documents", "items"))


@dataclass(frozen=True, slots=True)
class _Entry:
    """A text, or the parts of a message.

    ``place`` and ``content`` are the places in the body of the entry and of what it holds;
    ``given`` is the entry as the client sent it.
    """

    value: Any
    place: str
    content: str
    given: Any

    @classmethod
    def of(cls, value: object, place: str) -> _Entry:
        """Read an entry. Raises InvalidRequestError with the place."""
        if isinstance(value, str):
            return cls(value, place, place, {"text": value})
        if not isinstance(value, Mapping) or len(value) == 0:
            _bad_entry(value, place)
        known = [key for key in ("content", "text", "image") if value.get(key) is not None]
        if len(known) != 1 or set(value) - {"content", "text", "image", "role", "type"}:
            _bad_entry(value, place)
        [key] = known
        inner = f"{place}.{key}"
        if key == "image":
            parts = [{"type": "image_url", "image_url": value[key]}]
            return cls(parts, place, inner, value)
        if key == "text" and not isinstance(value[key], str):
            _bad_entry(value[key], inner)
        return cls(value[key], place, inner, value)

    def client_place(self, place: str) -> str:
        """Return the client's name of a place in the message that was made of the entry."""
        if not place.startswith(_CHAT_PLACE):
            return place
        if self.place == self.content or self.content.endswith(".image"):
            place = _FIRST_PART.sub("", place.removeprefix(_CHAT_PLACE))
            return self.content + ("" if self.content.endswith(".image") else place)
        return self.content + place.removeprefix(_CHAT_PLACE)


def scores_router() -> APIRouter:
    """Return the router of scores and ranks."""
    router = APIRouter()

    @router.post("/v1/score", response_model=None)
    @router.post("/score", response_model=None)
    async def score(request: Request) -> Response:
        """Return the similarity of one entry with each of others, or of pairs."""
        _, (num_left, pooling) = await read_model_body(
            request, ScoreBody, lambda context, body: _begin_score(context, request, body)
        )
        outputs = await unless_disconnected(request.receive, pooled_outputs(pooling))
        values = similarities(outputs[:num_left], outputs[num_left:])
        data = [{"index": i, "object": "score", "score": v} for i, v in enumerate(values)]
        return JsonResponse(
            {
                "id": f"score-{pooling.request_id}",
                "object": "list",
                "created": int(time.time()),
                "model": pooling.model,
                "data": data,
                "usage": usage_of_prompts(outputs, pooling.modalities),
            }
        )

    @router.post("/v1/rerank", response_model=None)
    @router.post("/v2/rerank", response_model=None)
    @router.post("/rerank", response_model=None)
    async def rerank(request: Request) -> Response:
        """Return documents in the order of their similarity with a query."""
        body, (entries, pooling) = await read_model_body(
            request, RerankBody, lambda context, body: _begin_rerank(context, request, body)
        )
        outputs = await unless_disconnected(request.receive, pooled_outputs(pooling))
        return JsonResponse(
            {
                "id": f"rerank-{pooling.request_id}",
                "model": pooling.model,
                "results": _results(body, entries[1:], similarities(outputs[:1], outputs[1:])),
                "usage": usage_of_prompts(outputs, pooling.modalities),
                "meta": {"api_version": {"version": "2"}},
            }
        )

    return router


def similarities(left: Sequence[PooledOutput], right: Sequence[PooledOutput]) -> list[float]:
    """Return the cosines of embeddings of length 1: of pairs, or of one with each of the others."""
    one, other = (
        np.stack([output.outputs for output in side]).astype(np.float64) for side in (left, right)
    )
    values: list[float] = np.clip((one * other).sum(axis=1), -1.0, 1.0).tolist()
    return values


def _results(
    body: RerankBody, entries: Sequence[_Entry], values: Sequence[float]
) -> list[dict[str, Any]]:
    """Return the best entries of ``results``; of equal ones the earlier comes first."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    results = []
    for index in order[: body.top_n or None]:
        result: dict[str, Any] = {"index": index, "relevance_score": values[index]}
        if body.return_documents is not False:
            result["document"] = entries[index].given
        results.append(result)
    return results


def _begin_score(
    context: ModelContext, request: Request, body: ScoreBody
) -> tuple[int, PoolingRequest]:
    left, right = (_side(body, names) for names in _SIDES)
    if len(left) not in (1, len(right)):
        name = left[0].place.partition("[")[0]
        raise InvalidRequestError(
            f"{name} has {len(left)} entries and {right[0].place.partition('[')[0]} has "
            f"{len(right)}; give one and any number, or as many of both.",
            param=name,
        )
    pooling = _pooling(context, request, body, [*left, *right], right[0].place.partition("[")[0])
    return len(left), pooling


def _begin_rerank(
    context: ModelContext, request: Request, body: RerankBody
) -> tuple[list[_Entry], PoolingRequest]:
    entries = [_query(body.query), *_entries(body.documents, "documents")]
    return entries, _pooling(context, request, body, entries, "documents")


def _query(value: object) -> _Entry:
    found = _entries(value, "query")
    if len(found) != 1:
        raise InvalidRequestError(f"query has {len(found)} entries; give one.", param="query")
    return found[0]


def _side(body: ScoreBody, names: Sequence[str]) -> list[_Entry]:
    """Return the entries of one side. Raises InvalidRequestError unless it is given once."""
    given = [name for name in names if getattr(body, name) is not None]
    if len(given) != 1:
        raise InvalidRequestError(
            f"Give one of {', '.join(names)}; got {', '.join(given) or 'none'}.",
            param=given[1] if given else names[0],
        )
    [name] = given
    value = getattr(body, name)
    return _entries(value, name)


def _entries(value: object, name: str) -> list[_Entry]:
    """Return the entries of a list; of ``{"content": […]}``, as in vLLM, each part is one.

    Anything else is one entry itself. Raises InvalidRequestError with the place.
    """
    if isinstance(value, Mapping) and isinstance(value.get("content"), list) and len(value) == 1:
        places = [f"{name}.content[{i}]" for i in range(len(value["content"]))]
        found = [
            _Entry([part], place, place, part)
            for part, place in zip(value["content"], places, strict=True)
        ]
    elif isinstance(value, list):
        found = [_Entry.of(entry, f"{name}[{i}]") for i, entry in enumerate(value)]
    else:
        found = [_Entry.of(value, name)]
    if not found:
        raise InvalidRequestError(f"{name} is empty; give at least one entry.", param=name)
    return found


def _bad_entry(value: object, place: str) -> NoReturn:
    raise InvalidRequestError(
        f"{place} must be a text, or an object with one of 'text', 'image' (a URL) and 'content' "
        f"(parts of a message), got {abbreviate(value)}.",
        param=place,
    )


def _pooling(
    context: ModelContext, request: Request, body: BodyT, entries: Sequence[_Entry], param: str
) -> PoolingRequest:
    """Return the request for the embeddings of ``entries``, which are compared at length 1."""
    model = context.model_name(body.model)
    params = PoolingParams(dimensions=body.dimensions, normalize=True)
    context.frontend.input_processor.resolve_pooling(params)
    return PoolingRequest(
        context,
        model,
        params,
        [_prompt(context, request, body, entry) for entry in entries],
        request_id_of(request, body.request_id),
        priority_of(request, body.priority),
        param,
        lambda index, place: entries[index].client_place(place),
    )


def _prompt(context: ModelContext, request: Request, body: ScoringBody, entry: _Entry) -> Prompt:
    shared = {name: getattr(body, name) for name in ScoringBody.model_fields}
    if isinstance(body, RerankBody) and body.max_tokens_per_doc is not None:
        shared["truncate_prompt_tokens"] = body.max_tokens_per_doc
    if isinstance(entry.value, str):
        as_embedding = EmbeddingBody.model_construct(**shared, input=entry.value)
        [prompt] = raw_prompts(request, as_embedding)
        return dataclasses.replace(prompt, param=entry.place)
    message = {"role": "user", "content": entry.value}
    as_embedding = EmbeddingBody.model_construct(**shared, messages=[message])
    with located(rename=entry.client_place):
        chat = chat_prompt(context, request, as_embedding)
    return dataclasses.replace(chat, param=entry.place)
