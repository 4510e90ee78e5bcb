"""vLLM's flags of the HTTP server (0.33, and those of 2024 and 2025 since removed)."""

from __future__ import annotations

from typing import Any

from sensorium.compat.rule import Rule, ignored, refused, same

_LEVELS = {"critical": "error", "trace": "debug"}


def _level(value: Any) -> dict[str, Any]:
    text = str(value).lower()
    return {"log_level": _LEVELS.get(text, text)}


SAME = [
    same("uvicorn_log_level", "log_level", _level, "critical becomes error, trace becomes debug"),
    same(
        "disable_uvicorn_access_log",
        "disable_access_log",
        lambda value: {"disable_access_log": bool(value)},
        "no access log",
        takes="switch",
    ),
]  # fmt: skip

IGNORED = [
    *ignored(
        "tool calls are always parsed; --tool-call-parser chooses their form",
        enable_auto_tool_choice=False,
    ),
    *ignored("usage always has them", enable_prompt_tokens_details=False),
    *ignored("the content of requests and answers is never "
             "logged", max_log_len=None, enable_log_outputs=False,
             enable_log_deltas=True),
    *ignored("every answer has the header X-Request-Id", enable_request_id_headers=False),
    *ignored("these pages do not exist; /openapi.json describes the "
             "API", disable_fastapi_docs=False,
             enable_offline_docs=False),
    *ignored("the HTTP server and the engine are always two "
             "processes", disable_frontend_multiprocessing=False),
    *ignored("headers are limited to 64 "
             "KiB", h11_max_incomplete_event_size=None, h11_max_header_count=None),
    *ignored("/metrics has the numbers of running and waiting "
             "requests", enable_server_load_tracking=False,
             enable_per_request_metrics=False),
    *ignored("mm_processor_kwargs of requests are accepted within the server's "
             "limits", trust_request_mm_kwargs=False),
    *ignored("answers have no system fingerprint", fingerprint_mode="full", fingerprint_value=None),
    *ignored("tracebacks of internal errors are always logged", log_error_stack=False),
    *ignored("this API does not exist here", cohere_is_reasoning_model=True, cohere_format="cmd4",
             anthropic_disabled_thinking_effort="auto", enable_flash_late_interaction=True,
             data_parallel_supervisor_port=9256, dp_supervisor_probe_interval_s=5.0, dp_supervisor_probe_timeout_s=5.0,
             dp_supervisor_probe_failure_threshold=3),
]  # fmt: skip

REFUSED = [
    *refused("prompt adapters are not available", prompt_adapters=[]),
    *refused("send reasoning_effort or chat_template_kwargs with each "
             "request", reasoning_effort_map=None),
    *refused("answers always have the role assistant", response_role="assistant"),
    *refused("send return_token_ids with the request", return_tokens_as_token_ids=False),
    *refused("the chat template decides", exclude_tools_when_tool_choice_none=False),
    *refused("plugins cannot be loaded into the server", tool_parser_plugin="", middleware=[]),
    *refused("the server executes no tools", tool_server=None),
    *refused("schemas are always enforced", tool_strict_level=None),
    *refused("streams have no keep-alive comments", sse_keep_alive_interval=0),
    *refused("the tokenizer's configuration is not exposed", enable_tokenizer_info_endpoint=False),
    *refused("the server speaks HTTP only", grpc=False, grpc_port=None),
    *refused("one process serves HTTP and starts the engine", headless=False, tokens_only=False,
             enable_scale_out=False),
    *refused("client certificates are not supported; put a proxy in "
             "front", ssl_ca_certs=None, ssl_cert_reqs=0,
             ssl_ciphers=None, enable_ssl_refresh=False),
    *refused("use --log-level", log_config_file=None, logging_config={}),
    *refused("--disable-access-log turns off the access log for all "
             "paths", disable_access_log_for_endpoints=None),
]  # fmt: skip

SERVER_RULES: dict[str, Rule] = {rule.name: rule for rule in (*SAME, *IGNORED, *REFUSED)}
