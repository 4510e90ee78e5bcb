"""Time and memory of a start: ``LLM`` and ``sensorium serve``, to the first token.

    python -m benchmarks.start CHECKPOINT [--formats auto int8 …] [--runs 3] --output FILE.json

Times are given in seconds by the clock and in seconds of CPU time, which other programs on the
machine disturb less. Memory is the peak of resident memory, with the pages of mapped files, above
what the process held before it loaded the model, as a multiple of the model's weights at rest.
Quantized formats start with an empty weights cache once (`first`), then with a filled one.
``benchmarks.peers.checkpoints`` makes checkpoints of real shapes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from sensorium.bench import report

OFFLINE = """
import json, os, resource, sys, time

def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name + ":"))) * 1024

marks = [(time.monotonic(), cpu())]
def mark():
    marks.append((time.monotonic(), cpu()))

import sensorium
mark()
from sensorium import LLM, SamplingParams
import sensorium.engine.executor
mark()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
llm = LLM(**json.loads(sys.argv[1]))
mark()
peak, after = status("VmHWM") - before, status("VmRSS") - before
llm.generate("The first word is", SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
mark()
runner = llm._engine.engine._runner
held = {}
for slot in runner.model.slots():
    for layer in slot.layers:
        held[id(layer.weight)] = layer.weight.nbytes
spans = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(marks, marks[1:])]
print(json.dumps({"spans": spans, "cpu_before": marks[0][1], "peak": peak, "after": after,
                  "weights": sum(held.values())}))
llm.close()
"""
STAGES = ("import sensorium", "import of the engine", "load", "first token")


def offline(keywords: dict[str, Any]) -> dict[str, float]:
    """Start an ``LLM`` in a process of its own and return what it measured."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, json.dumps(keywords)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    found: dict[str, float] = {"whole process, seconds": time.monotonic() - begin}
    for name, (seconds, cpu_seconds) in zip(STAGES, seen["spans"], strict=True):
        found[f"{name}, seconds"] = seconds
        found[f"{name}, CPU seconds"] = cpu_seconds
    found["CPU seconds to the first token"] = seen["cpu_before"] + sum(c for _, c in seen["spans"])
    found["weights at rest, MiB"] = seen["weights"] / 2**20
    found["peak of loading / weights"] = seen["peak"] / seen["weights"]
    found["after loading / weights"] = seen["after"] / seen["weights"]
    return found


def served(checkpoint: str, flags: list[str]) -> dict[str, float]:
    """Start a server and return the seconds until it listens and until its first token."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.monotonic()
    command = [sys.executable, "-m", "sensorium", "serve", checkpoint, "--port", "0", *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if " at " not in line:
            raise RuntimeError(f"the server did not start: {line!r}")
        listening = time.monotonic() - begin
        body = {"model": checkpoint, "prompt": "The first word is", "max_tokens": 1}
        request = urllib.request.Request(
            line.rsplit(" at ", 1)[1].strip() + "/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            answer.read()
        first = time.monotonic() - begin
    finally:
        server.terminate()
        server.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "listening, seconds": listening,
        "first token, seconds": first,
        "CPU seconds of all processes": used,
    }


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each value."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def measured(checkpoint: str, name: str, cache: str, runs: int) -> dict[str, Any]:
    """Measure one format: a dtype, or one to quantize to."""
    quantized = name in ("int8", "int4")
    keywords: dict[str, Any] = {"model": checkpoint, "max_model_len": 2048}
    keywords |= {"quantization" if quantized else "dtype": name, "weights_cache": cache}
    flags = ["--quantization" if quantized else "--dtype", name, "--max-model-len", "2048"]
    offline(keywords | {"weights_cache": "off"})  # fills the caches of kernels and of files
    found: dict[str, Any] = {}
    if quantized:
        found["first"] = offline(keywords)
    found["LLM"] = medians([offline(keywords) for _ in range(runs)])
    flags += ["--weights-cache", cache]
    found["serve"] = medians([served(checkpoint, flags) for _ in range(runs)])
    return found


def main() -> None:
    """Measure each format, print medians and write them."""
    parser = argparse.ArgumentParser(description="Measure the start of the engine.")
    parser.add_argument("checkpoint")
    parser.add_argument("--formats", nargs="+", default=["auto", "float32", "int8", "int4"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    settings = {"checkpoint": Path(arguments.checkpoint).name, "runs": arguments.runs}
    results: dict[str, Any] = report.header("start", settings)
    if arguments.output.exists():  # formats that were measured before stay
        results = json.loads(arguments.output.read_text()) | results
    with tempfile.TemporaryDirectory() as cache:
        for name in arguments.formats:
            results[name] = measured(arguments.checkpoint, name, cache, arguments.runs)
            print(json.dumps({name: results[name]}, indent=1))
            report.write_json(results, arguments.output)


if __name__ == "__main__":
    main()
