"""``sensorium bench throughput``: many prompts at once through the offline ``LLM``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sensorium.bench import report
from sensorium.bench.workload import RandomWorkload

if TYPE_CHECKING:
    from sensorium.llm import LLM
    from sensorium.outputs import RequestOutput
    from sensorium.params import SamplingParams

UNITS = {
    "duration_seconds": "s",
    "requests_per_second": "requests/s",
    "input_tokens_per_second": "tokens/s",
    "output_tokens_per_second": "tokens/s",
    "total_tokens_per_second": "tokens/s",
}
COUNTERS = ("num_steps", "num_preemptions", "encoder_items", "encoder_hits")


def run(arguments: argparse.Namespace, keywords: Mapping[str, Any]) -> int:
    """Load the model, complete all prompts, print and write tokens per second."""
    from sensorium.llm import LLM
    from sensorium.params import SamplingParams

    workload = RandomWorkload(
        input_len=arguments.input_len,
        prefix_len=arguments.prefix_len,
        num_images=arguments.images,
        image_size=arguments.image_size,
        distinct_images=arguments.distinct_images,
        seed=keywords.get("seed") or 0,
    )
    settings = {
        "num_prompts": arguments.num_prompts,
        "input_len": arguments.input_len,
        "prefix_len": arguments.prefix_len,
        "output_len": arguments.output_len,
        "images": arguments.images,
        "image_size": arguments.image_size,
        "distinct_images": arguments.distinct_images,
    }
    with LLM(**keywords) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=arguments.output_len, ignore_eos=True)
        complete(llm, workload, range(-1, 0), params.replace(max_tokens=2))
        before = llm.stats()
        start = time.perf_counter()
        outputs = complete(llm, workload, range(arguments.num_prompts), params, use_tqdm=True)
        seconds = time.perf_counter() - start
        after = llm.stats()
    results = {
        **report.header("throughput", {**settings, "engine": report.plain(keywords)}),
        **rates(outputs, seconds),
        **{name: getattr(after, name) - getattr(before, name) for name in COUNTERS},
        "media_seconds": {
            name: value - before.media.get(name, 0.0)
            for name, value in after.media.items()
            if name.endswith("_seconds")
        },
    }
    print(report.figures_table({name: results[name] for name in UNITS}, UNITS))
    if arguments.output is not None:
        report.write_json(results, arguments.output)
    return 0


def complete(
    llm: LLM,
    workload: RandomWorkload,
    indices: range,
    params: SamplingParams,
    *,
    use_tqdm: bool = False,
) -> list[RequestOutput]:
    """Complete the prompts of these numbers: token ids, or conversations with images."""
    if workload.num_images:
        return llm.chat(
            [_conversation(workload, index) for index in indices], params, use_tqdm=use_tqdm
        )
    encode = llm.get_tokenizer().encode
    prompts = [{"prompt_token_ids": workload.token_ids(index, encode)} for index in indices]
    return llm.generate(prompts, params, use_tqdm=use_tqdm)


def rates(outputs: list[RequestOutput], seconds: float) -> dict[str, Any]:
    """Return token counts and tokens per second."""
    num_input = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    seconds = max(seconds, 1e-9)
    return {
        "duration_seconds": seconds,
        "prompt_tokens": num_input,
        "completion_tokens": num_output,
        "cached_tokens": sum(output.num_cached_tokens for output in outputs),
        "requests_per_second": len(outputs) / seconds,
        "input_tokens_per_second": num_input / seconds,
        "output_tokens_per_second": num_output / seconds,
        "total_tokens_per_second": (num_input + num_output) / seconds,
    }


def _conversation(workload: RandomWorkload, index: int) -> list[dict[str, Any]]:
    images = [{"type": "image_pil", "image_pil": p} for p in workload.images(index)]
    content = [*images, {"type": "text", "text": workload.text(index)}]
    return [{"role": "user", "content": content}]
