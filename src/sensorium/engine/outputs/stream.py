"""Collection of the engine's updates into a ``RequestOutput``.

Detokenizing, stop strings, log probabilities, times.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sensorium.core.plan import NO_TOKEN_LEFT, TOO_COMPLEX, UNUSABLE
from sensorium.core.request import EngineRequest, SequenceUpdate, TokenSample
from sensorium.engine.grammar.matchers import NO_VOCABULARY
from sensorium.engine.outputs.item_metrics import item_metrics
from sensorium.engine.prompts.types import PreparedPrompt
from sensorium.errors import (
    InvalidRequestError,
    ModelOutputNotFiniteError,
    SensoriumError,
    UnavailableError,
)
from sensorium.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from sensorium.params import SamplingParams
from sensorium.text.detokenizer import Detokenizer
from sensorium.text.stops import StopChecker
from sensorium.text.tokenizer import Tokenizer
from sensorium.tracing import RequestTrace


def failure(message: str) -> SensoriumError:
    """Return the exception for a sequence that the engine could not finish."""
    if message in (TOO_COMPLEX, NO_VOCABULARY):
        return InvalidRequestError(message, param="structured_outputs")
    if message.startswith(UNUSABLE):
        return ModelOutputNotFiniteError(message)
    return InvalidRequestError(message) if message == NO_TOKEN_LEFT else UnavailableError(message)


@dataclass(slots=True)
class _Sample:
    """One sample in the making."""

    output: CompletionOutput
    detokenizer: Detokenizer
    stops: StopChecker | None


class OutputCollector:
    """Collects the updates of the samples of a request in one ``RequestOutput``, updated in place.

    ``engine_ids`` are the ids of its sequences in the engine, one per sample. ``continues``: the
    text goes on where the prompt ends, so a leading space belongs to it. After ``apply`` found a
    stop string, the sequence's id is to be aborted in the engine by the caller. ``trace`` gets the
    stations from the engine on. ``spelled_ids``: as in ``Detokenizer``.
    """

    def __init__(
        self,
        *,
        request_id: str,
        engine_ids: Sequence[str],
        text: str | None,
        token_ids: Sequence[int],
        num_item_tokens: dict[str, int],
        params: SamplingParams,
        continues: bool,
        tokenizer: Tokenizer,
        arrival_time: float,
        spelled_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._spelled_ids = spelled_ids
        self._params = params
        self._continues = continues
        self._index = {engine_id: index for index, engine_id in enumerate(engine_ids)}
        self._samples = [self._new_sample(index) for index in range(len(engine_ids))]
        self._num_open = len(engine_ids)
        self.metrics = RequestMetrics(arrival_time)
        self.trace: RequestTrace | None = None
        self.last_token_times: dict[str, float] = {}
        self.num_unreported: Counter[str] = Counter()
        self.output = RequestOutput(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=list(token_ids),
            outputs=[sample.output for sample in self._samples],
            finished=False,
            num_item_tokens=num_item_tokens,
            metrics=self.metrics,
        )

    @classmethod
    def for_requests(
        cls,
        request_id: str,
        prepared: PreparedPrompt,
        requests: Sequence[EngineRequest],
        params: SamplingParams,
        tokenizer: Tokenizer,
    ) -> OutputCollector:
        """Make the collector for the requests of a prepared prompt, one per sample."""
        collector = cls(
            request_id=request_id,
            engine_ids=[request.request_id for request in requests],
            text=prepared.text,
            token_ids=prepared.token_ids,
            num_item_tokens=prepared.num_item_tokens,
            continues=prepared.continues,
            params=params,
            tokenizer=tokenizer,
            arrival_time=requests[0].arrival_time,
            spelled_ids=prepared.spelled_ids,
        )
        collector.metrics.prepared_time = time.monotonic()
        collector.metrics.items = tuple(map(item_metrics, prepared.items))
        return collector

    def _new_sample(self, index: int) -> _Sample:
        params = self._params
        wants_logprobs = params.logprobs is not None
        return _Sample(
            output=CompletionOutput(
                index=index,
                text="",
                token_ids=[],
                cumulative_logprob=0.0 if wants_logprobs else None,
                logprobs=[] if wants_logprobs else None,
            ),
            detokenizer=Detokenizer(
                self._tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
                continues=self._continues,
                spelled_ids=self._spelled_ids,
            ),
            stops=StopChecker(params.stop, params.include_stop_str_in_output)
            if params.stop
            else None,
        )

    @property
    def finished(self) -> bool:
        """Return True if all samples are complete."""
        return self._num_open == 0

    @property
    def open_ids(self) -> list[str]:
        """Return the engine ids of the samples that are not complete."""
        return [i for i, at in self._index.items() if not self._samples[at].output.finished]

    def apply(self, update: SequenceUpdate) -> bool:
        """Apply an update; return True when a stop string ended the sequence: then abort it.

        Updates of a complete sample are ignored, since the engine may be a step ahead of an abort.
        Raises RequestError or UnavailableError when the engine could not compute the sequence.
        """
        sample = self._samples[self._index[update.request_id]]
        if sample.output.finished:
            return False
        if update.error is not None:
            raise failure(update.error)
        self._record_times(update)
        output = sample.output
        output.accepted_prediction_tokens, output.rejected_prediction_tokens = update.num_predicted
        if update.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None, *map(self._logprobs, update.prompt_logprobs)]
        stopped = False
        if update.sample is not None:
            self.num_unreported[update.request_id] += 1
            stopped = self._append(sample, update.sample, update)
        if stopped:
            self._close(sample)
        elif update.finish_reason is not None:
            self._end(sample, update)
        return stopped

    def _append(self, sample: _Sample, token: TokenSample, update: SequenceUpdate) -> bool:
        """Add a token and its text; return True if that completes a stop string."""
        output = sample.output
        output.token_ids.append(token.token_id)
        if output.logprobs is not None and token.logprobs is not None:
            output.logprobs.append(self._logprobs(token.logprobs))
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + token.logprobs[0][1]
        ends_by_token = update.finish_reason == "stop"
        if ends_by_token and not self._params.include_stop_str_in_output:
            return False
        text = sample.detokenizer.append([token.token_id])
        return self._emit(sample, text)

    def _emit(self, sample: _Sample, text: str) -> bool:
        """Publish text up to a possible stop string; return True if one was completed."""
        output, stops = sample.output, sample.stops
        if stops is None:
            output.text += text
            return False
        may_stop = len(output.token_ids) >= self._params.min_tokens
        result = stops.feed(text, may_stop=may_stop)
        output.text += result.text
        if result.stop is not None:
            output.finish_reason, output.stop_reason = "stop", result.stop
        return result.stop is not None

    def _end(self, sample: _Sample, update: SequenceUpdate) -> None:
        if not self._emit(sample, sample.detokenizer.flush()):
            if sample.stops is not None:
                sample.output.text += sample.stops.flush()
            sample.output.finish_reason = update.finish_reason
            sample.output.stop_reason = update.stop_token_id
        self._close(sample)

    def _close(self, sample: _Sample) -> None:
        self._num_open -= 1
        if self.finished:
            self.output.finished = True
            self.metrics.finished_time = time.monotonic()
            if self.trace is not None:
                reasons = {str(sample.output.finish_reason) for sample in self._samples}
                num_tokens = sum(len(sample.output.token_ids) for sample in self._samples)
                self.trace.end("finished", reason=",".join(sorted(reasons)), tokens=num_tokens)

    def _record_times(self, update: SequenceUpdate) -> None:
        if self.metrics.first_scheduled_time is None:
            self.metrics.first_scheduled_time = update.first_scheduled_time
        if update.sample is not None and self.metrics.first_token_time is None:
            self.metrics.first_token_time = time.monotonic()
            self.metrics.encode_seconds = update.encode_seconds
            if self.trace is not None:
                self.trace.prefilled(
                    update.first_scheduled_time, update.prefilled_time, update.encoded
                )
                self.trace.station("first token")
            # The first sample computes the prompt; the others find it in the cache.
            self.output.num_cached_tokens = update.num_cached_tokens

    def _logprobs(self, entries: tuple[tuple[int, float, int], ...]) -> dict[int, Logprob]:
        return {i: Logprob(value, rank, self._token_text(i)) for i, value, rank in entries}

    def _token_text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")
