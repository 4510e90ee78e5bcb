"""Each script of ``benchmarks/`` runs to its end in its smallest setting.

Its figures mean nothing here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.clients import places_of
from benchmarks.peers.engines import EngineKind
from benchmarks.peers.processes import EngineFailure, EngineProcess

from sensorium import environment
from tests import checkpoints

ROOT = Path(__file__).parents[2]


def run(module: str, output: Path, *flags: str) -> dict[str, Any]:
    """Run a script with a Python of its own. Return its results. A missed target is status 1, too."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--output", str(output), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert output.exists(), done.stderr
    found: dict[str, Any] = json.loads(output.read_text())
    assert {"benchmark", "date", "machine", "sensorium", "settings"} <= set(found)
    return found


MEDIA = {
    "video": {"ratio", "sampled_seconds"},
    "preprocess": {"qwen2_vl"},
    "load": {"at_rest", "under_load"},
    "known": {"work", "milliseconds"},
    "once": {"runs"},
}
SMALL = (
    *("--video-seconds 2 --video-size 64x48 --image-size 64x64 --num-images 2 --workers 1",),
    *("--clients 1 --seconds 0.5 --rounds 1 --requests 4 --pairs 1",),
)


@pytest.mark.slow
def test_media(tmp_path: Path) -> None:
    """Sections in one run, as a user may name them; ``before_after`` measures what `cache` does."""
    flags = ("--quick", "--folder", str(tmp_path), *" ".join(SMALL).split())
    found = run("media", tmp_path / "media.json", *MEDIA, *flags)
    assert list(found["sections"]) == list(MEDIA)
    for section, keys in MEDIA.items():
        assert keys <= set(found["sections"][section]), section


@pytest.mark.slow
def test_kernels(tmp_path: Path) -> None:
    found = run("kernels", tmp_path / "kernels.json", "--quick", "--only", "elementwise")
    assert found["elementwise"]["silu_mul 1"]["us"] > 0


@pytest.mark.slow
def test_threads(tmp_path: Path) -> None:
    """Any number of threads gives the same bits, on any number of CPUs."""
    checkpoint = checkpoints.make_text("qwen2", tmp_path / "model", max_position_embeddings=4096)
    flags = ("--model", str(checkpoint), "--rounds", "1", "threads", "one-cpu", "quota")
    found = run("threads", tmp_path / "threads.json", *flags)
    assert set(found["sections"]) == {"threads", "one-cpu", "quota"}
    for cases in found["sections"].values():
        assert "not run" in cases or all(case["same_bits"] for case in cases)


@pytest.mark.slow
def test_clients(tmp_path: Path) -> None:
    found = run("clients", tmp_path / "clients.json", "--quick", "--seconds", "3")
    assert found["errors"] == {}
    assert found["server_lives"]
    assert found["time_to_first_token"]["p99"] > 0
    assert found["memory"][0]["engine"] > 10


def test_stacks_by_place() -> None:
    lines = [
        "main (/x/cli.py:1);run (/x/uvicorn/server.py:9);render (/x/sensorium/server/payload.py:4) 3",
        "main (/x/cli.py:1);write (/x/asyncio/selector_events.py:9) 2",
        "main (/x/cli.py:1);send (/x/uvicorn/h11.py:2);dumps (/x/json/encoder.py:1) 1",
        "main (/x/cli.py:1);recv (/x/zmq/sugar.py:1);poll (/x/select.py:1) 4",
        "main (/x/cli.py:1) 1",
    ]
    assert places_of(lines) == {"json": 4, "http": 2, "engine messages": 4, "other": 1}


@pytest.mark.slow
def test_before_after(tmp_path: Path) -> None:
    """With the kernels that this machine has compiled, if it has."""
    caches = tmp_path / "caches"
    own = caches / "-".join(ROOT.parts[1:])
    own.mkdir(parents=True)
    (own / "xdg").symlink_to(environment.cache_root())
    flags = ("--server-rounds", "1", "--images", "1", "--caches", str(caches), "--dtypes")
    found = run("before_after", tmp_path / "before-after.json", str(ROOT), str(ROOT), *flags)
    names = {"import", "import_llm", "serve_start", "image_new", "image_known"}
    assert set(found["figures"]) == names
    assert all(set(found["figures"][name]["median"]) == {"before", "after"} for name in names)


@pytest.mark.slow
def test_peers(tmp_path: Path) -> None:
    checkpoint = checkpoints.make_text("qwen2", tmp_path / "model", max_position_embeddings=4096)
    engine = EngineProcess(
        EngineKind("sensorium", Path(sys.executable)),
        [str(checkpoint), "--num-threads", "1", "--kv-cache-gib", "1"],
        dict(os.environ),
        tmp_path / "log",
    )
    try:
        assert engine.start_seconds > 0
        engine.freeze()
        with engine.only():
            (figure,) = engine.ask(do="measure", name="decode_b1", round=0)
            assert figure["unit"] == "tok/s"
            with pytest.raises(EngineFailure, match="KeyError"):
                engine.ask(do="measure", name="nothing", round=0)
    finally:
        engine.close()
    assert not engine.alive
