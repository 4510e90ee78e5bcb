"""The engine's process as its front sees it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sensorium.config import engine_config
from sensorium.engine.serving.client import EngineClient
from sensorium.engine.serving.process import EngineProcess
from sensorium.errors import SensoriumError


async def test_a_process_that_was_started_early_is_the_one_of_the_client() -> None:
    process = EngineProcess().start()
    client = EngineClient(engine_config(model="demo", max_model_len=64, num_threads=1), process)
    try:
        facts = await asyncio.wait_for(client.start(), 120)
        assert facts.max_model_len == 64
        assert process.returncode is None
        assert client._process is process
    finally:
        await client.stop()
    assert process.returncode == 0
    assert not Path(process.folder).exists()


async def test_waiting_ends_with_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    process = EngineProcess().start()
    waiting = asyncio.create_task(process.wait())
    await asyncio.sleep(0)
    process.kill()
    assert await asyncio.wait_for(waiting, 60) == -signal.SIGKILL
    # Also when it has ended before.
    assert await asyncio.wait_for(process.wait(), 60) == -signal.SIGKILL
    process.close()


def test_closing_leaves_neither_process_nor_folder() -> None:
    with EngineProcess() as process:
        assert not process.started
        process.start()
        assert process.started
        assert Path(process.folder).is_dir()
    assert process.returncode is not None
    assert not Path(process.folder).exists()


def test_what_starts_the_process_is_light() -> None:
    """The process is started before the libraries of the server are loaded: none of them is yet."""
    script = (
        "import sys\n"
        "import sensorium.cli.main\n"
        "heavy = ['torch', 'numba', 'numpy', 'transformers', 'fastapi', 'uvicorn', 'pydantic',\n"
        "         'PIL', 'zmq', 'tokenizers', 'jinja2']\n"
        "print(*[name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


async def test_a_failure_before_the_front_listens_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('a broken installation')\n")
    monkeypatch.syspath_prepend(tmp_path)
    process = EngineProcess().start()
    while "the engine could not start" not in capfd.readouterr().err:
        assert process.returncode is None
        await asyncio.sleep(0.01)
    client = EngineClient(engine_config(model="demo"), process)
    try:
        with pytest.raises(SensoriumError, match="a broken installation"):
            await asyncio.wait_for(client.start(), 60)
    finally:
        await client.stop()
