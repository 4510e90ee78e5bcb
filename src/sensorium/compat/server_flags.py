"""vLLM's flags of the HTTP server (version 0.33, and those of 2024 and 2025 that are gone)."""

from __future__ import annotations

from typing import Any

from sensorium.compat.rule import Rule, nothing, refused, same

_LEVELS = {"critical": "error", "trace": "debug"}


def _level(value: Any) -> dict[str, Any]:
    text = str(value).lower()
    return {"log_level": _LEVELS.get(text, text)}


SAME = [
    same("uvicorn_log_level", "log_level", _level, "critical is error here, trace is debug"),
    same(
        "disable_uvicorn_access_log",
        "disable_access_log",
        lambda value: {"disable_access_log": bool(value)},
        "no line for each request",
        takes="switch",
    ),
]  # fmt: skip

NOTHING = [
    *nothing(
        "tools work without it, and calls are read in whatever form the model writes them",
        enable_auto_tool_choice=False, tool_call_parser=None,
    ),
    *nothing("usage has them always", enable_prompt_tokens_details=False),
    *nothing("no content of requests or answers is logged", max_log_len=None, enable_log_outputs=False,
             enable_log_deltas=True),
    *nothing("every answer has X-Request-Id", enable_request_id_headers=False),
    *nothing("there are no such pages; /openapi.json describes the API", disable_fastapi_docs=False,
             enable_offline_docs=False),
    *nothing("the HTTP server and the engine are two processes, always", disable_frontend_multiprocessing=False,
             api_server_count=1),
    *nothing("headers may have 64 KiB", h11_max_incomplete_event_size=None, h11_max_header_count=None),
    *nothing("/metrics has requests running and waiting", enable_server_load_tracking=False,
             enable_per_request_metrics=False),
    *nothing("mm_processor_kwargs of requests are taken within the server's limits", trust_request_mm_kwargs=False),
    *nothing("answers have no fingerprint of the machine", fingerprint_mode="full", fingerprint_value=None),
    *nothing("traces of errors are logged where the fault is the server's", log_error_stack=False),
    *nothing("there is no such API", cohere_is_reasoning_model=True, cohere_format="cmd4",
             anthropic_disabled_thinking_effort="auto", enable_flash_late_interaction=True,
             data_parallel_supervisor_port=9256, dp_supervisor_probe_interval_s=5.0, dp_supervisor_probe_timeout_s=5.0,
             dp_supervisor_probe_failure_threshold=3),
]  # fmt: skip

REFUSED = [
    *refused("LoRA adapters are not available; merge the adapter into the weights", lora_modules=[],
             prompt_adapters=[]),
    *refused("send reasoning_effort or chat_template_kwargs with each request", reasoning_effort_map=None),
    *refused("answers have the role assistant", response_role="assistant"),
    *refused("ask for ids with return_token_ids in the request", return_tokens_as_token_ids=False),
    *refused("the chat template decides what it shows of tools", exclude_tools_when_tool_choice_none=False),
    *refused("code of others is not loaded into the server", tool_parser_plugin="", middleware=[]),
    *refused("the server runs no tools", tool_server=None),
    *refused("schemas are always enforced", tool_strict_level=None),
    *refused("streams are sent as tokens come, without comments in between", sse_keep_alive_interval=0),
    *refused("the tokenizer is not shown", enable_tokenizer_info_endpoint=False),
    *refused("the server listens on TCP, at --host and --port", uds=None, grpc=False, grpc_port=None),
    *refused("one process serves HTTP and starts the engine", headless=False, tokens_only=False,
             enable_scale_out=False),
    *refused("certificates of clients are not asked for; put a proxy in front", ssl_ca_certs=None, ssl_cert_reqs=0,
             ssl_ciphers=None, enable_ssl_refresh=False),
    *refused("--log-level sets what is logged", log_config_file=None, logging_config={}),
    *refused("--disable-access-log switches the whole access log off", disable_access_log_for_endpoints=None),
]  # fmt: skip

SERVER_RULES: dict[str, Rule] = {rule.name: rule for rule in (*SAME, *NOTHING, *REFUSED)}
