"""Caches, scheduling, devices, and what is written about them."""

from __future__ import annotations

from dataclasses import dataclass

from sensorium.config.fields import bad, check_integer, check_number, check_types, option


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Memory for keys and values, and for media."""

    block_size: int = option(32, "Tokens of one block of the KV cache.")
    enable_prefix_caching: bool = option(
        True, "Reuse the KV of prompts that begin alike (text and media)."
    )
    gpu_memory_utilization: float = option(0.9, "Part of a GPU's memory that may be used.")
    kv_cache_memory_bytes: int | None = option(
        None,
        "Bytes for the KV cache; computed from the memory there is when not given. A CPU's are taken as they are first "
        "written.",
    )
    num_kv_blocks: int | None = option(
        None, "Number of KV blocks, in place of a size in bytes; for tests and experiments."
    )
    mm_processor_cache_gb: float = option(
        1.0,
        "GiB for preprocessed media (a server keeps up to as much again in shared memory); 0: none.",
    )
    mm_encoder_cache_gb: float = option(0.5, "GiB for encoder outputs.")

    def __post_init__(self) -> None:
        check_types(self)
        check_integer("block_size", self.block_size, 1, 1024)
        check_number("gpu_memory_utilization", self.gpu_memory_utilization, 0.01, 1.0)
        check_number("mm_processor_cache_gb", self.mm_processor_cache_gb, 0.0, 1 << 20)
        check_number("mm_encoder_cache_gb", self.mm_encoder_cache_gb, 0.001, 1 << 20)
        if self.kv_cache_memory_bytes is not None:
            check_integer("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, 1 << 50)
        if self.num_kv_blocks is not None:
            check_integer("num_kv_blocks", self.num_kv_blocks, 1, 1 << 40)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How requests share the steps."""

    max_num_seqs: int = option(64, "Most sequences in one step.")
    max_num_batched_tokens: int | None = option(
        None,
        "Most tokens in one step; when not given 2048, or the longest context without chunked prefill.",
    )
    enable_chunked_prefill: bool = option(True, "Split long prompts over several steps.")
    max_num_waiting: int = option(
        1024,
        "Most samples waiting in a server (a request with n=8 has eight); past it, 503 with Retry-After.",
    )
    max_sampled_prompt_tokens: int = option(
        1 << 22,
        "Most tokens that n times a prompt may have, for a request with n over 1; past it, 400.",
    )
    grammar_timeout: float = option(
        3.0,
        "Seconds of processor time that the schema, regular expression or grammar of a structured output may take to "
        "compile; past it, 400.",
    )
    engine_step_timeout: float = option(
        600.0,
        "Seconds after which a step of a server's engine counts as hung: its stack goes to the log, the engine is "
        "restarted; 0: never.",
    )

    engine_start_timeout: float = option(
        3600.0,
        "Seconds that a server's engine may take to load the model; past them it counts as hung and is ended; 0: no "
        "limit.",
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_integer("max_num_seqs", self.max_num_seqs, 1, 65536)
        if self.max_num_batched_tokens is not None:
            check_integer("max_num_batched_tokens", self.max_num_batched_tokens, 1, 1 << 24)
        check_integer("max_num_waiting", self.max_num_waiting, 1, 1 << 24)
        check_integer("max_sampled_prompt_tokens", self.max_sampled_prompt_tokens, 1, 1 << 40)
        check_number("grammar_timeout", self.grammar_timeout, 0.01, 3600.0)
        check_number("engine_step_timeout", self.engine_step_timeout, 0.0, 86400.0)
        check_number("engine_start_timeout", self.engine_start_timeout, 0.0, 86400.0)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """More than one device or process."""

    tensor_parallel_size: int = option(
        1, "Devices that share one model; only 1 is available so far."
    )
    data_parallel_size: int = option(1, "Replicas of the model; only 1 is available so far.")

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "data_parallel_size"):
            size = getattr(self, name)
            check_integer(name, size, 1, 1 << 16)
            if size > 1:
                bad(
                    name,
                    f"is {size}, but one device runs a model so far: leave it at 1, and start one server per device",
                )


@dataclass(frozen=True, kw_only=True)
class ObservabilityConfig:
    """What is written about the running engine."""

    disable_log_stats: bool = option(False, "Do not log throughput.")
    log_stats_interval: float = option(10.0, "Seconds between two lines of throughput.")

    def __post_init__(self) -> None:
        check_types(self)
        check_number("log_stats_interval", self.log_stats_interval, 0.1, 86400.0)
