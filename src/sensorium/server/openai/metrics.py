"""The ``metrics`` of an answer, for requests with ``return_metrics``."""

from __future__ import annotations

from typing import Any

from sensorium.outputs import ItemMetrics, RequestMetrics, RequestOutput

MOST_ITEMS = 256
"""Items of a request that its metrics list."""
MOST_FRAMES = 256
"""Frames that are listed of a video; of more, as many evenly spaced ones."""


def answer_metrics(output: RequestOutput) -> dict[str, Any] | None:
    """Return where the time of a finished request went, in seconds; None if it is not known.

    ``prepare_seconds`` are those of template, tokenizer and media, ``queue_seconds`` those until
    the first step, ``prefill_seconds`` those of the prompt without ``encode_seconds``, which its
    media took, ``decode_seconds`` those from the first token to the last.
    """
    times = output.metrics
    if times is None:
        return None
    spans = _spans(times)
    decode = spans["decode_seconds"]
    longest = max(len(sample.token_ids) for sample in output.outputs)
    return {
        "time_to_first_token_seconds": times.time_to_first_token,
        "total_seconds": _span(times.arrival_time, times.finished_time),
        **spans,
        "tokens_per_second": (longest - 1) / decode if decode and longest > 1 else None,
        "items": [_item(item) for item in times.items[:MOST_ITEMS]],
    }


def _spans(times: RequestMetrics) -> dict[str, float | None]:
    prefill = _span(times.first_scheduled_time, times.first_token_time)
    encode = None if prefill is None else min(prefill, times.encode_seconds)
    return {
        "prepare_seconds": _span(times.arrival_time, times.prepared_time),
        "queue_seconds": _span(times.prepared_time, times.first_scheduled_time),
        "encode_seconds": encode,
        "prefill_seconds": None if prefill is None or encode is None else prefill - encode,
        "decode_seconds": _span(times.first_token_time, times.finished_time),
    }


def _span(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start)


def _item(item: ItemMetrics) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "param": item.place,
        "modality": item.modality,
        "num_tokens": item.num_embeds,
        "cached": item.cached,
        "fetch_seconds": item.fetch_seconds,
        "decode_seconds": item.decode_seconds,
        "preprocess_seconds": item.preprocess_seconds,
    }
    if item.modality == "video":
        num_frames = len(item.frames)
        num_listed = min(num_frames, MOST_FRAMES)
        entry["frames"] = [item.frames[i * num_frames // num_listed] for i in range(num_listed)]
        entry["num_frames"] = num_frames
        entry["fps"] = item.fps
        entry["num_source_frames"] = item.num_source_frames
    return entry
