"""Running the lines of a batch: each once, several at a time, again where a server is away."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sensorium.errors import NOT_LOADED, UnavailableError
from sensorium.server.batches import runner as runner_module
from sensorium.server.batches.calls import AppCaller, Reply, seconds_until
from sensorium.server.batches.lines import BadLine, Line
from sensorium.server.batches.runner import MOST_FAILED, LineRunner, Outcome
from sensorium.server.batches.slots import Slots
from tests.fakes import ManualClock
from tests.server.fake_frontend import FakeFrontend
from tests.server.harness import App, until

OK = Reply(200, "r", b'{"usage":{"prompt_tokens":2,"completion_tokens":3}}')


class Caller:
    """Answers as ``answer`` says, to ``num_together`` calls that run at the same time; counts."""

    def __init__(self, answer: Callable[[int], Reply], num_together: int = 1) -> None:
        self.answer = answer
        self.num_calls = self.num_running = self.most_running = 0
        self._together = asyncio.Barrier(num_together)

    async def call(self, url: str, body: bytes) -> Reply:
        self.num_calls += 1
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        number = self.num_calls
        try:
            await self._together.wait()
            await asyncio.sleep(0.001)
            return self.answer(number)
        finally:
            self.num_running -= 1


def lines(num: int) -> Any:
    return iter([Line(i, f"id {i}", "/v1/completions", b"{}") for i in range(1, num + 1)])


async def ran(runner: LineRunner, given: Any, found: list[Outcome] | None = None) -> list[Outcome]:
    """Run the lines and return their outcomes, which ``found`` has also when the run fails."""
    found = [] if found is None else found

    async def write(outcome: Outcome) -> None:
        found.append(outcome)

    await runner.run(given, write)
    return found


async def test_each_line_once_and_several_at_a_time() -> None:
    caller = Caller(lambda number: OK, num_together=7)
    async with asyncio.timeout(60):
        found = await ran(LineRunner(caller, 7, patience=0), lines(49))
    assert sorted(outcome.number for outcome in found) == list(range(1, 50))
    assert caller.most_running == 7
    assert all(outcome.succeeded for outcome in found)
    assert sum(outcome.num_output_tokens for outcome in found) == 147


async def test_a_busy_server_is_asked_again() -> None:
    caller = Caller(lambda number: OK if number > 4 else Reply(503, "r", b"{}", 0.0))
    found = await ran(LineRunner(caller, 2, patience=60), lines(3))
    assert [outcome.succeeded for outcome in found] == [True] * 3
    assert caller.num_calls == 7


@pytest.mark.parametrize("status", [429, 503])
async def test_a_line_that_is_refused_for_good_ends_the_run_and_has_no_output(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "FIRST_WAIT", 0.0)
    both_run, may_end = asyncio.Event(), asyncio.Event()

    class Refusing:
        num_running = 0

        async def call(self, url: str, body: bytes) -> Reply:
            if body == b"b":
                await both_run.wait()
                may_end.set()
                return Reply(status, "r", b'{"error":{"message":"Too many tokens today."}}')
            self.num_running += 1
            if self.num_running == 2:
                both_run.set()
            await may_end.wait()
            return OK

    found: list[Outcome] = []
    with pytest.raises(UnavailableError, match=f"with {status}: Too many tokens today"):
        await ran(LineRunner(Refusing(), 3, patience=0), lines_of("baa"), found)
    assert [outcome.succeeded for outcome in found] == [True] * 2  # what ran is finished


@pytest.mark.parametrize("status", [502, 504])
@pytest.mark.parametrize("body", [b"<html><h1>Bad Gateway</h1></html>", b"", b'{"message":"x"}'])
async def test_what_a_proxy_says_of_a_server_that_is_away_is_no_answer(
    status: int, body: bytes
) -> None:
    found: list[Outcome] = []
    runner = LineRunner(Caller(lambda number: Reply(status, "", body)), 1, patience=0)
    with pytest.raises(UnavailableError, match=f"Line 1 was refused again and again with {status}"):
        await ran(runner, lines(2), found)
    assert not found


async def test_without_patience_the_last_timeout_is_the_answer() -> None:
    late = Reply(504, "r", b'{"error":{"code":"late"}}')
    [outcome] = await ran(LineRunner(Caller(lambda number: late), 1, patience=0), lines(1))
    assert not outcome.succeeded
    assert json.loads(outcome.text)["response"]["status_code"] == 504


@pytest.mark.parametrize(
    ("asked", "patience", "waited"), [(40.0, 600, 40.0), (1e9, 600, 300.0), (40.0, 30, 40.0)]
)
async def test_a_server_is_left_alone_as_long_as_it_asks_within_bounds(
    asked: float, patience: float, waited: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    timeout = asyncio.timeout

    def at_once(seconds: float | None) -> asyncio.Timeout:
        if seconds is None:  # a call, which may take as long as it does
            return timeout(None)
        pauses.append(seconds)
        return timeout(0)

    caller = Caller(lambda number: OK if number > 1 else Reply(429, "r", b"{}", asked))
    monkeypatch.setattr(asyncio, "timeout", at_once)
    [outcome] = await ran(LineRunner(caller, 1, patience=patience), lines(1))
    assert outcome.succeeded
    assert pauses == [waited]


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7.0, 7.0),
        ("0.5", 0.5, 0.5),
        ("-3", 0.0, 0.0),
        ("Fri, 01 Jan 1999 00:00:00 GMT", 0.0, 0.0),
        ("Fri, 01 Jan 2999 00:00:00 GMT", 1e9, 1e12),
    ],
)
def test_retry_after_is_a_number_or_a_date(header: str, least: float, most: float) -> None:
    found = seconds_until(header)
    assert found is not None
    assert least <= found <= most


@pytest.mark.parametrize("header", ["", "nan", "inf", "soon", "Fri, 99 Jan 1999", "1" * 400])
def test_retry_after_without_sense_is_none(header: str) -> None:
    assert seconds_until(header) is None


async def test_a_server_that_is_away_ends_the_run() -> None:
    def away(number: int) -> Reply:
        if number > 2:
            raise UnavailableError("It does not answer.")
        return OK

    runner = LineRunner(Caller(away), 1, patience=0)
    with pytest.raises(UnavailableError):
        await ran(runner, lines(5))


async def test_stopping_finishes_what_runs() -> None:
    caller = Caller(lambda number: OK)
    runner = LineRunner(caller, 3, patience=0)
    found: list[int] = []

    async def write(outcome: Outcome) -> None:
        found.append(outcome.number)
        runner.stopping.set()

    await runner.run(lines(100), write)
    assert len(found) == caller.num_calls <= 3


class Lines:
    """Lines of ``num_bytes``; counts those that were read."""

    def __init__(self, num: int, num_bytes: int = 2) -> None:
        self.num_read = 0
        self._num, self._num_bytes = num, num_bytes

    def __iter__(self) -> Iterator[Line]:
        for number in range(1, self._num + 1):
            self.num_read += 1
            yield Line(number, f"id {number}", "/v1/completions", bytes(self._num_bytes))


async def test_a_line_is_read_when_it_may_run() -> None:
    slots, given = Slots(2), [Lines(20), Lines(20)]
    written = 0
    most = 0

    async def write(outcome: Outcome) -> None:
        nonlocal written, most
        most = max(most, sum(each.num_read for each in given) - written)
        written += 1

    caller = Caller(lambda number: OK)
    runners = [LineRunner(caller, 5, patience=0, slots=slots) for _ in given]
    await asyncio.gather(
        *(runner.run(iter(each), write) for runner, each in zip(runners, given, strict=True))
    )
    assert written == 40
    assert most <= 2


@pytest.mark.parametrize(("num_bytes", "num_read"), [(40, 3), (400, 1)])
async def test_lines_that_wait_to_be_tried_again_are_bounded(num_bytes: int, num_read: int) -> None:
    given = Lines(20, num_bytes)
    caller = Caller(lambda number: Reply(503, "r", b"{}"))
    runner = LineRunner(caller, 20, patience=600, slots=Slots(1, waiting_bytes=100))
    running = asyncio.create_task(ran(runner, iter(given)))
    await until(lambda: caller.num_calls > 3)
    assert given.num_read == num_read
    runner.stopping.set()
    assert await running == []


async def test_stopping_ends_the_wait_for_another_attempt() -> None:
    caller = Caller(lambda number: Reply(503, "r", b"{}", 1000.0))
    runner = LineRunner(caller, 2, patience=600)
    running = asyncio.create_task(ran(runner, lines(5)))
    await until(lambda: caller.num_calls == 5 and not caller.num_running)
    runner.stopping.set()
    async with asyncio.timeout(60):
        assert await running == []
    assert caller.num_calls == 5


async def test_cancelling_lets_what_is_read_and_written_be_finished() -> None:
    writing, may_end = asyncio.Event(), asyncio.Event()
    reading, may_read = threading.Event(), threading.Event()
    found: list[int] = []
    num_read = 0

    def given() -> Iterator[Line]:
        nonlocal num_read
        yield from lines(1)
        reading.set()
        may_read.wait(60)
        num_read += 1
        yield from lines(1)

    async def write(outcome: Outcome) -> None:
        writing.set()
        await may_end.wait()
        found.append(outcome.number)

    running = asyncio.create_task(
        LineRunner(Caller(lambda number: OK), 2, patience=0).run(given(), write)
    )
    await writing.wait()
    assert await asyncio.to_thread(reading.wait, 60)
    running.cancel()
    await asyncio.sleep(0)
    may_end.set()
    may_read.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (found, num_read) == ([1], 1)


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (b'{"a":1}', {"a": 1}),
        (b'{\n "a": 1\n}', {"a": 1}),
        (b"<html>", None),
        (b"", None),
        (b'{"a":', None),
        (b"\xff", None),
    ],
)
async def test_answers_are_one_line_of_json(body: bytes, kept: Any) -> None:
    [outcome] = await ran(
        LineRunner(Caller(lambda n: Reply(200, "r", body)), 1, patience=0), lines(1)
    )
    assert outcome.text.endswith(b"\n")
    assert outcome.text.count(b"\n") == 1
    entry = json.loads(outcome.text)
    assert entry["response"]["body"] == kept
    assert (entry["error"] is None) == outcome.succeeded == (kept is not None)


async def test_bad_lines_are_not_sent() -> None:
    caller = Caller(lambda number: OK)
    bad = BadLine(9, "x", "invalid_url", "Line 9 is bad.", "url")
    [outcome] = await ran(LineRunner(caller, 1, patience=0), iter([bad]))
    assert caller.num_calls == 0
    entry = json.loads(outcome.text)
    assert entry["response"] is None
    assert entry["error"] == {
        "code": "invalid_url",
        "message": "Line 9 is bad.",
        "param": "url",
        "line": 9,
    }


async def test_the_application_is_called_for_a_tenant_below_others() -> None:
    frontend = FakeFrontend()
    app = App(frontend, api_key=("key",))
    caller = AppCaller(app.app, "tenant", below=True)
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "priority": -3}).encode()
    reply = await caller.call("/v1/chat/completions", body)
    assert reply.status == 200
    assert reply.request_id
    assert json.loads(reply.body)["choices"][0]["message"]["content"] == "Hello, world!"
    [call] = frontend.calls
    assert call.priority > 1 << 31
    assert call.prompt.media.tenant == "tenant"
    refused = await caller.call("/v1/completions", b"{}")
    assert refused.status == 400
    assert (await app.post("/v1/completions", {"prompt": "x"})).status == 401


class Models:
    """Answers lines by the model that their body is; ``a`` always can."""

    def __init__(self, other: Callable[[int], Reply], clock: ManualClock) -> None:
        self.num_a = self.num_others = 0
        self._other, self._clock = other, clock

    async def call(self, url: str, body: bytes) -> Reply:
        await asyncio.sleep(0)
        if body != b"a":
            self.num_others += 1
            return self._other(self.num_a)
        self._clock.advance(100.0)
        self.num_a += 1
        return OK


def lines_of(models: str) -> Any:
    named = enumerate(models, 1)
    return iter([Line(i, f"id {i}", "/v1/completions", model.encode()) for i, model in named])


async def test_lines_whose_model_has_to_wait_let_others_go_on_and_are_not_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner_module, "FIRST_WAIT", 0.0)
    busy = Reply(503, "r", b'{"error":{"code":"overloaded","message":"b has no room."}}')
    clock = ManualClock()
    caller = Models(lambda num_a: OK if num_a == 30 else busy, clock)
    runner = LineRunner(caller, 2, patience=600, clock=clock)
    async with asyncio.timeout(60):
        found = await ran(runner, lines_of("bbbb" + "a" * 30))
    assert len(found) == 34
    assert all(outcome.succeeded for outcome in found)
    assert clock() > 600


async def test_lines_whose_model_cannot_be_loaded_fail_and_hold_up_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner_module, "FIRST_WAIT", 0.0)
    message = f"The model 'x' {NOT_LOADED}; GET /v1/models says why."
    error = {"error": {"code": "engine_unavailable", "message": message}}
    broken = Reply(503, "r", json.dumps(error).encode())
    clock = ManualClock()
    caller = Models(lambda num_a: broken, clock)
    async with asyncio.timeout(60):
        found = await ran(
            LineRunner(caller, 2, patience=1e9, clock=clock), lines_of("x" * 6 + "aaa")
        )
    assert sorted(outcome.number for outcome in found if outcome.succeeded) == [7, 8, 9]
    failed = [json.loads(outcome.text)["response"] for outcome in found if not outcome.succeeded]
    assert [response["status_code"] for response in failed] == [503] * 6
    assert failed[0]["body"] == error
    assert MOST_FAILED <= caller.num_others <= 6 * MOST_FAILED


async def test_a_refused_line_does_not_end_a_run_whose_other_calls_are_still_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner_module, "FIRST_WAIT", 0.0)
    clock = ManualClock()
    may_end = asyncio.Event()

    class Long:
        num_refused = 0

        async def call(self, url: str, body: bytes) -> Reply:
            if body == b"a":  # takes longer than the patience
                await may_end.wait()
                return OK
            await asyncio.sleep(0)
            if may_end.is_set():
                return OK
            clock.advance(100.0)
            self.num_refused += 1
            if self.num_refused == 20:
                may_end.set()
            return Reply(503, "r", b"{}")

    caller = Long()
    async with asyncio.timeout(60):
        found = await ran(LineRunner(caller, 2, patience=600, clock=clock), lines_of("ab"))
    assert [outcome.succeeded for outcome in found] == [True] * 2
    assert caller.num_refused == 20


async def test_calls_that_are_open_have_little_time_when_the_server_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner_module, "LAST_CALLS", 0.0)
    hanging = asyncio.Event()

    class Away:
        async def call(self, url: str, body: bytes) -> Reply:
            if body == b"a":
                hanging.set()
                await asyncio.Event().wait()
            await hanging.wait()
            raise UnavailableError("It does not answer.")

    found: list[Outcome] = []
    async with asyncio.timeout(60):
        with pytest.raises(UnavailableError, match="It does not answer"):
            await ran(LineRunner(Away(), 2, patience=0), lines_of("ab"), found)
    assert not found
