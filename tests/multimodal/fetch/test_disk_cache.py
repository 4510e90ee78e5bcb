"""The folder of downloads: a time to live, a bound, and what hosts allow."""

import errno
import os
import shutil
import stat
import tempfile
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from sensorium.config import MediaConfig
from sensorium.errors import ConfigError, MediaFetchError, MediaRefusedError, MediaTooLargeError
from sensorium.multimodal.cache.digest import encoded_digest
from sensorium.multimodal.fetch import disk_cache
from sensorium.multimodal.fetch.budget import RequestBytes
from sensorium.multimodal.fetch.client import may_reuse, seconds_to_keep
from sensorium.multimodal.fetch.disk_cache import DiskCache
from sensorium.multimodal.fetch.fetcher import Fetcher
from sensorium.multimodal.items import Fetched
from sensorium.multimodal.workers.threads import ThreadWorkers
from tests.multimodal.support import FakeResolver, MediaServer

A, B, C = "http://a.example/", "http://b.example/", "http://c.example/"
FOREVER = float("inf")


def config_of(folder: Path, capacity: int = 1 << 20, **options) -> MediaConfig:
    config = MediaConfig(media_download_cache=str(folder), **options)
    # A folder of kilobytes: smaller than the option allows, as no operator would want it.
    object.__setattr__(config, "media_download_cache_gb", capacity / (1 << 30))
    return config


class Folder:
    """Makes caches over one folder; each ``put`` waits until it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = path / disk_cache.FOLDER

    def put(self, url: str, data: bytes = b"body", *, capacity: int = 1 << 20, **options) -> None:
        cache = DiskCache(config_of(self.path, capacity, **options))
        cache.put(url, False, Fetched(data, encoded_digest(data)), FOREVER)
        cache.close()

    def get(self, url: str, max_bytes: int = 1 << 30, **options) -> bytes | None:
        cache = DiskCache(config_of(self.path, **options))
        found = cache.get(url, False, max_bytes)
        cache.close()
        if found is None:
            return None
        assert (found.digest, found.cached) == (encoded_digest(found.data), True)
        return found.data

    def files(self) -> list[Path]:
        return sorted(p for p in self.path.rglob("*") if p.is_file())


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_downloads_come_back_also_after_a_restart(folder: Folder) -> None:
    for url, body in ((A, b""), (B, b"b" * 100_000)):
        folder.put(url, body)
        assert folder.get(url) == body
    assert folder.get(C) is None
    folder.put(A, b"other")
    assert folder.get(A) == b"other"


def test_entries_expire(folder: Folder) -> None:
    folder.put(A, media_download_cache_seconds=60.0)
    (path,) = folder.files()
    left = path.stat().st_mtime - time.time()
    assert 0 < left <= 60
    assert folder.get(A, media_download_cache_seconds=60.0) == b"body"
    assert folder.get(A, media_download_cache_seconds=left / 2) is None  # the operator wants less
    os.utime(path, (time.time(), time.time() - 1))
    assert folder.get(A) is None
    folder.put(A)
    assert folder.get(A) == b"body"


def test_a_host_may_say_less_than_the_time_to_live(folder: Folder) -> None:
    cache = DiskCache(config_of(folder.path))
    for url, seconds in ((A, 30.0), (B, 0.0), (C, -5.0)):
        cache.put(url, False, Fetched(b"x", encoded_digest(b"x")), seconds)
    cache.close()
    (path,) = folder.files()
    assert path.stat().st_mtime - time.time() <= 30
    assert folder.get(A) == b"x"


def test_urls_and_rules_are_kept_apart(folder: Folder) -> None:
    cache = DiskCache(config_of(folder.path))
    cache.put(A + "x", False, Fetched(b"x", encoded_digest(b"x")), FOREVER)
    cache.close()
    assert cache.get(A + "x#part", False, 1)
    for url in (A, A + "x?", "https://a.example/x"):
        assert cache.get(url, False, 1) is None
    assert cache.get(A + "x", True, 1) is None


def test_other_users_may_not_read(folder: Folder) -> None:
    old = os.umask(0)
    try:
        folder.put(A)
        for path in folder.path.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == (0o600 if path.is_file() else 0o700)
    finally:
        os.umask(old)
    folder.root.chmod(0o755)
    folder.put(B)
    assert stat.S_IMODE(folder.root.stat().st_mode) == 0o700


def test_a_folder_that_is_removed_meanwhile(folder: Folder) -> None:
    cache = DiskCache(config_of(folder.path))
    shutil.rmtree(folder.root)
    assert cache.get(A, False, 100) is None
    cache.put(A, False, Fetched(b"x", encoded_digest(b"x")), FOREVER)
    cache.close()
    assert cache.get(A, False, 100)
    assert stat.S_IMODE(folder.root.stat().st_mode) == 0o700


def test_names_are_digests(folder: Folder) -> None:
    folder.put("http://a.example/../../../../etc/passwd\0")
    (path,) = folder.files()
    assert len(path.name) == 64
    assert set(path.name) <= set("0123456789abcdef")


def test_damaged_entries_are_missing_and_removed(folder: Folder) -> None:
    folder.put(A, b"x" * 50)
    (path,) = folder.files()
    good, times = path.read_bytes(), (time.time(), path.stat().st_mtime)
    damaged = [good[:n] for n in range(0, len(good), 7)]
    damaged += [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
    damaged += [good + b"x", bytes(len(good)), b"\xff" * len(good)]
    cache = DiskCache(config_of(folder.path))
    for content in damaged:
        path.write_bytes(content)
        os.utime(path, times)
        assert cache.get(A, False, 100) is None
        assert not path.exists()
    path.write_bytes(good)
    os.utime(path, times)
    found = cache.get(A, False, 100)
    assert found is not None
    assert found.data == b"x" * 50
    cache.close()


def test_links_and_pipes_in_the_place_of_entries(folder: Folder) -> None:
    folder.put(A)
    (path,) = folder.files()
    target = path.rename(folder.path / "elsewhere")
    path.symlink_to(target)
    assert folder.get(A) is None
    path.unlink()
    os.mkfifo(path)
    os.utime(path, (time.time(), time.time() + 60))
    assert folder.get(A) is None


def test_larger_bodies_than_are_asked_for(folder: Folder) -> None:
    folder.put(A, b"x" * 100)
    assert folder.get(A, 99) is None
    assert folder.get(A, 100) == b"x" * 100


def test_the_least_recently_used_go_first(folder: Folder) -> None:
    capacity, size = 160_000, 12_000
    urls = [f"{A}{i}" for i in range(9)]
    for age, url in enumerate(reversed(urls)):
        folder.put(url, b"x" * size, capacity=capacity)
        for path in folder.files():
            status = path.stat()
            os.utime(path, (status.st_atime - age - 1, status.st_mtime))
    assert folder.get(urls[0]) is not None  # the oldest, and now the last that was used
    folder.put(B, b"x" * 30_000, capacity=capacity)
    root = {path.name for path in folder.files()}
    held = [url for url in urls if folder.get(url) is not None]
    assert urls[0] in held
    assert folder.get(B) == b"x" * 30_000
    assert len(root) == len(held) + 1
    assert 4 <= len(held) < 9


def test_the_folder_is_bounded_in_whole_blocks(folder: Folder) -> None:
    cache = DiskCache(config_of(folder.path, 100_000))
    for i in range(60):
        cache.put(f"{A}{i}", False, Fetched(b"x" * 100, encoded_digest(b"x" * 100)), FOREVER)
    cache.close()
    assert len(folder.files()) > 15
    assert 4096 * len(folder.files()) <= 100_000
    folder.put(A, capacity=100_000)  # by one that has to look at the folder first
    assert 4096 * len(folder.files()) <= 100_000


def test_several_writers_share_a_bounded_folder(folder: Folder) -> None:
    capacity = 320_000
    caches = [DiskCache(config_of(folder.path, capacity)) for _ in range(3)]

    def work(number: int) -> None:
        for i in range(60):
            data = bytes([i % 20]) * 6000
            caches[number].put(
                f"{A}{i % 20}{number}", False, Fetched(data, encoded_digest(data)), FOREVER
            )
            found = caches[number].get(f"{A}{(i * 7) % 20}{number}", False, 6000)
            assert found is None or found.data == bytes([(i * 7) % 20]) * 6000

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for cache in caches:
        cache.close()
    assert sum(path.stat().st_size for path in folder.files()) <= capacity * (1 + 3 / 16)
    assert all(len(path.name) == 64 for path in folder.files())


def test_one_entry_takes_a_quarter_at_most(folder: Folder) -> None:
    folder.put(A, b"x" * 24_000, capacity=100_000)
    folder.put(B, b"x" * 26_000, capacity=100_000)
    assert folder.get(A)
    assert folder.get(B) is None


def test_files_that_no_server_wants_any_more_are_removed(folder: Folder) -> None:
    """Entries that expired long ago, and files that a server left half written when it died."""
    folder.put(A)
    (expired,) = folder.files()
    half = folder.root / "tmp_half"
    half.write_bytes(b"x")
    folder.put(B)
    assert half.exists()  # it may be one that another server writes now
    long_ago = time.time() - disk_cache.STALE_SECONDS - 1
    for path in (half, expired):
        os.utime(path, (time.time(), long_ago))
    folder.put(C)
    assert not half.exists()
    assert not expired.exists()
    assert folder.get(B)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_costs_a_warning(folder: Folder, monkeypatch, caplog, number) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(number, "no")

    fetched = Fetched(b"body", encoded_digest(b"body"))
    folder.put(A)
    cache = DiskCache(config_of(folder.path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", fail)
        assert cache.get(A, False, 100)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", fail)
        patch.setattr(os, "replace", fail)
        for _ in range(3):
            cache.put(B, False, fetched, FOREVER)
        cache.close()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        assert cache.get(A, False, 100) is None
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert errno.errorcode[number] in warnings[0].getMessage()
    assert str(folder.path) not in warnings[0].getMessage()
    assert len(folder.files()) == 1


def test_a_scan_that_fails_is_tried_again(folder: Folder, monkeypatch) -> None:
    """Else the folder, which is too large here, would stay so for another sixteenth of its size."""
    for number in range(8):
        folder.put(f"{A}{number}", bytes(20_000))
    real, failures = os.scandir, iter([OSError(errno.EIO, "no")])

    def scan(path: str):
        for failure in failures:
            raise failure
        return real(path)

    monkeypatch.setattr(os, "scandir", scan)
    cache = DiskCache(config_of(folder.path, 100_000))
    for url in (B, C):
        cache.put(url, False, Fetched(b"body", encoded_digest(b"body")), FOREVER)
    cache.close()
    assert sum(path.stat().st_size for path in folder.root.iterdir()) <= 100_000
    assert (folder.get(B), folder.get(C)) == (None, b"body")


def test_a_failed_rename_leaves_no_file(folder: Folder, monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "replace", fail)
    folder.put(A)
    assert folder.files() == []


def test_a_slow_disk_costs_entries(folder: Folder, monkeypatch) -> None:
    release = threading.Event()
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: release.wait(60) and real(*names))
    monkeypatch.setattr(disk_cache, "MAX_PENDING_BYTES", 1000)
    cache = DiskCache(config_of(folder.path))
    for url in (A, B, C):
        cache.put(url, False, Fetched(b"x" * 600, encoded_digest(b"x" * 600)), FOREVER)
    release.set()
    cache.close()
    assert [folder.get(url) is not None for url in (A, B, C)] == [True, False, False]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / disk_cache.FOLDER).symlink_to(tmp_path)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "x", "/proc/nowhere"):
        with pytest.raises(ConfigError) as caught:
            DiskCache(MediaConfig(media_download_cache=str(folder)))
        assert caught.value.param == "media_download_cache"
    DiskCache(MediaConfig(media_download_cache=str(tmp_path / "made" / "deep"))).close()


# --- headers --------------------------------------------------------------------------------------


def date(offset: float) -> str:
    return formatdate(time.time() + offset, usegmt=True)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ([], FOREVER),
        ([("ETag", '"1"'), ("Last-Modified", date(-1e8))], FOREVER),
        ([("Cache-Control", "public")], FOREVER),
        ([("Cache-Control", "max-age=60")], 60),
        ([("cache-control", 'public, MAX-AGE="60" , immutable')], 60),
        ([("Cache-Control", "public"), ("Cache-Control", "max-age=60")], 60),
        ([("Cache-Control", "max-age=60, max-age=9999")], 60),
        ([("Cache-Control", "s-maxage=5, max-age=60")], 60),
        ([("Cache-Control", "max-age=60"), ("Age", "20")], 40),
        ([("Cache-Control", "max-age=60"), ("Expires", date(9))], 60),
        ([("Cache-Control", "max-age=0")], 0),
        ([("Cache-Control", "max-age=-5")], 0),
        ([("Cache-Control", "max-age=soon")], 0),
        ([("Cache-Control", "max-age")], 0),
        ([("Cache-Control", "max-age=60"), ("Age", "60")], 0),
        ([("Cache-Control", "max-age=60, no-cache")], 0),
        ([("Cache-Control", 'max-age=60, no-cache="Set-Cookie"')], 0),
        ([("Cache-Control", "max-age=60, private")], 0),
        ([("Cache-Control", "no-store, max-age=60")], 0),
        ([("Cache-Control", "max-age=60"), ("Cache-Control", "No-Store")], 0),
        ([("Cache-Control", "max-age=60"), ("Vary", "*")], 0),
        ([("Cache-Control", "max-age=60"), ("Vary", "Accept"), ("Vary", "Cookie, *")], 0),
        ([("Pragma", "no-cache"), ("Expires", date(60))], 0),
        ([("Expires", "0")], 0),
        ([("Expires", "")], 0),
    ],
)
def test_how_long_hosts_let_a_download_be_kept(headers, seconds: float) -> None:
    assert seconds_to_keep(CIMultiDict(headers)) == seconds


def test_expires_is_a_time() -> None:
    assert 30 < seconds_to_keep(CIMultiDict({"Expires": date(60)})) <= 60
    assert seconds_to_keep(CIMultiDict({"Expires": date(-60)})) < 0


def test_which_downloads_serve_requests_right_after_them() -> None:
    for value, reusable in (("max-age=0", True), ("no-cache", False), ("private", True)):
        assert may_reuse(CIMultiDict({"Cache-Control": value})) is reusable
    assert may_reuse(CIMultiDict())
    assert not may_reuse(CIMultiDict({"Vary": "*"}))


@settings(max_examples=30)
@given(
    st.lists(st.text(st.characters(codec="latin-1"), max_size=30), max_size=3),
    st.sampled_from(["Cache-Control", "Expires", "Age", "Pragma", "Vary"]),
)
def test_any_header_is_read(values: list[str], name: str) -> None:
    headers: CIMultiDict[str] = CIMultiDict({"Cache-Control": "max-age=5"} if name == "Age" else {})
    for value in values:
        headers.add(name, value)
    assert isinstance(seconds_to_keep(headers), float)


# --- through the fetcher --------------------------------------------------------------------------


@pytest.fixture
def fetch(tmp_path: Path, workers: ThreadWorkers):
    """Fetch with a server that starts with the folder and ends afterwards."""

    async def run(url: str, names: FakeResolver | None = None, **config) -> tuple[bytes, bool]:
        config = {
            "allowed_media_domains": ("127.0.0.1",),
            "media_download_cache": str(tmp_path),
            "media_fetch_retries": 0,
            **config,
        }
        options = {} if names is None else {"resolver": lambda: names}
        fetcher = Fetcher(MediaConfig(**config), workers, **options)
        try:
            fetched = await fetcher.fetch(url, "image", RequestBytes(1 << 30))
        finally:
            fetcher.close()
        return fetched.data, fetched.cached

    return run


async def test_kept_downloads_need_no_request(fetch, server: MediaServer) -> None:
    server.serve("/a", b"one")
    assert await fetch(server.url("/a")) == (b"one", False)
    for _ in range(2):
        assert await fetch(server.url("/a")) == (b"one", True)
    assert server.paths == ["/a"]
    assert await fetch(server.url("/a"), media_download_cache="") == (b"one", False)


async def test_an_expired_download_is_fetched_again(fetch, server, tmp_path: Path) -> None:
    server.serve("/a", b"one")
    await fetch(server.url("/a"))
    (path,) = Folder(tmp_path).files()
    os.utime(path, (time.time(), time.time() - 1))
    for status in (404, 500, 304):
        server.serve("/a", b"", status=status)
        with pytest.raises(MediaFetchError, match=str(status)):
            await fetch(server.url("/a"))
    server.serve("/a", b"two")
    assert await fetch(server.url("/a")) == (b"two", False)
    assert await fetch(server.url("/a")) == (b"two", True)


@pytest.mark.parametrize("status", [206, 404, 410])
async def test_errors_are_not_kept(fetch, server: MediaServer, status: int) -> None:
    server.serve("/a", b"no", status=status, headers={"Cache-Control": "max-age=3600"})
    for _ in range(2):
        with pytest.raises(MediaFetchError):
            await fetch(server.url("/a"))
    assert len(server.paths) == 2


@pytest.mark.parametrize("control", ["no-store, max-age=9", "private", "no-cache"])
async def test_what_hosts_forbid_is_not_kept(fetch, server, tmp_path: Path, control: str) -> None:
    server.serve("/a", b"secret", headers={"Cache-Control": control})
    for _ in range(2):
        assert await fetch(server.url("/a")) == (b"secret", False)
    assert Folder(tmp_path).files() == []


async def test_the_target_of_a_redirect_is_kept_and_the_redirect_is_not(fetch, server) -> None:
    server.serve("/a", b"", status=302, headers={"Location": "/b", "Cache-Control": "max-age=9"})
    server.serve("/b", b"end")
    assert await fetch(server.url("/a")) == (b"end", False)
    assert await fetch(server.url("/a")) == (b"end", True)
    assert server.paths == ["/a", "/b", "/a"]


async def test_the_guard_comes_before_the_cache(fetch, server: MediaServer) -> None:
    server.serve("/a", b"intern")
    names = FakeResolver({"intern.example": [["127.0.0.1"]]})
    url = server.url("/a", "intern.example")
    for _ in range(2):
        assert await fetch(url, names, allowed_media_domains=("intern.example",))
    assert len(server.paths) == 1
    for domains in ((), ("other.example",)):  # a server with other rules and the same folder
        with pytest.raises(MediaRefusedError):
            await fetch(url, names, allowed_media_domains=domains)


async def test_cached_bytes_obey_the_limit(fetch, server: MediaServer) -> None:
    server.serve("/a", b"x" * 100)
    await fetch(server.url("/a"))
    with pytest.raises(MediaTooLargeError):
        await fetch(server.url("/a"), max_media_bytes=99)
    assert await fetch(server.url("/a"), max_media_bytes=100) == (b"x" * 100, True)
