"""Each good line once: many lines with broken images on several engines, one of which is killed.

    python -m benchmarks.batch_replicas --lines 10000 --replicas 2 -o results.json
    python -m benchmarks.batch_replicas --through ray-data -o results.json

Makes requests, of which one in a hundred has a broken image, answers them with ``sensorium batch
--replicas`` or with ``build_processor`` in a pipeline of Ray Data, kills the worker of an engine
when a third of them is done, and counts the outputs of each.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image


def conversation(number: int, every: int) -> list[dict[str, Any]]:
    """Messages about an image of its own, which is broken in one of so many."""
    pixels = np.full((24, 24, 3), (number % 251, number // 251 % 251, 90), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    data = b"broken" if number % every == 0 else file.getvalue()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is this?"},
    ]
    return [{"role": "user", "content": parts}]


def request(number: int, every: int) -> bytes:
    body = {"messages": conversation(number, every), "max_tokens": 4, "temperature": 0}
    line = {"custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line).encode() + b"\n"


def kill_at(process: psutil.Process, output: Path, lines: int, killed: list[int]) -> None:
    """Kill the worker of an engine when so many lines are written."""
    while process.is_running() and not killed:
        time.sleep(0.1)
        if output.exists() and output.read_bytes().count(b"\n") >= lines:
            kill_worker(process, killed)


def kill_worker(process: psutil.Process, killed: list[int]) -> None:
    """Kill the worker of an engine among the processes that another has started."""
    for child in process.children(recursive=True):
        if "Answering" in " ".join(child.cmdline()):
            child.kill()
            killed.append(child.pid)
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--broken-every", type=int, default=100)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--through", choices=("batch", "ray-data"), default="batch")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    if given.through == "ray-data":
        result = run_on_ray_data(given)
    else:
        with tempfile.TemporaryDirectory() as name:
            result = run(Path(name), given)
    text = json.dumps(result, indent=1)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")
    if not result["each_line_once"]:
        sys.exit("lines are missing, or there twice")


def run(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    source, output, errors = (folder / f"{name}.jsonl" for name in ("in", "out", "bad"))
    with source.open("wb") as file:
        file.writelines(request(number, given.broken_every) for number in range(1, given.lines + 1))
    command = [sys.executable, "-m", "sensorium", "batch", source, "-o", output, "--errors", errors]
    command += ["--model", "demo", "--max-num-seqs", "16", "--replicas", str(given.replicas)]
    command += ["--media-replicas", "1"]
    began = time.monotonic()
    process = psutil.Popen([str(part) for part in command])
    killed: list[int] = []
    thread = threading.Thread(target=kill_at, args=(process, output, given.lines // 3, killed))
    thread.start()
    status = process.wait()
    seconds = time.monotonic() - began
    thread.join()
    good, bad = (
        Counter(int(json.loads(line)["custom_id"]) for line in path.open())
        for path in (output, errors)
    )
    return {"exit_status": status, **counted(given, killed, seconds, good, bad)}


def run_on_ray_data(given: argparse.Namespace) -> dict[str, Any]:
    import ray

    from sensorium.ray import build_processor
    from sensorium.ray.cluster import local_cluster

    every = given.broken_every

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        params = {"max_tokens": 4, "temperature": 0.0}
        return {"messages": conversation(row["number"], every), "sampling_params": params}

    options: dict[str, Any] = {"max_num_seqs": 16, "num_threads": 1}
    processor = build_processor(
        "demo", preprocess=ask, concurrency=given.replicas, media_concurrency=1, **options
    )
    good: Counter[int] = Counter()
    bad: Counter[int] = Counter()
    killed: list[int] = []
    began = time.monotonic()
    with local_cluster(num_cpus=given.replicas + 4):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = [{"number": number} for number in range(1, given.lines + 1)]
        data = ray.data.from_items(rows, override_num_blocks=max(1, given.lines // 100))
        for row in processor(data).iter_rows():
            (good if row["error"] is None else bad)[row["number"]] += 1
            if not killed and good.total() + bad.total() >= given.lines // 3:
                kill_worker(psutil.Process(), killed)
    return counted(given, killed, time.monotonic() - began, good, bad)


def counted(
    given: argparse.Namespace,
    killed: list[int],
    seconds: float,
    good: Counter[int],
    bad: Counter[int],
) -> dict[str, Any]:
    wanted = range(1, given.lines + 1)
    expected_bad = {number for number in wanted if number % given.broken_every == 0}
    return {
        "through": given.through,
        "lines": given.lines,
        "broken": len(expected_bad),
        "replicas": given.replicas,
        "worker_killed_after_lines": given.lines // 3 if killed else None,
        "seconds": round(seconds, 1),
        "answered": len(good),
        "failed": len(bad),
        "twice": sum(count > 1 for count in (good + bad).values()),
        "each_line_once": bool(killed)
        and good == Counter(set(wanted) - expected_bad)
        and bad == Counter(expected_bad),
    }


if __name__ == "__main__":
    main()
