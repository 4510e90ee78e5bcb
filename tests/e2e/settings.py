"""Settings of an engine in which the same prompts must get the same answers."""

from __future__ import annotations

import concurrent.futures
from typing import Any

from sensorium import LLM
from sensorium.engine.offline.batch import Batch
from sensorium.engine.offline.run import BatchRun


def settings(scarce_blocks: int) -> dict[str, dict[str, Any]]:
    """Keywords of ``LLM`` by name; ``scarce_blocks`` of 8 tokens are so few that prompts displace each other."""
    return {
        "roomy": {"num_kv_blocks": 400, "block_size": 16},
        "cut up": {"num_kv_blocks": 400, "block_size": 8, "max_num_batched_tokens": 7},
        "preempted": {
            "num_kv_blocks": scarce_blocks,
            "block_size": 8,
            "max_num_batched_tokens": 64,
        },
        "no caches": {
            "num_kv_blocks": 100,
            "block_size": 8,
            "enable_prefix_caching": False,
            "mm_processor_cache_gb": 0.0,
        },
    }


def all_at_once(llm: LLM) -> LLM:
    """Let every call's prompts come to the engine together, however long their media take to prepare: else it depends
    on the machine how many of them compete for blocks."""
    new_run = llm._new_run

    def waiting_run(batch: Batch) -> BatchRun:
        run = new_run(batch)
        ahead = run._prepare_ahead

        def prepare_all() -> None:
            ahead()
            concurrent.futures.wait([job.prepared for job in run._ready])

        run._prepare_ahead = prepare_all  # type: ignore[method-assign]
        return run

    llm._new_run = waiting_run  # type: ignore[method-assign]
    return llm
