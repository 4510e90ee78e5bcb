"""The search with DSE-Qwen2 runs as it is, with a small checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import make_qwen2_vl
from tests.examples.test_offline import example


def test_pages_are_ranked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_qwen2_vl(tmp_path / "model", min_pixels=28 * 28)
    rng = np.random.default_rng(0)
    pages = []
    for number in range(3):
        pixels = rng.integers(0, 256, (40 + 30 * number, 60, 3), dtype=np.uint8)
        pages.append(str(tmp_path / f"page{number}.png"))
        Image.fromarray(pixels).save(pages[-1])
    arguments = ["How many birds?", *pages, "--model", str(folder), "--dimensions", "32"]
    monkeypatch.setattr(sys, "argv", ["embedding_dse.py", *arguments])
    example("embedding_dse").main()
    lines = capsys.readouterr().out.splitlines()
    similarities = [float(line.split()[0]) for line in lines]
    assert sorted(line.split()[1] for line in lines) == pages
    assert similarities == sorted(similarities, reverse=True)
    assert all(-1.0 <= similarity <= 1.0 for similarity in similarities)
    assert len(set(similarities)) == 3
