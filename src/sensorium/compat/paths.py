"""Paths that clients of other servers try and that are not here, with what to use instead."""

from __future__ import annotations

import re

_CHAT = "use POST /v1/chat/completions"
_EMBEDDINGS = "use POST /v1/embeddings (of a server started with --runner pooling)"
_CACHES = "caches evict entries by themselves; a new cache_salt makes requests start without cached entries"
_CONTROL = "a running server cannot be reconfigured; stop it and start another"

PATHS: dict[str, str] = {
    "/v1/complete": "Anthropic's older API is not available; use POST /v1/messages",
    "/v1/uploads": "uploads in parts are not available; use POST /v1/files",
    "/v1/chat/completions/batch": f"use POST /v1/batches, or send concurrent requests; {_CHAT}",
    "/v1/chat/completions/render": "use POST /tokenize: its prompt is the rendered chat template",
    "/v1/audio/speech": "models here generate text, no speech",
    "/v1/images": "models here take images as input but generate none",
    "/v1/videos": "models here take videos as input but generate none",
    "/v1/moderations": "moderation models are not supported",
    "/v1/realtime": f"the Realtime API is not available; {_CHAT} with stream: true",
    "/v1/assistants": f"the Assistants API is not available; {_CHAT}",
    "/v1/threads": f"the Assistants API is not available; {_CHAT}",
    "/v1/vector_stores": f"nothing is stored; {_EMBEDDINGS}",
    "/v1/fine_tuning": "training is not supported",
    "/v1/engines": "use /v1/completions and /v1/embeddings, with model in the body",
    "/v1/edits": _CHAT,
    "/v2/embed": f"Cohere's API is not available; {_EMBEDDINGS}",
    "/pooling": _EMBEDDINGS,
    "/classify": "classifiers are not supported; ask a chat model, with structured_outputs.choice",
    "/invocations": f"SageMaker's API is not available; {_CHAT}",
    "/inference": f"{_CHAT}, or POST /v1/completions with token ids as the prompt",
    "/api/generate": "Ollama's API is not available; use POST /v1/completions or "
                     "/v1/chat/completions",
    "/api/chat": f"Ollama's API is not available; {_CHAT}",
    "/api/tags": "Ollama's API is not available; use GET /v1/models",
    "/api/show": "Ollama's API is not available; use GET /v1/models",
    "/api/ps": "Ollama's API is not available; use GET /v1/models",
    "/api/version": "use GET /version",
    "/api/embed": f"Ollama's API is not available; {_EMBEDDINGS}",
    "/api/embeddings": f"Ollama's API is not available; {_EMBEDDINGS}",
    "/api/v1": "the API begins with /v1: omit /api",
    "/generate": "use POST /v1/completions, or /v1/chat/completions",
    "/generate_stream": "use POST /v1/completions with stream: true",
    "/completion": "use POST /v1/completions",
    "/openai": "Azure's paths are not available; the base URL ends with /v1",
    "/v1beta": f"Gemini's API is not available; {_CHAT}",
    "/embed": _EMBEDDINGS,
    "/healthz": "use GET /health",
    "/livez": "use GET /health",
    "/readyz": "use GET /health",
    "/health/ready": "use GET /health",
    "/health/live": "use GET /health",
    "/info": "use GET /v1/models and GET /version",
    "/get_model_info": "use GET /v1/models",
    "/server_info": "use GET /v1/models and GET /version",
    "/tokenizer_info": "use POST /tokenize and POST /detokenize",
    "/props": "use GET /v1/models",
    "/slots": "use GET /metrics",
    "/load": "use GET /metrics",
    "/docs": "there is no such page; GET /openapi.json describes the API",
    "/redoc": "there is no such page; GET /openapi.json describes the API",
    "/sleep": _CONTROL,
    "/wake_up": _CONTROL,
    "/is_sleeping": _CONTROL,
    "/pause": _CONTROL,
    "/resume": _CONTROL,
    "/collective_rpc": _CONTROL,
    "/scale_elastic_ep": _CONTROL,
    "/reset_prefix_cache": _CACHES,
    "/reset_mm_cache": _CACHES,
    "/reset_encoder_cache": _CACHES,
    "/start_profile": "use GET /metrics for the time of each stage, or start the server with "
                      "--trace-dir",
    "/stop_profile": "use GET /metrics for the time of each stage, or start the server with "
                     "--trace-dir",
}  # fmt: skip
"""By path: what to do instead. An entry covers the paths below it, too."""

_VERSION_TWICE = re.compile(r"^(/v1){2,}(?=/)")
_WITHOUT_VERSION = (
    *("/chat/completions", "/completions", "/embeddings", "/models"),
    *("/responses", "/messages"),
)


def instead_of(path: str) -> str | None:
    """Return what to do instead of calling an unknown path; None where nothing is known."""
    path = path.rstrip("/") or "/"
    if _VERSION_TWICE.match(path):
        return "the base URL already ends with /v1: omit one of them"
    if path == "/v1":
        return "this is the base URL: add /chat/completions, /completions, /embeddings or /models"
    if any(path == bare or path.startswith(f"{bare}/") for bare in _WITHOUT_VERSION):
        return f"use /v1{path}: the base URL ends with /v1"
    while path:
        if path in PATHS:
            return PATHS[path]
        path = path.rpartition("/")[0]
    return None
