"""Constraints are compiled in a process that can be ended: each in bounded time, the same one once."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest

import sensorium
from sensorium.engine.grammar.compiler import (
    ENTRY_CHARS,
    MOST_CHILDREN,
    GrammarCompiler,
    read_frame,
    write_frame,
)
from sensorium.engine.grammar.worker import CHILD_BYTES, Checker
from sensorium.errors import InvalidRequestError, OverloadedError, UnavailableError
from sensorium.params import StructuredOutputs
from sensorium.text.grammar.grammar import compile_grammar
from sensorium.text.grammar.library import Grammar

DEMO = str(Path(sensorium.__file__).parent / "demo")


def endless(number: int = 0) -> StructuredOutputs:
    """Patterns that must all hold: the library never ends with them."""
    patterns = [{"properties": {"a": {"type": "string", "pattern": f".*{i}.*"}}} for i in range(99)]
    return StructuredOutputs(json={"title": str(number), "allOf": patterns})


@pytest.fixture
async def compiler() -> AsyncIterator[GrammarCompiler]:
    found = GrammarCompiler(DEMO, 1313, seconds=0.3)
    yield found
    found.close()


def helper(compiler: GrammarCompiler) -> psutil.Process:
    assert compiler._helper is not None
    return psutil.Process(compiler._helper.process.pid)


async def test_what_can_be_used_becomes_its_grammar(compiler: GrammarCompiler) -> None:
    assert compiler._helper is None, "nobody needs it before the first constraint"
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
    assert helper(compiler).children() == []


@pytest.mark.parametrize(
    ("how", "reply"),
    [
        ("memory", b"{}"),
        ("time", b"{}"),
        ("kill", b""),
        ("clock", b""),
        ("exception", b'{"failed": "RuntimeError"}'),
        ("descriptors", b"answer"),
        ("no process", b""),
    ],
)
async def test_what_becomes_of_a_child(
    how: str, reply: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits are the kernel's: nothing that goes on in the child has a say. What ended without meeting one of them
    says nothing about the constraint."""
    (reads, source), (result, writes) = os.pipe(), os.pipe()
    inodes = [os.fstat(descriptor).st_ino for descriptor in (reads, writes)]

    def answer(job: bytes) -> bytes:
        if job == b"good":
            return b"answer"
        if how == "memory":
            return bytes(2 * CHILD_BYTES)
        if how in ("kill", "clock"):
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGALRM)
        if how == "exception":
            raise RuntimeError("a bug")
        if how == "descriptors":
            held = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
            # The other end of each is this test's, and inherited.
            names = [f"pipe:[{inode}]" for inode in inodes]
            counts = [sum(path.endswith(name) for path in held) for name in names]
            return b"answer" if counts == [1, 1] else str(counts).encode()
        while True:
            pass

    checker = Checker(DEMO, 1313, 0.05)
    checker._answer = answer  # type: ignore[method-assign]
    fork, full = os.fork, how == "no process"

    def failing() -> int:
        if full:
            raise BlockingIOError("no more processes")
        return fork()

    monkeypatch.setattr(os, "fork", failing)
    running = asyncio.create_task(asyncio.to_thread(checker.run, reads, writes))
    with os.fdopen(source, "wb") as jobs, os.fdopen(result, "rb") as replies:
        write_frame(jobs, 1, b"bad")
        assert await asyncio.to_thread(read_frame, replies) == (1, reply)
        full = False
        write_frame(jobs, 2, b"good")
        assert await asyncio.to_thread(read_frame, replies) == (2, b"answer")
        jobs.close()
        await running
    os.close(reads)
    os.close(writes)


def test_a_message_cut_off_is_none() -> None:
    buffer = io.BytesIO()
    write_frame(buffer, 7, b"payload")
    whole = buffer.getvalue()
    assert read_frame(io.BytesIO(whole)) == (7, b"payload")
    assert all(read_frame(io.BytesIO(whole[:end])) is None for end in range(len(whole)))


class Deaf:
    """Stands in for the helper: answers when it is told to, or never."""

    def __init__(self) -> None:
        self.alive = True
        self.jobs: list[tuple[bytes, Future[str]]] = []
        self.ended = False

    def send(self, job: bytes, reply: Future[str]) -> None:
        self.jobs.append((job, reply))

    def end(self) -> None:
        self.ended = True

    def answer(self) -> None:
        for _, reply in self.jobs:
            if not reply.done():
                reply.set_result('{"grammar": "g", "relaxed": []}')


def deaf_compiler(seconds: float = 60.0) -> tuple[GrammarCompiler, Deaf]:
    compiler, deaf = GrammarCompiler(DEMO, 1313, seconds=seconds), Deaf()
    compiler._helper = deaf  # type: ignore[assignment]
    return compiler, deaf


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def numbered(compiler: GrammarCompiler, numbers: range) -> list[asyncio.Task[str]]:
    return [
        asyncio.create_task(compiler.compile(StructuredOutputs(regex=f"a{number}")))
        for number in numbers
    ]


async def test_what_nobody_waits_for_any_more_is_not_begun() -> None:
    """And what is under way keeps its place until it has ended: who leaves cannot make room for more work."""
    compiler, deaf = deaf_compiler()
    first = numbered(compiler, range(MOST_CHILDREN))
    await until(lambda: len(deaf.jobs) == MOST_CHILDREN)
    others = numbered(compiler, range(50, 60))
    await until(lambda: len(compiler._under_way) == MOST_CHILDREN + 10)
    for task in (*first, *others[:9]):
        task.cancel()
    await _ended([*first, *others[:9]])
    assert len(compiler._under_way) == MOST_CHILDREN + 1
    assert len(deaf.jobs) == MOST_CHILDREN
    deaf.answer()
    await until(lambda: len(deaf.jobs) == MOST_CHILDREN + 1)
    deaf.answer()
    assert await others[9] == Grammar("g")
    assert compiler._under_way == {}
    assert compiler._waiting_chars == 0
    assert len(compiler._known) == MOST_CHILDREN + 1


async def test_too_many_that_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sensorium.engine.grammar.compiler.KEPT_CHARS", 30_000)
    compiler, deaf = deaf_compiler()
    tasks = numbered(compiler, range(20))
    await until(lambda: any(task.done() for task in tasks))
    await until(lambda: len(deaf.jobs) == MOST_CHILDREN)
    refused = [task for task in tasks if task.done()]
    assert 0 < len(refused) < 12
    for task in refused:
        with pytest.raises(OverloadedError):
            await task
    while not all(task.done() for task in tasks):
        deaf.answer()
        await asyncio.sleep(0.005)


async def test_a_helper_that_never_answers_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sensorium.engine.grammar.compiler.STARTING_SECONDS", 0.2)
    compiler, deaf = deaf_compiler(0.01)
    tasks = numbered(compiler, range(MOST_CHILDREN + 1))
    for task in tasks[:-1]:
        with pytest.raises(UnavailableError):
            await task
    with pytest.raises(OverloadedError):
        await tasks[-1]
    assert deaf.ended
    assert compiler._helper is None
    assert not compiler._known


async def test_what_was_lost_is_asked_again() -> None:
    compiler, deaf = deaf_compiler()
    for error in (UnavailableError("lost"), None):
        [task] = numbered(compiler, range(1))
        await until(lambda: any(not reply.done() for _, reply in deaf.jobs))
        if error is not None:
            deaf.jobs[-1][1].set_exception(error)
            with pytest.raises(UnavailableError, match="lost"):
                await task
        else:
            deaf.answer()
            assert await task == Grammar("g")
    assert len(deaf.jobs) == 2


@pytest.mark.parametrize("what", ["process", "reader", "sender"])
async def test_a_helper_that_cannot_start_leaves_nothing(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    before = psutil.Process().children()

    def no_process(*arguments: Any, **options: Any) -> Any:
        raise OSError("no more processes")

    def no_thread(*arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    class NoThread(threading.Thread):
        def start(self) -> None:
            if self.name == "sensorium-grammars":
                no_thread()
            super().start()

    outputs = StructuredOutputs(regex="a")
    with monkeypatch.context() as patch:
        if what == "process":
            patch.setattr(subprocess, "Popen", no_process)
        elif what == "reader":
            patch.setattr(threading, "Thread", NoThread)
        else:
            patch.setattr(compiler, "_send", no_thread)
        with pytest.raises(UnavailableError):
            await compiler.compile(outputs)
    assert psutil.Process().children() == before
    assert await compiler.compile(outputs)


async def test_a_compiler_that_is_dropped_takes_its_helper_along() -> None:
    compiler = GrammarCompiler(DEMO, 1313, seconds=1.0)
    await compiler.compile(StructuredOutputs(regex="a"))
    process = helper(compiler)
    del compiler
    gc.collect()
    await until(lambda: not process.is_running())


async def test_a_closed_compiler_starts_no_helper(compiler: GrammarCompiler) -> None:
    compiler.close()
    with pytest.raises(UnavailableError, match="shutting down"):
        await compiler.compile(StructuredOutputs(regex="a"))
    assert compiler._helper is None


async def test_a_tokenizer_that_cannot_be_read_is_said_once_and_clearly(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("[1")
    compiler = GrammarCompiler(str(tmp_path), 400, seconds=1.0)
    try:
        pids = set()
        for pattern in "ab":
            with pytest.raises(InvalidRequestError, match="tokenizer") as caught:
                await compiler.compile(StructuredOutputs(regex=pattern))
            assert str(tmp_path) not in caught.value.message
            pids.add(helper(compiler).pid)
        assert len(pids) == 1
    finally:
        compiler.close()


async def test_the_same_constraint_is_compiled_once(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    write = sensorium.engine.grammar.compiler.write_frame

    def noted(pipe: Any, number: int, payload: bytes) -> None:
        sent.append(payload)
        write(pipe, number, payload)

    monkeypatch.setattr("sensorium.engine.grammar.compiler.write_frame", noted)
    outputs = [StructuredOutputs(json={"enum": [1]}) for _ in range(20)]
    assert len(set(await asyncio.gather(*map(compiler.compile, outputs)))) == 1
    for _ in range(2):  # what is wrong stays wrong
        with pytest.raises(InvalidRequestError):
            await compiler.compile(StructuredOutputs(regex="("))
    assert len(sent) == 2


async def test_what_is_remembered_is_bounded(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry counts for more than its characters, and the sum of all is not added up anew for each."""
    monkeypatch.setattr("sensorium.engine.grammar.compiler.KEPT_CHARS", 5 * ENTRY_CHARS)
    for number in range(8):
        await compiler.compile(StructuredOutputs(regex=f"a{number}"))
    assert 0 < len(compiler._known) < 5
    assert compiler._known_chars == sum(
        len(job) + len(reply) + ENTRY_CHARS for job, reply in compiler._known.items()
    )


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


async def test_a_helper_that_dies_is_replaced(compiler: GrammarCompiler) -> None:
    await compiler.compile(StructuredOutputs(regex="a"))
    first = helper(compiler)
    lost = asyncio.create_task(compiler.compile(endless()))
    async with asyncio.timeout(60):
        while not first.children():
            await asyncio.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(UnavailableError, match="try again"):
        await lost
    async with asyncio.timeout(60):
        while True:  # until its end has been noticed, it may get one more
            try:
                await compiler.compile(StructuredOutputs(regex="b"))
                break
            except UnavailableError:
                await asyncio.sleep(0.005)
    assert helper(compiler).pid != first.pid
    with pytest.raises(InvalidRequestError):
        await compiler.compile(endless())


async def test_the_helper_ends_with_what_it_is_doing(compiler: GrammarCompiler) -> None:
    lost = asyncio.create_task(compiler.compile(endless()))
    await compiler.compile(StructuredOutputs(regex="a"))
    process = helper(compiler)
    compiler.close()
    with pytest.raises((UnavailableError, InvalidRequestError)):
        await lost
    assert not process.is_running()
    compiler.close()


async def test_the_helper_ends_when_its_parent_does(compiler: GrammarCompiler) -> None:
    await compiler.compile(StructuredOutputs(regex="a"))
    process = helper(compiler)
    assert compiler._helper is not None
    assert compiler._helper.process.stdin is not None
    compiler._helper.process.stdin.close()
    await asyncio.to_thread(compiler._helper.process.wait, 20)
    assert not process.is_running()


async def test_a_tokenizer_without_an_end_takes_no_constraints(tmp_path: Path) -> None:
    from tests.checkpoints.common import new_tokenizer, write_tokenizer

    write_tokenizer(tmp_path, new_tokenizer())
    compiler = GrammarCompiler(str(tmp_path), 400, seconds=1.0)
    try:
        with pytest.raises(InvalidRequestError, match="end-of-sequence"):
            await compiler.compile(StructuredOutputs(regex="a"))
    finally:
        compiler.close()
