"""Damaged files of weights are refused, or load; none ends the process or takes its memory."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.weight_files import run, write_samples

NUMBER = 120


def test_damaged_files_are_refused_or_load(tmp_path: Path) -> None:
    found = run(write_samples(tmp_path, more=False), NUMBER, 1, tmp_path)
    assert found["ConfigError"] > NUMBER // 4
    assert found["loaded"] > 0
