"""The size of the KV cache follows from the configuration and the memory there is."""

from __future__ import annotations

import pytest
import torch

from sensorium.config import GIB, CacheConfig
from sensorium.errors import ConfigError
from sensorium.kernels.batch import KVCacheLayout
from sensorium.processes.limits import resident_memory
from sensorium.runtime.memory import CacheGeometry, cache_dtype, cache_geometry, free_memory

LAYOUT = KVCacheLayout(2, 2, 8, 16, torch.bfloat16)


def geometry(
    config: CacheConfig | None = None,
    *,
    max_model_len: int | None = None,
    free_bytes: int = 1 << 20,
    max_num_seqs: int = 4,
) -> CacheGeometry:
    return cache_geometry(
        config or CacheConfig(block_size=16),
        LAYOUT,
        max_model_len=max_model_len,
        max_position=1024,
        max_num_seqs=max_num_seqs,
        free_bytes=free_bytes,
    )


def test_bytes_of_a_block() -> None:
    assert LAYOUT.bytes_per_block == 2 * 2 * 2 * 8 * 2 * 16


def test_free_memory_decides_but_no_more_than_can_be_used() -> None:
    assert geometry(free_bytes=100 * LAYOUT.bytes_per_block).num_blocks == 100
    assert geometry(free_bytes=1 << 40).num_blocks == 4 * 64


def test_bytes_and_blocks_as_configured() -> None:
    config = CacheConfig(block_size=16, kv_cache_memory_bytes=LAYOUT.bytes_per_block * 70)
    assert geometry(config).num_blocks == 70
    assert geometry(CacheConfig(block_size=16, num_kv_blocks=80)).num_blocks == 80


def test_a_context_that_does_not_fit_is_lowered_when_it_is_the_models_own() -> None:
    found = geometry(CacheConfig(block_size=16, num_kv_blocks=5))
    assert found.max_model_len == 80


def test_a_context_that_was_asked_for_and_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len is 100, but the KV cache holds 80"):
        geometry(CacheConfig(block_size=16, num_kv_blocks=5), max_model_len=100)


def test_no_room_for_a_single_block() -> None:
    with pytest.raises(ConfigError, match="no block"):
        geometry(CacheConfig(block_size=16, kv_cache_memory_bytes=10))


def test_the_hosts_memory_is_measured() -> None:
    assert free_memory(torch.device("cpu"), CacheConfig()) > 1 << 20


def test_a_context_longer_than_the_model_was_made_for_is_refused() -> None:
    assert geometry(max_model_len=1024, free_bytes=1 << 40).max_model_len == 1024
    with pytest.raises(ConfigError, match="1024") as caught:
        geometry(max_model_len=1025, free_bytes=1 << 40)
    assert caught.value.param == "max_model_len"


def test_a_limit_of_memory_counts_what_the_process_has_taken_already() -> None:
    taken = resident_memory()
    limited = free_memory(torch.device("cpu"), CacheConfig(max_memory_gb=taken / GIB + 0.01))
    assert limited < GIB // 50
    with pytest.raises(
        ConfigError, match=r"max_memory_gb is 0\.10, but without the KV cache"
    ) as raised:
        free_memory(torch.device("cpu"), CacheConfig(max_memory_gb=0.1))
    assert raised.value.param == "max_memory_gb"


def test_data_types_of_the_cache() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert cache_dtype("auto", dtype) == dtype
        assert cache_dtype(str(dtype).removeprefix("torch."), dtype) == dtype
        assert cache_dtype("int8", dtype) == torch.int8
    with pytest.raises(
        ConfigError, match="kv_cache_dtype is float16, but the model runs in bf"
    ) as e:
        cache_dtype("float16", torch.bfloat16)
    assert e.value.param == "kv_cache_dtype"
    with pytest.raises(
        ConfigError, match=r"kv_cache_dtype must be one of auto, .*int8, got 'int4'"
    ):
        CacheConfig(kv_cache_dtype="int4")  # type: ignore[arg-type]
