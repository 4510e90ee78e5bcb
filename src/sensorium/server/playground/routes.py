"""``GET /`` and what the page loads: its files, and facts of the server.

Page and files are the same on every server and open to all, so that a browser can show the field
for an API key. The facts need the key.
"""

from __future__ import annotations

from blake3 import blake3
from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from sensorium.server.context import context_of
from sensorium.server.payload import JsonResponse
from sensorium.server.playground.assets import PREFIX, load_assets
from sensorium.server.playground.facts import facts

FACTS_PATH = f"{PREFIX}/facts"
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "media-src blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Nothing from elsewhere, no inline script or style, and no text that becomes markup or code."""
_NO_SNIFFING = {"x-content-type-options": "nosniff"}
_PAGE_HEADERS = {
    **_NO_SNIFFING,
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(self), geolocation=(), payment=(), usb=()",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_FILE_HEADERS = {
    **_NO_SNIFFING,
    "cache-control": "public, max-age=31536000, immutable",
    "cross-origin-resource-policy": "same-origin",
    "vary": "accept-encoding",
}


def open_paths() -> frozenset[str]:
    """Return the paths that need no API key."""
    return load_assets().paths | {"/"}


def playground_router() -> APIRouter:
    """Return the router of the page."""
    router = APIRouter(include_in_schema=False)
    assets = load_assets()

    @router.get("/", response_model=None)
    async def page(request: Request) -> Response:
        """Return the page."""
        text = assets.page_at(context_of(request).config.root_path)
        tag = f'"{blake3(text.encode()).hexdigest(length=8)}"'
        headers = {**_PAGE_HEADERS, "etag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(text, media_type="text/html", headers=headers)

    @router.get(FACTS_PATH, response_model=None)
    async def get_facts(request: Request) -> Response:
        """Return what the page needs to know of a model, the states of all, and the limits."""
        found = facts(context_of(request), request.query_params.get("model"))
        return JsonResponse(found, headers={"cache-control": "no-store"})

    @router.get(f"{PREFIX}/{{digest}}/{{name:path}}", response_model=None)
    async def file(request: Request, digest: str, name: str) -> Response:
        """Return a file of the page."""
        asset = assets.files.get(name) if digest == assets.digest else None
        if asset is None:
            raise HTTPException(404)
        headers = dict(_FILE_HEADERS)
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["content-encoding"] = "gzip"
            return Response(asset.gzipped, media_type=asset.media_type, headers=headers)
        return Response(asset.data, media_type=asset.media_type, headers=headers)

    return router
