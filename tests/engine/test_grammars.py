"""Constraints are compiled in a process that can be ended: each in bounded time, the same one once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import sensorium
from sensorium.engine.grammar_worker import CHILD_BYTES, Checker
from sensorium.engine.grammars import GrammarCompiler, read_frame, write_frame
from sensorium.errors import InvalidRequestError, UnavailableError
from sensorium.params import StructuredOutputs
from sensorium.text.grammar import grammar_text

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
    assert compiler._process is not None
    return psutil.Process(compiler._process.pid)


async def test_what_can_be_used_becomes_its_grammar(compiler: GrammarCompiler) -> None:
    assert compiler._process is None, "nobody needs it before the first constraint"
    for outputs in (
        StructuredOutputs(regex="[ab]{2}"),
        StructuredOutputs(json={"type": "integer", "maximum": 10**30}),
        StructuredOutputs(json='{"enum": ["é", "\\ud83d\\ude00"]}'),
        StructuredOutputs(choice=("a", "b")),
        StructuredOutputs(grammar='root ::= "a" | "b"'),
        StructuredOutputs(json_object=True),
    ):
        assert await compiler.compile(outputs) == grammar_text(outputs)


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


async def test_what_never_ends_is_ended_and_holds_up_nobody(compiler: GrammarCompiler) -> None:
    slow = [asyncio.create_task(compiler.compile(endless(number))) for number in range(3)]
    for number in range(4):
        assert await compiler.compile(StructuredOutputs(regex=f"a{number}"))
    for task in slow:
        with pytest.raises(InvalidRequestError, match=r"more than 0\.3 seconds"):
            await task
    assert helper(compiler).children() == []


@pytest.mark.parametrize("how", ["memory", "time", "crash", "exception"])
async def test_whatever_ends_a_child_is_no_answer(how: str) -> None:
    """The limits are the kernel's: nothing that goes on in the child has a say."""

    def answer(job: bytes) -> bytes:
        if job == b"good":
            return b"answer"
        if how == "memory":
            return bytes(2 * CHILD_BYTES)
        if how == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exception":
            raise RuntimeError("a bug")
        while True:
            pass

    checker = Checker(DEMO, 1313, 0.05)
    checker._answer = answer  # type: ignore[method-assign]
    (reads, source), (result, writes) = os.pipe(), os.pipe()
    running = asyncio.create_task(asyncio.to_thread(checker.run, reads, writes))
    with os.fdopen(source, "wb") as jobs, os.fdopen(result, "rb") as replies:
        write_frame(jobs, 1, b"bad")
        assert await asyncio.to_thread(read_frame, replies) == (1, b"{}")
        write_frame(jobs, 2, b"good")
        assert await asyncio.to_thread(read_frame, replies) == (2, b"answer")
        jobs.close()
        await running
    os.close(reads)
    os.close(writes)


async def test_the_same_constraint_is_compiled_once(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    write = sensorium.engine.grammars.write_frame

    def noted(pipe: Any, number: int, payload: bytes) -> None:
        sent.append(payload)
        write(pipe, number, payload)

    monkeypatch.setattr("sensorium.engine.grammars.write_frame", noted)
    outputs = [StructuredOutputs(json={"enum": [1]}) for _ in range(20)]
    assert len(set(await asyncio.gather(*map(compiler.compile, outputs)))) == 1
    for _ in range(2):  # what is wrong stays wrong
        with pytest.raises(InvalidRequestError):
            await compiler.compile(StructuredOutputs(regex="("))
    assert len(sent) == 2


async def test_what_is_remembered_is_bounded(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sensorium.engine.grammars.KEPT_CHARS", 5000)
    for number in range(40):
        await compiler.compile(StructuredOutputs(regex=f"a{number}"))
    assert 0 < len(compiler._known) < 40


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
    assert compiler._process is not None
    assert compiler._process.stdin is not None
    compiler._process.stdin.close()
    await asyncio.to_thread(compiler._process.wait, 20)
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
