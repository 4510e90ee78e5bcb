"""The frontend over a client that plays the engine: ends, errors, and the event loop's share."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sensorium.config import EngineConfig, engine_config
from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.engine.prompts.adapters import KnownAdapters
from sensorium.engine.prompts.types import MediaOptions, PreparedPrompt, RawPrompt
from sensorium.engine.serving import adapters as adapters_module
from sensorium.engine.serving import frontend as frontend_module
from sensorium.engine.serving.client import OutputQueue
from sensorium.engine.serving.frontend import SAMPLE_TOKENS, SUBMITTED_TOKENS, Frontend
from sensorium.engine.serving.process import EngineProcess
from sensorium.engine.serving.stats_log import log_stats
from sensorium.engine.stats import AdapterFacts, EngineFacts, EngineStats
from sensorium.errors import (
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    UnavailableError,
)
from sensorium.metrics.report import RequestReport
from sensorium.models.embedder import GENERATES, Embedder
from sensorium.params import PoolingParams, SamplingParams

PROMPT = RawPrompt(text="a")


class FakeEngine:
    """A supervisor that keeps what was submitted; ``fail_after`` sequences, it has no more room."""

    num_restarts = 3

    def __init__(self, config: EngineConfig | None = None) -> None:
        self.alive = True
        self.answers: list[EngineStats] = []
        self.fail_after: int | None = None
        self.output_queues: dict[str, OutputQueue] = {}
        self.aborted: list[str] = []
        self.adapters: list[AdapterFacts] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_changes = 0
        self.stopped = False

    async def start(self) -> None:
        await asyncio.Event().wait()

    def watch(self, on_start: Callable[[Any], None]) -> None:
        """It never dies."""

    def current(self) -> FakeEngine:
        if not self.alive:
            raise EngineDeadError("gone")
        return self

    def submit(
        self, request: EngineRequest, items: Sequence[Any], output_queue: OutputQueue
    ) -> None:
        if len(self.output_queues) == self.fail_after:
            raise OverloadedError("full")
        self.output_queues[request.request_id] = output_queue

    def abort(self, request_ids: Sequence[str]) -> None:
        self.aborted += [i for i in request_ids if i in self.output_queues]
        for request_id in request_ids:
            self.output_queues.pop(request_id, None)

    async def stats(self) -> EngineStats:
        self.current()
        if not self.answers:
            await asyncio.Event().wait()
        return self.answers.pop()

    async def load_adapter(self, name: str, path: str, folder: str) -> EngineFacts:
        self.current()
        self.num_changes += 1
        await self.gate.wait()
        self.adapters.append(AdapterFacts(name, path, name.encode(), 8, folder=folder))
        return self.facts

    async def unload_adapter(self, name: str) -> EngineFacts:
        self.num_changes += 1
        await self.gate.wait()
        self.adapters = [adapter for adapter in self.adapters if adapter.name != name]
        return self.facts

    @property
    def facts(self) -> EngineFacts:
        own = tuple(self.adapters)
        return EngineFacts(8, 1, 1, 1, "cpu", "float32", 1, 0.0, adapters=own)

    async def stop(self) -> None:
        self.stopped = True


class FakePreparer:
    """Prepares nothing; one request per sample."""

    tokenizer: Any = None
    embedder: Embedder | None = None
    closed = False
    num_prepared = 0
    token_ids: tuple[int, ...] = (1,)

    def __init__(self) -> None:
        self.adapters = KnownAdapters()

    def resolve_pooling(self, params: PoolingParams) -> PoolingParams:
        if self.embedder is None:
            raise InvalidRequestError(GENERATES)
        return self.embedder.resolve(params)

    async def prepare(self, prompt: object) -> PreparedPrompt:
        self.num_prepared += 1
        return PreparedPrompt("a", self.token_ids)

    async def grammar(self, params: SamplingParams) -> None:
        """No constraints here."""

    async def predicted_ids(self, params: SamplingParams) -> tuple[int, ...]:
        """No tokens are tried here."""
        return ()

    def requests(
        self,
        prepared: PreparedPrompt,
        params: SamplingParams,
        request_id: str,
        priority: int,
        arrival_time: float,
        grammar: str | None,
        predicted_ids: tuple[int, ...],
    ) -> list[EngineRequest]:
        one = params.replace(n=1)
        return [
            EngineRequest(f"{request_id}#{i}", self.token_ids, one, 4, arrival_time=arrival_time)
            for i in range(params.n)
        ]

    def set_facts(self, facts: EngineFacts) -> None:
        """Only adapters are looked at here."""
        self.adapters.set(facts.adapters)

    def media_stats(self) -> dict[str, float]:
        return {"fetch_count": 2.0}

    def close(self) -> None:
        self.closed = True


def new_frontend(**keywords: Any) -> tuple[Frontend, FakeEngine, FakePreparer]:
    client, input_processor = FakeEngine(), FakePreparer()
    frontend = Frontend(engine_config(**keywords), input_processor, client)  # type: ignore[arg-type]
    return frontend, client, input_processor


@pytest.fixture(autouse=True)
def no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are not made text here."""

    class NoText:
        def __init__(self, *_: object, **__: object) -> None: ...

        def append(self, token_ids: object) -> str:
            return ""

        def flush(self) -> str:
            return ""

    monkeypatch.setattr("sensorium.engine.outputs.stream.Detokenizer", NoText)


@pytest.mark.parametrize("num_tokens", [1, 20_000, 200_000])
async def test_many_samples_leave_the_event_loop_its_turns(num_tokens: int) -> None:
    frontend, client, input_processor = new_frontend()
    input_processor.token_ids = (1,) * num_tokens
    counts: list[int] = []

    async def others() -> None:
        while True:
            counts.append(len(client.output_queues))
            await asyncio.sleep(0)

    watching = asyncio.create_task(others())
    at_once = -(-SUBMITTED_TOKENS // (SAMPLE_TOKENS + num_tokens))
    params = SamplingParams(n=4 * at_once)
    stream = frontend.generate(PROMPT, params, request_id="r")
    waiting = asyncio.ensure_future(anext(stream))
    while len(client.output_queues) < params.n and not waiting.done():
        await asyncio.sleep(0)
    assert {at_once, 2 * at_once} <= set(counts)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not client.output_queues, "cancelled: nothing is left in the engine"
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
    assert not client.output_queues


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
    while len(client.output_queues) < 2 and not waiting.done():
        await asyncio.sleep(0)
    client.output_queues["r#0"].put_nowait(
        SequenceUpdate("r#0", finish_reason="error", error="it could not be computed")
    )
    with pytest.raises(Exception, match="could not be computed"):
        await waiting
    assert not client.output_queues


async def test_the_log_goes_on_after_the_engine_was_gone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    client, num_made = FakeEngine(), 0
    turns = [True, False]

    async def next_interval(_: float) -> None:
        nonlocal num_made
        if not turns:
            raise asyncio.CancelledError
        client.alive = turns.pop()
        client.answers = [EngineStats(num_running=5)]
        num_made += 1

    monkeypatch.setattr("sensorium.engine.serving.stats_log.asyncio.sleep", next_interval)
    with pytest.raises(asyncio.CancelledError):
        await log_stats(lambda: num_made, client.stats, interval=1.0, unit="generated tokens")
    monkeypatch.undo()
    assert [record.message.count("5 running") for record in caplog.records] == [1]


async def test_a_frontend_that_is_shut_down_ends_what_it_uses() -> None:
    frontend, client, input_processor = new_frontend()
    await frontend.shutdown()
    assert client.stopped
    assert input_processor.closed


async def test_stats_are_what_is_known_when_the_engine_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frontend_module, "STATS_SECONDS", 0.01)
    frontend, client, _ = new_frontend()
    client.answers = [EngineStats(num_running=2, kv_blocks_total=9, num_steps=7)]
    for _ in range(2):
        stats = await frontend.stats()
        assert (stats.num_running, stats.num_steps) == (2, 7), "a long step: as it was before it"
        assert (stats.media, stats.num_engine_restarts) == ({"fetch_count": 2.0}, 3)
    client.alive = False
    stats = await frontend.stats()
    assert (stats.num_running, stats.kv_blocks_total, stats.num_steps) == (0, 9, 7)
    assert stats.media == {"fetch_count": 2.0}
    client.alive, client.answers = True, [EngineStats(num_running=1, num_steps=1)]
    assert (await frontend.stats()).num_steps == 1


async def test_while_the_engine_is_gone_nothing_is_prepared() -> None:
    frontend, client, input_processor = new_frontend()
    client.alive = False
    with pytest.raises(EngineDeadError):
        await anext(frontend.generate(PROMPT, SamplingParams(), request_id="r"))
    with pytest.raises(EngineDeadError):
        frontend.check_alive()
    assert input_processor.num_prepared == 0
    client.alive = True
    frontend.check_alive()


@pytest.mark.parametrize("how", ["error", "abort"])
async def test_what_ends_a_request_is_reported(how: str) -> None:
    frontend, client, _ = new_frontend()
    told: list[str] = []

    class Told:
        def finished(self, report: RequestReport) -> None:
            told.append(report.finish_reason)

    frontend.metrics = Told()  # type: ignore[assignment]
    stream = frontend.generate(PROMPT, SamplingParams(), request_id="r")
    waiting = asyncio.ensure_future(anext(stream))
    while not client.output_queues and not waiting.done():
        await asyncio.sleep(0)
    if how == "error":
        client.output_queues["r#0"].put_nowait(EngineDeadError("gone"))
    else:
        waiting.cancel()
    with pytest.raises((EngineDeadError, asyncio.CancelledError)):
        await waiting
    assert told == [how]


async def test_a_start_that_fails_on_either_side_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clients: list[FakeEngine] = []
    preparers: list[FakePreparer] = []

    def new_client(config: EngineConfig, process: EngineProcess | None) -> FakeEngine:
        clients.append(FakeEngine(config))
        return clients[-1]

    def broken_preparer(*_: object, **__: object) -> None:
        raise ConfigError("no tokenizer")

    def new_preparer(*_: object, **__: object) -> FakePreparer:
        preparers.append(FakePreparer())
        return preparers[-1]

    async def broken_start(self: FakeEngine) -> None:
        raise ConfigError("no weights")

    monkeypatch.setattr(frontend_module, "EngineSupervisor", new_client)
    monkeypatch.setattr(frontend_module, "InputProcessor", broken_preparer)
    with pytest.raises(ConfigError, match="tokenizer"):
        await Frontend.start(engine_config())
    monkeypatch.setattr(frontend_module, "InputProcessor", new_preparer)
    monkeypatch.setattr(FakeEngine, "start", broken_start)
    with pytest.raises(ConfigError, match="weights"):
        await Frontend.start(engine_config())
    assert all(client.stopped for client in clients)
    assert [input_processor.closed for input_processor in preparers] == [True]


async def test_what_a_thread_still_makes_when_a_start_is_cancelled_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, gate, preparer = threading.Event(), threading.Event(), FakePreparer()

    def slow_preparer(*_: object, **__: object) -> FakePreparer:
        begun.set()
        gate.wait(60)
        return preparer

    monkeypatch.setattr(frontend_module, "EngineSupervisor", lambda *_: FakeEngine())
    monkeypatch.setattr(frontend_module, "InputProcessor", slow_preparer)
    starting = asyncio.create_task(Frontend.start(engine_config()))
    assert await asyncio.to_thread(begun.wait, 60)
    starting.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert preparer.closed


async def test_the_line_after_an_outage_is_about_all_of_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No line is written while there is no engine.

    The tokens from before are spread over the time since the last.
    """
    client, now = FakeEngine(), 100.0
    client.alive = False
    client.answers = [EngineStats()]

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now > 102.5:
            client.alive = True
        if now > 103.5:
            raise asyncio.CancelledError

    class Clock:
        monotonic = staticmethod(lambda: now)

    monkeypatch.setattr("sensorium.engine.serving.stats_log.time", Clock)
    monkeypatch.setattr("sensorium.engine.serving.stats_log.asyncio.sleep", sleep)
    with caplog.at_level("INFO"), pytest.raises(asyncio.CancelledError):
        await log_stats(lambda: 60, client.stats, interval=1.0, unit="generated tokens")
    [line] = [record.getMessage() for record in caplog.records if "tokens/s" in record.getMessage()]
    assert line.startswith("20.0 generated tokens/s")


async def test_an_adapter_goes_when_its_requests_have_ended() -> None:
    frontend, client, _ = new_frontend()
    await frontend.load_adapter("a", "folder")
    prompt = RawPrompt(text="a", media=MediaOptions(adapter="a"))
    stream = frontend.generate(prompt, SamplingParams(), request_id="r")
    waiting = asyncio.ensure_future(anext(stream))
    while not client.output_queues:
        await asyncio.sleep(0)
    unloading = asyncio.create_task(frontend.unload_adapter("a"))
    while "a" in frontend.adapters:
        await asyncio.sleep(0)
    with pytest.raises(ModelNotFoundError, match="'a' is not loaded"):
        await anext(frontend.generate(prompt, SamplingParams(), request_id="s"))
    assert [adapter.name for adapter in client.adapters] == ["a"], "one request still uses it"
    assert not unloading.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await unloading
    assert client.adapters == []
    with pytest.raises(ModelNotFoundError):
        await frontend.unload_adapter("a")


async def test_an_adapter_goes_while_another_is_loaded() -> None:
    frontend, client, _ = new_frontend()
    await frontend.load_adapter("a", "~/adapters/a")
    assert client.adapters[0].folder == "", "the engine finds it"
    client.gate.clear()
    loading = asyncio.create_task(frontend.load_adapter("b", "folder"))
    while client.num_changes < 2:
        await asyncio.sleep(0)
    unloading = asyncio.create_task(frontend.unload_adapter("a"))
    while "a" in frontend.adapters:
        await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    assert client.num_changes == 3, "the engine has been told"
    client.gate.set()
    await asyncio.gather(loading, unloading)
    assert [adapter.name for adapter in frontend.adapters] == ["b"]


async def test_who_gives_up_unloading_leaves_the_adapter() -> None:
    frontend, client, _ = new_frontend()
    await frontend.load_adapter("a", "folder")
    with frontend.adapters.using("a"):
        unloading = asyncio.create_task(frontend.unload_adapter("a"))
        while "a" in frontend.adapters:
            await asyncio.sleep(0)
        unloading.cancel()
        await asyncio.gather(unloading, return_exceptions=True)
        assert "a" in frontend.adapters
    await frontend.provide_adapter("a", "folder")
    assert len(client.adapters) == 1
    await frontend.unload_adapter("a")
    assert "a" not in frontend.adapters


async def test_a_name_means_one_folder() -> None:
    frontend, client, _ = new_frontend()
    await frontend.provide_adapter("a", "ckpt-1000")
    await frontend.provide_adapter("a", "ckpt-1000")
    await frontend.provide_adapter("a", "")
    with pytest.raises(InvalidRequestError, match="loaded from another folder"):
        await frontend.provide_adapter("a", "ckpt-2000")
    with pytest.raises(InvalidRequestError, match="give its lora_path"):
        await frontend.provide_adapter("b", "")
    client.gate.clear()
    both = [asyncio.create_task(frontend.provide_adapter("c", path)) for path in ("x", "y")]
    while client.num_changes < 2:
        await asyncio.sleep(0)
    client.gate.set()
    _, error = await asyncio.gather(*both, return_exceptions=True)
    assert isinstance(error, InvalidRequestError)
    assert [adapter.path for adapter in client.adapters] == ["ckpt-1000", "x"]


async def test_an_adapter_of_the_hub_is_downloaded_by_the_frontend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frontend, client, _ = new_frontend()
    found = Path("/cache/brief")
    monkeypatch.setattr(adapters_module, "find_adapter", lambda path, download_dir: found)
    for _ in range(2):
        await frontend.provide_adapter("a", "org/brief")
    assert [(a.path, a.folder) for a in client.adapters] == [("org/brief", str(found))]
    with pytest.raises(InvalidRequestError, match="another folder"):
        await frontend.provide_adapter("a", "org/formal")


@pytest.mark.parametrize("loads", [True, False])
async def test_a_change_ends_when_its_caller_has_gone(loads: bool) -> None:
    frontend, client, _ = new_frontend()
    if not loads:
        await frontend.load_adapter("a", "folder")
    client.num_changes = 0
    client.gate.clear()
    work = frontend.load_adapter("a", "folder") if loads else frontend.unload_adapter("a")
    caller = asyncio.create_task(work)
    while not client.num_changes:
        await asyncio.sleep(0)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    assert caller.cancelled()
    assert "a" not in frontend.adapters, "not yet, or not any more"
    client.gate.set()
    while asyncio.all_tasks() != {asyncio.current_task()}:
        await asyncio.sleep(0)
    assert ("a" in frontend.adapters) is loads
    assert len(client.adapters) == loads


async def test_who_waits_for_requests_to_end_stops_no_other_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frontend, _, _ = new_frontend()
    await frontend.load_adapter("a", "folder")
    with frontend.adapters.using("a"):
        unloading = asyncio.create_task(frontend.unload_adapter("a"))
        while "a" in frontend.adapters:
            await asyncio.sleep(0)
        await frontend.load_adapter("b", "folder")
        await frontend.unload_adapter("b")
        with pytest.raises(InvalidRequestError, match="is being unloaded"):
            await frontend.provide_adapter("a", "folder")
        unloading.cancel()
        await asyncio.gather(unloading, return_exceptions=True)
        monkeypatch.setattr(adapters_module, "UNUSED_SECONDS", 0.0)
        with pytest.raises(UnavailableError, match="it stays"):
            await frontend.unload_adapter("a")
        assert "a" in frontend.adapters
