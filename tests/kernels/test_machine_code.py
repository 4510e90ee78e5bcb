"""Machine code of kernels for CPUs that the machine at hand need not be: compiled and not run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sensorium.kernels.cpu import amx
from sensorium.kernels.cpu.attention.tiles import causal, varlen
from sensorium.kernels.cpu.elementwise import kernel
from sensorium.kernels.cpu.launch import Launcher, assembly
from sensorium.kernels.cpu.linear import int8, integers, levels, tiles
from sensorium.kernels.cpu.linear.grouped import int4
from sensorium.processes.start import child_environment

AVX2 = "+avx2,+fma,+f16c"
AVX512 = "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512cd,+avx512vnni,+avx512bf16"
CPUS = {
    "amx-int8": ("sapphirerapids", f"{AVX2},{AVX512},+amx-tile,+amx-bf16,+amx-int8"),
    "avx-vnni": ("alderlake", f"{AVX2},+avxvnni"),
}


@pytest.mark.skipif(not levels.is_x86(), reason="the instructions are those of x86")
@pytest.mark.parametrize("level", CPUS)
def test_instructions_of(level: str, tmp_path: Path) -> None:
    """Without kernels compiled before: those that are loaded have no assembly."""
    name, features = CPUS[level]
    environment = {
        "NUMBA_CPU_NAME": name,
        "NUMBA_CPU_FEATURES": features,
        "XDG_CACHE_HOME": str(tmp_path),
    }
    subprocess.run(
        [sys.executable, "-m", __name__, level], env=child_environment() | environment, check=True
    )


def instructions(launcher: Launcher) -> list[str]:
    """Return the instructions of a kernel of this process, as LLVM's assembler writes them."""
    text = assembly(launcher)
    assert "sensorium.tiles" not in text, "emulated tiles"
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.endswith(":") and line[0] not in "._"]


def check_tiles(launcher: Launcher, product: str) -> None:
    """Check that tiles are configured first, multiplied by one instruction, and released."""
    mnemonics = [line.split()[0] for line in instructions(launcher)]
    own = [name for name in mnemonics if name.startswith(("tdp", "tile", "ldtile"))]
    needed = {"ldtilecfg", "tilezero", "tileloadd", product, "tilestored", "tilerelease"}
    assert set(own) == needed, set(own)
    assert own[0] == "ldtilecfg"


def check_amx() -> None:
    assert amx.INSTRUCTIONS.name not in tiles.units(), "this system lets no process use tiles"
    tiles.units = lambda: {amx.INSTRUCTIONS.name: amx.INSTRUCTIONS}
    for module in (causal, varlen):
        build = amx.bound(module.build_attend, amx.INSTRUCTIONS)
        check_tiles(kernel(build, torch.bfloat16), "tdpbf16ps")
    for own in (int8, int4):
        check_tiles(own.kernel(torch.bfloat16, amx.INSTRUCTIONS.name), "tdpbsud")


def check_vnni() -> None:
    """Without AVX-512 there is no other encoding than that of VEX: no register past 15."""
    assert integers.forms() == ("avx2", "vnni256")
    for module in (int8, int4):
        lines = instructions(module.kernel(torch.float32, integers.forms()[-1]))
        products = [line for line in lines if "vpdpbusd" in line]
        assert products
        assert all(line.startswith("{vex}") and "%ymm" in line for line in products), products[0]
        assert not any("%zmm" in line or "{%k" in line for line in lines)
        assert not any(f"%ymm{number}" in line for line in lines for number in range(16, 32))


CHECKS: dict[str, Callable[[], None]] = {"amx-int8": check_amx, "avx-vnni": check_vnni}

if __name__ == "__main__":
    assert levels.level() == sys.argv[1]
    CHECKS[sys.argv[1]]()
