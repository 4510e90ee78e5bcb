"""Levels of CPUs: the instructions that kernels and libraries may use.

The kernels' compiler decides. Numba compiles for the host, or for what NUMBA_CPU_NAME and
NUMBA_CPU_FEATURES say; every question about instructions is asked here, so that these variables
restrict all kernels at once.
"""

from __future__ import annotations

import functools
import platform
import sys

from numba.core.registry import cpu_target

X86_LEVELS = (
    ("amx-int8", "amx-int8"),
    ("amx-bf16", "amx-bf16"),
    ("avx512-bf16", "avx512bf16"),
    ("avx512-vnni", "avx512vnni"),
    ("avx512", "avx512bw"),
    ("avx-vnni", "avxvnni"),
    ("avx2", "avx2"),
)
"""Levels from the highest down, each with the feature of LLVM that makes it."""
GENERIC = "generic"
LEVELS = (*(name for name, _ in X86_LEVELS), "neon", GENERIC)


@functools.cache
def features() -> frozenset[str]:
    """Return LLVM's names of the features that kernels are compiled for."""
    _, _, names = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(name[1:] for name in names.split(",") if name.startswith("+"))


def has(feature: str) -> bool:
    """Return whether kernels are compiled for a feature of LLVM, such as ``avx512f``."""
    return feature in features()


def is_x86() -> bool:
    """Return whether this is a 64-bit x86 processor."""
    return platform.machine() in ("x86_64", "AMD64")


@functools.cache
def level() -> str:
    """Return the level of this CPU, one of ``LEVELS``."""
    if is_x86():
        return next((name for name, feature in X86_LEVELS if has(feature)), GENERIC)
    return "neon" if platform.machine() in ("aarch64", "arm64") else GENERIC


def has_bf16_units() -> bool:
    """Return whether an x86 CPU multiplies bf16 without widening it first."""
    return any(map(has, ("avx512bf16", "amx-bf16", "avxneconvert")))


def has_integer_products() -> bool:
    """Return whether the products of int8 and int4 weights are compiled for this CPU."""
    return is_x86() and sys.maxsize > 2**32 and has("avx2") and has("fma")


def has_wide_registers() -> bool:
    """Return whether kernels have AVX-512: 32 vector registers of sixteen floats."""
    return has("avx512f")
