"""Servers and models that the tests of this folder share: each is started once, and ends with them.

After every test that used one it must answer a good request as it did at first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.parts import build_llm
from tests.reliability.asking import Offline, Service, flags, image, serving, text
from tests.reliability.listeners import Host, Internet, host
from tests.reliability.media import picture, picture_url

KEYS = ("key-of-ada", "key-of-ben")
LIMITS: dict[str, Any] = {
    "max_media_bytes": 4 << 20,
    "max_image_pixels": 16_000_000,
    "max_video_frames": 2000,
    "max_audio_seconds": 20,
    "limit_mm_per_prompt": {"image": 4, "video": 2, "audio": 2},
    "num_kv_blocks": 400,
    "max_request_media_bytes": 8 << 20,
    "media_fetch_retries": 1,
}
ONE_PICTURE = 80_000 / (1 << 30)
"""GiB of a cache that holds the features of one picture of the demo model's."""
NARROW: dict[str, Any] = {
    "media_worker_memory_gb": 0.15,
    "media_decode_timeout": 600.0,  # no file that hangs is to end by it, however slow the machine
    "num_media_workers": 2,
    "num_kv_blocks": 200,
}
NO_CACHES: dict[str, Any] = {"mm_processor_cache_gb": 0.0}
SERVERS = {
    *("shared_server", "shared_closed_server", "shared_tight_server", "shared_narrow_server"),
    *("patient_server", "sharing_server", "hasty_server", "server"),
}
"""Fixtures that start a server: what needs one is not part of the quick tests."""
SERVED = {"served", "closed", "tight", "narrow", "hasty", "hasty_offline"}
"""The same as parameters, and a model that waits for its deadline."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what needs a server, by itself or by one of its parameters."""
    own = os.fspath(Path(__file__).parent) + os.sep
    for item in items:
        if not isinstance(item, pytest.Function) or not os.fspath(item.path).startswith(own):
            continue
        call = getattr(item, "callspec", None)
        chosen = (
            {value for value in call.params.values() if isinstance(value, str)} if call else set()
        )
        if SERVERS & set(item.fixturenames) or SERVED & chosen:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder below which local files may be read, in one that holds what may not."""
    folder = tmp_path_factory.mktemp("local") / "allowed"
    (folder / "inner").mkdir(parents=True)
    picture().save(folder / "picture.png")
    picture().save(folder / "inner" / "picture.png")
    return folder


@pytest.fixture(scope="package")
def shared_server(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Service]:
    options = {
        **LIMITS,
        "limit_mm_per_prompt": {"image": 4, "video": 2},
        "enable_mm_embeds": True,
        "allowed_local_media_path": folder,
        "allowed_media_domains": ("localhost",),
        "image_fetch_timeout": 4.5,
        "video_fetch_timeout": 4.5,
        "grammar_timeout": 0.5,
        "api_key": KEYS,
    }
    with serving("demo", tmp_path_factory.mktemp("served"), flags(options), KEYS) as service:
        yield service


@pytest.fixture
def served(shared_server: Service) -> Iterator[Service]:
    """The demo model behind HTTP with embeddings, a local folder, two API keys and one media
    host, ``localhost``.
    """
    yield shared_server
    shared_server.is_well()


@pytest.fixture(scope="package")
def shared_closed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    options = flags({"max_audio_seconds": 20, "num_kv_blocks": 200})
    with serving("demo-audio", tmp_path_factory.mktemp("closed"), options) as service:
        yield service


@pytest.fixture
def closed(shared_closed_server: Service) -> Iterator[Service]:
    """The demo model of sounds behind HTTP, as it is without flags about where media come from."""
    yield shared_closed_server
    shared_closed_server.is_well()


@pytest.fixture(scope="package")
def shared_tight_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    options = {
        "num_kv_blocks": 400,
        "mm_processor_cache_gb": ONE_PICTURE,
        "enable_mm_embeds": True,
        "max_num_waiting": 512,
    }
    with serving("demo", tmp_path_factory.mktemp("tight"), flags(options)) as service:
        yield service


@pytest.fixture
def tight(shared_tight_server: Service) -> Iterator[Service]:
    """The demo model behind HTTP with a processor cache that holds one picture."""
    yield shared_tight_server
    shared_tight_server.is_well()


@pytest.fixture(scope="package")
def shared_narrow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    options = [*flags({**NARROW, **NO_CACHES}), "--no-enable-prefix-caching"]
    with serving("demo", tmp_path_factory.mktemp("narrow"), options) as service:
        yield service


@pytest.fixture
def narrow(shared_narrow_server: Service) -> Iterator[Service]:
    """The demo model behind HTTP without caches, with two media workers that have little memory."""
    yield shared_narrow_server
    shared_narrow_server.is_well()
    assert shared_narrow_server.ask(image(picture_url()), text("What is it?")).status == 200


@pytest.fixture(scope="package")
def shared_offline(folder: Path) -> Iterator[Offline]:
    options = {**LIMITS, "limit_mm_per_prompt": {"image": 4, "video": 2}}
    with build_llm(
        "demo", enable_mm_embeds=True, allowed_local_media_path=str(folder), **options
    ) as parts:
        yield Offline(parts)


@pytest.fixture
def offline(shared_offline: Offline) -> Iterator[Offline]:
    """The demo model in this process with embeddings and a local folder.

    Any public host may be fetched from.
    """
    yield shared_offline
    shared_offline.is_well()


@pytest.fixture(scope="package")
def shared_sounds() -> Iterator[Offline]:
    options = {**LIMITS, "limit_mm_per_prompt": {"audio": 2}}
    with build_llm("demo-audio", enable_mm_embeds=True, **options) as parts:
        yield Offline(parts)


@pytest.fixture
def sounds(shared_sounds: Offline) -> Iterator[Offline]:
    """The demo model of sounds in this process."""
    yield shared_sounds
    shared_sounds.is_well()


@pytest.fixture(params=["served", "offline"])
def anywhere(request: pytest.FixtureRequest) -> Service | Offline:
    """Both demo models of pictures and clips, one after the other."""
    found: Service | Offline = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["closed", "sounds"])
def listening(request: pytest.FixtureRequest) -> Service | Offline:
    """Both demo models of sounds, one after the other."""
    found: Service | Offline = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="package")
def media_host() -> Iterator[Host]:
    """A host that serves media; ``served`` may fetch from it under the name ``localhost``."""
    with host() as running:
        yield running


@pytest.fixture
def trap() -> Iterator[Host]:
    """A host that nobody may connect to: checked at the end of the test."""
    with host() as running:
        yield running
        assert running.num_connections == 0


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Internet:
    """Names and addresses for what runs in this process."""
    found = Internet()
    found.install(monkeypatch)
    return found
