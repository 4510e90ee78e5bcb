"""The HTTP server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sensorium.config.fields import (
    MIB,
    bad,
    check_choice,
    check_integer,
    check_non_empty,
    check_number,
    check_types,
    option,
)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP server."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    served_model_name: tuple[str, ...] = option(
        (), "Names under which clients know the model; its path or id when not given."
    )
    api_key: tuple[str, ...] = option(
        (),
        "Keys that clients must send; repeatable. SENSORIUM_API_KEY, or else VLLM_API_KEY or "
        "APHRODITE_API_KEY, is one more. Without any key everybody is served.",
    )
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
    max_body_values: int = option(
        1 << 21,
        "Most values (numbers, texts, lists, objects) in the body of a request, counted by its commas and opening "
        "brackets.",
    )
    trust_request_chat_template: bool = option(
        False, "Accept chat templates that come with a request."
    )
    default_chat_template_kwargs: dict[str, Any] = option(
        dict,
        'Variables of the chat template for requests that do not set them, such as {"enable_thinking": false}.',
        factory=True,
    )
    enable_force_include_usage: bool = option(
        False,
        "Send usage with every chunk of a stream and at its end, also where the request does not ask for it.",
    )
    shutdown_timeout: float = option(30.0, "Seconds that running requests get at shutdown.")
    log_level: str = option("info", "debug, info, warning or error.")
    disable_access_log: bool = option(False, "Do not log each request.")

    def __post_init__(self) -> None:
        check_types(self)
        check_non_empty("host", self.host)
        if not isinstance(self.default_chat_template_kwargs, dict):
            kwargs = self.default_chat_template_kwargs
            bad("default_chat_template_kwargs", f"must be a mapping, got {kwargs!r}")
        check_integer("port", self.port, 0, 65535)
        check_integer("max_body_bytes", self.max_body_bytes, 1, 1 << 40)
        check_integer("max_body_values", self.max_body_values, 1, 1 << 40)
        check_number("shutdown_timeout", self.shutdown_timeout, 0.0, 86400.0)
        check_choice("log_level", self.log_level, ("debug", "info", "warning", "error"))
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            bad("ssl_certfile", "and ssl_keyfile go together: give both or none")
        if any(not key for key in self.api_key):
            bad("api_key", "must not be empty")
