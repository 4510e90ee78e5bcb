"""Settings of an engine in which the same prompts must get the same answers."""

from __future__ import annotations

from typing import Any


def settings(scarce_blocks: int) -> dict[str, dict[str, Any]]:
    """Keywords of ``LLM`` by name.

    ``scarce_blocks`` of 8 tokens are so few that prompts displace each other.
    """
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
