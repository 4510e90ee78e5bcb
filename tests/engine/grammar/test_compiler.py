"""Constraints are compiled in processes that can be ended: each in bounded time, the same one once."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import sensorium
from sensorium.engine.grammar.compiler import (
    ENTRY_CHARS,
    MOST_CHILDREN,
    GrammarCompiler,
    grammar_server,
)
from sensorium.errors import InvalidRequestError, OverloadedError, UnavailableError
from sensorium.params import StructuredOutputs
from sensorium.processes.fork_server import ForkServerCommand
from sensorium.processes.start import child_environment
from sensorium.text.grammar.grammar import compile_grammar
from sensorium.text.grammar.library import Grammar

DEMO = str(Path(sensorium.__file__).parent / "demo")


def endless(number: int = 0) -> StructuredOutputs:
    """Patterns that must all hold: the library never ends with them."""
    patterns = [{"properties": {"a": {"type": "string", "pattern": f".*{i}.*"}}} for i in range(99)]
    return StructuredOutputs(json={"title": str(number), "allOf": patterns})


def new_compiler(folder: str | Path, vocab_size: int, seconds: float) -> GrammarCompiler:
    return GrammarCompiler(grammar_server(str(folder), vocab_size, seconds), seconds=seconds)


@pytest.fixture
async def compiler() -> AsyncIterator[GrammarCompiler]:
    found = new_compiler(DEMO, 1313, 0.3)
    yield found
    found.close()


def fork_server(compiler: GrammarCompiler) -> psutil.Process:
    assert compiler.server.process_id is not None
    return psutil.Process(compiler.server.process_id)


class Hostile:
    """A compiler whose children do what a constraint says, the constraints that they got, and
    their gate.
    """

    def __init__(self, folder: Path, seconds: float, num_failures: int = 0) -> None:
        self._log, self._gate = folder / "log", folder / "gate"
        for path in (self._log, self._gate):
            path.touch()
        arguments = [str(self._log), str(self._gate), num_failures, seconds]
        command = ForkServerCommand(
            (sys.executable, "-m", "tests.engine.grammar.hostile_worker"),
            child_environment(one_thread=True),
            json.dumps(arguments).encode(),
        )
        self.compiler = GrammarCompiler(command, seconds=seconds)

    def begun(self) -> list[str]:
        return self._log.read_text().split()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Children whose constraint begins with ``wait`` do so within."""
        with self._gate.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def compile(self, *constraints: str) -> list[asyncio.Task[Grammar]]:
        outputs = [StructuredOutputs(regex=constraint) for constraint in constraints]
        return [asyncio.create_task(self.compiler.compile(one)) for one in outputs]


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Callable[..., Hostile]]:
    made: list[Hostile] = []

    def make(seconds: float = 60.0, **how: int) -> Hostile:
        made.append(Hostile(tmp_path, seconds, **how))
        return made[-1]

    yield make
    for one in made:
        one.compiler.close()


async def test_what_can_be_used_becomes_its_grammar(compiler: GrammarCompiler) -> None:
    assert compiler.server.process_id is None, "nobody needs it before the first constraint"
    for outputs in (
        StructuredOutputs(regex="[ab]{2}"),
        StructuredOutputs(json={"type": "integer", "maximum": 10**30}),
        StructuredOutputs(json='{"enum": ["é", "\\ud83d\\ude00"]}'),
        StructuredOutputs(choice=("a", "b")),
        StructuredOutputs(grammar='root ::= "a" | "b"'),
        StructuredOutputs(json_object=True),
    ):
        assert await compiler.compile(outputs) == compile_grammar(outputs)


@pytest.mark.parametrize(
    ("outputs", "field"),
    [
        (StructuredOutputs(regex="("), "regex"),
        (StructuredOutputs(json={"type": "zzz"}), "json"),
        (StructuredOutputs(json={1: {2}}), "json"),  # type: ignore[dict-item]
        (StructuredOutputs(json={"enum": ["x" * (1 << 19)]}), "json"),
        (StructuredOutputs(json={"enum": list(range(1 << 19))}), "json"),
        (StructuredOutputs(grammar="start: x"), "grammar"),
        (StructuredOutputs(choice=tuple(map(str, range(10_000)))), "choice"),
        (StructuredOutputs(regex="[^\\x00-\\U0010ffff]"), "regex"),
    ],
)
async def test_what_cannot_be_used_names_its_field(
    compiler: GrammarCompiler, outputs: StructuredOutputs, field: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await compiler.compile(outputs)
    assert caught.value.param == f"structured_outputs.{field}"
    assert len(caught.value.message) < 700


async def test_what_never_ends_is_ended_and_delays_no_other(compiler: GrammarCompiler) -> None:
    slow = [asyncio.create_task(compiler.compile(endless(number))) for number in range(3)]
    for number in range(4):
        assert await compiler.compile(StructuredOutputs(regex=f"a{number}"))
    for task in slow:
        with pytest.raises(InvalidRequestError, match=r"more than 0\.3 seconds"):
            try:
                await task
            except UnavailableError:  # by the clock, on a very busy machine
                await compiler.compile(endless())
    assert fork_server(compiler).children() == []


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("memory", InvalidRequestError, "too much memory"),
        ("time", InvalidRequestError, r"more than 0\.05 seconds"),
        ("kill", UnavailableError, "try again"),
        ("clock", UnavailableError, "try again"),
        ("exception", InvalidRequestError, r"the grammar library failed with it \(RuntimeError\)"),
    ],
)
async def test_what_becomes_of_a_child(
    hostile: Callable[..., Hostile], how: str, error: type[Exception], says: str
) -> None:
    """The limits are the kernel's: nothing that goes on in the child has a say.

    What ended without meeting one of them says nothing about the constraint.
    """
    one = hostile(0.05)
    with pytest.raises(error, match=says):
        await one.compile(how)[0]
    assert await one.compile("good")[0] == Grammar("good")
    assert fork_server(one.compiler).children() == []


async def test_a_child_has_no_descriptors_but_its_own(hostile: Callable[..., Hostile]) -> None:
    one = hostile()
    with one.waiting():
        beside = one.compile("wait")
        assert await one.compile("descriptors")[0] == Grammar("descriptors")
    assert await beside[0] == Grammar("wait")


async def test_no_process_says_nothing_about_the_constraint(
    hostile: Callable[..., Hostile],
) -> None:
    one = hostile(num_failures=1)
    with pytest.raises(UnavailableError, match="try again"):
        await one.compile("good")[0]
    assert await one.compile("good")[0] == Grammar("good"), "and is asked again"
    assert one.begun() == ["good"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def test_what_nobody_waits_for_any_more_is_not_begun(
    hostile: Callable[..., Hostile],
) -> None:
    """And what is under way keeps its place until it has ended.

    A caller that leaves makes no room for more work.
    """
    one = hostile()
    with one.waiting():
        first = one.compile(*(f"wait{number}" for number in range(MOST_CHILDREN)))
        await until(lambda: len(one.begun()) == MOST_CHILDREN)
        others = one.compile(*(f"a{number}" for number in range(10)))
        await until(lambda: one.compiler.num_pending == MOST_CHILDREN + 10)
        for task in (*first, *others[:9]):
            task.cancel()
        await _ended([*first, *others[:9]])
        assert one.compiler.num_pending == MOST_CHILDREN + 1
        assert len(one.begun()) == MOST_CHILDREN
    assert await others[9] == Grammar("a9")
    assert sorted(one.begun()) == ["a9", *(f"wait{number}" for number in range(MOST_CHILDREN))]
    await asyncio.gather(*one.compile(*one.begun()))
    assert len(one.begun()) == MOST_CHILDREN + 1, "what nobody waited for is known, too"
    assert one.compiler.num_pending == 0


async def test_too_many_that_wait_are_refused(
    hostile: Callable[..., Hostile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sensorium.engine.grammar.compiler.KEPT_CHARS", 30_000)
    one = hostile()
    with one.waiting():
        tasks = one.compile(*(f"wait{number}" for number in range(20)))
        await until(lambda: any(task.done() for task in tasks))
        await until(lambda: len(one.begun()) == MOST_CHILDREN)
        refused = [task for task in tasks if task.done()]
        assert 0 < len(refused) < 12
        for task in refused:
            with pytest.raises(OverloadedError):
                await task
    await asyncio.gather(*(task for task in tasks if task not in refused))
    await asyncio.gather(*one.compile(*(f"a{number}" for number in range(12))))


async def test_a_fork_server_that_never_answers_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def noted(*command: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(start(*command, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    monkeypatch.setattr("sensorium.engine.grammar.compiler.STARTING_SECONDS", 0.2)
    program = "import signal; signal.pause()"
    command = ForkServerCommand((sys.executable, "-c", program), child_environment(), b"")
    compiler = GrammarCompiler(command, seconds=0.01)
    outputs = [StructuredOutputs(regex=f"a{number}") for number in range(MOST_CHILDREN + 1)]
    tasks = [asyncio.create_task(compiler.compile(one)) for one in outputs]
    for task in tasks[:-1]:
        with pytest.raises(UnavailableError):
            await task
    with pytest.raises(OverloadedError):
        await tasks[-1]
    assert started
    await until(lambda: all(process.poll() is not None for process in started))
    await asyncio.to_thread(compiler.close)


async def test_what_was_lost_is_asked_again(hostile: Callable[..., Hostile]) -> None:
    one = hostile()
    for _ in range(2):
        with pytest.raises(UnavailableError):
            await one.compile("kill")[0]
    assert one.begun() == ["kill", "kill"]


@pytest.mark.parametrize("what", ["process", "thread"])
async def test_a_fork_server_that_cannot_start_leaves_nothing(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    before = psutil.Process().children()

    def no_process(*arguments: Any, **options: Any) -> Any:
        raise OSError("no more processes")

    class NoThread(threading.Thread):
        def start(self) -> None:
            if self.name == "sensorium-grammars":
                raise RuntimeError("can't start new thread")
            super().start()

    outputs = StructuredOutputs(regex="a")
    with monkeypatch.context() as patch:
        if what == "process":
            patch.setattr(subprocess, "Popen", no_process)
        else:
            patch.setattr(threading, "Thread", NoThread)
        with pytest.raises(UnavailableError):
            await compiler.compile(outputs)
    assert psutil.Process().children() == before
    assert await compiler.compile(outputs)


async def test_a_compiler_that_is_dropped_takes_its_fork_server_along() -> None:
    compiler = new_compiler(DEMO, 1313, 1.0)
    await compiler.compile(StructuredOutputs(regex="a"))
    process = fork_server(compiler)
    del compiler
    gc.collect()
    await until(lambda: not process.is_running())


async def test_a_closed_compiler_starts_no_fork_server(compiler: GrammarCompiler) -> None:
    compiler.close()
    with pytest.raises(UnavailableError, match="shutting down"):
        await compiler.compile(StructuredOutputs(regex="a"))
    assert compiler.server.process_id is None


async def test_a_tokenizer_that_cannot_be_read_is_said_once_and_clearly(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("[1")
    compiler = new_compiler(tmp_path, 400, 1.0)
    try:
        pids = set()
        for pattern in "ab":
            with pytest.raises(InvalidRequestError, match="tokenizer") as caught:
                await compiler.compile(StructuredOutputs(regex=pattern))
            assert str(tmp_path) not in caught.value.message
            pids.add(fork_server(compiler).pid)
        assert len(pids) == 1
    finally:
        compiler.close()


async def test_the_same_constraint_is_compiled_once(hostile: Callable[..., Hostile]) -> None:
    one = hostile(0.05)
    assert len(set(await asyncio.gather(*one.compile(*["same"] * 20)))) == 1
    for _ in range(2):  # what is wrong stays wrong
        with pytest.raises(InvalidRequestError):
            await one.compile("exception")[0]
    assert one.begun() == ["same", "exception"]


async def test_what_is_remembered_is_bounded(
    hostile: Callable[..., Hostile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry counts for more than its characters."""
    monkeypatch.setattr("sensorium.engine.grammar.compiler.KEPT_CHARS", 5 * ENTRY_CHARS)
    one = hostile()
    names = [f"a{number}" for number in range(8)]
    for name in names:
        await one.compile(name)[0]
    for name in reversed(names):
        await one.compile(name)[0]
    assert one.begun()[:8] == names
    assert 8 < len(one.begun()) < 16, "some are remembered, not all"
    assert "a7" not in one.begun()[8:]


async def test_who_leaves_takes_nobody_along(compiler: GrammarCompiler) -> None:
    outputs = StructuredOutputs(regex="[a-z]{3}")
    leaving = [asyncio.create_task(compiler.compile(outputs)) for _ in range(2)]
    staying = asyncio.create_task(compiler.compile(outputs))
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    assert await staying
    assert all(task.cancelled() for task in await _ended(leaving))


async def _ended(tasks: list[asyncio.Task[str]]) -> list[asyncio.Task[str]]:
    await asyncio.gather(*tasks, return_exceptions=True)
    return tasks


async def test_a_fork_server_that_dies_is_replaced(compiler: GrammarCompiler) -> None:
    await compiler.compile(StructuredOutputs(regex="a"))
    first = fork_server(compiler)
    lost = asyncio.create_task(compiler.compile(endless()))
    async with asyncio.timeout(60):
        while not first.children():
            await asyncio.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(UnavailableError, match="try again"):
        await lost
    assert await compiler.compile(StructuredOutputs(regex="b"))
    assert fork_server(compiler).pid != first.pid
    with pytest.raises(InvalidRequestError):
        await compiler.compile(endless())


async def test_the_fork_server_ends_with_what_it_is_doing(compiler: GrammarCompiler) -> None:
    lost = asyncio.create_task(compiler.compile(endless()))
    await compiler.compile(StructuredOutputs(regex="a"))
    process = fork_server(compiler)
    compiler.close()
    with pytest.raises((UnavailableError, InvalidRequestError)):
        await lost
    assert not process.is_running()
    compiler.close()


async def test_a_tokenizer_without_an_end_takes_no_constraints(tmp_path: Path) -> None:
    from tests.checkpoints.common import new_tokenizer, write_tokenizer

    write_tokenizer(tmp_path, new_tokenizer())
    compiler = new_compiler(tmp_path, 400, 1.0)
    try:
        with pytest.raises(InvalidRequestError, match="end-of-sequence"):
            await compiler.compile(StructuredOutputs(regex="a"))
    finally:
        compiler.close()
