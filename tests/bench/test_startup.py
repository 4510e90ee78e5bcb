from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from sensorium.bench import startup
from sensorium.errors import ConfigError


def python(code: str) -> str:
    return f'{sys.executable} -c "{code}"'


def test_a_command_is_timed_to_its_first_output_and_ended() -> None:
    code = "import time; print(flush=True); print('token', flush=True); time.sleep(600)"
    begin = time.monotonic()
    seconds = startup.time_command(python(code), timeout=60)
    assert 0 < seconds <= time.monotonic() - begin


@pytest.mark.parametrize(
    ("command", "timeout", "message"),
    [
        (python("pass"), 60, "without any output"),
        (python("import time; time.sleep(600)"), 0.1, "nothing within 0.1 s"),
        ("no-such-command-anywhere", 60, "cannot be run"),
        ("'unbalanced", 60, "cannot be run"),
        ("", 60, "cannot be run"),
    ],
)
def test_commands_that_cannot_be_timed(command: str, timeout: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        startup.time_command(command, timeout)


@pytest.mark.parametrize("cold", [True, False])
def test_stages_of_a_start(monkeypatch: pytest.MonkeyPatch, cold: bool) -> None:
    seen: dict[str, Any] = {}

    def fake_run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.update(options, command=command)
        seen["entries"] = os.listdir(options["env"]["XDG_CACHE_HOME"]) if cold else None
        begin = time.monotonic()
        marks = {"started": begin + 100, "imported": begin + 300, "loaded": begin + 600}
        lines = ["noise", json.dumps({**marks, "first_token": begin + 1000})]
        return subprocess.CompletedProcess(command, 0, "\n".join(lines), "")

    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setattr(subprocess, "run", fake_run)
    found = startup.time_start({"model": "demo"}, cold=cold, timeout=5)
    assert [found[stage] for stage in startup.STAGES] == pytest.approx([100, 200, 300, 400], abs=60)
    assert found["total_seconds"] == pytest.approx(1000, abs=60)
    assert seen["command"][1:3] == ["-m", "sensorium.bench.first_token"]
    assert json.loads(seen["command"][3]) == {"model": "demo"}
    if cold:
        assert seen["entries"] == [], "no compiled kernel is there"
        assert seen["env"]["HF_HOME"].endswith("huggingface"), "downloaded models still are"
        assert seen["env"]["XDG_CACHE_HOME"] not in seen["env"]["HF_HOME"]


def test_a_failed_start_shows_what_the_process_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ConfigError: no such model\n")

    monkeypatch.setattr(subprocess, "run", fake_run)
    with pytest.raises(ConfigError, match="no such model"):
        startup.time_start({"model": "nothing"}, cold=False, timeout=5)
