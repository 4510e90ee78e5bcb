"""Which dtype a model is held in."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sensorium.kernels import ops
from sensorium.kernels.cpu.linear import levels, onednn, table
from sensorium.models import dtypes, loader
from sensorium.processes.start import child_environment
from tests.checkpoints import make_text


@pytest.fixture
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without units for 16-bit numbers, and without kernels that widen them."""
    monkeypatch.setattr(onednn, "has_units", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(table, "choose", lambda form: table.TORCH)


@pytest.fixture
def widening_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without units for 16-bit numbers, on which kernels widen them."""
    monkeypatch.setattr(onednn, "has_units", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(table, "choose", lambda form: table.PANELS)


@pytest.mark.usefixtures("widening_cpu")
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_auto_keeps_what_kernels_widen(
    tmp_path: Path, stored: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_text("llama", tmp_path, dtype=stored)
    with caplog.at_level(logging.INFO, "sensorium.models.dtypes"):
        found = loader.load(str(folder), device="cpu")
    assert found.model.dtype == getattr(torch, stored)
    assert f"no units for {stored}: the weights stay in it" in caplog.text


@pytest.mark.usefixtures("widening_cpu")
def test_linear_layers_of_others_are_not_in_these_kernels() -> None:
    found = dtypes.suited_to_cpu(torch.bfloat16, lambda: 1000, in_kernels=False)
    assert found == torch.float32


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_auto_is_float32_where_the_cpu_has_no_units(
    tmp_path: Path, stored: str, load_format: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_text("llama", tmp_path, dtype=stored)
    with caplog.at_level(logging.INFO, "sensorium.models.dtypes"):
        found = loader.load(str(folder), device="cpu", load_format=load_format)
    assert found.model.dtype == torch.float32
    assert f"no units for {stored}: the weights are held as float32" in caplog.text
    assert f"--dtype {stored} keeps them" in caplog.text


@pytest.mark.usefixtures("plain_cpu")
def test_what_was_asked_for_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_text("llama", tmp_path, dtype="bfloat16")
    assert loader.load(str(folder), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    assert loader.load(str(folder), device="cpu", dtype="float32").model.dtype == torch.float32
    assert "units" not in caplog.text


@pytest.mark.usefixtures("plain_cpu")
def test_too_little_memory_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """14 GiB of float32 weights need 17.5 while they are loaded."""
    weights = 7 << 29
    for available, expected in ((17 << 30, torch.bfloat16), (18 << 30, torch.float32)):
        monkeypatch.setattr(dtypes, "available_memory", lambda have=available: have)
        assert dtypes.suited_to_cpu(torch.bfloat16, lambda: weights) == expected
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "(14.0 GiB, 17.5 while loading) do not fit into the 17.0 GiB" in warning.getMessage()


def test_weights_are_not_counted_where_the_cpu_has_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting reads the headers of all files."""
    monkeypatch.setattr(onednn, "has_units", lambda dtype: True)

    def count() -> int:
        raise AssertionError("counted")

    assert dtypes.suited_to_cpu(torch.bfloat16, count) == torch.bfloat16


def test_a_cpu_with_units_keeps_the_checkpoints_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "has_units", lambda dtype: True)
    folder = make_text("llama", tmp_path, dtype="bfloat16")
    assert loader.load(str(folder), device="cpu").model.dtype == torch.bfloat16


def test_units_are_found_as_the_library_uses_them() -> None:
    """Told to do without AVX-512, oneDNN packs no 16-bit weights.

    A CPU that only widens them has no units either.
    """
    assert ops.has_units(torch.float32)
    code = "import torch; from sensorium.kernels import ops; print(ops.has_units(torch.bfloat16))"
    environment = child_environment() | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_packing_alone_makes_no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "packs", lambda dtype: True)
    monkeypatch.setattr(levels, "is_x86", lambda: True)
    monkeypatch.setattr(levels, "features", lambda: frozenset({"avx512f"}))
    assert not onednn.has_units.__wrapped__(torch.bfloat16)
    monkeypatch.setattr(levels, "features", lambda: frozenset({"avx512f", "avx512bf16"}))
    assert onednn.has_units.__wrapped__(torch.bfloat16)
