"""Memory while weights are loaded: what is copied, what is given back, and the peak of a start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sensorium.models.interface import Part, WeightSlot
from sensorium.models.loading.fill import fill
from sensorium.models.loading.memory import MappedFiles, Scratch, joined, lent, owned
from sensorium.models.loading.weights import SafetensorsFiles


def test_only_what_is_lent_is_copied() -> None:
    file, own = torch.arange(6.0), torch.arange(6.0)
    assert owned(own).data_ptr() != own.data_ptr()
    with lent([file]):
        assert owned(own) is own
        assert owned(file[2:]).data_ptr() != file[2:].data_ptr()
        assert torch.equal(owned(file[2:]), file[2:])


def test_parts_that_lie_together_are_joined_without_a_copy() -> None:
    parts = [torch.randn(rows, 3) for rows in (2, 5, 1)]
    scratch = Scratch()
    placed = scratch.filled([*parts, torch.ones(8)], torch.bfloat16)
    found = joined(placed[:3])
    assert torch.equal(found, torch.cat(parts).to(torch.bfloat16))
    assert found.data_ptr() == placed[0].data_ptr()
    apart = joined(parts)
    assert torch.equal(apart, torch.cat(parts))
    assert torch.equal(joined([placed[1], placed[0]]), torch.cat((placed[1], placed[0])))


def test_pages_that_are_given_back_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    expected = torch.arange(1 << 20).float()
    save_file({"a": expected, "b": expected + 1}, path)
    source = SafetensorsFiles(tmp_path, ())
    files = source.mapped()
    assert files.ranges or not Path("/proc/self/maps").exists()
    for name, offset in (("a", 0.0), ("b", 1.0)):
        tensor = source.read(Part(name, tuple(expected.shape)))
        files.read_ahead(tensor)
        files.give_back(tensor)
        assert torch.equal(tensor, expected + offset)


def test_memory_that_is_no_file_is_left_alone(tmp_path: Path) -> None:
    tensor = torch.arange(1 << 16)
    mapped = MappedFiles([tmp_path / "model.safetensors"])
    mapped.ranges = [(0, 4096)]
    mapped.give_back(tensor)
    assert torch.equal(tensor, torch.arange(1 << 16))


class Recorder:
    """A model of slots that keep what they are given, and note the order."""

    dtype = torch.float32
    device = torch.device("cpu")
    ignored_weights = ()

    def __init__(self, *slots: tuple[str, ...]) -> None:
        self.names, self.kept = slots, {}
        self.order: list[tuple[str, ...]] = []

    def slots(self) -> list[WeightSlot]:
        return [
            WeightSlot(tuple(Part(n, SHAPES[n]) for n in names), self._assign(names))
            for names in self.names
        ]

    def _assign(self, names: tuple[str, ...]):  # type: ignore[no-untyped-def]
        def assign(*tensors: torch.Tensor) -> None:
            self.order.append(names)
            self.kept.update(zip(names, map(owned, tensors), strict=True))

        return assign


SHAPES = {"a": (4, 8), "b": (64, 8), "c": (16, 8), "d": (8, 8)}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_large_slots_come_first_and_nothing_refers_to_the_file(
    tmp_path: Path, stored: torch.dtype
) -> None:
    tensors = {name: torch.randn(shape).to(stored) for name, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = Recorder(("a",), ("c", "d"), ("b",))
    fill(model, SafetensorsFiles(tmp_path, ()))  # type: ignore[arg-type]
    assert model.order == [("b",), ("c", "d"), ("a",)]
    (tmp_path / "model.safetensors").write_bytes(bytes(8))
    for name, tensor in tensors.items():
        assert torch.equal(model.kept[name], tensor.float())


def test_loading_ends_when_it_is_told_to(tmp_path: Path) -> None:
    save_file({n: torch.zeros(s) for n, s in SHAPES.items()}, tmp_path / "model.safetensors")
    model = Recorder(*((name,) for name in SHAPES))

    def proceed() -> None:
        if len(model.order) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(model, SafetensorsFiles(tmp_path, ()), proceed=proceed)  # type: ignore[arg-type]
    assert len(model.order) == 2


PEAK = """
import os, sys, torch
from pathlib import Path
from sensorium.layers.linear import Linear
from sensorium.models.interface import Part, WeightSlot
from sensorium.models.loading.fill import fill
from sensorium.models.loading.quantize import QUANTIZERS, WeightFormats
from sensorium.models.loading.weights import SafetensorsFiles, linear_slot
from sensorium.models.loading.weights_cache import CacheSettings

class Model:
    dtype = getattr(torch, sys.argv[2])
    device = torch.device("cpu")
    ignored_weights = ()
    layers = [Linear(1024, 4096) for _ in range(12)]
    def slots(self):
        for i, layer in enumerate(self.layers):
            yield linear_slot(layer, [(f"{i}.a", 2048), (f"{i}.b", 2048)])

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name + ":"))) * 1024

warm = Linear(1024, 4096)  # what the libraries make for a shape is no part of the weights
warm.quantize = QUANTIZERS.get(sys.argv[3])
warm.load(torch.randn(4096, 1024).to(Model.dtype))
del warm
source = SafetensorsFiles(Path(sys.argv[1]), ())
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
formats = WeightFormats(encoder=sys.argv[3])
kept = None
if sys.argv[3] != "none":
    kept = CacheSettings(Path(sys.argv[1]), 1 << 30).open(source.states, sys.argv[3])
fill(Model(), source, formats, cache=kept)
weights = sum(layer.weight.nbytes for layer in Model.layers)
peak = status("VmHWM") - before
print(peak / weights, (status("VmRSS") - before) / weights, (peak - weights) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own counters are read")
@pytest.mark.parametrize(
    ("dtype", "form"),
    [("bfloat16", "none"), ("float32", "none"), ("bfloat16", "int8"), ("bfloat16", "int4")],
)
def test_the_peak_of_loading_is_near_the_weights(tmp_path: Path, dtype: str, form: str) -> None:
    """Resident memory, with pages of the file: the model and its file together would be twice.

    Quantized weights are made first, then read from the cache.
    """
    tensors = {
        f"{i}.{part}.weight": torch.randn(2048, 1024).to(torch.bfloat16)
        for i in range(12)
        for part in "ab"
    }
    save_file(tensors, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", PEAK, str(tmp_path), dtype, form]
    for _ in range(1 if form == "none" else 2):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, after, more = map(float, done.stdout.split())
        assert after < 1.2, done.stdout
        # Besides the model: the scratch buffer of a slot (1/12), and pages of few slots; for
        # quantized ones, which are smaller, buffers whose size depends on no model.
        assert peak < 1.25 if form == "none" else more < 45, done.stdout
