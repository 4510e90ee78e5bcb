"""Who has a key in the environment has a server that asks for it, whichever program's name the
variable has.
"""

from __future__ import annotations

import argparse
import logging

import pytest

from sensorium.cli.flags import build_server_config
from sensorium.cli.main import build_parser
from sensorium.config import ServerConfig
from sensorium.environment import api_keys_of_environment, unread_variables
from sensorium.server.launch import log_access
from tests.server.harness import App, running, status_of


def served(*flags: str) -> ServerConfig:
    arguments: argparse.Namespace = build_parser().parse_args(["serve", "demo", *flags])
    return build_server_config(arguments)


@pytest.mark.parametrize(
    ("variables", "flags", "keys"),
    [
        ({"VLLM_API_KEY": "v"}, (), ("v",)),
        ({"SENSORIUM_API_KEY": "s", "VLLM_API_KEY": "v"}, (), ("s",)),
        ({"SENSORIUM_API_KEY": "", "VLLM_API_KEY": "v"}, (), ("v",)),
        ({"VLLM_API_KEY": ""}, (), ()),
        ({"APHRODITE_API_KEY": "a"}, (), ("a",)),
        ({"VLLM_API_KEY": "v", "APHRODITE_API_KEY": "a"}, (), ("v",)),
        ({"VLLM_API_KEY": "v"}, ("--api-key", "f"), ("f", "v")),
    ],
)
def test_the_key_of_the_environment_is_asked_for(
    variables: dict[str, str],
    flags: tuple[str, ...],
    keys: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SENSORIUM_API_KEY", "VLLM_API_KEY", "APHRODITE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert served(*flags).api_key == keys


async def test_a_server_with_vllms_variable_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SENSORIUM_API_KEY", raising=False)
    monkeypatch.setenv("VLLM_API_KEY", "token-abc123")
    app = App(api_key=served().api_key)
    assert (await app.get("/v1/models")).status == 401
    allowed = await app.get("/v1/models", {"Authorization": "Bearer token-abc123"})
    assert allowed.status == 200


def test_clients_of_the_command_line_send_the_same_key() -> None:
    assert api_keys_of_environment({"VLLM_API_KEY": "v"}) == ("v",)
    assert api_keys_of_environment({"SENSORIUM_API_KEY": "s", "VLLM_API_KEY": "v"}) == ("s",)


@pytest.mark.parametrize(
    ("config", "level", "words"),
    [
        ({"api_key": ("a", "b")}, logging.INFO, "requests need an API key; accepted keys: 2"),
        ({}, logging.INFO, "requests need no API key"),
        ({"host": "localhost"}, logging.INFO, "requests need no API key"),
        ({"host": "0.0.0.0"}, logging.WARNING, "listens on 0.0.0.0: anyone who can reach it"),
        ({"host": "::"}, logging.WARNING, "listens on ::: anyone who can reach it"),
    ],
)
def test_the_log_says_whether_a_key_is_needed(
    config: dict[str, object], level: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sensorium.server"):
        log_access(ServerConfig(**config))  # type: ignore[arg-type]
    [record] = caplog.records
    assert record.levelno == level
    assert words in record.getMessage()
    assert "'a'" not in record.getMessage()


async def test_every_start_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sensorium.server"):
        async with running(api_key=("secret-key",)) as server:
            reader, _ = await server.send("/health", None, method="GET")
            assert await status_of(reader) == 200
    assert "requests need an API key; accepted keys: 1" in caplog.text
    assert "secret-key" not in caplog.text


def test_other_variables_of_vllms_are_named() -> None:
    variables = {
        "VLLM_USE_V1": "1",
        "VLLM_API_KEY": "k",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "HOME": "/",
    }
    assert unread_variables(variables) == ["VLLM_CPU_KVCACHE_SPACE", "VLLM_USE_V1"]
    assert unread_variables({"VLLM_IMAGE_FETCH_TIMEOUT": "5"}) == []
