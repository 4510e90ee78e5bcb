"""The router: same content to the same replica, bounded load, bounded memory, no stale replica."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sensorium.distributed.routing import ReplicaLoad, RequestKey, Router, RoutingCosts
from sensorium.distributed.routing.key import PREFIX_LENGTHS

IDS = [f"replica-{i}" for i in range(8)]


def key(*parts: object, num_tokens: int = 256, media: tuple[object, ...] = ()) -> RequestKey:
    """A key whose prefixes change where a part changes; the last part goes on to the end."""
    num = sum(length <= num_tokens for length in PREFIX_LENGTHS)
    chain = [repr((parts[: min(i, len(parts) - 1) + 1], i)) for i in range(num)]
    prefixes = tuple(blake3(text.encode()).digest(length=8) for text in chain)
    return RequestKey(num_tokens, prefixes, tuple((f"{m:>8}".encode(), 64) for m in media))


def router(ids: list[str] = IDS, **arguments: object) -> Router:
    made = Router(seed=0, **arguments)
    made.set_replicas(ids)
    return made


def serve(to: Router, request: RequestKey) -> str:
    """A request that ends before the next one comes."""
    chosen = to.choose(request)[0]
    to.sent(chosen, request)
    to.first_token(chosen, request)
    to.ended(chosen, request)
    return chosen


def test_a_prefix_goes_where_it_was() -> None:
    own = router()
    first = serve(own, key("system", "one", num_tokens=512))
    for turn in range(2, 10):
        assert serve(own, key("system", "one", num_tokens=512 + 100 * turn)) == first


def test_an_item_goes_where_it_was_and_repeats_meet_it() -> None:
    own, seen, repeats, met = router(), {}, 0, 0
    draw = random.Random(1)
    for number in range(1000):
        image = min(49, int(draw.paretovariate(1.0)) - 1)
        chosen = serve(own, key("text", number, media=(image,)))
        if image in seen:
            repeats += 1
            met += chosen in seen[image]
        seen.setdefault(image, set()).add(chosen)
    assert met / repeats >= 0.95


def test_routers_that_do_not_talk_agree_on_new_content() -> None:
    one, other = router(), router(IDS[::-1])
    requests = [key(i, media=(i,) if i % 2 else ()) for i in range(200)]
    chosen = [serve(one, request) for request in requests]
    assert chosen == [serve(other, request) for request in reversed(requests)][::-1]
    assert min(Counter(chosen).values()) >= 200 / 8 / 4
    assert set(chosen) == set(IDS)


def test_each_turn_of_a_conversation_meets_its_replica_from_any_router() -> None:
    """All conversations begin with one of two system prompts; each turn goes to another router."""
    routers, draw = [router(num_routers=4) for _ in range(4)], random.Random(0)
    for number in range(40):  # what is shared becomes known
        for own in routers:
            serve(own, key(f"system {number % 2}", f"{number} first", num_tokens=512))
    met, used = 0, Counter()
    for number in range(100):
        parts = (f"system {number % 2}", number)
        turns = [key(*parts, num_tokens=length) for length in (512, 800, 1200)]
        chosen = [
            serve(own, turn) for own, turn in zip(draw.sample(routers, 3), turns, strict=True)
        ]
        met += (chosen[1] == chosen[0]) + (chosen[2] in chosen[:2])
        used[chosen[0]] += 1
    assert met >= 140
    assert len(used) >= 4


def test_old_content_of_a_full_cache_counts_less() -> None:
    own = router(costs=RoutingCosts(slack=64))
    request = key("old", num_tokens=1024)
    holder = serve(own, request)
    for computed in (1, 50_000):
        load = ReplicaLoad(kv_tokens=10_000, computed_tokens=computed, waiting_tokens=800)
        own.report(holder, load)
        if computed == 1:
            serve(own, request)
            assert own.choose(request)[0] == holder
    assert own.choose(request)[0] != holder


def test_items_that_were_evicted_since_count_less() -> None:
    own = router()
    request = key("a", media=("x",))
    holder = serve(own, request)
    busy = {"waiting_tokens": 400, "encoder_items": 10}
    own.report(holder, ReplicaLoad(encoder_evictions=9, **busy))
    assert own.choose(request)[0] == holder
    own.report(holder, ReplicaLoad(encoder_evictions=1000, **busy, kv_usage=0.95))
    assert own.choose(request)[0] != holder


def test_waiting_that_costs_more_than_computing_sends_it_elsewhere() -> None:
    own = router()
    request = key("system", num_tokens=1024)
    holder = serve(own, request)
    own.report(holder, ReplicaLoad(num_running=1, num_waiting=1, waiting_tokens=600))
    assert own.choose(request)[0] == holder
    own.report(holder, ReplicaLoad(num_running=4, num_waiting=4, waiting_tokens=4000))
    assert own.choose(request)[0] != holder
    assert holder in own.choose(request)


def test_what_was_sent_counts_before_a_report_tells_it() -> None:
    own = router()
    request = key("popular", num_tokens=1024)
    spread = set()
    for _ in range(200):
        chosen = own.choose(request)[0]
        own.sent(chosen, request)
        spread.add(chosen)
    assert len(spread) >= len(IDS) / 2


@pytest.mark.parametrize("sent_to", ["one", "two"])
def test_load_is_bounded_for_popular_content(sent_to: str) -> None:
    """All want the same prefix: nobody gets much more than the mean."""
    costs = RoutingCosts(slack=64, spread=0.25)
    routers = [router(costs=costs) for _ in range(1 if sent_to == "one" else 2)]
    request, sent = key("popular", num_tokens=512), Counter()
    for number in range(2400):
        own = routers[number % len(routers)]
        chosen = own.choose(request)[0]
        own.sent(chosen, request)
        sent[chosen] += 1
    assert max(sent.values()) <= 1.3 * 2400 / len(IDS)


def test_full_kv_caches_are_avoided() -> None:
    own = router()
    request = key("a", num_tokens=128)
    holder = serve(own, request)
    own.report(holder, ReplicaLoad(num_running=1, kv_usage=1.0))
    assert own.choose(request)[0] != holder


def test_a_replica_that_left_or_fails_gets_nothing() -> None:
    own = router()
    request = key("a", num_tokens=512, media=("x",))
    holder = serve(own, request)
    own.report(holder, ReplicaLoad(healthy=False))
    assert holder not in own.choose(request) + own.choose(None)
    own.report(holder, ReplicaLoad())
    assert own.choose(request)[0] == holder
    own.set_replicas([id for id in IDS if id != holder])
    assert holder not in own.choose(request) + own.choose(None)
    own.sent(holder, request)
    own.first_token(holder, request)
    own.ended(holder, request)
    own.report(holder, ReplicaLoad())
    other = serve(own, request)
    own.set_replicas(IDS)
    assert own.choose(request)[0] == other, "it comes back with empty caches"


def test_an_engine_that_has_started_again_has_nothing_cached() -> None:
    own = router(costs=RoutingCosts(slack=0, spread=0))
    request = key("a", num_tokens=512)
    holder = serve(own, request)
    own.report(holder, ReplicaLoad(waiting_tokens=100))
    assert own.choose(request)[0] == holder
    for healthy in (False, True):
        own.report(holder, ReplicaLoad(waiting_tokens=100, healthy=healthy))
    assert own.choose(request)[0] != holder


def test_without_any_healthy_replica_all_are_tried() -> None:
    own = router()
    for id in IDS:
        own.report(id, ReplicaLoad(healthy=False))
    assert own.choose(key("a"))
    assert own.choose(None)
    assert Router().choose(None) == Router().choose(key("a")) == []


def test_only_those_that_are_allowed_are_chosen() -> None:
    own = router()
    for number in range(50):
        request = key(number, media=(number,))
        serve(own, request)
        assert set(own.choose(request, IDS[:2])) <= set(IDS[:2])
        assert set(own.choose(None, IDS[2:3])) == {IDS[2]}
    assert own.choose(key("a"), ["unknown"]) == []


def test_without_content_the_better_of_two_is_chosen() -> None:
    own = router()
    for id in IDS[1:]:
        own.report(id, ReplicaLoad(num_running=10))
    chosen = Counter(own.choose(None)[0] for _ in range(400))
    assert chosen[IDS[0]] > 400 / 8 * 1.4
    assert len(chosen) == len(IDS)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), num=st.integers(1, 12))
def test_no_replica_starves(seed: int, num: int) -> None:
    draw = random.Random(seed)
    own = router([f"{seed}-{i}" for i in range(num)])
    sent = Counter(serve(own, key(draw.random())) for _ in range(40 * num))
    assert len(sent) == num


class Fleet(RuleBasedStateMachine):
    """Replicas come, go, fail and report; requests start, and end in any order."""

    CAPACITY = 64

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(seed=0, capacity=self.CAPACITY)
        self.present: list[str] = []
        self.healthy: dict[str, bool] = {}
        self.open: list[tuple[str, RequestKey, bool]] = []

    @rule(ids=st.lists(st.sampled_from(IDS), unique=True))
    def replace(self, ids: list[str]) -> None:
        self.router.set_replicas(ids)
        self.healthy = {id: self.healthy[id] if id in self.present else True for id in ids}
        self.present = ids
        self.open = [entry for entry in self.open if entry[0] in ids]

    @precondition(lambda self: self.present)
    @rule(data=st.data(), waiting=st.integers(0, 9999), usage=st.floats(0, 1), ok=st.booleans())
    def report(self, data: st.DataObject, waiting: int, usage: float, ok: bool) -> None:
        id = data.draw(st.sampled_from(self.present))
        self.router.report(id, ReplicaLoad(1, 2, waiting, usage, ok))
        self.healthy[id] = ok

    @rule(
        part=st.integers(0, 5),
        length=st.integers(1, 3000),
        media=st.lists(st.integers(0, 9), max_size=3),
    )
    def request(self, part: int, length: int, media: list[int]) -> None:
        request = key("all", part, num_tokens=length, media=tuple(media))
        chosen = self.router.choose(request)
        assert len(chosen) == len(set(chosen)) <= 4
        assert bool(chosen) == bool(self.present)
        if any(self.healthy.values()):
            assert all(self.healthy[id] for id in chosen)
        if chosen:
            self.router.sent(chosen[0], request)
            self.open.append((chosen[0], request, False))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def proceed(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.open) - 1))
        id, request, begun = self.open.pop(index)
        if begun or data.draw(st.booleans()):
            self.router.ended(id, request)
        else:
            self.router.first_token(id, request)
            self.open.append((id, request, True))

    @invariant()
    def memory_is_bounded(self) -> None:
        assert self.router.num_remembered <= 2 * (self.CAPACITY + 64)

    def teardown(self) -> None:
        for id, request, _ in self.open:
            self.router.ended(id, request)
        waits = self.router.waits()
        for id in self.present:
            self.router.report(id, ReplicaLoad())
        assert set(waits) == set(self.present)
        assert set(self.router.waits().values()) <= {0.0}


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_only_allowed_replicas_are_chosen_also_when_as_many_are_allowed_as_there_are() -> None:
    to = router(["a", "b"])
    request = key("x", media=("m",))
    for _ in range(20):
        assert "a" not in to.choose(request, ["b", "gone"])
        assert to.choose(None, ["b", "gone"]) == ["b"]
