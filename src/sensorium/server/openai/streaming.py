"""Progress of a stream, and the usage that it reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sensorium.outputs import CompletionOutput, RequestOutput
from sensorium.server.openai.generation import usage
from sensorium.server.openai.protocol import StreamOptions
from sensorium.server.openai.tool_calls import DeltaReader


class TextProgress:
    """The part of one sample that has been sent."""

    def __init__(self, reader: DeltaReader) -> None:
        self._reader = reader
        self._closed = False
        self.num_chars = 0
        self.num_tokens = 0

    @property
    def has_calls(self) -> bool:
        """True when tool calls have been sent."""
        return self._reader.has_calls

    def deltas(self, sample: CompletionOutput) -> list[dict[str, Any]]:
        """Return the deltas for what is new in ``sample``."""
        if self._closed:
            return []
        deltas = self._reader.feed(sample.text[self.num_chars :])
        self.num_chars, self.num_tokens = len(sample.text), len(sample.token_ids)
        if sample.finished:
            deltas += self._reader.flush()
        return deltas

    def close(self) -> bool:
        """Mark the sample as ended; return False when it was before."""
        first = not self._closed
        self._closed = True
        return first


class StreamReport:
    """Usage at the end of a stream and, with ``continuous_usage_stats``, in each chunk.

    ``continuous_usage_stats`` acts beside ``include_usage`` only. ``forced``: the server treats
    every request as if it asked for both. ``num_hidden``: generated tokens of each sample that the
    answer does not show. ``reasoning``, ``prediction``: as in ``usage``. The attribute ``always``:
    each chunk has the usage so far.
    """

    def __init__(
        self,
        options: StreamOptions | None,
        modalities: tuple[str, ...],
        *,
        forced: bool,
        num_hidden: int = 0,
        reasoning: Callable[[RequestOutput], int] | None = None,
        prediction: bool = False,
    ) -> None:
        self._at_end = forced or bool(options and options.include_usage)
        continuous = bool(options and options.continuous_usage_stats)
        self.always = forced or (self._at_end and continuous)
        self._modalities = modalities
        self._outputs: dict[int, RequestOutput] = {}
        self._num_hidden = num_hidden
        self._reasoning = reasoning
        self._prediction = prediction
        self._found: dict[str, Any] | None = None

    def update(self, index: int, output: RequestOutput) -> None:
        """Count the tokens of ``output``, which may grow in place, for the prompt ``index``."""
        self._outputs[index] = output
        self._found = None

    def mark(self, chunk: dict[str, Any], *, with_text: bool = True) -> dict[str, Any]:
        """Add the ``usage`` member that every chunk has when usage is asked for.

        Without ``with_text`` the chunk counts no generated tokens.
        """
        if self.always:
            chunk["usage"] = self._usage() if with_text else self._usage_of_prompts()
        elif self._at_end:
            chunk["usage"] = None
        return chunk

    def last(self, head: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunk without choices that carries the usage, when it was asked for."""
        if self._at_end:
            yield {**head, "choices": [], "usage": self._usage()}

    def _usage_of_prompts(self) -> dict[str, Any]:
        found = self._usage()
        return {**found, "completion_tokens": 0, "total_tokens": found["prompt_tokens"]}

    def _usage(self) -> dict[str, Any]:
        if self._found is None:
            self._found = usage(
                self._outputs.values(),
                self._modalities,
                num_hidden=self._num_hidden,
                reasoning=self._reasoning,
                prediction=self._prediction,
            )
        return self._found
