"""Low-rank adapters beside plain torch: numbers, bits whatever else is in the batch, replays."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from sensorium.kernels import ops
from sensorium.kernels.adapters import AdaptedProduct, LowRank, PlainAdapted, RowAdapters, Run
from sensorium.kernels.cpu import graph
from sensorium.kernels.cpu.adapters import low_rank
from sensorium.kernels.cpu.linear import floats
from sensorium.kernels.cpu.linear import product as row_products
from sensorium.layers.linear import Linear
from sensorium.layers.mlp import MIN_ROWS, GatedMLP
from tests.kernels.test_graph import FORMS, Layers, Steps

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LANES = 3


def random_parts(
    seed: int, inputs: int, sizes: Sequence[tuple[int, int, int]], dtype: torch.dtype
) -> list[LowRank]:
    """Parts of (first output, outputs, rank); some multiply and shift their outputs."""
    generator = torch.Generator().manual_seed(seed)
    return [
        LowRank(
            (torch.randn((rank, inputs), generator=generator) / inputs**0.5).to(dtype),
            (torch.randn((outputs, rank), generator=generator) / rank**0.5).to(dtype),
            0.25 / (1 + seed),
            first,
            torch.rand((2, outputs), generator=generator) if rank % 2 and seed % 2 == 0 else None,
        )
        for first, outputs, rank in sizes
    ]


def filled(
    product: AdaptedProduct, inputs: int, outputs: int, dtype: torch.dtype
) -> AdaptedProduct:
    """Adapters of three lanes: two of several parts and ranks, the last changes nothing."""
    third = outputs // 3
    product.put(0, random_parts(0, inputs, [(0, third, 1), (third, outputs - third, 17)], dtype))
    product.put(1, random_parts(1, inputs, [(2 * third, outputs - 2 * third, 5)], dtype))
    product.put(2, ())
    return product


def mixed_runs(num_rows: int) -> list[Run]:
    """Runs of all lanes, with rows without one between them."""
    cuts = [0, num_rows // 5, num_rows // 2, num_rows // 2 + num_rows // 7, num_rows]
    lanes = (1, 0, None, 2)
    pairs = zip(lanes, cuts, cuts[1:], strict=False)
    return [Run(lane, start, stop) for lane, start, stop in pairs if lane is not None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (33, 50), (257, 700)])
def test_sums_are_those_of_plain_torch(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    own = filled(ops.adapted_product(inputs, outputs, LANES, dtype, CPU), inputs, outputs, dtype)
    plain = filled(PlainAdapted(inputs, dtype, CPU), inputs, outputs, dtype)
    rows = RowAdapters()
    for num_rows in (1, 2, 4, 7, 16, 65, 130):
        x = torch.randn(num_rows, inputs).to(dtype)
        y = torch.randn(num_rows, outputs).to(dtype)
        found, expected = y.clone(), y.clone()
        with rows.using(mixed_runs(num_rows), num_rows):
            own.add(x, found, rows)
            plain.add(x, expected, rows)
        torch.testing.assert_close(found, expected)
        assert num_rows < 7 or not torch.equal(found, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    inputs, outputs, num_rows = 90, 100, 23
    product = filled(
        ops.adapted_product(inputs, outputs, LANES, dtype, CPU), inputs, outputs, dtype
    )
    x, y = torch.randn(num_rows, inputs).to(dtype), torch.randn(num_rows, outputs).to(dtype)
    rows, together = RowAdapters(), y.clone()
    runs = mixed_runs(num_rows)
    with rows.using(runs, num_rows):
        product.add(x, together, rows)
    for row in range(num_rows):
        lane = next((run.lane for run in runs if run.start <= row < run.stop), None)
        alone = y[row : row + 1].clone()
        with rows.using([] if lane is None else [Run(lane, 0, 1)], 1):
            product.add(x[row : row + 1], alone, rows)
        assert torch.equal(alone[0], together[row]), row


def test_a_lane_is_used_again() -> None:
    product = ops.adapted_product(32, 48, 2, torch.float32, CPU)
    rows, x = RowAdapters(), torch.randn(3, 32)
    results = []
    for seed in (1, 2, None, 1):
        parts = () if seed is None else random_parts(seed, 32, [(0, 48, 8 * seed)], torch.float32)
        product.put(1, parts)
        y = torch.zeros(3, 48)
        with rows.using([Run(1, 0, 3)], 3):
            product.add(x, y, rows)
        results.append(y)
    assert torch.equal(results[0], results[3])
    assert not torch.equal(results[0], results[1])
    assert not results[2].any()


def test_many_rows_go_in_blocks_whose_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, outputs, num_rows = 33, 50, 300
    sizes = inputs, outputs, torch.float32
    product = filled(ops.adapted_product(inputs, outputs, LANES, torch.float32, CPU), *sizes)
    x, y, rows = torch.randn(num_rows, inputs), torch.randn(num_rows, outputs), RowAdapters()
    found = []
    reserved: list[int] = []

    def scratch(size: int) -> tuple[int, int]:
        reserved.append(size)
        return row_products.scratch(size)

    monkeypatch.setattr(low_rank, "scratch", scratch)
    for most in (row_products.SCRATCH_BYTES, 20_000):
        monkeypatch.setattr(row_products, "SCRATCH_BYTES", most)
        reserved.clear()
        for lanes in (rows.using(mixed_runs(num_rows), num_rows), rows.everywhere(0)):
            found.append(y.clone())
            with lanes:
                product.add(x, found[-1], rows)
        assert max(reserved) <= most
    assert len(reserved) > 2, "blocks"
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_a_part_of_a_step_leaves_the_tiles_of_the_whole_where_they_are() -> None:
    rows = RowAdapters()
    with rows.using([Run(1, 0, 7)], 7):
        whole = rows.tiles(7)
        before = whole.table.copy()
        with rows.narrowed(0, 3):
            part = rows.tiles(3)
        assert part.table.tolist() == [1, 1, 0, 3]
        assert (whole.table == before).all()
        assert rows.tiles(7) is whole
    with rows.using([Run(2, 0, 7)], 7):
        assert rows.tiles(7).table is whole.table


def test_lanes_of_other_rows_are_a_mistake() -> None:
    rows = RowAdapters()
    assert not rows.active
    with rows.using([Run(0, 0, 2)], 4), pytest.raises(ValueError, match="3 rows"):
        rows.tiles(3)
    with rows.everywhere(1):
        assert rows.runs(9) == [Run(1, 0, 9)]
    with pytest.raises(ValueError, match="parts"):
        LowRank(torch.zeros(2, 3), torch.zeros(3, 3), 1.0)


def loaded(inputs: int, outputs: int, act: str | None = None) -> Linear:
    """A linear layer with a random weight."""
    layer = Linear(inputs, outputs, act=act)
    layer.load(torch.randn(outputs, inputs) / inputs**0.5)
    return layer


def adapted(layer: Linear, rows: RowAdapters, seed: int = 1) -> LowRank:
    """Give lane 0 of a layer an adapter."""
    [part] = random_parts(seed, layer.num_inputs, [(0, layer.num_outputs, 4)], torch.float32)
    product = ops.adapted_product(layer.num_inputs, layer.num_outputs, 1, torch.float32, CPU)
    product.put(0, [part])
    layer.adapt(product, rows)
    return part


def test_an_adapter_comes_before_the_activation() -> None:
    layer, rows, x = loaded(32, 48, "gelu"), RowAdapters(), torch.randn(2, 3, 32)
    before = layer(x)
    weight = torch.randn(48, 32) / 6
    layer.load(weight)
    part = adapted(layer, rows)
    assert torch.equal(layer(x), torch.nn.functional.gelu(x @ weight.t())) or torch.allclose(
        layer(x), torch.nn.functional.gelu(x @ weight.t()), atol=1e-5
    )
    with rows.everywhere(0):
        whole = weight + part.scale * part.b @ part.a
        expected = torch.nn.functional.gelu(x @ whole.t())
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert before.shape == layer(x).shape


def test_parts_of_many_rows_keep_their_lanes() -> None:
    mlp, rows = GatedMLP(16, 3000), RowAdapters()
    for layer in (mlp.gate_up, mlp.down):
        layer.load(torch.randn(layer.num_outputs, layer.num_inputs) / 16)
        adapted(layer, rows)
    num_rows = 5 * MIN_ROWS
    x = torch.randn(num_rows, 16)
    runs = [Run(0, 100, 300), Run(0, 700, num_rows - 5)]
    plain = mlp(x)
    with rows.using(runs, num_rows):
        together = mlp(x)
    for start, stop, lane in ((0, 100, None), (100, 300, 0), (300, 700, None), (700, 1275, 0)):
        with rows.everywhere(lane):
            torch.testing.assert_close(together[start:stop], mlp(x[start:stop]))
    assert torch.equal(together[:100], plain[:100])
    assert not torch.equal(together[100:300], plain[100:300])


@pytest.mark.skipif(not floats.available("float16"), reason="no kernels to capture here")
@pytest.mark.parametrize("form", FORMS)
def test_replayed_steps_have_the_bits_of_launched_ones(form: str) -> None:
    """With any mix of adapters in each step; others are loaded in the middle."""
    run, rows = Layers(form), RowAdapters()
    layers = [
        linear
        for attention, mlp, _, _ in run.layers
        for linear in (attention.qkv, attention.o, mlp.gate_up, mlp.down)
    ]
    products = []
    for linear in layers:
        linear.weight = floats.pack_weight(torch.zeros(1, 1, dtype=run.dtype))  # it is loaded
        sizes = (linear.num_inputs, linear.num_outputs)
        product = ops.adapted_product(*sizes, LANES, run.dtype, CPU)
        products.append(filled(product, *sizes, run.dtype))
        linear.adapt(product, rows)
    steps, other = Steps([30, 252, 3, 9], run.dtype), Steps([30, 252, 3, 9], run.dtype)
    graphs = graph.StepGraphs(run)
    mixes = ([Run(0, 0, 4)], [Run(1, 1, 2)], [Run(0, 0, 1), Run(1, 1, 3), Run(2, 3, 4)], [])
    for number in range(5 * graph.STEPS_BEFORE):
        (embeds, batch), (same, twin) = steps.step(number), other.step(number)
        runs = mixes[number % len(mixes)]
        version = 1 if number < 3 * graph.STEPS_BEFORE else 2
        if number == 3 * graph.STEPS_BEFORE:
            for linear, product in zip(layers, products, strict=True):
                sizes = [(0, linear.num_outputs, 40)]
                product.put(2, random_parts(7, linear.num_inputs, sizes, run.dtype))
        batch.adapters = version if runs else 0
        with rows.using(runs, 4):
            found = graphs(embeds, batch).clone()
            assert torch.equal(found, run(same, twin)), number
    assert {4, (4, 2)} >= set(graphs.captured) >= {(4, 2)}
