"""The history: private, bounded, and no reason to fail."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from sensorium.cli.chat import history
from sensorium.cli.chat.history import ChatHistory, default_path


def lines(path: Path) -> list[str]:
    return list(ChatHistory(path).load_history_strings())


def test_lines_are_kept_in_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "chat_history"
    kept = ChatHistory(path)
    for line in ("one", "two\nlines", "dr\u00ed\x1b"):
        kept.store_string(line)
    assert lines(path) == ["dr\u00ed\x1b", "two\nlines", "one"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_file_that_others_could_read_becomes_private(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    path.touch(0o644)
    ChatHistory(path).store_string("one")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chat_history"
    path.write_text("".join(f'"{number}"\n' for number in range(history.MOST_LINES + 1)))
    assert len(lines(path)) == history.MOST_LINES // 2
    assert len(path.read_text().splitlines()) == history.MOST_LINES // 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setattr(history, "MOST_BYTES", 100)
    assert sum(map(len, lines(path))) < 100
    assert path.stat().st_size <= 100


def test_a_line_that_is_too_long_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    ChatHistory(path).store_string("x" * (history.LONGEST + 1))
    assert not path.exists()


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    path.write_bytes(b'"one"\n\xff\n[1]\n{\n"two"\n')
    assert lines(path) == ["two", "one"]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = ChatHistory(tmp_path / "file" / "chat_history")
    kept.store_string("one")
    assert list(kept.load_history_strings()) == []
    assert ChatHistory(None).load_history_strings() == []


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "chat_history").symlink_to(tmp_path / "elsewhere")
    ChatHistory(tmp_path / "chat_history").store_string(json.dumps("one"))
    assert not (tmp_path / "elsewhere").exists()


def test_its_place() -> None:
    assert default_path({"XDG_STATE_HOME": "/state"}) == Path("/state/sensorium/chat_history")
    home = Path("~/.local/state/sensorium/chat_history").expanduser()
    assert default_path({}) == home
    assert default_path({"XDG_STATE_HOME": "relative"}) == home
