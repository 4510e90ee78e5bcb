"""Checks of installed packages, of the environment and of GPUs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sensorium.cli.doctor.finding import Finding, note, ok, problem, warning
from sensorium.config import GIB
from sensorium.environment import unread_variables

BUILT_FOR_TORCH = ("torchvision", "torchaudio", "xformers", "flash-attn")
"""Packages with compiled code that fits one version of torch alone."""
_DRIVER = Path("/proc/driver/nvidia/version")
_SMI_SECONDS = 10


def packages(requirements: Iterable[str] | None = None) -> Iterator[Finding]:
    """Yield findings about versions of packages.

    ``requirements``: those that have to hold, by default those that this package declares.
    """
    from packaging.requirements import Requirement

    declared = importlib.metadata.requires("sensorium") if requirements is None else requirements
    num_good = 0
    for line in declared or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        found = _version(needed.name)
        if found is None:
            yield problem("packages", f"{needed.name} is not installed", f"pip install '{needed}'")
        elif not needed.specifier.contains(found, prereleases=True):
            yield problem(
                "packages",
                f"{needed.name} is {found}, and {needed} is needed",
                f"pip install '{needed}'",
            )
        else:
            num_good += 1
    yield ok("packages", f"{num_good} packages have versions that are supported")
    yield from _built_for_torch()


def _built_for_torch() -> Iterator[Finding]:
    """Yield a problem for each package that was built for another torch than the installed one."""
    from packaging.requirements import Requirement

    torch = _version("torch")
    for name in BUILT_FOR_TORCH:
        if torch is None or _version(name) is None:
            continue
        for line in importlib.metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.name != "torch" or needed.marker is not None:
                continue
            if not needed.specifier.contains(torch.partition("+")[0], prereleases=True):
                yield problem(
                    "packages",
                    f"{name} {_version(name)} was built for {needed}, and torch is {torch}",
                    f"models of transformers that import it fail: pip uninstall {name}, or "
                    "install the build for this torch",
                )


def libraries(names: Iterable[str] = ("torch", "numba", "av", "soundfile")) -> Iterator[Finding]:
    """Yield a problem for each library that cannot be imported, such as for a missing C library.

    They are imported in a process of their own, which a fatal error ends.
    """
    for name in names:
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            yield problem("packages", f"{name} cannot be imported: {lines[-1]}", "reinstall it")


def environment(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Yield findings about environment variables, the interpreter and the C library."""
    yield ok("python", f"{platform.python_version()}, {' '.join(platform.libc_ver())}".strip(", "))
    unread = unread_variables(environ)
    if unread:
        yield note(
            "environment",
            f"without effect: {', '.join(unread)}",
            "docs/from_vllm.md has the flags that take their place",
        )
    preloaded = environ.get("LD_PRELOAD", "")
    if "omp5" in preloaded:
        yield warning(
            "environment",
            f"LD_PRELOAD loads a second OpenMP library ({preloaded})",
            "its threads compete with those of the kernels for the cores: unset LD_PRELOAD",
        )
    if not sys.platform.startswith("linux"):
        yield problem("system", f"{sys.platform} is not supported", "use Linux, or a container")


def gpus() -> Iterator[Finding]:
    """Yield findings about GPUs: driver, torch's build, architectures, memory."""
    import torch

    driver = _driver_version()
    built = torch.version.cuda
    if driver is None and not torch.cuda.is_available():
        yield ok("gpu", "none: models run on the CPU")
        return
    if built is None:
        yield warning(
            "gpu",
            f"there is an NVIDIA driver ({driver}), but torch {torch.__version__} is a CPU build",
            "to use the GPU: pip install torch from PyPI, or with the index of a CUDA version that "
            "the driver supports",
        )
        return
    if not torch.cuda.is_available():
        yield problem(
            "gpu",
            f"torch {torch.__version__} (CUDA {built}) cannot use the driver {driver}",
            f"{_reason_of_cuda()}: update the driver, take a build of torch for an older CUDA, or "
            "pass the devices into the container (docker run --gpus all)",
        )
        return
    for index in range(torch.cuda.device_count()):
        yield from _gpu(index)


def _gpu(index: int) -> Iterator[Finding]:
    import torch

    facts = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    name = f"cuda:{index} {facts.name}, {total / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
    architecture = f"sm_{facts.major}{facts.minor}"
    supported = torch.cuda.get_arch_list()
    same_major = [a for a in supported if a.startswith(f"sm_{facts.major}")]
    if supported and not same_major and f"compute_{facts.major}{facts.minor}" not in supported:
        yield problem(
            "gpu",
            f"{name}: torch has no code for {architecture} (it has {' '.join(supported)})",
            "install a build of torch for this GPU",
        )
    elif free < 0.5 * total:
        yield warning(
            "gpu", name, "another program uses it: end that, or lower --gpu-memory-utilization"
        )
    else:
        yield ok("gpu", f"{name}, {architecture}")


def _driver_version() -> str | None:
    """Return the version of NVIDIA's driver, None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown version" if _DRIVER.exists() else None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _reason_of_cuda() -> str:
    """Return the first line of the error that torch gives."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].rstrip(".")
    return "torch gives no reason"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
