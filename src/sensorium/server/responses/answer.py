"""The answer to one request of the Responses API: whole, or as a stream of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from sensorium.errors import RequestError
from sensorium.outputs import CompletionOutput, RequestOutput
from sensorium.server.context import ModelContext
from sensorium.server.errors import error_body
from sensorium.server.http.sse import Chunks
from sensorium.server.openai.generation import (
    ServingRequest,
    finished_outputs,
    num_values,
    run_request,
    usage,
)
from sensorium.server.openai.logprobs import chat_logprobs
from sensorium.server.openai.streaming import TextProgress
from sensorium.server.payload import MANY_VALUES
from sensorium.server.responses.items import Item, new_id
from sensorium.server.responses.output import Event, OutputItems
from sensorium.server.responses.protocol import ResponsesBody
from sensorium.server.responses.request import ResponsePrompt
from sensorium.server.responses.store import Given


@dataclass(slots=True)
class ResponseAnswer:
    """One response while it is made. ``given``: its input as it is stored; None: it is not kept."""

    context: ModelContext
    tenant: str
    body: ResponsesBody
    source: ResponsePrompt
    request: ServingRequest
    model: str
    given: Given | None
    id: str = field(default_factory=lambda: new_id("resp"))
    created: int = field(default_factory=lambda: int(time.time()))
    _output: OutputItems = field(default_factory=OutputItems)
    _progress: TextProgress | None = None
    _usage: dict[str, Any] | None = None
    _reason: str | None = None
    _num_events: int = 0

    @property
    def stored(self) -> bool:
        """True when the response is kept for later requests."""
        return self.given is not None

    async def whole(self) -> Item:
        """Return the response when it is complete. Raises RequestError or UnavailableError."""
        [output] = await finished_outputs(self.context, self.request)
        if num_values([output]) < MANY_VALUES:
            list(self._advance(output))
        else:
            await asyncio.to_thread(lambda: list(self._advance(output)))
        return self._final()

    async def events(self) -> Chunks:
        """Yield the events of the stream, those of one update of the engine together.

        The first come with the first token, so that what is wrong with a request is answered with a
        status of its own.
        """
        async with aclosing(run_request(self.context, self.request)) as updates:
            async for _, output in updates:
                first = []
                if self._progress is None:
                    empty = self.response("in_progress", output=[])
                    first = [
                        {"type": "response.created", "response": empty},
                        {"type": "response.in_progress", "response": empty},
                    ]
                yield self._numbered([*first, *self._advance(output)])
        response = self._final()
        yield self._numbered([{"type": f"response.{response['status']}", "response": response}])

    def failed(self, error: BaseException) -> list[Event]:
        """Return the events for an error in the middle of a stream."""
        found = error_body(error)
        told = {name: found[name] for name in ("code", "message", "param")}
        response = self.failure(error)
        return self._numbered(
            [{"type": "error", **told}, {"type": "response.failed", "response": response}]
        )

    def failure(self, error: BaseException) -> Item:
        """Return the response that failed by ``error``, and keep it."""
        if self._output.items:
            list(self._output.finish("incomplete"))
        code = "invalid_prompt" if isinstance(error, RequestError) else "server_error"
        told = {"code": code, "message": error_body(error)["message"]}
        return self.keep(self.response("failed", error=told))

    def keep(self, response: Item) -> Item:
        """Store a response if that is wanted. One that is too large for that says so."""
        if self.given is not None:
            if not self.context.responses.put(self.tenant, response, self.given):
                self.given = None
            response["store"] = self.stored
        return response

    def response(
        self,
        status: str,
        *,
        output: list[Item] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> Item:
        """Return the response object in a state; ``output`` in place of all items so far."""
        body, params = self.body, self.request.params
        reason = {"reason": self._reason} if status == "incomplete" else None
        effort = body.reasoning.effort if body.reasoning is not None else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": bool(body.background),
            "error": error,
            "incomplete_details": reason,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "model": self.model,
            "output": self._output.items if output is None else output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": effort, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": self.stored,
            "temperature": params.temperature,
            "text": {"format": _text_format(body)},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": [_tool(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": body.truncation or "disabled",
            "usage": self._usage,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def _advance(self, output: RequestOutput) -> Iterable[Event]:
        """Yield the events for what is new in the output of the engine."""
        [sample] = output.outputs
        if self._progress is None:
            self._progress = TextProgress(self.source.plan.reader(output.prompt))
        start = self._progress.num_tokens
        deltas = self._progress.deltas(sample)
        yield from self._output.feed(deltas, self._logprobs(sample, start))
        if sample.finished:
            count = self.source.plan.num_reasoning_tokens
            self._usage = response_usage(usage([output], self._modalities, reasoning=count))
            self._reason = "max_output_tokens" if sample.finish_reason == "length" else None
            yield from self._output.finish("incomplete" if self._reason else "completed")

    def _final(self) -> Item:
        return self.keep(self.response("incomplete" if self._reason else "completed"))

    def _logprobs(self, sample: CompletionOutput, start: int) -> list[dict[str, Any]]:
        if sample.logprobs is None:
            return []
        ids, entries = sample.token_ids[start:], sample.logprobs[start:]
        num_top = self.body.top_logprobs or 0
        found = chat_logprobs(self.context.spelling, ids, entries, num_top)
        return list(found["content"])

    def _numbered(self, events: list[Event]) -> list[Event]:
        numbered = [
            {**event, "sequence_number": self._num_events + i} for i, event in enumerate(events)
        ]
        self._num_events += len(events)
        return numbered

    @property
    def _modalities(self) -> tuple[str, ...]:
        return tuple(self.context.frontend.input_processor.modalities)


def response_usage(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the usage of a chat in the form of this API."""
    details = found.get("completion_tokens_details") or {}
    return {
        "input_tokens": found["prompt_tokens"],
        "input_tokens_details": {"cache_write_tokens": 0, **found["prompt_tokens_details"]},
        "output_tokens": found["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": details.get("reasoning_tokens", 0)},
        "total_tokens": found["total_tokens"],
    }


def _text_format(body: ResponsesBody) -> dict[str, Any]:
    form = body.text.format if body.text is not None else None
    if form is None:
        return {"type": "text"}
    return form.model_dump(by_alias=True, exclude_none=True)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool with the members that clients expect."""
    known = {"description": None, "parameters": None, "strict": None}
    return {"type": "function", "name": tool["name"]} | {k: tool.get(k) for k in known}
