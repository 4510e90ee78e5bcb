"""Lines that the user has typed, kept in a file for later conversations."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from prompt_toolkit.history import History

MOST_LINES = 1000
MOST_BYTES = 1 << 20
LONGEST = 16384
"""Characters of a line that is kept; a longer one is remembered until the program ends."""


def default_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the file of the history: ``sensorium/chat_history`` in the user's state folder."""
    state = environ.get("XDG_STATE_HOME", "")
    root = Path(state) if os.path.isabs(state) else Path("~/.local/state").expanduser()
    return root / "sensorium" / "chat_history"


class ChatHistory(History):
    """History in a file that only its user can read, one JSON string a line.

    At most ``MOST_LINES`` lines and ``MOST_BYTES`` bytes are kept. Where the file cannot be used,
    the history ends with the program.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = path

    def load_history_strings(self) -> Iterable[str]:
        """Return the lines, the latest first; cut a file that has grown too long."""
        if self._path is None:
            return []
        try:
            size = self._path.stat().st_size
            with self._path.open("rb") as file:
                file.seek(max(0, size - MOST_BYTES))
                lines = file.read(MOST_BYTES).splitlines()
        except OSError:
            return []
        entries = [entry for line in lines if (entry := _entry(line)) is not None]
        if size > MOST_BYTES or len(lines) > MOST_LINES:
            entries = entries[-MOST_LINES // 2 :]
            self._rewrite(entries)
        return reversed(entries)

    def store_string(self, string: str) -> None:
        """Append a line to the file."""
        if self._path is None or len(string) > LONGEST:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(_line(string))
        except OSError:
            self._path = None

    def _rewrite(self, entries: Iterable[str]) -> None:
        if self._path is None:
            return
        try:
            descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix="chat_history")
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(_line(entry) for entry in entries)
            os.replace(name, self._path)
        except OSError:
            self._path = None


def _line(entry: str) -> bytes:
    return json.dumps(entry).encode("ascii") + b"\n"


def _entry(line: bytes) -> str | None:
    """Return the entry of a line, None for one that is damaged."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
