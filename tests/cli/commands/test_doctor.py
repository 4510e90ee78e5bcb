"""sensorium doctor: the whole command."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from sensorium.cli.doctor.finding import LEVELS
from sensorium.cli.main import main


def test_as_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--quick", "--json", "--port", "0"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {"cores", "memory", "huge pages", "packages", "kernel cache", "port"} <= {
        finding["check"] for finding in findings
    }
    assert all(finding["level"] in LEVELS for finding in findings)
    assert status == int(any(finding["level"] == "problem" for finding in findings))


def test_a_problem_is_status_1_and_a_warning_with_strict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        argv = ["doctor", "--quick", "--port", where.partition(":")[2]]
        assert main(argv) == 0
        assert main([*argv, "--strict"]) == 1
    assert f"WARNING  port: {where} cannot be used" in capsys.readouterr().out
    assert main(["doctor", "--port", "70000"]) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert main(argv) == 1
    shown = capsys.readouterr().out
    assert "PROBLEM  kernel cache" in shown
    assert "-> without it every start compiles" in shown
    assert "1 problem" in shown
