"""Every metric that a server has: its name after the prefix, its kind, its labels and what it means.

Names are vLLM's where it has the metric, so that its dashboards work with ``--metrics-prefix vllm:``. Those of HTTP
have no prefix: they are the names that servers of this framework commonly have, and dashboards expect.
``docs/metrics.md`` is written from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sensorium import errors

Kind = Literal["gauge", "counter", "histogram"]

COMMON_LABELS = ("model_name", "engine")
"""``engine`` is the number of the engine, as in vLLM; there is one, and it is 0."""


@dataclass(frozen=True, slots=True)
class MetricFamily:
    """One metric. ``labels`` are those besides ``COMMON_LABELS``, which all have; ``name`` is without the prefix and,
    of a counter, without ``_total``."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    prefixed: bool = True

    def __post_init__(self) -> None:
        if (self.kind == "histogram") != bool(self.buckets):
            raise ValueError(f"a histogram has buckets, and nothing else has: {self.name}")

    def full_name(self, prefix: str) -> str:
        """The name with the prefix, where it has one; of a counter without ``_total``."""
        return prefix + self.name if self.prefixed else self.name

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which values are scraped, without the prefix."""
        if self.kind == "counter":
            return (f"{self.name}_total",)
        if self.kind == "histogram":
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


@dataclass(frozen=True, slots=True)
class Row:
    """A metric that is one number of the statistics: field ``field`` of them, or of their ``media``."""

    family: MetricFamily
    field: str


def _gauge(name: str, field: str, help: str) -> Row:
    return Row(MetricFamily(name, "gauge", help), field)


def _counter(name: str, field: str, help: str) -> Row:
    return Row(MetricFamily(name, "counter", help), field)


def _histogram(
    name: str, buckets: tuple[float, ...], help: str, labels: tuple[str, ...] = ()
) -> MetricFamily:
    return MetricFamily(name, "histogram", help, labels, buckets)


# ---- numbers of the engine

ENGINE_ROWS = (
    _gauge("num_requests_running", "num_running", "Sequences being computed."),
    _gauge("num_requests_waiting", "num_waiting", "Sequences waiting to be scheduled."),
    _gauge("mm_held_requests", "held_features", "Requests whose media the engine holds."),
    _counter("num_preemptions", "num_preemptions", "Sequences preempted."),
    _counter("engine_steps", "num_steps", "Steps of the engine."),
    _counter("engine_restarts", "num_engine_restarts", "Engines started after one had died."),
    _counter(
        "prompt_tokens",
        "prompt_tokens",
        "Prompt tokens taken in, cached ones too; those of each sample of a request.",
    ),
    _counter("generation_tokens", "generation_tokens", "Tokens generated."),
    _counter("vectors", "num_embeddings", "Embeddings made of prompts."),
    _counter(
        "model_output_not_finite",
        "num_unusable",
        "Sequences ended because the model made infinite, undefined or all-equal numbers of them, or of an item.",
    ),
    _counter(
        "prompt_tokens_cached",
        "prefix_hits",
        "Prompt tokens that were not computed, for the prefix cache had them.",
    ),
    _counter("prefix_cache_queries", "prefix_queries", "Prompt tokens looked up in the cache."),
    _counter("prefix_cache_hits", "prefix_hits", "Prompt tokens found in the prefix cache."),
    _counter("mm_encoder_cache_queries", "encoder_queries", "Items whose embeddings were needed."),
    _counter("mm_encoder_cache_hits", "encoder_hits", "Items whose embeddings were there."),
    _counter("mm_encoder_cache_evictions", "encoder_evictions", "Items forgotten for others."),
    _gauge(
        "mm_encoder_cache_resident_embeds",
        "encoder_resident_embeds",
        "Embeddings of items held for use and reuse.",
    ),
    _gauge("mm_encoder_cache_bytes", "encoder_num_bytes", "Bytes of these embeddings."),
    _gauge(
        "mm_encoder_cache_capacity_bytes",
        "encoder_capacity_bytes",
        "Most bytes of embeddings that are held (--mm-encoder-cache-gb).",
    ),
    _counter("mm_encoder_items", "encoder_items", "Items encoded, or taken in as embeddings."),
    _counter("mm_encoder_failures", "encode_failures", "Items that could not be encoded."),
)
ENGINE_UP = MetricFamily("engine_up", "gauge", "1 while requests can be served, else 0.")
KV_USAGE = MetricFamily("kv_cache_usage_perc", "gauge", "Part of the KV cache in use, 0 to 1.")
PROMPT_MODALITIES = MetricFamily(
    "prompt_tokens_by_modality",
    "counter",
    "Prompt tokens taken in, by what fills them: text, image, video or audio.",
    ("modality",),
)

PROMPT_SOURCES = MetricFamily(
    "prompt_tokens_by_source",
    "counter",
    "Prompt tokens of sequences that started, by where their keys and values come from: local_compute or "
    "local_cache_hit.",
    ("source",),
)
WAITING_REASONS = MetricFamily(
    "num_requests_waiting_by_reason",
    "gauge",
    "Sequences waiting, by reason: capacity (for room in a step or the cache) or deferred (for their grammar).",
    ("reason",),
)
ITERATION_TOKENS = _histogram(
    "iteration_tokens_total",
    (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "Tokens of a step that gave some: those generated, and of prompts that were completed all, cached ones too.",
)
CACHE_CONFIG = MetricFamily(
    "cache_config_info",
    "gauge",
    "Always 1; the labels say how the KV cache is laid out.",
    ("block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching"),
)

# ---- numbers of the media pipeline

MEDIA_ROWS = (
    _counter("mm_cache_queries", "processor_cache_queries", "Items looked up preprocessed."),
    _counter("mm_cache_hits", "processor_cache_hits", "Items found preprocessed."),
    _counter("mm_cache_evictions", "processor_cache_evictions", "Items forgotten for others."),
    _gauge("mm_cache_entries", "processor_cache_num_entries", "Preprocessed items held."),
    _gauge("mm_cache_bytes", "processor_cache_num_bytes", "Bytes of preprocessed media held."),
    _gauge(
        "mm_cache_capacity_bytes",
        "processor_cache_capacity_bytes",
        "Most bytes of preprocessed media that are held (--mm-processor-cache-gb).",
    ),
    _counter(
        "media_downloads", "downloads_num_requests", "Files that items wanted by URL or path."
    ),
    _counter(
        "media_downloads_reused",
        "downloads_num_reused",
        "Those that had come a moment before (--media-url-reuse-seconds).",
    ),
    _counter(
        "media_download_cache_hits",
        "downloads_num_cached",
        "Those that the folder of downloads had (--media-download-cache).",
    ),
    _gauge("media_loading", "num_loading", "Items being loaded, from fetch to preprocessing."),
    _gauge("media_waiting", "num_waiting", "Items that wait for a worker."),
    _gauge("media_workers_busy", "num_busy", "Workers that decode an item."),
    _counter(
        "media_worker_restarts",
        "num_worker_restarts",
        "Workers that died, or were killed over a limit, and were replaced.",
    ),
)
STAGES = ("fetch", "decode", "preprocess", "encode")
STAGE_UNITS = (
    (
        MetricFamily(
            "media_stage_items", "counter", "Items that a stage was done for.", ("stage",)
        ),
        "count",
    ),
    (
        MetricFamily("media_stage_seconds", "counter", "Seconds spent in a stage.", ("stage",)),
        "seconds",
    ),
    (
        MetricFamily(
            "media_stage_bytes",
            "counter",
            "Bytes that came out of a stage: files, decoded arrays, features, embeddings.",
            ("stage",),
        ),
        "num_bytes",
    ),
)
"""Families of the stages, and what ``media`` calls their numbers: ``fetch_count``, ``decode_seconds`` …; those of
``encode`` are the engine's: ``encode_items``, ``encode_seconds``, ``encode_num_bytes``."""

FAILURE = "failure_"
"""What the names of failures in ``media`` begin with; the error's code follows."""
MEDIA_FAILURES = MetricFamily(
    "media_failures", "counter", "Items refused, by the code of the error.", ("code",)
)
MEDIA_CODES = tuple(
    error.code
    for error in (
        errors.MediaRefusedError,
        errors.MediaTooLargeError,
        errors.MediaUndecodableError,
        errors.InvalidEmbeddingsError,
        errors.MediaNotCachedError,
        errors.MediaFetchError,
        errors.MediaFetchTimeoutError,
    )
)
"""Codes that are there from the start, with 0; others come when they occur."""

# ---- requests

_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 120.0),
)
_REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0)
_LAG_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 1.0)
_HTTP_SECONDS = (0.1, 0.5, 1.0, 5.0, 30.0)
"""Few, for there is a histogram for each route: times of requests that matter have histograms of their own."""
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
_SAMPLES = (1, 2, 5, 10, 20, 50, 100)

FINISH_REASONS = ("stop", "length", "abort", "error")
SUCCESS = MetricFamily(
    "request_success",
    "counter",
    "Requests that ended, by reason: stop (an embedding, too), length, abort (the client left), error. "
    "Of several samples, the gravest counts.",
    ("finished_reason",),
)
TIME_TO_FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds", _SECONDS, "From arrival to the first token."
)
INTER_TOKEN = _histogram("inter_token_latency_seconds", _SECONDS, "Between two tokens of a sample.")
QUEUE_TIME = _histogram(
    "request_queue_time_seconds",
    _REQUEST_SECONDS,
    "From arrival to the first step, loading of media included.",
)
PREFILL_TIME = _histogram(
    "request_prefill_time_seconds",
    _REQUEST_SECONDS,
    "From the first step to the first token, or to the embedding.",
)
DECODE_TIME = _histogram(
    "request_decode_time_seconds", _REQUEST_SECONDS, "From the first token to the last."
)
INFERENCE_TIME = _histogram(
    "request_inference_time_seconds", _REQUEST_SECONDS, "From the first step to the last token."
)
TIME_PER_TOKEN = _histogram(
    "request_time_per_output_token_seconds",
    _SECONDS,
    "Mean time between the tokens of a request, of those with at least two.",
)
END_TO_END = _histogram(
    "e2e_request_latency_seconds", _REQUEST_SECONDS, "From arrival to the end of a request."
)
PROMPT_TOKENS = _histogram("request_prompt_tokens", _TOKENS, "Prompt tokens of a request.")
GENERATION_TOKENS = _histogram(
    "request_generation_tokens", _TOKENS, "Tokens generated for a request, of all its samples."
)
LONGEST_SAMPLE = _histogram(
    "request_max_num_generation_tokens", _TOKENS, "Tokens of the longest sample of a request."
)
CACHED_TOKENS = _histogram(
    "request_cached_tokens", (0, *_TOKENS), "Prompt tokens of a request that were cached."
)
COMPUTED_TOKENS = _histogram(
    "request_prefill_kv_computed_tokens",
    (0, *_TOKENS),
    "Prompt tokens of a request that were computed, those of the prefix cache left out.",
)
PARAM_N = _histogram("request_params_n", _SAMPLES, "Samples that a request asks for.")
PARAM_MAX_TOKENS = _histogram(
    "request_params_max_tokens", _TOKENS, "Most tokens that a sample of a request may have."
)
REQUESTS = (
    *(SUCCESS, TIME_TO_FIRST_TOKEN, INTER_TOKEN, QUEUE_TIME, PREFILL_TIME, DECODE_TIME),
    *(INFERENCE_TIME, TIME_PER_TOKEN, END_TO_END, PROMPT_TOKENS, GENERATION_TOKENS),
    *(LONGEST_SAMPLE, CACHED_TOKENS, COMPUTED_TOKENS, PARAM_N, PARAM_MAX_TOKENS),
)

# ---- the HTTP server

EVENT_LOOP_LAG = _histogram(
    "event_loop_lag_seconds", _LAG_SECONDS, "How late timers of the event loop fire."
)
HTTP_REQUESTS = MetricFamily(
    "http_requests",
    "counter",
    "HTTP requests answered, by route, method and status; 499 when the client left.",
    ("handler", "method", "status", "code"),
    prefixed=False,
)
HTTP_SECONDS = MetricFamily(
    "http_request_duration_seconds",
    "histogram",
    "From the head of an HTTP request to the end of its answer, streams included.",
    ("handler", "method"),
    _HTTP_SECONDS,
    prefixed=False,
)

SECTIONS: dict[str, tuple[MetricFamily, ...]] = {
    "Requests": REQUESTS,
    "Engine": (
        *(ENGINE_UP, KV_USAGE, CACHE_CONFIG, WAITING_REASONS, ITERATION_TOKENS),
        *(PROMPT_MODALITIES, PROMPT_SOURCES, *(row.family for row in ENGINE_ROWS)),
    ),
    "Media": (
        *(family for family, _ in STAGE_UNITS),
        MEDIA_FAILURES,
        *(row.family for row in MEDIA_ROWS),
    ),
    "HTTP server": (HTTP_REQUESTS, HTTP_SECONDS, EVENT_LOOP_LAG),
}
"""All families, as ``docs/metrics.md`` groups them."""

FAMILIES = tuple(family for section in SECTIONS.values() for family in section)
