"""Parts that the routes of chat and of completions share, from a body to an answer or a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from fastapi import Request
from starlette.responses import Response

from sensorium.errors import InvalidRequestError
from sensorium.outputs import RequestOutput
from sensorium.params import SamplingParams
from sensorium.server.context import ModelContext, priority_of, request_id_of
from sensorium.server.errors import CLIENT_NAMES
from sensorium.server.http.body import read_model_body
from sensorium.server.http.disconnect import unless_disconnected
from sensorium.server.http.sse import Chunks, EventStream
from sensorium.server.openai.generation import (
    ServingRequest,
    finished_outputs,
    num_values,
    run_request,
)
from sensorium.server.openai.places import Rename, unchanged
from sensorium.server.openai.protocol import GenerationBody
from sensorium.server.openai.sampling import constraint_param
from sensorium.server.openai.streaming import StreamReport
from sensorium.server.payload import json_response

if TYPE_CHECKING:
    from sensorium.engine.prompts.types import Prompt
    from sensorium.text.tools.forced import ForcedCall

BodyT = TypeVar("BodyT", bound=GenerationBody)


@dataclass(frozen=True, slots=True)
class Answer(ABC, Generic[BodyT]):
    """One request for generated text, and what all parts of its answer have in common."""

    id_prefix: ClassVar[str]
    context: ModelContext
    body: BodyT
    request: ServingRequest
    model: str
    created: int = field(default_factory=lambda: int(time.time()), kw_only=True)

    def head(self, kind: str) -> dict[str, Any]:
        """Return the members that the answer and each of its chunks begin with."""
        return {
            "id": f"{self.id_prefix}-{self.request.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    @property
    def count_reasoning(self) -> Callable[[RequestOutput], int] | None:
        """Return what counts the reasoning tokens of an output; None where there can be none."""
        return None

    @property
    def has_prediction(self) -> bool:
        """True when the request names the answer that it expects."""
        return False

    @abstractmethod
    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Return the answer that is not streamed, of the outputs of all prompts."""

    @abstractmethod
    def stream(self) -> AnswerStream:
        """Return the state of a stream of which nothing has been sent."""


class AnswerStream(ABC):
    """The parts of a streamed answer that have been sent, and the chunks for the others."""

    def __init__(self, answer: Answer[Any], kind: str, *, num_hidden: int = 0) -> None:
        self._kind = kind
        self._base = answer
        self._report = StreamReport(
            answer.body.stream_options,
            answer.context.frontend.input_processor.modalities,
            forced=answer.context.config.enable_force_include_usage,
            num_hidden=num_hidden,
            reasoning=answer.count_reasoning,
            prediction=answer.has_prediction,
        )

    async def events(self) -> Chunks:
        """Yield the chunks of each update of the engine, then the one with the usage."""
        async with aclosing(run_request(self._base.context, self._base.request)) as updates:
            async for index, output in updates:
                self._report.update(index, output)
                yield list(self.chunks(index, output))
        yield self.last_chunks()

    def last_chunks(self) -> list[dict[str, Any]]:
        """Return the chunks without choices that end the stream."""
        return list(self._report.last(self._base.head(self._kind)))

    @abstractmethod
    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """Yield chunks for what is new in the output of the prompt ``index``."""

    def chunk(self, choice: dict[str, Any], *, with_text: bool = True) -> dict[str, Any]:
        """Return a chunk with one choice. ``with_text``: it may tell of generated tokens."""
        chunk = {**self._base.head(self._kind), "choices": [choice]}
        return self._report.mark(chunk, with_text=with_text)


async def respond(
    request: Request,
    model: type[BodyT],
    begin: Callable[[ModelContext, Request, BodyT], Answer[BodyT]],
) -> Response:
    """Answer a request for generated text. ``begin`` checks its body and makes the prompts."""
    body, answer = await read_model_body(
        request, model, lambda context, body: begin(context, request, body)
    )
    if body.stream:
        return EventStream(answer.stream().events(), answer.request.headers)
    work = finished_outputs(answer.context, answer.request)
    outputs = await unless_disconnected(request.receive, work)
    return await json_response(
        lambda: answer.whole(outputs), num_values(outputs), answer.request.headers()
    )


def check_generation(context: ModelContext, body: GenerationBody) -> str:
    """Return the name of the model for the answer.

    Raises InvalidRequestError when the model generates no text or an option of streams is given
    without a stream.
    """
    context.check_generates()
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError(
            "stream_options needs stream=true; leave it out otherwise.", param="stream_options"
        )
    return context.model_name(body.model)


def serving_request(
    request: Request,
    body: GenerationBody,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    forced: ForcedCall | None = None,
    rename: Rename = unchanged,
) -> ServingRequest:
    """Return the request that ``body`` describes.

    ``forced``: a tool call that it demands. ``rename``: as in ``ServingRequest``.
    """
    return ServingRequest(
        prompts=prompts,
        params=params,
        request_id=request_id_of(request, body.request_id),
        priority=priority_of(request, body.priority),
        client_names=request.scope["state"].get(CLIENT_NAMES, {}),
        constraint_param=constraint_param(body, forced),
        rename=rename,
        tool_indices=() if forced is None else forced.indices,
    )
