"""``sensorium info``: versions, hardware, and what would be used on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from sensorium import __version__
from sensorium.config import GIB

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "numba", "pillow", "fastapi")
INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
)


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "info",
        help="versions, hardware, what would be used",
        description="Print versions, hardware, and what would be used on this machine.",
    )
    parser.add_argument("--json", action="store_true", help="print an object")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what is found."""
    found = collect()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for title, rows in found.items():
        print(title)
        width = max(map(len, rows))
        for name, value in rows.items():
            print(f"  {name:<{width}}  {_text(value)}")
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Everything, by title and name."""
    versions = {"sensorium": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    return {
        "versions": versions,
        "processor": _processor(),
        "gpus": _gpus() or {"none": "torch sees none"},
        "would be used": _choices(),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> dict[str, Any]:
    import psutil

    facts = _cpu_facts()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    memory = psutil.virtual_memory()
    return {
        "name": facts.get("model name", platform.processor() or platform.machine()),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "hardware threads": os.cpu_count(),
        "usable here": len(os.sched_getaffinity(0)),
        "instruction sets": [name for name in INSTRUCTION_SETS if name in flags],
        "memory": f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB free",
    }


def _cpu_facts() -> dict[str, str]:
    """The first processor of Linux's list; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    facts: dict[str, str] = {}
    for line in text.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        facts[name.strip()] = value.strip()
    return facts


def _gpus() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    found = {}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{facts.name}, {facts.total_memory / GIB:.1f} GiB"
    return found


def _choices() -> dict[str, Any]:
    """What a model in bfloat16, the usual type of checkpoints, would run on."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "device": "cuda" if gpu else "cpu",
        "dtype": _auto_dtype(gpu),
        "threads": "1 per stream" if gpu else len(os.sched_getaffinity(0)),
    }


def _auto_dtype(gpu: bool) -> str:
    """Return what ``--dtype auto`` stands for on this machine."""
    import torch

    from sensorium.kernels import ops

    if gpu:
        return "the checkpoint's (--dtype auto)"
    without = [t for t in ("bfloat16", "float16") if not ops.has_units(getattr(torch, t))]
    if not without:
        return "the checkpoint's (--dtype auto)"
    return (
        f"the checkpoint's, but float32 for {' and '.join(without)}, which this CPU has no units for, where the memory "
        "allows it (--dtype auto)"
    )


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
