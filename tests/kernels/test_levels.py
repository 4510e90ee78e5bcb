"""Levels of CPUs as the kernels' compiler sees them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sensorium.kernels.cpu.linear import levels
from sensorium.processes.start import child_environment


def test_this_cpu_has_one_level() -> None:
    assert levels.level() in levels.LEVELS


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("+avx2", "avx2"),
        ("+avx2,+avxvnni", "avx-vnni"),
        ("+avx2,+avx512f,+avx512bw", "avx512"),
        ("+avx2,+avx512bw,+avx512vnni", "avx512-vnni"),
        ("+avx512bw,+avx512vnni,+avx512bf16", "avx512-bf16"),
        ("+avx512bw,+avx512bf16,+amx-bf16", "amx-bf16"),
        ("+avx512bf16,+amx-bf16,+amx-int8", "amx-int8"),
        ("+avx2,-avx512bw", "avx2"),
        ("+sse4.2", "generic"),
    ],
)
def test_features_make_levels(
    monkeypatch: pytest.MonkeyPatch, features: str, expected: str
) -> None:
    own = frozenset(name[1:] for name in features.split(",") if name[0] == "+")
    monkeypatch.setattr(levels, "features", lambda: own)
    monkeypatch.setattr(levels, "is_x86", lambda: True)
    assert levels.level.__wrapped__() == expected


@pytest.mark.skipif(not levels.is_x86(), reason="the restricted level is one of x86")
def test_numbas_configuration_restricts_the_level() -> None:
    code = (
        "from sensorium.kernels.cpu import amx\n"
        "from sensorium.kernels.cpu.attention import tile\n"
        "from sensorium.kernels.cpu.linear import levels, onednn\n"
        "print(levels.level(), levels.has_bf16_units(), amx.available(), tile.TILE_ROWS)\n"
    )
    environment = child_environment() | {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["avx2", "False", "False", "6"]
