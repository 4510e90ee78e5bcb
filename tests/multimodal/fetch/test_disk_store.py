import errno
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sensorium.errors import ConfigError
from sensorium.multimodal.fetch import disk_store
from sensorium.multimodal.fetch.disk_store import DiskStore

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def make(tmp_path) -> Iterator:
    made: list[DiskStore] = []

    def build(capacity: int = 1 << 20, clock=None) -> DiskStore:
        made.append(DiskStore(str(tmp_path), capacity, clock or Clock()))
        return made[-1]

    yield build
    for store in made:
        store.close()


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def put(store: DiskStore, key: bytes, body: bytes = b"body", note: bytes = b"note") -> None:
    store.put(key, note, body, 2_000_000.5)
    store.flush()


def test_what_is_put_comes_back_also_in_another_process(make) -> None:
    store = make()
    for key, body in ((A, b""), (B, b"b" * 100_000)):
        put(store, key, body)
        for reader in (store, make()):
            entry = reader.get(key, 100_000)
            assert (entry.note, entry.body, entry.valid_until) == (b"note", body, 2_000_000.5)
    assert store.get(C, 100) is None
    put(store, A, b"other")
    assert make().get(A, 100).body == b"other"
    store.renew(A, 7.25)
    store.renew(C, 7.25)
    store.remove(B)
    store.remove(C)
    store.flush()
    assert store.get(A, 100).valid_until == 7.25
    assert store.get(B, 100_000) is None


def test_others_may_not_look(make, tmp_path) -> None:
    old = os.umask(0)
    try:
        put(make(), A)
        for path in tmp_path.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == (0o600 if path.is_file() else 0o700)
    finally:
        os.umask(old)
    (tmp_path / "sensorium-downloads-1").chmod(0o755)
    make()
    assert stat.S_IMODE((tmp_path / "sensorium-downloads-1").stat().st_mode) == 0o700


def test_a_folder_that_is_emptied_meanwhile(make, tmp_path) -> None:
    store = make()
    put(store, A)
    shutil.rmtree(tmp_path / "sensorium-downloads-1")
    assert store.get(A, 100) is None
    put(store, A)
    assert store.get(A, 100)
    assert stat.S_IMODE((tmp_path / "sensorium-downloads-1").stat().st_mode) == 0o700


def test_names_are_digests(make, tmp_path) -> None:
    put(make(), b"../../../../etc/passwd\0")
    (path,) = files(tmp_path)
    assert len(path.name) == 62
    assert set(path.name + path.parent.name) <= set("0123456789abcdef")


def test_damaged_entries_are_missing_and_removed(make, tmp_path) -> None:
    store = make()
    put(store, A, b"x" * 50)
    (path,) = files(tmp_path)
    good = path.read_bytes()
    damaged = [good[:n] for n in range(0, len(good), 7)]
    damaged += [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
    damaged += [good + b"x", bytes(len(good)), b"\xff" * len(good)]
    for content in damaged:
        path.write_bytes(content)
        assert store.get(A, 100) is None
        assert not path.exists()
    path.write_bytes(good)
    assert store.get(A, 100).body == b"x" * 50


def test_links_and_pipes_in_the_place_of_entries(make, tmp_path) -> None:
    store = make()
    put(store, A)
    (path,) = files(tmp_path)
    target = path.rename(tmp_path / "elsewhere")
    path.symlink_to(target)
    assert store.get(A, 100) is None
    path.unlink()
    os.mkfifo(path)
    assert store.get(A, 100) is None
    assert not path.exists()


def test_larger_bodies_than_are_asked_for(make) -> None:
    store = make()
    put(store, A, b"x" * 100)
    put(store, B, b"x" * 200_000)
    assert store.get(A, 99) is None
    assert store.get(A, 100).body == b"x" * 100
    assert store.get(B, 99) is None
    assert store.get(B, 200_000) is not None


def test_what_was_used_least_recently_goes_first(make, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(disk_store, "_BLOCK_BYTES", 1)
    clock = Clock()
    store = make(10_000, clock)
    keys = [bytes([i]) * 32 for i in range(9)]
    for key in keys:
        put(store, key, b"x" * 900)
    store.get(keys[0], 1000)
    put(store, A, b"x" * 2000)
    held = [key for key in keys if store.get(key, 1000)]
    assert keys[0] in held
    assert held[1:] == keys[len(keys) - len(held) + 1 :]
    assert 4 <= len(held) < 9
    assert store.get(A, 2000)
    for i in range(100):
        put(store, bytes([i, 9]) * 16, b"y" * 700)
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 10_000


def test_small_files_count_as_the_disk_counts_them(make, tmp_path) -> None:
    store = make(100_000)
    for i in range(60):
        put(store, bytes([i]) * 32, b"x" * 100)
        assert 4096 * len(files(tmp_path)) <= 100_000
    assert len(files(tmp_path)) > 15
    again = make(100_000)  # one that has to look at the folder first
    put(again, A)
    assert 4096 * len(files(tmp_path)) <= 100_000


def test_several_writers_share_a_bounded_folder(make, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(disk_store, "_BLOCK_BYTES", 1)
    clock = Clock()
    stores = [make(32_000, clock) for _ in range(3)]

    def work(number: int) -> None:
        for i in range(60):
            key = bytes([i % 20, 1]) * 16
            stores[number].put(key, b"", bytes([i % 20]) * 1000, 0.0)
            stores[number].flush()
            entry = stores[number].get(bytes([(i * 7) % 20, 1]) * 16, 1000)
            assert entry is None or entry.body == bytes([(i * 7) % 20]) * 1000
            assert stores[number].get(A, 1) is None

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 32_000 * (1 + 3 / 16)
    assert not [path for path in files(tmp_path) if path.name.startswith("part-")]


def test_one_entry_takes_a_quarter_at_most(make) -> None:
    store = make(10_000)
    put(store, A, b"x" * 2000)
    put(store, A, b"x" * 2600)
    assert store.get(A, 10_000) is None  # not what was there before either


def test_parts_left_behind_are_removed_in_time(make, tmp_path, monkeypatch) -> None:
    put(make(), A)
    folder = files(tmp_path)[0].parent
    (folder / "part-old").write_bytes(b"x")
    put(make(), A)  # one that another process is writing now
    assert (folder / "part-old").exists()
    monkeypatch.setattr(disk_store, "_STALE_PART_SECONDS", -1.0)
    put(make(), A)
    assert not (folder / "part-old").exists()
    assert make().get(A, 100)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_costs_a_warning(make, tmp_path, monkeypatch, caplog, number) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(number, "no")

    store = make()
    put(store, A)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", fail)
        for _ in range(3):
            put(store, B)
    assert store.get(B, 100) is None
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", fail)
        assert store.get(A, 100).body == b"body"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        put(store, B)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        assert store.get(A, 100) is None
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert errno.errorcode[number] in warnings[0].getMessage()
    assert str(tmp_path) not in warnings[0].getMessage()
    assert len(files(tmp_path)) == 1  # no part stays behind
    put(store, B)
    assert store.get(B, 100)


def test_a_slow_disk_costs_entries(make, monkeypatch) -> None:
    store = make(1 << 30)
    release = threading.Event()
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: release.wait(30) and real(*names))
    monkeypatch.setattr(disk_store, "MAX_PENDING_BYTES", 1000)
    for key in (A, B, C):
        store.put(key, b"", b"x" * 600, 0.0)
    release.set()
    store.flush()
    assert [store.get(key, 1000) is not None for key in (A, B, C)] == [True, False, False]
    put(store, C)
    assert store.get(C, 1000)


def test_folders_that_cannot_be_used(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "sensorium-downloads-1").symlink_to(tmp_path)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "x", "/proc/nowhere"):
        with pytest.raises(ConfigError) as caught:
            DiskStore(str(folder), 1000)
        assert caught.value.param == "media_download_cache"
    DiskStore(str(tmp_path / "made" / "deep"), 1000).close()
