"""Attention as compiled for a CPU with AVX2 alone: right numbers, and the same bits in any step."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sensorium.kernels import ops, reference
from sensorium.kernels.batch import AttentionBatch, AttentionVariant, KVCacheLayout
from sensorium.kernels.cpu.attention import tile
from sensorium.kernels.cpu.linear import levels
from sensorium.processes.start import child_environment
from tests.kernels.batches import TOLERANCE, make_batch, twin

VARIANTS = (
    AttentionVariant(),
    AttentionVariant(window=40),
    AttentionVariant(window=300, softcap=2.0, sinks=torch.linspace(-1, 1, 6)),
)


def check_paged(dtype: torch.dtype) -> None:
    batch = make_batch(KVCacheLayout(1, 2, 40, 16, dtype), [(600, 1), (33, 33), (420, 60)])
    other, num = twin(batch), sum(batch.query_lens)
    q, k, v = (torch.randn(num, heads, 40).to(dtype) for heads in (6, 2, 2))
    for variant in VARIANTS:
        expected = reference.paged_attention(q, k, v, other, 0, 0.2, variant)
        found = ops.paged_attention(q, k, v, batch, 0, 0.2, variant)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype])
        rows = slice(34, 94)
        alone = ops.paged_attention(
            q[rows], k[rows], v[rows], last_sequence(batch), 0, 0.2, variant
        )
        assert torch.equal(alone, found[rows])


def last_sequence(batch: AttentionBatch) -> AttentionBatch:
    """Return the step that computes the rows of the last sequence of ``batch`` alone."""
    kv_len, query_len = batch.kv_lens[-1], batch.query_lens[-1]
    return AttentionBatch(
        query_start=torch.tensor([0, query_len], dtype=torch.int32),
        kv_len=batch.kv_len[-1:],
        block_table=batch.block_table[-1:],
        num_decodes=0,
        max_query_len=query_len,
        max_kv_len=kv_len,
        cos=batch.cos[-query_len:],
        sin=batch.sin[-query_len:],
        caches=batch.caches,
        query_lens=[query_len],
        kv_lens=[kv_len],
    )


def check_varlen(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(400, 3, 2, 72).to(dtype).unbind(1)
    found = ops.varlen_attention(q, k, v, [0, 33, 400], 0.1)
    expected = reference.varlen_attention(q.double(), k.double(), v.double(), [0, 33, 400], 0.1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    alone = ops.varlen_attention(q[33:], k[33:], v[33:], [0, 367], 0.1)
    assert torch.equal(alone, found[33:])


@pytest.mark.skipif(not levels.is_x86(), reason="the restricted level is one of x86")
@pytest.mark.skipif(levels.level() == "avx2", reason="kernels are compiled for AVX2 already")
def test_attention_on_a_cpu_with_avx2_alone() -> None:
    environment = child_environment() | {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c",
    }
    subprocess.run([sys.executable, "-m", __name__], env=environment, check=True)


def check_int8_cache() -> None:
    batch = make_batch(KVCacheLayout(1, 2, 40, 16, torch.int8), [(600, 1), (33, 33), (420, 60)])
    other, num = twin(batch), sum(batch.query_lens)
    q, k, v = (torch.randn(num, heads, 40) for heads in (6, 2, 2))
    expected = reference.paged_attention(q, k, v, other, 0, 0.2, VARIANTS[2])
    found = ops.paged_attention(q, k, v, batch, 0, 0.2, VARIANTS[2])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    rows = slice(34, 94)
    own = last_sequence(batch)
    assert torch.equal(
        ops.paged_attention(q[rows], k[rows], v[rows], own, 0, 0.2, VARIANTS[2]), found[rows]
    )


if __name__ == "__main__":
    assert (levels.level(), tile.TILE_ROWS) == ("avx2", 6)
    torch.manual_seed(0)
    for kind in (torch.float32, torch.bfloat16):
        check_paged(kind)
        check_varlen(kind)
    check_int8_cache()
