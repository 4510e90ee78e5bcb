"""What the scripts do where something is missing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ENVIRONMENT = Path(__file__).parents[1] / "scripts" / "environment"
APT_GET = """#!/bin/sh
echo "$*" >> "$LOG"
echo "W: A warning." >&2
echo "E: There is no network." >&2
exit 100
"""


def test_why_there_is_no_browser_is_said(tmp_path: Path) -> None:
    for name in ("cat", "dirname", "tail", "timeout"):
        (tmp_path / name).symlink_to(shutil.which(name))
    for name, text in (("apt-get", APT_GET), ("id", "#!/bin/sh\necho 0\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    done = subprocess.run(
        [shutil.which("bash"), "-euo", "pipefail", "-c", '. "$0"; ensure_browser', ENVIRONMENT],
        env={"PATH": str(tmp_path), "LOG": str(log)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    [asked] = log.read_text().splitlines()
    assert "Acquire::http::Timeout=20" in asked
    first, last = done.stderr.splitlines()
    assert first.startswith("apt-get ended with status 100 ")
    assert first.endswith(": E: There is no network.")
    assert "are skipped" in last
