"""The frontend over a client that plays the engine: ends, errors, and the event loop's share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from sensorium.config import EngineConfig, engine_config
from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.engine import frontend as frontend_module
from sensorium.engine.client import Inbox
from sensorium.engine.frontend import SUBMITTED_AT_ONCE, Frontend
from sensorium.engine.prepared import PreparedPrompt
from sensorium.engine.prompts import RawPrompt
from sensorium.errors import ConfigError, EngineDeadError, OverloadedError
from sensorium.models.embedder import Embedder
from sensorium.params import SamplingParams

PROMPT = RawPrompt(text="a")


class FakeClient:
    """Keeps what was submitted; ``fail_after`` sequences, it has no more room."""

    def __init__(self, config: EngineConfig | None = None) -> None:
        self.alive = True
        self.fail_after: int | None = None
        self.inboxes: dict[str, Inbox] = {}
        self.aborted: list[str] = []
        self.stopped = False

    async def start(self) -> None:
        await asyncio.Event().wait()

    def submit(self, request: EngineRequest, items: Sequence[Any], inbox: Inbox) -> None:
        if len(self.inboxes) == self.fail_after:
            raise OverloadedError("full")
        self.inboxes[request.request_id] = inbox

    def abort(self, request_ids: Sequence[str]) -> None:
        self.aborted += [i for i in request_ids if i in self.inboxes]
        for request_id in request_ids:
            self.inboxes.pop(request_id, None)

    async def stats(self) -> None:
        raise EngineDeadError("gone")

    async def stop(self) -> None:
        self.stopped = True


class FakePreparer:
    """Prepares nothing; one request per sample."""

    tokenizer: Any = None
    embedder: Embedder | None = None
    closed = False

    async def prepare(self, prompt: object) -> PreparedPrompt:
        return PreparedPrompt("a", (1,))

    def requests(
        self,
        prepared: PreparedPrompt,
        params: SamplingParams,
        request_id: str,
        priority: int,
        arrival_time: float,
    ) -> list[EngineRequest]:
        one = params.replace(n=1)
        return [
            EngineRequest(f"{request_id}#{i}", (1,), one, 4, arrival_time=arrival_time)
            for i in range(params.n)
        ]

    def set_facts(self, facts: object) -> None:
        """No limit is looked at here."""

    def close(self) -> None:
        self.closed = True


def new_frontend(**keywords: Any) -> tuple[Frontend, FakeClient, FakePreparer]:
    client, preparer = FakeClient(), FakePreparer()
    frontend = Frontend(engine_config(**keywords), preparer, client)  # type: ignore[arg-type]
    return frontend, client, preparer


@pytest.fixture(autouse=True)
def no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are not made text here."""

    class NoText:
        def __init__(self, *_: object, **__: object) -> None: ...

        def append(self, token_ids: object) -> str:
            return ""

        def flush(self) -> str:
            return ""

    monkeypatch.setattr("sensorium.engine.stream.Detokenizer", NoText)


async def test_many_samples_leave_the_event_loop_its_turns() -> None:
    frontend, client, _ = new_frontend()
    counts: list[int] = []

    async def others() -> None:
        while True:
            counts.append(len(client.inboxes))
            await asyncio.sleep(0)

    watching = asyncio.create_task(others())
    params = SamplingParams(n=4 * SUBMITTED_AT_ONCE)
    stream = frontend.generate(PROMPT, params, request_id="r")
    waiting = asyncio.ensure_future(anext(stream))
    while len(client.inboxes) < params.n:
        await asyncio.sleep(0)
    assert {SUBMITTED_AT_ONCE, 2 * SUBMITTED_AT_ONCE} <= set(counts)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not client.inboxes, "cancelled: nothing is left in the engine"
    assert len(client.aborted) == params.n
    watching.cancel()


@pytest.mark.parametrize("num_turns", [1, 2, 3, 4, 5])
async def test_a_cancelled_submission_leaves_nothing(num_turns: int) -> None:
    frontend, client, _ = new_frontend()
    stream = frontend.generate(PROMPT, SamplingParams(n=300), request_id="r")
    task = asyncio.ensure_future(anext(stream))
    for _ in range(num_turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not client.inboxes


async def test_a_submission_that_fails_half_way_leaves_nothing() -> None:
    frontend, client, _ = new_frontend()
    client.fail_after = 3
    stream = frontend.generate(PROMPT, SamplingParams(n=5), request_id="r")
    with pytest.raises(OverloadedError):
        await anext(stream)
    assert client.aborted == ["r#0", "r#1", "r#2"]


async def test_an_error_of_one_sample_ends_the_others() -> None:
    frontend, client, _ = new_frontend()
    stream = frontend.generate(PROMPT, SamplingParams(n=2), request_id="r")
    waiting = asyncio.ensure_future(anext(stream))
    while len(client.inboxes) < 2:
        await asyncio.sleep(0)
    client.inboxes["r#0"].put_nowait(
        SequenceUpdate("r#0", finish_reason="error", error="it could not be computed")
    )
    with pytest.raises(Exception, match="could not be computed"):
        await waiting
    assert not client.inboxes


async def test_shutdown_stops_the_engine_though_the_log_task_saw_it_die() -> None:
    frontend, client, preparer = new_frontend(log_stats_interval=0.1)
    frontend._log_task = asyncio.create_task(frontend._log_stats())
    await asyncio.sleep(0)
    frontend._num_generated = 1
    await asyncio.wait_for(frontend._log_task, 10)
    frontend._log_task = asyncio.create_task(client.stats())
    await asyncio.gather(frontend._log_task, return_exceptions=True)
    await frontend.shutdown()
    assert client.stopped
    assert preparer.closed


async def test_a_start_that_fails_on_either_side_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clients: list[FakeClient] = []
    preparers: list[FakePreparer] = []

    def new_client(config: EngineConfig) -> FakeClient:
        clients.append(FakeClient(config))
        return clients[-1]

    def broken_preparer(*_: object, **__: object) -> None:
        raise ConfigError("no tokenizer")

    def new_preparer(*_: object, **__: object) -> FakePreparer:
        preparers.append(FakePreparer())
        return preparers[-1]

    async def broken_start(self: FakeClient) -> None:
        raise ConfigError("no weights")

    monkeypatch.setattr(frontend_module, "EngineClient", new_client)
    monkeypatch.setattr(frontend_module, "Preparer", broken_preparer)
    with pytest.raises(ConfigError, match="tokenizer"):
        await Frontend.start(engine_config())
    monkeypatch.setattr(frontend_module, "Preparer", new_preparer)
    monkeypatch.setattr(FakeClient, "start", broken_start)
    with pytest.raises(ConfigError, match="weights"):
        await Frontend.start(engine_config())
    assert all(client.stopped for client in clients)
    assert [preparer.closed for preparer in preparers] == [True]
