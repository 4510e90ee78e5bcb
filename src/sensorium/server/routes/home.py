"""``GET /``: a page with the model, its limits, and requests to try."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from sensorium import __version__
from sensorium.server.context import ServingContext, context_of

Messages = list[dict[str, object]]

_SECURITY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{model} - Sensorium</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; }}
main {{ padding: 0 1rem; }}
pre {{ overflow-x: auto; padding: .75rem; border: 1px solid #8886; font-size: .875rem; }}
dt {{ font-weight: 600; }}
</style>
</head>
<body>
<main>
<h1>Sensorium {version}</h1>
<dl>
<dt>Model</dt><dd>{model}</dd>
<dt>Input</dt><dd>{modalities}</dd>
<dt>Context length</dt><dd>{max_model_len} tokens</dd>
</dl>
<h2>Try it with curl</h2>
<pre><code>{curl}</code></pre>
<h2>Try it with Python</h2>
<pre><code>{python}</code></pre>
<h2>API</h2>
<p>OpenAI-compatible routes: {routes} and <code>/v1/models</code>. Further routes: <code>/tokenize</code>,
<code>/detokenize</code>, <code>/health</code>, <code>/version</code> and <code>/metrics</code>.
<a href="{root}/openapi.json">openapi.json</a> describes all of them.</p>
</main>
</body>
</html>
"""

_PYTHON_CHAT = """from openai import OpenAI

client = OpenAI(base_url={url!r}, api_key={key!r})
messages = {messages}
answer = client.chat.completions.create(model={model!r}, messages=messages)
print(answer.choices[0].message.content)"""

_PYTHON_EMBEDDING = """from openai import OpenAI

client = OpenAI(base_url={url!r}, api_key={key!r})
answer = client.embeddings.create(model={model!r}, input="Hello!")
print(answer.data[0].embedding)"""


def home_router() -> APIRouter:
    """Return the router of the home page."""
    router = APIRouter()

    @router.get("/", response_model=None, include_in_schema=False)
    async def home(request: Request) -> Response:
        """Return the home page."""
        context = context_of(request)
        page = _page(context, _base_url(request))
        return HTMLResponse(page, headers={"content-security-policy": _SECURITY})

    return router


def _base_url(request: Request) -> str:
    """Return the address of the API, from the listening socket, as a Host header can be forged."""
    host, port = request.scope.get("server") or ("127.0.0.1", None)
    host = f"[{host}]" if ":" in host else host
    where = host if port is None else f"{host}:{port}"
    return f"{request.scope['scheme']}://{where}{request.scope.get('root_path', '')}/v1"


def _page(context: ServingContext, base_url: str) -> str:
    model = context.model_names[0]
    has_key = bool(context.config.api_key)
    pools = context.frontend.input_processor.runner == "pooling"
    routes = ("/v1/embeddings",) if pools else ("/v1/chat/completions", "/v1/completions")
    body = {"model": model, **({"input": "Hello!"} if pools else {"messages": _messages(context)})}
    python = _PYTHON_EMBEDDING if pools else _PYTHON_CHAT
    shown = json.dumps(body.get("messages"), indent=4, ensure_ascii=False)
    key = "KEY" if has_key else "none"
    return _PAGE.format(
        version=__version__,
        model=html.escape(model),
        modalities=html.escape(", ".join(("text", *context.frontend.input_processor.modalities))),
        max_model_len=context.frontend.max_model_len,
        routes=", ".join(f"<code>{route}</code>" for route in routes),
        curl=html.escape(_curl(base_url + routes[0].removeprefix("/v1"), body, has_key)),
        python=html.escape(python.format(url=base_url, key=key, model=model, messages=shown)),
        root=html.escape(base_url.removesuffix("/v1")),
    )


def _messages(context: ServingContext) -> Messages:
    """Return an example conversation for the model."""
    if "image" not in context.frontend.input_processor.modalities:
        return [{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]
    image = {"type": "image_url", "image_url": {"url": "https://example.com/image.png"}}
    question = {"type": "text", "text": "What is in this image?"}
    return [{"role": "user", "content": [question, image]}]


def _curl(url: str, body: Mapping[str, object], has_key: bool) -> str:
    quoted = json.dumps(body, indent=2, ensure_ascii=False).replace("'", "'\\''")
    authorization = "  -H 'Authorization: Bearer KEY' \\\n" if has_key else ""
    return (
        f"curl {url} \\\n{authorization}  -H 'Content-Type: application/json' \\\n  -d '{quoted}'"
    )
