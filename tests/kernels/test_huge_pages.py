"""Memory of caches: zeros that take no page of the system before they are written."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil
import pytest
import torch

from sensorium import LLM, SamplingParams
from sensorium.errors import ConfigError
from sensorium.kernels import ops
from sensorium.kernels.batch import KVCacheLayout
from sensorium.kernels.cpu import huge_pages
from tests import checkpoints

GIB = 1 << 30
TOLERANCE = GIB // 4
"""What else a process may take meanwhile."""


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (3, 1024, 1024), (0, 4), (1,)])
def test_they_are_zeros_that_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = huge_pages.zeros(shape, dtype)
    assert (tensor.shape, tensor.dtype) == (shape, dtype)
    assert not tensor.any()
    tensor.fill_(2.0)
    assert (tensor == 2.0).all()
    assert tensor.is_contiguous()


def test_memory_is_taken_as_it_is_written_and_given_back() -> None:
    before = resident()
    tensor = huge_pages.zeros((4, GIB // 4), torch.bfloat16)  # 2 GiB
    assert resident() - before < TOLERANCE
    assert tensor[3, 17] == 0.0
    tensor[1].fill_(1.0)
    assert GIB // 2 <= resident() - before < GIB // 2 + TOLERANCE
    del tensor
    assert resident() - before < TOLERANCE


def test_it_outlives_views_of_it_only() -> None:
    row = huge_pages.zeros((2, 1024), torch.float32)[1]
    row.fill_(3.0)
    assert row.sum() == 3 * 1024


def test_a_forked_child_writes_its_own() -> None:
    tensor = huge_pages.zeros((1024,), torch.float32)
    child = os.fork()
    if child == 0:
        tensor.numpy()[:] = 1.0
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not tensor.any()


def test_more_than_there_can_be_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="cannot reserve 4611686018427387904 bytes"):
        huge_pages.zeros((1 << 60,), torch.float32)


def test_a_cache_of_every_layer() -> None:
    before = resident()
    layout = KVCacheLayout(8, 4, 64, 16, torch.bfloat16)
    caches = ops.allocate_cache(layout, 2 * GIB // layout.bytes_per_block, torch.device("cpu"))
    assert sum(cache.k.nbytes + cache.v.nbytes for cache in caches) == 2 * GIB
    assert resident() - before < TOLERANCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))


def test_a_model_with_a_large_cache_starts_small(folder: Path) -> None:
    before = resident()
    with LLM(str(folder), kv_cache_memory_bytes=2 * GIB, max_model_len=256) as llm:
        output = llm.generate("hello", SamplingParams(max_tokens=4), use_tqdm=False)[0]
        assert output.finished
        assert resident() - before < TOLERANCE


def test_a_cache_that_may_outgrow_the_memory_is_told_at_the_start(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    most = psutil.virtual_memory().available + GIB
    with contextlib.suppress(ConfigError):  # of a system that promises no more than it has
        LLM(str(folder), kv_cache_memory_bytes=most, max_model_len=256).close()
    assert "the KV cache may grow to" in caplog.text
    assert "Lower kv_cache_memory_bytes" in caplog.text


def test_a_cache_that_no_system_has_is_a_configuration_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="more than the system gives") as caught:
        LLM(str(folder), kv_cache_memory_bytes=1 << 50, max_model_len=256)
    assert caught.value.param == "kv_cache_memory_bytes"


def test_what_is_short_lived_takes_no_place_beside_weights() -> None:
    first = huge_pages.shared_zeros((64,), torch.uint8)
    with huge_pages.short_lived():
        between = huge_pages.shared_zeros((1 << 16,), torch.uint8)
    second = huge_pages.shared_zeros((64,), torch.uint8)
    assert second.data_ptr() - first.data_ptr() == 64
    assert not between.any()
