"""``sensorium bench serve``: load on a running server."""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

from sensorium import progress
from sensorium.bench import report
from sensorium.bench.client import RequestRecord, StreamClient
from sensorium.bench.load import LoadPlan, LoadResult, chat_body, run_load
from sensorium.bench.workload import RandomWorkload
from sensorium.environment import api_keys_of_environment
from sensorium.errors import ConfigError

WARM_UP_SEED = 1 << 20
"""Added to the seed of warm-up requests, so that they share nothing with measured ones."""


def run(arguments: argparse.Namespace) -> int:
    """Run the load and report it; return 1 if no request completed."""
    workload, plan = _workload(arguments, arguments.seed), _plan(arguments)
    extra = _extra(arguments)
    model, result = asyncio.run(_run(arguments, workload, plan, extra))
    results = {
        **report.header("serve", {**_settings(arguments), **report.plain({"model": model})}),
        **report.load_results(result),
    }
    print(report.load_table(results))
    if arguments.output is not None:
        if arguments.save_requests:
            results["requests"] = report.detail(result)
        report.write_json(results, arguments.output)
    return 0 if results["num_completed"] or results["num_left"] else 1


async def _run(
    arguments: argparse.Namespace,
    workload: RandomWorkload,
    plan: LoadPlan,
    extra: dict[str, Any],
) -> tuple[str, LoadResult]:
    keys = api_keys_of_environment()
    api_key = arguments.api_key or (keys[0] if keys else None)
    client = StreamClient(arguments.base_url, api_key=api_key, timeout=arguments.timeout)
    async with client:
        try:
            model = arguments.model or await client.first_model()
        except ConnectionError as error:
            raise ConfigError(str(error), param="base_url") from error
        warm = _workload(arguments, arguments.seed + WARM_UP_SEED)
        for index in range(arguments.num_warmups):
            await client.send(chat_body(warm, index, model, plan.output_len, extra))
        bodies = [
            chat_body(workload, index, model, plan.output_len, extra)
            for index in range(plan.num_prompts)
        ]
        with progress.bar("Requests", plan.num_prompts, unit="requests", keep=True) as bar:

            def on_end(record: RequestRecord) -> None:
                bar.update()

            return model, await run_load(client, bodies, plan, on_end)


def _workload(arguments: argparse.Namespace, seed: int) -> RandomWorkload:
    return RandomWorkload(
        input_len=arguments.input_len,
        prefix_len=arguments.prefix_len,
        num_images=arguments.images,
        image_size=arguments.image_size,
        distinct_images=arguments.distinct_images,
        seed=seed,
    )


def _plan(arguments: argparse.Namespace) -> LoadPlan:
    return LoadPlan(
        num_prompts=arguments.num_prompts,
        output_len=arguments.output_len,
        request_rate=arguments.request_rate,
        concurrency=arguments.concurrency,
        leave_fraction=arguments.leave_fraction,
        seed=arguments.seed,
    )


def _extra(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the further fields of each request."""
    extra: dict[str, Any] = {"ignore_eos": True} if arguments.ignore_eos else {}
    if arguments.extra_body is None:
        return extra
    try:
        given = json.loads(arguments.extra_body)
    except ValueError as error:
        raise ConfigError(f"extra_body is not valid JSON: {error}.", param="extra_body") from error
    if not isinstance(given, dict):
        raise ConfigError(
            f"extra_body must be a JSON object, got {arguments.extra_body!r}.", param="extra_body"
        )
    return {**extra, **given}


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the flags of the load, without the key and the server's address."""
    names = (
        "num_prompts",
        "input_len",
        "prefix_len",
        "output_len",
        "images",
        "image_size",
        "distinct_images",
        "concurrency",
        "leave_fraction",
        "ignore_eos",
        "extra_body",
        "num_warmups",
        "seed",
    )
    rate = arguments.request_rate
    return {
        "request_rate": rate if rate != float("inf") else "inf",
        **{name: getattr(arguments, name) for name in names},
    }
