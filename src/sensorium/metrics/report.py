"""Summary of a finished request for the metrics."""

from __future__ import annotations

from dataclasses import dataclass

from sensorium.outputs import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestReport:
    """A request that has ended. Times are in seconds; None where the request did not get so far.

    ``finish_reason``: "stop" for an embedding, too; "abort" when the caller left, "error" for any
    failure. ``max_tokens`` is 0 for an embedding. ``longest_sample`` is in tokens;
    ``num_generation_tokens`` is the sum of all samples.
    """

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generation_tokens: int
    longest_sample: int
    num_samples: int
    max_tokens: int
    e2e_seconds: float
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    adapter: str = ""
    """Name of its LoRA adapter, if it has one."""

    @property
    def inference_seconds(self) -> float | None:
        """Time from the first step to the last token; None without a token or an embedding."""
        if self.prefill_seconds is None:
            return None
        return self.prefill_seconds + (self.decode_seconds or 0.0)

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time between tokens; None where no sample has two."""
        if self.decode_seconds is None or self.longest_sample < 2:
            return None
        return self.decode_seconds / (self.longest_sample - 1)
