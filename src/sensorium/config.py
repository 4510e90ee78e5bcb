"""Configuration: small frozen classes, each value checked when built.

Every field is at once a keyword of ``LLM``, a flag of ``sensorium serve`` (``max_model_len`` is ``--max-model-len``), a
line of its help and a row of the documentation. ``engine_config(**keywords)`` distributes flat keywords over the
classes and refuses unknown ones with a suggestion.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_args

from sensorium.environment import media_environment
from sensorium.errors import ConfigError

GIB = 1 << 30
MIB = 1 << 20
LIMITED = ("image", "video", "audio")
"""Keys of ``limit_mm_per_prompt``."""

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
Runner = Literal["auto", "generate", "pooling"]
Convert = Literal["auto", "none", "embed"]
ContentFormat = Literal["auto", "string", "openai"]


def option(default: Any, help: str, *, factory: bool = False) -> Any:
    """A configuration field with its help text."""
    if factory:
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    model: str = option("demo", "Hugging Face id, local folder, or 'demo'.")
    tokenizer: str | None = option(None, "Tokenizer id or folder, when not the model's.")
    trust_remote_code: bool = option(
        False, "Accepted for compatibility; no code from a checkpoint is ever executed."
    )
    dtype: Dtype = option("auto", "Type of weights and activations; auto takes the checkpoint's.")
    device: str = option("auto", "cpu, cuda, cuda:N, or auto: a GPU when there is one.")
    seed: int = option(0, "Seed of random weights and of unseeded sampling.")
    revision: str | None = option(None, "Branch, tag or commit on the hub.")
    load_format: LoadFormat = option("auto", "dummy makes random weights in the right shapes.")
    hf_overrides: dict[str, Any] = option(
        dict, "Values that replace those of config.json.", factory=True
    )
    max_model_len: int | None = option(
        None, "Longest prompt and answer together, in tokens; the model's own when not given."
    )
    quantization: str | None = option(None, "No quantization method is available yet: leave unset.")
    enforce_eager: bool = option(False, "Accepted for compatibility: no graphs are captured.")
    num_threads: int | None = option(
        None,
        "CPU threads of the engine; when not given all cores, or one for a very small decoder.",
    )
    runner: Runner = option(
        "auto",
        "generate makes text, pooling makes vectors; auto is generate unless the checkpoint is an embedding model.",
    )
    convert: Convert = option(
        "auto",
        "How a model is adapted for its runner; embed makes vectors of any model's hidden states.",
    )
    task: str | None = option(None, "Older spelling of the choice of runner: generate or embed.")
    chat_template: str | None = option(None, "Chat template: a file, or the template's text.")
    chat_template_content_format: ContentFormat = option(
        "auto", "Whether the template takes content as a string or as parts (openai)."
    )
    interleave_mm_strings: bool = option(
        False, "With templates that take strings: put placeholders where the parts stand."
    )

    def __post_init__(self) -> None:
        _check_types(self)
        _non_empty("model", self.model)
        _choice("dtype", self.dtype, get_args(Dtype))
        _choice("load_format", self.load_format, get_args(LoadFormat))
        _choice("runner", self.runner, get_args(Runner))
        _choice("convert", self.convert, get_args(Convert))
        _choice(
            "chat_template_content_format",
            self.chat_template_content_format,
            get_args(ContentFormat),
        )
        _integer("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        if self.max_model_len is not None:
            _integer("max_model_len", self.max_model_len, 1, 1 << 31)
        if self.num_threads is not None:
            _integer("num_threads", self.num_threads, 1, 1024)
        if self.quantization is not None:
            _bad("quantization", f"{self.quantization!r} is not available; leave it unset")
        if self.task is not None:
            _choice("task", self.task, ("generate", "embed", "embedding"))
            warnings.warn(
                "task is the older spelling: use runner='generate' or runner='pooling'",
                DeprecationWarning,
                stacklevel=4,
            )
            meant = "generate" if self.task == "generate" else "pooling"
            if self.runner not in ("auto", meant):
                _bad("task", f"{self.task!r} does not go with runner={self.runner!r}")
            object.__setattr__(self, "runner", meant)
        if self.convert == "embed":
            if self.runner == "generate":
                _bad("convert", "'embed' makes vectors: it does not go with runner='generate'")
            object.__setattr__(self, "runner", "pooling")
        if not isinstance(self.hf_overrides, dict):
            _bad("hf_overrides", f"must be a mapping, got {self.hf_overrides!r}")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Memory for keys and values, and for media."""

    block_size: int = option(32, "Tokens of one block of the KV cache.")
    enable_prefix_caching: bool = option(
        True, "Reuse the KV of prompts that begin alike (text and media)."
    )
    gpu_memory_utilization: float = option(0.9, "Part of a GPU's memory that may be used.")
    kv_cache_memory_bytes: int | None = option(
        None, "Bytes for the KV cache; computed from the memory there is when not given."
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
        _check_types(self)
        _integer("block_size", self.block_size, 1, 1024)
        _number("gpu_memory_utilization", self.gpu_memory_utilization, 0.01, 1.0)
        _number("mm_processor_cache_gb", self.mm_processor_cache_gb, 0.0, 1 << 20)
        _number("mm_encoder_cache_gb", self.mm_encoder_cache_gb, 0.001, 1 << 20)
        if self.kv_cache_memory_bytes is not None:
            _integer("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, 1 << 50)
        if self.num_kv_blocks is not None:
            _integer("num_kv_blocks", self.num_kv_blocks, 1, 1 << 40)


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
        1024, "Most requests waiting in a server; past it, 503 with Retry-After."
    )

    def __post_init__(self) -> None:
        _check_types(self)
        _integer("max_num_seqs", self.max_num_seqs, 1, 65536)
        if self.max_num_batched_tokens is not None:
            _integer("max_num_batched_tokens", self.max_num_batched_tokens, 1, 1 << 24)
        _integer("max_num_waiting", self.max_num_waiting, 1, 1 << 24)


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """Limits and rules for images, videos and sounds."""

    limit_mm_per_prompt: dict[str, Any] = option(
        dict,
        'Most items per prompt, such as {"image": 2} or image=2; 0 switches a modality off.',
        factory=True,
    )
    mm_processor_kwargs: dict[str, Any] = option(
        dict, 'Options of the model\'s processor, such as {"max_pixels": 1003520}.', factory=True
    )
    media_io_kwargs: dict[str, dict[str, Any]] = option(
        dict,
        'Options of loading, such as {"image": {"rgba_background_color": [255, 255, 255]}}.',
        factory=True,
    )
    enable_mm_embeds: bool = option(False, "Accept precomputed embeddings as input.")
    allowed_local_media_path: str = option(
        "", "Folder below which file: URLs and local paths may be read; none when empty."
    )
    allowed_media_domains: tuple[str, ...] = option(
        (), "Hosts that may be fetched from; any public host when empty."
    )
    media_url_allow_redirects: bool = option(True, "Follow redirects of media URLs (at most 5).")
    image_fetch_timeout: float = option(5.0, "Seconds for the whole download of an image.")
    video_fetch_timeout: float = option(30.0, "Seconds for the whole download of a video.")
    audio_fetch_timeout: float = option(10.0, "Seconds for the whole download of a sound.")
    max_media_bytes: int = option(256 * MIB, "Most bytes of one download.")
    max_request_media_bytes: int = option(256 * MIB, "Most bytes of all downloads of a request.")
    max_image_pixels: int = option(178_956_970, "Most pixels of one image.")
    max_video_frames: int = option(
        36_000, "Most frames of one video that are decoded to get at those that are sampled."
    )
    max_video_pixels: int = option(
        536_870_912, "Most pixels of the sampled frames of one video together."
    )
    max_audio_seconds: int = option(600, "Most seconds of one sound.")
    max_audio_decoded_bytes: int = option(
        256 * MIB, "Most bytes of one sound when it is decoded, all its channels together."
    )
    max_items_per_request: int = option(256, "Most media items of one request.")
    num_media_workers: int | None = option(
        None, "Workers that decode and preprocess; one per core, at most 8, when not given."
    )

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("image_fetch_timeout", "video_fetch_timeout", "audio_fetch_timeout"):
            _number(name, getattr(self, name), 0.001, 3600.0)
        for name in (
            "max_media_bytes",
            "max_request_media_bytes",
            "max_image_pixels",
            "max_video_frames",
            "max_video_pixels",
            "max_audio_seconds",
            "max_audio_decoded_bytes",
            "max_items_per_request",
        ):
            _integer(name, getattr(self, name), 1, 1 << 50)
        if self.num_media_workers is not None:
            _integer("num_media_workers", self.num_media_workers, 1, 256)
        _limits("limit_mm_per_prompt", self.limit_mm_per_prompt)
        for name in ("mm_processor_kwargs", "media_io_kwargs"):
            if not isinstance(getattr(self, name), dict):
                _bad(name, f"must be a mapping, got {getattr(self, name)!r}")

    def fetch_timeout(self, modality: str) -> float:
        """Seconds that the download of an item of this modality may take."""
        return float(getattr(self, f"{modality}_fetch_timeout"))

    def limit(self, modality: str) -> int | None:
        """Most items of a modality in one prompt; None when there is no limit of its own."""
        value = self.limit_mm_per_prompt.get(modality)
        return value.get("count") if isinstance(value, dict) else value

    def max_sampled_frames(self) -> int | None:
        """Most frames that are sampled of one video; None when ``limit_mm_per_prompt`` sets no limit."""
        value = self.limit_mm_per_prompt.get("video")
        return value.get("num_frames") if isinstance(value, dict) else None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """More than one device or process."""

    tensor_parallel_size: int = option(
        1, "Devices that share one model; only 1 is available so far."
    )
    data_parallel_size: int = option(1, "Replicas of the model; only 1 is available so far.")

    def __post_init__(self) -> None:
        _integer("tensor_parallel_size", self.tensor_parallel_size, 1, 1)
        _integer("data_parallel_size", self.data_parallel_size, 1, 1)


@dataclass(frozen=True, kw_only=True)
class ObservabilityConfig:
    """What is written about the running engine."""

    disable_log_stats: bool = option(False, "Do not log throughput.")
    log_stats_interval: float = option(10.0, "Seconds between two lines of throughput.")

    def __post_init__(self) -> None:
        _check_types(self)
        _number("log_stats_interval", self.log_stats_interval, 0.1, 86400.0)


@dataclass(frozen=True, kw_only=True)
class OlderConfig:
    """Spellings of the field's early days: checked against the model, which knows them itself, and then unused."""

    image_input_type: str | None = option(
        None, "Older: pixel_values or image_features; checked, then unused."
    )
    image_token_id: int | None = option(
        None, "Older: id of the image token; checked against the model, then unused."
    )
    image_input_shape: str | None = option(
        None, "Older: such as 1,3,336,336; checked against the model, then unused."
    )
    image_feature_size: int | None = option(
        None, "Older: embeddings per image; checked against the model, then unused."
    )

    def __post_init__(self) -> None:
        if isinstance(self.image_input_shape, list | tuple):
            text = ",".join(map(str, self.image_input_shape))
            object.__setattr__(self, "image_input_shape", text)
        _check_types(self)
        if self.image_input_type is not None:
            kinds = ("pixel_values", "image_features")
            _choice("image_input_type", self.image_input_type.lower(), kinds)
        for name in ("image_token_id", "image_feature_size"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, 1 << 31)
        if self.image_input_shape is not None:
            self.shape()
        for name in self.given():
            warnings.warn(
                f"{name} is an older spelling: the model's own configuration says it, leave it out",
                DeprecationWarning,
                stacklevel=4,
            )

    def given(self) -> list[str]:
        """Names of those that are set."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]

    def shape(self) -> tuple[int, ...]:
        """``image_input_shape`` in numbers. Raises ConfigError."""
        text = self.image_input_shape or ""
        parts = [part.strip() for part in text.strip("()[]").split(",")]
        if len(parts) not in (3, 4) or not all(
            p.isdecimal() and 0 < int(p) < 1 << 16 for p in parts
        ):
            _bad(
                "image_input_shape",
                f"must be three or four sizes such as 1,3,336,336, got {text!r}",
            )
        return tuple(map(int, parts))


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that an engine needs; built once by ``engine_config`` and then only read."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    media: MediaConfig = field(default_factory=MediaConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    observability: ObservabilityConfig = field(default_factory=ObservabilityConfig)
    older: OlderConfig = field(default_factory=OlderConfig)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP server."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    served_model_name: tuple[str, ...] = option(
        (), "Names under which clients know the model; its path or id when not given."
    )
    api_key: tuple[str, ...] = option((), "Keys that clients must send; repeatable.")
    metrics_require_api_key: bool = option(True, "Guard /metrics by the API key too.")
    metrics_prefix: str = option("sensorium:", "Prefix of metric names.")
    allowed_origins: tuple[str, ...] = option((), "CORS: origins that may call; none when empty.")
    allowed_methods: tuple[str, ...] = option(("*",), "CORS: methods.")
    allowed_headers: tuple[str, ...] = option(("*",), "CORS: headers.")
    allow_credentials: bool = option(False, "CORS: allow credentials.")
    root_path: str = option("", "Path prefix when behind a proxy.")
    ssl_certfile: str | None = option(None, "TLS certificate file.")
    ssl_keyfile: str | None = option(None, "TLS key file.")
    max_body_bytes: int = option(128 * MIB, "Most bytes of the body of a request.")
    trust_request_chat_template: bool = option(
        False, "Accept chat templates that come with a request."
    )
    shutdown_timeout: float = option(30.0, "Seconds that running requests get at shutdown.")
    log_level: str = option("info", "debug, info, warning or error.")
    disable_access_log: bool = option(False, "Do not log each request.")

    def __post_init__(self) -> None:
        _check_types(self)
        _non_empty("host", self.host)
        _integer("port", self.port, 0, 65535)
        _integer("max_body_bytes", self.max_body_bytes, 1, 1 << 40)
        _number("shutdown_timeout", self.shutdown_timeout, 0.0, 86400.0)
        _choice("log_level", self.log_level, ("debug", "info", "warning", "error"))
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            _bad("ssl_certfile", "and ssl_keyfile go together: give both or none")
        if any(not key for key in self.api_key):
            _bad("api_key", "must not be empty")


ENGINE_SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "media": MediaConfig,
    "parallel": ParallelConfig,
    "observability": ObservabilityConfig,
    "older": OlderConfig,
}


def engine_config(**keywords: Any) -> EngineConfig:
    """Build an ``EngineConfig`` of flat keywords, with the environment's values where a keyword is not given.

    Raises ConfigError for an unknown keyword (with the nearest known one) and for values out of their range.
    """
    keywords = {**media_environment(), **keywords}
    sections: dict[str, Any] = {}
    for section, cls in ENGINE_SECTIONS.items():
        names = {f.name for f in dataclasses.fields(cls)}
        sections[section] = cls(**{k: keywords.pop(k) for k in list(keywords) if k in names})
    if keywords:
        name = next(iter(keywords))
        raise ConfigError(
            f"Unknown keyword {name!r}.{suggestion(name, engine_option_names())}", param=name
        )
    return EngineConfig(**sections)


def engine_option_names() -> list[str]:
    """Names of all flat engine keywords."""
    return [f.name for cls in ENGINE_SECTIONS.values() for f in dataclasses.fields(cls)]


def suggestion(name: str, known: list[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def parse_limits(text: str) -> dict[str, Any]:
    """``image=2,video=1`` (older) or a JSON object, for ``--limit-mm-per-prompt``."""
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except ValueError as error:
            _bad("limit_mm_per_prompt", f"is not valid JSON: {error}")
        return dict(value)
    limits: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, count = part.partition("=")
        if not equals or not count.strip().isdecimal():
            _bad("limit_mm_per_prompt", f"must look like image=2,video=1 or be JSON, got {text!r}")
        limits[name.strip()] = int(count)
    return limits


def _limits(name: str, value: object) -> None:
    if not isinstance(value, dict):
        _bad(name, f"must be a mapping such as {{'image': 2}}, got {value!r}")
    for modality, limit in value.items():
        _choice(name, modality, LIMITED)
        if isinstance(limit, dict):
            for key, number in limit.items():
                _choice(
                    f"{name}[{modality!r}]",
                    key,
                    ("count", "num_frames", "width", "height", "length"),
                )
                least = 1 if key == "num_frames" else 0
                _integer(f"{name}[{modality!r}][{key!r}]", number, least, 1 << 31)
        else:
            _integer(f"{name}[{modality!r}]", limit, 0, 1 << 31)


def _bad(name: str, what: str) -> NoReturn:
    raise ConfigError(f"{name} {what}.", param=name)


def _check_types(config: Any) -> None:
    """Switches, texts and lists of texts must be just that; a list becomes a tuple. Numbers are checked elsewhere."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.type == "bool" and not isinstance(value, bool):
            _bad(f.name, f"must be true or false, got {value!r}")
        is_text = isinstance(value, str) or (value is None and f.type == "str | None")
        if f.type in ("str", "str | None") and not is_text:
            _bad(f.name, f"must be a text, got {value!r}")
        if f.type == "tuple[str, ...]":
            if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
                _bad(f.name, f"must be a list of texts, got {value!r}")
            object.__setattr__(config, f.name, tuple(value))


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        _bad(name, f"must be one of {', '.join(choices)}, got {value!r}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        _bad(name, f"must be an integer, got {value!r}")
    if not low <= value <= high:
        _bad(name, f"must be between {low} and {high}, got {value}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _bad(name, f"must be a number, got {value!r}")
    if not low <= value <= high:
        _bad(name, f"must be between {low:g} and {high:g}, got {value:g}")


def _non_empty(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        _bad(name, f"must be a non-empty string, got {value!r}")
