"""Table of all metrics: name without the prefix, kind, labels and help text.

Names are vLLM's where it has the metric, so that its dashboards work with ``--metrics-prefix
vllm:``. The metrics of HTTP have no prefix: they have the names that dashboards for FastAPI expect.
``docs/metrics.md`` is generated from this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sensorium import errors

Kind = Literal["gauge", "counter", "histogram"]

COMMON_LABELS = ("model_name", "engine")
"""``engine`` is the index of the engine, as in vLLM, or the id of a replica."""
ENGINE = "0"  # a model's only engine; also what belongs to none of several replicas
SERVER = "server"
"""Label of the process for HTTP, where several answer for one another."""


@dataclass(frozen=True, slots=True)
class MetricFamily:
    """One metric.

    ``name`` has no prefix and, of a counter, no ``_total``. ``labels`` are those besides
    ``COMMON_LABELS``, which all metrics have.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    prefixed: bool = True

    def __post_init__(self) -> None:
        if (self.kind == "histogram") != bool(self.buckets):
            raise ValueError(f"histograms have buckets, and other metrics have none: {self.name}")

    def full_name(self, prefix: str) -> str:
        """Return the name with its prefix, if any; of a counter without ``_total``."""
        return prefix + self.name if self.prefixed else self.name

    @property
    def series(self) -> tuple[str, ...]:
        """Names of the scraped series, without the prefix."""
        if self.kind == "counter":
            return (f"{self.name}_total",)
        if self.kind == "histogram":
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


@dataclass(frozen=True, slots=True)
class Row:
    """A metric of one number: the field ``field`` of the statistics, or of their ``media``."""

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
    _gauge(
        "engine_ranks",
        "num_ranks",
        "Processes that compute the model together (--tensor-parallel-size); 0 while none runs.",
    ),
    _gauge("num_requests_running", "num_running", "Sequences being computed."),
    _gauge("num_requests_waiting", "num_waiting", "Sequences waiting to be scheduled."),
    _gauge("mm_held_requests", "held_features", "Requests whose media the engine holds in memory."),
    _counter("num_preemptions", "num_preemptions", "Sequences preempted."),
    _counter("engine_steps", "num_steps", "Steps of the engine."),
    _counter("engine_restarts", "num_engine_restarts", "Restarts of the engine after it had died."),
    _counter(
        "prompt_tokens",
        "prompt_tokens",
        "Prompt tokens of admitted requests, cached ones included; counted for each sample.",
    ),
    _counter("generation_tokens", "generation_tokens", "Tokens generated."),
    _counter(
        "spec_decode_num_drafts",
        "num_drafts",
        "Steps of a sequence that tried tokens beside the next one (--speculative).",
    ),
    _counter("spec_decode_num_draft_tokens", "num_draft_tokens", "Tokens tried."),
    _counter("spec_decode_num_accepted_tokens", "num_accepted_tokens", "Tried tokens accepted."),
    _counter("vectors", "num_embeddings", "Embeddings computed."),
    _counter(
        "model_output_not_finite",
        "num_unusable",
        "Sequences ended because the output of the model or of an encoder was infinite, NaN or "
        "constant.",
    ),
    _counter(
        "prompt_tokens_cached",
        "prefix_hits",
        "Prompt tokens taken from the prefix cache.",
    ),
    _counter(
        "prefix_cache_queries", "prefix_queries", "Prompt tokens looked up in the prefix cache."
    ),
    _counter("prefix_cache_hits", "prefix_hits", "Prompt tokens found in the prefix cache."),
    _counter(
        "mm_encoder_cache_queries", "encoder_queries", "Items looked up in the encoder cache."
    ),
    _counter("mm_encoder_cache_hits", "encoder_hits", "Items found in the encoder cache."),
    _counter(
        "mm_encoder_cache_evictions", "encoder_evictions", "Items evicted from the encoder cache."
    ),
    _gauge(
        "mm_encoder_cache_resident_embeds",
        "encoder_resident_embeds",
        "Embeddings in the encoder cache.",
    ),
    _gauge("mm_encoder_cache_bytes", "encoder_num_bytes", "Bytes of the encoder cache."),
    _gauge(
        "mm_encoder_cache_capacity_bytes",
        "encoder_capacity_bytes",
        "Maximum bytes of the encoder cache (--mm-encoder-cache-gb).",
    ),
    _counter("mm_encoder_items", "encoder_items", "Items encoded, or received as embeddings."),
    _counter("mm_encoder_failures", "encode_failures", "Items that could not be encoded."),
)
ENGINE_UP = MetricFamily("engine_up", "gauge", "1 while requests can be served, else 0.")
SLEEP_STATE = MetricFamily(
    "engine_sleep_state",
    "gauge",
    "1 for the state awake while requests can be served, without series else. Other states, "
    "of vLLM, are 0.",
    ("sleep_state",),
)
KV_USAGE = MetricFamily("kv_cache_usage_perc", "gauge", "Fraction of the KV cache in use, 0 to 1.")
PROMPT_MODALITIES = MetricFamily(
    "prompt_tokens_by_modality",
    "counter",
    "Prompt tokens of admitted requests, by modality: text, image, video or audio.",
    ("modality",),
)

PROMPT_SOURCES = MetricFamily(
    "prompt_tokens_by_source",
    "counter",
    "Prompt tokens of started sequences, by source of their keys and values: local_compute or "
    "local_cache_hit.",
    ("source",),
)
ACCEPTED_AT = MetricFamily(
    "spec_decode_num_accepted_tokens_per_pos",
    "counter",
    "Tried tokens accepted, by their position among those that were tried together, from 0.",
    ("position",),
)
WAITING_REASONS = MetricFamily(
    "num_requests_waiting_by_reason",
    "gauge",
    "Sequences waiting, by reason: capacity (of a step or of the cache) or deferred (until their "
    "grammar is compiled).",
    ("reason",),
)
ITERATION_TOKENS = _histogram(
    "iteration_tokens_total",
    (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "Tokens per step that generated any: generated tokens, and all prompt tokens of completed "
    "prefills, cached ones included.",
)
CACHE_CONFIG = MetricFamily(
    "cache_config_info",
    "gauge",
    "Always 1; the labels describe the KV cache.",
    ("block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching"),
)

LORA_INFO = MetricFamily(
    "lora_requests_info",
    "gauge",
    "Time of the scrape, in seconds since 1970. The labels are the names of the LoRA adapters "
    "whose sequences are computed or wait, separated by commas, and the maximum number that are "
    "loaded (--max-loras). Only with --enable-lora, as the two below.",
    ("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
)
LORA_ROWS = (
    _gauge("lora_bytes", "lora_num_bytes", "Bytes of the LoRA adapters that are loaded."),
    _gauge(
        "lora_capacity_bytes",
        "lora_capacity_bytes",
        "Maximum bytes of the LoRA adapters (--max-lora-memory-gb).",
    ),
)

# ---- numbers of the media pipeline

MEDIA_ROWS = (
    _counter(
        "mm_cache_queries",
        "processor_cache_queries",
        "Items looked up in the cache of preprocessed media.",
    ),
    _counter(
        "mm_cache_hits", "processor_cache_hits", "Items found in the cache of preprocessed media."
    ),
    _counter(
        "mm_cache_evictions",
        "processor_cache_evictions",
        "Items evicted from the cache of preprocessed media.",
    ),
    _gauge(
        "mm_cache_entries",
        "processor_cache_num_entries",
        "Items in the cache of preprocessed media.",
    ),
    _gauge(
        "mm_cache_bytes", "processor_cache_num_bytes", "Bytes of the cache of preprocessed media."
    ),
    _gauge(
        "mm_cache_capacity_bytes",
        "processor_cache_capacity_bytes",
        "Maximum bytes of the cache of preprocessed media (--mm-processor-cache-gb).",
    ),
    _counter("media_downloads", "downloads_num_requests", "Files requested by URL or path."),
    _counter(
        "media_downloads_reused",
        "downloads_num_reused",
        "Files taken from a recent download (--media-url-reuse-seconds).",
    ),
    _counter(
        "media_download_cache_hits",
        "downloads_num_cached",
        "Files taken from the cache of downloads (--media-download-cache).",
    ),
    _gauge("media_loading", "num_loading", "Items being fetched, decoded or preprocessed."),
    _gauge("media_waiting", "num_waiting", "Items waiting for a media worker."),
    _gauge("media_workers_busy", "num_busy", "Media workers that process an item."),
    _counter(
        "media_worker_restarts",
        "num_worker_restarts",
        "Media workers replaced after they had died or been killed at a limit.",
    ),
)
STAGES = ("fetch", "decode", "preprocess", "encode")
ENGINE_STAGES = STAGES[3:]
"""The others are of the process that loads media."""
STAGE_UNITS = (
    (
        MetricFamily("media_stage_items", "counter", "Items that passed a stage.", ("stage",)),
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
            "Bytes of the output of a stage: files, decoded arrays, features, embeddings.",
            ("stage",),
        ),
        "num_bytes",
    ),
)
"""Families of the stages, with the suffix of their numbers in ``media``: ``fetch_count``,
``decode_seconds`` and so on. Those of ``encode`` come from the engine."""

FAILURE = "failure_"
"""Prefix of the names of failures in ``media``; the error's code follows."""
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
"""Codes that are exported from the start, with 0; others when they occur."""

# ---- requests

_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 120.0),
)
_REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0)
_LAG_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 1.0)
_HTTP_SECONDS = (0.1, 0.5, 1.0, 5.0, 30.0)
"""Few, since there is a histogram for each route; inference has finer histograms of its own."""
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
_SAMPLES = (1, 2, 5, 10, 20, 50, 100)

FINISH_REASONS = ("stop", "length", "abort", "error")
SUCCESS = MetricFamily(
    "request_success",
    "counter",
    "Finished requests, by reason: stop (embeddings included), length, abort (the client "
    "disconnected), error. Of several samples the most severe reason counts.",
    ("finished_reason",),
)
MOST_ADAPTERS = 256
"""Names of adapters that become labels of a model; later ones count as ``OTHER_ADAPTERS``."""
OTHER_ADAPTERS = "other"
LORA_REQUESTS = MetricFamily(
    "lora_requests",
    "counter",
    "Finished requests, for whatever reason, by LoRA adapter; those of more than 256 names are "
    "other. Requests of the model alone are not among them.",
    ("lora_name",),
)
TIME_TO_FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds", _SECONDS, "Time from arrival to the first token."
)
INTER_TOKEN = _histogram(
    "inter_token_latency_seconds", _SECONDS, "Time between two tokens of a sample."
)
QUEUE_TIME = _histogram(
    "request_queue_time_seconds",
    _REQUEST_SECONDS,
    "Time from arrival to the first step, loading of media included.",
)
PREFILL_TIME = _histogram(
    "request_prefill_time_seconds",
    _REQUEST_SECONDS,
    "Time from the first step to the first token, or to the embedding.",
)
DECODE_TIME = _histogram(
    "request_decode_time_seconds", _REQUEST_SECONDS, "Time from the first token to the last."
)
INFERENCE_TIME = _histogram(
    "request_inference_time_seconds",
    _REQUEST_SECONDS,
    "Time from the first step to the last token.",
)
TIME_PER_TOKEN = _histogram(
    "request_time_per_output_token_seconds",
    _SECONDS,
    "Mean time between the tokens of a request that has at least two.",
)
END_TO_END = _histogram(
    "e2e_request_latency_seconds", _REQUEST_SECONDS, "Time from arrival to the end of a request."
)
PROMPT_TOKENS = _histogram("request_prompt_tokens", _TOKENS, "Prompt tokens of a request.")
GENERATION_TOKENS = _histogram(
    "request_generation_tokens", _TOKENS, "Tokens generated for a request, of all its samples."
)
LONGEST_SAMPLE = _histogram(
    "request_max_num_generation_tokens", _TOKENS, "Tokens of the longest sample of a request."
)
CACHED_TOKENS = _histogram(
    "request_cached_tokens",
    (0, *_TOKENS),
    "Prompt tokens of a request taken from the prefix cache.",
)
COMPUTED_TOKENS = _histogram(
    "request_prefill_kv_computed_tokens",
    (0, *_TOKENS),
    "Prompt tokens of a request that were computed, without those from the prefix cache.",
)
PARAM_N = _histogram("request_params_n", _SAMPLES, "Samples that a request asks for (n).")
PARAM_MAX_TOKENS = _histogram(
    "request_params_max_tokens",
    _TOKENS,
    "Maximum number of tokens that a sample of a request may have.",
)
REQUESTS = (
    *(SUCCESS, TIME_TO_FIRST_TOKEN, INTER_TOKEN, QUEUE_TIME, PREFILL_TIME, DECODE_TIME),
    *(INFERENCE_TIME, TIME_PER_TOKEN, END_TO_END, PROMPT_TOKENS, GENERATION_TOKENS),
    *(LONGEST_SAMPLE, CACHED_TOKENS, COMPUTED_TOKENS, PARAM_N, PARAM_MAX_TOKENS, LORA_REQUESTS),
)

# ---- the HTTP server

EVENT_LOOP_LAG = _histogram(
    "event_loop_lag_seconds",
    _LAG_SECONDS,
    "Lag of the HTTP server's event loop: delay of its timers.",
)
HTTP_REQUESTS = MetricFamily(
    "http_requests",
    "counter",
    "HTTP requests, by route, method and status; 499 when the client disconnected.",
    ("handler", "method", "status", "code"),
    prefixed=False,
)
HTTP_SECONDS = MetricFamily(
    "http_request_duration_seconds",
    "histogram",
    "Time from the headers of an HTTP request to the end of its answer, streams included.",
    ("handler", "method"),
    _HTTP_SECONDS,
    prefixed=False,
)

PROCESS_KINDS = ("server", "engine", "media", "other")
PROCESS_MEMORY = MetricFamily(
    "process_resident_memory_bytes",
    "gauge",
    "Resident memory by process: server (HTTP), engine, media (workers) or other; pages that "
    "several share count for each. model_name is empty.",
    ("process",),
)

SERVERS_MISSING = MetricFamily(
    "servers_missing",
    "gauge",
    "Processes for HTTP that did not reply in time: their metrics are not in this answer. Only "
    "with --api-server-count above 1; model_name is empty.",
)
