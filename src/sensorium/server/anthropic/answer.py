"""The answer to one request of the Messages API: whole, or as a stream of events."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from sensorium.outputs import CompletionOutput, RequestOutput
from sensorium.server.anthropic.output import ContentBlocks, Event
from sensorium.server.anthropic.request import MessagesPrompt
from sensorium.server.context import ModelContext
from sensorium.server.errors import anthropic_error
from sensorium.server.http.sse import Chunks
from sensorium.server.openai.generation import (
    ServingRequest,
    finished_outputs,
    run_request,
    usage,
)
from sensorium.server.openai.streaming import TextProgress

_PING = {"type": "ping"}


@dataclass(slots=True)
class MessagesAnswer:
    """One answer while it is made."""

    context: ModelContext
    source: MessagesPrompt
    request: ServingRequest
    model: str
    id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    _blocks: ContentBlocks = field(default_factory=ContentBlocks)
    _progress: TextProgress | None = None

    async def whole(self) -> dict[str, Any]:
        """Return the message when it is complete. Raises RequestError or UnavailableError."""
        [output] = await finished_outputs(self.context, self.request)
        list(self._advance(output))
        [sample] = output.outputs
        return {
            **self._head(self._usage(output)),
            "content": self._blocks.whole(),
            **self._end(sample),
        }

    async def events(self) -> Chunks:
        """Yield the events of the stream, those of one update of the engine together.

        The first come with the first token, so that what is wrong with a request is answered with a
        status of its own.
        """
        async with aclosing(run_request(self.context, self.request)) as updates:
            async for _, output in updates:
                events: list[Event] = []
                if self._progress is None:
                    head = self._head({**self._usage(output), "output_tokens": 0})
                    events = [{"type": "message_start", "message": head}, _PING]
                events += self._advance(output)
                yield events
        [sample] = output.outputs
        end = {"type": "message_delta", "delta": self._end(sample), "usage": self._usage(output)}
        yield [end, {"type": "message_stop"}]

    def failed(self, error: BaseException) -> list[Event]:
        """Return the event for an error in the middle of a stream."""
        return [anthropic_error(error, self.request.request_id)]

    def _advance(self, output: RequestOutput) -> Iterator[Event]:
        """Yield the events for what is new in the output of the engine."""
        [sample] = output.outputs
        if self._progress is None:
            self._progress = TextProgress(self.source.plan.reader(output.prompt))
        yield from self._blocks.feed(self._progress.deltas(sample))
        if sample.finished:
            yield from self._blocks.finish()

    def _head(self, used: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": used,
        }

    def _end(self, sample: CompletionOutput) -> dict[str, Any]:
        """Return why the answer ended."""
        found = sample.stop_reason if isinstance(sample.stop_reason, str) else None
        reason = "end_turn"
        if sample.finish_reason == "length":
            reason = "max_tokens"
        elif self._blocks.has_calls:
            reason = "tool_use"
        elif found is not None:
            reason = "stop_sequence"
        return {
            "stop_reason": reason,
            "stop_sequence": found if reason == "stop_sequence" else None,
        }

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        """Return the usage, in which cached tokens are not among ``input_tokens``."""
        found = usage([output], self.context.frontend.input_processor.modalities)
        cached = found["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": found["prompt_tokens"] - cached,
            "output_tokens": found["completion_tokens"],
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
        }
