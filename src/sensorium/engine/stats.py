"""Numbers about a running engine: gauges of now and counters since its start."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class EngineStats:
    """A snapshot. Gauges: ``num_running``, ``num_waiting``, ``kv_blocks_*``, ``encoder_resident_embeds``; the others
    count from the start of the engine. ``prefix_queries`` and ``prefix_hits`` are in tokens. ``media`` holds the
    counters of the media pipeline by name."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    encoder_queries: int = 0
    encoder_hits: int = 0
    encoder_items: int = 0
    encoder_resident_embeds: int = 0
    num_preemptions: int = 0
    computed_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_vectors: int = 0
    num_steps: int = 0
    held_features: int = 0
    media: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a started engine found out about itself."""

    max_model_len: int
    num_kv_blocks: int
    block_size: int
    max_num_batched_tokens: int
    device: str
    dtype: str
    num_threads: int
    load_seconds: float
