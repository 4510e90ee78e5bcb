"""The engines that can be compared, the formats of their weights, and the processes' environment.

An engine is named ``RUNNER`` or ``RUNNER-FORMAT``: ``sensorium-int8``, ``llamacpp-q8_0``. One folder, the home,
holds what ``prepare.py`` makes: environments, checkpoints, and their conversions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
HOME = HERE / "home"
OURS = "sensorium"

SIZES = {
    "float32": ("float32",),
    "16-bit": ("bf16", "f16", "fp16"),
    "8-bit": ("int8", "q8_0"),
    "4-bit": ("int4", "q4_k_m"),
}
"""Formats of weights by the size of a value: engines of one size are compared with each other."""

FORMATS = {
    OURS: ("bf16", "int8", "int4", "float32"),
    "llamacpp": ("f16", "q8_0", "q4_k_m"),
    "openvino": ("fp16", "int8", "int4"),
    "vllm": ("bf16", "float32"),
    "transformers": ("bf16", "float32"),
}
"""Formats that each runner knows."""

MEMORY = {"float32": 2.9, "16-bit": 1.6, "8-bit": 1.1, "4-bit": 1.0}
"""Expected peak of memory, times the checkpoint in 16 bits; ``openvino-fp16`` widens its weights."""
FIXED_GIB = 0.8
"""Expected memory beside weights: libraries, workspaces, KV cache."""

LEVEL_VARIABLE = "PEERS_CPU_LEVEL"
"""Says to a runner that has to hold its engine to a level itself which one."""

_TORCH_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
_NUMBA_AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
LEVELS: dict[str, dict[str, dict[str, str]]] = {
    "native": {},
    "avx2": {
        OURS: {**_TORCH_AVX2, **_NUMBA_AVX2},
        "transformers": _TORCH_AVX2,
        "vllm": {**_TORCH_AVX2, "TORCHINDUCTOR_CPP_MARCH": "haswell", LEVEL_VARIABLE: "avx2"},
        "openvino": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    },
}
"""Variables that hold each runner to a CPU level. ``llamacpp`` has a build for each, and
``openvino`` a library before it that answers its questions about the CPU."""


@dataclass(frozen=True, slots=True)
class EngineKind:
    """An engine, the Python that runs it, the home and the CPU level."""

    name: str
    python: Path
    home: Path = HOME
    cpu: str = "native"

    @property
    def runner(self) -> str:
        """The part of the name that says which ``run_NAME.py`` runs it."""
        return self.name.partition("-")[0]

    @property
    def format(self) -> str:
        """The part of the name that says how weights are kept; "" for the checkpoint's type."""
        return self.name.partition("-")[2]

    @property
    def size(self) -> str:
        """The key of ``SIZES`` of the format."""
        sizes = (size for size, formats in SIZES.items() if self.format in formats)
        return next(sizes, "16-bit")

    def arguments(self) -> list[str]:
        """The flags of ``worker.py`` that this engine adds."""
        flags = ["--home", str(self.home), "--cpu", self.cpu]
        return [*flags, "--format", self.format] if self.format else flags

    def files(self, checkpoint: Path) -> list[Path]:
        """The files that the engine loads its weights from."""
        if self.runner == "llamacpp":
            kinds = (self.format, "mmproj-f16")
            found = [self.home / "gguf" / f"{checkpoint.name}-{kind}.gguf" for kind in kinds]
        elif self.runner == "openvino":
            folder = self.home / "openvino" / f"{checkpoint.name}-{self.format}"
            found = sorted(folder.glob("*.bin"))
        else:
            found = sorted(checkpoint.glob("*.safetensors"))
        return [path for path in found if path.exists()]

    def expected_gib(self, checkpoint_bytes: int) -> float:
        """Expected peak memory of this engine with a checkpoint of that size."""
        times = 2.9 if self.name == "openvino-fp16" else MEMORY[self.size]
        return FIXED_GIB + times * checkpoint_bytes / 2**30 + (2 if self.runner == "vllm" else 0)

    def environment(
        self,
        num_threads: int,
        kv_cache_gib: float,
        caches: Path,
        given: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """The process environment, from ``given`` or this process's.

        ``caches`` takes all that the engine compiles, so that it can be cold or warm.
        """
        found = {
            **(os.environ if given is None else given),
            "OMP_NUM_THREADS": str(num_threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "NUMBA_CACHE_DIR": str(caches / "numba"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "XDG_CACHE_HOME": str(caches / "xdg"),
            **LEVELS[self.cpu].get(self.runner, {}),
        }
        if self.runner == OURS:
            found["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        if self.runner == "vllm":
            found |= {
                "VLLM_CACHE_ROOT": str(caches / "vllm"),
                "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(kv_cache_gib))),
                "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}",
                "VLLM_NO_USAGE_STATS": "1",
                "DO_NOT_TRACK": "1",
                "LD_PRELOAD": f"libtcmalloc_minimal.so.4:{self._library('libiomp5.so')}",
            }
            del found["OMP_NUM_THREADS"]
        if self.runner == "openvino" and self.cpu != "native":
            found["LD_PRELOAD"] = str(self.home / "openvino-avx2.so")
        return found

    def _library(self, name: str) -> Path:
        return self.python.parent.parent / "lib" / name


def engine_kind(text: str, home: Path, cpu: str) -> EngineKind:
    """Read ``NAME`` or ``NAME=PYTHON``. Raises ValueError."""
    name, _, python = text.partition("=")
    environments = {"vllm": "vllm-env", "openvino": "openvino-env"}
    runner, _, weights = name.partition("-")
    if runner not in FORMATS or (weights and weights not in FORMATS[runner]):
        known = [f"{each}-{kind}" for each, kinds in FORMATS.items() for kind in kinds]
        raise ValueError(f"{name!r} is none of {', '.join(known)}")
    path = Path(python) if python else Path(sys.executable)
    if not python and runner in environments:
        path = home / environments[runner] / "bin" / "python"
    if not path.is_file():
        raise ValueError(f"{name}: there is no {path}; prepare.py makes the environments")
    return EngineKind(name, path.absolute(), home.absolute(), cpu)


def in_groups(
    kinds: list[EngineKind], checkpoint_bytes: int, memory_gib: float
) -> list[list[EngineKind]]:
    """The engines in their order, as many together as are expected to fit into the memory."""
    groups: list[list[EngineKind]] = []
    free = 0.0
    for kind in kinds:
        wanted = kind.expected_gib(checkpoint_bytes)
        if not groups or wanted > free:
            groups.append([])
            free = memory_gib
        groups[-1].append(kind)
        free -= wanted
    return groups
