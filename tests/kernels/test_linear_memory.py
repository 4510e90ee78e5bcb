"""Linear layers read nothing past their inputs, and share nothing between threads."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sensorium.kernels import ops
from sensorium.kernels.cpu.linear import floats
from sensorium.kernels.weight import PackedWeight, QuantizedTensor

PAGE = mmap.PAGESIZE
FORMATS = ("float", "int8", "int4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (7, 5), (17, 31), (33, 257), (16, 129), (100, 64))


def packed(num_outputs: int, num_inputs: int, form: str, dtype: torch.dtype) -> PackedWeight:
    generator = torch.Generator().manual_seed(num_outputs * 1000 + num_inputs)
    if form == "float":
        weight = torch.randn(num_outputs, num_inputs, generator=generator)
        return ops.pack_weight(weight.to(dtype), dtype)
    bits, group = (8, num_inputs) if form == "int8" else (4, 32)
    most = 2 ** (bits - 1) - 1
    shape = (num_outputs, num_inputs)
    values = torch.randint(-most, most + 1, shape, dtype=torch.int8, generator=generator)
    scales = torch.rand(num_outputs, -(-num_inputs // group), generator=generator)
    return ops.pack_weight(QuantizedTensor(values, scales.bfloat16().float(), bits, group), dtype)


@pytest.fixture
def memory() -> Iterator[list[mmap.mmap]]:
    """Memory that lives as long as the test."""
    held: list[mmap.mmap] = []
    yield held
    held.clear()


def before_a_wall(x: torch.Tensor, memory: list[mmap.mmap]) -> torch.Tensor:
    """Return a copy whose last byte is the last before a page that kills whoever reads it."""
    num_bytes = x.numel() * x.element_size()
    size = -(-num_bytes // PAGE) * PAGE + PAGE
    held = mmap.mmap(-1, size)
    memory.append(held)
    address = ctypes.addressof(ctypes.c_char.from_buffer(held))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size - PAGE), PAGE, 0) == 0
    place = size - PAGE - num_bytes
    copy = torch.frombuffer(held, dtype=x.dtype, count=x.numel(), offset=place).view(x.shape)
    return copy.copy_(x)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_past_the_end_is_read(
    form: str, dtype: torch.dtype, memory: list[mmap.mmap]
) -> None:
    for num_outputs, num_inputs in SHAPES:
        multiply = packed(num_outputs, num_inputs, form, dtype).bind(None, None)
        for num_rows in (1, 2, 5, 7, 33):
            x = torch.randn(num_rows, num_inputs).to(dtype)
            assert torch.equal(multiply(before_a_wall(x, memory)), multiply(x))
        assert multiply(x[:0]).shape == (0, num_outputs)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_any_layout_and_rows_that_are_no_numbers(form: str, dtype: torch.dtype) -> None:
    multiply = packed(33, 70, form, dtype).bind(None, None)
    wide = torch.randn(9, 140).to(dtype)
    for x in (wide[:, ::2], wide[:, :70], torch.randn(70, 9).to(dtype).t()):
        assert torch.equal(multiply(x), multiply(x.contiguous()))
    good = wide[:, :70].contiguous()
    mixed = good.clone()
    mixed[3], mixed[4] = torch.nan, torch.inf
    expected, found = multiply(good), multiply(mixed)
    assert torch.equal(found[[0, 1, 2, 5, 6, 7, 8]], expected[[0, 1, 2, 5, 6, 7, 8]])
    assert not torch.isfinite(found[3:5]).any()
    assert not multiply(torch.zeros_like(good)).any()


@pytest.mark.parametrize("form", FORMATS)
def test_several_threads_and_any_number_of_them(form: str) -> None:
    dtype = torch.bfloat16 if ops.has_own_product(torch.bfloat16) else torch.float32
    if form == "float" and not ops.has_own_product(dtype):
        pytest.skip("the libraries' products promise no bits for other numbers of threads")
    weight = packed(416, 448, form, dtype)
    multiply = weight.bind(torch.randn(416).to(dtype), None)
    inputs = [torch.randn(rows, 448).to(dtype) for rows in (1, 9, 70)]
    expected = [multiply(x) for x in inputs]
    before = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 16):
            torch.set_num_threads(number)
            for x, right in zip(inputs, expected, strict=True):
                assert torch.equal(multiply(x), right), number
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: multiply(inputs[index % 3]), range(60)))
    for index, result in enumerate(found):
        assert torch.equal(result, expected[index % 3])


@pytest.mark.skipif(not floats.available("bfloat16"), reason="this CPU has no float panels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(50, 64), (7, 64), (64, 33), (90, 33), (48, 64)])
def test_packing_pads_bands_and_not_the_whole_weight(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    pad = torch.nn.functional.pad

    def counted(rows: torch.Tensor, missing: tuple[int, ...]) -> torch.Tensor:
        sizes.append(rows.numel())
        return pad(rows, missing)

    monkeypatch.setattr(torch.nn.functional, "pad", counted)
    monkeypatch.setattr(floats, "PADDED_VALUES", 16 * 34)
    weight = torch.randn(shape).to(dtype)
    packed = floats.pack_weight(weight)
    assert torch.equal(packed.rows(torch.arange(shape[0])), weight)
    assert max(sizes, default=0) <= 16 * shape[1]
    assert bool(sizes) == (shape != (48, 64))


@pytest.mark.skipif(not floats.available("bfloat16"), reason="this CPU has no float panels")
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system's own list is read")
def test_large_panels_ask_for_huge_pages() -> None:
    packed = floats.pack_weight(torch.randn(2048, 1024).bfloat16())
    place, found = packed.panels.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, end = (int(number, 16) for number in first.split("-"))
            found = start <= place < end
        elif first == "VmFlags:" and found:
            assert "hg" in rest.split()
            return
    pytest.fail("the panels are nowhere")
