"""A short run of damaged quantized checkpoints; ``python -m tests.fuzz.published`` is the long."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.published import campaign


def test_damaged_checkpoints_are_refused_or_load(tmp_path: Path) -> None:
    found = campaign(tmp_path, 60, seed=1)
    assert found["refused"] > 10
    assert found["loaded"] > 3
