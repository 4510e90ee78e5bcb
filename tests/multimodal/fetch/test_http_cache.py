import json
from collections.abc import AsyncIterator, Iterator
from email.utils import formatdate

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from sensorium.config import MediaConfig
from sensorium.errors import ConfigError, MediaFetchError, MediaRefusedError, MediaTooLargeError
from sensorium.multimodal.fetch import client
from sensorium.multimodal.fetch.disk_store import DiskStore
from sensorium.multimodal.fetch.fetcher import Fetcher
from sensorium.multimodal.fetch.http_cache import HttpCache, directives, may_reuse, may_store
from sensorium.multimodal.workers.threads import ThreadWorkers
from tests.multimodal.support import FakeResolver, MediaServer, media_server

NOW = 1_700_000_000.0
URL = "http://example.com/a"


def date(offset: float) -> str:
    return formatdate(NOW + offset, usegmt=True)


@pytest.fixture
def now() -> list[float]:
    return [NOW]


@pytest.fixture
def cache(tmp_path, now: list[float]) -> Iterator[HttpCache]:
    store = DiskStore(str(tmp_path), 1 << 20)
    cache = HttpCache(store, lambda: now[0])
    yield cache
    cache.close()


def put(cache: HttpCache, *headers: tuple[str, str], url: str = URL, asked: float = NOW) -> None:
    cache.put(url, False, CIMultiDict(headers), b"body", asked)
    cache._store.flush()


ETAG = ("ETag", '"v1"')


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ([("Cache-Control", "max-age=60")], 60),
        ([("cache-control", 'public, MAX-AGE="60" , immutable')], 60),
        ([("Cache-Control", "private"), ("Cache-Control", "max-age=60")], 60),
        ([("Cache-Control", "max-age=60, max-age=9999")], 60),
        ([("Cache-Control", "s-maxage=5, max-age=60")], 60),
        ([("Cache-Control", "max-age=60"), ("Age", "20")], 40),
        ([("Cache-Control", "max-age=60"), ("Date", date(-50))], 10),
        ([("Cache-Control", "max-age=60"), ("Date", date(+50))], 60),
        ([("Cache-Control", "max-age=60"), ("Expires", date(9))], 60),
        ([("Expires", date(60))], 60),
        ([("Expires", date(60)), ("Date", date(-10))], 60),
        ([("Expires", date(60)), ("Date", "yesterday")], 60),
        ([("Cache-Control", "max-age=99999999999999999999999")], 365 * 86400),
        ([("Cache-Control", 'ext="no-store, no-cache", max-age=60')], 60),
    ],
)
def test_fresh_for_as_long_as_is_said(cache: HttpCache, now, headers, seconds: int) -> None:
    put(cache, *headers)
    now[0] = NOW + seconds - 1
    assert cache.get(URL, False, 100).is_fresh
    now[0] = NOW + seconds + 1
    stored = cache.get(URL, False, 100)
    assert (stored.is_fresh, stored.body, stored.conditions) == (False, b"body", {})


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Cache-Control", "max-age=0")],
        [("Cache-Control", "max-age=-5")],
        [("Cache-Control", "max-age=soon")],
        [("Cache-Control", "max-age")],
        [("Cache-Control", "max-age=60, no-cache")],
        [("Cache-Control", 'max-age=60, no-cache="Set-Cookie"')],
        [("Cache-Control", "max-age=60"), ("Age", "60")],
        [("Cache-Control", "max-age=60"), ("Date", date(-70))],
        [("Pragma", "no-cache"), ("Expires", date(60))],
        [("Expires", "0")],
        [("Expires", date(-1))],
        [("Last-Modified", date(-1e8))],
    ],
)
def test_stale_at_once(cache: HttpCache, headers) -> None:
    """Kept only with something to ask the host with."""
    put(cache, *headers, ETAG)
    stored = cache.get(URL, False, 100)
    assert not stored.is_fresh
    assert stored.conditions["If-None-Match"] == '"v1"'
    put(cache, *(pair for pair in headers if pair[0] != "Last-Modified"))
    assert cache.get(URL, False, 100) is None


@pytest.mark.parametrize(
    "headers",
    [
        [("Cache-Control", "no-store, max-age=60")],
        [("Cache-Control", "max-age=60"), ("Cache-Control", "No-Store")],
        [("Cache-Control", "max-age=60"), ("Vary", "*")],
        [("Cache-Control", "max-age=60"), ("Vary", "Accept"), ("Vary", "Cookie, *")],
    ],
)
def test_never_kept(cache: HttpCache, headers) -> None:
    put(cache, ("Cache-Control", "max-age=60"))
    put(cache, *headers, ETAG)
    assert cache.get(URL, False, 100) is None  # what was there before is gone, too
    assert not may_store(CIMultiDict(headers))
    assert not may_reuse(CIMultiDict(headers))


def test_what_serves_those_who_ask_a_moment_later() -> None:
    for value, reusable in (("max-age=0", True), ("no-cache", False), ("private", True)):
        assert may_reuse(CIMultiDict({"Cache-Control": value})) is reusable
    assert may_reuse(CIMultiDict())


def test_the_time_of_the_request_counts(cache: HttpCache, now) -> None:
    put(cache, ("Cache-Control", "max-age=60"), asked=NOW - 30)
    now[0] = NOW + 31
    assert not cache.get(URL, False, 100).is_fresh


def test_what_asks_the_host(cache: HttpCache) -> None:
    put(cache, ETAG, ("Last-Modified", date(-9)))
    assert cache.get(URL, False, 100).conditions == {
        "If-None-Match": '"v1"',
        "If-Modified-Since": date(-9),
    }
    for value in ("", "ä", "x" * 2000, "a\tb"):
        put(cache, ("ETag", value), ("Last-Modified", date(-9)))
        assert list(cache.get(URL, False, 100).conditions) == ["If-Modified-Since"]


def test_an_answer_that_nothing_changed(cache: HttpCache, now) -> None:
    put(cache, ETAG)
    stored = cache.get(URL, False, 100)
    now[0] = NOW + 100
    cache.renew(stored, CIMultiDict({"Cache-Control": "max-age=60"}), NOW + 100)
    cache._store.flush()
    assert cache.get(URL, False, 100).is_fresh
    cache.renew(stored, CIMultiDict(), NOW + 100)
    cache._store.flush()
    assert not cache.get(URL, False, 100).is_fresh
    cache.renew(stored, CIMultiDict({"Cache-Control": "no-store"}), NOW + 100)
    cache._store.flush()
    assert cache.get(URL, False, 100) is None


def test_urls_and_rules_are_apart(cache: HttpCache) -> None:
    put(cache, ETAG, url=URL)
    assert cache.get(URL + "#part", False, 100)
    for url in (URL + "?", URL + "b", "https://example.com/a"):
        assert cache.get(url, False, 100) is None
    assert cache.get(URL, True, 100) is None
    assert cache.get(URL, False, 3) is None


@settings(max_examples=30)
@given(st.lists(st.text(st.characters(codec="latin-1"), max_size=30), max_size=3))
def test_any_header_is_read(values: list[str]) -> None:
    headers: CIMultiDict[str] = CIMultiDict()
    for value in values:
        headers.add("Cache-Control", value)
    assert isinstance(directives(headers), dict)
    assert json.dumps(directives(headers))


# --- through the fetcher --------------------------------------------------------------------------


@pytest.fixture
async def server() -> AsyncIterator[MediaServer]:
    async with media_server() as server:
        yield server


@pytest.fixture
def make(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    monkeypatch.setattr(client, "_FIRST_BACKOFF", 0.001)
    workers = ThreadWorkers(1)
    made: list[Fetcher] = []

    def build(names: FakeResolver | None = None, **config) -> Fetcher:
        config.setdefault("allowed_media_domains", ("127.0.0.1",))
        config.setdefault("media_download_cache", str(tmp_path))
        options = {} if names is None else {"resolver": lambda: names}
        made.append(Fetcher(MediaConfig(**config), workers, **options))
        return made[-1]

    yield build
    for fetcher in made:
        fetcher.close()
    workers.close()


async def fetch(fetcher: Fetcher, url: str) -> tuple[bytes, bool]:
    with fetcher.budget.share() as share:
        fetched = await fetcher.download(url, "image", share)
    if fetcher._store is not None:
        fetcher._store.flush()
    return fetched.data, fetched.cached


async def test_fresh_downloads_need_no_request_even_after_a_restart(make, server) -> None:
    server.serve("/a", b"one", headers={"Cache-Control": "max-age=3600"})
    assert await fetch(make(), server.url("/a")) == (b"one", False)
    for _ in range(2):
        assert await fetch(make(), server.url("/a")) == (b"one", True)
    assert server.paths == ["/a"]
    assert await fetch(make(media_download_cache=""), server.url("/a")) == (b"one", False)


async def test_the_host_is_asked_whether_it_still_holds(make, server: MediaServer) -> None:
    version = ["1"]
    asked: list[str | None] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.headers.get("If-None-Match"))
        tag = f'"{version[0]}"'
        if asked[-1] == tag:
            return web.Response(status=304, headers={"ETag": tag})
        return web.Response(body=version[0].encode() * 9, headers={"ETag": tag})

    server.handlers["/a"] = handler
    fetcher = make()
    assert await fetch(fetcher, server.url("/a")) == (b"1" * 9, False)
    assert await fetch(fetcher, server.url("/a")) == (b"1" * 9, True)
    version[0] = "2"
    assert await fetch(fetcher, server.url("/a")) == (b"2" * 9, False)
    assert await fetch(fetcher, server.url("/a")) == (b"2" * 9, True)
    assert asked == [None, '"1"', '"1"', '"2"']


async def test_a_host_that_is_down_gets_no_stale_answer(make, server: MediaServer) -> None:
    server.serve("/a", b"one", headers={"ETag": '"1"'})
    fetcher = make(media_fetch_retries=0)
    await fetch(fetcher, server.url("/a"))
    for status in (404, 500, 503):
        server.serve("/a", b"", status=status)
        with pytest.raises(MediaFetchError, match=str(status)):
            await fetch(fetcher, server.url("/a"))
    server.serve("/b", b"", status=304)
    with pytest.raises(MediaFetchError, match="304"):
        await fetch(fetcher, server.url("/b"))


@pytest.mark.parametrize("status", [206, 404, 410])
async def test_errors_are_not_kept(make, server: MediaServer, status: int) -> None:
    server.serve("/a", b"no", status=status, headers={"Cache-Control": "max-age=3600"})
    for _ in range(2):
        with pytest.raises(MediaFetchError):
            await fetch(make(media_fetch_retries=0), server.url("/a"))
    assert len(server.paths) == 2


async def test_no_store_is_not_kept(make, server: MediaServer, tmp_path) -> None:
    server.serve("/a", b"secret", headers={"Cache-Control": "no-store, max-age=9", "ETag": '"1"'})
    for _ in range(2):
        assert await fetch(make(), server.url("/a")) == (b"secret", False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


async def test_each_hop_of_a_redirect_is_asked_or_kept_by_itself(make, server) -> None:
    server.serve("/a", b"", status=302, headers={"Location": "/b", "Cache-Control": "max-age=9"})
    server.serve("/b", b"end", headers={"Cache-Control": "max-age=3600"})
    assert await fetch(make(), server.url("/a")) == (b"end", False)
    assert await fetch(make(), server.url("/a")) == (b"end", True)
    assert server.paths == ["/a", "/b", "/a"]


async def test_the_guard_comes_before_the_cache(make, server: MediaServer) -> None:
    server.serve("/a", b"intern", headers={"Cache-Control": "max-age=3600"})
    names = FakeResolver({"intern.example": [["127.0.0.1"]]})
    url = server.url("/a", "intern.example")
    assert await fetch(make(names, allowed_media_domains=("intern.example",)), url)
    assert await fetch(make(names, allowed_media_domains=("intern.example",)), url)
    assert len(server.paths) == 1
    for domains in ((), ("other.example",)):  # a server with other rules and the same folder
        with pytest.raises(MediaRefusedError):
            await fetch(make(names, allowed_media_domains=domains), url)


async def test_cached_bytes_obey_the_limit(make, server: MediaServer) -> None:
    server.serve("/a", b"x" * 100, headers={"Cache-Control": "max-age=3600"})
    await fetch(make(), server.url("/a"))
    with pytest.raises(MediaTooLargeError):
        await fetch(make(max_media_bytes=99), server.url("/a"))
    assert await fetch(make(max_media_bytes=100), server.url("/a")) == (b"x" * 100, True)


async def test_a_damaged_entry_is_fetched_anew(make, server: MediaServer, tmp_path) -> None:
    server.serve("/a", b"x" * 100, headers={"Cache-Control": "max-age=3600"})
    await fetch(make(), server.url("/a"))
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    path.write_bytes(path.read_bytes()[:-1])
    assert await fetch(make(), server.url("/a")) == (b"x" * 100, False)
    assert await fetch(make(), server.url("/a")) == (b"x" * 100, True)


def test_a_folder_that_cannot_be_made_fails_at_start(make, tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        make(media_download_cache=str(tmp_path / "file"))
    assert caught.value.param == "media_download_cache"
