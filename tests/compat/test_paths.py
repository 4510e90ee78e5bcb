"""Paths of other servers: the answer says what to use instead, and never names what is only
spelled alike.
"""

from __future__ import annotations

import pytest

from sensorium.compat.paths import PATHS, instead_of
from tests.server.harness import App


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/uploads", "/v1/files"),
        ("/v1/uploads/upload_1/parts", "/v1/files"),
        ("/v1/complete", "use POST /v1/messages"),
        ("/messages", "use /v1/messages"),
        ("/responses/resp_1/cancel", "use /v1/responses/resp_1/cancel"),
        ("/api/generate", "Ollama's API is not available; use POST /v1/completions"),
        ("/api/tags", "GET /v1/models"),
        ("/v1/images/generations", "take images as input"),
        ("/generate", "use POST /v1/completions"),
        ("/v1/v1/chat/completions", "omit one of them"),
        ("/chat/completions", "use /v1/chat/completions: the base URL ends with /v1"),
        ("/models", "use /v1/models"),
        ("/v1", "this is the base URL"),
        ("/v1/", "this is the base URL"),
        ("/docs", "/openapi.json"),
        ("/openai/deployments/x/chat/completions", "Azure"),
        ("/v1beta/models/x:generateContent", "Gemini"),
        ("/v1/chat/completions/", "use '/v1/chat/completions', without a slash"),
        ("/v1/chat/completion", "Did you mean '/v1/chat/completions'?"),
        ("/v1/model", "Did you mean '/v1/models'?"),
    ],
)
async def test_what_to_use_instead(path: str, words: str) -> None:
    app = App()
    for answer in (await app.post(path, {}), await app.get(path)):
        assert answer.status == 404
        assert answer.error["code"] == "not_found"
        assert words in answer.error["message"], answer.error["message"]
        if "Did you mean" not in words:
            assert "Did you mean" not in answer.error["message"]


@pytest.mark.parametrize("path", ["/", "/v1/nothing", "/favicon.ico", "/v2", "/zzz/v1/files"])
async def test_other_paths_are_only_not_there(path: str) -> None:
    assert instead_of(path) is None
    if path != "/":
        answer = await App().get(path)
        assert answer.error["message"] == f"The path {path!r} does not exist."


async def test_no_path_of_the_table_is_here() -> None:
    paths = set((await App().get("/openapi.json")).json()["paths"])
    assert not paths & set(PATHS)
    assert {"/v1/chat/completions", "/v1/models"} <= paths
