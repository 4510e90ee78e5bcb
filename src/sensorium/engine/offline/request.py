"""One request of ``AsyncLLM``: its outputs in the form that the caller asked for."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator

from sensorium.outputs import CompletionOutput, RequestOutput
from sensorium.params import RequestOutputKind, SamplingParams


class AsyncRequest:
    """Outputs of one request, each a copy. All methods are called on the engine's event loop.

    ``updates`` yields one output, updated in place; updates between two calls of ``next`` are
    merged.
    """

    def __init__(
        self,
        request_id: str,
        updates: AsyncGenerator[RequestOutput, None],
        params: SamplingParams,
    ) -> None:
        self._request_id = request_id
        self._updates = updates
        self._kind = params.output_kind
        samples = [CompletionOutput(i, "", []) for i in range(params.n)]
        self._latest = RequestOutput(request_id, None, [], samples, finished=False)
        self._shown = [(0, 0)] * params.n
        """Characters and tokens of each sample that a caller of deltas already has."""
        self._ended: set[int] = set()
        self._is_first = True
        self._waiting: asyncio.Future[RequestOutput] | None = None
        self._is_aborted = False
        self._ending: asyncio.Future[None] | None = None

    async def next(self) -> RequestOutput | None:
        """Return the next output; None after the last one. Raises the error of the request."""
        while not self._latest.finished:
            update = await self._update()
            self._latest = copied(update, self._request_id)
            if self._latest.finished or self._kind != RequestOutputKind.FINAL_ONLY:
                return self._part()
        return None

    def abort(self) -> None:
        """End the work; the next output is the last, with ``finish_reason`` "abort"."""
        self._is_aborted = True
        if self._waiting is not None:
            self._waiting.cancel()
        else:
            self._end()

    async def close(self) -> None:
        """End the work at whatever stage it is."""
        waiting = self._waiting
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait({waiting})
        await self._end()

    def _end(self) -> asyncio.Future[None]:
        """Close the updates, once."""
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._updates.aclose())
        return self._ending

    async def _update(self) -> RequestOutput:
        if not self._is_aborted:
            self._waiting = asyncio.ensure_future(anext(self._updates))
            try:
                return await self._waiting
            except asyncio.CancelledError:
                if not self._is_aborted:
                    raise
            finally:
                self._waiting = None
        await self._end()
        return aborted(self._latest)

    def _part(self) -> RequestOutput:
        """Return the part of the latest output that the caller asked for."""
        if self._kind != RequestOutputKind.DELTA:
            return self._latest
        latest, samples = self._latest, []
        for sample in latest.outputs:
            num_chars, num_tokens = self._shown[sample.index]
            self._shown[sample.index] = (len(sample.text), len(sample.token_ids))
            moved = (num_chars, num_tokens) != self._shown[sample.index]
            if moved or (sample.finished and sample.index not in self._ended):
                samples.append(after(sample, num_chars, num_tokens))
            if sample.finished:
                self._ended.add(sample.index)
        prompt_logprobs = latest.prompt_logprobs if self._is_first else None
        self._is_first = False
        return dataclasses.replace(latest, outputs=samples, prompt_logprobs=prompt_logprobs)


def copied(output: RequestOutput, request_id: str) -> RequestOutput:
    """Copy an output, with another id, so that later updates do not change it."""
    metrics = None if output.metrics is None else dataclasses.replace(output.metrics)
    samples = [after(sample, 0, 0) for sample in output.outputs]
    return dataclasses.replace(output, request_id=request_id, outputs=samples, metrics=metrics)


def after(sample: CompletionOutput, num_chars: int, num_tokens: int) -> CompletionOutput:
    """Copy a sample without its first characters and tokens.

    The cumulative log probability stays that of the whole sample.
    """
    logprobs = sample.logprobs
    return dataclasses.replace(
        sample,
        text=sample.text[num_chars:],
        token_ids=sample.token_ids[num_tokens:],
        logprobs=None if logprobs is None else logprobs[num_tokens:],
    )


def aborted(output: RequestOutput) -> RequestOutput:
    """Copy an output with all incomplete samples marked as aborted."""
    samples = [
        sample if sample.finished else dataclasses.replace(sample, finish_reason="abort")
        for sample in output.outputs
    ]
    return dataclasses.replace(output, outputs=samples, finished=True)
