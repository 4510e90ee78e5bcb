"""Folders that go with their process, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from sensorium.processes.private_folder import PrivateFolder, remove_stale

PREFIX = "sensorium-test-"
CODE = """
import sys
from pathlib import Path
from sensorium.processes.private_folder import PrivateFolder
folder = PrivateFolder(sys.argv[1], sys.argv[2])
(folder.path / "content").write_text("x")
print(folder.path, flush=True)
sys.stdin.read()
"""


def started(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process with a folder below ``parent``."""
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(parent), PREFIX],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_it_is_private_and_goes_when_closed(tmp_path: Path) -> None:
    folder = PrivateFolder(str(tmp_path), PREFIX)
    assert folder.path.parent == tmp_path
    assert folder.path.stat().st_mode & 0o777 == 0o700
    (folder.path / "content").write_text("x")
    folder.close()
    folder.close()
    assert not list(tmp_path.iterdir())


def test_it_goes_when_its_process_is_killed(tmp_path: Path) -> None:
    process, path = started(tmp_path)
    assert (path / "content").exists()
    process.kill()
    process.wait(60)
    deadline = time.monotonic() + 60
    while path.exists() and time.monotonic() < deadline:
        os.sched_yield()
    assert not path.exists()


def test_what_nobody_cleared_goes_at_the_next_start(tmp_path: Path) -> None:
    """As after a loss of power: neither the process nor its janitor is there any more."""
    process, left = started(tmp_path)
    running, kept = started(tmp_path)
    [janitor] = _children(process.pid)
    os.kill(janitor, signal.SIGKILL)
    process.kill()
    process.wait(60)
    young = PrivateFolder(str(tmp_path), PREFIX)
    assert left.exists()  # it might belong to a process that has yet to lock it
    old = time.time() + 3600
    remove_stale(tmp_path, PREFIX, now=old)
    assert not left.exists()
    assert kept.exists()
    assert young.path.exists()
    young.close()
    running.kill()
    running.wait(60)


def test_what_belongs_to_others_stays(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}file").write_text("x")
    (tmp_path / f"{PREFIX}folder").mkdir()
    target = tmp_path / "target"
    target.mkdir()
    (target / ".lock").touch()
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    before = sorted(p.name for p in tmp_path.iterdir())
    remove_stale(tmp_path, PREFIX, now=time.time() + 3600)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def _children(parent: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(parent).children()]
