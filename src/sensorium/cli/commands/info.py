"""``sensorium info``: versions, hardware, and defaults on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from sensorium import __version__
from sensorium.cli.flags import (
    Parser,
    add_engine_flags,
    add_server_flags,
    build_engine_config,
    build_server_config,
    fields_of,
    print_warning,
)
from sensorium.cli.options import in_effect
from sensorium.config import ENGINE_SECTIONS, GIB, ServerConfig
from sensorium.processes import cores

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

DESCRIPTION = (
    "Print versions, hardware, and the defaults on this machine. With --config or other flags of "
    "serve, print the options that would be in effect, and where each comes from. With a MODEL, "
    "print what it is and what it needs: format, memory, how its weights run; nothing large is "
    "downloaded for it."
)
COMMON = {
    "--json": "--json",
    "--config": "--config serve.yaml",
    "--port": "--config serve.yaml --port 9000",
}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "info",
        help="show versions, hardware and the defaults on this machine",
        usage="%(prog)s [MODEL] [options]",
        description=DESCRIPTION,
    )
    add_options(parser, "print a JSON object")
    parser.common = COMMON
    parser.set_defaults(handler=run)


def add_options(parser: Parser, json_help: str) -> None:
    """Add the name of a model that is to be described, and all flags of a server."""
    parser.add_argument(
        "model_argument",
        metavar="MODEL",
        nargs="?",
        help="Hugging Face id, folder, or GGUF file to describe",
    )
    parser.add_argument("--json", action="store_true", help=json_help)
    parser.has_models = True
    add_server_flags(parser)
    add_engine_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the facts."""
    if arguments.model_argument is not None:
        return print_needs(arguments)
    found = _options(arguments) if is_configured(arguments) else collect()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for title, rows in found.items():
        print(title)
        width = max(map(len, rows), default=0)
        for name, value in rows.items():
            print(f"  {name:<{width}}  {_text(value)}")
    return 0


def print_needs(arguments: argparse.Namespace) -> int:
    """Print what a model is and needs; 1 where it cannot run here."""
    from sensorium.models.needs import needs_of

    arguments.model = arguments.model_argument
    config = build_engine_config(arguments)
    needs = needs_of(config.model, config.cache.kv_cache_dtype, config.parallel)
    problem = needs.problem()
    print(json.dumps(needs.as_dict(), indent=2) if arguments.json else "\n".join(needs.lines()))
    if problem is not None and not arguments.json:
        print_warning(problem)
    return int(problem is not None)


def is_configured(arguments: argparse.Namespace) -> bool:
    """Return whether a file or any flag of a server is given."""
    names = {f.name for cls in (*ENGINE_SECTIONS.values(), ServerConfig) for f, _ in fields_of(cls)}
    return arguments.config_file is not None or not names.isdisjoint(vars(arguments))


def _options(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the options in effect, by section: those that are set, and those left alone.

    Of several models: a section for each with those that are set.
    """
    if arguments.listed_models:
        models = [
            argparse.Namespace(**{**vars(model), "listed_models": []})
            for model in arguments.listed_models
        ]
        return {f"model {model.model}": _options(model)["set"] for model in models}
    engine, server = build_engine_config(arguments), build_server_config(arguments)
    found: dict[str, dict[str, Any]] = {"set": {}, "default": {}}
    for name, option in in_effect(arguments, engine, server).items():
        if option.source == "default":
            found["default"][name] = option.value
        else:
            found["set"][name] = {"value": option.value, "source": option.source}
    return found


def collect() -> dict[str, dict[str, Any]]:
    """Return all facts, by section and name."""
    versions = {"sensorium": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    return {
        "versions": versions,
        "processor": _processor(),
        "cores": _cores(),
        "gpus": _gpus() or {"none": "torch finds none"},
        "linear layers": _linear_layers(),
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
        "instruction sets": [name for name in INSTRUCTION_SETS if name in flags],
        "memory": f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB free",
    }


def _cores() -> dict[str, Any]:
    """Return what this process may use of the processors, as ``processes.cores`` found it."""
    found = cores.find()
    return {
        "CPUs of the system": os.cpu_count(),
        "allowed here": f"{len(found.allowed)} ({cores.cpu_list(found.allowed)})",
        "physical cores": len(found.physical),
        "efficiency cores": cores.cpu_list(found.slow) or "none",
        "memory nodes": [cores.cpu_list(node) for node in found.nodes],
        "quota of CPU time": "none" if found.quota is None else f"{found.quota:g} CPUs",
    }


def _cpu_facts() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo; empty if there is no such file."""
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
    """Return device, dtypes and threads of a model with default options."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "device": "cuda" if gpu else "cpu",
        "dtype": _auto_dtype(gpu),
        "threads": "1 per stream" if gpu else _threads(),
        "KV cache": "in that dtype (--kv-cache-dtype auto); int8 takes about half of 16 bits",
    }


def _threads() -> str:
    """Return the number of threads of a served engine on the CPU, and the reason."""
    chosen = cores.find().engine_threads()
    place = "" if chosen.cpus is None else f"; kept on CPUs {cores.cpu_list(chosen.cpus)}"
    return f"{chosen.number} ({chosen.reason}{place}); 1 for a very small decoder"


def _auto_dtype(gpu: bool) -> str:
    """Return the meaning of ``--dtype auto`` on this machine."""
    import torch

    from sensorium.kernels import ops

    meaning = "the checkpoint's (--dtype auto)"
    short = [t for t in ("bfloat16", "float16") if not ops.has_units(getattr(torch, t))]
    if gpu or not short:
        return meaning
    slow = [t for t in short if not ops.runs_well(getattr(torch, t))]
    widened = [t for t in short if t not in slow]
    if widened:
        meaning += f"; {' and '.join(widened)} weights are kept and computed in float32"
    if slow:
        meaning += f"; float32 instead of {' and '.join(slow)}, if the memory suffices"
    return meaning


def _linear_layers() -> dict[str, str]:
    """Return the CPU's level and the product of each format of weights."""
    from sensorium.kernels.cpu.linear import levels, table

    return {"CPU level": levels.level()} | table.chosen()


def _text(value: Any) -> str:
    if isinstance(value, dict) and value.keys() == {"value", "source"}:
        return f"{_text(value['value'])}  ({value['source']})"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
