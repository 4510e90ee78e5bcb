"""The modules of the page that need no browser, by Node's own test runner."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parent / "unit"
SECONDS = 300
"""After this a renderer hangs."""


@pytest.mark.parametrize("name", sorted(path.name for path in UNIT.glob("*.test.mjs")))
def test_in_node(name: str) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node: the page's modules are not tested alone")
    done = subprocess.run(
        [node, "--test", str(UNIT / name)], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "# pass 0" not in done.stdout
