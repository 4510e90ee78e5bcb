"""Encoders apart: what a process for HTTP asks of them, where items go, and what their death does."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from sensorium import SamplingParams
from sensorium.core.request import EngineRequest, ItemSpan, SequenceUpdate
from sensorium.engine import wire
from sensorium.engine.stats import EncoderStats, EngineFacts
from sensorium.errors import EncoderEndedError, OverloadedError, UnavailableError
from sensorium.multimodal.items import EMBEDS_DTYPE, Features, LoadCost, MediaItem
from sensorium.ray.encoders import asking, client, fleet
from sensorium.ray.encoders.client import Encoders
from sensorium.ray.encoders.fleet import EncoderFleet
from sensorium.ray.encoders.messages import Answer, Ask, EncoderReport
from sensorium.ray.encoders.router import EncoderRouter, bounded
from sensorium.ray.media.features import FeaturesRef, suit
from sensorium.ray.serving.engines import RayEngines
from sensorium.ray.serving.messages import OTHER_ENCODER, TAKEN, Clock, Ticket

PIXELS = np.full(100, 7, np.uint8)
BITS = np.arange(16, dtype=np.uint8).reshape(2, 8)
FACTS = EngineFacts(64, 4, 16, 64, "cpu", "float32", 1, 0.0, embed_bytes=8, space=b"weights")
ACCEPTED = {b"weights": FACTS}
MADE = Answer(b"weights", BITS, "float32")


def item(digest: bytes, *, precomputed: bool = False) -> MediaItem:
    features = Features("image", {"pixels": PIXELS}, 2, {}, precomputed)
    return MediaItem("image", digest, features, LoadCost("messages[0].content[0]"))


class FakeAnswer:
    """Answer of an encoder, which comes when ``future`` has it."""

    def __init__(self) -> None:
        self.future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.is_cancelled = False

    def __await__(self) -> Any:
        return self.future.__await__()

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeHandle:
    """Handle of encoders that answer with ``outcomes`` in turn; without one they wait."""

    app_name, deployment_name = "app", "Encoder"

    def __init__(self, *outcomes: Answer | Exception) -> None:
        self.outcomes = list(outcomes)
        self.answers: list[FakeAnswer] = []
        self.asks: list[Ask] = []
        self.encode = self

    @property
    def asked(self) -> list[bytes]:
        """Keys of the items, in the order of the calls."""
        return [ask.key for ask in self.asks]

    def remote(self, ask: Ask, reference: FeaturesRef) -> FakeAnswer:
        self.asks.append(ask)
        answer = FakeAnswer()
        self.answers.append(answer)
        if self.outcomes:
            outcome = self.outcomes.pop(0)
            if isinstance(outcome, Exception):
                answer.future.set_exception(outcome)
            else:
                answer.future.set_result(outcome)
        return answer


class FakeFeatures:
    """Features that go to engines as they are."""

    async def references(self, items: list[MediaItem]) -> tuple[FeaturesRef, ...]:
        return tuple(FeaturesRef(one, "plain") for one in items)  # type: ignore[arg-type]


def report(space: bytes) -> EncoderReport:
    return EncoderReport(space, "cpu avx2 float32", EncoderStats())


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What is known of the encoders: one, which has not reported yet."""
    known = SimpleNamespace(fleet=EncoderFleet({"one": None}))
    monkeypatch.setattr(client, "put_features", lambda one: FeaturesRef(one, None))
    monkeypatch.setattr("ray.put", lambda arrays: ("put", arrays))
    monkeypatch.setattr(asking, "encoders_of", lambda *_: known.fleet)
    monkeypatch.setattr(asking, "LOOK_SECONDS", 0.01)
    return known


def encoders(handle: FakeHandle, *, kept: int = 1000, waiting: int = 1000) -> Encoders:
    features: Any = FakeFeatures()
    return Encoders(handle, features, most_kept=kept, most_waiting=waiting)


async def references(
    apart: Encoders, *digests: bytes, accepted: dict[bytes, EngineFacts] = ACCEPTED
) -> tuple[FeaturesRef, ...]:
    return await apart.references([item(digest) for digest in digests], digests, accepted)


async def until_asked(handle: FakeHandle, number: int) -> None:
    while len(handle.asked) < number:
        await asyncio.sleep(0.001)


async def test_an_item_is_encoded_once() -> None:
    handle = FakeHandle()
    apart = encoders(handle)
    first = asyncio.create_task(references(apart, b"a", b"a"))
    second = asyncio.create_task(references(apart, b"a"))
    await until_asked(handle, 1)
    handle.answers[0].future.set_result(MADE)
    found = [*await first, *await second, *await references(apart, b"a")]
    assert handle.asked == [b"a"]
    for reference in found:
        assert (reference.item.digest, reference.item.features.precomputed) == (b"a", True)
        assert reference.item.features.meta == {EMBEDS_DTYPE: "float32"}
        assert not reference.item.features.arrays
        assert reference.arrays == ("put", {"embeds": BITS})
        assert reference.space == b"weights"


async def test_what_encoders_do_not_make_stays_as_it_is() -> None:
    """Embeddings, items of an adapter that changes the encoder, and what cannot be encoded."""
    handle = FakeHandle(Answer(b"weights", None))
    items = [item(b"a", precomputed=True), item(b"b"), item(b"bad")]
    apart = encoders(handle)
    found = await apart.references(items, [b"a", b"b, with an adapter", b"bad"], ACCEPTED)
    assert [reference.arrays for reference in found] == ["plain"] * 3
    assert handle.asked == [b"bad"]
    assert apart.stats().fallbacks == {"adapter": 1, "failed": 1}


@pytest.mark.parametrize(
    "answer",
    [
        Answer(b"weights", BITS[:1], "float32"),
        Answer(b"weights", BITS[:, :4], "float32"),
        Answer(b"weights", BITS.astype(np.int8), "float32"),
        Answer(b"weights", BITS, "bfloat16"),
    ],
)
async def test_an_answer_that_is_not_what_an_item_needs_is_not_used(answer: Answer) -> None:
    apart = encoders(FakeHandle(answer, MADE))
    [reference] = await references(apart, b"a")
    assert reference.arrays == "plain"
    assert apart.stats().fallbacks == {"failed": 1}
    [reference] = await references(apart, b"a")
    assert reference.item.features.precomputed


@pytest.mark.parametrize("space", [b"", b"older weights"])
async def test_embeddings_of_other_weights_are_not_used(
    known: SimpleNamespace, caplog: pytest.LogCaptureFixture, space: bytes
) -> None:
    older = dataclasses.replace(MADE, space=space)
    handle = FakeHandle(older, older, MADE)
    apart = encoders(handle)
    for name in (b"a", b"b"):
        [reference] = await references(apart, name)
        assert (reference.arrays, reference.space) == ("plain", b"")
    assert caplog.text.count("have other weights") == 1
    known.fleet = EncoderFleet({"one": report(space), "two": report(b"others")})
    await references(apart, b"a")
    assert handle.asked == [b"a", b"b"], "they are known to be others"
    assert apart.stats().fallbacks == {"other_weights": 3}
    known.fleet = EncoderFleet({"one": report(space), "two": report(b"weights")})
    [reference] = await references(apart, b"a")
    assert reference.item.features.precomputed


async def test_kept_embeddings_go_with_the_engines_that_had_their_weights() -> None:
    newer = {b"newer": dataclasses.replace(FACTS, space=b"newer")}
    handle = FakeHandle(MADE, dataclasses.replace(MADE, space=b"newer"))
    apart = encoders(handle)
    await references(apart, b"a")
    await references(apart, b"a", accepted={**ACCEPTED, **newer})
    assert handle.asked == [b"a"], "some engine has these weights yet"
    [reference] = await references(apart, b"a", accepted=newer)
    assert (handle.asked, reference.space) == ([b"a", b"a"], b"newer")


async def test_an_engine_that_does_not_accept_embeddings_gets_features() -> None:
    apart = encoders(FakeHandle())
    found = await apart.plain([item(b"a"), item(b"b", precomputed=True)])
    assert [reference.arrays for reference in found] == ["plain"] * 2
    assert apart.stats().fallbacks == {"other_weights": 1}


async def test_the_latest_embeddings_are_kept_within_a_budget() -> None:
    handle = FakeHandle(*[MADE] * 5)
    apart = encoders(handle, kept=2 * BITS.nbytes)
    for name in (b"a", b"b", b"a", b"c", b"a", b"b"):
        await references(apart, name)
    assert handle.asked == [b"a", b"b", b"c", b"b"], "b was asked for longest ago"
    small = encoders(handle, kept=1)
    [reference] = await references(small, b"a")
    assert reference.item.features.precomputed


async def test_another_encoder_is_asked_when_one_dies() -> None:
    handle = FakeHandle(RayActorError(), MADE, RayActorError(), MADE)
    apart = encoders(handle, kept=1)
    for _ in range(2):
        [reference] = await references(apart, b"a")
        assert reference.item.features.precomputed, "what one survives is no suspect any more"
    assert handle.asked == [b"a"] * 4


async def test_an_item_that_ends_encoders_is_refused_and_goes_to_no_engine() -> None:
    handle = FakeHandle(RayActorError(), RayActorError())
    apart = encoders(handle)
    for _ in range(2):
        with pytest.raises(EncoderEndedError, match="has ended 2 encoders") as caught:
            await references(apart, b"a")
        assert caught.value.param == "messages[0].content[0]"
        assert caught.value.status == 503
    assert handle.asked == [b"a", b"a"], "retries of clients end no more of them"
    assert apart.stats().num_refused == 2
    assert not apart.stats().fallbacks


def test_deaths_are_remembered_for_some_time() -> None:
    now = [0.0]
    deaths = asking.Deaths(lambda: now[0])
    deaths.add(b"a")
    now[0] = asking.REMEMBERED_SECONDS - 1
    deaths.add(b"a")
    assert (deaths.number(b"a"), deaths.number(b"b")) == (2, 0)
    now[0] *= 2
    assert deaths.number(b"a") == 2, "from the last one on"
    now[0] += 2
    assert deaths.number(b"a") == 0


async def test_those_that_were_beside_a_death_are_tried_one_after_the_other() -> None:
    handle = FakeHandle()
    apart = encoders(handle)
    bad = asyncio.create_task(references(apart, b"bad"))
    await until_asked(handle, 1)
    good = asyncio.create_task(references(apart, b"good"))
    await until_asked(handle, 2)
    for answer in handle.answers:
        answer.future.set_exception(RayActorError())
    await until_asked(handle, 3)
    [new] = await answered(handle, asyncio.create_task(references(apart, b"new")), 3)
    assert new.item.features.precomputed, "what is no suspect does not wait"
    assert handle.asked[2:] == [b"bad", b"new"], "one at a time"
    handle.answers[2].future.set_exception(RayActorError())
    with pytest.raises(EncoderEndedError):
        await bad
    [reference] = await answered(handle, good, 4)
    assert reference.item.features.precomputed


async def answered(
    handle: FakeHandle, task: asyncio.Task[tuple[FeaturesRef, ...]], place: int
) -> tuple[FeaturesRef, ...]:
    """Result of a task once the call at a place has been answered."""
    await until_asked(handle, place + 1)
    handle.answers[place].future.set_result(MADE)
    return await task


DOWN = EncoderFleet({}, down_since=-1e9)


async def test_an_item_that_may_have_ended_the_only_encoder_goes_to_no_engine(
    known: SimpleNamespace,
) -> None:
    handle = FakeHandle()
    apart = encoders(handle)
    asked = asyncio.create_task(references(apart, b"a"))
    await until_asked(handle, 1)
    known.fleet = DOWN
    handle.answers[0].future.set_exception(RayActorError())
    with pytest.raises(UnavailableError, match="no other one"):
        await asked
    [other] = await references(apart, b"b")
    assert other.arrays == "plain"
    known.fleet = EncoderFleet({"two": report(b"others")})
    handle.outcomes = [dataclasses.replace(MADE, space=b"others")]
    [reference] = await references(apart, b"a")
    assert handle.asked == [b"a", b"a"], "even if the answer cannot be used"
    assert reference.arrays == "plain", "an encoder has survived it"


async def test_a_call_that_was_taken_ends_with_its_encoder(known: SimpleNamespace) -> None:
    """Until its death is known, an item that may be the cause must not go to an engine."""
    handle = FakeHandle()
    apart = encoders(handle)
    asked = asyncio.create_task(references(apart, b"a"))
    await until_asked(handle, 1)
    fleet.set_taken(handle.asks[0].number)
    known.fleet = DOWN
    await asyncio.sleep(5 * asking.LOOK_SECONDS)
    assert not asked.done()
    handle.answers[0].future.set_exception(RayActorError())
    with pytest.raises(UnavailableError, match="no other one"):
        await asked
    assert not fleet.is_taken(handle.asks[0].number)


async def test_engines_encode_while_there_are_no_encoders(
    known: SimpleNamespace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = FakeHandle()
    apart = encoders(handle)
    waiting = asyncio.create_task(references(apart, b"a"))
    await until_asked(handle, 1)
    known.fleet = DOWN
    [reference] = [*await waiting, *await references(apart, b"b")][:1]
    assert reference.arrays == "plain"
    assert handle.asked == [b"a"], "the second one waits for nobody"
    assert handle.answers[0].is_cancelled
    known.fleet = EncoderFleet({"two": None})
    handle.outcomes = [DeploymentUnavailableError(SimpleNamespace(name="Encoder"))]
    await references(apart, b"b")
    assert caplog.text.count("no encoder is there") == 1
    assert apart.stats().fallbacks == {"no_encoder": 3}
    handle.outcomes = [MADE]
    [reference] = await references(apart, b"c")
    assert reference.item.features.precomputed


async def test_a_call_that_fails_leaves_the_item_to_an_engine() -> None:
    apart = encoders(FakeHandle(RayError()))
    [reference] = await references(apart, b"a")
    assert reference.arrays == "plain"
    assert apart.stats().fallbacks == {"failed": 1}


async def test_too_many_items_are_refused() -> None:
    handle = FakeHandle()
    apart = encoders(handle, waiting=150)
    first = asyncio.create_task(references(apart, b"a", b"larger than the limit together"))
    await until_asked(handle, 2)
    with pytest.raises(OverloadedError) as caught:
        await references(apart, b"b")
    assert caught.value.retry_after == 2
    for answer in handle.answers:
        answer.future.set_result(MADE)
    await first
    handle.outcomes = [BackPressureError(1, 1)]
    with pytest.raises(OverloadedError):
        await references(apart, b"b")
    handle.outcomes = [MADE]
    await references(apart, b"b")


async def test_a_request_that_leaves_frees_its_work_unless_others_want_it() -> None:
    handle = FakeHandle()
    apart = encoders(handle, waiting=150)
    leaving = asyncio.create_task(references(apart, b"a"))
    staying = asyncio.create_task(references(apart, b"a"))
    await until_asked(handle, 1)
    leaving.cancel()
    await asyncio.wait((leaving,))
    assert not handle.answers[0].is_cancelled
    staying.cancel()
    await asyncio.wait((staying,))
    while not handle.answers[0].is_cancelled:
        await asyncio.sleep(0.001)
    handle.outcomes = [MADE]
    await references(apart, b"b")


def test_a_busy_replica_comes_behind_the_others() -> None:
    assert bounded(["a", "b"], {}) == ["a", "b"]
    assert bounded(["a", "b"], {"a": 1}) == ["b", "a"]
    assert bounded(["a", "b"], {"a": 1, "b": 1}) == ["a", "b"]
    assert bounded(["a", "b"], {"a": 3, "b": 1}) == ["b", "a"]
    assert bounded(["a"], {"a": 9}) == ["a"]


class FakeRouting(EncoderRouter):
    """The router without Ray Serve around it."""

    _event_loop = SimpleNamespace(call_soon_threadsafe=lambda call, *a: call(*a))

    def __init__(self) -> None:
        self.initialize_state()


def test_an_attempt_is_counted_until_it_ends_itself() -> None:
    """Ray Serve ends a rejected attempt with the id of the next one, which goes on."""
    routing, replica = FakeRouting(), SimpleNamespace(unique_id="a")
    ask = Ask(b"key", -7)
    pending = SimpleNamespace(args=[ask], metadata=SimpleNamespace(internal_request_id="r"))
    calls: list[Any] = []
    later = SimpleNamespace(add_done_callback=calls.append)
    at_once = SimpleNamespace(add_done_callback=lambda call: call(None))
    assert not fleet.is_taken(ask.number)
    routing.on_request_routed(pending, replica, later)
    assert fleet.is_taken(ask.number)
    routing.on_request_routed(pending, replica, later)
    routing.on_request_completed(replica, "r")
    assert routing.num_open == {"a": 2}
    routing.on_request_routed(pending, replica, at_once)
    for call in calls:
        call(None)
    assert not routing.num_open
    fleet.forget_taken(ask.number)


def test_the_time_without_encoders_counts_from_the_last_one() -> None:
    application = "a test of the time without encoders"
    fleet.set_encoders(application, "Encoder", {"a": None})
    assert fleet.encoders_of(application, "Encoder").down_since is None
    fleet.set_encoders(application, "Encoder", {})
    since = fleet.encoders_of(application, "Encoder").down_since
    fleet.set_encoders(application, "Encoder", {})
    found = fleet.encoders_of(application, "Encoder")
    assert found.down_since == since
    assert found.is_down(3.0, since + 4)
    assert not found.is_down(3.0, since + 2)


class FakeEngines:
    """Handle of engines: the first one has other weights than the encoders."""

    app_name, deployment_name = "a test of engines with other weights", "Engine"

    def __init__(self) -> None:
        self.generate = self
        self.facts = SimpleNamespace(remote=self.said)
        self.spaces: list[list[bytes]] = []

    async def said(self) -> bytes:
        """Facts of the engine that is asked first."""
        return msgspec.msgpack.encode(FACTS)

    def options(self, *, stream: bool) -> FakeEngines:
        return self

    async def remote(
        self, ticket: Ticket, message: bytes, features: tuple[FeaturesRef, ...], clock: Clock
    ) -> AsyncIterator[bytes]:
        self.spaces.append([one.space for one in features])
        if not suit(features, b"other weights"):
            yield OTHER_ENCODER
            return
        yield TAKEN
        submit: Any = wire.decode_to_engine(message)
        ended = SequenceUpdate(submit.request.request_id, finish_reason="stop")
        yield wire.encode(wire.Updates([ended]))


async def test_an_engine_with_other_weights_gets_features_in_place_of_embeddings() -> None:
    handle, apart = FakeEngines(), encoders(FakeHandle(MADE))
    plain: Any = FakeFeatures()
    engines = RayEngines(handle, plain, apart)
    await engines.start()
    span = ItemSpan(b"a", "image", ((0, 2),))
    request = EngineRequest("r", (1, 2, 3), SamplingParams(), 1, items=(span,))
    queue: asyncio.Queue[Any] = asyncio.Queue()
    engines.submit(request, [item(b"a")], queue)
    update = await queue.get()
    assert (update.request_id, update.finish_reason) == ("r", "stop")
    assert handle.spaces == [[b"weights"], [b""]]
    assert apart.stats().fallbacks == {"other_weights": 1}
