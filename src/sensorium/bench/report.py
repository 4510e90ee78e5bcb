"""Results as dictionaries for JSON and as tables for the terminal."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sensorium
from sensorium.bench.client import RequestRecord
from sensorium.bench.load import LoadResult
from sensorium.bench.machine import describe_machine
from sensorium.bench.summary import Summary, summarize
from sensorium.errors import ConfigError

COLUMNS = ("mean", "p50", "p90", "p95", "p99")
LATENCIES = {
    "ttft_seconds": "time to first token",
    "tpot_seconds": "time per output token",
    "itl_seconds": "between two chunks",
    "e2e_seconds": "end to end",
}


def header(benchmark: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first fields of every result: benchmark, date, machine and settings."""
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "sensorium": sensorium.__version__,
        "machine": describe_machine(),
        "settings": dict(settings),
    }


def load_results(result: LoadResult) -> dict[str, Any]:
    """Return counts, rates and latencies of a run.

    Rates and latencies are of completed requests; disconnected and failed ones are only counted.
    """
    done = [record for record in result.records if record.completed]
    num_input = sum(record.prompt_tokens for record in done)
    num_output = sum(record.completion_tokens for record in done)
    seconds = max(result.seconds, 1e-9)
    return {
        "duration_seconds": result.seconds,
        "num_requests": len(result.records),
        "num_completed": len(done),
        "num_left": sum(record.left for record in result.records),
        "errors": result.errors,
        "error_messages": result.error_messages,
        "num_without_usage": sum(not record.has_usage for record in done),
        "prompt_tokens": num_input,
        "completion_tokens": num_output,
        "cached_tokens": sum(record.cached_tokens for record in done),
        "requests_per_second": len(done) / seconds,
        "input_tokens_per_second": num_input / seconds,
        "output_tokens_per_second": num_output / seconds,
        "total_tokens_per_second": (num_input + num_output) / seconds,
        **_latencies(done),
    }


def detail(result: LoadResult) -> list[dict[str, Any]]:
    """Return one dictionary per request, times in seconds after the first was sent."""
    first = min((record.start_time for record in result.records), default=0.0)
    return [
        {
            "start": record.start_time - first,
            "end": record.end_time - first,
            "chunks": [moment - first for moment in record.chunk_times],
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "cached_tokens": record.cached_tokens,
            "error": record.error,
            "left": record.left,
        }
        for record in result.records
    ]


def load_table(results: Mapping[str, Any]) -> str:
    """Return the results of a run as text for the terminal."""
    errors = sum(results["errors"].values())
    completed = f"{results['num_completed']} of {results['num_requests']} requests completed"
    seconds = f"in {results['duration_seconds']:.2f} s"
    lines = [f"{completed} {seconds}; {results['num_left']} left, {errors} failed"]
    for code, count in results["errors"].items():
        lines.append(f"  {count} x {code}: {results['error_messages'][code]}")
    lines.append(
        f"tokens: {results['prompt_tokens']} in ({results['cached_tokens']} cached), "
        f"{results['completion_tokens']} out"
    )
    if results["num_without_usage"]:
        lines.append(
            f"the server sent no usage for {results['num_without_usage']} requests: their output "
            "tokens are counted by chunks, their input not at all"
        )
    lines.append(
        f"per second: {results['requests_per_second']:.2f} requests, "
        f"{results['input_tokens_per_second']:.1f} tokens in, "
        f"{results['output_tokens_per_second']:.1f} tokens out"
    )
    if results["num_completed"]:
        lines += ["", latency_table(results)]
    return "\n".join(lines)


def latency_table(results: Mapping[str, Any]) -> str:
    """Return a table with mean and percentiles of each latency in milliseconds."""
    lines = [f"{'milliseconds':<24}" + "".join(f"{column:>10}" for column in COLUMNS)]
    for key, name in LATENCIES.items():
        values = results.get(key)
        if values is not None:
            cells = "".join(f"{values[column] * 1e3:>10.1f}" for column in COLUMNS)
            lines.append(f"{name:<24}{cells}")
    return "\n".join(lines)


def figures_table(figures: Mapping[str, float], units: Mapping[str, str]) -> str:
    """Return a line per figure with its unit."""
    return "\n".join(f"{name:<32}{value:>12.4g} {units[name]}" for name, value in figures.items())


def summary_dict(values: Sequence[float]) -> dict[str, float] | None:
    """Return the summary of values as a dictionary, None without values."""
    summary: Summary | None = summarize(values)
    return None if summary is None else dataclasses.asdict(summary)


def plain(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return engine keywords for a result; of paths only the last part, to publish none."""
    return {
        name: os.path.basename(os.path.abspath(value))
        if isinstance(value, str) and os.path.exists(value)
        else value
        for name, value in keywords.items()
    }


def write_json(results: Mapping[str, Any], path: Path) -> None:
    """Write results to a file. Raises ConfigError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"The results cannot be written: {error.strerror}.", param="output"
        ) from error


def _latencies(done: Sequence[RequestRecord]) -> dict[str, Any]:
    first = [r.time_to_first_token for r in done]
    per_token = [r.time_per_output_token for r in done]
    return {
        "ttft_seconds": summary_dict([value for value in first if value is not None]),
        "tpot_seconds": summary_dict([value for value in per_token if value is not None]),
        "itl_seconds": summary_dict([gap for r in done for gap in r.inter_chunk_times]),
        "e2e_seconds": summary_dict([record.end_to_end for record in done]),
    }
