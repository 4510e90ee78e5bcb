"""Options of caches, scheduling, speculation, devices and observability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sensorium.config.fields import bad, check_choice, check_fields, option

CacheDtype = Literal["auto", "bfloat16", "float16", "float32", "int8"]


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Memory of the KV cache and of the media caches."""

    block_size: int = option(32, "Tokens per block of the KV cache.", ge=1, le=1024)
    enable_prefix_caching: bool = option(
        True, "Reuse the KV cache of prompts with the same beginning (text and media)."
    )
    gpu_memory_utilization: float = option(
        0.9, "Fraction of the GPU's memory to use.", ge=0.01, le=1.0
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        "Size of the KV cache in bytes; computed from the available memory if unset. On a CPU "
        "memory is taken only as blocks are first written.",
        ge=1,
        le=1 << 50,
    )
    max_memory_gb: float | None = option(
        None,
        "GiB of memory that an engine may take for weights, KV cache and computing; bounds the KV "
        "cache, unless its size is given. --mm-encoder-cache-gb comes on top. No limit if unset.",
        ge=0.1,
        le=1 << 20,
    )
    kv_cache_dtype: CacheDtype = option(
        "auto",
        "Data type of keys and values in the KV cache. auto: the model's. int8: a byte for each "
        "number and a scale for each token and head, about half of what 16 bits take. Any other "
        "must be the model's.",
    )
    num_kv_blocks: int | None = option(
        None,
        "Number of blocks of the KV cache, instead of a size in bytes; for tests and experiments.",
        ge=1,
        le=1 << 40,
    )
    mm_processor_cache_gb: float = option(
        1.0,
        "GiB for preprocessed media (a server may use as much again in shared memory); 0 disables "
        "the cache.",
        ge=0.0,
        le=1 << 20,
    )
    mm_encoder_cache_gb: float = option(0.5, "GiB for encoder outputs.", ge=0.001, le=1 << 20)

    def __post_init__(self) -> None:
        """Check the values. Raises ConfigError."""
        check_fields(self)
        check_choice("kv_cache_dtype", self.kv_cache_dtype, get_args(CacheDtype))


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step, of the queue and of time."""

    max_num_seqs: int = option(64, "Maximum number of sequences in one step.", ge=1, le=65536)
    max_num_batched_tokens: int | None = option(
        None,
        "Maximum number of tokens in one step; 2048 if unset, or the longest context without "
        "chunked prefill.",
        ge=1,
        le=1 << 24,
    )
    enable_chunked_prefill: bool = option(True, "Split long prompts over several steps.")
    max_num_waiting: int = option(
        1024,
        "Maximum number of samples waiting in a server (a request with n=8 has eight); beyond it, "
        "503 with Retry-After.",
        ge=1,
        le=1 << 24,
    )
    max_sampled_prompt_tokens: int = option(
        1 << 22,
        "Maximum of n times the prompt's tokens, for a request with n above 1; beyond it, 400.",
        ge=1,
        le=1 << 40,
    )
    grammar_timeout: float = option(
        3.0,
        "Seconds of CPU time for compiling the schema, regular expression or grammar of a "
        "structured output; beyond it, 400.",
        ge=0.01,
        le=3600.0,
    )
    engine_step_timeout: float = option(
        600.0,
        "Seconds after which a step of a server's engine counts as hung: its stack is logged and "
        "the engine is restarted; 0 disables the check.",
        ge=0.0,
        le=86400.0,
    )
    engine_start_timeout: float = option(
        3600.0,
        "Seconds for a server's engine to load the model; beyond them it counts as hung and is "
        "stopped; 0 disables the limit.",
        ge=0.0,
        le=86400.0,
    )

    def __post_init__(self) -> None:
        """Check the values. Raises ConfigError."""
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    """Speculative decoding: several tokens of a sequence in one step."""

    speculative: Literal["ngram"] | None = option(
        None,
        "Try tokens that repeat the prompt or the answer so far, several in one step; answers stay "
        "the same. Off where measurements say that it does not pay.",
    )
    num_speculative_tokens: int = option(
        8, "Maximum number of tokens of a sequence that are tried in one step.", ge=1, le=16
    )
    prompt_lookup_min: int = option(
        3, "Fewest last tokens that must have stood elsewhere before.", ge=1, le=64
    )
    prompt_lookup_max: int = option(
        16, "Most last tokens that are compared to find the longest repetition.", ge=1, le=256
    )

    def __post_init__(self) -> None:
        """Check the values. Raises ConfigError."""
        check_fields(self)
        if self.speculative is not None:
            check_choice("speculative", self.speculative, ("ngram",))
        if self.prompt_lookup_min > self.prompt_lookup_max:
            bad("prompt_lookup_min", f"must be at most prompt_lookup_max, {self.prompt_lookup_max}")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """More than one device or process."""

    tensor_parallel_size: int = option(
        1,
        "Number of processes that share one model on CPUs: each holds a part of every layer, on "
        "cores of its own (those of one memory node, where there are as many). Not for GPUs so "
        "far.",
        ge=1,
        le=64,
    )
    encoder_ranks: Literal["first", "all"] = option(
        "first",
        "Processes of --tensor-parallel-size that encode media. first: the first one, which alone "
        "has the encoders; all: each has them, and encodes its share of the items of a step.",
    )
    data_parallel_size: int = option(
        1,
        "Number of replicas of the model behind one server, each with an engine of its own; more "
        "than 1 needs the extra ray.",
        ge=1,
        le=1 << 16,
    )

    def __post_init__(self) -> None:
        """Check the values. Raises ConfigError."""
        check_fields(self)
        check_choice("encoder_ranks", self.encoder_ranks, ("first", "all"))

    def check_one_replica(self) -> None:
        """Raise ConfigError for several replicas, where one engine in this program is meant."""
        if self.data_parallel_size > 1:
            bad(
                "data_parallel_size",
                f"is {self.data_parallel_size}, but this is one engine: replicas are made by "
                "`sensorium serve`",
            )


@dataclass(frozen=True, kw_only=True)
class ObservabilityConfig:
    """Logging and tracing of the running engine."""

    disable_log_stats: bool = option(False, "Do not log throughput.")
    log_stats_interval: float = option(
        10.0, "Seconds between two log lines of throughput.", ge=0.1, le=86400.0
    )
    trace_dir: str | None = option(
        None,
        "Folder for Chrome traces of requests, which Perfetto and chrome://tracing open: "
        "at most 16 files of 1000 requests, without any content of requests.",
    )
    otlp_traces_endpoint: str | None = option(
        None,
        "URL of an OpenTelemetry collector that gets a span for each station of a request, over "
        "HTTP, such as http://127.0.0.1:4318; needs the extra otel.",
    )

    @property
    def traces(self) -> bool:
        """Return True if requests are traced, not only logged."""
        return self.trace_dir is not None or self.otlp_traces_endpoint is not None

    def __post_init__(self) -> None:
        """Check the values. Raises ConfigError."""
        check_fields(self)
