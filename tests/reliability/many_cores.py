"""Pictures, clips of 8, 32 and 64 frames and sounds for every family, offline and served, with 2
to 128 cores emulated:

python -m tests.reliability.many_cores [--cores 2 16 64 128] [FAMILY …]

After each item the threads and descriptors of every process are what they were before it. A few
small items of its modality come first, all at once, so that the pools of threads and workers, which
are bounded, are full by then.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from tests.cores import environment
from tests.e2e.serving import Server

CORES = (2, 16, 64, 128)
CONTEXT = 65536
BUILT: dict[str, tuple[str, ...]] = {
    "llava": ("image",),
    "phi3_v": ("image",),
    "qwen2_vl": ("image", "video"),
    "qwen2_5_vl": ("image", "video"),
    "qwen3_vl": ("image", "video"),
    "llava_onevision": ("image", "video"),
    "minicpmv": ("image", "video"),
    "ultravox": ("audio",),
}
SHIPPED: dict[str, tuple[str, ...]] = {"demo": ("image", "video"), "demo-audio": ("audio",)}
FAMILIES = SHIPPED | BUILT
ALL_FRAMES = {"video": {"num_frames": 64}}
SETTLED_SECONDS = 60
PAUSE = 0.02
NUM_FIRST = 24
Ask = Callable[[list[dict[str, Any]]], None]


def first_items(modality: str) -> list[dict[str, Any]]:
    """Small items to start everything that is started once."""
    from tests.multimodal.clips import make_clip
    from tests.multimodal.decode.test_audio import encoded as sound_file
    from tests.multimodal.decode.test_audio import tone
    from tests.multimodal.support import encoded, picture

    match modality:
        case "image":
            files = [encoded(picture(32, 32, 100 + seed)) for seed in range(NUM_FIRST)]
        case "video":
            files = [make_clip("mp4", 2, fps=fps) for fps in range(10, 10 + NUM_FIRST)]
        case _:
            files = [
                sound_file(tone(0.5, pitch=200.0 + 10 * i), 16000, "WAV") for i in range(NUM_FIRST)
            ]
    return [part(modality, file) for file in files]


def items(modality: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and message part of each item."""
    from tests.multimodal.clips import make_clip
    from tests.multimodal.decode.test_audio import encoded as sound_file
    from tests.multimodal.decode.test_audio import muxed, tone
    from tests.multimodal.support import encoded, picture

    if modality == "image":
        for seed, form in enumerate(("PNG", "JPEG", "WEBP", "AVIF")):
            yield form, part("image", encoded(picture(640, 480, seed), form))
    if modality == "video":
        for form, num in (("mp4", 8), ("mp4", 32), ("mp4", 64), ("webm", 64)):
            yield f"{num} frames of {form}", part("video", make_clip(form, num))
    if modality == "audio":
        yield "WAV", part("audio", sound_file(tone(2.0, 44100), 44100, "WAV"))
        yield "MP3", part("audio", sound_file(tone(3.0), 16000, "MP3"))
        yield "M4A", part("audio", muxed(tone(2.5), 16000, "mp4", "aac"))


def part(modality: str, data: bytes) -> dict[str, Any]:
    url = f"data:{modality}/x;base64,{base64.b64encode(data).decode()}"
    return {"type": f"{modality}_url", f"{modality}_url": {"url": url}}


def run(ask: Ask, process_id: int, modalities: tuple[str, ...]) -> list[str]:
    """Ask about everything; what was asked is returned.

    Raises AssertionError for what an item leaves behind.
    """
    done = []
    for modality in modalities:
        ask(first_items(modality))
        before = steady(process_id)
        for name, one in items(modality):
            ask([one])
            deadline = time.monotonic() + SETTLED_SECONDS
            while (now := state(process_id)) != before:
                assert time.monotonic() < deadline, f"{name} left something: {before} -> {now}"
                time.sleep(PAUSE)
            done.append(name)
    return done


def state(process_id: int) -> dict[int, tuple[str, int, int]]:
    """Name, threads and descriptors of a process and of those that it has started."""
    root = psutil.Process(process_id)
    found = {}
    for process in (root, *root.children(recursive=True)):
        try:
            found[process.pid] = (process.name(), process.num_threads(), process.num_fds())
        except psutil.NoSuchProcess:
            continue
    return found


def steady(process_id: int) -> dict[int, tuple[str, int, int]]:
    """The state when it has been the same for a second."""
    before, since = state(process_id), time.monotonic()
    while time.monotonic() - since < 1.0:
        time.sleep(PAUSE)
        if (now := state(process_id)) != before:
            before, since = now, time.monotonic()
    return before


def conversation(one: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [one, {"type": "text", "text": "What is it?"}]}]


def offline(model: str, modalities: tuple[str, ...]) -> list[str]:
    """In this process, which sees so many cores as its environment says."""
    from sensorium import LLM, SamplingParams

    video = {"media_io_kwargs": ALL_FRAMES} if "video" in modalities else {}
    with LLM(model, num_kv_blocks=5000, **video) as llm:

        def ask(parts: list[dict[str, Any]]) -> None:
            conversations = [conversation(one) for one in parts]
            for output in llm.chat(conversations, SamplingParams(max_tokens=2), use_tqdm=False):
                assert len(output.outputs[0].token_ids) > 0

        return run(ask, os.getpid(), modalities)


def served(model: str, modalities: tuple[str, ...], num_cores: int, log: Path) -> list[str]:
    """By a server that sees so many cores."""
    options = ["--num-kv-blocks", "5000"]
    if "video" in modalities:
        options += ["--media-io-kwargs", json.dumps(ALL_FRAMES)]
    server = Server(model, log, options, environment(num_cores) | {"OMP_NUM_THREADS": ""})
    try:

        def ask_one(one: dict[str, Any]) -> None:
            body = {"messages": conversation(one), "max_tokens": 2}
            request = urllib.request.Request(
                f"{server.url}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json", "Connection": "close"},
            )
            with urllib.request.urlopen(request) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] > 0

        def ask(parts: list[dict[str, Any]]) -> None:
            with ThreadPoolExecutor(len(parts)) as pool:
                list(pool.map(ask_one, parts))

        return run(ask, server.process.pid, modalities)
    finally:
        server.stop()


def in_child(model: str, modalities: tuple[str, ...], num_cores: int) -> list[str]:
    """``offline`` in a process that sees so many cores.

    Raises AssertionError with what it wrote when it fails.
    """
    command = [sys.executable, "-m", "tests.reliability.many_cores", "--offline", model]
    done = subprocess.run(
        [*command, *modalities], env=environment(num_cores), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def built(family: str, folder: Path) -> str:
    """A tiny checkpoint of a family with a context for long clips."""
    import tests.checkpoints as checkpoints

    if family in SHIPPED:
        return family
    getattr(checkpoints, f"make_{family}")(folder)
    path = folder / "config.json"
    config = path.read_text().replace(
        '"max_position_embeddings": 2048', f'"max_position_embeddings": {CONTEXT}'
    )
    path.write_text(config)
    return str(folder)


def main() -> int:
    """Try the families that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--cores", nargs="+", type=int, default=CORES)
    parser.add_argument("--offline", metavar="MODEL")
    arguments = parser.parse_args()
    if arguments.offline:
        print(json.dumps(offline(arguments.offline, tuple(arguments.names))))
        return 0
    failures = 0
    for family in arguments.names or FAMILIES:
        with tempfile.TemporaryDirectory(prefix="sensorium-cores-") as folder:
            model = built(family, Path(folder) / "model")
            for num_cores in arguments.cores:
                for how in ("offline", "served"):
                    begin = time.perf_counter()
                    try:
                        done = (
                            in_child(model, FAMILIES[family], num_cores)
                            if how == "offline"
                            else served(model, FAMILIES[family], num_cores, Path(folder) / "log")
                        )
                        said = f"ok: {', '.join(done)}"
                    except (AssertionError, OSError, RuntimeError) as error:
                        failures += 1
                        said = f"FAILED: {error}"
                    seconds = time.perf_counter() - begin
                    print(
                        f"{family}, {num_cores} cores, {how} ({seconds:.1f} s): {said}", flush=True
                    )
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
