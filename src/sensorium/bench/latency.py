"""``sensorium bench latency``: one batch at a time through the offline ``LLM``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sensorium import progress
from sensorium.bench import report
from sensorium.bench.throughput import complete
from sensorium.bench.workload import RandomWorkload

if TYPE_CHECKING:
    from sensorium.outputs import RequestOutput

UNITS = {
    "ttft_seconds": "s",
    "step_seconds": "s",
    "decode_tokens_per_second": "tokens/s",
    "prefill_tokens_per_second": "tokens/s",
    "e2e_seconds": "s",
}


def run(arguments: argparse.Namespace, keywords: Mapping[str, Any]) -> int:
    """Load the model, run the batches, print medians and write all summaries."""
    from sensorium.llm import LLM
    from sensorium.params import SamplingParams

    workload = RandomWorkload(
        input_len=arguments.input_len,
        num_images=arguments.images,
        image_size=arguments.image_size,
        seed=keywords.get("seed") or 0,
    )
    params = SamplingParams(temperature=0.0, max_tokens=arguments.output_len, ignore_eos=True)
    size = arguments.batch_size
    iterations = []
    total = arguments.num_warmups + arguments.iterations
    with LLM(**keywords) as llm, progress.bar("Batches", total, unit="batches") as shown:
        for number in range(total):
            start, monotonic = time.perf_counter(), time.monotonic()
            outputs = complete(llm, workload, range(number * size, (number + 1) * size), params)
            seconds = time.perf_counter() - start
            if number >= arguments.num_warmups:
                iterations.append(figures(outputs, monotonic, seconds))
            shown.update()
    results: dict[str, Any] = report.header(
        "latency",
        {
            "batch_size": size,
            "input_len": arguments.input_len,
            "output_len": arguments.output_len,
            "images": arguments.images,
            "image_size": arguments.image_size,
            "iterations": arguments.iterations,
            "engine": report.plain(keywords),
        },
    )
    for name in UNITS:
        values = [iteration[name] for iteration in iterations if name in iteration]
        results[name] = report.summary_dict(values)
    medians = {name: results[name]["p50"] for name in UNITS if results[name] is not None}
    print(f"medians of {arguments.iterations} batches of {size}")
    print(report.figures_table(medians, UNITS))
    if arguments.output is not None:
        report.write_json(results, arguments.output)
    return 0


def figures(outputs: list[RequestOutput], start: float, seconds: float) -> dict[str, float]:
    """Return the figures of one batch.

    Args:
        outputs: of all sequences.
        start: ``time.monotonic()`` before the batch.
        seconds: until all sequences were finished.

    Returns:
    ttft_seconds: until every sequence had its first token. step_seconds: mean time of a step after
    that. decode_tokens_per_second: the tokens of these steps over all sequences.
    """
    first = max(_first_token_time(output) for output in outputs) - start
    num_input = sum(len(output.prompt_token_ids) for output in outputs)
    num_steps = max(len(output.outputs[0].token_ids) for output in outputs) - 1
    found = {
        "ttft_seconds": first,
        "e2e_seconds": seconds,
        "prefill_tokens_per_second": num_input / first,
    }
    if num_steps > 0:
        step = (seconds - first) / num_steps
        found["step_seconds"] = step
        found["decode_tokens_per_second"] = len(outputs) / step
    return found


def _first_token_time(output: RequestOutput) -> float:
    if output.metrics is None or output.metrics.first_token_time is None:
        raise RuntimeError(f"request {output.request_id} has no time of its first token")
    return output.metrics.first_token_time
