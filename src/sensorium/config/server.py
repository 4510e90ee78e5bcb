"""Options of the HTTP server."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from sensorium.config.fields import (
    MIB,
    bad,
    check_choice,
    check_fields,
    check_non_empty,
    option,
)
from sensorium.environment import LOG_LEVELS

_RANGE = re.compile(r"\d{1,5}:\d{1,5}")
_MOST_REPLICAS = 1 << 16
MAX_UDS_BYTES = 107
"""Bytes of the path of a Unix domain socket on Linux."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP server."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 selects a free one.", ge=0, le=65535)
    uds: str | None = option(
        None, "Path of a Unix domain socket to listen on, instead of host and port."
    )
    served_model_name: tuple[str, ...] = option(
        (), "Names of the model in the API; its path or id if not given."
    )
    on_demand: bool = option(
        False,
        "Start the engine of a model with the first request that names it, not with the server.",
    )
    model_idle_timeout: float = option(
        0.0,
        "Seconds without a request after which the engine of a model is ended, until the next "
        "request starts it again; 0: never.",
        ge=0.0,
        le=366 * 86400.0,
    )
    models_memory_gb: float | None = option(
        None,
        "GiB of memory that the engines of several models may take together; 90 % of what is "
        "available at the start if unset. Where it is full, idle models are ended to make room.",
        ge=0.1,
        le=1 << 20,
    )
    api_key: tuple[str, ...] = option(
        (),
        "Keys that clients must send; repeatable. SENSORIUM_API_KEY, or else VLLM_API_KEY or "
        "APHRODITE_API_KEY, adds one. Without any key all requests are accepted.",
    )
    metrics_require_api_key: bool = option(True, "Require the API key for /metrics, too.")
    metrics_prefix: str = option("sensorium:", "Prefix of metric names.")
    allowed_origins: tuple[str, ...] = option((), "CORS: allowed origins; none if empty.")
    allowed_methods: tuple[str, ...] = option(("*",), "CORS: allowed methods.")
    allowed_headers: tuple[str, ...] = option(("*",), "CORS: allowed headers.")
    allow_credentials: bool = option(False, "CORS: allow credentials.")
    root_path: str = option("", "Path prefix when behind a proxy.")
    ssl_certfile: str | None = option(None, "TLS certificate file.")
    ssl_keyfile: str | None = option(None, "TLS key file.")
    allow_runtime_lora_updating: bool = option(
        False,
        "Let requests load and unload LoRA adapters at /v1/load_lora_adapter and "
        "/v1/unload_lora_adapter. Needs --enable-lora, --allowed-lora-path and an API key.",
    )
    allowed_lora_path: tuple[str, ...] = option(
        (), "Folders below which requests may load LoRA adapters from; none if empty."
    )
    playground: bool = option(
        True,
        "Serve the playground at /, a page to chat with the model and to watch the server. The "
        "page itself needs no API key; all that it asks the server for does.",
    )
    max_body_bytes: int = option(
        128 * MIB, "Maximum number of bytes of a request's body.", ge=1, le=1 << 40
    )
    max_body_values: int = option(
        1 << 21,
        "Maximum number of values (numbers, strings, arrays, objects) in a request's body, counted "
        "by commas and opening brackets.",
        ge=1,
        le=1 << 40,
    )
    response_store_entries: int = option(
        1024,
        "Maximum number of stored responses of /v1/responses; 0 stores none.",
        ge=0,
        le=1 << 20,
    )
    response_store_bytes: int = option(
        256 * MIB, "Maximum number of bytes of stored responses.", ge=0, le=1 << 40
    )
    response_store_seconds: float = option(
        86400.0, "Seconds for which a response is stored.", ge=1.0, le=366 * 86400.0
    )
    file_folder: str = option(
        "",
        "Folder in which a private one for uploaded files is made, which goes when the server "
        "ends; the system's folder of temporary files if empty.",
    )
    max_file_bytes: int = option(
        512 * MIB, "Maximum number of bytes of one uploaded file.", ge=1, le=1 << 50
    )
    max_stored_file_bytes: int = option(
        4096 * MIB, "Maximum number of bytes of all uploaded files.", ge=1, le=1 << 50
    )
    max_stored_files: int = option(1000, "Maximum number of uploaded files.", ge=0, le=1 << 20)
    max_file_age: float = option(
        86400.0,
        "Seconds after which an uploaded file is deleted, at the latest.",
        ge=1.0,
        le=365 * 86400.0,
    )
    max_batches: int = option(
        100, "Maximum number of batches that are remembered, running or ended.", ge=0, le=1 << 20
    )
    max_batch_lines: int = option(
        100_000, "Maximum number of lines of the input of a batch.", ge=1, le=1 << 30
    )
    max_batch_requests: int | None = option(
        None,
        "Maximum number of requests of batches that run at a time; half of --max-num-seqs if "
        "unset.",
        ge=1,
        le=1 << 20,
    )
    trust_request_chat_template: bool = option(
        False, "Accept chat templates that come with a request."
    )
    default_chat_template_kwargs: dict[str, Any] = option(
        dict,
        "Variables of the chat template for requests that do not set them, such as "
        '{"enable_thinking": false}.',
        factory=True,
    )
    tool_call_parser: str = option(
        "auto",
        "Form in which the model writes tool calls, such as hermes, llama3_json or mistral; "
        "auto finds it out, any reads all forms, none reads no calls.",
    )
    reasoning_parser: str = option(
        "auto",
        "Form in which the model writes its reasoning, such as qwen3, deepseek_r1 or mistral; auto "
        "finds it out, none leaves it in the content.",
    )
    enable_force_include_usage: bool = option(
        False,
        "Send usage with every chunk of a stream and at its end, also where the request does not "
        "ask for it.",
    )
    ray_address: str | None = option(
        None,
        "Ray cluster that replicas run on: auto or HOST:PORT. If unset, "
        "--data-parallel-size and --autoscale start Ray on this machine alone, until the server "
        "ends.",
    )
    ray_application: str = option(
        "sensorium",
        "Name of the application on the Ray cluster. One of the same name is updated in place, "
        "replica by replica.",
    )
    autoscale: str | None = option(
        None,
        "Least and most replicas, such as 1:8, in place of --data-parallel-size: their number "
        "follows the waiting sequences and the use of KV caches.",
    )
    shared_embeddings_gb: float = option(
        0.25,
        "Memory in GiB of Ray's object store for embeddings of media that replicas share: what one "
        "has encoded, no other encodes again. 0: each encodes for itself.",
        ge=0.0,
        le=float(1 << 20),
    )
    encoder_replicas: int = option(
        0,
        "Number of replicas that encode media apart from the engines, so that long videos do not "
        "hold up the answers of others. 0: engines encode media themselves. Runs on Ray.",
        ge=0,
        le=1 << 12,
    )
    encoder_gpus: float | None = option(
        None,
        "GPUs that each replica of --encoder-replicas reserves where engines run on GPUs, such as "
        "0.5, so that two share one. By default 1.",
        ge=0.0,
        le=64.0,
    )
    api_server_count: int = option(
        1,
        "Number of processes that answer HTTP requests in front of the replicas. With several, "
        "none of them stores files, batches or responses.",
        ge=1,
        le=1 << 12,
    )
    shutdown_timeout: float = option(
        30.0, "Seconds for running requests to finish at shutdown.", ge=0.0, le=86400.0
    )
    log_level: str | None = option(
        None, "debug, info, warning or error; by default SENSORIUM_LOG_LEVEL, else info."
    )
    disable_access_log: bool = option(False, "Do not log requests.")

    def __post_init__(self) -> None:
        """Check the values. Raises ConfigError."""
        check_fields(self)
        check_non_empty("host", self.host)
        if self.log_level is not None:
            check_choice("log_level", self.log_level, LOG_LEVELS)
        if self.uds is not None and len(os.fsencode(self.uds)) not in range(1, MAX_UDS_BYTES + 1):
            bad("uds", f"must be a path of 1 to {MAX_UDS_BYTES} bytes")
        self.check_replicas()
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            bad("ssl_certfile", "and ssl_keyfile go together: give both or none")
        if any(not key for key in self.api_key):
            bad("api_key", "must not be empty")
        if self.allow_runtime_lora_updating:
            for name, flag in (("api_key", "an API key"), ("allowed_lora_path", "folders")):
                if not getattr(self, name):
                    where = f"--{name.replace('_', '-')}"
                    bad("allow_runtime_lora_updating", f"needs {flag}: {where}")

    def check_replicas(self) -> None:
        """Check what is said of replicas. Raises ConfigError."""
        check_non_empty("ray_application", self.ray_application)
        if self.ray_address is not None:
            check_non_empty("ray_address", self.ray_address)
        if self.encoder_gpus is not None and not self.encoder_replicas:
            bad("encoder_gpus", "is for --encoder-replicas, which is 0")
        if self.autoscale is not None and not _RANGE.fullmatch(self.autoscale):
            bad("autoscale", "must be two numbers of replicas, such as 1:8")
        least, most = self.replica_range or (1, 1)
        if not 1 <= least <= most <= _MOST_REPLICAS:
            bad("autoscale", f"must be 1 or more, then no less, up to {_MOST_REPLICAS}")

    @property
    def replica_range(self) -> tuple[int, int] | None:
        """Return the least and the most replicas of ``autoscale``; None where it is not given."""
        if self.autoscale is None:
            return None
        least, most = self.autoscale.split(":")
        return int(least), int(most)

    def share_of(self, most: int) -> int:
        """Return how much of a limit one tenant may use: half of it with several API keys."""
        return most if len(set(self.api_key)) < 2 else (most + 1) // 2
