"""Products of many rows with int8 and int4 weights by matrix tiles: the bits of the vectors."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.kernels.cpu import amx, findings, tile_check
from sensorium.kernels.cpu.amx_emulation import EMULATION
from sensorium.kernels.cpu.linear import int8, integers, table, tiles
from sensorium.kernels.cpu.linear.grouped import int4
from sensorium.kernels.cpu.linear.integer.kernel import IntegerProduct
from tests.kernels.test_integer_linear import FORMATS, LONGEST, expected, make
from tests.kernels.tiles import UNITS, needs_emulation

pytestmark = [
    needs_emulation,
    pytest.mark.skipif(not integers.forms(), reason="this CPU has no AVX2 to compare with"),
]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run products by the emulation, unless a test says otherwise."""
    monkeypatch.setattr(amx, "unit", lambda: EMULATION)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(16, 32), (33, 896), (5, 7), (48, 588), (40, 4304)])
def test_tiles_give_the_products_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, name: str, unit: amx.Unit, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(amx, "unit", lambda: unit)
    weight = make(name, *shape)
    packed = FORMATS[name].pack(weight, torch.float32)
    by_tiles, by_vectors = (packed.bind_form(own) for own in (unit.name, integers.forms()[-1]))
    for num_rows in (1, 15, 16, 17, 64, 65, 140):
        x = torch.randn(num_rows, shape[1], generator=torch.Generator().manual_seed(num_rows))
        found = by_tiles(x)
        assert torch.equal(found, by_vectors(x)), num_rows
        torch.testing.assert_close(found, expected(x, weight), rtol=1e-6, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(list(FORMATS)),
    num_outputs=st.integers(1, 70),
    num_inputs=st.integers(1, 400),
    num_rows=st.integers(1, 140),
    threads=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    name: str,
    num_outputs: int,
    num_inputs: int,
    num_rows: int,
    threads: int,
    seed: int,
) -> None:
    packed = FORMATS[name].pack(make(name, num_outputs, num_inputs, seed), torch.bfloat16)
    x = torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(seed)).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = packed.bind_form(EMULATION.name)(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, packed.bind_form(integers.forms()[-1])(x))


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_sums_fit(name: str) -> None:
    weight = make(name, 16, LONGEST)
    weight.values.fill_(-127 if name == "int8" else -8)
    packed = FORMATS[name].pack(weight, torch.float32)
    x = torch.full((17, LONGEST), -3.0)
    found = packed.bind_form(EMULATION.name)(x)
    assert torch.equal(found, packed.bind_form(integers.forms()[-1])(x))
    torch.testing.assert_close(found, expected(x, weight), rtol=1e-5, atol=1e-5)


@pytest.fixture
def kept_nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(findings, "cache_folder", lambda: None)
    for function in (findings.known, tile_check.outcome):
        function.cache_clear()
    yield
    for function in (findings.known, tile_check.outcome):
        function.cache_clear()


def bound(name: str) -> IntegerProduct:
    packed = FORMATS[name].pack(make(name, 48, 588), torch.float32)
    product = packed.bind()
    assert isinstance(product, IntegerProduct)
    return product


@pytest.mark.usefixtures("kept_nowhere")
@pytest.mark.skipif(integers.forms()[-1:] == ("avx2",), reason="int8 has another layout with AVX2")
@pytest.mark.parametrize("name", FORMATS)
def test_many_rows_take_the_tiles_and_few_do_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "measured", dict)
    product = bound(name)
    assert product.many is not None
    module = {"int8": int8, "int4": int4}[name]
    assert product.many == (tiles.LEAST_ROWS, module.kernel(torch.float32, EMULATION.name))
    x = torch.randn(33, 588)
    whole = product(x)
    for count in (1, 15, 16, 20):
        assert torch.equal(product(x[:count]), whole[:count])
    monkeypatch.setattr(amx, "unit", lambda: None)
    alone = bound(name)
    assert alone.many is None
    assert torch.equal(alone(x), whole)


@pytest.mark.usefixtures("kept_nowhere")
def test_tiles_with_other_sums_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tiles, "compare", lambda *_: tile_check.WRONG)
    with caplog.at_level(logging.WARNING):
        assert bound("int4").many is None
    assert "products with int4 weights" in caplog.text


@pytest.mark.parametrize(
    ("times", "least"),
    [
        ({}, tiles.LEAST_ROWS),
        ({"1": (9.0, 1.0), "32": (2.0, 3.0), "128": (4.0, 9.0)}, 32),
        ({"1": (1.0, 9.0), "32": (5.0, 3.0), "128": (4.0, 9.0)}, 128),
        ({"1": (1.0, 9.0), "8": (1.0, 9.0)}, 16),
        ({"1": (9.0, 1.0), "128": (9.0, 8.0)}, None),
    ],
)
def test_measured_times_decide_from_how_many_rows(
    monkeypatch: pytest.MonkeyPatch, times: dict[str, tuple[float, float]], least: int | None
) -> None:
    rows = {count: {"tiles": own, "Int8Weight": other} for count, (own, other) in times.items()}
    monkeypatch.setattr(table, "measured", lambda: {"int8": rows})
    assert tiles.least_rows("int8", "Int8Weight") == least
