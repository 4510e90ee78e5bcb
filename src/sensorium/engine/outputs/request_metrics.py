"""Metrics of requests in the frontend, and the line about all of them in the log."""

from __future__ import annotations

import time
from typing import Protocol

from sensorium.engine.outputs.pooling import PoolingCollector
from sensorium.engine.outputs.stream import OutputCollector
from sensorium.engine.stats import EngineStats
from sensorium.metrics.report import RequestReport
from sensorium.outputs import FinishReason, RequestMetrics

_GRAVEST: tuple[FinishReason, ...] = ("error", "abort", "length", "stop")


class Metrics(Protocol):
    """Receiver of the measurements of each request, in seconds."""

    def first_token(self, seconds: float) -> None:
        """Record the time from arrival to the first token."""
        ...

    def inter_token(self, seconds: float) -> None:
        """Record the time between two tokens of a sample."""
        ...

    def queue(self, seconds: float) -> None:
        """Record the time from arrival to the first step with the request."""
        ...

    def finished(self, report: RequestReport) -> None:
        """Record a request that has ended, successfully or not."""
        ...


def report_tokens(metrics: Metrics, stream: OutputCollector, first_before: float | None) -> None:
    """Report the tokens of the updates that were just applied.

    ``first_before`` is the time of the first token before these updates, if there was one. Tokens
    of a sample that come together, because this process is slower than the engine, share the time
    since the token before them.
    """
    now, times = time.monotonic(), stream.metrics
    if first_before is None and times.first_token_time is not None:
        metrics.first_token(times.first_token_time - times.arrival_time)
        _report_queue(metrics, times)
    for engine_id, num_tokens in stream.num_unreported.items():
        since = stream.last_token_times.get(engine_id)
        num_gaps = num_tokens if since is not None else num_tokens - 1
        for _ in range(num_gaps):
            metrics.inter_token((now - since) / num_gaps if since is not None else 0.0)
        stream.last_token_times[engine_id] = now
    stream.num_unreported.clear()


def report_end(
    metrics: Metrics,
    stream: OutputCollector,
    unfinished: FinishReason,
    *,
    max_tokens: int,
    adapter: str = "",
) -> None:
    """Report the end of a request for text.

    ``unfinished`` is the finish reason of samples that have none of their own. ``adapter``: the
    name of the request's adapter, if it has one.
    """
    output, times, now = stream.output, stream.metrics, time.monotonic()
    lengths = [len(sample.token_ids) for sample in output.outputs]
    reasons = {sample.finish_reason or unfinished for sample in output.outputs}
    prefill = decode = None
    if times.first_token_time is not None and times.first_scheduled_time is not None:
        prefill = max(0.0, times.first_token_time - times.first_scheduled_time)
        last = max(stream.last_token_times.values(), default=times.first_token_time)
        decode = max(0.0, last - times.first_token_time)
    metrics.finished(
        RequestReport(
            finish_reason=next(reason for reason in _GRAVEST if reason in reasons),
            num_prompt_tokens=len(output.prompt_token_ids),
            num_cached_tokens=output.num_cached_tokens,
            num_generation_tokens=sum(lengths),
            longest_sample=max(lengths),
            num_samples=len(lengths),
            max_tokens=max_tokens,
            e2e_seconds=now - times.arrival_time,
            prefill_seconds=prefill,
            decode_seconds=decode,
            adapter=adapter,
        )
    )


def report_embedding(
    metrics: Metrics, stream: PoolingCollector, unfinished: FinishReason, adapter: str = ""
) -> None:
    """Report the end of a request for an embedding; ``unfinished`` is its reason without one.

    ``adapter``: as for ``report_end``.
    """
    output, times, now = stream.output, stream.metrics, time.monotonic()
    prefill = None
    if times.first_scheduled_time is not None:
        _report_queue(metrics, times)
        prefill = max(0.0, (times.finished_time or now) - times.first_scheduled_time)
    metrics.finished(
        RequestReport(
            finish_reason="stop" if stream.finished else unfinished,
            num_prompt_tokens=len(output.prompt_token_ids),
            num_cached_tokens=output.num_cached_tokens,
            num_generation_tokens=0,
            longest_sample=0,
            num_samples=1,
            max_tokens=0,
            e2e_seconds=now - times.arrival_time,
            prefill_seconds=prefill,
            adapter=adapter,
        )
    )


def status_line(stats: EngineStats) -> str:
    """Return the log line: load and cache hits (since the start) of the engine and of media."""
    used = _percent(stats.kv_blocks_used, stats.kv_blocks_total)
    parts = [
        f"{stats.num_running} running, {stats.num_waiting} waiting",
        f"KV cache {used} used",
        f"prefix cache hits {_percent(stats.prefix_hits, stats.prefix_queries)}",
    ]
    if stats.num_draft_tokens:
        accepted = _percent(stats.num_accepted_tokens, stats.num_draft_tokens)
        parts.append(f"tried tokens accepted {accepted}")
    media = stats.media
    if media:
        queries, hits = (media.get(f"processor_cache_{name}", 0) for name in ("queries", "hits"))
        parts += [
            f"{media.get('num_loading', 0):.0f} media items loading",
            f"processor cache hits {_percent(hits, queries)}",
            f"encoder cache hits {_percent(stats.encoder_hits, stats.encoder_queries)}",
        ]
    return "; ".join(parts)


def _percent(part: float, whole: float) -> str:
    return f"{100.0 * part / whole if whole else 0.0:.1f} %"


def _report_queue(metrics: Metrics, times: RequestMetrics) -> None:
    if times.first_scheduled_time is not None:
        metrics.queue(max(0.0, times.first_scheduled_time - times.arrival_time))
