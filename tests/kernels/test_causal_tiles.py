"""Attention of decoders with matrix tiles: right numbers, one set of bits, and the check of both."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import llvmlite.ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.bench.kernels import measure_attention
from sensorium.kernels import ops, reference
from sensorium.kernels.batch import PLAIN, AttentionBatch, AttentionVariant, KVCacheLayout
from sensorium.kernels.cpu import amx, findings, tile_check
from sensorium.kernels.cpu.amx_emulation import EMULATION, Emulation
from sensorium.kernels.cpu.attention import paged, route
from sensorium.kernels.cpu.attention.tiles import causal, checks
from sensorium.kernels.cpu.linear import table
from tests.kernels.batches import TOLERANCE, make_batch, twin
from tests.kernels.cutting import VARIANTS, attend_cut, each_alone, variant_of
from tests.kernels.tiles import UNITS, needs_emulation

BF16 = torch.bfloat16
HEADS = ((14, 2, 64), (4, 4, 80), (3, 1, 128), (32, 1, 16))
ALWAYS, NEVER = 1, 1 << 30

pytestmark = needs_emulation


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every kernel by the emulation, unless a test says otherwise."""
    monkeypatch.setattr(amx, "unit", lambda: EMULATION)


def inputs(batch: AttentionBatch, heads: int, kv_heads: int, dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    num = sum(batch.query_lens)
    return [
        torch.randn(num, count, dim, generator=generator).to(BF16)
        for count in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("block_size", [16, 32, 48])
@pytest.mark.parametrize("what", ["plain", *VARIANTS])
def test_tiles_and_pairs_are_the_reference(unit: amx.Unit, block_size: int, what: str) -> None:
    heads, kv_heads, dim = 6, 2, 80
    layout = KVCacheLayout(1, kv_heads, dim, block_size, BF16)
    batch = make_batch(layout, [(20, 1), (600, 1), (24, 9), (330, 60), (300, 300)])
    q, k, v = inputs(batch, heads, kv_heads, dim)
    asked = PLAIN if what == "plain" else variant_of(what, batch)
    expected = reference.paged_attention(q, k, v, twin(batch), 0, 0.1, asked)
    qkv = torch.cat((q, k, v), dim=1).flatten(1)
    unrotated = twin(batch)
    unrotated.cos = unrotated.sin = torch.empty(len(q), 0)
    found = []
    for least_rows in (ALWAYS, NEVER, causal.FEW_ROWS):
        unrotated.scratch = {}
        own = route.Route(unit, least_rows)
        mixed = paged.rope_attention(
            qkv, unrotated, 0, heads, kv_heads, dim, 0.1, variant=asked, route=own
        )
        found.append(mixed.view_as(q))
    torch.testing.assert_close(found[0], expected, rtol=0, atol=TOLERANCE[BF16])
    assert torch.equal(found[0], found[1]), "tiles and their sums in vectors"
    assert torch.equal(found[0], found[2])


@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from(HEADS),
    length=st.sampled_from([1, 17, 130, 256, 257, 700]),
    seed=st.integers(0, 1000),
    threads=st.sampled_from([1, 2, 16]),
    normed=st.booleans(),
)
def test_bits_do_not_depend_on_how_a_prompt_is_cut(
    heads: tuple[int, int, int], length: int, seed: int, threads: int, normed: bool
) -> None:
    found = attend_cut(heads, BF16, length, seed, threads, normed)
    torch.testing.assert_close(found.whole, found.reference, rtol=0, atol=2 * TOLERANCE[BF16])
    assert torch.equal(found.pieces, found.whole)


@pytest.mark.parametrize("what", ["plain", *VARIANTS])
def test_bits_do_not_depend_on_the_other_sequences_nor_on_blocks(what: str) -> None:
    found = []
    for block_size, seed in ((32, 0), (16, 1), (48, 2)):
        layout = KVCacheLayout(1, 2, 64, block_size, BF16)
        batch = make_batch(layout, [(20, 1), (1500, 1), (24, 9), (700, 60), (17, 17)], seed=seed)
        fill(batch, block_size)
        q, k, v = inputs(batch, 6, 2, 64)
        asked = PLAIN if what == "plain" else variant_of(what, batch)
        together = ops.paged_attention(q, k, v, batch, 0, 0.125, asked)
        found.append(together)
        for rows, alone, own in each_alone(batch, asked):
            mixed = ops.paged_attention(q[rows], k[rows], v[rows], alone, 0, 0.125, own)
            assert torch.equal(mixed, together[rows]), rows
    assert all(torch.equal(other, found[0]) for other in found)


def fill(batch: AttentionBatch, block_size: int) -> None:
    """Give every sequence the same keys and values, whatever its blocks are."""
    (cache,) = batch.caches
    generator = torch.Generator().manual_seed(11)
    for blocks, kv_len in zip(batch.block_table.tolist(), batch.kv_lens, strict=True):
        heads, dim = cache.k.shape[1:3]
        keys = torch.randn(kv_len, heads, dim, generator=generator).to(BF16)
        values = torch.randn(kv_len, heads, dim, generator=generator).to(BF16)
        for token in range(kv_len):
            block, offset = blocks[token // block_size], token % block_size
            cache.k[block, :, :, offset], cache.v[block, :, offset] = keys[token], values[token]


@pytest.mark.parametrize("least_rows", [ALWAYS, NEVER])
@pytest.mark.parametrize("window", [None, 1, 30, 256, 300])
def test_what_no_row_sees_is_not_read(window: int | None, least_rows: int) -> None:
    """Not-a-number behind the end and behind the window would show, even with a weight of zero."""
    layout = KVCacheLayout(1, 2, 64, 16, BF16)
    batch = make_batch(layout, [(1500, 1), (40, 1), (700, 5), (90, 90)])
    q, k, v = inputs(batch, 6, 2, 64)
    qkv = torch.cat((q, k, v), dim=1).flatten(1)
    clean, dirty = twin(batch), twin(batch)
    (cache,) = dirty.caches
    held = torch.zeros(cache.v.shape[0], layout.block_size, dtype=torch.bool)
    lengths = zip(dirty.block_table.tolist(), dirty.kv_lens, dirty.query_lens, strict=True)
    for blocks, kv_len, query_len in lengths:
        first = 0 if window is None else max(0, kv_len - query_len - window + 1) // 32 * 32
        for place in range(first, kv_len):
            held[blocks[place // 16], place % 16] = True
    cache.k.masked_fill_(~held[:, None, None, :], math.nan)
    cache.v.masked_fill_(~held[:, None, :, None], math.nan)
    results = []
    for step in (clean, dirty):
        step.cos = step.sin = torch.empty(len(q), 0)
        results.append(
            paged.rope_attention(
                *(qkv, step, 0, 6, 2, 64, 0.125),
                variant=AttentionVariant(window),
                route=route.Route(EMULATION, least_rows),
            )
        )
    assert results[0].isfinite().all()
    assert torch.equal(*results)


@pytest.mark.parametrize("size", [0.01, 30.0, 3000.0, 1e5])
def test_sharp_and_flat_weights(size: float) -> None:
    layout = KVCacheLayout(1, 1, 64, 16, BF16)
    batch = make_batch(layout, [(600, 300)])
    q, k, v = inputs(batch, 2, 1, 64)
    q = (q * size).to(BF16)
    expected = reference.paged_attention(
        q.double(), k.double(), v.double(), doubled(batch), 0, 0.125
    )
    found = ops.paged_attention(q, k, v, batch, 0, 0.125)
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-6)


def doubled(batch: AttentionBatch) -> AttentionBatch:
    """Return the batch with its cache in float64."""
    other = twin(batch)
    for cache in other.caches:
        cache.k, cache.v = cache.k.double(), cache.v.double()
    return other


def test_not_a_number_stays_in_its_row() -> None:
    layout = KVCacheLayout(1, 2, 32, 16, BF16)
    batch = make_batch(layout, [(90, 90)])
    q, k, v = inputs(batch, 4, 2, 32)
    q[5, 1, 3] = math.nan
    found = ops.paged_attention(q, k, v, batch, 0, 0.2)
    assert found[5, 1].isnan().all()
    found[5, 1] = 0
    assert found.isfinite().all()


def test_other_heads_and_types_take_vectors() -> None:
    assert route.choose(BF16, 64) == route.Route(EMULATION)
    assert route.choose(BF16, 20) == route.VECTORS
    assert route.choose(BF16, 512) == route.VECTORS
    assert route.choose(torch.float32, 64) == route.VECTORS


# -- the check at first use -----------------------------------------------------------------------


class Doubling(Emulation):
    """Tiles that multiply twice."""

    name = "doubling"

    def dot(
        self, builder: ir.IRBuilder, state: ir.Value, kind: str, c: int, a: int, b: int
    ) -> None:
        super().dot(builder, state, kind, c, a, b)
        super().dot(builder, state, kind, c, a, b)


class Rounding(Emulation):
    """Tiles that sum in another order: the last pairs of words first."""

    name = "rounding"

    def store(
        self, builder: ir.IRBuilder, state: ir.Value, tile: int, place: ir.Value, stride: ir.Value
    ) -> None:
        super().store(builder, state, tile, place, stride)
        with_row = builder.bitcast(place, ir.IntType(32).as_pointer())
        bits = builder.load(with_row, align=4)
        builder.store(builder.xor(bits, ir.IntType(32)(1)), with_row, align=4)


@pytest.fixture
def kept_nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(findings, "cache_folder", lambda: None)
    for function in (findings.known, tile_check.outcome, route.checked):
        function.cache_clear()
    yield
    for function in (findings.known, tile_check.outcome, route.checked):
        function.cache_clear()


@pytest.mark.usefixtures("kept_nowhere")
def test_the_check_passes_the_emulation() -> None:
    assert checks.causal(EMULATION) == tile_check.SAME_BITS
    assert checks.encoders(EMULATION) == tile_check.RIGHT


@pytest.mark.usefixtures("kept_nowhere")
def test_tiles_with_other_numbers_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(amx, "unit", lambda unit=Doubling(): unit)
    with caplog.at_level(logging.WARNING):
        assert route.choose(BF16, 64) == route.VECTORS
    assert "give other numbers than its vectors in attention of decoders" in caplog.text
    q, k, v = torch.randn(8, 3, 2, 32).to(BF16).unbind(1)
    with caplog.at_level(logging.WARNING):
        mixed = ops.varlen_attention(q, k, v, [0, 8], 0.2)
    assert "attention of encoders" in caplog.text
    expected = reference.varlen_attention(q, k, v, [0, 8], 0.2)
    torch.testing.assert_close(mixed, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("kept_nowhere")
def test_tiles_with_other_last_bits_run_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.products(Rounding()) == tile_check.RIGHT
    monkeypatch.setattr(checks, "causal", checks.products)
    monkeypatch.setattr(amx, "unit", lambda unit=Rounding(): unit)
    assert route.choose(BF16, 64).least_rows == 1


@pytest.mark.usefixtures("kept_nowhere")
@pytest.mark.parametrize(("own", "tiles"), [(1.0, True), (9.0, False)])
def test_tiles_that_were_measured_to_be_slower_are_not_used(
    monkeypatch: pytest.MonkeyPatch, own: float, tiles: bool
) -> None:
    times = {"32": {"tiles": own, "vectors": 3.0}, "1": {"vectors": 2.0}}
    monkeypatch.setattr(table, "measured", lambda: {"attention": times})
    monkeypatch.setattr(checks, "causal", lambda unit: tile_check.SAME_BITS)
    assert (route.choose(BF16, 64) != route.VECTORS) == tiles


def test_both_kernels_are_measured() -> None:
    times = measure_attention([1, 17], 0.0)
    assert times.keys() == {"1", "17"}
    assert all(row.keys() == {"tiles", "vectors"} for row in times.values())


@pytest.mark.usefixtures("kept_nowhere")
def test_a_check_is_made_once_on_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(findings, "cache_folder", lambda: tmp_path)
    made = []

    def check(unit: amx.Unit) -> int:
        made.append(unit)
        return tile_check.SAME_BITS

    for _ in range(2):
        findings.known.cache_clear()  # as in another process
        tile_check.outcome.cache_clear()
        assert tile_check.outcome("some kernels", check, EMULATION) == tile_check.SAME_BITS
    assert made == [EMULATION]
