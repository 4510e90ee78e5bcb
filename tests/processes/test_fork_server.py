"""A fork server forks, kills and waits; whatever ends, nothing is left and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from sensorium.errors import UnavailableError
from sensorium.processes.fork_server import Child, ForkServer, ForkServerCommand
from sensorium.processes.framing import receive_frame, send_frame
from sensorium.processes.start import child_environment

Start = Callable[..., ForkServer]
FORKING = (sys.executable, "-m", "tests.processes.forking")
SILENT = (sys.executable, "-c", "import signal; signal.pause()")


@pytest.fixture
def start() -> Iterator[Start]:
    """Makes fork servers, which are closed at the end; none may be left then."""
    before = psutil.Process().children()
    made: list[ForkServer] = []

    def start(program: tuple[str, ...] = FORKING, seconds: float = 60.0) -> ForkServer:
        command = ForkServerCommand(program, child_environment(), b"first")
        server = ForkServer(command, name="test", refusal="not now", answer_seconds=seconds)
        made.append(server)
        return server

    yield start
    for server in made:
        server.close()
    assert psutil.Process().children() == before


def process_of(server: ForkServer) -> psutil.Process:
    assert server.process_id is not None
    return psutil.Process(server.process_id)


def ask(child: Child, message: bytes) -> bytes | None:
    child.connection.settimeout(60)
    send_frame(child.connection, message)
    return receive_frame(child.connection)


def test_children_answer_and_their_exit_codes_are_known(start: Start) -> None:
    server = start()
    assert server.process_id is None, "nobody needs it before the first child"
    children = [server.spawn() for _ in range(3)]
    for number, child in enumerate(children):
        assert ask(child, b"hello") == b"hello %d" % child.process_id
        assert ask(child, b"exit %d" % number) is None
        assert child.wait() == number
        child.connection.close()
    failing = server.spawn()
    with failing.connection:
        assert ask(failing, b"fail") is None
        assert failing.wait() == 1
    assert process_of(server).children() == []


def test_a_child_that_is_killed_is_gone_and_the_others_go_on(start: Start) -> None:
    server = start()
    killed, other = server.spawn(), server.spawn()
    with killed.connection, other.connection:
        for _ in range(2):  # a second time does nothing
            killed.kill()
        assert receive_frame(killed.connection) is None
        assert killed.wait() == -signal.SIGKILL
        assert ask(other, b"hello") == b"hello %d" % other.process_id
        assert [child.pid for child in process_of(server).children()] == [other.process_id]


def test_a_fork_server_that_dies_takes_its_children_along_and_is_replaced(start: Start) -> None:
    server = start()
    child = server.spawn()
    first = server.process_id
    server.kill()
    with child.connection:
        assert receive_frame(child.connection) is None
        assert child.server_has_ended()
        assert child.wait() is None
        child.kill()
    with server.spawn().connection:
        assert server.process_id not in (None, first)


def test_many_threads_share_one(start: Start) -> None:
    server = start()

    def use(_: int) -> tuple[int | None, int | None]:
        child = server.spawn()
        with child.connection:
            ask(child, b"exit 7")
            return server.process_id, child.wait()

    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(use, range(32)))
    assert results == {(server.process_id, 7)}


def test_all_ends_when_the_parent_hangs_up(start: Start) -> None:
    server = start()
    child = server.spawn()
    process = process_of(server)
    server.close()
    with child.connection:
        assert receive_frame(child.connection) is None
    assert not process.is_running()
    assert server.process_id is None
    with pytest.raises(UnavailableError, match="not now"):
        server.spawn()


@pytest.mark.parametrize("program", [("/bin/false",), ("/does/not/exist",)])
def test_a_fork_server_that_cannot_start_is_an_error(
    start: Start, program: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UnavailableError, match="not now"):
        start(program).spawn()
    assert "no test can be started" in caplog.text


def test_a_fork_server_that_does_not_answer_is_an_error(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sensorium.processes.fork_server.STOP_SECONDS", 0.1)
    with pytest.raises(UnavailableError, match="not now"):
        start(SILENT, 0.1).spawn()


def test_closing_does_not_wait_for_an_answer(start: Start) -> None:
    server = start(SILENT)
    with ThreadPoolExecutor(1) as pool:
        spawned = pool.submit(server.spawn)
        while server.process_id is None:
            os.sched_yield()
        server.kill()  # a silent one would get some seconds to end
        server.close()
        assert isinstance(spawned.exception(60), UnavailableError)
