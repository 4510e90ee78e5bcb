"""sensorium chat in a real terminal: a pseudo-terminal in which the program runs."""

from __future__ import annotations

import asyncio
import os
import re
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from PIL import Image

from tests.server.fake_frontend import FakeFrontend, hang
from tests.server.harness import running, until

WAIT = 60
"""Seconds for what the program is to write; it comes at once, but on a busy machine."""
ENTER, CTRL_C, CTRL_D, CTRL_J, UP = "\r", "\x03", "\x04", "\n", "\x1b[A"


class Chat:
    """A running ``sensorium chat``; what the user types goes in, what the screen gets comes out."""

    def __init__(self, url: str, home: Path, *flags: str, **variables: str) -> None:
        environment = {
            **os.environ,
            "TERM": "xterm-256color",
            "XDG_STATE_HOME": str(home),
            # Nobody answers queries in this terminal.
            "PROMPT_TOOLKIT_NO_CPR": "1",
            **variables,
        }
        self._child = pexpect.spawn(
            sys.executable,
            ["-m", "sensorium", "chat", "--base-url", url, "--images", "none", *flags],
            env=environment,
            encoding="utf-8",
            timeout=WAIT,
            dimensions=(40, 100),
        )
        self.shown = ""

    async def see(self, pattern: str) -> None:
        """Wait until the screen shows what matches."""
        await asyncio.to_thread(self._child.expect, pattern)
        self.shown += self._child.before + self._child.after

    async def type(self, text: str) -> None:
        await asyncio.to_thread(self._child.send, text)

    async def ended(self) -> int:
        """Return the exit status."""
        await asyncio.to_thread(self._child.expect, pexpect.EOF)
        self.shown += self._child.before
        await asyncio.to_thread(self._child.close)
        return self._child.exitstatus

    def kill(self) -> None:
        self._child.close(force=True)


@pytest.fixture
async def server() -> AsyncIterator[Any]:
    async with running(FakeFrontend()) as made:
        yield made


async def test_a_conversation(server: Any, tmp_path: Path) -> None:
    server.frontend.reply = "It is **bold**: \x1b]0;owned\x07 and `code`."
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a b.png")
    chat = Chat(server.base_url, tmp_path / "state")
    try:
        await chat.see("demo - /help for commands")
        # A dropped file is pasted, as terminals do it.
        await chat.type(f"\x1b[200~'{tmp_path}/a b.png' What is\nthis?\x1b[201~" + ENTER)
        await chat.see(r"\[image: a b.png\]")
        await chat.see("bold")
        await chat.see("code")
        # The editor comes back, with the line of before.
        await chat.type(UP)
        await chat.see("this")
        await chat.type(CTRL_C)
        await chat.see("Ctrl-D or /exit quits")
        await chat.type("one" + CTRL_J + "two\\" + ENTER + "three" + ENTER)
        await until(lambda: len(server.frontend.calls) == 2)
        await chat.see("code")
        await chat.type("/system Be brief." + ENTER)
        await chat.see("The system message is set")
        await chat.type(CTRL_D)
        assert await chat.ended() == 0
    finally:
        chat.kill()
    first, second = server.frontend.calls
    assert len(first.prompt.conversation.refs) == 1
    assert "one\\ntwo\\nthree" in repr(second.prompt.conversation)
    assert "\x1b]0;" not in chat.shown, "the title is not set"
    assert "\N{SYMBOL FOR ESCAPE}]0;owned\N{SYMBOL FOR BELL}" in chat.shown
    assert "**" not in chat.shown
    assert re.search(r"\x1b\[[0-9;]*1m?[0-9;]*m?bold", chat.shown)
    kept = tmp_path / "state" / "sensorium" / "chat_history"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert "one\\ntwo\\nthree" in kept.read_text()


async def test_ctrl_c_stops_the_answer_and_not_the_program(server: Any, tmp_path: Path) -> None:
    server.frontend.between = hang
    chat = Chat(server.base_url, tmp_path, "--no-markdown", "--no-history")
    try:
        await chat.see("/help for commands")
        await chat.type("Hi" + ENTER)
        await until(lambda: server.frontend.num_open == 1)
        await chat.see("Hello")
        await chat.type(CTRL_C)
        await chat.see(r"\[stopped\]")
        await until(lambda: server.frontend.num_open == 0)
        server.frontend.between = None
        await chat.type("Again" + ENTER)
        await chat.see("world!")
        await chat.type("/exit" + ENTER)
        assert await chat.ended() == 0
    finally:
        chat.kill()
    assert list(tmp_path.iterdir()) == [], "no history is kept"


async def test_a_terminal_that_can_shows_the_image(server: Any, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    flags = ("--images", "auto", "--image", str(tmp_path / "a.png"))
    chat = Chat(server.base_url, tmp_path, *flags, TERM="xterm-kitty")
    try:
        await chat.see(r"\x1b_Ga=T,f=100[^\x1b]*\x1b\\")
        await chat.see("a.png")
        await chat.type(CTRL_D)
        assert await chat.ended() == 0
    finally:
        chat.kill()


async def test_a_terminal_is_asked_what_it_can_and_may_stay_silent(
    server: Any, tmp_path: Path
) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    flags = ("--images", "auto", "--image", str(tmp_path / "a.png"))
    for answer, seen in (("\x1b[?62;4c", r"\x1bP0;1q"), ("", r"\[image: a.png\]")):
        chat = Chat(server.base_url, tmp_path, *flags)
        try:
            await chat.see(r"\x1b\[c")
            await chat.type(answer)
            await chat.see(seen)
            await chat.type(CTRL_D)
            assert await chat.ended() == 0
        finally:
            chat.kill()
