import os
import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sensorium.multimodal.cache.features import DigestMemo, FeatureCache
from sensorium.multimodal.items import Features
from sensorium.multimodal.shared_memory import SharedArraysFolder


def features(size: int) -> Features:
    return Features("image", {"pixels": np.zeros(size, np.uint8)}, 1)


def test_least_recently_used_goes_first() -> None:
    cache = FeatureCache(30)
    for name in (b"a", b"b", b"c"):
        assert cache.put(name, features(10))
    assert cache.get(b"a") is not None
    assert cache.put(b"d", features(10))
    assert cache.get(b"b") is None
    assert [cache.get(name) is not None for name in (b"a", b"c", b"d")] == [True] * 3
    stats = cache.stats()
    assert (stats.queries, stats.hits, stats.evictions) == (5, 4, 1)
    assert (stats.num_entries, stats.num_bytes, stats.capacity_bytes) == (3, 30, 30)


def test_what_is_too_large_is_not_kept_and_evicts_nothing() -> None:
    cache = FeatureCache(30)
    cache.put(b"a", features(10))
    assert not cache.put(b"b", features(31))
    assert cache.get(b"a") is not None
    cache.check_integrity()


def test_no_capacity_switches_it_off() -> None:
    cache = FeatureCache(0)
    assert not cache.enabled
    assert not cache.put(b"a", features(1))
    assert cache.get(b"a") is None


def test_pinned_entries_stay_until_every_pin_is_gone() -> None:
    cache = FeatureCache(20)
    cache.put(b"a", features(10))
    cache.put(b"b", features(10))
    cache.pin([b"a", b"a"])
    cache.unpin([b"a"])
    assert cache.put(b"c", features(10))  # b goes, though a is older
    assert cache.get(b"a") is not None
    assert not cache.put(b"d", features(11))
    cache.clear()
    assert cache.get(b"a") is not None
    cache.unpin([b"a"])
    assert cache.put(b"d", features(20))
    assert cache.get(b"a") is None
    with pytest.raises(ValueError):
        cache.unpin([b"a"])
    cache.check_integrity()


def test_replacing_an_entry_counts_its_bytes_once() -> None:
    cache = FeatureCache(30)
    cache.put(b"a", features(10))
    cache.put(b"a", features(20))
    assert cache.stats().num_bytes == 20
    cache.check_integrity()


def test_bytes_that_do_not_add_up_are_found() -> None:
    cache = FeatureCache(30)
    changed = Features("image", {"pixels": np.zeros(10, np.uint8)}, 1)
    cache.put(b"a", changed)
    changed.arrays["more"] = np.zeros(1, np.uint8)
    with pytest.raises(AssertionError):
        cache.check_integrity()


def test_many_threads() -> None:
    cache = FeatureCache(500)

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for number in random.integers(0, 40, 300):
            name = bytes([number])
            cache.pin([name])
            if cache.get(name) is None:
                cache.put(name, features(int(number)))
            cache.unpin([name])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.check_integrity()
    assert cache.stats().queries == 1200


def test_the_memo_forgets_the_oldest() -> None:
    memo = DigestMemo(2)
    for name in (b"a", b"b", b"a", b"c"):
        memo.put(name, name * 2)
    assert [memo.get(name) for name in (b"a", b"b", b"c")] == [b"aa", None, b"cc"]


class CacheMachine(RuleBasedStateMachine):
    """Against a model that knows sizes only: what was put is there until its bytes are needed."""

    names = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])

    def __init__(self) -> None:
        super().__init__()
        self.cache = FeatureCache(100)
        self.pins: list[bytes] = []
        self.last: dict[bytes, Features] = {}

    @rule(name=names, size=st.integers(0, 120))
    def put(self, name: bytes, size: int) -> None:
        made = features(size)
        if self.cache.put(name, made):
            self.last[name] = made
            assert self.cache.get(name) is made
        else:
            self.last.pop(name, None)
            assert self.cache.get(name) is None

    @rule(name=names)
    def get(self, name: bytes) -> None:
        found = self.cache.get(name)
        assert found is None or found is self.last[name]

    @rule(name=names)
    def pin(self, name: bytes) -> None:
        self.cache.pin([name])
        self.pins.append(name)

    @rule()
    def unpin(self) -> None:
        if self.pins:
            self.cache.unpin([self.pins.pop()])

    @invariant()
    def books_agree(self) -> None:
        self.cache.check_integrity()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=30, deadline=None)


def test_what_somebody_tidied_up_is_no_hit() -> None:
    folder = SharedArraysFolder()
    cache = FeatureCache(1 << 20)
    arrays = folder.write({"pixels": np.zeros(9, np.uint8)})
    cache.put(b"a", Features("image", arrays, 1))
    assert cache.get(b"a") is not None
    os.unlink(arrays.path)
    assert cache.peek(b"a") is None
    assert cache.get(b"a") is None
    assert cache.stats().num_entries == 0
    cache.check_integrity()
    folder.close()
