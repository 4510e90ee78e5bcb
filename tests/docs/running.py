"""A page of the documentation, run from top to bottom as a reader would."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import random
import socket
import urllib.request
from pathlib import Path
from typing import Any

from sensorium.cli.main import main
from tests.docs.commands import Command, commands_of, is_shell, request_of
from tests.docs.pages import ROOT, Block
from tests.e2e.serving import Server

ADDRESS = "http://127.0.0.1:8000"
COMMANDS_RUN = ("generate", "embed", "info", "models")
SIZES = {"hidden_size = 2048": "hidden_size = 64"}
"""What differs between the published checkpoints and the tiny ones."""
FEW_RESOURCES = ("--num-kv-blocks", "128", "--max-num-seqs", "4", "--num-media-workers", "1")
FEW_RESOURCES += ("--media-decode-timeout", "600")  # of a machine that is busy with other tests


class Servers:
    """The server that pages have started last.

    All have one port, as for a reader, so that a client goes on when a page starts another server.
    A command that runs already is not started again, unless its server has ended.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.running: Server | None = None
        self.command: list[str] = []

    def start(self, command: list[str]) -> None:
        """Run ``sensorium serve`` with these arguments."""
        is_alive = self.running is not None and self.running.process.poll() is None
        if is_alive and self.command == command:
            return
        self.stop()
        model, *flags = command
        flags += ["--port", str(self.port), *FEW_RESOURCES]
        self.running, self.command = Server(model, self.folder / "server.log", flags), command

    def stop(self) -> None:
        """End what runs, which must end well."""
        running, self.running = self.running, None
        if running is not None:
            assert running.stop() == 0, running.log.read_text()

    def drop(self) -> None:
        """End what runs, however it ends: a page has failed, perhaps for its sake."""
        running, self.running = self.running, None
        if running is not None:
            running.stop()


class Page:
    """A page that is being run: the names that its blocks have defined, and the command that
    starts the server which its next block needs.
    """

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.to_start: list[str] = []
        self.num_run = 0

    def run(self, block: Block) -> None:
        """Run a block of Python or commands."""
        if block.language == "python":
            self._start()
            self._run_python(block)
        elif is_shell(block):
            for command in commands_of(block):
                self._run_command(command)

    def close(self) -> None:
        """Free the models."""
        for value in self.names.values():
            if type(value).__name__ in ("LLM", "AsyncLLM"):
                value.close()

    def _run_python(self, block: Block) -> None:
        code = self._here(block.code)
        for published, tiny in SIZES.items():
            code = code.replace(published, tiny)
        lines = "\n" * block.line  # so that a traceback has the page's lines
        program = compile(
            lines + code, str(ROOT / block.page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )
        waiting = eval(program, self.names)
        if waiting is not None:
            asyncio.run(waiting)
        self.num_run += 1

    def _run_command(self, command: Command) -> None:
        if command.program == "curl":
            self._start()
            url, body = request_of(command)
            request = urllib.request.Request(self._here(url), json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request) as answer:
                assert answer.status == 200
            self.num_run += 1
        elif command.program == "sensorium" and command.arguments[0] == "serve":
            self.to_start = command.arguments[1:]
        elif command.program == "sensorium" and command.arguments[0] in COMMANDS_RUN:
            assert main(command.arguments) == 0
            self.num_run += 1

    def _here(self, text: str) -> str:
        return text.replace(ADDRESS, f"http://127.0.0.1:{self.servers.port}")

    def _start(self) -> None:
        """Start the server whose command the page has given since the last block that ran."""
        if self.to_start:
            self.servers.start(self.to_start)
            self.to_start = []


def free_port() -> int:
    """Return a port that no other program has now, and that the system gives to none that asks for
    any, or connects to another.
    """
    for port in random.sample(range(20_000, 32_000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("all ports are taken")
